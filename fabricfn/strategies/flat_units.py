"""Units: parts of a net that are gathered by one message a dtype, and whose gradients leave in one.

[Note: flat units] A unit has one stretch of memory, of which its whole parameters are views. While it is not gathered
the stretch has no bytes and its modules hold the DTensors of the record, as under `fully_shard`. On the wire a rank's
parts lie side by side, so gathering copies twice; what that costs is less than what torch's bookkeeping does.
Gradients are exchanged, row r to rank r, and added up here in the order of the ranks: gloo's own reduce-scatter takes
three times as long as its all-to-all.

[Note: even versions] Autograd takes note of the version of what it saves. The memory of a line has an even version
while it is gathered, the same one throughout a run, and the odd one after it at other times. So a backward pass that
comes to a weight that is not there, or that belongs to another run, is torch's error and no read of memory that is
gone. (Printing such a weight is one, and ends the process: the records here have no `repr`.)
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

from fabricfn.engine import named_modules
from fabricfn.errors import CapabilityError
from fabricfn.flat.wire import COMBINE, divide, exchange_into, gather_in_place
from fabricfn.sharding import REACHED, with_local

_kernels: Any = torch
"""The functions on lists of tensors have no types."""
set_version = _kernels._C._autograd._unsafe_set_version_counter


@dataclasses.dataclass(slots=True, eq=False, repr=False)
class Part:
    """A parameter that is cut along its first dimension."""

    slot: Any
    """The DTensor that stands in the net while the unit is not gathered."""
    whole: nn.Parameter
    """What stands there meanwhile; without memory at other times."""
    places: list[tuple[dict[str, Any], str]]
    """Where it hangs in the net."""
    width: int
    """How many numbers a rank brings, the padding of uneven parts included."""
    reached: bool = False
    """Whether this rank's backward passes have come to it."""

    def reach(self) -> None:
        """Take note of a gradient that comes by another way than its unit's."""
        self.reached = True

    @property
    def local(self) -> torch.Tensor:
        """The part of the record's value that this rank holds."""
        return self.slot._local_tensor


@dataclasses.dataclass(slots=True, eq=False, repr=False)
class Line:
    """The parameters of a unit that have one dtype."""

    parts: list[Part]
    memory: torch.Tensor
    """Of the whole parameters, one after the other; no bytes while they are not gathered."""
    rows: list[torch.Tensor]
    """The same memory, for each parameter [ranks, width]."""
    version: int = 0
    """Of the memory, while it is gathered. See [Note: even versions]."""
    pieces: list[torch.Tensor] = dataclasses.field(default_factory=list[torch.Tensor])
    """What this rank brings: its parts, and the padding between them."""
    wire: torch.Tensor | None = None
    """[ranks, numbers], on the way."""
    sent: tuple[torch.Tensor, torch.Tensor] | None = None
    """The ranks' gradients as they come, and as this rank's leave, of the parameters that are trained."""

    @property
    def trained(self) -> list[Part]:
        """Those with gradients."""
        return [part for part in self.parts if part.whole.requires_grad]


@dataclasses.dataclass(slots=True, eq=False, repr=False)
class Unit:
    """What is gathered together."""

    lines: list[Line]
    group: dist.ProcessGroup
    there: bool = False
    """Whether it is gathered."""
    coming: list[Any] | None = None
    """The messages that gather it, while they are on the way."""
    leaving: list[Any] | None = None
    """The messages with its gradients, while they are on the way."""
    left: bool = False
    """Whether its gradients have left in this pass."""
    calls: int = 0
    """How many of the loss function's calls the backward pass has yet to leave."""
    active: int = 0
    """How many calls the backward pass is in."""
    inside: int = 0
    """How many calls the forward pass is in."""

    @property
    def parts(self) -> Iterator[Part]:
        """All of them."""
        return (part for line in self.lines for part in line.parts)


def make_unit(slots: Sequence[nn.Parameter], net: nn.Module, mesh: Any, device: torch.device, low: Any) -> Unit:
    """Cut these parameters, which may have no values yet; the net holds DTensors in their place.

    Args:
        low: the dtype in which floats are gathered; None is their own.
    """
    group, size = mesh.get_group(), mesh.size()
    ids = {id(slot) for slot in slots}
    places: dict[int, list[tuple[dict[str, Any], str]]] = {}
    for _, module in named_modules(net):
        for name, slot in module._parameters.items():
            if id(slot) in ids:
                places.setdefault(id(slot), []).append((module._parameters, name))
    lines: list[Line] = []
    for dtype in dict.fromkeys(slot.dtype for slot in slots):
        mine = [slot for slot in slots if slot.dtype is dtype]
        widths = [-(-slot.shape[0] // size) * slot.shape[1:].numel() for slot in mine]
        wire = low if low is not None and dtype.is_floating_point else dtype
        memory = torch.empty(size * sum(widths), dtype=wire, device=device)
        stretches: Sequence[torch.Tensor] = _kernels.split(memory, [size * width for width in widths])
        parts: list[Part] = []
        for slot, width, stretch in zip(mine, widths, stretches, strict=True):
            whole = nn.Parameter(stretch[: slot.numel()].view(slot.shape), slot.requires_grad)
            parts.append(Part(cut_slot(slot, mesh, device), whole, places[id(slot)], width))
            setattr(parts[-1].slot, REACHED, parts[-1].reach)
        rows = [stretch.view(size, width) for stretch, width in zip(stretches, widths, strict=True)]
        lines.append(Line(parts, memory, rows))
    unit = Unit(lines, group, there=True)
    let_go(unit)
    return unit


def cut_slot(slot: nn.Parameter, mesh: Any, device: torch.device) -> nn.Parameter:
    """A parameter of the same kind, of which this rank holds a part."""
    meta = TensorMeta(slot.shape, torch.empty(slot.shape, device="meta").stride(), slot.dtype)
    local = torch.empty_like(rows_of(slot, mesh), device=device, memory_format=torch.contiguous_format)
    # made so, and not by `DTensor.from_local` and `nn.Parameter`, for these import torch's compiler (0.5 s)
    made: Any = DTensor.__new__(
        DTensor, local, DTensorSpec(mesh, (Shard(0),), tensor_meta=meta), requires_grad=slot.requires_grad
    )
    made._is_param = True
    return made


def rows_of(whole: torch.Tensor, mesh: Any) -> torch.Tensor:
    """The rows of this rank."""
    count = -(-whole.shape[0] // mesh.size())
    return whole.detach()[count * mesh.get_local_rank() :][:count]


def look(unit: Unit) -> bool:
    """After its slots got other parts: these are what the unit brings; whether some had to be copied."""
    copied = False
    for line in unit.lines:
        line.pieces.clear()
        for part in line.parts:
            copied |= not part.local.is_contiguous()
            line.pieces.append(part.local.reshape(-1))
            if missing := part.width - part.local.numel():
                line.pieces.append(part.local.new_zeros(missing))
    return copied


@torch.no_grad()
def start(unit: Unit) -> None:
    """Begin to gather."""
    if unit.there or unit.coming is not None:
        return
    unit.coming = []
    size, me = unit.group.size(), unit.group.rank()
    for line in unit.lines:
        line.wire = line.memory.new_empty((size, line.memory.numel() // size))
        torch.cat(line.pieces, out=line.wire[me])
        unit.coming.append(gather_in_place(line.wire, unit.group))


@torch.no_grad()
def need(unit: Unit) -> None:
    """Have the whole parameters in the net."""
    if unit.there:
        return
    start(unit)
    wait(unit.coming)
    for line in unit.lines:
        line.memory.untyped_storage().resize_(line.memory.nbytes)
        _kernels.split_with_sizes_copy(line.wire, [part.width for part in line.parts], dim=1, out=line.rows)
        set_version((line.memory,), (line.version,))
        line.wire = None
    unit.coming, unit.there = None, True
    for part in unit.parts:
        for place, name in part.places:
            place[name] = part.whole


def let_go(unit: Unit) -> None:
    """Give the memory of the whole parameters back; a message on the way is waited for."""
    if unit.coming is not None:
        wait(unit.coming)
        unit.coming = None
        for line in unit.lines:
            line.wire = None
    if unit.there:
        unit.there = False
        for line in unit.lines:
            line.memory.untyped_storage().resize_(0)
            set_version((line.memory,), (line.version + 1,))
        for part in unit.parts:
            for place, name in part.places:
                place[name] = part.slot


def end(unit: Unit) -> None:
    """The end of a run: nothing stays gathered, and graphs over it fail from now on."""
    let_go(unit)
    for line in unit.lines:
        line.version += 2


@torch.no_grad()
def send(unit: Unit, dtype: torch.dtype | None) -> None:
    """Let the gradients leave, zeros where there is none, in this dtype; None is the parameters' own.

    Nothing is sent where all is frozen.
    """
    unit.leaving, unit.left = [], True
    for line in unit.lines:
        if not (trained := line.trained):
            continue
        grads: list[torch.Tensor] = []
        for part in trained:
            grad, part.whole.grad = part.whole.grad, None
            part.reached |= grad is not None
            grads.append(line.memory.new_zeros(part.slot.shape) if grad is None else grad)
        if any(grad.layout is not torch.strided for grad in grads):
            raise CapabilityError(
                'strategy="flat_sharded" sends dense gradients alone, and one is sparse. Write strategy="ddp".'
            )
        size = unit.group.size()
        rows = grads[0].new_empty((size, sum(part.width for part in trained)))
        _kernels._chunk_cat(grads, 0, size, out=rows)
        rows = rows.to(dtype or trained[0].slot.dtype)
        divide(rows, unit.group, "mean", early=True)
        received = torch.empty_like(rows)
        line.sent = received, rows
        unit.leaving.append(exchange_into(received, rows, unit.group))


@torch.no_grad()
def arrived(unit: Unit) -> None:
    """Give the slots their gradients, the means over the ranks, as soon as these are there."""
    assert unit.leaving is not None
    wait(unit.leaving)
    unit.leaving = None
    for line in unit.lines:
        if line.sent is None:
            continue
        received, line.sent = line.sent[0], None
        mean = torch.add(*received) if len(received) == 2 else COMBINE["sum"](received)
        divide(mean, unit.group, "mean", early=False)
        trained = line.trained
        mean, begin = mean.to(trained[0].slot.dtype), 0
        for part in trained:
            local = mean[begin : begin + part.local.numel()].view(part.local.shape)
            begin += part.width
            if part.slot.grad is not None:  # of a weight that was gathered by `unsharded`
                local.add_(part.slot.grad._local_tensor)
            part.slot.grad = with_local(part.slot, local)


def clear(unit: Unit) -> None:
    """Ready for a run: nothing gathered, on the way, or left behind by one that failed."""
    let_go(unit)
    if unit.leaving is not None:
        wait(unit.leaving)
    unit.leaving, unit.left = None, False
    unit.calls = unit.active = unit.inside = 0
    for line in unit.lines:
        line.sent = None


def wait(works: Sequence[Any] | None) -> None:
    """Wait for messages; None is an empty one."""
    for work in works or ():
        if work is not None:
            work.wait()
