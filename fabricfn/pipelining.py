"""Losses and gradients of a net that is cut into stages: micro-batches go through the ranks of a pipeline."""

import functools
from collections.abc import Callable
from typing import Any, Literal

import torch

from fabricfn.binding import acquire, release
from fabricfn.engine import Frame
from fabricfn.errors import ConfigurationError
from fabricfn.gradients import checked
from fabricfn.losses import Buffers, Job, Sums, finish
from fabricfn.random import Key
from fabricfn.records import Model
from fabricfn.relays import Plan, line_of, send_through, spread
from fabricfn.runs import abandon, differentiate, scale
from fabricfn.runtimes import Runtime
from fabricfn.strategies.pipeline_schedules import check_schedule
from fabricfn.watching import counted

Schedule = Literal["gpipe", "1f1b", "interleaved_1f1b"]


def pipeline_value_and_grad(
    rt: Runtime,
    loss_fn: Callable[[Any, Any], Any],
    *,
    num_microbatches: int,
    schedule: Schedule = "1f1b",
    has_aux: bool = False,
    weighted: bool = False,
    buffers: Buffers = "rank0",
) -> Callable[..., tuple[Any, Any]]:
    """A function that sends a batch through the stages of a pipeline, and computes a loss and its gradients.

    Laws: loss and gradients are those of `accumulate` over the micro-batches in one process, whatever the schedule and
    the number of ranks; the same bits for the same inputs and cut, on any number of ranks of one pipeline. The model
    passed in stays as it is.

    Args:
        rt: a runtime with `strategy=ff.strategies.pipeline(stages)`.
        loss_fn: `loss_fn(output, target) -> loss`, a scalar tensor, of what the last stage returns for a micro-batch.
            It is called on the rank of that stage.
        num_microbatches: into how many equal parts a batch is cut. The more, the less ranks wait for one another.
        schedule: "gpipe" (all forward passes, then all backward passes), "1f1b" (one by one, which keeps fewer
            activations; as many micro-batches as stages at least), or "interleaved_1f1b" (several stages on a rank).
        has_aux: loss_fn returns `(loss, aux)`; aux is any tree of tensors and numbers.
        weighted: loss_fn returns `(loss_sum, weight)`, with has_aux `((loss_sum, weight), aux)`; see `value_and_grad`.
        buffers: how the buffers that changed become equal over the data axis; see `value_and_grad`. Over the stages
            they always do. BatchNorm counts every micro-batch.

    Returns:
        `grad_fn(model, inputs, target, *, rng=None) -> (loss, grads)`, or `((loss, aux), grads)` with has_aux, the aux
        of all micro-batches in a list. Every rank must call it. `inputs` is a tree of tensors [batch, ...]; a tuple or
        list are several arguments of the first stage. `target` is such a tree, too. All ranks of a pipeline pass the
        same, and get the same loss and aux; the loss is this rank's own mean over the micro-batches, as under ddp (the
        global one under `weighted`). `grads` are averaged over the data axis. `rng` is the key for dropout; folded in
        are the index of the micro-batch in the global batch, and the number of the stage.

    Raises:
        ConfigurationError: another strategy; (from grad_fn) a schedule that cannot run so many stages or micro-batches.
        DataError: (from grad_fn) the batch cannot be cut into so many equal parts.
        ModelError: (from grad_fn) what a stage sends on are no tensors, or of another shape than for the batch before.
        GradientError: (from grad_fn) the loss is no scalar, or parameters got no gradient.
        MismatchError: (from grad_fn) the ranks of a pipeline got different batches: shapes at every call, values at the
            first one.

    Example:
        >>> import torch, fabricfn as ff
        >>> rt = ff.init_runtime(devices=1, accelerator="cpu", strategy=ff.strategies.pipeline([["0"], ["1"]]))
        >>> model = ff.setup_model(rt, torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 1)))
        >>> grad_fn = ff.pipeline_value_and_grad(rt, torch.nn.functional.mse_loss, num_microbatches=2)
        >>> loss, grads = grad_fn(model, torch.ones(4, 2), torch.zeros(4, 1))
        >>> {name: tuple(grad.shape) for name, grad in grads.params.items()}
        {'0.weight': (3, 2), '0.bias': (3,), '1.weight': (1, 3), '1.bias': (1,)}
    """
    plan = planned(rt, "pipeline_value_and_grad", num_microbatches, schedule, backward=True)
    job = checked(rt, loss_fn, has_aux, weighted, False, buffers)
    compared = False

    def grad_fn(model: Model, inputs: Any, target: Any, *, rng: Key | None = None) -> tuple[Any, Any]:
        nonlocal compared
        check_model(model)
        passes = functools.partial(through_stages, plan=plan, compare=not compared)
        key = None if rng is None else (rng, rt.rank * num_microbatches)
        loss, aux, grads = differentiate(rt, job, model, (inputs, target), key, passes)
        compared = True
        return (loss if aux is None else (loss, aux)), spread(line_of(rt), model, grads)

    return counted(rt.world, "pipeline_value_and_grad", grad_fn)


def pipeline_value(
    rt: Runtime,
    loss_fn: Callable[[Any, Any], Any],
    *,
    num_microbatches: int,
    schedule: Schedule = "1f1b",
    has_aux: bool = False,
    weighted: bool = False,
) -> Callable[..., Any]:
    """A function that sends a batch through the stages of a pipeline and computes a loss without gradients.

    Args:
        rt, loss_fn, num_microbatches, schedule, has_aux, weighted: see `pipeline_value_and_grad`.

    Returns:
        `value_fn(model, inputs, target, *, rng=None) -> loss`, or `(loss, aux)` with has_aux; metrics are aux, or a
        `(sum, weight)` under `weighted`. Every rank must call it. Changes of buffers are dropped.

    Raises:
        FabricfnError: as `pipeline_value_and_grad` does.

    Example:
        >>> import torch, fabricfn as ff
        >>> rt = ff.init_runtime(devices=1, accelerator="cpu", strategy=ff.strategies.pipeline([["0"], ["1"]]))
        >>> model = ff.setup_model(rt, torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Identity()))
        >>> correct = lambda output, target: ((output.argmax(1) == target).sum(), len(target))
        >>> value_fn = ff.pipeline_value(rt, correct, num_microbatches=2, weighted=True)
        >>> value_fn(model, torch.eye(4), torch.tensor([0, 1, 2, 0])).item()
        0.75
    """
    plan = planned(rt, "pipeline_value", num_microbatches, schedule, backward=False)
    job = checked(rt, loss_fn, has_aux, weighted, False, "local")

    def value_fn(model: Model, inputs: Any, target: Any, *, rng: Key | None = None) -> Any:
        check_model(model)
        frame, sums = acquire(model, frozen=False), Sums()
        key = None if rng is None else (rng, rt.rank * num_microbatches)
        try:
            with torch.no_grad():
                send_through(rt, job, frame, (inputs, target), key, sums, plan=plan, compare=False)
        except BaseException:
            abandon(frame)
            raise
        finally:
            release(frame)
        loss, _ = finish(job, sums, rt.world)
        return loss if sums.aux is None else (loss, sums.aux)

    return counted(rt.world, "pipeline_value", value_fn)


def planned(rt: Runtime, name: str, num_microbatches: int, schedule: str, *, backward: bool) -> Plan:
    """The plan, once the runtime is known to be able to carry it out."""
    if rt.strategy.name != "pipeline":
        raise ConfigurationError(
            f"{name} runs the stages of strategy='pipeline', and this runtime has strategy={rt.strategy.name!r}. Write"
            " ff.init_runtime(strategy=ff.strategies.pipeline(stages)), or ff.accumulate(rt, loss_fn)."
        )
    if type(num_microbatches) is not int or num_microbatches < 1:
        raise ConfigurationError(f"num_microbatches={num_microbatches!r} must be a whole number from 1 on.")
    check_schedule(schedule, num_microbatches, num_stages=1, num_ranks=1)
    call = f"{name}(num_microbatches={num_microbatches}, schedule={schedule!r})"
    return Plan(call=call, schedule=schedule, num_microbatches=num_microbatches, backward=backward)


def check_model(model: Any) -> None:
    """Raise `ConfigurationError` for a tree of models."""
    if type(model) is not Model:
        raise ConfigurationError(
            f"a pipeline has one Model, as ff.setup_model(rt, module) returns it; found {type(model).__name__}."
        )


def through_stages(
    rt: Runtime,
    job: Job,
    frames: list[Frame],
    spec: Any,
    batch: tuple[Any, Any],
    rng: tuple[Key, int] | None,
    sums: Sums,
    *,
    plan: Plan,
    compare: bool,
) -> tuple[torch.Tensor, list[Any] | None, list[list[torch.Tensor | None]]]:
    """In place of `runs.through`: (loss, aux, gradients), the mean over all micro-batches and the data axis."""
    send_through(rt, job, frames[0], batch, rng, sums, plan=plan, compare=compare)
    taken = rt.strategy.gradients(frames, rt.world, allow_unused=False)
    loss, factor = finish(job, sums, rt.world)
    return loss, sums.aux, taken if factor is None else scale(taken, factor)
