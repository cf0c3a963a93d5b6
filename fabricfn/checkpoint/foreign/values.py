"""What is found in a file of another tool: containers of plain values, of tensors to be read, and of refusals."""

import dataclasses
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch

from fabricfn.checkpoint.foreign.kinds import Keys
from fabricfn.checkpoint.trees.placements import Part, local_tensor, narrowed, parts_of, view_of
from fabricfn.checkpoint.trees.reading import on_host
from fabricfn.errors import CheckpointError
from fabricfn.sharding import is_sharded, with_local

PLAIN = (bool, int, float, complex, str, bytes, type(None))
DEPTH_LIMIT = 100


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Stored:
    """A tensor that lies in a file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    file: Path
    """Where it lies, for messages."""
    fill: Callable[[torch.Tensor, Sequence[Part], str], None]
    """(tensor in host memory, its parts, the name for messages): fill these parts."""
    same: Hashable = None
    """Equal for tensors that are one array in the file; None when nobody knows."""
    at_once: bool = False
    """A part costs as much as all of it."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Later:
    """A value that is unpickled, without classes, once somebody wants it."""

    read: Callable[[], Any]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Refused:
    """Something that cannot be loaded, which matters only to whoever wants it."""

    text: str


def tensor_text(value: Stored | torch.Tensor) -> str:
    """A tensor as messages name it: "float32[2, 3]"."""
    return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"


def settled(value: Any) -> Any:
    """The value itself, of one that was to be read later."""
    return value.read() if type(value) is Later else value


def taken_up(value: Any, file: Path, depth: int = 0) -> Any:
    """What torch.load returned, its tensors as `Stored`."""
    if isinstance(value, torch.Tensor):
        return _stored(value, file)
    if depth > DEPTH_LIMIT:
        raise CheckpointError(f"{file} nests deeper than {DEPTH_LIMIT} containers.")
    if isinstance(value, Mapping):
        items = cast("Mapping[Any, Any]", value).items()
        return {key: taken_up(item, file, depth + 1) for key, item in items}
    if isinstance(value, list | tuple):
        found = [taken_up(item, file, depth + 1) for item in cast("Sequence[Any]", value)]
        return found if isinstance(value, list) else tuple(found)
    if isinstance(value, PLAIN):
        return value
    return Refused(text=f"it is a {type(value).__name__}, which is neither a tensor nor a plain value")


def _stored(tensor: torch.Tensor, file: Path) -> Stored | Refused:
    if is_sharded(tensor):
        return Refused(
            text="it is a DTensor, of which a PyTorch file holds the part of one rank only. Save it with"
            " torch.distributed.checkpoint, or save value.full_tensor()"
        )
    plain = type(tensor) in (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer)
    if not plain or tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_nested or tensor.is_meta:
        kind = type(tensor).__name__ if not plain else str(tensor.layout)
        return Refused(text=f"it is a {kind} of dtype {tensor.dtype}; plain dense tensors can be loaded")
    tensor = tensor.detach()
    storage = tensor.untyped_storage()
    if tensor.nbytes > storage.nbytes():
        # an expanded view of few bytes must not ask for much memory
        return Refused(text=f"its {tensor.nbytes:,} bytes are a view of {storage.nbytes():,}; save value.contiguous()")

    def fill(into: torch.Tensor, parts: Sequence[Part], what: str) -> None:
        for part in parts:
            view_of(into, part).copy_(narrowed(tensor, part.box))

    bits = (tensor.is_conj(), tensor.is_neg())
    same = (storage.data_ptr(), tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype, bits)
    known = same if tensor.numel() else None
    return Stored(dtype=tensor.dtype, shape=tuple(tensor.shape), file=file, fill=fill, same=known)


def read(stored: Stored, like: torch.Tensor | None, what: str, device: torch.device) -> torch.Tensor:
    """The tensor: whole, on `device`; or as `like` is placed, of whose part alone the bytes are read, in its dtype."""
    with torch.no_grad():
        if like is None:
            into = torch.empty(stored.shape, dtype=stored.dtype, device="cpu")
            stored.fill(into, parts_of(into), what)
            return into.to(device)
        values = local_tensor(like)
        into = on_host(values, stored.dtype)
        stored.fill(into, parts_of(like), what)
        made = into.to(device=device if values.is_meta else values.device, dtype=like.dtype)
        loaded = with_local(like, made)
        if isinstance(like, torch.nn.Parameter):
            return torch.nn.Parameter(loaded, requires_grad=like.requires_grad)
        return loaded.requires_grad_(like.requires_grad)


def leaves(tree: Any, keys: Keys = ()) -> Iterator[tuple[Keys, Any]]:
    """(keys, leaf) of everything that is no container; values to be read later are leaves."""
    if isinstance(tree, dict):
        for key, item in cast("dict[Any, Any]", tree).items():
            yield from leaves(item, (*keys, key))
    elif isinstance(tree, list | tuple):
        for index, item in enumerate(cast("Sequence[Any]", tree)):
            yield from leaves(item, (*keys, index))
    else:
        yield keys, tree
