"""Sharded tensors (DTensors) as a checkpoint sees them: which boxes of the whole array are in this rank's part.

[Note: placements] Sharding a dimension in turn over several dimensions of the mesh cuts what the one before left, as
torch does it. `_StridedShard` (FSDP over tensor parallel) takes every n-th stretch: its part of one rank is several
boxes. Everything is computed from the mesh, the placements and the shape; no rank asks another.
"""

import dataclasses
import itertools
import math
from collections.abc import Hashable, Iterable, Sequence
from typing import Any

import torch

from fabricfn.checkpoint.format.boxes import Box, whole
from fabricfn.sharding import is_sharded, local_of, with_local

Run = tuple[int, int]
"""Where a stretch of one dimension begins and how long it is."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A box of an array that this rank holds."""

    box: Box
    """Its elements in the whole array."""
    at: Box
    """The same elements in this rank's tensor."""


class Unmapped(Exception):
    """Says why the part of a rank cannot be told from the placements."""


def local_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """The part of this rank, detached; it shares the memory. Of a plain tensor, the tensor."""
    local: Any = local_of(tensor)
    if is_sharded(tensor) and hasattr(local, "wait"):  # an operation's result that still travels
        local = local.wait()
    return local.detach()


def parts_of(tensor: torch.Tensor) -> tuple[Part, ...]:
    """The boxes that this rank holds; of a plain tensor, one. Boxes have elements: an empty part has none.

    Raises:
        Unmapped: a partial sum, a placement that is not known, or a part that has another shape than they say.
    """
    shape = tuple(tensor.shape)
    if not is_sharded(tensor):
        return (Part(box=whole(shape), at=whole(shape)),) if math.prod(shape) else ()
    spec = _spec(tensor)
    coordinate = spec.mesh.get_coordinate()
    if coordinate is None:
        return ()
    bounds = getattr(spec.placements[0], "bounds", None)
    if bounds is not None:
        return tuple(stretch(shape, *bounds[coordinate[0] : coordinate[0] + 2]))
    runs = _runs(shape, tuple(spec.mesh.shape), coordinate, spec.placements, getattr(spec, "shard_order", None))
    expected = tuple(sum(length for _, length in of) for of in runs)
    found = tuple(local_of(tensor).shape)
    if found != expected:
        raise Unmapped(
            f"this rank's part has the shape {list(found)}, its placements say {list(expected)}. Make it by"
            " distribute_tensor, or give DTensor.from_local the whole shape and stride."
        )
    return tuple(_products(runs))


def stretch(shape: tuple[int, ...], begin: int, end: int) -> Iterable[Part]:
    """The boxes that flattened numbers make, in their order: what is left of a row, whole rows, a row's beginning."""
    at = begin

    def cut(dims: tuple[int, ...], first: tuple[int, ...], low: int, high: int) -> Iterable[Box]:
        if low >= high:
            return
        if not dims:
            yield Box(first, (1,) * len(first))
            return
        row = math.prod(dims[1:])
        start, stop = -(-low // row), high // row
        if start > stop:  # within one row
            yield from cut(dims[1:], (*first, stop), low - stop * row, high - stop * row)
            return
        if low < start * row:
            yield from cut(dims[1:], (*first, start - 1), low - (start - 1) * row, row)
        if start < stop:
            rest = dims[1:]
            yield Box((*first, start, *(0 for _ in rest)), (*(1 for _ in first), stop - start, *rest))
        if stop * row < high:
            yield from cut(dims[1:], (*first, stop), 0, high - stop * row)

    for box in cut(shape, (), begin, end):
        yield Part(box=box, at=Box((at - begin,), (box.size,)))
        at += box.size


def view_of(tensor: torch.Tensor, part: Part) -> torch.Tensor:
    """A view of a part of a rank's tensor, in the shape of its box."""
    mine = narrowed(tensor, part.at)
    return mine if mine.shape == part.box.shape else mine.view(part.box.shape)


def narrowed(tensor: torch.Tensor, box: Box) -> torch.Tensor:
    """A view of a box of a tensor."""
    for dim, (begin, length) in enumerate(zip(box.offset, box.shape, strict=True)):
        if length != tensor.shape[dim]:
            tensor = tensor.narrow(dim, begin, length)
    return tensor


def hollow_like(tensor: torch.Tensor, dtype: str) -> torch.Tensor:
    """A DTensor of the same shape and placement and of another dtype, without memory."""
    return with_local(tensor, torch.empty_like(local_of(tensor), dtype=getattr(torch, dtype), device="meta"))


def layout_of(tensor: torch.Tensor) -> Hashable | None:
    """Equal for DTensors that are cut alike on all ranks; None for a plain tensor."""
    if not is_sharded(tensor):
        return None
    spec = _spec(tensor)
    mesh = spec.mesh.mesh
    return (
        *(tuple(tensor.shape), tuple(mesh.shape), tuple(mesh.flatten().tolist())),
        *(spec.placements, getattr(spec, "shard_order", None)),
    )


def layout_text(tensor: torch.Tensor) -> str:
    """How messages name a layout: "(Shard(dim=0),) on a mesh of [4] ranks"."""
    spec = _spec(tensor)
    return f"{spec.placements} on a mesh of {list(spec.mesh.shape)} ranks"


def _spec(tensor: Any) -> Any:
    return tensor._spec


def _runs(
    shape: Sequence[int], mesh: Sequence[int], coordinate: Sequence[int], placements: Sequence[Any], order: Any
) -> list[list[Run]]:
    """For each dimension of the array, the stretches that this rank holds."""
    runs: list[list[Run]] = [[(0, length)] for length in shape]
    for mesh_dim in _turns(placements, order):
        placement = placements[mesh_dim]
        if placement.is_replicate():
            continue
        if placement.is_partial():
            raise Unmapped(
                f"its values are partial sums ({placement}). Write value.redistribute(placements=[Replicate()])."
            )
        factor = getattr(placement, "split_factor", 1)
        if not placement.is_shard() and not hasattr(placement, "split_factor"):
            raise Unmapped(f"the placement {placement} is not known. Write value.full_tensor().")
        dim: int = placement.dim
        runs[dim] = _taken(runs[dim], factor, mesh[mesh_dim], coordinate[mesh_dim], placement)
    return runs


def _turns(placements: Sequence[Any], order: Any) -> Iterable[int]:
    """The dimensions of the mesh in the order in which they cut: from left to right unless the tensor says otherwise.

    torch 2.13 can write down another order for each dimension of the array; earlier ones have _StridedShard alone.
    """
    given = [mesh_dim for entry in order or () for mesh_dim in entry.mesh_dims]
    return (*given, *(mesh_dim for mesh_dim in range(len(placements)) if mesh_dim not in given))


def _taken(runs: list[Run], factor: int, count: int, index: int, placement: Any) -> list[Run]:
    """What the rank `index` of `count` gets of these stretches: of each of `factor` parts of them, its chunk."""
    total = sum(length for _, length in runs)
    if factor == 1:
        chunk = -(-total // count)
        return _between(runs, chunk * index, chunk * (index + 1))
    if total % (factor * count):
        raise Unmapped(
            f"{placement} cuts {total} elements into {factor} x {count} parts that are not even. Write"
            " value.full_tensor()."
        )
    part, chunk = total // factor, total // (factor * count)
    begins = (part * number + chunk * index for number in range(factor))
    return [run for begin in begins for run in _between(runs, begin, begin + chunk)]


def _between(runs: list[Run], begin: int, end: int) -> list[Run]:
    """The elements from `begin` to `end` of stretches laid end to end."""
    found: list[Run] = []
    at = 0
    for start, length in runs:
        low, high = max(begin - at, 0), min(end - at, length)
        if low < high:
            found.append((start + low, high - low))
        at += length
    return found


def _products(runs: list[list[Run]]) -> Iterable[Part]:
    """The boxes that the stretches of all dimensions make together."""
    placed: list[list[tuple[int, int, int]]] = []
    for of in runs:
        ends = itertools.accumulate((length for _, length in of), initial=0)
        placed.append([(start, length, at) for (start, length), at in zip(of, ends, strict=False)])
    for stretches in itertools.product(*placed):
        lengths = tuple(length for _, length, _ in stretches)
        if math.prod(lengths):
            box = Box(tuple(start for start, _, _ in stretches), lengths)
            yield Part(box=box, at=Box(tuple(at for _, _, at in stretches), lengths))
