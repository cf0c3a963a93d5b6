"""Bytes of any length between ranks: descriptions of mismatches, pickled objects."""

from typing import cast

import torch
import torch.distributed as dist

from fabricfn import flat


def all_gather_bytes(data: bytes, group: dist.ProcessGroup | None, device: torch.device) -> list[bytes]:
    """Every rank's bytes, by rank. Every rank must call it.

    Args:
        data: may differ in length.
        group: the ranks; None is one rank.
        device: where they travel; one that the group serves.
    """
    lengths = cast("list[int]", flat.all_gather([_length(data, device)], group)[0].view(-1).tolist())
    whole = _from_tensor(flat.all_gather_rows([_to_tensor(data, device)], [[length] for length in lengths], group)[0])
    starts = [sum(lengths[:rank]) for rank in range(len(lengths))]
    return [whole[start : start + length] for start, length in zip(starts, lengths, strict=True)]


def broadcast_bytes(data: bytes, src: int, group: dist.ProcessGroup | None, device: torch.device) -> bytes:
    """The bytes of rank `src` of the group; what the others pass is ignored. Every rank must call it."""
    length = int(flat.broadcast([_length(data, device)], src, group)[0].item())
    sends = group is None or group.rank() == src
    tensor = _to_tensor(data, device) if sends else torch.empty(length, dtype=torch.uint8, device=device)
    return _from_tensor(flat.broadcast([tensor], src, group)[0])


def send_bytes(data: bytes, dst: int, group: dist.ProcessGroup, device: torch.device) -> None:
    """To rank `dst` of the group, which calls `recv_bytes`."""
    flat.send([_length(data, device)], dst, group)
    flat.send([_to_tensor(data, device)], dst, group)


def recv_bytes(src: int, group: dist.ProcessGroup, device: torch.device) -> bytes:
    """What rank `src` of the group sends."""
    length = int(flat.recv([_length(b"", device)], src, group)[0].item())
    return _from_tensor(flat.recv([torch.empty(length, dtype=torch.uint8, device=device)], src, group)[0])


def _length(data: bytes, device: torch.device) -> torch.Tensor:
    return torch.tensor([len(data)], device=device)


def _to_tensor(data: bytes, device: torch.device) -> torch.Tensor:
    if not data:
        return torch.empty(0, dtype=torch.uint8, device=device)
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).to(device)


def _from_tensor(tensor: torch.Tensor) -> bytes:
    return tensor.cpu().numpy().tobytes()
