"""Loggers that were written for Lightning, as they are: Weights & Biases, MLflow, Comet, Neptune, Litlogger."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from fabricfn.loggers.logger import Logger


def lightning_logger(logger: Any) -> Logger:
    """A logger of Lightning's, or any object with `log_metrics(metrics, step)`, as a `Logger`.

    Args:
        logger: as `lightning.pytorch.loggers.WandbLogger(...)`; its `log_hyperparams`, `save` and `finalize` are called
            where it has them.

    Returns:
        The logger, for `init_runtime(loggers=...)`.

    Example:
        >>> import fabricfn as ff
        >>> class Print:
        ...     def log_metrics(self, metrics, step=None):
        ...         print(step, metrics)
        >>> with ff.runtime(devices=1, accelerator="cpu", loggers=ff.loggers.lightning(Print())) as rt:
        ...     ff.log(rt, "loss", 0.5)
        0 {'loss': 0.5}
    """
    hyperparams = getattr(logger, "log_hyperparams", None)
    return Logger(log=partial(_log, logger), hyperparams=hyperparams, close=partial(_close, logger))


def _log(logger: Any, values: Mapping[str, float], step: int) -> None:
    logger.log_metrics(dict(values), step)


def _close(logger: Any) -> None:
    if hasattr(logger, "save"):
        logger.save()
    if hasattr(logger, "finalize"):
        logger.finalize("success")
