"""Tensor parallel: layers cut over neighbouring ranks, which work on one batch; over the other axis, data parallel.

Laws and traps: docs/decisions/0013-model-parallel.md.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from fabricfn.engine import Frame
from fabricfn.errors import CapabilityError, ConfigurationError
from fabricfn.meshes import arranged, axes_of
from fabricfn.precision import Precision
from fabricfn.strategies import sharded
from fabricfn.strategies.fsdp_options import Cutting, check, divided, refuse_alone
from fabricfn.strategies.sharded_nets import attach_box
from fabricfn.strategies.shards import Shards, gradients as sharded_gradients
from fabricfn.strategies.single import backward as run_backward, gradients as take
from fabricfn.strategies.tensor_modules import give_memory, parallelise, plain
from fabricfn.strategies.tensor_plans import Plan, assigned, check_plan
from fabricfn.strategies.tensor_rules import rules_of_ours
from fabricfn.strategies.tensor_slots import Peers, alike, compare, describe, look_at, means
from fabricfn.strategies.torch_fsdp import check_version, widen
from fabricfn.strategy import Strategy
from fabricfn.world import World


def model_parallel(
    plan: Plan, *, tensor_parallel: int | None = None, fsdp: bool | Mapping[str, Any] = False
) -> Strategy:
    """Layers cut over `tensor_parallel` neighbouring ranks by torch's `parallelize_module`; data parallel elsewhere.

    The ranks are a mesh with the axes "dp" and "tp" (`rt.mesh`). `rt.rank`, `rt.world_size`, means, and the data that a
    rank gets are those of the axis "dp": tensor-parallel peers have one rank, get one batch, draw the same random
    numbers from one key, and return the same loss; so the training code does not change. `rt.global_rank` is the number
    of the process; printing and saving go by it. Collectives take `axis="tp"` and `axis="dp"`.

    The words of a plan, each with what its module returns:

    * "colwise" (Linear, Embedding): the outputs are cut; a DTensor of the global shape. Losses of logits that are cut
      so, cross entropy among them, work on the parts.
    * "rowwise" (Linear, Embedding): the inputs (the vocabulary) are cut, the terms summed; a whole tensor.
    * "colwise_gathered": as "colwise", then gathered; a whole tensor.
    * "rowwise_scattered": as "rowwise", but each peer gets the sums for a part of dim 1, the sequence; a DTensor.
    * "sequence" (a normalisation, a dropout): computes on parts of dim 1 of its input; a tensor such as it got.
    * "replicate": whole weights, for a module that gets a DTensor; a whole tensor.

    What the plan does not name stays whole on every peer and takes whole tensors.

    Args:
        plan: pattern of module names -> word, or a ParallelStyle of torch (see [Note: words] for what that means); or a
            function `(module, mesh) -> module` that cuts a module without values in place over the one axis of `mesh`.
        tensor_parallel: how many ranks share a batch; None is all ranks of a node.
        fsdp: cut parameters, gradients and optimizer state over the data axis, too (2-D), by torch's `fully_shard`:
            True, or a dict of options of `ff.strategies.fsdp` (all but `replicate`).

    Raises:
        ConfigurationError: no plan, or no such option; or (when the runtime is made) the ranks cannot be laid out so;
            or (in `setup_model`) the plan does not fit the module.

    Example:
        >>> model_parallel({"*.up": "colwise", "*.down": "rowwise"}, tensor_parallel=2).name
        'model_parallel'
    """
    check_plan(plan)
    cutting = cutting_of(fsdp)

    def attach(net: nn.Module, world: World, precision: Precision, *, frozen: bool) -> Shards | Peers | None:
        if cutting is not None and world.group is None:
            refuse_alone(cutting.cpu_offload, world.device)
        if world.whole.group is None:
            if not callable(plan):
                assigned(net, plan, 1)
            return None
        mesh = mesh_of(world)
        parallelise(net, plan, mesh["tp"])
        peers = Peers(mesh.get_group("tp") if mesh.size(1) > 1 else None, precision.reduce_dtype)
        if cutting is None or world.group is None:
            give_memory(net, world.device)
            describe(net.parameters(), mesh)
            return peers
        handle = attach_box(net, world, precision, cutting, mesh["dp"], frozen=frozen)
        describe([slot for slot, own in zip(net.parameters(), handle.params, strict=True) if own is None], mesh)
        widen(handle.params, mesh)
        handle.peers = peers
        return handle

    return Strategy(
        name="model_parallel",
        attach=attach,
        forward=forward,
        backward=backward,
        gradients=gradients if cutting is None else divided(gradients, cutting.gradient_divide_factor),
        point=point,
        reset=reset,
        shard=sharded.shard,
        check_transform=refuse_transform,
        arrange=functools.partial(arrange, tensor_parallel=tensor_parallel),
    )


def cutting_of(fsdp: bool | Mapping[str, Any]) -> Cutting | None:
    """The options of fsdp, checked; None without it."""
    if not isinstance(fsdp, Mapping):
        return Cutting() if fsdp else None
    check_version()
    names = [field.name for field in dataclasses.fields(Cutting)]
    if unknown := [name for name in fsdp if name not in names]:
        raise ConfigurationError(
            f"model_parallel(fsdp={{{unknown[0]!r}: ...}}): there is no such option here. There are {', '.join(names)}."
        )
    cutting = Cutting(**fsdp)
    check(cutting)
    if type(cutting.reshard_after_forward) is int:
        raise ConfigurationError(
            "reshard_after_forward of model_parallel is True or False: torch keeps larger parts of units only where all"
            " ranks are one axis."
        )
    return cutting


def arrange(world: World, *, tensor_parallel: int | None) -> World:
    """The world in terms of its data axis, with a mesh of "dp" and "tp"."""
    peers = world.local_world_size if tensor_parallel is None else tensor_parallel
    if peers < 1 or world.world_size % peers:
        raise ConfigurationError(
            f"model_parallel(tensor_parallel={tensor_parallel}) wants groups of {peers} ranks, but there are"
            f" {world.world_size}. Start a multiple of {peers} (devices=...), or choose a divisor of that number."
        )
    if world.group is None:
        return world
    return arranged(world, {"dp": world.world_size // peers, "tp": peers}, data="dp")


def mesh_of(world: World) -> Any:
    """The mesh that `arrange` has made."""
    if axes_of(world) != ("dp", "tp"):
        raise ConfigurationError(
            "model_parallel lays the ranks out when the runtime is made, and this runtime was made for another"
            " strategy. Write ff.init_runtime(strategy=ff.strategies.model_parallel(...)) instead of replacing the"
            " strategy of a Runtime."
        )
    return world.mesh


def peers_of(frame: Frame) -> Peers | None:
    """What tensor parallelism keeps of a frame; None on one rank."""
    handle: Any = frame.handle
    return handle if isinstance(handle, Peers) or handle is None else handle.peers


def is_cut(frames: Sequence[Frame]) -> bool:
    """Whether FSDP cuts the parameters, too."""
    return any(isinstance(frame.handle, Shards) for frame in frames)


def rules(frames: Sequence[Frame]) -> contextlib.AbstractContextManager[None]:
    """The context in which operations on parts are right."""
    return rules_of_ours() if any(map(peers_of, frames)) else contextlib.nullcontext()


def forward(frames: Sequence[Frame], fn: Callable[..., Any], *, sync: bool, loss_fn: Any) -> Any:
    """`fn` of the nets; what it returns is whole."""

    def whole(*nets: nn.Module) -> Any:
        with refusing(frames):
            return plain(fn(*nets))

    with rules(frames):
        if is_cut(frames):
            return sharded.forward(frames, whole, sync=sync, loss_fn=loss_fn)
        return whole(*[frame.net for frame in frames])


@contextlib.contextmanager
def refusing(frames: Sequence[Frame]) -> Generator[None]:
    """Turns torch's error for an operation that it has no way to do on parts into ours."""
    try:
        yield
    except IndexError as error:
        error.add_note(
            "(Under model_parallel torch's own styles hand out parts as plain tensors, which losses take for the whole:"
            ' give the layer that makes logits the word "colwise".)'
        )
        raise
    except (RuntimeError, NotImplementedError) as error:
        if not any(word in str(error) for word in ("DTensor", "harding ", "sharded tensor")):
            raise
        hint = " With fsdp, use the weights of a unit inside its forward, or ff.unsharded." if is_cut(frames) else ""
        raise CapabilityError(
            f"an operation cannot work on a tensor that the plan has cut: {str(error)[:300]}. After a module that is"
            ' "colwise", outputs are cut until one that is "rowwise": in between use operations that DTensor knows,'
            " whose other arguments are numbers or DTensors, too, and cut heads so that tensor_parallel divides their"
            ' number; or take the whole: y.full_tensor(), or "colwise_gathered" for that module, or "replicate" for the'
            f" module in between.{hint}"
        ) from error


def backward(frames: Sequence[Frame], loss: torch.Tensor, *, share: float) -> None:
    """Accumulate into the slots' `.grad`, or into FSDP's."""
    peers = peers_of(frames[0])
    if peers is not None and peers.unchecked:
        peers.loss = loss.detach()
    with rules(frames), refusing(frames):
        (sharded.backward if is_cut(frames) else run_backward)(frames, loss, share=share)


def gradients(frames: Sequence[Frame], world: World, *, allow_unused: bool) -> list[list[torch.Tensor | None]]:
    """The means over the data axis. What every peer holds whole is averaged over the peers as well.

    These have computed the same there, but for rounding on accelerators; so their copies never drift apart.
    """
    peers = peers_of(frames[0])
    if peers is None:
        return take(frames, world, allow_unused=allow_unused)
    if not is_cut(frames):
        return means(frames, world, peers, allow_unused)
    taken = sharded_gradients(frames, world, allow_unused=allow_unused)
    if peers.unchecked:
        compare(frames, taken, peers)
    return alike(taken, peers)


def point(frame: Frame, values: Sequence[torch.Tensor]) -> None:
    """Let the slots look at the values' parts."""
    if isinstance(frame.handle, Shards):
        sharded.point(frame, values)
        return
    for slot, value, name in zip(frame.slots, values, frame.names, strict=True):
        look_at(slot, value, name)


def reset(frame: Frame) -> None:
    """After an exception: FSDP's traces go; modules that compute on parts keep none."""
    if isinstance(frame.handle, Shards):
        sharded.reset(frame)


def refuse_transform() -> None:
    """Functions of torch.func know nothing of parts."""
    raise CapabilityError(
        "a torch.func transform cannot go through model_parallel, whose layers talk to other ranks. Write"
        ' strategy="functional", or use ff.gather_params and torch.func.functional_call.'
    )
