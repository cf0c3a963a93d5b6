"""What surrounds the workers of this node: environment variables, what was begun before, log lines."""

import contextlib
import logging
import os
import warnings
from collections.abc import Callable, Generator, Mapping

import torch

from fabricfn.errors import ConfigurationError


def check_ready(what: str, initialised: Callable[[], bool] = torch.cuda.is_initialized) -> None:
    """Raise `ConfigurationError` when this process cannot be the parent of the ranks."""
    if initialised():
        raise ConfigurationError(
            f"{what} would start the ranks, but this process has initialised CUDA already, whose memory and context"
            " the ranks cannot share. Call it before anything touches a GPU."
        )


@contextlib.contextmanager
def environment(settings: Mapping[str, str]) -> Generator[None]:
    """These environment variables inside the block; outside it, everything as it was."""
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextlib.contextmanager
def quiet() -> Generator[None]:
    """Without the agent's log lines, which tell of every process that it ends; `LOGLEVEL` brings them back."""
    rooms = ("torch.distributed.elastic", "torch.multiprocessing")
    names = [name for name in logging.root.manager.loggerDict if name.startswith(rooms)]
    loggers = [] if "LOGLEVEL" in os.environ else [logging.getLogger(name) for name in names]
    before = [logger.disabled for logger in loggers]
    for logger in loggers:
        logger.disabled = True  # to set levels takes 10 ms
    try:
        with warnings.catch_warnings():
            # A forked worker of a notebook or a test has a sys.stderr without a file; only torch's faulthandler minds.
            warnings.filterwarnings("ignore", message="Unable to enable fault handler")
            yield
    finally:
        for logger, disabled in zip(loggers, before, strict=True):
            logger.disabled = disabled
