"""A net cut by torch's `fully_shard`: over which mesh, along which dimensions, in which units."""

import dataclasses
import functools
from typing import Any, Literal

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard

from fabricfn.engine import Box
from fabricfn.errors import CapabilityError, ConfigurationError
from fabricfn.meshes import arranged, axes_of
from fabricfn.precision import Precision
from fabricfn.sharding import REACHED, is_sharded
from fabricfn.strategies import fsdp_options
from fabricfn.strategies.fsdp_options import Cutting
from fabricfn.strategies.shards import Shards
from fabricfn.strategies.tensor_modules import give_memory, leave
from fabricfn.strategies.torch_fsdp import empty, gather_ahead, shard_slots
from fabricfn.strategies.units import plan
from fabricfn.world import World


def arrange(world: World, *, replicate: int | Literal["nodes"]) -> World:
    """The world with a mesh of two axes, where there is more than one group."""
    groups = world.num_nodes if replicate == "nodes" else replicate
    if groups < 1 or world.world_size % groups:
        raise ConfigurationError(
            f"fsdp(replicate={replicate!r}) cuts the ranks into {groups} groups of one size, but there are"
            f" {world.world_size} ranks. Choose a divisor of that; 1 is plain fsdp."
        )
    if groups == 1 or world.group is None:
        return world
    return arranged(world, {"replicate": groups, "shard": world.world_size // groups})


def mesh_of(world: World, replicate: int | Literal["nodes"]) -> DeviceMesh:
    """The mesh over which parameters are cut."""
    if world.everyone is not None:
        raise ConfigurationError(
            "fsdp cuts parameters over all ranks, and this runtime was made for a strategy whose ranks are a mesh of"
            f" {', '.join(axes_of(world))}. Write ff.init_runtime(strategy=ff.strategies.fsdp(...)) instead of"
            " replacing the strategy of a Runtime."
        )
    assert world.group is not None
    mesh = arrange(dataclasses.replace(world, mesh=None), replicate=replicate).mesh
    return mesh or DeviceMesh.from_group(world.group, world.device.type, mesh_dim_names=("dp",))


def attach_box(
    net: nn.Module, world: World, precision: Precision, cutting: Cutting, mesh: DeviceMesh, *, frozen: bool
) -> Shards:
    """Cut the parameters of a net over a mesh, in a box around it; the net may have no values yet."""
    gather = cutting.gather_dtype or (precision.compute_dtype if precision.autocast else None)
    size = mesh.size(mesh.ndim - 1)

    def placement(slot: nn.Parameter) -> Shard | None:
        return None if not is_sharded(slot) else Shard(cut_along(slot, size) or 0)

    ignored = fsdp_options.kept_whole(net, cutting.ignored_params)
    options: dict[str, Any] = {
        "mesh": mesh,
        "ignored_params": ignored | {slot for slot in net.parameters() if cut_along(slot, size) is None},
        "shard_placement_fn": placement,
        "offload_policy": fsdp_options.offload_policy(cutting.cpu_offload, world.device),
        "mp_policy": MixedPrecisionPolicy(
            param_dtype=gather,
            reduce_dtype=precision.reduce_dtype or (None if gather is None else precision.param_dtype),
            cast_forward_inputs=False,
        ),
    }
    fsdp_options.check_reshard(cutting.reshard_after_forward, size)
    box, names = Box(net), plan(net, cutting.units)
    for name in reversed(names):
        again = True if frozen else cutting.reshard_after_forward
        unit = net.get_submodule(name)
        if any(map(is_sharded, unit._parameters.values())):  # a layer that tensor parallelism has cut, by itself
            unit.register_forward_hook(leave)
        fully_shard(unit, reshard_after_forward=again, **options)
    # a frozen root is let go, too: no backward pass follows that would do so, and it would go stale
    fully_shard(box, reshard_after_forward=True if frozen else None, **options)
    fsdp_options.settle(box, names, world.device, cutting.gradient_divide_factor, cutting.prefetch)
    return tied(box, names, world.device, torch.device("cpu") if cutting.cpu_offload else world.device)


def cut_along(slot: Any, size: int) -> int | None:
    """The dimension along which a parameter is cut into `size` parts; None for one that stays whole.

    What tensor parallelism has cut already is cut along another dimension where that comes out even, since then nobody
    needs to put stretches together; else along the same, if that does. Its vectors (biases) stay as they are.
    """
    if not is_sharded(slot):
        return 0 if slot.dim() else None
    taken = {placement.dim for placement in slot.placements if placement.is_shard()}
    if slot.dim() == len(taken) == 1:
        return None
    for dim in sorted(range(slot.dim()), key=lambda dim: (dim in taken, dim)):
        if (dim == 0 and dim not in taken) or slot._local_tensor.shape[dim] % size == 0:
            return dim
    return None


def tied(box: Any, units: tuple[str, ...], device: torch.device, home: torch.device) -> Shards:
    """The handle of a box that is sharded already, with memory in place of meta tensors, that of shards at `home`."""
    made: dict[int, torch.Tensor] = {}

    def placed(tensor: torch.Tensor) -> torch.Tensor:
        return made.setdefault(id(tensor), torch.empty_like(tensor, device=home)) if tensor.is_meta else tensor

    give_memory(box, device, but=shard_slots(box))
    box._apply(placed)
    box.set_reduce_scatter_unused_params(True)
    if device.type == "cpu":
        gather_ahead(box)
    check_dtypes(box)
    params = shard_slots(box)
    empty(params.values())
    shards = Shards(box, units, [params.get(id(slot)) for slot in box.parameters()])
    for index, slot in enumerate(box.parameters()):
        setattr(slot, REACHED, functools.partial(shards.used.add, index))
    return shards


def check_dtypes(box: nn.Module) -> None:
    """Raise `CapabilityError` unless all trainable parameters have one dtype, which torch demands of each unit."""
    dtypes = {slot.dtype for slot in box.parameters() if slot.requires_grad and is_sharded(slot)}
    if len(dtypes) > 1:
        found = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
        raise CapabilityError(
            f"fsdp reduces the gradients of a unit together and needs trainable parameters of one dtype, found {found}."
            ' Convert the module first (module.float()), or write strategy="ddp".'
        )
