"""A process group that compares every call with the other ranks' before anything travels: `init_runtime(debug=True)`.

[Note: checked group] It stands in front of the real group, as torch's default group, so it sees what DDP, FSDP and the
user send, too. Each call begins with an all_gather of one number, the digest of what must be equal: kind of call,
reduction, root, dtypes and shapes; for the user's own symmetric calls the line, too, since tensors that are alike tell
nothing about their order. When they differ, the ranks exchange descriptions, and all of them raise. Sends and receives,
which concern two ranks, pass through.
"""

import sys
import zlib
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any, cast

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from fabricfn.errors import MismatchError
from fabricfn.watching.explaining import explained
from fabricfn.watching.stacks import short
from fabricfn.watching.watch import SKIPPED, Watch
from fabricfn.world import CPU

Base: Any = dist.ProcessGroup
LONGEST = 400
"""Bytes of a description that travel."""
NAME = "fabricfn_checked"

INPUTS: dict[str, int | None] = {
    **dict.fromkeys(("allreduce", "allreduce_coalesced", "broadcast", "reduce", "scatter", "reduce_scatter"), 0),
    **dict.fromkeys(("reduce_scatter_single", "reduce_scatter_single_coalesced", "_reduce_scatter_base"), 0),
    **dict.fromkeys(("reduce_scatter_tensor_coalesced",), 0),
    **dict.fromkeys(("allgather", "gather", "all_gather_single", "all_gather_single_coalesced"), 1),
    **dict.fromkeys(("_allgather_base", "allgather_into_tensor_coalesced", "allgather_coalesced"), 1),
    **dict.fromkeys(("alltoall", "alltoall_base", "all_to_all_single", "barrier"), None),
}
"""The methods of a group that all ranks call, and which argument holds tensors that are alike on all of them."""
ROOTED = ("broadcast", "reduce", "gather", "scatter", "barrier")
"""Calls that different lines of a program often share: the one of the root, and the others'."""
PASSED = (
    *("send", "recv", "recv_anysource", "abort", "shutdown", "set_timeout", "monitored_barrier"),
    *("_start_coalescing", "_end_coalescing", "_set_sequence_number_for_group", "_get_backend", "_has_hooks"),
)


class CheckedGroup(Base):
    """A process group in front of another one. Its methods bear torch's names, those of older versions too."""

    def __init__(self, inner: Any, device: torch.device) -> None:
        super().__init__(inner.rank(), inner.size())
        self.inner = inner
        kinds = [kind.type for kind in inner._device_types]
        self.device = CPU if "cpu" in kinds else device
        self.watch: Watch | None = None
        self.registered_name = NAME

    @property
    def group_name(self) -> Any:
        """The name under which torch knows this group."""
        return self.registered_name

    @property
    def _device_types(self) -> Any:
        return self.inner._device_types

    def _set_group_name(self, name: str) -> None:
        self.registered_name = name

    def getBackendName(self) -> str:
        """As `torch.distributed.get_backend` shows it."""
        return "checked"  # torch would look for a back end of the known names inside this group

    def compare(self, method: str, args: Sequence[Any]) -> None:
        """Find out whether all ranks make this call; all of them raise if not.

        Raises:
            MismatchError: they do not.
        """
        text = describe(method, args)
        watch = self.watch
        counts = watch is not None and watch.begin(f"torch.distributed: {text}", apart=True)
        try:
            line = user_line()
            compared = f"{text}{line}" if counts and method not in ROOTED else text
            digests = self.gathered(torch.tensor([zlib.crc32(compared.encode())], device=self.device))
            if len({int(digest.item()) for digest in digests}) > 1:
                raise MismatchError(self.disagreement(f"{text}{line}"))
        except RuntimeError as error:
            better = error if watch is None or isinstance(error, MismatchError) else explained(watch, error)
            raise better from None
        finally:
            if watch is not None and counts:
                watch.end()

    def disagreement(self, text: str) -> str:
        """The message, after an exchange of what the ranks do."""
        data = text.encode()[:LONGEST].ljust(LONGEST, b"\0")
        found = self.gathered(torch.frombuffer(bytearray(data), dtype=torch.uint8).to(self.device))
        texts = [bytes(one.cpu().numpy()).rstrip(b"\0").decode("utf-8", "replace") for one in found]
        lines = "".join(f"\n  rank {rank}: {one}" for rank, one in enumerate(texts))
        return (
            "Every rank must make the same collective calls in the same order, with the same shapes and dtypes and,"
            f" under debug=True, at the same line, but (seen on rank {self.rank()}){lines}"
        )

    def gathered(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """Every rank's tensor."""
        rows = [torch.empty_like(tensor) for _ in range(self.size())]
        self.inner.allgather([rows], [tensor]).wait()
        return rows


def _compared(method: str) -> Callable[..., Any]:
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.compare(method, (*args, *kwargs.values()))
        return getattr(self.inner, method)(*args, **kwargs)

    return call


def _passed(method: str) -> Callable[..., Any]:
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return getattr(self.inner, method)(*args, **kwargs)

    return call


for _method in INPUTS:
    setattr(CheckedGroup, _method, _compared(_method))
for _method in PASSED:
    setattr(CheckedGroup, _method, _passed(_method))


def describe(method: str, args: Sequence[Any]) -> str:
    """What must be equal on all ranks about a call."""
    place = INPUTS[method]
    tensors = [] if place is None or place >= len(args) else _tensors(args[place])
    shown = ", ".join(f"{str(t.dtype).removeprefix('torch.')}{list(t.shape)}" for t in tensors[:8])
    more = f", ... {zlib.crc32(str([(t.dtype, t.shape) for t in tensors]).encode()):x}" if len(tensors) > 8 else ""
    options = ""
    for option in args:
        root, op = getattr(option, "rootRank", None), getattr(option, "reduceOp", None)
        options += "" if root is None else f", root {root}"
        options += "" if op is None else f", {str(op.op).rpartition('.')[2]}"
    return f"{method.strip('_')}({shown}{more}{options})"


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    return (
        [tensor for one in cast("list[Any]", value) for tensor in _tensors(one)]
        if isinstance(value, list | tuple)
        else []
    )


def user_line() -> str:
    """The line of the user's code that is running, after " at "."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] in SKIPPED:
        frame = frame.f_back
    return "" if frame is None else f" at {short(frame.f_code.co_filename)}:{frame.f_lineno}"


def check_everything(device: torch.device) -> CheckedGroup:
    """Put a checked group in the place of torch's default group, which exists. Every rank must call it."""
    table: Any = distributed_c10d._world
    inner = cast(Any, dist.group.WORLD)
    group = CheckedGroup(inner, device)
    for name in ("pg_map", "pg_group_ranks", "pg_backend_config", "pg_to_tag"):
        entries = getattr(table, name)
        entries[group] = entries[inner]
    table.pg_names[group] = NAME
    table.tags_to_pg.setdefault(table.pg_to_tag[inner], []).append(group)
    c10d: Any = distributed_c10d  # private, and its names have a type of their own
    c10d._register_process_group(NAME, group)
    c10d._update_default_pg(group)
    return group
