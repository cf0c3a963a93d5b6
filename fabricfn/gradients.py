"""Gradients and values of loss functions: the unit of synchronisation is the loss function, whatever it computes.

How a call runs is in `runs.py`; what a loss function may return, in `losses.py`.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import torch

from fabricfn.binding import bind_constants, check_devices, release
from fabricfn.canonical import differentiate_in_tree
from fabricfn.engine import Frame
from fabricfn.errors import ConfigurationError
from fabricfn.losses import Buffers, Job, Reduce, Sums, collect, finish
from fabricfn.precision import autocast_of
from fabricfn.random import Key, seeded
from fabricfn.records import Model
from fabricfn.replicas import now_and_then
from fabricfn.runs import counts_of, differentiate, one_ahead
from fabricfn.runtimes import Runtime
from fabricfn.watching import counted


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

    A parameter that takes part in the loss on some ranks only leaves the other ranks waiting in a collective until one
    fails (GradientError on the rank that lacks it); use `allow_unused=True` under a strategy that serves it.

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
        this rank's own mean (the global one under `weighted`). `rng` is the key for dropout, one a step:
        `rng=ff.fold_in(ff.key(1), opt.step)`; folded in is the index of the micro-batch in the global
        batch, here the rank.

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
        return (loss if aux is None else (loss, aux[0])), grads

    return counted(rt.world, "value_and_grad", now_and_then(rt, grad_fn), subject=_signature)


def accumulate(
    rt: Runtime,
    loss_fn: Callable[..., Any],
    *,
    has_aux: bool = False,
    weighted: bool = False,
    allow_unused: bool = False,
    buffers: Buffers = "rank0",
    reduce: Reduce = "mean",
) -> Callable[..., tuple[Any, Any]]:
    """Like `value_and_grad`, over several micro-batches with one synchronisation at the end.

    Laws: k micro-batches give the loss and the gradients of one batch; exactly for unequal sizes with `weighted`, else
    the mean over the ranks of each rank's mean of the micro-batches' means. With `reduce="canonical"` loss and
    gradients are a function of the sequence of all ranks' micro-batches: the same bits on every number of ranks.

    Args:
        loss_fn, has_aux, weighted, allow_unused, buffers: see `value_and_grad`. Under "canonical" a loss that changes
            buffers needs `buffers="mean"`: each micro-batch starts from the model's, and their mean comes out.
        reduce: "mean" adds up as it comes, in the strategy's own way. "canonical" computes each micro-batch's gradients
            apart and adds all of them, in the order of ranks, in one fixed binary tree; the plain mean is that over all
            micro-batches. It holds log2(k) sums at a time, and reads `microbatches` wholly. Conditions and costs:
            docs/determinism.md.

    Returns:
        `grad_fn(models, microbatches, rng=None) -> (loss, grads)`; `microbatches` is an iterable, read one ahead
        (wholly with `rng`), of argument tuples (a list, as DataLoader makes it, counts as a tuple; anything else is one
        argument). Every rank must call it; the ranks may have different numbers of micro-batches, but neither under
        "canonical" nor under fsdp. With has_aux the aux is the list of this rank's micro-batches' aux. With `rng` each
        micro-batch folds in its index in the global batch. `loss` is as in `value_and_grad`; under "canonical" the mean
        over all micro-batches of all ranks.

    Raises:
        FabricfnError: as `value_and_grad` does.
        ConfigurationError: an option is unknown; (from grad_fn) there is no micro-batch, or not as many on each rank.
        CapabilityError: the strategy cannot do it; (from grad_fn) buffers that changed, under "canonical".

    Example:
        >>> import torch, fabricfn as ff
        >>> rt = ff.init_runtime(devices=1, accelerator="cpu")
        >>> model = ff.setup_model(rt, torch.nn.Linear(2, 1))
        >>> grad_fn = ff.accumulate(rt, lambda net, x: (net(x).square().sum(), len(x)), weighted=True)
        >>> loss, grads = grad_fn(model, [(torch.ones(4, 2),), (torch.ones(1, 2),)])
    """
    canonical = reduce == "canonical"
    if canonical:
        rt.strategy.local_gradients(())
        if buffers == "local":
            raise ConfigurationError(
                'reduce="canonical" gives the same bits on any number of ranks, and buffers="local" others on each'
                ' rank. Write buffers="mean".'
            )
    elif reduce != "mean":
        raise ConfigurationError(f'reduce={reduce!r} is unknown; there are "mean" and "canonical".')
    # by itself "canonical" adds up what there is, so it asks no strategy for it
    job = checked(rt, loss_fn, has_aux, weighted, allow_unused and not canonical, buffers)
    job = dataclasses.replace(job, allow_unused=allow_unused)
    in_step = rt.strategy.shard is not None and rt.world.whole.group is not None

    def grad_fn(models: Any, microbatches: Iterable[Any], *, rng: Key | None = None) -> tuple[Any, Any]:
        if canonical:
            loss, aux, grads = differentiate_in_tree(rt, job, models, microbatches, rng)
            return (loss if aux is None else (loss, aux)), grads
        key = None
        if rng is not None or in_step:
            microbatches = list(microbatches)
            counts = counts_of(len(microbatches), rt.world)
            everyone = counts if rt.world.everyone is None else counts_of(len(microbatches), rt.world.whole)
            if in_step and len(set(everyone)) > 1:
                raise ConfigurationError(
                    f"strategy={rt.strategy.name!r} talks to other ranks in every micro-batch, so all ranks need"
                    f" equally many; they have {everyone} (rank {rt.global_rank} has {len(microbatches)}). Cut the"
                    " batch of every rank into the same number of parts, for instance with x.tensor_split(k)."
                )
            key = None if rng is None else (rng, sum(counts[: rt.rank]))
        loss, aux, grads = differentiate(rt, job, models, one_ahead(microbatches), key)
        return (loss if aux is None else (loss, aux)), grads

    return counted(rt.world, "accumulate", now_and_then(rt, grad_fn), subject=_signature)


def value(
    rt: Runtime, loss_fn: Callable[..., Any], *, has_aux: bool = False, weighted: bool = False
) -> Callable[..., Any]:
    """A function that computes a loss without gradients: exact means over all ranks with `weighted`.

    Args:
        loss_fn, has_aux, weighted: see `value_and_grad`. Without `weighted` nothing is communicated.

    Returns:
        `value_fn(models, *args, rng=None, **kwargs) -> loss`, or `(loss, aux)` with has_aux. Changes of buffers are
        dropped. Under `weighted` every rank must call it and gets the same number; under fsdp every rank must call it,
        in any case, and go through the net equally often. For an exact mean over a whole data
        set pass `ff.batches(rt, loader)` as the argument and let loss_fn go through it, adding up (sum, weight) in
        float64. `rng` as in `value_and_grad`.

    Raises:
        GradientError: (from value_fn) loss_fn returned something else, or the weights sum to zero.
        DonatedError: (from value_fn) a model was given away with donate=True.

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
            seed = contextlib.nullcontext() if rng is None else seeded(rng, rt.device, rt.rank)

            def call(*_: Any) -> Any:
                return loss_fn(nets, *values, **options)

            with torch.no_grad(), autocast_of(rt.precision, rt.device), seed:
                collect(job, sums, rt.strategy.forward(frames, call, sync=False, loss_fn=None))
        except RuntimeError as error:
            check_devices(error, rt.device, args, kwargs)
            raise
        finally:
            for frame in frames:
                release(frame)
        loss, _ = finish(job, sums, rt.world)
        return loss if sums.aux is None else (loss, sums.aux[0])

    return counted(rt.world, "value", value_fn) if weighted or rt.strategy.shard is not None else value_fn


def checked(
    rt: Runtime, loss_fn: Callable[..., Any], has_aux: bool, weighted: bool, allow_unused: bool, buffers: Buffers
) -> Job:
    """The job, once the strategy is known to be able to do it."""
    if buffers not in ("rank0", "mean", "local"):
        raise ConfigurationError(f'buffers={buffers!r} is unknown; there are "rank0", "mean" and "local".')
    if allow_unused and rt.world.group is not None:
        rt.strategy.check_unused()
    return Job(loss_fn=loss_fn, has_aux=has_aux, weighted=weighted, allow_unused=allow_unused, buffers=buffers)


def _signature(models: Any, *_: Any, **__: Any) -> Any:
    """What kind of model it is; "" for a tree of them."""
    return models.ref.signature if type(models) is Model else ""
