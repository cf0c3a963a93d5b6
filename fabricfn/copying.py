"""From the user's module to nets of ours: checked, copied, placed, cast."""

import copy
import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from fabricfn.engine import named_modules
from fabricfn.errors import ModelError
from fabricfn.precision import cast_floating
from fabricfn.runtimes import Runtime
from fabricfn.tree import tree_leaves


def check_module(module: nn.Module, *, may_be_meta: bool) -> None:
    """Refuse parameters that have no values yet, and what a copy would lose."""
    if torch.is_inference_mode_enabled():
        raise ModelError("setup_model was called inside torch.inference_mode, where nothing can be trained. Leave it.")
    hooked = [n for n, slot in module.named_parameters() if slot._backward_hooks or slot._post_accumulate_grad_hooks]
    if hooked:
        raise ModelError(
            f"parameters have hooks of their own, which values cannot carry: {', '.join(hooked[:8])}. Change the"
            " gradients that value_and_grad returns instead: ff.tree_map(f, grads)."
        )
    lazy = [name for name, slot in module.named_parameters() if nn.parameter.is_lazy(slot)]
    if lazy:
        raise ModelError(
            f"the module has uninitialised (lazy) parameters: {', '.join(lazy[:8])}. Run one batch through it before"
            " ff.setup_model, so that their shapes are known."
        )
    meta = [name for name, slot in module.named_parameters() if slot.is_meta]
    if meta and not may_be_meta:
        raise ModelError(
            f"the module has parameters without memory, on the meta device: {', '.join(meta[:8])}. Pass the factory"
            " itself, ff.setup_model(rt, factory), or make it with ff.init_module(rt, factory)."
        )


def uncompiled(module: nn.Module) -> tuple[nn.Module, bool]:
    """(the module itself, whether it was compiled): compiling comes last, after the copy."""
    if type(module).__name__ == "OptimizedModule":  # naming the class would import torch._dynamo: 0.9 s
        return module.get_submodule("_orig_mod"), True
    return module, module._compiled_call_impl is not None


def copy_module(
    module: nn.Module,
    place: Callable[[torch.Tensor], torch.Tensor],
    place_buffer: Callable[[torch.Tensor], torch.Tensor],
    *,
    frozen: bool = False,
) -> nn.Module:
    """A deep copy whose parameters are `place(original)`, and whose buffers are `place_buffer(original)`.

    Ties, hooks and parametrisations are kept; activations that a module keeps in attributes come without their graph.
    """
    slots = [
        nn.Parameter(place(slot.detach()), requires_grad=slot.requires_grad and not frozen)
        for slot in module.parameters()
    ]
    return copy_onto(module, slots, [place_buffer(buffer.detach()) for buffer in module.buffers()])


def copy_onto(module: nn.Module, slots: Iterable[torch.Tensor], buffers: Iterable[torch.Tensor]) -> nn.Module:
    """A deep copy with these tensors in place of its parameters and buffers."""
    memo: dict[int, Any] = {}
    for _, part in named_modules(module):
        for kept in vars(part).values():
            values: list[Any] = tree_leaves(kept) if isinstance(kept, (dict, list, tuple)) else [kept]
            for value in values:
                if isinstance(value, torch.Tensor) and value.grad_fn is not None:
                    memo[id(value)] = value.detach().clone()
    memo |= {id(old): new for old, new in zip(module.parameters(), slots, strict=True)}
    memo |= {id(old): new for old, new in zip(module.buffers(), buffers, strict=True)}
    return copy.deepcopy(module, memo)


def placing(rt: Runtime, *, move: bool, fresh: bool) -> Callable[[torch.Tensor], torch.Tensor]:
    """How a tensor of the user's module becomes ours: the device, the dtype; `fresh` memory when it must not alias."""
    dtype = None if rt.precision.autocast else rt.precision.param_dtype

    def place(tensor: torch.Tensor) -> torch.Tensor:
        wanted = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
        placed = tensor.to(rt.device if move else tensor.device, wanted)
        return placed.clone() if fresh and placed is tensor else placed

    return place


def add_casts(rt: Runtime, net: nn.Module) -> tuple[int, ...]:
    """Cast floating inputs where the net's own forward is entered, and outputs where it is left; the hooks' ids."""
    precision = rt.precision
    if precision.autocast:
        return ()
    ids = [net.register_forward_pre_hook(functools.partial(cast_inputs, precision.compute_dtype), with_kwargs=True).id]
    if precision.output_dtype is not None:
        ids.append(net.register_forward_hook(functools.partial(cast_outputs, precision.output_dtype)).id)
    return tuple(ids)


def cast_inputs(dtype: torch.dtype, net: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
    """A forward pre-hook; None leaves the arguments alone."""
    for value in (*args, *kwargs.values()):
        if type(value) is not torch.Tensor or value.dtype is not dtype:
            return cast_floating(args, dtype), cast_floating(kwargs, dtype)
    return None


def cast_outputs(dtype: torch.dtype, net: nn.Module, args: Any, output: Any) -> Any:
    """A forward hook."""
    return cast_floating(output, dtype)
