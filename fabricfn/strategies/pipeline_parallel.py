"""Pipeline parallel: a net cut into stages, of which each rank of a pipeline holds its own; data parallel elsewhere.

The record says where values lie. What runs them is `pipeline_value_and_grad`: docs/decisions/0015-pipeline.md.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from fabricfn.engine import Frame, require_all
from fabricfn.errors import CapabilityError, ConfigurationError, ModelError
from fabricfn.meshes import arranged, axes_of
from fabricfn.precision import Precision
from fabricfn.strategies.functional import mean_in
from fabricfn.strategies.pipeline_stages import Cut, Stage, check_ranks, stages_by_name, stages_of
from fabricfn.strategies.stretch import Stretch, cut, laid
from fabricfn.strategy import Strategy
from fabricfn.world import World

LINE = "_fabricfn_line"
"""The attribute of a slot that says where its value lies: (mesh, bounds)."""


@dataclasses.dataclass(slots=True, eq=False)
class Pipe:
    """The handle of a frame."""

    stages: tuple[Stage, ...]
    """All stages of the net."""
    here: tuple[int, ...]
    """The numbers of those that this rank holds: every n-th of n ranks, as torch's schedules deal them out."""
    group: dist.ProcessGroup | None
    """The ranks of this pipeline; None for one rank, which holds all stages."""
    own: tuple[bool, ...]
    """Which slots this rank holds; the others have no memory."""
    kinds: tuple[tuple[torch.dtype, torch.Size, torch.device], ...]
    """Of the records that may be bound."""
    reduce_dtype: torch.dtype | None
    used: set[int]
    """The ids of the slots that this run's backward passes have reached."""
    schedule: tuple[Any, Any] | None = None
    """The schedule of the last run, under what it depends on: with buffers for what is received, so one is kept."""


def pipeline(stages: Sequence[Cut], *, pipeline_parallel: int | None = None) -> Strategy:
    """The layers of a net dealt out over ranks in stages; micro-batches go through them one after another.

    Train with `ff.pipeline_value_and_grad`: a schedule cannot run an arbitrary loss function, so `value_and_grad`,
    `value` and `apply` are refused. Everything else stays as it is. A parameter has the global shape on every rank and
    memory on the ranks of its stage: steps, clipping, averages, checkpoints work as under every strategy that shards.

    The ranks are a mesh with the axes "pp" and "dp" (`rt.mesh`). `rt.rank`, `rt.world_size`, and the data that a rank
    gets are those of the axis "dp": the ranks of one pipeline have one rank and get one batch. `rt.global_rank` is the
    number of the process; printing and saving go by it. Neighbours in a pipeline are `world / pipeline_parallel` apart.

    Args:
        stages: a list for each stage, first to last, of the sub-modules that it calls one after another:
            `[["embed", "blocks.0"], ["blocks.1", "head"]]`. A tuple or list that one returns are the arguments of the
            next. In place of such a list a pair `(names, fn)`: the stage holds these sub-modules (and parameters that
            hang in the net itself) and computes `fn(net, *inputs)`. Between stages tensors travel: one, or a tuple.
        pipeline_parallel: how many ranks make one pipeline. None is one for each stage, or all, if there are fewer. Of
            more stages than that each rank holds every `pipeline_parallel`-th.

    Raises:
        ConfigurationError: no list of stages; or (when the runtime is made) so many stages cannot be dealt out evenly.
        ModelError: (in `setup_model`) the stages do not fit the module, or it is compiled as a whole.

    Example:
        >>> pipeline([["0", "1"], ["2"]]).name
        'pipeline'
    """
    parts = stages_of(stages)

    def attach(net: nn.Module, world: World, precision: Precision, *, frozen: bool) -> Pipe:
        if frozen:
            raise whole_net_only()
        if net._compiled_call_impl is not None:
            raise ModelError(
                "setup_model(compile=True) compiles the call of the whole net, which a pipeline never makes. Compile"
                " the blocks before: for block in net.blocks: block.compile()."
            )
        return tied(net, parts, world, precision)

    return Strategy(
        name="pipeline",
        attach=attach,
        forward=forward,
        backward=backward,
        gradients=gradients,
        point=point,
        reset=reset,
        shard=shard,
        check_unused=refuse_unused,
        check_transform=refuse_transform,
        arrange=functools.partial(arrange, num_stages=len(parts), pipeline_parallel=pipeline_parallel),
    )


def arrange(world: World, *, num_stages: int, pipeline_parallel: int | None) -> World:
    """The world in terms of its data axis, with a mesh of "pp" and "dp"."""
    size = min(num_stages, world.world_size) if pipeline_parallel is None else pipeline_parallel
    check_ranks(num_stages, size, world.world_size)
    if world.group is None:
        return world
    return arranged(world, {"pp": size, "dp": world.world_size // size}, data="dp")


def tied(net: nn.Module, stages: tuple[Stage, ...], world: World, precision: Precision) -> Pipe:
    """The handle of a net: the slots of this rank's stages get memory, the others stay without."""
    by_name = stages_by_name(net, stages)
    mesh: Any = None if world.whole.group is None else mesh_of(world)
    size, place = (1, 0) if mesh is None else (mesh.size(0), mesh.get_local_rank(0))
    own = tuple(by_name[name] % size == place for name, _ in net.named_parameters())
    if mesh is not None:
        materialise(net, own, world.device)
    pipe = Pipe(
        stages=stages,
        here=tuple(range(place, len(stages), size)),
        group=None if mesh is None or size == 1 else mesh.get_group(0),
        own=own,
        kinds=tuple((slot.dtype, slot.shape, world.device) for slot in net.parameters()),
        reduce_dtype=precision.reduce_dtype,
        used=set(),
    )
    for (name, slot), here in zip(net.named_parameters(), own, strict=True):
        owner = by_name[name] % size
        if mesh is not None:
            setattr(slot, LINE, (mesh, tuple(slot.numel() * (rank > owner) for rank in range(size + 1))))
        if here and slot.requires_grad:
            slot.register_post_accumulate_grad_hook(functools.partial(mark, pipe.used))
    return pipe


def mesh_of(world: World) -> Any:
    """The mesh that `arrange` has made."""
    if axes_of(world) != ("pp", "dp"):
        raise ConfigurationError(
            "a pipeline is laid out when the runtime is made, and this runtime was made for another strategy. Write"
            " ff.init_runtime(strategy=ff.strategies.pipeline(stages)) instead of replacing the strategy of a Runtime."
        )
    return world.mesh


def materialise(net: nn.Module, own: Sequence[bool], device: torch.device) -> None:
    """Slots on the device for this rank's, in place of those without memory; a tied one stays one.

    They get one number each: binding lets them look at values before anything is computed.
    """
    made: dict[int, nn.Parameter] = {}
    for slot, here in zip(net.parameters(), own, strict=True):
        if here:
            hollow = torch.zeros((), dtype=slot.dtype, device=device).expand(slot.shape)
            made[id(slot)] = nn.Parameter(hollow, requires_grad=slot.requires_grad)
    for module in net.modules():
        for name, slot in module._parameters.items():
            if slot is not None:
                module._parameters[name] = made.get(id(slot), slot)


def mark(used: set[int], slot: torch.Tensor) -> None:
    """A hook: a gradient of this slot has arrived."""
    used.add(id(slot))


def shard(whole: torch.Tensor, slot: nn.Parameter) -> torch.Tensor:
    """All of a parameter on the ranks of its stage, nothing on the others."""
    return cut(whole, *getattr(slot, LINE))


def point(frame: Frame, values: Sequence[torch.Tensor]) -> None:
    """Let the slots of this rank look at the values' parts."""
    pipe: Pipe = frame.handle
    for name, slot, value, here in zip(frame.names, frame.slots, values, pipe.own, strict=True):
        _, wanted = getattr(slot, LINE, (None, None))
        found = value._spec.placements[0].bounds if isinstance(value, Stretch) else None
        if found != wanted:
            raise ModelError(
                f"{name} of this Model does not lie on the ranks of its stage, as this module wants it ({found} against"
                f" {wanted}). Load it with ff.load(rt, path, like=model)."
            )
        if here:
            slot.data = value._local_tensor.view(slot.shape) if isinstance(value, Stretch) else value


def reset(frame: Frame) -> None:
    """After an exception: nothing of the broken run stays."""
    pipe: Pipe = frame.handle
    pipe.schedule = None
    pipe.used.clear()


def prepare(frame: Frame) -> None:
    """Zeros for gradients to be added to: what autograd hands out for two slots may be views of one tensor."""
    pipe: Pipe = frame.handle
    pipe.used.clear()
    for slot, here in zip(frame.slots, pipe.own, strict=True):
        if here and slot.requires_grad:
            slot.grad = torch.zeros_like(slot)


def reached(frame: Frame) -> list[torch.Tensor | None]:
    """The gradients of this rank's slots; nothing where a backward pass did not come by. Of the others empty parts."""
    pipe: Pipe = frame.handle
    grads: list[torch.Tensor | None] = []
    for slot, here in zip(frame.slots, pipe.own, strict=True):
        there = not here or id(slot) in pipe.used
        grads.append((slot.grad if here else slot.new_empty(0, device=frame.kinds[0][2])) if there else None)
    return [grad if trains else None for grad, trains in zip(grads, frame.trainable, strict=True)]


def gradients(frames: Sequence[Frame], world: World, *, allow_unused: bool) -> list[list[torch.Tensor | None]]:
    """The means over the data axis."""
    taken = [reached(frame) for frame in frames]
    for frame in frames:
        for slot in frame.slots:
            slot.grad = None
    require_all(frames, taken)
    return [averaged(frame, grads, world) for frame, grads in zip(frames, taken, strict=True)]


def averaged(frame: Frame, grads: Sequence[torch.Tensor | None], world: World) -> list[torch.Tensor | None]:
    """The means of gradients over the data axis, laid out as the values are."""
    pipe: Pipe = frame.handle
    mine = [grad for grad, here in zip(grads, pipe.own, strict=True) if here and grad is not None]
    means = iter(mine if world.group is None else mean_in(pipe.reduce_dtype, mine, world.group))
    found: list[torch.Tensor | None] = []
    for grad, slot, here in zip(grads, frame.slots, pipe.own, strict=True):
        mesh, bounds = getattr(slot, LINE, (None, ()))
        mean = next(means) if here and grad is not None else grad
        found.append(mean if mean is None or mesh is None else laid(mean.reshape(-1), mesh, bounds, slot.shape))
    return found


def whole_net_only() -> CapabilityError:
    """The error for whatever needs the whole net on one rank."""
    return CapabilityError(
        "under strategy='pipeline' no rank has the whole net, and a schedule runs stages, not an arbitrary function."
        " Write ff.pipeline_value_and_grad(rt, loss_fn, num_microbatches=4)(model, inputs, target), where"
        " loss_fn(output, target) gets what the last stage returns; ff.pipeline_value for a loss without gradients; or"
        " ff.to_module(rt, model) for a plain net."
    )


def refuse_unused() -> None:
    """The ranks of a stage would have to agree on what each of them has reached."""
    raise CapabilityError(
        "allow_unused=True is not there for a pipeline: each rank sees its own stages only. Write"
        ' strategy="fsdp", or freeze what the loss does not need: net.spare.requires_grad_(False).'
    )


def refuse_transform() -> None:
    """Functions of torch.func do not see what travels between ranks."""
    raise CapabilityError(
        "a torch.func transform cannot go through the stages of a pipeline. Write"
        ' strategy="functional", or use ff.gather_params and torch.func.functional_call.'
    )


def forward(frames: Sequence[Frame], fn: Callable[..., Any], *, sync: bool, loss_fn: Any) -> Any:
    """Refused: see `whole_net_only`."""
    raise whole_net_only()


def backward(frames: Sequence[Frame], loss: torch.Tensor, *, share: float) -> None:
    """Refused: see `whole_net_only`."""
    raise whole_net_only()
