"""Reading arrays: the boxes that are wanted, from the pieces that hold them; every byte that is read is checked."""

import math
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch

from fabricfn.checkpoint.format.boxes import Box, common, within
from fabricfn.checkpoint.format.manifest import BLOCK, Leaf
from fabricfn.checkpoint.format.pieces import PieceReader, Source
from fabricfn.checkpoint.trees.arrays import bytes_of
from fabricfn.checkpoint.trees.placements import Part, local_tensor, narrowed, parts_of, view_of
from fabricfn.errors import CheckpointError
from fabricfn.leases import bump
from fabricfn.sharding import with_local


def needed_bytes(leaf: Leaf, like: Any) -> int:
    """The bytes of the value that this rank will hold."""
    values = local_tensor(like) if isinstance(like, torch.Tensor) else torch.empty(leaf.shape, device="meta")
    return values.numel() * torch_dtype(leaf).itemsize


def torch_dtype(leaf: Leaf) -> torch.dtype:
    """The dtype of a leaf, numpy's included."""
    return getattr(torch, leaf.dtype)


def room_for(leaf: Leaf, like: Any, device: torch.device, donate: bool) -> torch.Tensor | None:
    """Host memory that the value of an array leaf will live in; None where it will live elsewhere, or in `like`."""
    if not isinstance(like, torch.Tensor):
        stays = leaf.kind != "tensor" or leaf.host or device.type == "cpu"
        return torch.empty(leaf.shape, dtype=torch_dtype(leaf), device="cpu") if stays else None
    values = local_tensor(like)
    if (device if values.is_meta else values.device).type != "cpu" or (donate and not values.is_meta):
        return None
    return on_host(values)


def on_host(values: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Host memory for such a tensor."""
    if (
        values.device.type == "xla"
    ):  # what `empty_like` makes of it wraps a tensor, whose bytes are others than it shows (torch 2.9)
        return torch.empty(values.shape, dtype=dtype or values.dtype, device="cpu")
    return torch.empty_like(values, dtype=dtype, device="cpu", requires_grad=False)


def read_leaf(
    source: Source, leaf: Leaf, like: Any, what: str, *, room: torch.Tensor | None, device: torch.device, donate: bool
) -> Any:
    """The value of an array leaf: as `like` wants it, or plain when that is None.

    Args:
        source: the checkpoint.
        leaf: the one that has the pieces.
        like: a tensor, a DTensor (only its part of this rank is read), a numpy array, or None.
        what: the leaf's path, for messages.
        room: of `room_for`; None: it is taken here.
        device: of tensors where `like` names none.
        donate: fill `like` and return it.
    """
    if isinstance(like, torch.Tensor):
        return _read_like(source, leaf, like, what, room, device, donate)
    into = torch.empty(leaf.shape, dtype=torch_dtype(leaf), device="cpu") if room is None else room
    read_parts(source, leaf, into, parts_of(into), what)
    if leaf.kind == "tensor":
        return into if leaf.host else into.to(device)
    if leaf.kind == "number":
        return into.numpy()[()]
    if donate and like is not None:
        np.copyto(like, into.numpy())
        return like
    return into.numpy()


def _read_like(
    source: Source,
    leaf: Leaf,
    like: torch.Tensor,
    what: str,
    room: torch.Tensor | None,
    device: torch.device,
    donate: bool,
) -> torch.Tensor:
    with torch.no_grad():
        values, parts = local_tensor(like), parts_of(like)
        fill = donate and not values.is_meta
        plain = values.device.type == "cpu" and not values.is_conj() and not values.is_neg()
        if fill and plain and values.is_contiguous():
            read_parts(source, leaf, values, parts, what)
            if not values.is_inference():
                bump([like])
            return like
        into = on_host(values) if room is None else room
        read_parts(source, leaf, into, parts, what)
        if fill:
            values.copy_(into)
            if not values.is_inference():
                bump([like])
            return like
        loaded = with_local(like, into.to(device if values.is_meta else values.device))
        if isinstance(like, torch.nn.Parameter):
            return torch.nn.Parameter(loaded, requires_grad=like.requires_grad)
        return loaded.requires_grad_(like.requires_grad)


def read_parts(source: Source, leaf: Leaf, into: torch.Tensor, parts: Sequence[Part], what: str) -> None:
    """Fill the parts of a tensor in host memory; nothing but the blocks that they touch is read.

    Raises:
        CheckpointError: a block is damaged, or an element of the parts is in no piece.
    """
    for part in parts:
        mine, covered = view_of(into, part), 0
        for piece in leaf.pieces:
            shared = common(piece.box, part.box)
            if shared is None:
                continue
            read_box(
                PieceReader(source, piece, what),
                *(piece.shape, within(shared, piece.box), narrowed(mine, within(shared, part.box)), 0),
            )
            covered += shared.size
        if covered != part.box.size:
            raise CheckpointError(
                f"{source.path} has {covered:,} of the {part.box.size:,} elements of {what!r} that this rank needs."
                " Load another checkpoint: ff.latest(folder) finds the newest whole one."
            )


class ReadsBytes(Protocol):
    """Bytes by position: a piece of a checkpoint, or a stretch of another tool's file."""

    def read(self, begin: int, into: memoryview, reach: int = 0) -> None:
        """Fill `into` with the bytes from `begin`; the caller will go on reading up to `reach`."""
        ...


def read_box(reader: ReadsBytes, shape: tuple[int, ...], box: Box, into: torch.Tensor, start: int) -> None:
    """Fill `into` with a box of an array of this shape, whose bytes begin at `start` in the piece.

    Where the box lies in one stretch, it is read to its place; else a few rows at a time through a buffer of one block.
    """
    row = into.element_size() * math.prod(shape[1:])
    begin = start + (box.offset[0] * row if shape else 0)
    if box.shape[1:] == shape[1:] and into.is_contiguous():
        reader.read(begin, bytes_of(into))
    elif row > BLOCK:
        inner = Box(box.offset[1:], box.shape[1:])
        for number in range(box.shape[0]):
            read_box(reader, shape[1:], inner, into[number], begin + number * row)
    else:
        step = min(BLOCK // row, box.shape[0])
        rows = torch.empty((step, *shape[1:]), dtype=into.dtype, device="cpu")
        for number in range(0, box.shape[0], step):
            some = rows[: box.shape[0] - number]
            reader.read(begin + number * row, bytes_of(some), reach=begin + box.shape[0] * row)
            wanted = Box((0, *box.offset[1:]), (len(some), *box.shape[1:]))
            into[number : number + step].copy_(narrowed(some, wanted))
