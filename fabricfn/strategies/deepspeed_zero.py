"""ZeRO on the real DeepSpeed package: it cuts parameters and gradients, moves them, and offloads them.

What a step computes is fabricfn's: the leaves of `Model`, `Grads` and the optimizer's state are this rank's stretches
(`Stretch`), from which the engine's own copies are written when they are bound. Why, and what it costs:
docs/decisions/0012-deepspeed.md.
"""

import dataclasses
import functools
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from fabricfn.engine import Frame, require_all
from fabricfn.errors import CapabilityError, ModelError
from fabricfn.precision import Precision
from fabricfn.sharding import full, is_sharded
from fabricfn.strategies.deepspeed_config import OFFLOADS, Offload, read_config, settled_config
from fabricfn.strategies.deepspeed_engine import Zero, forget, read, run_back, started, write
from fabricfn.strategies.deepspeed_package import require
from fabricfn.strategies.single import backward as run_backward, gradients as take
from fabricfn.strategies.stretch import Stretch, cut, laid
from fabricfn.strategy import Strategy, point as point_whole
from fabricfn.world import World

CUT = "_fabricfn_cut"
"""The attribute of a slot that says how it is cut: (mesh, bounds, device)."""


@dataclasses.dataclass(slots=True, eq=False)
class Held:
    """The handle of a frame."""

    zero: Zero | None
    """None: the slots are whole and frozen, and no engine drives them."""
    kinds: tuple[tuple[torch.dtype, torch.Size, torch.device], ...]
    """Of the records that may be bound; those of the slots are the engine's."""
    share: float = 1.0
    """What the gradients of this run are still to be multiplied by."""
    used: set[int] = dataclasses.field(default_factory=set[int])
    """The ids of the slots that this run's backward passes have reached."""


def deepspeed(
    *,
    stage: int | None = None,
    offload_optimizer: Offload = None,
    offload_param: Offload = None,
    config: Mapping[str, Any] | str | os.PathLike[str] | None = None,
) -> Strategy:
    """ZeRO by the package DeepSpeed (`pip install "fabricfn[deepspeed]"`), on CPU too, there without a compiler.

    From stage 1 on the leaves of `Model`, `Grads` and `opt.state` are stretches: their shape is the global one, their
    memory this rank's part of the flattened numbers. Pure steps, donated ones, averages and checkpoints work as under
    every strategy; `optimizer_step(donate=True)` saves the memory of a second set of stretches. The optimizer is
    fabricfn's and works on the stretches, so it is one that updates number by number, as under fsdp.

    float32 and bfloat16 only. Every rank must make the same passes through the net.

    Args:
        stage: 0 averages gradients; 1 cuts the optimizer's state and the values that are updated; 2 the gradients, too;
            3 the parameters, too. None is what `config` says, else 2.
        offload_optimizer: "cpu" keeps values, gradients and the optimizer's state in host memory, and steps there.
        offload_param: "cpu" keeps the parameters of stage 3 in host memory.
        config: DeepSpeed's own configuration, a mapping or a JSON file: buckets, communication, prefetching and so on.
            What fabricfn decides (batch sizes, accumulation, clipping, optimizer, scheduler, precision) is refused.

    Raises:
        CapabilityError: the package is missing; offloading to NVMe.
        ConfigurationError: an unknown stage, offload or file; options that do not go together.

    Example:
        >>> deepspeed(stage=3, offload_optimizer="cpu").name  # doctest: +SKIP
        'deepspeed_stage_3_offload'
    """
    given, chosen = read_config(config, stage, offload_optimizer, offload_param)
    require()

    def attach(net: nn.Module, world: World, precision: Precision, *, frozen: bool) -> Held | None:
        if world.group is None or (frozen and not chosen):
            return None
        options = settled_config(given, precision, world)
        offload = given["zero_optimization"].get("offload_optimizer", {}).get("device") in OFFLOADS
        device = torch.device("cpu") if offload else world.device
        return tied(net, world, chosen, options, device, frozen=frozen)

    name = f"deepspeed_stage_{chosen}" + "_offload" * bool(offload_optimizer or offload_param)
    return Strategy(
        name=name,
        attach=attach,
        forward=forward,
        backward=backward,
        gradients=gradients,
        point=point if chosen else point_whole,
        reset=reset,
        shard=shard if chosen else None,
        check_unused=refuse_unused,
        check_transform=refuse_transform,
    )


def tied(
    net: nn.Module, world: World, stage: int, options: dict[str, Any], device: torch.device, *, frozen: bool
) -> Held:
    """The handle of a net whose parameters may be on the meta device."""
    assert world.group is not None
    slots = list(net.parameters())
    kinds = tuple((slot.dtype, slot.shape, device if slot.requires_grad else world.device) for slot in slots)
    check_dtypes(slots)
    computed = torch.bfloat16 if options["bf16"]["enabled"] else None
    give_memory(net, world.device, computed)
    slots = list(net.parameters())
    zero = None
    if not frozen or stage == 3:
        zero = started(net, world, stage, options, frozen=frozen)
    held = Held(zero, kinds)
    mesh = DeviceMesh.from_group(world.group, world.device.type, mesh_dim_names=("dp",))
    for slot in slots:
        if zero is not None and id(slot) in zero.pieces:
            setattr(slot, CUT, (mesh, zero.pieces[id(slot)].bounds, device))
        if slot.requires_grad:
            slot.register_post_accumulate_grad_hook(functools.partial(mark, held.used))
    return held


def give_memory(net: nn.Module, device: torch.device, dtype: torch.dtype | None) -> None:
    """Zeros in place of parameters on the meta device; a tied one stays one."""
    made: dict[int, nn.Parameter] = {}
    for module in net.modules():
        for name, slot in module._parameters.items():
            if slot is not None and slot.is_meta:
                if id(slot) not in made:
                    empty = torch.zeros(slot.shape, dtype=dtype or slot.dtype, device=device)
                    made[id(slot)] = nn.Parameter(empty, requires_grad=slot.requires_grad)
                module._parameters[name] = made[id(slot)]


def mark(used: set[int], slot: torch.Tensor) -> None:
    """A hook: a gradient of this slot has arrived."""
    used.add(id(slot))


def check_dtypes(slots: Sequence[nn.Parameter]) -> None:
    """Raise `CapabilityError` unless DeepSpeed knows the dtype, one for all trainable parameters."""
    dtypes = {slot.dtype for slot in slots if slot.requires_grad}
    if len(dtypes) > 1 or not {slot.dtype for slot in slots} <= {torch.float32, torch.bfloat16}:
        found = ", ".join(sorted({str(slot.dtype).removeprefix("torch.") for slot in slots}))
        raise CapabilityError(
            "DeepSpeed trains parameters of one dtype, float32 or bfloat16, and its gradients are float32; found"
            f' {found}. Write precision="32-true" or "bf16-mixed", or strategy="fsdp", which knows every dtype.'
        )


def shard(whole: torch.Tensor, slot: nn.Parameter) -> torch.Tensor:
    """The stretch of this rank, as ZeRO has cut the slot."""
    how = getattr(slot, CUT, None)
    if how is None:
        return whole.clone()
    mesh, bounds, device = how
    return cut(whole.to(device), mesh, bounds)


def point(frame: Frame, values: Sequence[torch.Tensor]) -> None:
    """Write the values into the engine's own parameters. Every rank must call it: stages 1 and 2 gather them."""
    held: Held | None = frame.handle
    if held is None:
        point_whole(frame, values)
        return
    frame.copied = True
    if held.zero is None:
        with torch.no_grad():
            for slot, value in zip(frame.slots, values, strict=True):
                slot.data.copy_(full(value))
        return
    pairs: list[tuple[nn.Parameter, torch.Tensor]] = []
    for name, slot, value in zip(frame.names, frame.slots, values, strict=True):
        bounds = getattr(slot, CUT)[1] if hasattr(slot, CUT) else None
        found = value.placements[0].bounds if isinstance(value, Stretch) else None
        if found != bounds or (is_sharded(value) and found is None):
            raise ModelError(
                f"{name} of this Model is not cut as the module that was set up ({found} against {bounds}). Load it"
                " with ff.load(rt, path, like=model)."
            )
        pairs.append((slot, value._local_tensor if isinstance(value, Stretch) else value))
    write(held.zero, pairs)


def reset(frame: Frame) -> None:
    """After an exception: nothing gathered, no gradient, ready for the next run."""
    held: Held | None = frame.handle
    if held is None or held.zero is None:
        return
    held.used.clear()
    held.share = 1.0
    forget(held.zero)


def forward(frames: Sequence[Frame], fn: Callable[..., Any], *, sync: bool, loss_fn: Any) -> Any:
    """`fn` of the nets, inside the engines of all frames."""
    if not frames:
        return fn()
    frame, *others = frames
    held: Held | None = frame.handle
    if held is None or held.zero is None:
        return forward(others, functools.partial(fn, frame.net), sync=sync, loss_fn=loss_fn)
    engine, kind = held.zero.engine, frame.kinds[0][2].type if frame.kinds else "cpu"
    engine.set_gradient_accumulation_boundary(sync)
    enabled, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)

    def inside(net: nn.Module) -> Any:
        with torch.autocast(kind, dtype, enabled=enabled):  # the engine turns off what it was not told of
            return forward(others, functools.partial(fn, net), sync=sync, loss_fn=loss_fn)

    return held.zero.run(inside)


def backward(frames: Sequence[Frame], loss: torch.Tensor, *, share: float) -> None:
    """The engine's backward pass, which reduces and cuts gradients meanwhile."""
    handles: list[Held] = [frame.handle for frame in frames if frame.handle is not None]
    for held in handles:
        held.share = share
    zeros = [held.zero for held in handles if held.zero is not None]
    if zeros:
        run_back(zeros, loss)
    else:
        run_backward(frames, loss, share=share)


def gradients(frames: Sequence[Frame], world: World, *, allow_unused: bool) -> list[list[torch.Tensor | None]]:
    """Take this rank's stretches of the mean gradients away."""
    if world.group is None:
        return take(frames, world, allow_unused=allow_unused)
    taken: list[list[torch.Tensor | None]] = []
    for frame in frames:
        held: Held = frame.handle
        assert held.zero is not None
        reached = [trains and id(slot) in held.used for slot, trains in zip(frame.slots, frame.trainable, strict=True)]
        if all(there or not trains for there, trains in zip(reached, frame.trainable, strict=True)):
            taken.append(whole_gradients(frame, held) if not held.zero.stage else stretches(frame, held, held.zero))
        else:
            taken.append([slot if there else None for slot, there in zip(frame.slots, reached, strict=True)])
        held.used.clear()
    require_all(frames, taken)
    return taken


def whole_gradients(frame: Frame, held: Held) -> list[torch.Tensor | None]:
    """Those of stage 0, which every rank holds whole."""
    grads = [slot.grad for slot in frame.slots]
    for slot in frame.slots:
        slot.grad = None
    return [grad if grad is None or held.share == 1 else grad * held.share for grad in grads]


def stretches(frame: Frame, held: Held, zero: Zero) -> list[torch.Tensor | None]:
    """Those of the other stages."""
    trainable = [piece for piece in zero.pieces.values() if piece.slot.requires_grad]
    found = {id(piece.slot): part for piece, part in zip(trainable, read(zero, held.share), strict=True)}
    taken: list[torch.Tensor | None] = []
    for slot, (dtype, shape, device) in zip(frame.slots, frame.kinds, strict=True):
        part = found.get(id(slot))
        mesh, bounds, _ = getattr(slot, CUT, (None, (), None))
        taken.append(None if part is None else laid(part.to(device, dtype), mesh, bounds, shape))
    return taken


def refuse_unused() -> None:
    """Ranks that reach different parameters reduce different buckets."""
    raise CapabilityError(
        "allow_unused=True needs a strategy that looks which parameters each rank has reached; DeepSpeed fills its"
        ' buckets in the order of their gradients. Write strategy="fsdp", or'
        " ff.strategies.ddp(find_unused_parameters=True)."
    )


def refuse_transform() -> None:
    """Functions of torch.func do not see the engine."""
    raise CapabilityError(
        "a torch.func transform cannot go through DeepSpeed, which works in hooks of loss.backward(). Write"
        ' strategy="functional", or use ff.gather_params and torch.func.functional_call.'
    )
