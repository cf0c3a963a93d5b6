"""Which checkpoints stay, and the removal of the others: chosen among whole ones only, so only after a commit."""

import contextlib
import dataclasses
import math
import os
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from fabricfn.checkpoint.agreement import together
from fabricfn.checkpoint.format.manifest import ARRAYS, Manifest, path_text, paths_of, plain_value
from fabricfn.checkpoint.format.writing import sync_folder
from fabricfn.checkpoint.listing import list_checkpoints
from fabricfn.checkpoint.storage.objects import Options, local_path, url_of
from fabricfn.checkpoint.storage.opening import opened
from fabricfn.checkpoint.storage.removing import discard, sweep_discarded
from fabricfn.checkpoint.storage.shelves import name_of
from fabricfn.errors import CheckpointError, ConfigurationError, MismatchError
from fabricfn.runtimes import Runtime

T = TypeVar("T", bound=int | str | os.PathLike[str])


def retained(
    checkpoints: Sequence[T],
    *,
    last: int,
    every: int | None = None,
    best: int = 0,
    metric: Mapping[T, float] | None = None,
    mode: str = "min",
) -> list[T]:
    """Which checkpoints to keep: the last ones, the best ones, and those of every n-th step. A pure function.

    Laws: the newest is kept; a larger `last` or `best`, or an `every` where there was none, drops nothing that was
    kept; what is kept is kept again. Not collective: every rank that calls it with the same list gets the same.

    Args:
        checkpoints: steps, names or paths, oldest first, as `list_checkpoints` gives them.
        last: keep so many of the newest; at least 1.
        every: keep those whose step is a multiple of it. The step of a path is the last number in its name.
        best: keep so many with the best metric; of equal ones the newest.
        metric: checkpoint -> its value. What has none, or NaN, is none of the best.
        mode: "min" when less is better, "max" when more is.

    Returns:
        Those to keep, in the same order.

    Raises:
        ConfigurationError: a count that keeps nothing, `best` without `metric` or the other way round.

    Example:
        >>> import fabricfn as ff
        >>> loss = {100: 0.9, 200: 0.2, 300: 0.5, 400: 0.6}
        >>> ff.retained([100, 200, 300, 400], last=1, every=300, best=1, metric=loss)
        [200, 300, 400]
    """
    _check(last, every, best, metric is not None, mode)
    places = range(len(checkpoints))
    kept = set(places[-last:])
    if every is not None:
        steps = ((place, _step(checkpoints[place])) for place in places)
        kept.update(place for place, step in steps if step is not None and step % every == 0)
    if metric is not None:
        sign = 1 if mode == "min" else -1
        values = ((sign * metric[name], -place) for place, name in enumerate(checkpoints) if name in metric)
        ranked = sorted(value for value in values if not math.isnan(value[0]))
        kept.update(-place for _, place in ranked[:best])
    return [checkpoints[place] for place in sorted(kept)]


def prune_checkpoints(
    rt: Runtime,
    folder: str | os.PathLike[str],
    *,
    last: int,
    every: int | None = None,
    best: int = 0,
    metric: str | Mapping[str, float] | None = None,
    mode: str = "min",
    storage_options: Mapping[str, Any] | None = None,
) -> list[Path | str]:
    """Delete the checkpoints of a folder that `retained` does not keep.

    Laws: the newest by its number and the one written last are kept. Only whole checkpoints with a number in their
    name are counted or deleted: no other file or folder, no symbolic link and nothing it leads to. A kill at any
    instant leaves each of them whole or gone. Pruned twice is pruned once.

    Args:
        rt: the runtime. Collective: every rank calls it, rank 0 deletes.
        folder: the folder that holds checkpoints, or its URL.
        last: keep so many of the newest; at least 1.
        every: keep those whose step, the last number in the name, is a multiple of it.
        best: keep so many with the best metric.
        metric: the path of a number in the checkpoints, as "metrics/val_loss", or a mapping of folder names to values.
        mode: "min" when less is better, "max" when more is.
        storage_options: arguments of fsspec's file system for a URL.

    Returns:
        The paths (strings for URLs) that were deleted, oldest first, on every rank.

    Raises:
        ConfigurationError: as `retained`; on every rank, before anything is deleted.
        CheckpointError: no checkpoint has such a number, or one could not be deleted; on every rank.
        MismatchError: the ranks ask for different things.

    Example:
        >>> import tempfile, fabricfn as ff
        >>> with tempfile.TemporaryDirectory() as folder, ff.runtime(devices=1, accelerator="cpu") as rt:
        ...     for step, loss in ((10, 0.2), (20, 0.4), (30, 0.3)):
        ...         receipt = ff.save(rt, f"{folder}/step-{step}", {"step": step, "val_loss": loss})
        ...     removed = ff.prune_checkpoints(rt, folder, last=1, best=1, metric="val_loss")
        ...     [path.name for path in removed], [path.name for path in ff.list_checkpoints(folder)]
        (['step-20'], ['step-10', 'step-30'])
    """
    rt = rt.whole
    what = f"ff.prune_checkpoints of {folder!s:.300}"

    def ask() -> tuple[Path | str, str]:
        _check(last, every, best, metric is not None, mode)
        values = metric if isinstance(metric, str) else sorted((metric or {}).items())
        place = url_of(folder) or local_path(folder)
        return place, f"{str(place)!r}, last={last}, every={every}, best={best}, metric={values!r}, mode={mode!r}"

    place, asked = together(rt.world, what, ask)
    if len(set(asked)) > 1:
        calls = "; ".join(f"rank {rank}: {call[:300]}" for rank, call in list(enumerate(asked))[:4])
        raise MismatchError(f"{what}: every rank must ask for the same (this is rank {rt.rank}). {calls}")

    def work() -> tuple[None, list[str]]:
        return None, [] if rt.rank else [str(path) for path in _prune(place)]

    def _prune(place: Path | str) -> list[Path | str]:
        found = _standing(place, storage_options)
        values = _metric(place, found, metric)
        paths = [one.path for one in found]
        kept = set(retained(paths, last=last, every=every, best=best, metric=values, mode=mode))
        newest = max(found, key=lambda one: one.manifest.created, default=None)
        going = [one for one in found if one.path not in kept and one is not newest]
        removed = [one.path for one in going if _discarded(one, storage_options)]
        if removed and isinstance(place, Path):
            sync_folder(str(place))
        return removed

    removed = together(rt.world, what, work)[1][0]
    return [Path(path) if isinstance(place, Path) else path for path in removed]


def _check(last: int, every: int | None, best: int, measured: bool, mode: str) -> None:
    if last < 1 or (every is not None and every < 1) or best < 0:
        raise ConfigurationError(
            f"last={last}, every={every}, best={best}: the newest checkpoint is always kept, and counts are positive."
            " Write last=3, every=1000."
        )
    if (best > 0) != measured:
        raise ConfigurationError("best needs a metric, and a metric needs best: write best=2, metric='val_loss'.")
    if mode not in ("min", "max"):
        raise ConfigurationError(f"mode={mode!r} is unknown; it is 'min' (less is better) or 'max'.")


def _step(checkpoint: int | str | os.PathLike[str]) -> int | None:
    if isinstance(checkpoint, int):
        return checkpoint
    numbers = re.findall(r"\d{1,4000}", os.path.basename(os.fspath(checkpoint)))
    return int(numbers[-1]) if numbers else None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Standing:
    path: Path | str
    manifest: Manifest


def _standing(folder: Path | str, options: Options) -> list[_Standing]:
    """The whole checkpoints of the folder that may be deleted, oldest first."""
    spared: set[Path | str] = set()
    if isinstance(folder, Path) and folder.is_dir():
        sweep_discarded(folder)
        links = [entry for entry in folder.iterdir() if entry.is_symlink()]
        spared.update(links, (link.resolve() for link in links))
    found: list[_Standing] = []
    for path in list_checkpoints(folder, storage_options=options):
        if path not in spared and _step(path) is not None:
            with contextlib.suppress(CheckpointError), opened(path, say=False, options=options) as source:
                found.append(_Standing(path=path, manifest=source.manifest))  # else it is gone meanwhile
    return found


def _discarded(one: _Standing, options: Options) -> bool:
    try:
        return discard(one.path, one.manifest.save_id, options)
    except CheckpointError as error:
        warnings.warn(f"ff.prune_checkpoints leaves {one.path} alone. {error}", stacklevel=2)
        return False


def _metric(
    folder: Path | str, found: Sequence[_Standing], metric: str | Mapping[str, float] | None
) -> dict[Path | str, float] | None:
    if metric is None:
        return None
    if not isinstance(metric, str):
        return {one.path: float(metric[name]) for one in found if (name := name_of(one.path)) in metric}
    plain = {one.path: _numbers(one.manifest) for one in found}
    if found and not any(metric in numbers for numbers in plain.values()):
        there = ", ".join(sorted({name for numbers in plain.values() for name in numbers})[:8])
        raise CheckpointError(
            f"no checkpoint in {folder} has a number {metric!r}, so none is the best and nothing was deleted. Their"
            f" numbers are: {there or 'none'}. Save it as a plain number: {{..., {metric!r}: float(loss)}}."
        )
    return {path: numbers[metric] for path, numbers in plain.items() if metric in numbers}


def _numbers(manifest: Manifest) -> dict[str, float]:
    values: dict[str, Any] = {
        path_text(place): plain_value(manifest.leaves[index])
        for index, place in paths_of(manifest.tree).items()
        if manifest.leaves[index].kind not in ARRAYS
    }
    return {path: number for path, value in values.items() if (number := _number(value)) is not None}


def _number(value: Any) -> float | None:
    if isinstance(value, int) and value.bit_length() > 1000:  # a state, none that a metric has
        return None
    return float(value) if isinstance(value, int | float) else None
