"""Sharded data parallel on torch's FSDP2 (`fully_shard`): every rank holds a part of each parameter.

What it shards is a `Box` around the net, whose forward calls the user's loss function; the units inside are the user's
own blocks. Laws and traps: docs/decisions/0006-fsdp.md.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, cast

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from fabricfn.engine import Frame, separate
from fabricfn.errors import CapabilityError
from fabricfn.precision import Precision
from fabricfn.sharding import is_sharded, local_of, with_local
from fabricfn.strategies import fsdp_options
from fabricfn.strategies.fsdp_options import Cutting, Parameters
from fabricfn.strategies.sharded_nets import arrange, attach_box, mesh_of
from fabricfn.strategies.shards import Shards, gradients, outliving, outside, watch
from fabricfn.strategies.single import backward as run_backward
from fabricfn.strategies.tensor_slots import cut as cut_for_peers, like_of, look_at
from fabricfn.strategies.torch_fsdp import (
    check_version,
    clear,
    gathered,
    is_idle,
    let_go,
    point as point_shards,
    went_back,
)
from fabricfn.strategies.units import Units
from fabricfn.strategy import Strategy, point as point_whole
from fabricfn.world import World


def fsdp(
    *,
    units: Units = "auto",
    reshard_after_forward: bool | int = True,
    gather_dtype: torch.dtype | None = None,
    cpu_offload: bool = False,
    gradient_divide_factor: float | None = None,
    prefetch: int = 0,
    ignored_params: Parameters = None,
    replicate: int | Literal["nodes"] = 1,
) -> Strategy:
    """Parameters, gradients and optimizer state cut over the ranks (ZeRO stage 3), by torch's `fully_shard`.

    A *unit* is a sub-module whose parameters are gathered when its forward begins and let go when it ends; all others
    are gathered for the whole loss function. The leaves of `Model`, `Grads` and of the optimizer's state are DTensors:
    their shape is the global one, their memory this rank's part. Scalar parameters stay whole on every rank.

    Every rank must run the same units in the same order. A unit's weights exist only inside its forward; elsewhere
    gather them with `ff.unsharded`.

    Args:
        units: what to gather together: "auto" for the repeated blocks of lists, a module class or a tuple of them, a
            predicate `(name, module) -> bool`, or None to gather the whole model at once. Weights tied over the border
            of a unit undo it: they stay with the root.
        reshard_after_forward: let a unit's parameters go after its forward and gather them again for the backward pass
            (True); keep them (False), which is faster and needs more memory; or a divisor of the world size: keep a
            larger part, as torch does.
        gather_dtype: the dtype in which units are gathered. None is the dtype of the arithmetic under a "-mixed"
            precision, else the parameters' own.
        cpu_offload: keep parameters, gradients and optimizer state in the memory of the CPU, and bring units to the
            device while they compute. On a CPU it changes nothing; one rank on another device is an error.
        gradient_divide_factor: gradients are the sum over ranks divided by this number. None is the number of ranks,
            which makes them the mean; 1 makes them the sum.
        prefetch: how many units ahead are gathered while one computes, in the net's order. 0 is torch's own manner:
            the next one in the backward pass, as soon as the device is free in the forward pass.
        ignored_params: parameters that every rank holds whole, as plain tensors: patterns of names, or a predicate
            `(name, parameter) -> bool`. Their gradients are averaged all the same.
        replicate: into how many groups of neighbouring ranks the world is cut. A parameter is cut over the ranks of one
            group, and every group holds all of it: gathering stays within a group, gradients are averaged over both
            (hybrid sharding, HSDP). "nodes" is one group a node. `rt.mesh` has the axes "replicate" and "shard" then.

    Raises:
        ConfigurationError: an option has no meaning; or (when the runtime is made) so many groups cannot be cut from
            the world evenly.

    Example:
        >>> fsdp(units=torch.nn.TransformerEncoderLayer).name
        'fsdp'
    """
    check_version()
    cutting = Cutting(
        units=units,
        reshard_after_forward=reshard_after_forward,
        gather_dtype=gather_dtype,
        cpu_offload=cpu_offload,
        gradient_divide_factor=gradient_divide_factor,
        prefetch=prefetch,
        ignored_params=ignored_params,
    )
    fsdp_options.check(cutting)

    def attach(net: nn.Module, world: World, precision: Precision, *, frozen: bool) -> Shards | None:
        if world.group is None:
            fsdp_options.refuse_alone(cpu_offload, world.device)
            return None
        return attach_box(net, world, precision, cutting, mesh_of(world, replicate), frozen=frozen)

    return Strategy(
        name="fsdp",
        attach=attach,
        forward=forward,
        backward=backward,
        gradients=fsdp_options.divided(gradients, gradient_divide_factor),
        point=point,
        reset=reset,
        shard=shard,
        check_transform=refuse_transform,
        arrange=functools.partial(arrange, replicate=replicate),
    )


def point(frame: Frame, values: Sequence[torch.Tensor]) -> None:
    """Let the shards of the frame be those of the values."""
    shards: Shards | None = frame.handle
    if shards is None:
        point_whole(frame, values)
        return
    cut: list[tuple[Any, torch.Tensor, str]] = []
    for param, slot, value, name in zip(shards.params, frame.slots, values, frame.names, strict=True):
        if param is None:
            look_at(slot, value, name)
        else:
            cut.append((param, value, name))
    let_go(shards.box)  # whatever is gathered still is of the old values
    frame.copied = point_shards(*zip(*cut, strict=True)) if cut else False


def shard(whole: torch.Tensor, slot: nn.Parameter) -> torch.Tensor:
    """A DTensor that is cut as FSDP cut the slot."""
    if like_of(slot) is not None:
        return cut_for_peers(whole, slot)
    if not is_sharded(slot):
        return whole.clone()
    like = cast("DTensor", slot)
    value = distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)
    home = local_of(slot).device
    return with_local(value, local_of(value).to(home, copy=True, memory_format=torch.contiguous_format))


def reset(frame: Frame) -> None:
    """After an exception: nothing gathered, no gradient, ready for the next run."""
    shards: Shards | None = frame.handle
    if shards is not None:
        let_go(shards.box)
        clear(shards.params)
        shards.share = 1.0
        shards.used.clear()


def forward(frames: Sequence[Frame], fn: Callable[..., Any], *, sync: bool, loss_fn: Any) -> Any:
    """`fn` of the nets, inside the boxes of all frames."""
    if not frames:
        return fn()
    frame, *others = frames
    shards: Shards | None = frame.handle
    if shards is None:
        return forward(others, functools.partial(fn, frame.net), sync=sync, loss_fn=loss_fn)
    if not is_idle(shards.box):
        let_go(shards.box)
    if sync is not shards.sync:
        shards.box.set_requires_gradient_sync(sync)
        shards.sync = sync

    def inside(net: nn.Module) -> Any:
        try:
            result = forward(others, functools.partial(fn, net), sync=sync, loss_fn=loss_fn)
        except RuntimeError as error:
            if went_back(shards.box):
                raise inner_backward() from error
            if "mixed dtype (CPU)" in str(error):
                raise mixed_dtypes() from error
            if "DTensor" in str(error) or "differentiated" in str(error):
                raise outside(shards.units) from error
            raise
        if went_back(shards.box):
            raise inner_backward()
        return kept(result, shards)

    return shards.box(inside)


def kept(result: Any, shards: Shards) -> Any:
    """The result with copies of what looks at gathered parameters."""
    if type(result) is torch.Tensor and not result._is_view():
        return result
    homes = {local_of(slot).untyped_storage()._cdata for slot in map(gathered, shards.params) if slot is not None}
    return outliving(result, homes, shards.units)


def backward(frames: Sequence[Frame], loss: torch.Tensor, *, share: float) -> None:
    """Accumulate into the gathered parameters' `.grad`; FSDP averages and cuts them meanwhile."""
    handles: list[Shards] = [frame.handle for frame in frames if frame.handle is not None]
    for shards in handles:
        if is_sharded(loss):
            raise outside(shards.units)
        watch(shards)
        shards.share = share
    try:
        run_backward(frames, loss, share=1.0 if handles else share)
    except RuntimeError as error:
        if "device meta" in str(error):
            raise outside(handles[0].units) from error
        raise
    for shards in handles:
        if not shards.sync:
            separate(slot for slot in map(gathered, shards.params) if slot is not None)


def inner_backward() -> CapabilityError:
    """The error for a backward pass inside the loss function, after which FSDP has let all units go."""
    return CapabilityError(
        "the loss function ran a backward pass of its own (torch.autograd.grad, or .backward()), after which fsdp has"
        " let its units go. Derivatives inside a loss need strategy=ff.strategies.fsdp(units=None), which gathers the"
        ' whole model at once, or "functional", or "ddp". A first one with respect to inputs can be computed before:'
        " torch.autograd.grad over ff.apply(rt, model, x)."
    )


def mixed_dtypes(strategy: str = "fsdp") -> CapabilityError:
    """The error for a normalisation on a CPU, whose kernels take low weights with low inputs alone."""
    return CapabilityError(
        f"a normalisation got weights in the low dtype in which {strategy} gathered them and an input in float32, which"
        " the kernels of the CPU do not take. Write"
        f" strategy=ff.strategies.{strategy}(gather_dtype=torch.float32), which sends twice the"
        " bytes, or let the input of the net be in the low dtype."
    )


def refuse_transform() -> None:
    """Functions of torch.func do not see the gathering."""
    raise CapabilityError(
        "a torch.func transform cannot go through a strategy whose parameters are gathered in hooks. Write"
        ' strategy="functional", or use ff.gather_params and torch.func.functional_call.'
    )
