"""From the leaves of a tree to the tensors that travel, and back."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fabricfn import flat
from fabricfn.collectives.agreement import Agreement, Parcel, agree, attempt, take_apart
from fabricfn.collectives.groups import Members, device_for, device_for_words
from fabricfn.errors import ConfigurationError
from fabricfn.tree import Leaf, Tree, path_name, tree_paths, tree_unflatten
from fabricfn.world import CPU, World

Run = Callable[[list[torch.Tensor]], Sequence[torch.Tensor]]

OPS = ("mean", "sum", "max", "min", "product", "any", "all")
REDUCED = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.complex128),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
)
"""The dtypes that torch can reduce."""

NUMBERS: dict[type, torch.dtype] = {
    bool: torch.bool,
    int: torch.int64,
    float: torch.float64,
    complex: torch.complex128,
}
"""How Python numbers travel. bool comes first, since it is an int too."""


def is_number(leaf: Leaf) -> bool:
    """Whether it is a Python number (numpy's float64 is one)."""
    return isinstance(leaf, tuple(NUMBERS))


def meet(
    world: World,
    members: Members,
    call: str,
    tree: Tree,
    prepare: Callable[[Parcel], list[torch.Tensor]],
    *,
    uneven: bool = False,
    graph: bool = False,
    rides: bool = False,
) -> tuple[Parcel, list[torch.Tensor], Agreement]:
    """Take the tree apart, `prepare` its tensors, and agree with the other members. They all must call it.

    With `rides`, small tensors ride along: see `Agreement.rows`.
    """
    parcel = take_apart(tree, uneven=uneven, graph=graph and torch.is_grad_enabled())
    tensors, problem = attempt(prepare, parcel)
    return parcel, tensors, agree(world, members, call, parcel, problem, tensors=tensors if rides else None)


def words_device(world: World, members: Members) -> torch.device:
    """Where small integers and bytes travel among the members."""
    return CPU if members.group is None else device_for_words(world, members.group)


def movable(parcel: Parcel, world: World, members: Members, call: str) -> list[torch.Tensor]:
    """One tensor a leaf, numbers included (0-dim, 64-bit); nothing is moved yet.

    Raises:
        ConfigurationError: a leaf that is neither a number nor a dense tensor.
    """
    tensors: list[torch.Tensor] = list(parcel.leaves)
    for place in parcel.odd:
        leaf: Any = parcel.leaves[place]
        if isinstance(leaf, torch.Tensor):
            if (why := _refusal(leaf)) is not None:
                raise ConfigurationError(f"{call}: leaf {name_of(parcel.tree, place)} is {why}")
            tensors[place] = leaf.resolve_conj().resolve_neg()
        elif is_number(leaf):
            tensors[place] = _number_tensor(leaf, parcel, place, world, members)
        else:
            raise ConfigurationError(
                f"{call}: leaf {name_of(parcel.tree, place)} is of type {type(leaf).__qualname__}; tensors and numbers"
                " travel here. Any object does with ff.all_gather_object(rt, obj) and ff.broadcast(rt, tree)."
            )
    return tensors


def reducible(parcel: Parcel, world: World, members: Members, call: str, op: str) -> list[torch.Tensor]:
    """`movable`, for arithmetic: Python bools count as integers in sums, as in Python.

    Raises:
        ConfigurationError: an unknown op, or a leaf whose dtype does not know it.
    """
    if op not in OPS:
        raise ConfigurationError(f"op={op!r} is unknown; there are {', '.join(OPS)}.")
    tensors = movable(parcel, world, members, call)
    if op in ("sum", "mean", "product"):
        for place in parcel.odd:
            if isinstance(parcel.leaves[place], bool):
                tensors[place] = tensors[place].long()
    dtypes = [tensor.dtype for tensor in tensors]
    for dtype in set(dtypes):
        if (why := _op_refusal(op, dtype)) is not None:
            raise ConfigurationError(f"{call}: leaf {name_of(parcel.tree, dtypes.index(dtype))} is {why}")
    return tensors


def divisible(parcel: Parcel, tensors: list[torch.Tensor], size: int, call: str, *, exactly: bool = False) -> None:
    """Refuse leaves whose first dimension is not a multiple of `size`, or not `size` exactly.

    Raises:
        ConfigurationError: it is not.
    """
    for place, tensor in enumerate(tensors):
        first = tensor.shape[0] if tensor.dim() else None
        if first is None or (first != size if exactly else first % size):
            raise ConfigurationError(
                f"{call}: the first dimension of leaf {name_of(parcel.tree, place)} must be"
                f" {'' if exactly else 'a multiple of '}{size}, the number of ranks, one part each;"
                f" its shape is {list(tensor.shape)}."
            )


def travel(
    parcel: Parcel,
    tensors: list[torch.Tensor],
    agreement: Agreement,
    world: World,
    members: Members,
    run: Run,
    arrived: Run = list,
) -> list[torch.Tensor]:
    """`run` on the tensors that differ, where the group can carry them; one result a leaf, on the leaf's own device.

    Where they rode along, `arrived` on the ranks' tensors, [*s] stacked to [size, *s], in its place.

    A tensor that stands in several leaves travels once and comes back as one tensor, if that is so on all ranks. If it
    is not, then the ranks' results differ from leaf to leaf, and cannot be one tensor.
    """
    firsts = parcel.firsts if agreement.same_aliases else list(range(len(tensors)))
    places = [place for place, first in enumerate(firsts) if place == first]
    if agreement.rows is not None:
        found = arrived(flat.unloaded(agreement.rows, tensors))
        return [found[first] for first in firsts]
    origins = [tensors[place].device for place in places]
    served = {origin: device_for(origin, world, members.group) for origin in set(origins)}
    sent = [tensors[place].to(served[origin]) for place, origin in zip(places, origins, strict=True)]
    results = [result.to(origin) for result, origin in zip(run(sent), origins, strict=True)]
    if len(places) == len(firsts):
        return results
    by_place = dict(zip(places, results, strict=True))
    return [by_place[first] for first in firsts]


def rebuild(parcel: Parcel, results: list[torch.Tensor]) -> Tree:
    """The tree with these results; where a number stood, a number."""
    leaves: list[Any] = list(results)
    for place in parcel.odd:
        if is_number(parcel.leaves[place]):
            leaves[place] = results[place].item()
    return tree_unflatten(parcel.spec, leaves)


def rebuild_tensors(parcel: Parcel, results: list[torch.Tensor], world: World) -> Tree:
    """The tree with these results, for calls that make an array of every number; those are on `world.device`."""
    leaves = list(results)
    for place in parcel.odd:
        if is_number(parcel.leaves[place]):
            leaves[place] = results[place].to(world.device)
    return tree_unflatten(parcel.spec, leaves)


def name_of(tree: Tree, place: int) -> str:
    """The path of one leaf, as messages show it."""
    return path_name(tree_paths(tree)[place])


def _number_tensor(value: Any, parcel: Parcel, place: int, world: World, members: Members) -> torch.Tensor:
    device = words_device(world, members)
    dtype = next(dtype for kind, dtype in NUMBERS.items() if isinstance(value, kind))
    if dtype is torch.int64 and not -(2**63) <= value < 2**63:
        raise ConfigurationError(
            f"leaf {name_of(parcel.tree, place)} is the integer {value}, more than 64 bits hold. Pass a float."
        )
    return torch.tensor(value, dtype=dtype, device=device)


def _refusal(tensor: torch.Tensor) -> str | None:
    if tensor.is_nested:
        return "a nested tensor; pass its values() and offsets()."
    if tensor.layout is not torch.strided:
        return f"a tensor of layout {tensor.layout}; pass tensor.to_dense()."
    if type(tensor) is not torch.Tensor and is_traceable_wrapper_subclass(tensor):
        kind = type(tensor).__qualname__
        return f"a {kind}, spread over devices or wrapped; pass a plain tensor (ff.gather_params, .full_tensor())."
    if tensor.is_meta:
        return "a meta tensor, which has no values."
    return "a quantized tensor; pass tensor.dequantize()." if tensor.is_quantized else None


@functools.lru_cache
def _op_refusal(op: str, dtype: torch.dtype) -> str | None:
    name = str(dtype).removeprefix("torch.")
    if dtype not in REDUCED:
        return f"of dtype {name}, which torch cannot reduce. Write tensor.float() or tensor.long()."
    if dtype is torch.bool and op in ("sum", "product"):
        return f'a bool tensor, which op="{op}" would not count. Write tensor.long(), or op="any" or "all".'
    if dtype is not torch.bool and op in ("any", "all"):
        return f"of dtype {name}, but op={op!r} votes with bools. Write tensor != 0."
    if dtype.is_complex and op in ("max", "min"):
        return f"of dtype {name}, which has no order. Write tensor.abs()."
    return None


def rows_of(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Tensors without a dimension as one row each."""
    return [tensor if tensor.dim() else tensor[None] for tensor in tensors]
