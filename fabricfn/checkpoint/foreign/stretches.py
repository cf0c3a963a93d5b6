"""Arrays that lie in files as stretches of their flattened numbers, one after another, as DeepSpeed cuts them."""

import itertools
import math
from collections.abc import Hashable, Sequence
from pathlib import Path

import torch

from fabricfn.checkpoint.foreign.values import Stored
from fabricfn.checkpoint.format.boxes import common, within
from fabricfn.checkpoint.trees.placements import Part, narrowed, stretch, view_of
from fabricfn.errors import CheckpointError


def joined(pieces: Sequence[torch.Tensor], shape: Sequence[int], file: Path, same: Hashable) -> Stored:
    """The array of a shape whose flattened numbers are the pieces end to end. Of mapped pieces, what is wanted is read.

    Raises:
        CheckpointError: the pieces have fewer or more numbers, or several dtypes.
    """
    shape, lengths = tuple(shape), [piece.numel() for piece in pieces]
    dtypes = {piece.dtype for piece in pieces}
    if sum(lengths) != math.prod(shape) or len(dtypes) != 1:
        raise CheckpointError(
            f"{file.parent}: the files hold {sum(lengths)} numbers of {same}, which has the shape {list(shape)}: a file"
            " is missing, or of another save."
        )
    placed = [
        (piece, tuple(stretch(shape, end - piece.numel(), end)))
        for piece, end in zip(pieces, itertools.accumulate(lengths), strict=True)
    ]

    def fill(into: torch.Tensor, parts: Sequence[Part], what: str) -> None:
        for part in parts:
            mine = view_of(into, part)
            for piece, boxes in placed:
                for there in boxes:
                    box = common(part.box, there.box)
                    if box is not None:
                        found = narrowed(view_of(piece.view(-1), there), within(box, there.box))
                        narrowed(mine, within(box, part.box)).copy_(found)

    return Stored(dtype=dtypes.pop(), shape=shape, file=file, fill=fill, same=same)
