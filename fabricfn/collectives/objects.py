"""Collectives without tensors: waiting for each other, and exchanging objects."""

import pickle
from typing import Any

from fabricfn.collectives.agreement import agree, attempt, take_apart
from fabricfn.collectives.groups import Axis, along
from fabricfn.collectives.messages import all_gather_bytes
from fabricfn.collectives.parcels import words_device
from fabricfn.errors import ConfigurationError
from fabricfn.runtimes import Runtime
from fabricfn.sharding import refusal
from fabricfn.tree import tree_leaves
from fabricfn.watching import collective, counted


def barrier(rt: Runtime, name: str | None = None, *, axis: Axis = None) -> None:
    """Wait until every rank is here.

    Args:
        rt: the runtime.
        name: what is waited for; ranks that wait at barriers of different names get an error that says so.
        axis: None for all ranks, a mesh axis, or a tuple of ranks; all of them must call it.

    Raises:
        MismatchError: another rank is at another barrier or in another collective, or has left.
        HangError: a rank did not come within `init_runtime(timeout=...)`; the message names it and where it stands.

    Example:
        >>> import fabricfn as ff
        >>> rt = ff.init_runtime(devices=1, accelerator="cpu")
        >>> ff.barrier(rt, "data is downloaded")
    """
    rt, members = along(rt.whole if axis is None else rt, axis)
    call = f"barrier({'' if name is None else repr(name)})"
    meet = agree if axis is not None else counted(rt.world, call, agree, apart=True)
    meet(rt.world, members, call, take_apart(()), None)


@collective("all_gather_object", apart=True)
def all_gather_object(rt: Runtime, obj: Any, *, axis: Axis = None) -> list[Any]:
    """Every rank's object, by rank: anything that can be pickled. For tensors `all_gather` is much faster.

    Args:
        rt: the runtime.
        obj: may differ in every respect between ranks.
        axis: None for all ranks, a mesh axis, or a tuple of ranks; all of them must call it.

    Returns:
        On every rank a list of copies.

    Raises:
        ConfigurationError: it cannot be pickled.
        MismatchError: another rank's could not be pickled, or another rank is in another collective.

    Example:
        >>> import fabricfn as ff
        >>> rt = ff.init_runtime(devices=1, accelerator="cpu")
        >>> ff.all_gather_object(rt, "text")
        ['text']
    """
    rt, members = along(rt, axis)
    data, problem = attempt(pickled, obj)
    agree(rt.world, members, "all_gather_object()", take_apart(()), problem)
    return [pickle.loads(item) for item in all_gather_bytes(data, members.group, words_device(rt.world, members))]


def pickled(obj: Any) -> bytes:
    """The object as bytes.

    Raises:
        ConfigurationError: it cannot be pickled.
    """
    if problem := refusal(tree_leaves(obj)):
        raise ConfigurationError(f"{problem}.")
    try:
        return pickle.dumps(obj)
    except Exception as error:  # whatever a __reduce__ raises
        raise ConfigurationError(
            f"an object of type {type(obj).__qualname__} cannot travel to other ranks, since pickle refuses it"
            f" ({error}). Pass plain data instead."
        ) from error
