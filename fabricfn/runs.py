"""One run: the models bound, the loss function called inside the strategy, the gradients taken away.

[Note: one run] All of it happens in one call, and nothing that could be bound to other values keeps a graph
afterwards. This is the hot loop: work that set-up could have done has no place here.
"""

from collections.abc import Iterable, Iterator
from types import MappingProxyType
from typing import Any, cast

import torch
from torch import nn

from fabricfn import flat
from fabricfn.binding import acquire, bind_constants, changed_buffers, check_devices, release, transforming
from fabricfn.engine import Frame
from fabricfn.errors import CapabilityError, ConfigurationError, GradientError
from fabricfn.losses import Buffers, Job, Sums, collect, finish
from fabricfn.precision import autocast_of
from fabricfn.random import Key, fold_in, seeded
from fabricfn.records import Grads, Model
from fabricfn.runtimes import Runtime
from fabricfn.tree import tree_flatten, tree_unflatten
from fabricfn.world import World

Microbatch = tuple[tuple[Any, ...], dict[str, Any], bool]
"""Positional arguments, keyword arguments, whether it is the last one."""


def differentiate(
    rt: Runtime, job: Job, models: Any, microbatches: Iterable[Microbatch], rng: tuple[Key, int] | None
) -> tuple[torch.Tensor, list[Any] | None, Any]:
    """(loss, aux of each micro-batch, grads); see [Note: one run].

    Args:
        rng: the key, and the index of this rank's first micro-batch in the global batch.
    """
    if transforming():
        raise CapabilityError(
            "value_and_grad computes gradients by itself and cannot run inside a torch.func transform. Use torch.func"
            ' over ff.apply with strategy="single" or "functional".'
        )
    leaves, spec = ([models], None) if type(models) is Model else flatten_models(models)
    frames: list[Frame] = []
    try:
        for model in leaves:
            frames.append(acquire(model, frozen=False))
        loss, aux, taken = through(rt, job, frames, spec, microbatches, rng)
        changed: list[dict[str, torch.Tensor]] | None = None
        if frames[0].places or (spec is not None and any(frame.places for frame in frames)):
            changed = [changed_buffers(frame, model) for frame, model in zip(frames, leaves, strict=True)]
    finally:
        for frame in frames:
            release(frame)
    if changed is not None and rt.world.group is not None and job.buffers != "local":
        changed = agreed(changed, job.buffers, rt.world)
    grads: list[Grads] = []
    for index, model in enumerate(leaves):
        params = MappingProxyType(dict(zip(frames[index].names, taken[index], strict=True)))
        new_buffers = None if changed is None else changed[index] or None
        grads.append(Grads(params=params, new_buffers=new_buffers, ref=model.ref))
    return loss, aux, grads[0] if spec is None else tree_unflatten(spec, grads)


def through(
    rt: Runtime,
    job: Job,
    frames: list[Frame],
    spec: Any,
    microbatches: Iterable[Microbatch],
    rng: tuple[Key, int] | None,
) -> tuple[torch.Tensor, list[Any] | None, list[list[torch.Tensor | None]]]:
    """Forward and backward of all micro-batches: (loss, aux, gradients), the mean over all of them and all ranks."""
    sums = Sums()
    try:
        for args, kwargs, sync in microbatches:
            if rng is None:
                run_one(rt, job, frames, spec, args, kwargs, sync, sums)
            else:
                with seeded(fold_in(rng[0], rng[1] + sums.count), rt.device):
                    run_one(rt, job, frames, spec, args, kwargs, sync, sums)
        if not sums.count:
            raise ConfigurationError("accumulate got no micro-batch; every rank needs at least one.")
        taken = rt.strategy.gradients(frames, rt.world, allow_unused=job.allow_unused)
        loss, factor = finish(job, sums, rt.world)
    except BaseException:
        for frame in frames:
            abandon(frame)
        raise
    if factor is not None:
        scale(taken, factor)
    return loss, sums.aux, taken


def run_one(
    rt: Runtime,
    job: Job,
    frames: list[Frame],
    spec: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    sync: bool,
    sums: Sums,
) -> None:
    """Forward and backward of one micro-batch."""
    constants: list[Frame] = []
    strategy, loss_fn = rt.strategy, job.loss_fn
    try:
        values = bind_constants(args, constants)
        options = bind_constants(kwargs, constants) if kwargs else kwargs

        def call(*nets: nn.Module) -> Any:
            return loss_fn(nets[0] if spec is None else tree_unflatten(spec, nets), *values, **options)

        if rt.precision.autocast:
            with autocast_of(rt.precision, rt.device):
                result = strategy.forward(frames, call, sync=sync, loss_fn=loss_fn)
        else:
            result = strategy.forward(frames, call, sync=sync, loss_fn=loss_fn)
        loss = collect(job, sums, result)
        if not loss.requires_grad:
            raise GradientError("the loss does not depend on any trainable parameter of the models.")
        strategy.backward(frames, loss)
    except RuntimeError as error:
        check_devices(error, rt.device, args, kwargs)
        raise
    finally:
        for frame in constants:
            release(frame)


def scale(taken: list[list[torch.Tensor | None]], factor: float) -> None:
    """Multiply gradients that nobody else has seen yet, in place."""
    present = [grad for grads in taken for grad in grads if grad is not None]
    if present:
        torch._foreach_mul_(present, factor)  # pyright: ignore[reportPrivateImportUsage]


def agreed(changed: list[dict[str, torch.Tensor]], buffers: Buffers, world: World) -> list[dict[str, torch.Tensor]]:
    """The changed buffers, equal on all ranks: at most one flat collective for each kind."""
    assert world.group is not None
    tensors = [tensor for one in changed for tensor in one.values()]
    averaged = [tensor for tensor in tensors if buffers == "mean" and tensor.is_floating_point()]
    copied = [tensor for tensor in tensors if not (buffers == "mean" and tensor.is_floating_point())]
    means = iter(flat.all_reduce_mean(averaged, world.group) if averaged else ())
    copies = iter(flat.broadcast(copied, 0, world.group) if copied else ())
    return [
        {
            name: next(means if buffers == "mean" and tensor.is_floating_point() else copies)
            for name, tensor in one.items()
        }
        for one in changed
    ]


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


def abandon(frame: Frame) -> None:
    """After an exception: no gradient stays behind, and an engine with state is made again before its next use."""
    for slot in frame.slots:
        slot.grad = None
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


def first_index(count: int, world: World) -> int:
    """The index of this rank's first micro-batch in the global batch: how many the lower ranks have together."""
    if world.group is None:
        return 0
    (counts,) = flat.all_gather([torch.tensor(count, device=world.device)], world.group)
    return int(counts[: world.rank].sum())


def as_args(item: Any) -> tuple[Any, ...]:
    """The arguments of one micro-batch."""
    return tuple(cast("list[Any]", item)) if isinstance(item, (tuple, list)) else (item,)
