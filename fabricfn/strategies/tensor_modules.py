"""A net whose sub-modules compute on tensor-parallel peers: the plan carried out by torch's `parallelize_module`."""

import functools
from collections.abc import Callable, Collection
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    parallelize_module,
)

from fabricfn import flat
from fabricfn.engine import named_modules
from fabricfn.errors import ConfigurationError, GradientError
from fabricfn.sharding import is_sharded
from fabricfn.strategies.tensor_plans import Plan, assigned
from fabricfn.tree import tree_map


class Around(ParallelStyle):
    """Whole weights; the input is cut along a dimension, and the output is, if the input came so; else all is whole."""

    def __init__(self, dim: int | None) -> None:
        super().__init__()
        self.placement = Replicate() if dim is None else Shard(dim)

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        placements = (self.placement,)
        came_cut = False

        def enter(_: nn.Module, args: tuple[Any, ...], mesh: DeviceMesh) -> Any:
            nonlocal came_cut
            came_cut = any(map(is_sharded, args))
            place: Callable[[Any], Any] = functools.partial(placed, mesh=mesh, placements=placements)
            return tree_map(place, args)

        def leave(_: nn.Module, result: Any, mesh: DeviceMesh) -> Any:
            return result if came_cut and self.placement.is_shard() else plain(result)

        made: Any = distribute_module(module, device_mesh, None, cast("Any", enter), cast("Any", leave))
        return made


class Colwise(ColwiseParallel):
    """torch's, which takes an input as it is placed, and may then move the weight in place of it."""

    @staticmethod
    def _prepare_input_fn(
        input_layouts: Any, desired_input_layouts: Any, mod: Any, inputs: Any, device_mesh: DeviceMesh
    ) -> Any:
        return placed(inputs[0], device_mesh, desired_input_layouts)


def placed(leaf: Any, mesh: DeviceMesh, placements: Any) -> Any:
    """A DTensor so placed; what is plain is whole. Other leaves are themselves."""
    if not isinstance(leaf, torch.Tensor):
        return leaf
    made: Any = leaf if is_sharded(leaf) else DTensor.from_local(leaf, mesh, (Replicate(),), run_check=False)
    return made.redistribute(placements=placements, async_op=True)


STYLES: dict[str, Callable[[], ParallelStyle]] = {
    "colwise": lambda: Colwise(output_layouts=Shard(-1), use_local_output=False),
    "colwise_gathered": lambda: Colwise(output_layouts=Replicate()),
    "rowwise": lambda: RowwiseParallel(input_layouts=Replicate(), output_layouts=Replicate()),
    "rowwise_scattered": lambda: RowwiseParallel(
        input_layouts=Replicate(), output_layouts=Shard(1), use_local_output=False
    ),
    "sequence": lambda: Around(1),
    "replicate": lambda: Around(None),
}
"""word -> torch's style; see [Note: words]."""


def plain(tree: Any) -> Any:
    """The tree with whole plain tensors in place of tensors that are cut over tensor-parallel peers."""

    def whole(leaf: Any) -> Any:
        return no_view(leaf.full_tensor()) if is_sharded(leaf) and leaf.device_mesh.ndim == 1 else leaf

    return whole(tree) if isinstance(tree, torch.Tensor) else tree_map(whole, tree)


def no_view(tensor: torch.Tensor) -> torch.Tensor:
    """What leaves a DTensor is a view, for autograd, and FSDP wants none to leave its units."""
    return tensor.clone() if tensor._is_view() else tensor


def leave(module: nn.Module, args: Any, result: Any) -> Any:
    """A forward hook: what the module returns is no view."""
    return no_view(result) if isinstance(result, torch.Tensor) else result


def compare_once(module: nn.Module, name: str, mesh: DeviceMesh) -> None:
    """Let the first call of a module look whether all peers gave it the same; see [Note: words]."""
    if mesh.size() == 1:
        return

    def compare(_: nn.Module, args: tuple[Any, ...]) -> None:
        handle.remove()
        found = args[0].detach() if args and isinstance(args[0], torch.Tensor) else torch.zeros(())
        if is_sharded(found):
            return
        flat_ = found.flatten().to(torch.float64) if found.device.type != "mps" else found.flatten().float()
        waves = torch.arange(found.numel(), device=found.device).to(flat_.dtype).cos()
        words = [flat_.new_tensor(found.numel()), flat_.abs().sum(), flat_.sum(), (flat_ * waves).sum()]
        (rows,) = flat.all_gather([torch.stack(words)], mesh.get_group())
        if bool(((rows - rows[0]).abs() > 1e-5 * rows[0, 1].abs()).any()):
            raise GradientError(
                f"tensor-parallel peers work on one batch, but they gave {name} different inputs (seen on global rank"
                f" {dist.get_rank()}). Give them the same data (cut it by rt.rank of rt.world_size, or use"
                " ff.setup_dataloader) and the same random numbers (rng=ff.key(...))."
            )

    handle = module.register_forward_pre_hook(compare)


def parallelise(net: nn.Module, plan: Plan, mesh: DeviceMesh) -> None:
    """Carry the plan out on a net without values.

    Raises:
        ConfigurationError: see `assigned`; or the plan would part tied weights, or a function of the user's did
            something else than cutting parameters.
    """
    before = [(module, name, slot) for _, module in named_modules(net) for name, slot in module._parameters.items()]
    names = [name for name, _ in net.named_parameters()]
    if not callable(plan):
        chosen = assigned(net, plan, mesh.size())
        styles = {name: STYLES[what]() if isinstance(what, str) else what for name, what in chosen.items()}
        for name, style in styles.items():
            module = net.get_submodule(name)
            if isinstance(chosen[name], str):
                compare_once(module, name, mesh)
            parallelize_module(module, mesh, style, src_data_rank=None)
    elif plan(net, mesh) is not net:
        raise ConfigurationError(
            "the function given as plan= must change the module that it gets and return it, as torch's"
            " parallelize_module does: the model is already placed around it."
        )
    _tie(before)
    after = [name for name, _ in net.named_parameters()]
    if after != names:
        raise ConfigurationError(
            f"the plan changed the parameters' names: {', '.join(sorted({*after} ^ {*names})[:8]) or 'their order'}. A"
            " plan may only cut parameters (distribute_tensor, parallelize_module); build the module as it shall be."
        )


def _tie(before: list[tuple[nn.Module, str, Any]]) -> None:
    """Make parameters that were one object one object again: torch cuts each place by itself."""
    first: dict[int, tuple[nn.Module, str]] = {}
    for module, name, old in before:
        if old is None or id(old) not in first:
            first[id(old)] = (module, name)
            continue
        home, other = first[id(old)]
        one: Any = home._parameters.get(other)
        two: Any = module._parameters.get(name)
        if one is two:
            continue
        if is_sharded(one) is not is_sharded(two) or (is_sharded(one) and one.placements != two.placements):
            raise ConfigurationError(
                f"{type(home).__name__}.{other} and {type(module).__name__}.{name} are one parameter (tied weights),"
                f" but the plan cuts them differently: {_cut(one)} and {_cut(two)}. Give both modules words that cut"
                ' alike: an Embedding "rowwise" and a Linear "colwise" are both cut along the vocabulary.'
            )
        module._parameters[name] = one


def _cut(slot: Any) -> str:
    return f"{list(slot.placements)}" if is_sharded(slot) else "not at all"


def give_memory(net: nn.Module, device: torch.device, but: Collection[int] = ()) -> None:
    """Memory in place of meta tensors, but for these (by their ids); tied parameters stay one."""
    made: dict[int, nn.Parameter] = {}
    for _, module in named_modules(net):
        for name, slot in module._parameters.items():
            if slot is not None and slot.is_meta and id(slot) not in but:
                if id(slot) not in made:
                    made[id(slot)] = nn.Parameter(torch.empty_like(slot, device=device), slot.requires_grad)
                module._parameters[name] = made[id(slot)]
