"""What a run measures, on its way to the loggers: `log`, `log_dict`, and what is no number."""

import dataclasses
from collections.abc import Mapping
from typing import Any, cast

import numpy as np
import torch

from fabricfn.collectives import all_reduce
from fabricfn.errors import ConfigurationError
from fabricfn.gathering import to_module
from fabricfn.loggers.journal import Number, in_use, next_step, note, write_rows
from fabricfn.records import Model
from fabricfn.runtimes import Runtime


def log(rt: Runtime, name: str, value: Any, step: int | None = None, *, reduce: str | None = None) -> None:
    """Give one number to every logger of the runtime: `log_dict` with one name.

    Args:
        rt: the runtime. Every rank may call it, rank 0 writes; with `reduce` every rank must call it.
        name: as "train/loss".
        value: a number, or a tensor with one element on any device; it may be overwritten afterwards.
        step: of the row; None is the one after the last.
        reduce: "mean", "sum", "max", "min" over the ranks; None is the number of rank 0.

    Raises:
        ConfigurationError: it is no number.

    Example:
        >>> import fabricfn as ff
        >>> shown = ff.loggers.Logger(log=lambda values, step: print(step, values))
        >>> with ff.runtime(devices=1, accelerator="cpu", loggers=shown) as rt:
        ...     for step in (1, 2):
        ...         ff.log(rt, "loss", 1 / step, step)
        1 {'loss': 1.0}
        2 {'loss': 0.5}
    """
    log_dict(rt, {name: value}, step, reduce=reduce)


def log_dict(rt: Runtime, values: Mapping[str, Any], step: int | None = None, *, reduce: str | None = None) -> None:
    """Give one row of numbers to every logger of the runtime; without loggers nothing happens.

    Laws: no call waits for a device; numbers that are on one are written a hundred rows at a time, after two seconds
    at the latest when the next row comes, and at `shutdown`, also after an error. Numbers on the CPU are written at
    once. Rows are written in the order of the calls.

    Args:
        rt: the runtime. Every rank may call it, rank 0 writes; with `reduce` every rank must call it.
        values: name -> number or tensor with one element; a mapping within one gives "outer/inner".
        step: of the row; None is the one after the last, beginning with 0.
        reduce: "mean", "sum", "max", "min" over the ranks, all names in one message; None is what rank 0 has.

    Raises:
        ConfigurationError: a value is no number; the message names it.

    Example:
        >>> import torch, fabricfn as ff
        >>> shown = ff.loggers.Logger(log=lambda values, step: print(step, values))
        >>> with ff.runtime(devices=1, accelerator="cpu", loggers=[shown]) as rt:
        ...     ff.log_dict(rt, {"loss": torch.tensor(0.25), "val": {"accuracy": 0.5}})
        0 {'loss': 0.25, 'val/accuracy': 0.5}
    """
    if not rt.journal.loggers and reduce is None:
        return
    row = {name: _number(name, value, rt) for name, value in _flat(values).items()}
    if reduce is not None:
        row = all_reduce(rt, row, reduce)
    if rt.global_rank == 0 and rt.journal.loggers:
        note(rt.journal, row, step)


def log_hyperparams(rt: Runtime, values: Any) -> None:
    """Give the settings of the run to every logger that keeps such.

    Args:
        rt: the runtime. Any rank may call it, rank 0 writes.
        values: a mapping or a dataclass, nested as you like, or `vars(args)` of argparse; what is neither number,
            string, bool nor None is written as its `repr`.

    Example:
        >>> import tempfile, pathlib, fabricfn as ff
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with ff.runtime(devices=1, accelerator="cpu", loggers=ff.loggers.csv(folder)) as rt:
        ...         ff.log_hyperparams(rt, {"optimizer": {"lr": 0.1}, "epochs": 3})
        ...     print(pathlib.Path(folder, "version_0/hyperparams.json").read_text(), end="")
        {
         "optimizer/lr": 0.1,
         "epochs": 3
        }
    """
    plain = {
        name: value if type(value) in (int, float, bool, str, type(None)) else repr(value)
        for name, value in _flat(values).items()
    }
    if rt.global_rank == 0:
        for logger in in_use(rt.journal):
            if logger.hyperparams is not None:
                logger.hyperparams(plain)


def log_text(rt: Runtime, name: str, text: str, step: int | None = None) -> None:
    """Give a text to every logger that takes texts (`ff.loggers.tensorboard`).

    Args:
        rt: the runtime. Any rank may call it, rank 0 writes.
        name: as "samples".
        text: shown as Markdown.
        step: as in `log`.

    Example:
        >>> import fabricfn as ff
        >>> told = ff.loggers.Logger(log=print, text=lambda name, text, step: print(step, name, text))
        >>> with ff.runtime(devices=1, accelerator="cpu", loggers=told) as rt:
        ...     ff.log_text(rt, "sample", "To be")
        0 sample To be
    """
    if rt.global_rank == 0:
        step = next_step(rt.journal, step)
        for logger in in_use(rt.journal):
            if logger.text is not None:
                logger.text(name, text, step)


def log_image(rt: Runtime, name: str, image: Any, step: int | None = None) -> None:
    """Give a picture to every logger that takes pictures (`ff.loggers.tensorboard`).

    Args:
        rt: the runtime. Any rank may call it, rank 0 writes.
        name: as "samples".
        image: a tensor or array of shape (channels, height, width) with 1 or 3 channels, or (height, width): floats
            from 0 to 1, what is beyond being cut off, or uint8.
        step: as in `log`.

    Raises:
        ConfigurationError: another shape.

    Example:
        >>> import torch, fabricfn as ff
        >>> told = ff.loggers.Logger(log=print, image=lambda name, image, step: print(name, image.shape, image.max()))
        >>> with ff.runtime(devices=1, accelerator="cpu", loggers=told) as rt:
        ...     ff.log_image(rt, "white", torch.ones(1, 8, 8))
        white (8, 8, 3) 255
    """
    if rt.global_rank == 0 and any(logger.image for logger in rt.journal.loggers):
        pixels, step = _pixels(name, image), next_step(rt.journal, step)
        for logger in in_use(rt.journal):
            if logger.image is not None:
                logger.image(name, pixels, step)


def log_graph(rt: Runtime, model: Model, *inputs: Any) -> None:
    """Give the network as a graph to every logger that shows such (`ff.loggers.tensorboard`).

    Args:
        rt: the runtime. Every rank must call it, since a sharded model is gathered.
        model: the model.
        inputs: positional arguments of its module's `forward`, which is run once.

    Example:
        >>> import torch, fabricfn as ff
        >>> told = ff.loggers.Logger(log=print, graph=lambda module, inputs: print(module))
        >>> with ff.runtime(devices=1, accelerator="cpu", loggers=told) as rt:
        ...     ff.log_graph(rt, ff.setup_model(rt, torch.nn.Linear(2, 1)), torch.zeros(1, 2))
        Linear(in_features=2, out_features=1, bias=True)
    """
    if any(logger.graph for logger in rt.journal.loggers):
        module = to_module(rt, model)
        for logger in in_use(rt.journal):
            if rt.global_rank == 0 and logger.graph is not None:
                logger.graph(module, inputs)


def flush_logs(rt: Runtime) -> None:
    """Write what `log` has held back, as `shutdown` does.

    Args:
        rt: the runtime. It waits for the device once; not collective.

    Example:
        >>> import fabricfn as ff
        >>> ff.flush_logs(ff.init_runtime(accelerator="cpu"))
    """
    write_rows(rt.journal)


def _flat(values: Any, outer: str = "") -> dict[str, Any]:
    if dataclasses.is_dataclass(values) and not isinstance(values, type):
        values = {field.name: getattr(values, field.name) for field in dataclasses.fields(values)}
    if not isinstance(values, Mapping):
        raise ConfigurationError(f"names with values are needed, found {values!r:.200}. Write {{'loss': loss}}.")
    found: dict[str, Any] = {}
    for name, value in cast("Mapping[str, Any]", values).items():
        inner = isinstance(value, Mapping) or (dataclasses.is_dataclass(value) and not isinstance(value, type))
        found.update(_flat(value, f"{outer}{name}/") if inner else {f"{outer}{name}": value})
    return found


def _number(name: str, value: Any, rt: Runtime) -> Number:
    if isinstance(value, torch.Tensor) and value.numel() == 1 and not value.is_complex():
        value = value.detach()
        return value.item() if value.device.type == "cpu" else value.reshape(()).clone()
    other: Any = value  # numpy is without types
    if isinstance(other, np.ndarray | np.generic) and other.size == 1 and other.dtype.kind in "biuf":
        return cast("float", other.item())
    if isinstance(value, int | float):
        return value
    shape = getattr(value, "shape", None)
    what = f"a {type(value).__name__}" + (f" of shape {tuple(shape)}" if shape is not None else f", {value!r:.80}")
    raise ConfigurationError(
        f"ff.log takes one number for a name; {name!r} is {what} (rank {rt.rank}). Write {name}.mean(), or log its"
        " elements under names of their own; texts and pictures go to ff.log_text and ff.log_image."
    )


def _pixels(name: str, image: Any) -> Any:
    pixels = image.detach().cpu().numpy() if isinstance(image, torch.Tensor) else np.asarray(image)
    if pixels.ndim == 2:
        pixels = pixels[None]
    if pixels.ndim != 3 or pixels.shape[0] not in (1, 3):
        raise ConfigurationError(
            f"image {name!r} has shape {tuple(pixels.shape)}; (1 or 3, height, width) or (height, width) is needed."
            " Make one picture of many by torchvision.utils.make_grid(images)."
        )
    if pixels.dtype != np.uint8:
        pixels = (np.clip(pixels.astype(np.float32), 0.0, 1.0) * 255 + 0.5).astype(np.uint8)
    return np.ascontiguousarray(np.broadcast_to(pixels, (3, *pixels.shape[1:])).transpose(1, 2, 0))
