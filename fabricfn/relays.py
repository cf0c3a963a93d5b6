"""One run through the stages of a pipeline: the batch cut up, sent through, and what came of it told to all ranks."""

import contextlib
import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, cast

import torch

from fabricfn import flat
from fabricfn.collectives import broadcast
from fabricfn.collectives.agreement import Parcel, agree, attempt, take_apart
from fabricfn.collectives.groups import device_for_words, members_of
from fabricfn.engine import Frame
from fabricfn.errors import DataError, GradientError, MismatchError
from fabricfn.losses import Job, Sums, collect
from fabricfn.meshes import world_along
from fabricfn.precision import autocast_of, cast_floating
from fabricfn.random import Key, fold_in, seeded
from fabricfn.records import Grads, Model
from fabricfn.replicas import check_replicas
from fabricfn.runtimes import Runtime
from fabricfn.strategies.pipeline_parallel import Pipe, prepare, reached
from fabricfn.strategies.pipeline_schedules import (
    Route,
    Run,
    check_schedule,
    check_sent,
    drive,
    flow_of,
    route_for,
    sent_by,
)
from fabricfn.strategies.pipeline_stages import as_tuple
from fabricfn.tree import tree_map
from fabricfn.world import World


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a pipeline was asked for, apart from the loss."""

    call: str
    """As messages name it; equal on all ranks."""
    schedule: str
    num_microbatches: int
    backward: bool


def line_of(rt: Runtime) -> World:
    """The place of this process among the ranks of its pipeline."""
    return rt.world if rt.world.mesh is None else world_along(rt.world, "pp")


def send_through(
    rt: Runtime,
    job: Job,
    frame: Frame,
    batch: tuple[Any, Any],
    rng: tuple[Key, int] | None,
    sums: Sums,
    *,
    plan: Plan,
    compare: bool,
) -> None:
    """All micro-batches through all stages; what the last one found out gets into `sums` on every rank."""
    line, parcel, pipe = line_of(rt), take_apart(batch), frame.handle
    members, before = members_of(line, None), pipe.schedule
    route, problem = attempt(ready, rt, frame, batch, parcel, plan)
    # a new schedule begins with messages of its own
    agree(line, members, plan.call if pipe.schedule is before else f"{plan.call}, a new schedule", parcel, problem)
    if compare:
        check_batch(rt, line, batch)
    run = runner(rt, job, frame, cut_rows(batch, plan.num_microbatches), rng, sums, route, backward=plan.backward)
    if plan.backward:
        prepare(frame)
    if route is None:
        alone(pipe, plan, run)
    else:
        drive(route, plan.num_microbatches, run, backward=plan.backward)
    agree(line, members, plan.call, take_apart(()), missing(frame) if plan.backward else None)
    if line.group is not None:
        last = line.rank == line.world_size - 1
        found = (sums.loss, sums.weight, sums.aux) if last else None
        sums.loss, sums.weight, sums.aux = broadcast(rt, found, src=line.world_size - 1, axis="pp")
        sums.count = plan.num_microbatches


def ready(rt: Runtime, frame: Frame, batch: tuple[Any, Any], parcel: Parcel, plan: Plan) -> Route | None:
    """The schedule for such a batch; None on one rank, which needs none.

    Raises:
        DataError: the batch cannot be cut.
        ConfigurationError: the schedule cannot run.
        ModelError: what travels between stages cannot.
    """
    pipe: Pipe = frame.handle
    check_rows(parcel, plan.num_microbatches)
    if pipe.group is None:
        return None
    check_schedule(plan.schedule, plan.num_microbatches, len(pipe.stages), pipe.group.size())
    key = (plan, parcel.spec, parcel.texts, frame.training)
    if pipe.schedule is None or pipe.schedule[0] != key:
        inputs = as_tuple(cut_rows(batch[0], plan.num_microbatches)[0])
        with autocast_of(rt.precision, rt.device):
            flow = flow_of(frame, entering(rt, inputs), rt.device)
        made = route_for(frame, plan.schedule, plan.num_microbatches, flow, rt.device)
        pipe.schedule = (key, made)
    return pipe.schedule[1]


def check_rows(parcel: Parcel, num_microbatches: int) -> None:
    """Raise `DataError` unless all leaves are tensors with one first dimension, which can be cut."""
    rows = {leaf.shape[0] if isinstance(leaf, torch.Tensor) and leaf.dim() else 0 for leaf in parcel.leaves}
    if len(rows) != 1 or 0 in rows or max(rows) % num_microbatches:
        shown = [f"{name} is {text}" for name, text in zip(parcel.names(), parcel.texts, strict=True)]
        raise DataError(
            f"a pipeline cuts a batch into num_microbatches={num_microbatches} equal parts along the first dimension of"
            f" its tensors, all of one length; of (inputs, target) {', '.join(shown[:8]) or 'no leaf is a tensor'}."
            ' Choose a divisor, and leave the tail of an epoch out: ff.setup_dataloader(rt, loader, tail="drop").'
        )


def cut_rows(tree: Any, num_parts: int) -> list[Any]:
    """The tree's tensors cut along their first dimension."""

    def part(index: int, leaf: torch.Tensor) -> torch.Tensor:
        size = leaf.shape[0] // num_parts
        return leaf[index * size : (index + 1) * size]

    return [tree_map(functools.partial(part, index), tree) for index in range(num_parts)]


def check_batch(rt: Runtime, line: World, batch: tuple[Any, Any]) -> None:
    """Raise `MismatchError` unless the ranks of a pipeline have got the same batch."""
    try:
        check_replicas(dataclasses.replace(rt, world=line), batch)
    except MismatchError as error:
        raise MismatchError(
            "the ranks of one pipeline work on one batch: the first one takes its inputs, the last one its target. Take"
            " it from ff.batches(rt, loader), which gives ranks with the same rt.rank the same; draw random numbers"
            f" from a key. {error}"
        ) from error


def entering(rt: Runtime, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """The inputs in the dtype of the arithmetic, as where a whole net is entered."""
    return inputs if rt.precision.autocast else cast_floating(inputs, rt.precision.compute_dtype)


def runner(
    rt: Runtime,
    job: Job,
    frame: Frame,
    parts: list[tuple[Any, Any]],
    rng: tuple[Key, int] | None,
    sums: Sums,
    route: Route | None,
    *,
    backward: bool,
) -> Run:
    """What one stage computes for one micro-batch."""
    pipe: Pipe = frame.handle
    precision = rt.precision

    def compute(stage: int, index: int, received: tuple[torch.Tensor, ...]) -> Any:
        inputs, target = parts[index]
        values = received if stage else entering(rt, as_tuple(inputs))
        output = pipe.stages[stage](frame.net, *values)
        if stage < len(pipe.stages) - 1:
            sent = tuple(value.contiguous() for value in sent_by(stage, output))  # nothing else can travel
            if route is not None:
                check_sent(stage, index, sent, route.flow)
            return sent
        if precision.output_dtype is not None and not precision.autocast:
            output = cast_floating(output, precision.output_dtype)
        loss = collect(job, sums, job.loss_fn(output, target))
        if backward and not loss.requires_grad:
            raise GradientError("the loss does not depend on any trainable parameter of the model.")
        return loss if job.weighted else loss / len(parts)

    def run(stage: int, index: int, received: tuple[torch.Tensor, ...]) -> Any:
        seed: Any = contextlib.nullcontext()
        if rng is not None:
            seed = seeded(fold_in(rng[0], rng[1] + index), rt.device, stage)
        with autocast_of(precision, rt.device), seed:
            return compute(stage, index, received)

    return run


def missing(frame: Frame) -> GradientError | None:
    """The error for parameters of this rank's stages that got no gradient."""
    found = zip(frame.names, frame.trainable, reached(frame), strict=True)
    names = [name for name, trainable, grad in found if trainable and grad is None]
    if not names:
        return None
    return GradientError(
        f"{len(names)} parameters got no gradient: {', '.join(names[:8])}{', ...' if names[8:] else ''}. Every"
        " trainable parameter of a stage must take part in what it sends on, or in the loss. Freeze them"
        " (requires_grad_(False) before setup_model), or take them out of the net."
    )


def alone(pipe: Pipe, plan: Plan, run: Run) -> None:
    """The same on one rank, which holds all stages."""
    for index in range(plan.num_microbatches):
        values: Any = ()
        for stage in pipe.here:
            values = run(stage, index, values)
        if plan.backward:
            values.backward()


def spread(line: World, model: Model, grads: Grads) -> Grads:
    """The gradients with the buffers that any stage changed. Every rank of the pipeline must call it."""
    if line.group is None or not model.buffers:
        return grads
    mine: Mapping[str, torch.Tensor] = grads.new_buffers or {}
    names = list(model.buffers)
    flags = torch.tensor([name in mine for name in names], device=device_for_words(line, line.group))
    found: dict[str, torch.Tensor] = {}
    rows = cast("list[list[bool]]", flat.all_gather([flags], line.group)[0].tolist())
    for rank, row in enumerate(rows):
        changed = [name for name, there in zip(names, row, strict=True) if there]
        values = flat.broadcast([mine.get(name, model.buffers[name]) for name in changed], rank, line.group)
        found.update(zip(changed, values, strict=True))
    return dataclasses.replace(grads, new_buffers=found or None)
