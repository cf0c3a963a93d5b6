"""Moving lists of tensors between ranks. Everything travels as bytes, so every dtype can."""

import itertools
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.distributed as dist

from fabricfn.flat.buckets import Tensors, complete, join, join_rows, plan, split
from fabricfn.flat.hosting import over_the_host
from fabricfn.flat.wire import Group, as_bytes, broadcast_in_place, exchanged, gathered, group_size

PIECE = 1 << 22
"""Bytes of all ranks together that `share` moves at once of one tensor."""
_copy_all: Any = torch._foreach_copy_  # pyright: ignore[reportPrivateImportUsage]


@torch.no_grad()
def all_gather(tensors: Tensors, group: Group) -> list[torch.Tensor]:
    """The ranks' tensors stacked: [*s] becomes [size, *s]. Every rank must call it."""
    results: list[torch.Tensor | None] = [None] * len(tensors)
    size = group_size(group)
    for places in plan(tensors):
        part = [tensors[place] for place in places]
        rows = gathered(join(part), group)
        split(rows, [torch.Size((size, *tensor.shape)) for tensor in part], places, results)
    return complete(results)


@torch.no_grad()
def all_gather_rows(tensors: Tensors, rows: Sequence[Sequence[int]], group: Group) -> list[torch.Tensor]:
    """The ranks' tensors concatenated along dim 0, which may differ.

    Args:
        tensors: [n, ...] each; the further dimensions are the same on all ranks.
        rows: `rows[rank][i]` is the first dimension of tensor i on that rank.
        group: the ranks.
    """
    size, me = group_size(group), 0 if group is None else group.rank()
    # all ranks must make the same buckets, so it is the largest rank's sizes that decide
    largest = [max(counts[place] for counts in rows) for place in range(len(tensors))]
    widths = [tensor.shape[1:].numel() for tensor in tensors]
    buckets = plan(tensors, [n * w * t.itemsize for n, w, t in zip(largest, widths, tensors, strict=True)])
    results: list[torch.Tensor | None] = [None] * len(tensors)
    for places in buckets:
        sizes = [[counts[place] * widths[place] for place in places] for counts in rows]
        totals = [sum(of_rank) for of_rank in sizes]
        buffer = tensors[places[0]].new_empty(max(totals))
        torch.cat([tensors[place].detach().reshape(-1) for place in places], out=buffer[: totals[me]])
        ranks = gathered(buffer, group)
        cuts: list[Sequence[torch.Tensor]] = [ranks[rank, : totals[rank]].split(sizes[rank]) for rank in range(size)]
        for index, place in enumerate(places):
            shape = (sum(counts[place] for counts in rows), *tensors[place].shape[1:])
            results[place] = torch.cat([cut[index] for cut in cuts]).view(shape)
    return complete(results)


@torch.no_grad()
def share(lines: Tensors, bounds: Sequence[Sequence[int]], group: Group) -> None:
    """Stretches of flat tensors to all ranks, in place: rank r has `lines[i][bounds[i][r] : bounds[i][r + 1]]`.

    Long ones go in several pieces, so that the copies stay small beside the data.
    """
    size, me = group_size(group), 0 if group is None else group.rank()
    owners: list[torch.Tensor] = []
    pieces: list[dict[int, torch.Tensor]] = []  # by rank, those that are not empty
    for line, ends in zip(lines, bounds, strict=True):
        spans = list(enumerate(itertools.pairwise(ends)))
        most = max(PIECE // (line.itemsize * size), 1)
        for at in range(0, max(end - begin for _, (begin, end) in spans), most):
            owners.append(line)
            pieces.append({rank: line[b + at : min(b + at + most, e)] for rank, (b, e) in spans if b + at < e})
    for places in plan(owners, [sum(part.nbytes for part in piece.values()) for piece in pieces]):
        theirs = [[pieces[place][rank] for place in places if rank in pieces[place]] for rank in range(size)]
        sizes = [list(map(torch.Tensor.numel, parts)) for parts in theirs]
        buffer = owners[places[0]].new_empty(max(map(sum, sizes)))
        if theirs[me]:
            torch.cat(theirs[me], out=buffer[: sum(sizes[me])])
        for rank, values in enumerate(gathered(buffer, group)):
            if rank != me and theirs[rank]:
                _copy_all(theirs[rank], values[: sum(sizes[rank])].split(sizes[rank]))


@over_the_host
@torch.no_grad()
def broadcast(tensors: Tensors, src: int, group: Group) -> list[torch.Tensor]:
    """The tensors of rank `src` of the group; the other ranks' give shapes, dtypes and devices."""
    buckets = plan(tensors)
    buffers = [join([tensors[place] for place in places]) for places in buckets]
    works = [broadcast_in_place(buffer, src, group) for buffer in buffers]
    results: list[torch.Tensor | None] = [None] * len(tensors)
    for places, buffer, work in zip(buckets, buffers, works, strict=True):
        if work is not None:
            work.wait()
        split(buffer, [tensors[place].shape for place in places], places, results)
    return complete(results)


@torch.no_grad()
def spread(tensors: Tensors, src: int, group: Group) -> None:
    """The tensors become those of rank `src` of the group, in place.

    Large ones travel as they lie in memory; of the small ones there is a copy, one buffer at a time.
    """
    for places in plan(tensors) if group is not None else ():
        some = [tensors[place].detach() for place in places]
        alone = len(some) == 1 and some[0].is_contiguous()
        buffer = some[0].view(-1) if alone else join(some)
        if buffer.device.type == "xla":
            alone, (buffer,) = False, broadcast([buffer], src, group)
        elif (work := broadcast_in_place(buffer, src, group)) is not None:
            work.wait()
        if not alone:
            pieces = cast("tuple[torch.Tensor, ...]", buffer.split([tensor.numel() for tensor in some]))
            _copy_all(some, [piece.view(tensor.shape) for piece, tensor in zip(pieces, some, strict=True)])


@torch.no_grad()
def gather(tensors: Tensors, dst: int, group: Group) -> list[torch.Tensor] | None:
    """On rank `dst` of the group what `all_gather` returns, on the others None."""
    if group is None:
        return all_gather(tensors, group)
    size, receives = group.size(), group.rank() == dst
    results: list[torch.Tensor | None] = [None] * len(tensors)
    for places in plan(tensors):
        part = [tensors[place] for place in places]
        buffer = join(part)
        rows = buffer.new_empty((size if receives else 0, buffer.numel()))
        if buffer.numel():
            dist.gather(as_bytes(buffer), list(as_bytes(rows)) if receives else None, group=group, group_dst=dst)
        if receives:
            split(rows, [torch.Size((size, *tensor.shape)) for tensor in part], places, results)
    return complete(results) if receives else None


@torch.no_grad()
def scatter(like: Tensors, tensors: Tensors | None, src: int, group: Group) -> list[torch.Tensor]:
    """Row r of each tensor of rank `src` goes to rank r.

    Args:
        like: what each rank gets: shapes, dtypes and devices.
        tensors: on `src` the tensors [size, *shape], on the others None.
        src: the rank in the group.
        group: the ranks.
    """
    results: list[torch.Tensor | None] = [None] * len(like)
    for places in plan(like):
        part = [like[place] for place in places]
        buffer = part[0].new_empty(sum(tensor.numel() for tensor in part))
        rows = None if tensors is None else join_rows([tensors[place] for place in places], group_size(group))
        if group is None and rows is not None:
            buffer = rows[0]
        elif group is not None and buffer.numel():
            dist.scatter(as_bytes(buffer), None if rows is None else list(as_bytes(rows)), group=group, group_src=src)
        split(buffer, [tensor.shape for tensor in part], places, results)
    return complete(results)


@torch.no_grad()
def all_to_all(tensors: Tensors, group: Group) -> list[torch.Tensor]:
    """Of `size` equal parts along dim 0, part r goes to rank r; the result holds the parts that came, by rank."""
    results: list[torch.Tensor | None] = [None] * len(tensors)
    for places in plan(tensors):
        part = [tensors[place] for place in places]
        rows = exchanged(join_rows(part, group_size(group)), group)
        split(rows, [tensor.shape for tensor in part], places, results)
    return complete(results)


@torch.no_grad()
def send(tensors: Tensors, dst: int, group: dist.ProcessGroup) -> None:
    """Send to rank `dst` of the group, which must call `recv`."""
    for places in plan(tensors):
        buffer = join([tensors[place] for place in places])
        if buffer.numel():
            dist.send(as_bytes(buffer), group=group, group_dst=dst)


@torch.no_grad()
def recv(like: Tensors, src: int, group: dist.ProcessGroup) -> list[torch.Tensor]:
    """What rank `src` of the group sends; `like` gives shapes, dtypes and devices."""
    results: list[torch.Tensor | None] = [None] * len(like)
    for places in plan(like):
        part = [like[place] for place in places]
        buffer = part[0].new_empty(sum(tensor.numel() for tensor in part))
        if buffer.numel():
            dist.recv(as_bytes(buffer), group=group, group_src=src)
        split(buffer, [tensor.shape for tensor in part], places, results)
    return complete(results)
