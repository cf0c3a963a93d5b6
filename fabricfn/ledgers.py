"""What one rank has so far of a sum in [Note: one tree]: partial sums, losses, and what is known of each entry."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from fabricfn import flat
from fabricfn.binding import changed_buffers, load_buffers
from fabricfn.engine import Frame
from fabricfn.records import Model

ABSENT, PRESENT, IMPOSSIBLE = 0, 1, 2
"""What a micro-batch did with an entry: nothing; a gradient, or another buffer; something that has no sum."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A trainable parameter, or a persistent buffer."""

    frame: int
    name: str
    slot: int | None
    """Which slot of the frame; None for a buffer."""
    like: torch.Tensor
    """The parameter or the model's buffer: its dtype and shape."""


@dataclasses.dataclass(slots=True, kw_only=True)
class Ledger:
    """What this rank has so far."""

    summed: list[Entry]
    equal: list[Entry]
    """What has no mean (a counter), or gets none: it must come out equal from every micro-batch."""
    dtype: torch.dtype | None
    """In which everything is summed, if not in its own."""
    marks: list[int]
    """For the entries of `summed`, then of `equal`: ABSENT, PRESENT or IMPOSSIBLE."""
    stack: flat.Stack[list[torch.Tensor]] = dataclasses.field(default_factory=list[Any])
    """Sums for the entries of `summed`, log2(micro-batches) of them."""
    values: list[torch.Tensor] = dataclasses.field(default_factory=list[torch.Tensor])
    """For the entries of `equal`."""
    losses: list[torch.Tensor] = dataclasses.field(default_factory=list[torch.Tensor])
    weights: list[Any] = dataclasses.field(default_factory=list[Any])
    aux: list[Any] | None = None


def open_ledger(
    frames: Sequence[Frame], models: Sequence[Model], *, averaged: bool, dtype: torch.dtype | None
) -> Ledger:
    """Nothing yet, for every trainable parameter and every persistent buffer.

    Args:
        frames: of the models.
        models: with the buffers that every micro-batch starts from.
        averaged: whether floating buffers are summed.
        dtype: in which everything is summed, if not in its own.
    """
    entries = [
        Entry(frame=number, name=name, slot=index, like=slot)
        for number, frame in enumerate(frames)
        for index, (name, slot) in enumerate(zip(frame.names, frame.slots, strict=True))
        if frame.trainable[index]
    ]
    for number, model in enumerate(models):
        entries += [Entry(frame=number, name=name, slot=None, like=value) for name, value in model.buffers.items()]
    floating = [entry.like.is_floating_point() or entry.like.is_complex() for entry in entries]
    means = [entry.slot is not None or (averaged and one) for entry, one in zip(entries, floating, strict=True)]
    summed = [entry for entry, one in zip(entries, means, strict=True) if one]
    equal = [entry for entry, one in zip(entries, means, strict=True) if not one]
    return Ledger(summed=summed, equal=equal, dtype=dtype, marks=[ABSENT] * len(entries))


def add_leaf(
    ledger: Ledger,
    place: int,
    gradients: Sequence[Sequence[torch.Tensor | None]],
    frames: Sequence[Frame],
    models: Sequence[Model],
) -> None:
    """Add what micro-batch `place` brought; the nets have the model's own buffers again afterwards.

    Nothing that is not in the sums outlives this call: the next forward pass needs the memory.
    """
    leaf = leaf_of(ledger, gradients, frames, models)
    # only what has no left half here yet is ever added to
    joins = bool(ledger.stack) and place % 2 == 1
    flat.push(ledger.stack, (place, 1), leaf if joins else owned(leaf), flat.add_lists)


def leaf_of(
    ledger: Ledger,
    gradients: Sequence[Sequence[torch.Tensor | None]],
    frames: Sequence[Frame],
    models: Sequence[Model],
) -> list[torch.Tensor]:
    """What one micro-batch adds to the sums."""
    changed: list[dict[str, torch.Tensor]] = []
    for frame, model in zip(frames, models, strict=True):
        changed.append(changed_buffers(frame, model))
        if model.buffers:
            load_buffers(frame, model)
    leaf: list[torch.Tensor] = []
    for place, entry in enumerate(ledger.summed):
        new = changed[entry.frame].get(entry.name) if entry.slot is None else gradients[entry.frame][entry.slot]
        if new is not None and new.layout is not torch.strided:
            ledger.marks[place], new = IMPOSSIBLE, None
        if new is None:
            # zeros, not nothing: whether a sum of zeros is 0.0 or -0.0 must not depend on where a rank begins
            leaf.append(torch.zeros_like(entry.like) if entry.slot is not None else entry.like.clone())
        else:
            ledger.marks[place] = max(ledger.marks[place], PRESENT)
            leaf.append(new)
    for index, entry in enumerate(ledger.equal):
        place = len(ledger.summed) + index
        new = changed[entry.frame].get(entry.name, entry.like)
        if entry.name in changed[entry.frame]:
            ledger.marks[place] = max(ledger.marks[place], PRESENT)
        if len(ledger.values) == index:
            ledger.values.append(new)
        elif not torch.equal(ledger.values[index], new):
            ledger.marks[place] = IMPOSSIBLE
    return [in_sum_dtype(tensor, ledger.dtype) for tensor in leaf]


def in_sum_dtype(tensor: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    """As it is summed: in `dtype`, and never in 16 bits, whose sums lose what they have in common, or overflow."""
    if dtype is not None and tensor.is_floating_point():
        tensor = tensor.to(dtype)
    return tensor.float() if tensor.dtype in flat.HALVES else tensor


def owned(leaf: list[torch.Tensor]) -> list[torch.Tensor]:
    """The same, where gradients that share memory (autograd hands out views of one tensor) get memory of their own."""
    seen: set[int] = {0}
    for place, tensor in enumerate(leaf):
        start = 0 if tensor.device.type == "xla" else tensor.untyped_storage().data_ptr()  # no two of XLA's share any
        if start in seen and start:
            leaf[place] = tensor.clone()
        seen.add(start)
    return leaf
