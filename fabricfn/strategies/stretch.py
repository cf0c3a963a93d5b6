"""Tensors of which each rank holds a stretch of the flattened numbers, as ZeRO cuts them. DTensor cuts whole rows only.

A `Stretch` stands where a DTensor would: its shape is the global one, its memory (`_local_tensor`, one dimension) this
rank's part. Whatever works number by number works on the parts; anything else is refused, never wrong.
"""

import copy
import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist

from fabricfn.errors import CapabilityError
from fabricfn.tree import tree_leaves, tree_map

_dispatch: Any = torch
"""The parts of torch that have no types."""


@dataclasses.dataclass(frozen=True, slots=True)
class Stretches:
    """A placement: the rank r of a line of ranks holds the flattened numbers from `bounds[r]` to `bounds[r + 1]`.

    The line is the first axis of the mesh; along the others, if there are any, the ranks hold the same.
    """

    bounds: tuple[int, ...]

    def is_shard(self, dim: int | None = None) -> bool:
        """Not along a dimension."""
        return False

    def is_replicate(self) -> bool:
        """No number is on two ranks."""
        return False

    def is_partial(self) -> bool:
        """No rank holds a term of a sum."""
        return False


@dataclasses.dataclass(frozen=True, slots=True)
class Everywhere:
    """The placement along the other axes: `Replicate`, whose module takes 0.6 s to import."""

    def is_shard(self, dim: int | None = None) -> bool:
        """Not along a dimension."""
        return False

    def is_replicate(self) -> bool:
        """The same on all ranks."""
        return True

    def is_partial(self) -> bool:
        """No rank holds a term of a sum."""
        return False


class Meta(NamedTuple):
    """What is known of the whole tensor."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype


@dataclasses.dataclass(frozen=True, slots=True)
class Spec:
    """How a tensor lies on the ranks; the fields are those of torch's own."""

    mesh: Any
    placements: tuple[Any, ...]
    tensor_meta: Meta


def bounds_of(numel: int, offset: int, chunk: int, count: int) -> tuple[int, ...]:
    """The bounds of a tensor that begins at `offset` of a flat line, of which each of `count` ranks holds `chunk`.

    Example:
        >>> bounds_of(6, 3, 5, 2), bounds_of(5, 0, 2, 3)
        ((0, 2, 6), (0, 2, 4, 5))
    """
    return (*(min(max(rank * chunk - offset, 0), numel) for rank in range(count)), numel)


class Stretch(torch.Tensor):
    """A tensor of the global shape that holds this rank's stretch of it."""

    _local_tensor: torch.Tensor
    _spec: Spec

    @staticmethod
    def __new__(cls: Any, local: torch.Tensor, spec: Spec, *, requires_grad: bool = False) -> "Stretch":
        """Around a part, without a copy."""
        meta = spec.tensor_meta
        made: Any = torch.Tensor._make_wrapper_subclass(  # pyright: ignore[reportAttributeAccessIssue]
            cls, meta.shape, strides=meta.stride, dtype=local.dtype, device=local.device, requires_grad=requires_grad
        )
        made._local_tensor = local
        made._spec = spec
        return made

    __torch_function__ = cast("Any", torch._C)._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Operations that work number by number, on the parts."""
        given: tuple[Any, dict[str, Any]] = (args, kwargs or {})
        first = next(leaf for leaf in tree_leaves(given) if isinstance(leaf, Stretch))
        if not (_dispatch.Tag.pointwise in func.tags or func.overloadpacket in _MOVING):
            raise _whole_only(str(func))
        stretches = (leaf for leaf in tree_leaves(given) if isinstance(leaf, Stretch))
        if any(one._spec.placements != first._spec.placements for one in stretches):
            raise _whole_only(f"{func} of tensors that are cut in different ways")

        def part(leaf: Any) -> Any:
            if isinstance(leaf, Stretch):
                return leaf._local_tensor
            if isinstance(leaf, torch.Tensor) and leaf.dim():
                if leaf.shape != first.shape:
                    raise _whole_only(f"{func} with a tensor of another shape, {tuple(leaf.shape)}")
                return stretch_of(leaf, first._spec)
            return leaf

        mine = tree_map(part, given)
        out = func(*mine[0], **mine[1])
        written = {id(part): leaf for part, leaf in zip(tree_leaves(mine), tree_leaves(given), strict=True)}

        def whole(leaf: Any) -> Any:
            if not isinstance(leaf, torch.Tensor):
                return leaf
            return written[id(leaf)] if id(leaf) in written else dressed(leaf, first._spec)

        return tree_map(whole, out)

    def __repr__(self, **_: Any) -> str:  # pyright: ignore[reportIncompatibleMethodOverride]
        return f"Stretch({tuple(self.shape)}, {self._spec.placements[0]}, part={self._local_tensor})"

    def __deepcopy__(self, memo: dict[int, Any]) -> "Stretch":
        return dressed(copy.deepcopy(self._local_tensor, memo), self._spec)

    @property
    def placements(self) -> tuple[Any, ...]:
        """As a DTensor has them."""
        return self._spec.placements

    @property
    def device_mesh(self) -> Any:
        """The ranks; the line is the first axis."""
        return self._spec.mesh

    def to_local(self) -> torch.Tensor:
        """The numbers of this rank, in one dimension; shares the memory."""
        return self._local_tensor

    def full_tensor(self) -> torch.Tensor:
        """The whole tensor. Every rank of the line must call it."""
        bounds, mesh = self._spec.placements[0].bounds, self._spec.mesh
        mine, group = self._local_tensor.detach().to(mesh.device_type), mesh.get_group(0)
        bits = torch.uint8  # gloo knows fewer dtypes
        lengths = [end - begin for begin, end in itertools.pairwise(bounds)]
        longest = max(lengths)
        if 0 < longest == self.numel():  # one rank has all of it
            whole = mine.clone() if mine.numel() else mine.new_empty(longest)
            dist.broadcast(whole.view(bits), group=group, group_src=lengths.index(longest))
            return whole.view(self.shape).to(self.device)
        sent = mine.new_zeros(longest)
        sent[: mine.numel()] = mine
        parts = [torch.empty_like(sent) for _ in range(mesh.size(0))]
        dist.all_gather([part.view(bits) for part in parts], sent.view(bits), group=group)
        found = [part[:length] for part, length in zip(parts, lengths, strict=True)]
        return torch.cat(found).view(self.shape).to(self.device)

    @staticmethod
    def from_local(whole: torch.Tensor, mesh: Any, *, run_check: bool = False) -> "Whole":
        """A tensor that all ranks hold whole, on its way to `redistribute`."""
        return Whole(whole, mesh)


@dataclasses.dataclass(frozen=True, slots=True)
class Whole:
    """A tensor that is equal on all ranks of a line."""

    tensor: torch.Tensor
    mesh: Any

    def redistribute(self, *, placements: Sequence[Any]) -> Stretch:
        """The stretch of this rank, in memory of its own. Nothing travels."""
        return cut(self.tensor, self.mesh, placements[0].bounds)


def laid(part: torch.Tensor, mesh: Any, bounds: tuple[int, ...], shape: torch.Size) -> Stretch:
    """A Stretch of a global shape around this rank's part, without a copy."""
    strides = torch.empty(shape, device="meta").stride()
    placements = (Stretches(bounds), *(Everywhere() for _ in range(mesh.ndim - 1)))
    return Stretch(part, Spec(mesh, placements, Meta(shape, strides, part.dtype)))


def cut(whole: torch.Tensor, mesh: Any, bounds: tuple[int, ...]) -> Stretch:
    """The stretch of this rank of a tensor that all ranks hold, in memory of its own."""
    rank = mesh.get_local_rank(0)
    part = whole.detach().reshape(-1)[bounds[rank] : bounds[rank + 1]]
    return laid(part.clone(), mesh, bounds, whole.shape)


def stretch_of(whole: torch.Tensor, spec: Spec) -> torch.Tensor:
    """The numbers of this rank of a whole tensor; a view where that is possible."""
    rank = spec.mesh.get_local_rank(0)
    begin, end = spec.placements[0].bounds[rank : rank + 2]
    return whole.reshape(-1)[begin:end]


def dressed(part: torch.Tensor, spec: Spec) -> Stretch:
    """A Stretch around a part, whose dtype may be another one."""
    meta = spec.tensor_meta
    if part.dtype is not meta.dtype:
        spec = Spec(spec.mesh, spec.placements, Meta(meta.shape, meta.stride, part.dtype))
    return Stretch(part, spec)


_aten: Any = torch.ops.aten
_MOVING = frozenset(
    {
        *(_aten.clone, _aten.detach, _aten.alias, _aten._to_copy, _aten.copy_, _aten.fill_, _aten.zero_, _aten.lerp),
        *(_aten.zeros_like, _aten.ones_like, _aten.empty_like, _aten.full_like, _aten.lerp_),
    }
)
"""What works number by number without saying so."""


def _whole_only(what: str) -> CapabilityError:
    return CapabilityError(
        f"each rank holds a stretch of the flattened tensor, and {what} needs more than that. Write"
        " value.full_tensor() first, which every rank must call, or ff.gather_params(rt, model)."
    )
