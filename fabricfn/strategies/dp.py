"""Replicas in one process over several devices, as torch's DataParallel: the rows of a batch are scattered, every
replica computes the loss of its rows, and their mean is gathered on the first device. On fewer than two devices it is
`single`.

What touches devices is a `Seam`, so that the meaning can be tested where there is one device only.
"""

import copy
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import nn

from fabricfn.engine import Call, Frame, named_modules
from fabricfn.errors import CapabilityError
from fabricfn.precision import Precision
from fabricfn.strategies.single import single
from fabricfn.strategy import Strategy
from fabricfn.tree import tree_leaves, tree_map
from fabricfn.world import World


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Seam:
    """How values come to other devices and back; autograd goes through both."""

    move: Callable[[torch.Tensor, torch.device], torch.Tensor] = torch.Tensor.to
    """A tensor on a device: parameters and buffers to a replica, rows to a replica, results to the first device."""
    chunk: Callable[[torch.Tensor, int], Sequence[torch.Tensor]] = torch.chunk
    """At most so many parts of the rows of a tensor, in their order."""


def dp(devices: Sequence[str | torch.device] = (), *, seam: Seam = Seam()) -> Strategy:
    """One process, several devices: each computes a part of the rows of every batch.

    The loss function is called once for each replica, with its rows: every tensor in the arguments that has dimensions
    is cut along the first, wherever it is nested; everything else is given to all. The loss is the mean over replicas,
    weighted by their rows, and so are scalars in `aux`; its other tensors are joined. Under `weighted` the sums are
    added. So a loss that is a mean over rows gives what `single` gives, whatever the number of rows. Only the first
    replica's changes of buffers are kept. `apply` and `value` compute on the first device.

    Slower than "ddp", which has a process for each device: use it where there can be one process only.

    Args:
        devices: where the replicas are, the first being the runtime's own device. Fewer than two is `single`. By the
            name "dp", `init_runtime(devices=...)` says which. Dropout on further devices draws from their own
            generators.
        seam: how values come there; for tests.

    Raises:
        ConfigurationError: (from init_runtime) several devices, on a CPU.

    Example:
        >>> dp().name, dp().max_ranks
        ('dp', 1)
    """
    places = tuple(map(torch.device, devices))
    alone = dataclasses.replace(single(), name="dp")
    if len(places) < 2:
        return alone

    def attach(net: nn.Module, world: World, precision: Precision, *, frozen: bool) -> tuple[nn.Module, ...]:
        return tuple(replica(net) for _ in places[1:])

    return dataclasses.replace(
        alone, attach=attach, forward=functools.partial(forward, places, seam), local_gradients=refuse_local
    )


def refuse_local(frames: Sequence[Frame]) -> list[list[torch.Tensor | None]]:
    """The rows of a micro-batch are added up on several devices: other bits for other numbers of them."""
    raise CapabilityError(
        'reduce="canonical" gives the same bits on any number of devices, and dp adds up rows on each. Write'
        ' strategy="ddp", or accumulate(..., reduce="mean").'
    )


def replica(net: nn.Module) -> nn.Module:
    """A copy of the structure of a net, whose parameters come with every run."""
    memo: dict[int, Any] = {}
    for slot in net.parameters():
        memo[id(slot)] = nn.Parameter(torch.empty_like(slot, device="meta"), requires_grad=slot.requires_grad)
    return copy.deepcopy(net, memo)


def forward(
    places: tuple[torch.device, ...],
    seam: Seam,
    frames: Sequence[Frame],
    fn: Callable[..., Any],
    *,
    sync: bool,
    loss_fn: Any,
) -> Any:
    """`fn` of the nets: once, or for a loss function once on every device with a part of the rows."""
    nets = [frame.net for frame in frames]
    if type(fn) is not Call:
        return fn(*nets)
    call = cast("Call", fn)
    parts = scattered(call.values, places, seam)
    results: list[Any] = []
    for index, ((values, _), place) in enumerate(zip(parts, places, strict=False)):
        here = nets if index == 0 else [fill(frame.handle[index - 1], frame.net, place, seam) for frame in frames]
        swapped = exchange(values, {id(net): new for net, new in zip(nets, here, strict=True)})
        results.append(dataclasses.replace(call, values=swapped)(*here))
    rows = [count for _, count in parts]
    return gathered(results, rows, places[0], seam, weighted=call.weighted, has_aux=call.has_aux)


def exchange(values: Any, nets: dict[int, nn.Module]) -> Any:
    """The arguments with nets of this replica in place of constants."""

    def exchanged(leaf: Any) -> Any:
        return nets.get(id(leaf), leaf)

    return tree_map(exchanged, values)


def scattered(values: Any, places: Sequence[torch.device], seam: Seam) -> list[tuple[Any, int]]:
    """For each replica its part of the arguments, and how many rows that is. Never more replicas than rows.

    Raises:
        CapabilityError: the tensors have different numbers of rows.
    """
    tensors = [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor) and leaf.dim() > 0]
    sizes = {tensor.shape[0] for tensor in tensors}
    if len(sizes) > 1:
        raise CapabilityError(
            f"dp cuts every tensor in the arguments along its first dimension, and these have {sorted(sizes)} rows."
            ' Put what is not cut into a closure, or write strategy="ddp".'
        )
    rows = next(iter(sizes), 0)
    if rows < 2:
        return [(values, max(rows, 1))]
    cut = {id(tensor): list(seam.chunk(tensor, min(rows, len(places)))) for tensor in tensors}
    counts = [len(part) for part in cut[id(tensors[0])]]

    def part_of(leaf: Any, index: int) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        part = cut[id(leaf)][index] if leaf.dim() else leaf
        return part if index == 0 else seam.move(part, places[index])

    return [(tree_map(functools.partial(part_of, index=index), values), count) for index, count in enumerate(counts)]


def fill(copied: nn.Module, net: nn.Module, place: torch.device, seam: Seam) -> nn.Module:
    """The replica with the values and the mode of the net. They stay until the next run: the backward pass may look."""
    moved: dict[int, torch.Tensor] = {}

    def there(tensor: torch.Tensor | None) -> torch.Tensor | None:
        if tensor is None:
            return None
        return moved.setdefault(id(tensor), seam.move(tensor, place))

    for (_, mine), (_, theirs) in zip(named_modules(copied), named_modules(net), strict=True):
        held: Any = mine._parameters
        held.update({name: there(slot) for name, slot in theirs._parameters.items()})
        # a copy in any case: what a replica does to buffers is dropped
        buffers = {name: there(buffer) for name, buffer in theirs._buffers.items()}
        mine._buffers.update({name: None if new is None else new.clone() for name, new in buffers.items()})
        mine.training = theirs.training
    return copied


def gathered(
    results: Sequence[Any], rows: Sequence[int], home: torch.device, seam: Seam, *, weighted: bool, has_aux: bool
) -> Any:
    """What one call of the loss function with all rows would have returned."""
    if len(results) == 1:
        return results[0]
    shares = [count / sum(rows) for count in rows]

    def mean(*parts: Any) -> Any:
        return sum(share * moved(part) for share, part in zip(shares, parts, strict=True))

    def moved(part: Any) -> Any:
        return seam.move(part, home) if isinstance(part, torch.Tensor) else part

    def joined(*parts: Any) -> Any:
        first = parts[0]
        if isinstance(first, torch.Tensor) and first.dim():
            return torch.cat([moved(part) for part in parts])
        return mean(*parts) if isinstance(first, float | torch.Tensor) else first

    losses, auxes = [*results], [*results]
    if has_aux:
        losses, auxes = [result[0] for result in results], [result[1] for result in results]
    if weighted:
        loss: Any = tuple(sum(map(moved, column)) for column in zip(*losses, strict=True))
    else:
        loss = mean(*losses)
    return (loss, tree_map(joined, *auxes)) if has_aux else loss
