"""Gradients of several micro-batches in one fixed binary tree: the same bits, however many ranks share the work.

[Note: canonical] The gradients of each micro-batch are computed apart and never meet the strategy's own reduction.
Micro-batch i of the global batch is leaf i of [Note: one tree], whichever rank computes it; loss and weight are summed
in the same tree, in float64; division comes last. What could make a rank's arithmetic depend on its other
micro-batches is kept out: every micro-batch starts from the model's own buffers and has a random key of its own.
"""

import contextlib
import dataclasses
import functools
import operator
from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch

from fabricfn import flat
from fabricfn.engine import Frame, require_all
from fabricfn.errors import CapabilityError, ConfigurationError, GradientError
from fabricfn.ledgers import IMPOSSIBLE, Entry, Ledger, add_leaf, open_ledger
from fabricfn.losses import Buffers, Job, Sums
from fabricfn.random import Key, seeded
from fabricfn.records import Model
from fabricfn.runs import Microbatch, as_args, differentiate, flatten_models, run_one
from fabricfn.runtimes import Runtime
from fabricfn.tracing import tracing
from fabricfn.world import World

MOST = 64
"""The most partial sums of so many micro-batches as fit into memory: twice their logarithm."""


def differentiate_in_tree(
    rt: Runtime, job: Job, models: Any, microbatches: Iterable[Any], rng: Key | None
) -> tuple[torch.Tensor, list[Any] | None, Any]:
    """(loss, aux of this rank's micro-batches, grads); see [Note: canonical]. Every rank must call it."""
    if tracing():
        raise CapabilityError(
            'reduce="canonical" promises bits, which a compiler does not keep. Write reduce="mean" in a compiled step,'
            " or leave the step as it is."
        )
    items = list(microbatches)
    leaves = [models] if type(models) is Model else flatten_models(models)[0]
    passes = functools.partial(through, models=leaves, buffers=job.buffers, count=len(items))
    key = None if rng is None else (rng, rt.rank * len(items))
    apart: list[Microbatch] = [(as_args(item), {}, False) for item in items]
    # the buffers that come out are equal on all ranks already
    return differentiate(rt, dataclasses.replace(job, buffers="local"), models, apart, key, passes)


def through(
    rt: Runtime,
    job: Job,
    frames: list[Frame],
    spec: Any,
    microbatches: Iterable[Microbatch],
    rng: tuple[Key, int] | None,
    scaled: Sums,
    *,
    models: Sequence[Model],
    buffers: Buffers,
    count: int,
) -> tuple[torch.Tensor, list[Any] | None, list[list[torch.Tensor | None]]]:
    """Forward and backward of each micro-batch apart, then the tree: (loss, aux, gradients)."""
    ledger = open_ledger(frames, models, averaged=buffers == "mean", dtype=rt.precision.reduce_dtype)
    for place, (args, kwargs, _) in enumerate(microbatches, rt.rank * count):
        sums = Sums(aux=ledger.aux, scale=scaled.scale)
        with contextlib.nullcontext() if rng is None else seeded(rng[0], rt.device, place):
            run_one(rt, job, frames, spec, args, kwargs, False, 1.0, sums)
        ledger.losses.append(sums.loss)
        ledger.weights.append(sums.weight)
        ledger.aux = sums.aux
        add_leaf(ledger, place, rt.strategy.local_gradients(frames), frames, models)
    loss, taken = settle(rt.world, job, ledger, frames, buffers, count, scaled.scale or 1)
    return loss, ledger.aux, taken


def settle(
    world: World,
    job: Job,
    ledger: Ledger,
    frames: Sequence[Frame],
    buffers: Buffers,
    count: int,
    scale: float,
) -> tuple[torch.Tensor, list[list[torch.Tensor | None]]]:
    """(the loss, the gradients of each frame): means over all micro-batches of all ranks.

    The new buffers are put into the nets. What one rank cannot do all ranks learn first, and all raise the same error.
    """
    marks, loss, weight = told(ledger, world, count)
    number = count * world.world_size
    divisor = weight if job.weighted else float(number)
    refuse(ledger, marks, buffers)
    if divisor == 0:
        raise GradientError("the weights of all ranks sum to zero, so the weighted mean does not exist.")
    chosen = [place for place in range(len(ledger.summed)) if marks[place]]
    taken: list[list[torch.Tensor | None]] = [[None] * len(frame.slots) for frame in frames]
    if not job.allow_unused:
        for place in chosen:
            entry = ledger.summed[place]
            if entry.slot is not None:
                taken[entry.frame][entry.slot] = entry.like
        require_all(frames, taken)
    stack = [(block, [tensors[place] for place in chosen]) for block, tensors in ledger.stack]
    ledger.stack.clear()
    sums = flat.sum_in_tree(stack, count, world.group)
    found = [(ledger.summed[place], value) for place, value in zip(chosen, sums, strict=True)]
    divide([value for entry, value in found if entry.slot is not None], divisor * scale)
    divide([value for entry, value in found if entry.slot is None], number)
    for entry, value in found:
        # the layout too is the same on every world: norms add up in the order of the memory
        mean = value.to(entry.like.dtype).contiguous()
        if entry.slot is not None:
            taken[entry.frame][entry.slot] = mean
        else:
            hang(frames[entry.frame], entry.name, mean)
    for entry, value in zip(*agreed(ledger, marks, world), strict=True):
        hang(frames[entry.frame], entry.name, value)
    dtype = ledger.losses[0].dtype
    return torch.tensor(loss / divisor, dtype=dtype, device=world.device), taken


def divide(values: list[torch.Tensor], number: float) -> None:
    """In place; the memory is ours."""
    if values:
        torch._foreach_div_(values, number)  # pyright: ignore[reportPrivateImportUsage]


def told(ledger: Ledger, world: World, count: int) -> tuple[list[int], float, float]:
    """(marks, loss, weight) of all micro-batches of all ranks, once it is known that the ranks do the same.

    This is the one thing that the ranks tell one another, and it is as long on every rank, so nothing hangs.
    """
    columns = [partial_sums(as_floats(column, world), world.rank * count) for column in (ledger.losses, ledger.weights)]
    if world.group is None:
        check_alike([count], [0], world)
        loss, weight = (flat.fold(column, operator.add) for column in columns)
        return ledger.marks, loss, weight
    threads = torch.get_num_threads() if world.device.type == "cpu" else 0
    values = [value for column in columns for value in ([one for _, one in column] + [0.0] * MOST)[:MOST]]
    row = torch.tensor([count, threads, *ledger.marks, *values], dtype=torch.float64, device=world.wire)
    rows = cast("list[list[float]]", flat.all_gather([row], world.group)[0].tolist())
    check_alike([int(row[0]) for row in rows], [int(row[1]) for row in rows], world)
    end = 2 + len(ledger.marks)
    marks = [int(max(column)) for column in zip(*[row[2:end] for row in rows], strict=True)]
    loss, weight = (total([row[start : start + MOST] for row in rows], count) for start in (end, end + MOST))
    return marks, loss, weight


def partial_sums(numbers: Sequence[float], first: int) -> flat.Stack[float]:
    """The sums of the blocks among the leaves from `first` on."""
    stack: flat.Stack[float] = []
    for place, number in enumerate(numbers, first):
        flat.push(stack, (place, 1), number, operator.add)
    return stack


def total(rows: Sequence[Sequence[float]], count: int) -> float:
    """The end of the tree: `rows` holds the partial sums of each rank."""
    stack: flat.Stack[float] = []
    for rank, row in enumerate(rows):
        for block, number in zip(flat.blocks_of(rank * count, count), row, strict=False):
            flat.push(stack, block, number, operator.add)
    return flat.fold(stack, operator.add)


def check_alike(counts: list[int], threads: list[int], world: World) -> None:
    """Raise `ConfigurationError` unless all ranks have as many micro-batches, and as many threads.

    The number of threads decides in which order torch adds up inside of an operation on the CPU (measured).
    """
    if 0 in counts:
        raise ConfigurationError(
            f"accumulate got no micro-batch; every rank needs at least one, but by rank there are {counts} (rank"
            f" {world.rank}). Use fewer ranks or smaller micro-batches."
        )
    if min(counts) != max(counts):
        raise ConfigurationError(
            f'reduce="canonical" needs the same number of micro-batches on every rank, but by rank there are {counts}'
            f" (rank {world.rank}). Cut the global batch into a number that {world.world_size} divides, and leave out"
            ' the end of an epoch: ff.setup_dataloader(rt, loader, tail="drop").'
        )
    if min(threads) != max(threads):
        raise ConfigurationError(
            'reduce="canonical" needs ranks that compute alike, but they use different numbers of threads, by rank'
            f" {threads} (rank {world.rank}), and torch's sums depend on it. Write torch.set_num_threads(1) on each"
            " rank before the first step; and the same number in every run whose bits are to be the same."
        )


def as_floats(values: Sequence[Any], world: World) -> list[float]:
    """Numbers and scalar tensors as Python floats, waiting for the device once."""
    dtype = torch.float32 if world.device.type == "mps" else torch.float64
    tensors = [value.detach().to(world.device, dtype) for value in values if isinstance(value, torch.Tensor)]
    found = iter(cast("list[float]", torch.stack(tensors).tolist()) if tensors else ())
    return [next(found) if isinstance(value, torch.Tensor) else float(value) for value in values]


def refuse(ledger: Ledger, marks: Sequence[int], buffers: Buffers) -> None:
    """Raise `CapabilityError` for what has no sum, and for buffers that nobody said what to do with."""
    entries = list(zip((*ledger.summed, *ledger.equal), marks, strict=True))
    changed = [entry.name for entry, mark in entries if mark and entry.slot is None]
    if changed and buffers != "mean":
        raise CapabilityError(
            f'reduce="canonical" gives the same bits on any number of ranks, but the forward pass changed the buffers'
            f" {shown(changed)}, and buffers={buffers!r} takes what one rank makes of them in the order of its own"
            ' micro-batches. Write accumulate(..., reduce="canonical", buffers="mean"), where every micro-batch starts'
            " from the model's buffers and their mean comes out; or use GroupNorm or LayerNorm; or ff.eval_mode(model)."
        )
    if sparse := [entry.name for entry, mark in entries if mark >= IMPOSSIBLE and entry.slot is not None]:
        raise CapabilityError(
            f'reduce="canonical" adds up dense gradients, but those of {shown(sparse)} are sparse. Build the module'
            ' with sparse=False, or write accumulate(..., reduce="mean").'
        )
    if different := [entry.name for entry, mark in entries if mark >= IMPOSSIBLE]:
        raise unequal(different)


def unequal(names: Sequence[str]) -> CapabilityError:
    """The error for buffers without a mean that the micro-batches changed in different ways."""
    return CapabilityError(
        f"the buffers {shown(names)} hold no floating numbers, so they have no mean, and the micro-batches changed them"
        ' in different ways. Under reduce="canonical" they must come out equal from every micro-batch: count outside'
        " of the loss function, or register them with persistent=False."
    )


def shown(names: Sequence[str]) -> str:
    """The first few names."""
    return f"{', '.join(names[:8])}{', ...' if names[8:] else ''}"


def agreed(ledger: Ledger, marks: Sequence[int], world: World) -> tuple[list[Entry], list[torch.Tensor]]:
    """The changed buffers that have no mean, once they are known to be equal on all ranks."""
    chosen = [index for index in range(len(ledger.equal)) if marks[len(ledger.summed) + index]]
    entries = [ledger.equal[index] for index in chosen]
    values = [ledger.values[index] for index in chosen]
    rows = flat.all_gather(values, world.group)
    same = [torch.equal(of_ranks, of_ranks[:1].expand_as(of_ranks)) for of_ranks in rows]
    if different := [entry.name for entry, one in zip(entries, same, strict=True) if not one]:
        raise unequal(different)
    return entries, values


def hang(frame: Frame, name: str, value: torch.Tensor) -> None:
    """Put a buffer into the net, where the end of the run finds it."""
    for buffers, key in frame.places[name]:
        buffers[key] = value
