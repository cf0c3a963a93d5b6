"""What one rank does for all: printing, running once, going first, looking at a file system."""

import builtins
import contextlib
import os
import pickle
import time
import uuid
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist

from fabricfn.errors import LaunchError
from fabricfn.failures import Failure, exception_of, record
from fabricfn.runtimes import Runtime
from fabricfn.sharding import refusal
from fabricfn.tree import tree_leaves
from fabricfn.watching import collective, counted

T = TypeVar("T")

VISIBLE = 3.0
"""Seconds that a network file system gets to show a file of another machine."""


def print(rt: Runtime, *args: Any, **options: Any) -> None:
    """Python's `print` on rank 0; nothing on the others. Any rank may call it alone.

    Args:
        rt: the runtime.
        args: what to print.
        options: those of Python's `print`; `flush` is True unless given, since several processes write.

    Example:
        >>> import fabricfn as ff
        >>> ff.print(ff.init_runtime(accelerator="cpu"), "epoch", 3)
        epoch 3
    """
    if rt.global_rank == 0:
        options.setdefault("flush", True)
        builtins.print(*args, **options)


@collective("run_once")
def run_once(rt: Runtime, fn: Callable[[], T], *, per_node: bool = False) -> T:
    """Run `fn` on rank 0; every rank gets its result, or its error. Every rank must call it.

    Args:
        rt: the runtime.
        fn: called without arguments, on one rank alone (download, tokenise, make a folder). Its result must be
            picklable when there are several ranks.
        per_node: run it on the first rank of every machine, for what is kept on its own disk; the ranks of a machine
            get the result of theirs.

    Returns:
        What `fn` returned: the object itself where it ran, a copy on the others.

    Raises:
        Exception: what `fn` raised, on every rank (of every machine); with a note that has the traceback.
        LaunchError: the result, or the exception, cannot be pickled.

    Example:
        >>> import fabricfn as ff
        >>> ff.run_once(ff.init_runtime(accelerator="cpu"), lambda: "run-7")
        'run-7'
    """
    rt = rt.whole
    if rt.world.group is None:
        return fn()
    if not _goes_first(rt, per_node):
        return pickle.loads(_told(rt, None, per_node))
    try:
        result = fn()
        told = _pickled(result)
    except BaseException as error:
        _tell(rt, record(error, rt.rank), per_node)
        raise
    _told(rt, told, per_node)
    return result


@contextlib.contextmanager
def rank_zero_first(rt: Runtime, *, per_node: bool = False) -> Generator[None]:
    """A block that rank 0 goes through before the others, which then find what it left (a cache).

    Every rank must enter it.

    Args:
        rt: the runtime.
        per_node: the first rank of every machine goes first, for a cache on its own disk.

    Returns:
        A context manager that gives None.

    Raises:
        Exception: an error of rank 0 inside the block is raised on the others before they enter it.

    Example:
        >>> import fabricfn as ff
        >>> with ff.rank_zero_first(ff.init_runtime(accelerator="cpu")):
        ...     pass
    """
    rt = rt.whole
    wait = counted(rt.world, "rank_zero_first", _told)
    if rt.world.group is None:
        yield
    elif _goes_first(rt, per_node):
        try:
            yield
        except BaseException as error:
            counted(rt.world, "rank_zero_first", _tell)(rt, record(error, rt.rank), per_node)
            raise
        wait(rt, b"", per_node)
    else:
        wait(rt, None, per_node)
        yield


@collective("is_shared_filesystem")
def is_shared_filesystem(rt: Runtime, path: str | os.PathLike[str]) -> bool:
    """Whether all ranks see the same files at `path`: a checkpoint needs that. Every rank must call it.

    Rank 0 makes a small hidden file there, every rank looks for it, for up to 3 seconds, and rank 0 removes it.

    Args:
        rt: the runtime.
        path: a folder, which need not exist: then it is its nearest parent that does.

    Returns:
        The same on every rank; True with one rank.

    Raises:
        OSError: rank 0 cannot write there; on every rank.

    Example:
        >>> import tempfile, fabricfn as ff
        >>> ff.is_shared_filesystem(ff.init_runtime(accelerator="cpu"), tempfile.gettempdir())
        True
    """
    rt = rt.whole
    if rt.world.group is None:
        return True
    place, word = run_once(rt, lambda: _leave_word(Path(path)))
    deadline = time.monotonic() + VISIBLE
    while not (seen := _reads(place, word)) and time.monotonic() < deadline:
        time.sleep(0.05)
    answers: list[Any] = [None] * rt.world_size
    dist.all_gather_object(answers, seen, group=rt.world.group)
    run_once(rt, place.unlink)
    return all(answers)


def _leave_word(path: Path) -> tuple[Path, str]:
    """A file with a word in it, in the folder or the nearest parent that exists."""
    path, word = path.absolute(), uuid.uuid4().hex
    while not path.is_dir():
        path = path.parent
    place = path / f".fabricfn-{word}"
    place.write_text(word)
    return place, word


def _reads(place: Path, word: str) -> bool:
    try:
        return place.read_text() == word
    except OSError:
        return False


def _goes_first(rt: Runtime, per_node: bool) -> bool:
    return rt.local_rank == 0 if per_node else rt.rank == 0


def _pickled(result: Any) -> bytes:
    if problem := refusal(tree_leaves(result)):
        raise LaunchError(f"run_once: {problem}.")
    try:
        return pickle.dumps(result)
    except Exception as error:  # whatever a __reduce__ raises
        raise LaunchError(
            f"run_once: what rank 0 returned ({type(result).__name__}) cannot be pickled for the other ranks: {error}."
            " Return plain data and tensors."
        ) from error


def _told(rt: Runtime, told: bytes | None, per_node: bool) -> bytes:
    """What the first rank told; its error, or that of another machine's first rank, is raised."""
    answer = _tell(rt, told, per_node)
    if isinstance(answer, Failure):
        raise exception_of(answer)
    return answer


def _tell(rt: Runtime, told: bytes | Failure | None, per_node: bool) -> bytes | Failure:
    """What rank 0 told, on every rank; with `per_node` what the first rank of this machine told, but errors for all."""
    if not per_node:
        box: list[Any] = [told]
        dist.broadcast_object_list(box, src=0, group=rt.world.group, device=rt.world.wire)
        return box[0]
    everything: list[Any] = [None] * rt.world_size
    dist.all_gather_object(everything, (rt.node_rank, told), group=rt.world.group)
    words = {node: word for node, word in everything if word is not None}
    return next((word for word in words.values() if isinstance(word, Failure)), words[rt.node_rank])
