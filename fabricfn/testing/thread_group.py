"""A process group whose ranks are threads of this process: every collective is a meeting, see [Note: meetings].

Like gloo, it writes into tensors without touching their version counters.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch._C import _distributed_c10d
from torch.distributed import ReduceOp
from torch.futures import Future

from fabricfn.testing.hub import Hub, Payloads, Tensors, describe

c10d: Any = _distributed_c10d
Base: Any = dist.ProcessGroup

REDUCTIONS: dict[Any, Callable[[torch.Tensor], torch.Tensor]] = {
    ReduceOp.SUM: lambda stack: stack.sum(0, dtype=stack.dtype),
    ReduceOp.AVG: lambda stack: stack.mean(0, dtype=stack.dtype),
    ReduceOp.PRODUCT: lambda stack: stack.prod(0, dtype=stack.dtype),
    ReduceOp.MIN: lambda stack: stack.amin(0),
    ReduceOp.MAX: lambda stack: stack.amax(0),
}
BITWISE = {ReduceOp.BAND: torch.bitwise_and, ReduceOp.BOR: torch.bitwise_or, ReduceOp.BXOR: torch.bitwise_xor}


def reduce_into(outs: Tensors, op: Any, inputs: Tensors) -> None:
    """The reduction of `inputs`, in the order of the ranks, written into every tensor of `outs`."""
    if op in BITWISE:
        result = inputs[0].detach()
        for other in inputs[1:]:
            result = BITWISE[op](result, other)
    else:
        result = REDUCTIONS[op](torch.stack([tensor.detach() for tensor in inputs]))
    for out in outs:
        out.data.copy_(result)


def completed(result: list[torch.Tensor]) -> dist.Work:
    """The work of a call that is done already."""
    future: Future[list[torch.Tensor]] = Future()
    future.set_result(result)
    return c10d._create_work_from_future(future)


class Receiving(dist.Work):
    """A receive that has been posted: the waiting is done in `wait`, as send and recv may be posted in any order."""

    def __init__(self, finish: Callable[[], None]) -> None:
        super().__init__()
        self.finish: Callable[[], None] | None = finish

    def wait(self, timeout: Any = None) -> bool:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Block until the message is in its tensor."""
        if self.finish is not None:
            finish, self.finish = self.finish, None
            finish()
        return True


class ThreadGroup(Base):
    """The ranks `members` of a hub as a torch process group. torch's names of the methods, those of 2.9 too."""

    def __init__(self, hub: Hub, key: Any, rank: int, members: Sequence[int]) -> None:
        super().__init__(rank, len(members))
        self.hub, self.key, self.members = hub, key, tuple(members)
        self.place = rank
        self.registered_name = ""

    @property
    def group_name(self) -> Any:
        """The name under which torch knows this group."""
        return self.registered_name

    def _set_group_name(self, name: str) -> None:
        self.registered_name = name

    def getBackendName(self) -> str:
        """As `torch.distributed.get_backend` shows it."""
        return "threads"

    def _meet(self, call: tuple[Any, ...], payload: Any, work: Callable[[Payloads], None]) -> None:
        self.hub.meet(self.members[self.place], self.key, self.members, call, payload, work)

    def allreduce(self, tensors: Tensors, opts: Any = None) -> dist.Work:
        """Every tensor becomes its reduction over the ranks."""
        op = ReduceOp.SUM if opts is None else opts.reduceOp.op

        def work(payloads: Payloads) -> None:
            for row in zip(*payloads, strict=True):
                reduce_into(row, op, row)

        self._meet(("all_reduce", _name(op), describe(tensors)), tensors, work)
        return completed(list(tensors))

    allreduce_coalesced = allreduce

    def barrier(self, opts: Any = None) -> dist.Work:
        """All ranks come before any leaves."""
        self._meet(("barrier",), None, lambda payloads: None)
        return completed([])

    def broadcast(self, tensors: Tensors, opts: Any) -> dist.Work:
        """Every tensor becomes the root's."""
        root = opts.rootRank

        def work(payloads: Payloads) -> None:
            for row in zip(*payloads, strict=True):
                for tensor in row:
                    if tensor is not row[root]:
                        tensor.data.copy_(row[root])

        self._meet(("broadcast", f"from {root}", describe(tensors)), tensors, work)
        return completed(list(tensors))

    def reduce(self, tensors: Tensors, opts: Any) -> dist.Work:
        """The root's tensors become the reduction over the ranks."""

        def work(payloads: Payloads) -> None:
            for row in zip(*payloads, strict=True):
                reduce_into([row[opts.rootRank]], opts.reduceOp.op, row)

        self._meet(("reduce", _name(opts.reduceOp.op), f"to {opts.rootRank}", describe(tensors)), tensors, work)
        return completed(list(tensors))

    def allgather(self, outs: Sequence[Tensors], inputs: Tensors, opts: Any = None) -> dist.Work:
        """`outs[i][r]` becomes rank r's `inputs[i]`."""

        def work(payloads: Payloads) -> None:
            for rank_outs, _ in payloads:
                for i, row in enumerate(rank_outs):
                    for out, (_, sent) in zip(row, payloads, strict=True):
                        out.data.copy_(sent[i].detach().view_as(out))

        self._meet(("all_gather", describe(inputs)), (outs, inputs), work)
        return completed([tensor for row in outs for tensor in row])

    def all_gather_single(self, out: torch.Tensor, tensor: torch.Tensor, opts: Any = None) -> dist.Work:
        """`out` becomes the ranks' tensors, one after the other."""
        return self.allgather([out.detach().view(-1).tensor_split(self.size())], [tensor.detach().reshape(-1)])

    def all_gather_single_coalesced(self, outs: Tensors, inputs: Tensors, opts: Any = None) -> dist.Work:
        """`all_gather_single` of each pair."""
        flat = [tensor.detach().reshape(-1) for tensor in inputs]
        return self.allgather([out.detach().view(-1).tensor_split(self.size()) for out in outs], flat)

    def gather(self, outs: Sequence[Tensors], inputs: Tensors, opts: Any) -> dist.Work:
        """On the root, `outs[0][r]` becomes rank r's tensor."""

        def work(payloads: Payloads) -> None:
            for out, (_, sent) in zip(payloads[opts.rootRank][0][0], payloads, strict=True):
                out.data.copy_(sent[0])

        self._meet(("gather", f"to {opts.rootRank}", describe(inputs)), (outs, inputs), work)
        return completed([])

    def scatter(self, outs: Tensors, inputs: Sequence[Tensors], opts: Any) -> dist.Work:
        """Rank r's tensor becomes the root's `inputs[0][r]`."""

        def work(payloads: Payloads) -> None:
            for (rank_outs, _), sent in zip(payloads, payloads[opts.rootRank][1][0], strict=True):
                rank_outs[0].data.copy_(sent)

        self._meet(("scatter", f"from {opts.rootRank}", describe(outs)), (outs, inputs), work)
        return completed(list(outs))

    def reduce_scatter(self, outs: Tensors, inputs: Sequence[Tensors], opts: Any = None) -> dist.Work:
        """Rank r's `outs[i]` becomes the reduction of the ranks' `inputs[i][r]`."""
        op = ReduceOp.SUM if opts is None else opts.reduceOp.op

        def work(payloads: Payloads) -> None:
            for r, (rank_outs, _) in enumerate(payloads):
                for i, out in enumerate(rank_outs):
                    reduce_into([out], op, [sent[i][r].view_as(out) for _, sent in payloads])

        self._meet(("reduce_scatter", _name(op), describe(outs)), (outs, inputs), work)
        return completed(list(outs))

    def reduce_scatter_single(self, out: torch.Tensor, tensor: torch.Tensor, opts: Any = None) -> dist.Work:
        """`out` becomes this rank's part of the reduction."""
        return self.reduce_scatter([out], [tensor.detach().reshape(-1).tensor_split(self.size())], opts)

    def reduce_scatter_single_coalesced(self, outs: Tensors, inputs: Tensors, opts: Any = None) -> dist.Work:
        """`reduce_scatter_single` of each pair."""
        return self.reduce_scatter(
            outs, [tensor.detach().reshape(-1).tensor_split(self.size()) for tensor in inputs], opts
        )

    def alltoall(self, outs: Tensors, inputs: Tensors, opts: Any = None) -> dist.Work:
        """Rank r's `outs[s]` becomes rank s's `inputs[r]`."""

        def work(payloads: Payloads) -> None:
            for r, (rank_outs, _) in enumerate(payloads):
                for out, (_, sent) in zip(rank_outs, payloads, strict=True):
                    out.data.copy_(sent[r])

        self._meet(("all_to_all", str(inputs[0].dtype)), (outs, inputs), work)
        return completed(list(outs))

    def all_to_all_single(
        self, out: torch.Tensor, tensor: torch.Tensor, out_splits: Any, in_splits: Any, opts: Any = None
    ) -> dist.Work:
        """Part s of `out` becomes part r of rank s's tensor, r being this rank; parts are cuts of the first dim."""
        cut: Any = torch.split
        outs = cut(out.detach(), list(out_splits) or out.shape[0] // self.size())
        return self.alltoall(outs, cut(tensor.detach(), list(in_splits) or tensor.shape[0] // self.size()))

    def send(self, tensors: Tensors, dst: int, tag: int = 0) -> dist.Work:
        """Leave the tensor for `dst`; never blocks."""
        key = (self.key, self.members[self.place], self.members[dst], tag)
        self.hub.send(key, self.members[dst], tensors[0])
        return completed([])

    def recv(self, tensors: Tensors, src: int, tag: int = 0) -> dist.Work:
        """Take what `src` left; `wait` blocks until it has come."""
        rank = self.members[self.place]
        key = (self.key, self.members[src], rank, tag)
        return Receiving(lambda: self.hub.receive(rank, key, tensors[0]))

    _allgather_base = all_gather_single
    allgather_into_tensor_coalesced = all_gather_single_coalesced
    _reduce_scatter_base = reduce_scatter_single
    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced
    alltoall_base = all_to_all_single


def _name(op: Any) -> str:
    return str(op).rpartition(".")[2].lower()
