"""TensorBoard: event files by torch's `SummaryWriter` (`pip install 'fabricfn[tensorboard]'`)."""

import dataclasses
import os
from collections.abc import Mapping
from functools import partial
from typing import Any

from fabricfn.errors import ConfigurationError
from fabricfn.loggers.folders import RunFolder, open_folder, run_folder
from fabricfn.loggers.logger import Logger
from fabricfn.loggers.rows import prefixed


@dataclasses.dataclass(slots=True, kw_only=True)
class Events:
    """A writer of events, once it is open."""

    run: RunFolder
    prefix: str
    options: Mapping[str, Any]
    writer: Any = None


def tensorboard_logger(
    folder: str | os.PathLike[str],
    name: str = "",
    version: int | str | None = None,
    prefix: str = "",
    **options: Any,
) -> Logger:
    """Scalars, hyperparameters, texts, images and graphs for TensorBoard, in `folder/name/version_N`.

    Args:
        folder: made when the first value is written; `~` is your home.
        name: of the experiment, a folder in between.
        version: None takes the next free number; a number or a string names the folder of a run that goes on.
        prefix: comes before each name, with "/" between.
        options: of `torch.utils.tensorboard.SummaryWriter`; `flush_secs` is 5 unless given.

    Returns:
        The logger, for `init_runtime(loggers=...)`; `tensorboard --logdir folder` shows it.

    Raises:
        ConfigurationError: the package tensorboard is missing.

    Example:
        >>> import tempfile, fabricfn as ff
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with ff.runtime(devices=1, accelerator="cpu", loggers=ff.loggers.tensorboard(folder)) as rt:
        ...         ff.log(rt, "loss", 0.5, step=1)
    """
    _summary_writer()
    events = Events(run=run_folder(folder, name, version), prefix=prefix, options={"flush_secs": 5, **options})
    return Logger(
        log=partial(_put_scalars, events),
        hyperparams=partial(_put_hyperparams, events),
        text=partial(_put_text, events),
        image=partial(_put_image, events),
        graph=partial(_put_graph, events),
        close=partial(_close, events),
        folder=partial(open_folder, events.run),
    )


def _summary_writer() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ConfigurationError(
            f"ff.loggers.tensorboard needs the package tensorboard ({error}). Write: pip install"
            " 'fabricfn[tensorboard]', or take ff.loggers.csv(folder)."
        ) from None
    return SummaryWriter


def _opened(events: Events) -> Any:
    if events.writer is None:
        events.writer = _summary_writer()(str(open_folder(events.run)), **events.options)
    return events.writer


def _put_scalars(events: Events, values: Mapping[str, float], step: int) -> None:
    writer = _opened(events)
    for name, value in prefixed(events.prefix, values).items():
        writer.add_scalar(name, value, step)


def _put_hyperparams(events: Events, values: Mapping[str, Any]) -> None:
    plain = {name: "None" if value is None else value for name, value in values.items()}
    _opened(events).add_hparams(plain, {"hp_metric": -1}, run_name=".")


def _put_text(events: Events, name: str, text: str, step: int) -> None:
    _opened(events).add_text(*prefixed(events.prefix, {name: text}).popitem(), step)


def _put_image(events: Events, name: str, image: Any, step: int) -> None:
    _opened(events).add_image(*prefixed(events.prefix, {name: image}).popitem(), step, dataformats="HWC")


def _put_graph(events: Events, module: Any, inputs: tuple[Any, ...]) -> None:
    _opened(events).add_graph(module, inputs)


def _close(events: Events) -> None:
    if events.writer is not None:
        events.writer.close()
        events.writer = None
