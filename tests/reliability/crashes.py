"""R2: a power failure after each call that a save makes, un-synced data and names dropped; and each call failing."""

import functools
import os
import random
import shutil
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import fabricfn as ff
from fabricfn.checkpoint.storage import commit
from fabricfn.errors import CheckpointError
from fabricfn.testing import threads
from tests.reliability.filesystem import WAYS, Disk, Recorder, after_failure, recorded, taken
from tests.reliability.scene import ALONE, Save, blocking, load_quietly, number_of, scratch, tree_of

ELEMENTS = 3000
"""Of each of the two large tensors; a write reaches the disk in part in the model, so size matters little."""


def save_alone(save: Save, path: Path, number: int) -> None:
    """One rank."""
    save(ALONE, path, tree_of(number, ELEMENTS))


def save_together(save: Save, path: Path, number: int) -> None:
    """Two ranks, threads of this process: their calls interleave as they come."""
    with threads(2) as ranks:
        ranks.run(lambda rt: save(rt, path, tree_of(number, ELEMENTS)) and None)


def no_exchange(a: Path, b: Path) -> bool:
    """As a kernel or a file system that cannot exchange."""
    return False


OPERATIONS: dict[str, tuple[str, str, Callable[[Save, Path, int], None]]] = {
    "first save, parents missing": ("a/b/last", "exchange", save_alone),
    "first save, 2 ranks": ("last", "exchange", save_together),
    "replace by exchange": ("last", "exchange", save_alone),
    "replace by exchange, 2 ranks": ("last", "exchange", save_together),
    "replace by renaming aside": ("last", "aside", save_alone),
    "a folder a step": ("step-1", "exchange", save_alone),
}
"""What is done -> where, how a checkpoint is replaced, by whom."""


def prepared(name: str, root: Path, save: Save) -> tuple[Path, Callable[[], None]]:
    """Make what stands before the operation; returns where the new one goes, and the operation."""
    place, way, saver = OPERATIONS[name]
    if name.startswith("replace"):
        saver(save, root / place, 0)
    elif name == "a folder a step":
        saver(save, root / "step-0", 0)

    def operate() -> None:
        exchange = no_exchange if way == "aside" else commit.exchange
        put = functools.partial(commit.put_in_place, exchange=exchange)
        with patch.object(commit, "put_in_place", put):
            saver(save, root / place, 1)

    return root / place, operate


def standing_in(name: str, root: Path) -> int | None:
    """The number that a reader finds: None for nothing, where nothing stood before. Raises when it is lost or mixed."""
    place = OPERATIONS[name][0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        if name == "a folder a step":
            found = ff.latest(root)
        else:
            path = root / place
            there = ff.list_checkpoints(path.parent)
            found = path if path in there else None
    if found is None:
        return None
    number = number_of(load_quietly(found))
    if number is None:
        raise AssertionError(f"{name}: a mixture at {found}")
    return number


def power_failures(name: str, save: Save = blocking, seed: int = 0, without: str = "") -> dict[str, int]:
    """Every crash point of an operation, each with several choices of what reached the disk.

    Args:
        name: of OPERATIONS.
        save: how it is saved.
        seed: of the random choices.
        without: drop the record of this kind of call ("fsync"), to see that the harness finds what it should.

    Returns:
        counts: crash points, states, in how many the old and the new one stood, how many were lost or mixed; how many
        were lost after `save` had returned; and what was left after the next save.
    """
    counts = Counter(dict.fromkeys(("points", "states", "the old", "the new", "lost", "acknowledged, lost", "left"), 0))
    dice = random.Random(seed)
    with scratch("/dev/shm" if os.path.isdir("/dev/shm") else None) as base:
        real, copy = base / "real", base / "copy"
        real.mkdir()
        _, operate = prepared(name, real, save)
        recorder = Recorder(real)
        start = taken(recorder)
        before = standing_in(name, real)
        with recorded(recorder):
            operate()
        assert standing_in(name, real) == 1
        check_complete(start, recorder, real, base / "again")
        calls = [call for call in recorder.calls if call.kind != without]
        for point in range(len(calls) + 1):
            counts["points"] += 1
            for way in WAYS:
                after_failure(start, calls[:point], way, dice).put(copy)
                counts["states"] += 1
                try:
                    found = standing_in(name, copy)
                except (AssertionError, CheckpointError):
                    found = -1
                kind = "the new" if found == 1 else "the old" if found == before else "lost"
                if kind == "the old" and point == len(calls):
                    kind = "acknowledged, lost"
                counts[kind] += 1
                if way in ("all", "none"):
                    operate_again(name, copy, save)
                    counts["left"] += sum(
                        part.startswith(".") for part in os.listdir(copy / OPERATIONS[name][0] / "..")
                    )
                shutil.rmtree(copy)
    return dict(counts)


class Killed(BaseException):
    """Ends a save as a kill does: every further call raises it too, so that nothing is cleaned up."""


def kill_then_power_failure(
    name: str, save: Save = blocking, seed: int = 0, ways: tuple[str, ...] = WAYS
) -> dict[str, int]:
    """A save is killed at each of its calls, the next one is cut short by a power failure after each of its calls.

    What the killed one had not flushed is not safe while the next one cleans up after it.

    Returns:
        counts: states, in how many one of the three numbers stood, and how many were lost; or were not the newest
        after the second save had returned.
    """
    counts: Counter[str] = Counter(dict.fromkeys(("states", "whole", "lost", "acknowledged, lost"), 0))
    dice = random.Random(seed)
    place, _, saver = OPERATIONS[name]
    alive, point = False, 0
    while not alive:
        point += 1
        with scratch("/dev/shm" if os.path.isdir("/dev/shm") else None) as base:
            real, copy = base / "real", base / "copy"
            real.mkdir()
            _, operate = prepared(name, real, save)
            recorder = Recorder(real)
            start, before = taken(recorder), standing_in(name, real)

            def kill(kind: str, path: str) -> None:
                if len(recorder.calls) >= point:
                    raise Killed

            with recorded(recorder):
                recorder.before = kill
                try:
                    operate()
                    alive = True
                except Killed:
                    recorder.before = lambda kind, path: None
                    saver(save, real / place, 2)
            calls = recorder.calls
            for end in range(point, len(calls) + 1):
                for way in ways:
                    after_failure(start, calls[:end], way, dice).put(copy)
                    counts["states"] += 1
                    try:
                        found = standing_in(name, copy)
                    except (AssertionError, CheckpointError):
                        found = -1
                    acknowledged = not alive and end == len(calls)
                    whole = found == 2 if acknowledged else found in (before, 1, 2)
                    counts["whole" if whole else "acknowledged, lost" if acknowledged else "lost"] += 1
                    shutil.rmtree(copy)
    return dict(counts)


def operate_again(name: str, root: Path, save: Save) -> None:
    """The next save to the same place."""
    place, _, saver = OPERATIONS[name]
    saver(save, root / place, 2)
    if number_of(load_quietly(root / place)) != 2:
        raise AssertionError(f"{name}: the next save is not what stands")


def contents(root: Path) -> dict[str, bytes | None]:
    """Every file and folder under a root."""
    return {str(p.relative_to(root)): p.read_bytes() if p.is_file() else None for p in sorted(root.rglob("*"))}


def check_complete(start: Disk, recorder: Recorder, real: Path, again: Path) -> None:
    """All calls replayed give what is really there: none was missed."""
    disk = Disk(start)
    for call in recorder.calls:
        disk.apply(call)
    disk.put(again)
    if contents(again) != contents(real):
        raise AssertionError("the model and the disk differ: a call was missed")
    shutil.rmtree(again)


def failing_calls(name: str, error: Callable[[], BaseException], save: Save = blocking) -> dict[str, int]:
    """Every call of an operation fails once, in a run of its own; those that clean up included.

    Returns:
        counts: calls that failed; errors that `save` raised, by class; in how many runs the old and the new one stood
        afterwards, how many were lost; and what was left after the next save in this very process.
    """
    counts: Counter[str] = Counter(dict.fromkeys(("calls", "the old", "the new", "lost", "left", "said nothing"), 0))
    point, reached = 0, True
    while reached:
        reached = False
        with scratch("/dev/shm" if os.path.isdir("/dev/shm") else None) as root:
            _, operate = prepared(name, root, save)
            before = standing_in(name, root)
            seen = 0

            def fail(kind: str, path: str) -> None:
                nonlocal seen, reached
                seen += 1
                if seen == point + 1:
                    reached = True
                    raise error()

            said = ""
            with recorded(Recorder(root, fail)):
                try:
                    operate()
                except BaseException as caught:  # whatever it raises is counted
                    said = type(caught).__name__
            if not reached:
                break
            point += 1
            counts["calls"] += 1
            found = standing_in(name, root)
            kind = "the new" if found == 1 else "the old" if found == before else "lost"
            counts[kind] += 1
            counts[said or "no error"] += 1
            if not said and kind != "the new":
                counts["said nothing"] += 1
            operate_again(name, root, save)
            counts["left"] += sum(part.startswith(".") for part in os.listdir((root / OPERATIONS[name][0]).parent))
    return dict(counts)
