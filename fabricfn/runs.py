"""One run: the models bound, the loss function called inside the strategy, the gradients taken away.

[Note: one run] All of it happens in one call, and nothing that could be bound to other values keeps a graph
afterwards. This is the hot loop: work that set-up could have done has no place here.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, cast

import torch

from fabricfn import flat
from fabricfn.binding import acquire, bind_constants, changed_buffers, check_devices, release, transforming
from fabricfn.engine import Call, Frame, separate
from fabricfn.errors import CapabilityError, ConfigurationError, GradientError
from fabricfn.losses import Buffers, Job, Sums, collect, finish
from fabricfn.precision import autocast_of
from fabricfn.random import Key, seeded
from fabricfn.records import Grads, Model
from fabricfn.runtimes import Runtime
from fabricfn.scaling import shared_scale
from fabricfn.sharding import local_of, with_locals
from fabricfn.states import overlap
from fabricfn.tracing import times, tracing
from fabricfn.tree import tree_flatten, tree_unflatten
from fabricfn.world import World

_kernels: Any = torch
"""The functions on lists of tensors have no types."""

Microbatch = tuple[tuple[Any, ...], dict[str, Any], bool]
"""Positional arguments, keyword arguments, whether it is the last one."""


def differentiate(
    rt: Runtime,
    job: Job,
    models: Any,
    microbatches: Iterable[Microbatch],
    rng: tuple[Key, int] | None,
    passes: Callable[..., Any] | None = None,
) -> tuple[torch.Tensor, list[Any] | None, Any]:
    """(loss, aux of each micro-batch, grads); see [Note: one run].

    Args:
        rng: the key, and the index of this rank's first micro-batch in the global batch.
        passes: what to do in place of `through`.
    """
    if transforming():
        raise CapabilityError(
            "value_and_grad computes gradients by itself and cannot run inside a torch.func transform. Use torch.func"
            ' over ff.apply with strategy="single" or "functional".'
        )
    leaves, spec = ([models], None) if type(models) is Model else flatten_models(models)
    frames: list[Frame] = []
    sums, scales = Sums(), None
    if rt.precision.loss_scale is not None:
        sums.scale, scales = shared_scale([model.loss_scale for model in leaves], rt.precision.loss_scale)
    try:
        for model in leaves:
            frames.append(acquire(model, frozen=False))
            for slot in frames[-1].slots:
                if slot.grad is not None:  # a graph that the user kept went back after its run
                    slot.grad = None
        loss, aux, taken = guarded(passes or through, rt, job, frames, spec, microbatches, rng, sums)
        changed: list[dict[str, torch.Tensor]] | None = None
        if [frame for frame in frames if frame.places or frame.absent]:
            changed = [changed_buffers(frame, model) for frame, model in zip(frames, leaves, strict=True)]
    finally:
        for frame in frames:
            release(frame)
    if changed is not None and rt.world.group is not None and job.buffers != "local":
        changed = agreed(changed, [model.buffers for model in leaves], job.buffers, rt.world)
    grads: list[Grads] = []
    for index, model in enumerate(leaves):
        params = MappingProxyType(dict(zip(frames[index].names, taken[index], strict=True)))
        new_buffers = None if changed is None else changed[index] or None
        before = None if scales is None else scales[index]
        grads.append(Grads(params=params, new_buffers=new_buffers, ref=model.ref, loss_scale=before))
    return loss, aux, grads[0] if spec is None else tree_unflatten(spec, grads)


def guarded(passes: Callable[..., Any], rt: Runtime, job: Job, frames: list[Frame], *rest: Any) -> Any:
    """`passes` with gradients on, whatever mode the caller is in; a run that fails leaves whole frames behind."""
    grad_enabled = torch.is_grad_enabled()
    try:
        if not grad_enabled:
            demand_grad()
        return passes(rt, job, frames, *rest)
    except BaseException:
        for frame in frames:
            abandon(frame)
        raise
    finally:
        if not grad_enabled:
            torch.set_grad_enabled(False)


def through(
    rt: Runtime,
    job: Job,
    frames: list[Frame],
    spec: Any,
    microbatches: Iterable[Microbatch],
    rng: tuple[Key, int] | None,
    sums: Sums,
) -> tuple[torch.Tensor, list[Any] | None, list[list[torch.Tensor | None]]]:
    """Forward and backward of all micro-batches: (loss, aux, gradients), the mean over all of them and all ranks."""
    apart = False
    # What the backward pass leaves of a graph lives until the next graph is there, as in a loop by hand. Freed with the
    # last activations it lets the C library return pages that the next forward pass takes again, one by one: some ten
    # thousand faults more a step, 1 to 3 % of its time (a GPT of 10.8 million parameters, 8 micro-batches).
    for args, kwargs, sync in microbatches:
        share = 1 / (sums.count + 1) if sync and sums.count and not job.weighted else 1.0
        if rng is None:
            _before = run_one(rt, job, frames, spec, args, kwargs, sync, share, sums)
        else:
            with seeded(rng[0], rt.device, rng[1] + sums.count):
                _before = run_one(rt, job, frames, spec, args, kwargs, sync, share, sums)
        if not (sync or apart):
            slots = [slot for frame in frames for slot in frame.slots]
            apart = separate(slots) == sum(sum(frame.trainable) for frame in frames)
    if not sums.count:
        raise ConfigurationError("accumulate got no micro-batch; every rank needs at least one.")
    taken = rt.strategy.gradients(frames, rt.world, allow_unused=job.allow_unused)
    loss, factor = finish(job, sums, rt.world)
    if factor is not None:
        taken = scale(taken, factor)
    return loss, sums.aux, taken


def run_one(
    rt: Runtime,
    job: Job,
    frames: list[Frame],
    spec: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    sync: bool,
    share: float,
    sums: Sums,
) -> torch.Tensor:
    """Forward and backward of one micro-batch: its loss, with what the backward pass left of the graph."""
    constants: list[Frame] = []
    strategy, loss_fn = rt.strategy, job.loss_fn
    try:
        values = bind_constants(args, constants)
        options = bind_constants(kwargs, constants) if kwargs else kwargs

        call = Call(loss_fn, spec, len(frames), (values, options), job.weighted, job.has_aux)
        running = [*frames, *constants] if constants else frames

        if rt.precision.autocast:
            with autocast_of(rt.precision, rt.device):
                result = strategy.forward(running, call, sync=sync, loss_fn=loss_fn)
        else:
            result = strategy.forward(running, call, sync=sync, loss_fn=loss_fn)
        loss = collect(job, sums, result)
        if not loss.requires_grad:
            raise GradientError("the loss does not depend on any trainable parameter of the models.")
        strategy.backward(frames, loss, share=share)
        return loss
    except RuntimeError as error:
        check_devices(error, rt.device, args, kwargs)
        raise
    finally:
        for frame in constants:
            release(frame)


def scale(taken: list[list[torch.Tensor | None]], factor: Any) -> list[list[torch.Tensor | None]]:
    """The gradients times a number; in place, unless two parameters' gradients are views of one memory."""
    present = [grad for grads in taken for grad in grads if grad is not None]
    if not present:
        return taken
    parts = [local_of(grad) for grad in present]
    if isinstance(factor, torch.Tensor):  # of a graph, which decides by itself what is in place
        made = [times(part, factor) for part in parts]
    elif overlap(parts) is None:
        _kernels._foreach_mul_(parts, factor)
        return taken
    else:
        made = _kernels._foreach_mul(parts, factor)
    scaled = iter(with_locals(present, made))
    return [[None if grad is None else next(scaled) for grad in grads] for grads in taken]


def agreed(
    changed: list[dict[str, torch.Tensor]], old: Sequence[Mapping[str, torch.Tensor]], buffers: Buffers, world: World
) -> list[dict[str, torch.Tensor]]:
    """The changed buffers, equal on all ranks. Every rank must call it.

    What changed may differ by rank (an expert that one rank used, a batch that left a statistic as it was), so the
    ranks agree on it first; a rank where such a buffer did not change comes with the old one.
    """
    assert world.group is not None
    names = [(index, name) for index, one in enumerate(old) for name in one]
    somewhere = flat.anywhere([name in changed[index] for index, name in names], world.group, world.wire)
    chosen = [place for place, there in zip(names, somewhere, strict=True) if there]
    mine = [changed[index].get(name, old[index][name]) for index, name in chosen]
    averaged = [buffers == "mean" and tensor.is_floating_point() for tensor in mine]
    means = iter(flat.all_reduce_mean([t for t, mean in zip(mine, averaged, strict=True) if mean], world.group))
    copies = iter(flat.broadcast([t for t, mean in zip(mine, averaged, strict=True) if not mean], 0, world.group))
    result: list[dict[str, torch.Tensor]] = [{} for _ in old]
    for (index, name), mean in zip(chosen, averaged, strict=True):
        result[index][name] = next(means if mean else copies)
    return result


def flatten_models(models: Any) -> tuple[list[Model], Any]:
    """The models of a tree and its structure."""
    leaves, spec = tree_flatten(models, lambda node: type(node) is Model)
    strangers = {type(leaf).__name__ for leaf in leaves if type(leaf) is not Model}
    if strangers or not leaves:
        found = ", ".join(sorted(strangers)) or "no leaf at all"
        raise ConfigurationError(
            f"gradients are for the first argument, which must be a Model or a tree of Models; found {found}. Make a"
            " Model of a module with ff.setup_model(rt, module)."
        )
    return leaves, spec


def demand_grad() -> None:
    """Gradients are what the caller wants, whatever mode it is in."""
    if torch.is_inference_mode_enabled():
        raise GradientError("gradients cannot be computed inside torch.inference_mode. Leave it, or use ff.value.")
    torch.set_grad_enabled(True)


def abandon(frame: Frame) -> None:
    """After an exception: no gradient stays behind, and an engine with state is made again before its next use."""
    for slot, trainable in zip(frame.slots, frame.trainable, strict=True):
        slot.grad = None
        slot.requires_grad_(trainable)
    frame.broken = frame.handle is not None


def one_ahead(microbatches: Iterable[Any]) -> Iterator[Microbatch]:
    """(args, kwargs, whether it is the last), reading one item ahead."""
    iterator = iter(microbatches)
    for current in iterator:
        item = current
        for following in iterator:
            yield as_args(item), {}, False
            item = following
        yield as_args(item), {}, True


def counts_of(count: int, world: World) -> list[int]:
    """How many micro-batches each rank has. Every rank must call it."""
    if world.group is None or tracing():  # ranks that run one graph have equally many
        return [count] * world.world_size
    (counts,) = flat.all_gather([torch.tensor(count, device=world.wire)], world.group)
    return cast("list[int]", counts.tolist())


def as_args(item: Any) -> tuple[Any, ...]:
    """The arguments of one micro-batch."""
    return tuple(cast("list[Any]", item)) if isinstance(item, (tuple, list)) else (item,)
