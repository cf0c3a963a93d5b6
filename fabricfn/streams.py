"""Iterable datasets: every rank and worker goes through the whole stream and keeps its part of every step.

[Note: streams] Global step s takes the next `world_size * batch_size` samples of the stream, and rank r every
`world_size`-th of them from the r-th on. With k workers, worker w makes the steps w, w + k, ... So the ranks' batches
do not depend on the number of workers, and a cursor counts samples of the stream. Dealt out like this, an incomplete
last step is even already, wherever the stream ends; where it has less than one sample a rank, they join the step
before. To find that out, `world_size` samples are read ahead.

All of this is right only if the stream is the same everywhere. In a worker the global generators are seeded from
(seed, epoch) before it starts. A dataset that shares itself out over workers finds no worker and yields everything.
One that shares itself out over ranks is found out: the ranks compare a digest of the first sample, see
[Note: votes].
"""

import contextlib
import hashlib
import itertools
from collections import deque
from collections.abc import Generator, Iterator
from typing import Any, cast

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info
from torch.utils.data._utils import worker as torch_worker

from fabricfn.errors import DataError
from fabricfn.order import Deal, stream
from fabricfn.random import Key, fold_in
from fabricfn.records import Cursor
from fabricfn.samplers import tell_epoch
from fabricfn.seeding import GLOBAL, get_state, seed_all, set_state
from fabricfn.tree import tree_leaves

DIGESTED = 4096
"""So many bytes of a tensor count in a digest."""

SHIFT = 1 << 63
"""Between a key's bits and the signed integers that tensors hold."""


class Share(IterableDataset[Any]):
    """What one rank keeps of a user's iterable dataset: lists of samples, one a step."""

    def __init__(
        self, dataset: Any, deal: Deal, *, rank: int, num_workers: int, persistent: bool, seeded: bool
    ) -> None:
        self.dataset = dataset
        self.deal = deal
        self.rank = rank
        self.shared = num_workers > 0
        self.persistent = persistent
        self.seeded = seeded
        self.start = torch.zeros(3, dtype=torch.int64)
        """[key, epoch, index]. Workers that persist read it at the start of every epoch, others when they start."""
        if persistent:
            self.start.share_memory_()
        self.digests = self.new_digests(max(1, num_workers))
        """For each worker which stream it began, and the digest of that stream's first sample."""

    def new_digests(self, num: int) -> torch.Tensor:
        """A place for the digests, where workers can write."""
        digests = torch.zeros(num, 2, dtype=torch.int64)
        if self.shared:
            digests.share_memory_()
        return digests

    def begin(self, cursor: Cursor) -> None:
        """Let the next iteration start at a cursor."""
        start = torch.tensor([stream_seed(cursor), cursor.epoch, cursor.index])
        if self.persistent:
            self.start.copy_(start)
        else:
            self.start = start

    def digest(self, digests: torch.Tensor, stream_seed: int) -> int:
        """The one digest of all workers that have begun this stream; 0 where there was no sample.

        Raises:
            DataError: they differ.
        """
        pairs = cast("list[list[int]]", digests.tolist())
        found = {digest for begun, digest in pairs if begun == stream_seed} - {0}
        if len(found) > 1:
            raise DataError(
                f"{type(self.dataset).__name__} must yield the same samples in every worker, since each keeps its part"
                f" of them, but its first sample is not the same (rank {self.rank}). Seed its own random generator; or"
                " let it share out the data by itself: ff.setup_dataloader(rt, loader, shard=False)."
            )
        return min(found, default=0)

    def __len__(self) -> int:
        # What DataLoader divides by the batch size to get the number of steps.
        full, rest = divmod(len(self.dataset), self.deal.step_size)
        more = self.deal.tail == "spread" and rest > 0 and (full == 0 or rest >= self.deal.world_size)
        return (full + more) * self.deal.batch_size

    def __iter__(self) -> Iterator[Any]:
        info = get_worker_info()
        worker, num_workers = (0, 1) if info is None else (info.id, info.num_workers)
        bits, epoch, index = cast("list[int]", self.start.tolist())
        return self._kept(Key(bits + SHIFT), epoch, index, worker, num_workers, inside=info is not None)

    def _kept(self, key: Key, epoch: int, index: int, worker: int, num_workers: int, *, inside: bool) -> Iterator[Any]:
        digests, deal, seeded = self.digests, self.deal, self.seeded and inside
        if seeded:
            seed_all(key)
        with _no_worker(inside):
            tell_epoch(self.dataset, epoch)
            samples: Iterator[Any] = iter(self.dataset)
            first = list(itertools.islice(samples, 1))
        digests[worker] = torch.tensor([key.bits - SHIFT, sample_digest(first[0]) if first else 0])
        states = [get_state(one) for one in GLOBAL] if seeded else []
        steps = dealt(itertools.chain(first, samples), deal, self.rank, index)
        step, ahead = worker, worker
        while True:
            for one, state in zip(GLOBAL, states, strict=False):
                set_state(one, state)
            with _no_worker(inside):
                found = next(itertools.islice(steps, ahead, None), None)
            if found is None:
                return
            if seeded:
                # The collate function draws from the generators next: that must not change the stream.
                states = [get_state(one) for one in GLOBAL]
                seed_all(fold_in(fold_in(key, self.rank), index + step * deal.step_size))
            yield found
            step, ahead = step + num_workers, num_workers - 1


def stream_seed(cursor: Cursor) -> int:
    """The number that stands for one epoch of a stream, and seeds it: the key, as a signed integer."""
    return stream(cursor.seed, cursor.epoch, "stream").bits - SHIFT


def dealt(samples: Iterator[Any], deal: Deal, rank: int, start: int) -> Iterator[Any]:
    """The part of every step that belongs to one rank: a list of samples, with `deal.ready` one sample.

    See [Note: streams].

    Raises:
        DataError: there are samples, but fewer than ranks.
    """
    deque(itertools.islice(samples, start), maxlen=0)
    world_size, batch_size = deal.world_size, deal.batch_size
    rest = world_size * (batch_size - 1)
    if deal.tail == "drop":
        while True:
            rows = list(itertools.islice(samples, rank, rest, world_size)) if rest else []
            last = list(itertools.islice(samples, world_size))
            if len(last) < world_size:
                return
            rows.append(last[rank])
            yield rows[0] if deal.ready else rows
    ahead = list(itertools.islice(samples, world_size))
    if 0 < len(ahead) < world_size:
        raise DataError(
            f"every rank must get at least one row a step, but {len(ahead)} samples are left from {start} on, for"
            f" {world_size} ranks. Use fewer ranks, or leave an incomplete tail out: ff.setup_dataloader(rt, loader,"
            ' tail="drop"); or begin the next epoch: Cursor(seed=cursor.seed, epoch=cursor.epoch + 1).'
        )
    while ahead:
        rows = [ahead[rank]]
        rows += itertools.islice(samples, rank, rest, world_size) if rest else ()
        ahead = list(itertools.islice(samples, world_size))
        if len(ahead) < world_size:
            rows += ahead[rank : rank + 1]
            ahead = []
        yield rows[0] if deal.ready else rows


@contextlib.contextmanager
def _no_worker(inside: bool) -> Generator[None]:
    """Within the block `torch.utils.data.get_worker_info()` is None, so that nobody shares out over workers himself."""
    if not inside:
        yield
        return
    info, torch_worker._worker_info = torch_worker._worker_info, None
    try:
        yield
    finally:
        torch_worker._worker_info = info


def sample_digest(sample: object) -> int:
    """62 bits, not 0: equal for equal samples, in every process. Objects that it does not know count by their type."""
    digest = hashlib.blake2b(digest_size=8)
    for leaf in tree_leaves(sample):
        digest.update(_leaf_bytes(leaf))
    return int.from_bytes(digest.digest(), "little") >> 2 or 1


def _leaf_bytes(leaf: Any) -> bytes:
    if isinstance(leaf, torch.Tensor):
        head = f"{leaf.dtype}{tuple(leaf.shape)}".encode()
        if type(leaf) is torch.Tensor and leaf.layout is torch.strided and leaf.device.type == "cpu":
            row = leaf.detach().resolve_conj().resolve_neg().reshape(-1)[:DIGESTED].contiguous()
            return head + row.view(torch.uint8).numpy().tobytes()
        return head
    if isinstance(leaf, np.ndarray):
        return f"{leaf.dtype}{leaf.shape}".encode() + leaf.reshape(-1)[:DIGESTED].tobytes()
    if isinstance(leaf, int | float | complex | str | bytes):
        return repr(leaf).encode(errors="replace")
    return type(leaf).__qualname__.encode()
