"""Gradients: the unit of synchronisation is the user's loss function, whatever it computes with its nets.

[Note: one run] Bind the models, call the loss function inside the strategy's forward, `backward`, take the gradients
away, all in one call. Nothing that could be bound to other values keeps a graph afterwards.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator
from types import MappingProxyType
from typing import Any, Literal, cast

import torch
import torch.distributed as dist

from fabricfn import flat
from fabricfn.binding import acquire, bind_constants, changed_buffers, explain_devices, release, transforming
from fabricfn.engine import Frame
from fabricfn.errors import CapabilityError, ConfigurationError, GradientError
from fabricfn.model import autocast
from fabricfn.random import Key, fold_in, seeded
from fabricfn.records import Grads, Model
from fabricfn.runtimes import Runtime
from fabricfn.tree import tree_flatten, tree_map, tree_unflatten
from fabricfn.world import World

Buffers = Literal["rank0", "mean", "local"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What `value_and_grad` and its siblings were asked for."""

    loss_fn: Callable[..., Any]
    has_aux: bool
    weighted: bool
    allow_unused: bool = False
    buffers: Buffers = "rank0"


@dataclasses.dataclass(slots=True)
class Sums:
    """The results of the micro-batches so far."""

    loss: Any = 0
    weight: Any = 0
    count: int = 0
    aux: list[Any] = dataclasses.field(default_factory=list[Any])


def value_and_grad(
    rt: Runtime,
    loss_fn: Callable[..., Any],
    *,
    has_aux: bool = False,
    weighted: bool = False,
    allow_unused: bool = False,
    buffers: Buffers = "rank0",
) -> Callable[..., tuple[Any, Any]]:
    """A function that computes a loss and its gradients, averaged over all ranks.

    Laws: the models passed in stay as they are; the gradients have the same bits for the same inputs, at arbitrary
    values of the parameters, under every strategy; under `weighted` they are those of one process with all the data.

    Args:
        loss_fn: `loss_fn(net, *args, **kwargs) -> loss`, a scalar tensor. It may call any method of the net, any number
            of times. It receives nets in place of models, in the same tree.
        has_aux: loss_fn returns `(loss, aux)`; aux is any tree, detached, this rank's own.
        weighted: loss_fn returns `(loss_sum, weight)` in place of the loss (with has_aux: `((loss_sum, weight), aux)`).
            Loss and gradients are then those of the sum of all ranks' losses over the sum of their weights.
        allow_unused: parameters that no rank's loss depends on get None instead of an error.
        buffers: how the buffers that a forward pass changed (BatchNorm's statistics) become equal on all ranks:
            "rank0" takes rank 0's, as torch does, "mean" averages the floating ones, "local" leaves them different.

    Returns:
        `grad_fn(models, *args, rng=None, **kwargs) -> (loss, grads)`, or `((loss, aux), grads)` with has_aux. Every
        rank must call it. Gradients are for `models`, one Model or any tree of them, and `grads` has its shape. A Model
        anywhere in the other arguments is a constant: it arrives in loss_fn as a frozen net. `loss` is detached and
        this rank's own mean (the global one under `weighted`). `rng` is the key for dropout; each rank folds in its
        number.

    Raises:
        GradientError: (from grad_fn) the loss is no scalar, or parameters got no gradient.
        DonatedError: (from grad_fn) a model was given away with donate=True.
        CapabilityError: the strategy cannot do it, for instance allow_unused under plain ddp.

    Example:
        >>> import torch, fabricfn as ff
        >>> rt = ff.init_runtime(devices=1, accelerator="cpu")
        >>> model = ff.setup_model(rt, torch.nn.Linear(2, 1))
        >>> grad_fn = ff.value_and_grad(rt, lambda net, x: net(x).square().mean())
        >>> loss, grads = grad_fn(model, torch.ones(4, 2))
        >>> {name: tuple(grad.shape) for name, grad in grads.params.items()}
        {'weight': (1, 2), 'bias': (1,)}
    """
    job = checked(rt, loss_fn, has_aux, weighted, allow_unused, buffers)

    def grad_fn(models: Any, *args: Any, rng: Key | None = None, **kwargs: Any) -> tuple[Any, Any]:
        key = None if rng is None else (rng, rt.rank)
        loss, aux, grads = differentiate(rt, job, models, ((args, kwargs, True),), key)
        return ((loss, aux[0]) if has_aux else loss), grads

    return grad_fn


def accumulate(
    rt: Runtime,
    loss_fn: Callable[..., Any],
    *,
    has_aux: bool = False,
    weighted: bool = False,
    allow_unused: bool = False,
    buffers: Buffers = "rank0",
) -> Callable[..., tuple[Any, Any]]:
    """Like `value_and_grad`, over several micro-batches with one synchronisation at the end.

    Law: k micro-batches give the loss and the gradients of one batch; exactly for unequal sizes with `weighted`, else
    the mean of the micro-batches' means.

    Args:
        loss_fn, has_aux, weighted, allow_unused, buffers: see `value_and_grad`.

    Returns:
        `grad_fn(models, microbatches, rng=None) -> (loss, grads)`; `microbatches` is an iterable, read one ahead, of
        argument tuples (a list, as DataLoader makes it, counts as a tuple; anything else is one argument). Every rank
        must call it; the ranks may have different numbers of micro-batches under `weighted`. With has_aux the aux is
        the list of the micro-batches' aux. With `rng` each micro-batch folds in its index in the global batch.

    Example:
        >>> import torch, fabricfn as ff
        >>> rt = ff.init_runtime(devices=1, accelerator="cpu")
        >>> model = ff.setup_model(rt, torch.nn.Linear(2, 1))
        >>> grad_fn = ff.accumulate(rt, lambda net, x: (net(x).square().sum(), len(x)), weighted=True)
        >>> loss, grads = grad_fn(model, [(torch.ones(4, 2),), (torch.ones(1, 2),)])
    """
    job = checked(rt, loss_fn, has_aux, weighted, allow_unused, buffers)

    def grad_fn(models: Any, microbatches: Iterable[Any], rng: Key | None = None) -> tuple[Any, Any]:
        key = None
        if rng is not None:
            microbatches = list(microbatches)
            key = (rng, rt.rank * len(microbatches))
        loss, aux, grads = differentiate(rt, job, models, one_ahead(microbatches), key)
        return ((loss, aux) if has_aux else loss), grads

    return grad_fn


def value(
    rt: Runtime, loss_fn: Callable[..., Any], *, has_aux: bool = False, weighted: bool = False
) -> Callable[..., Any]:
    """A function that computes a loss without gradients: exact means over all ranks with `weighted`.

    Args:
        loss_fn, has_aux, weighted: see `value_and_grad`. Without `weighted` nothing is communicated.

    Returns:
        `value_fn(models, *args, rng=None, **kwargs) -> loss`, or `(loss, aux)` with has_aux. Changes of buffers are
        dropped. Under `weighted` every rank must call it and gets the same number.

    Example:
        >>> import torch, fabricfn as ff
        >>> rt = ff.init_runtime(devices=1, accelerator="cpu")
        >>> model = ff.setup_model(rt, torch.nn.Linear(2, 1))
        >>> correct = lambda net, x, y: ((net(x).argmax(1) == y).sum(), len(y))
        >>> ff.value(rt, correct, weighted=True)(model, torch.ones(4, 2), torch.tensor([0, 0, 0, 1])).item()
        0.75
    """
    job = checked(rt, loss_fn, has_aux, weighted, False, "local")

    def value_fn(models: Any, *args: Any, rng: Key | None = None, **kwargs: Any) -> Any:
        frames: list[Frame] = []
        sums = Sums()
        try:
            nets, values, options = bind_constants((models, args, kwargs), frames)
            with torch.no_grad(), autocast(rt), seeding(rt, None if rng is None else (rng, rt.rank), 0):
                collect(job, sums, loss_fn(nets, *values, **options))
        except RuntimeError as error:
            explain_devices(error, rt.device, (args, kwargs))
            raise
        finally:
            for frame in frames:
                release(frame)
        loss, _ = finish(job, sums, rt.world)
        return (loss, sums.aux[0]) if has_aux else loss

    return value_fn


def checked(
    rt: Runtime, loss_fn: Callable[..., Any], has_aux: bool, weighted: bool, allow_unused: bool, buffers: Buffers
) -> Job:
    """The job, once the strategy is known to be able to do it."""
    if buffers not in ("rank0", "mean", "local"):
        raise ConfigurationError(f'buffers={buffers!r} is unknown; there are "rank0", "mean" and "local".')
    if allow_unused and rt.world.group is not None:
        rt.strategy.check_unused()
    return Job(loss_fn=loss_fn, has_aux=has_aux, weighted=weighted, allow_unused=allow_unused, buffers=buffers)


def differentiate(
    rt: Runtime,
    job: Job,
    models: Any,
    microbatches: Iterable[tuple[Any, Any, bool]],
    rng: tuple[Key, int] | None,
) -> tuple[Any, list[Any], Any]:
    """(loss, aux of each micro-batch, grads); see [Note: one run]."""
    if transforming():
        raise CapabilityError(
            "value_and_grad computes gradients by itself and cannot run inside a torch.func transform. Use torch.func"
            ' over ff.apply with strategy="single" or "functional".'
        )
    leaves, spec = ([models], None) if type(models) is Model else flatten_models(models)
    frames: list[Frame] = []
    sums = Sums()
    try:
        for model in leaves:
            frames.append(acquire(model, frozen=False))
        try:
            for args, kwargs, sync in microbatches:
                run_one(rt, job, frames, spec, (args, kwargs), sync, rng, sums)
            if not sums.count:
                raise ConfigurationError("accumulate got no micro-batch; every rank needs at least one.")
            taken = rt.strategy.gradients(frames, rt.world, allow_unused=job.allow_unused)
        except BaseException:
            for frame in frames:
                abandon(frame)
            raise
        loss, factor = finish(job, sums, rt.world)
        if factor is not None:
            scale(taken, factor)
        changed = [changed_buffers(*pair) if pair[0].places else {} for pair in zip(frames, leaves, strict=True)]
    finally:
        for frame in frames:
            release(frame)
    if rt.world.group is not None and job.buffers != "local":
        changed = agreed(changed, job.buffers, rt.world)
    grads = [
        Grads(
            params=MappingProxyType(dict(zip(frame.names, new, strict=True))), new_buffers=kept or None, ref=model.ref
        )
        for model, frame, new, kept in zip(leaves, frames, taken, changed, strict=True)
    ]
    return loss, sums.aux, grads[0] if spec is None else tree_unflatten(spec, grads)


def run_one(
    rt: Runtime,
    job: Job,
    frames: list[Frame],
    spec: Any,
    inputs: tuple[Any, Any],
    sync: bool,
    rng: tuple[Key, int] | None,
    sums: Sums,
) -> None:
    """Forward and backward of one micro-batch."""
    constants: list[Frame] = []
    try:
        args, kwargs = inputs
        args = bind_constants(args, constants)
        if kwargs:
            kwargs = bind_constants(kwargs, constants)

        def call(*nets: Any) -> Any:
            return job.loss_fn(nets[0] if spec is None else tree_unflatten(spec, nets), *args, **kwargs)

        with seeding(rt, rng, sums.count):
            with autocast(rt):
                result = rt.strategy.forward(frames, call, sync=sync, loss_fn=job.loss_fn)
            loss = collect(job, sums, result)
            if not loss.requires_grad:
                raise GradientError("the loss does not depend on any trainable parameter of the models.")
            rt.strategy.backward(frames, loss)
    except RuntimeError as error:
        explain_devices(error, rt.device, inputs)
        raise
    finally:
        for frame in constants:
            release(frame)


def collect(job: Job, sums: Sums, result: Any) -> torch.Tensor:
    """Add the result of one call of the loss function to the sums; the loss itself, with its graph."""
    aux: Any = None
    if job.has_aux:
        result, aux = unpacked(result, "has_aux=True", "(loss, aux)")
        sums.aux.append(tree_map(detached, aux))
    if job.weighted:
        result, weight = unpacked(result, "weighted=True", "(loss_sum, weight)")
        sums.weight = sums.weight + detached(weight)
    if not isinstance(result, torch.Tensor) or result.dim() != 0:
        shape: Any = getattr(result, "shape", None)
        found = f"{cast('object', type(result))}" if shape is None else f"a tensor of shape {tuple(shape)}"
        raise GradientError(
            f"loss_fn must return a scalar tensor, found {found}. Reduce it, for instance with .mean(); for a pair"
            " write has_aux=True or weighted=True."
        )
    sums.count += 1
    sums.loss = result.detach() if sums.count == 1 else sums.loss + result.detach()
    return result


def detached(leaf: Any) -> Any:
    """A tensor without its graph; anything else as it is."""
    return leaf.detach() if isinstance(leaf, torch.Tensor) else leaf


def unpacked(result: Any, option: str, shape: str) -> tuple[Any, Any]:
    """A pair that the loss function owes."""
    try:
        first, second = result
    except (TypeError, ValueError):
        raise GradientError(f"with {option} loss_fn must return {shape}, found {type(result)!r}.") from None
    return first, second


def finish(job: Job, sums: Sums, world: World) -> tuple[torch.Tensor, Any]:
    """(loss, the factor that the mean over ranks of the summed gradients still lacks, None for 1)."""
    if not job.weighted:
        return (sums.loss, None) if sums.count == 1 else (sums.loss / sums.count, 1 / sums.count)
    dtype = torch.float32 if world.device.type == "mps" else torch.float64
    both = torch.stack([torch.as_tensor(part, dtype=dtype, device=world.device) for part in (sums.loss, sums.weight)])
    if world.group is not None:
        dist.all_reduce(both, group=world.group)
    loss, weight = cast("list[float]", both.tolist())
    if weight == 0:
        raise GradientError("the weights of all ranks sum to zero, so the weighted mean does not exist.")
    mean = torch.tensor(loss / weight, dtype=sums.loss.dtype if sums.loss.is_floating_point() else dtype)
    return mean.to(world.device), world.world_size / weight


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


def seeding(rt: Runtime, rng: tuple[Key, int] | None, index: int) -> contextlib.AbstractContextManager[Any]:
    """The random state of micro-batch `index` of this rank."""
    return contextlib.nullcontext() if rng is None else seeded(fold_in(rng[0], rng[1] + index), rt.device)


def one_ahead(microbatches: Iterable[Any]) -> Iterator[tuple[tuple[Any, ...], dict[str, Any], bool]]:
    """(args, kwargs, whether it is the last), reading one item ahead."""
    iterator = iter(microbatches)
    for current in iterator:
        item = current
        for following in iterator:
            yield as_args(item), {}, False
            item = following
        yield as_args(item), {}, True


def as_args(item: Any) -> tuple[Any, ...]:
    """The arguments of one micro-batch."""
    return tuple(cast("list[Any]", item)) if isinstance(item, (tuple, list)) else (item,)
