"""What one rank does for all: printing, running once, going first."""

import builtins
import contextlib
import pickle
from collections.abc import Callable, Generator
from typing import Any, TypeVar

import torch.distributed as dist

from fabricfn.errors import LaunchError
from fabricfn.failures import Failure, exception_of, record
from fabricfn.runtimes import Runtime
from fabricfn.sharding import refusal
from fabricfn.tree import tree_leaves
from fabricfn.watching import collective

T = TypeVar("T")


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
    if rt.rank == 0:
        options.setdefault("flush", True)
        builtins.print(*args, **options)


@collective("run_once")
def run_once(rt: Runtime, fn: Callable[[], T]) -> T:
    """Run `fn` on rank 0; every rank gets its result, or its error. Every rank must call it.

    Args:
        rt: the runtime.
        fn: called without arguments, on rank 0 alone (download, tokenise, make a folder). Its result must be picklable
            when there are several ranks.

    Returns:
        What `fn` returned: the object itself on rank 0, a copy on the others.

    Raises:
        Exception: what `fn` raised, on every rank; on the others with a note that has the traceback of rank 0.
        LaunchError: the result, or the exception, cannot be pickled.

    Example:
        >>> import fabricfn as ff
        >>> ff.run_once(ff.init_runtime(accelerator="cpu"), lambda: "run-7")
        'run-7'
    """
    if rt.world.group is None:
        return fn()
    if rt.rank != 0:
        told = _from_rank_zero(rt, None)
        if isinstance(told, Failure):
            raise exception_of(told)
        return pickle.loads(told)
    try:
        result = fn()
        told = _pickled(result)
    except BaseException as error:
        _from_rank_zero(rt, record(error, 0))
        raise
    _from_rank_zero(rt, told)
    return result


@contextlib.contextmanager
def rank_zero_first(rt: Runtime) -> Generator[None]:
    """A block that rank 0 goes through before the others, which then find what it left (a cache).

    Every rank must enter it.

    Args:
        rt: the runtime.

    Returns:
        A context manager that gives None.

    Raises:
        Exception: an error of rank 0 inside the block is raised on the others before they enter it.

    Example:
        >>> import fabricfn as ff
        >>> with ff.rank_zero_first(ff.init_runtime(accelerator="cpu")):
        ...     pass
    """
    if rt.world.group is None:
        yield
    elif rt.rank == 0:
        try:
            yield
        except BaseException as error:
            _from_rank_zero(rt, record(error, 0))
            raise
        _from_rank_zero(rt, b"")
    else:
        told = _from_rank_zero(rt, None)
        if isinstance(told, Failure):
            raise exception_of(told)
        yield


def _pickled(result: Any) -> bytes:
    if problem := refusal(tree_leaves(result)):
        raise LaunchError(f"run_once: {problem}.")
    try:
        return pickle.dumps(result)
    except Exception as error:
        raise LaunchError(
            f"run_once: what rank 0 returned ({type(result).__name__}) cannot be pickled for the other ranks: {error}."
            " Return plain data and tensors."
        ) from error


def _from_rank_zero(rt: Runtime, told: bytes | Failure | None) -> bytes | Failure:
    """What rank 0 told, on every rank."""
    box: list[Any] = [told]
    dist.broadcast_object_list(box, src=0, group=rt.world.group, device=rt.device)
    return box[0]
