"""Activation checkpointing: what sub-modules keep for the backward pass, by policy.

Some compute their forward pass again in the backward pass instead, some keep it in the memory of the CPU. The forward
of a sub-module of ours is replaced, not the sub-module: names, hooks and units stay. What a forward pass changes in
buffers (BatchNorm's statistics) it changes once: the second pass starts from copies of what the first one found, and
what it does to them is dropped.
"""

import contextlib
import functools
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any, Literal, cast

import torch
from torch import nn
from torch.utils import checkpoint

from fabricfn.engine import named_modules
from fabricfn.errors import CapabilityError, ConfigurationError
from fabricfn.strategies.offloading import offloaded
from fabricfn.strategies.units import Units, chosen

Policy = Literal["recompute", "keep_matmuls", "offload"] | Callable[..., Any]
"""What a sub-module does with its activations; a function is a policy of `create_selective_checkpoint_contexts`."""
Checkpointing = Units | Mapping[Policy, Units]
"""Which sub-modules compute again, or which follow which policy."""
Held = tuple[dict[str, torch.Tensor | None], str, torch.Tensor]
"""A module's dict of buffers, a name in it, and what stood there."""

_torch: Any = cast("Any", checkpoint)
_NAMES = ("recompute", "keep_matmuls", "offload")
_MATMULS = (
    *("mm", "bmm", "addmm", "baddbmm", "_scaled_mm", "convolution"),
    *("_scaled_dot_product_flash_attention", "_scaled_dot_product_flash_attention_for_cpu"),
    *("_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention"),
)
"""Of torch.ops.aten: what costs most to compute again. torch takes apart everything else that multiplies matrices."""


def planned(net: nn.Module, given: Checkpointing, device: torch.device) -> dict[str, Policy]:
    """Name -> policy of the sub-modules that `activation_checkpointing=given` means.

    Raises:
        CapabilityError: the device is one of XLA, where torch cannot compute again with the same random numbers.
        ConfigurationError: there is no such policy; one chooses nothing, what has no forward, or what another has.
    """
    if device.type == "xla" and given is not None:
        raise CapabilityError(
            "activation_checkpointing does not work on XLA devices: torch cannot put their generator back for a second"
            " pass, and XLA decides by itself what it computes again. Leave it out, or use fewer rows at a time:"
            " ff.accumulate(rt, loss_fn)."
        )
    plan: dict[str, Policy] = {}
    policies = cast("Mapping[Policy, Units]", given if isinstance(given, Mapping) else {"recompute": given})
    for policy, modules in policies.items():
        if policy not in _NAMES and not callable(policy):
            raise ConfigurationError(
                f"activation_checkpointing has no policy {policy!r}; there are {', '.join(map(repr, _NAMES))}, and"
                " functions as torch.utils.checkpoint.create_selective_checkpoint_contexts takes them. Write"
                ' activation_checkpointing={"keep_matmuls": Block}.'
            )
        names = chosen(net, modules, "activation_checkpointing", "what is computed again is a forward pass")
        if modules is not None and not names:
            raise ConfigurationError(
                f"activation_checkpointing={modules!r} chooses no module with parameters of this net, a"
                f" {type(net).__name__}. Name the class of its blocks, or a predicate (name, module) -> bool."
            )
        twice = [name for name in names if name in plan]
        if twice:
            raise ConfigurationError(
                f"activation_checkpointing gives {twice[0] or 'the net'} two policies, {plan[twice[0]]!r} and"
                f" {policy!r}. A module has one; those inside of it may have another."
            )
        plan |= dict.fromkeys(names, policy)
    return plan


def recompute(net: nn.Module, plan: Mapping[str, Policy]) -> None:
    """Let these sub-modules of `net` follow their policies; all others as they were written."""
    for _, module in named_modules(net):
        replaced: Any = vars(module).get("forward")
        if isinstance(replaced, functools.partial) and replaced.func is sparing:
            del module.forward
            if replaced.args[1] is not None:
                module.forward = replaced.args[1]
    for name, policy in plan.items():
        module = net.get_submodule(name)
        # a partial, since a deep copy of the module turns it into that of the copy
        module.forward = functools.partial(sparing, module, vars(module).get("forward"), policy)


def sparing(module: nn.Module, own: Callable[..., Any] | None, policy: Policy, *args: Any, **kwargs: Any) -> Any:
    """The forward of the module's class, or its `own` one, under a policy."""
    forward = own or functools.partial(type(module).forward, module)
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    if policy == "offload":
        with offloaded(module):
            return forward(*args, **kwargs)
    held: list[Held] = [
        (part._buffers, name, buffer.detach().clone())
        for part in module.modules()
        for name, buffer in part._buffers.items()
        if buffer is not None
    ]
    if held or policy != "recompute":
        kwargs["context_fn"] = functools.partial(contexts, policy, held)
    return _torch.checkpoint(forward, *args, use_reentrant=False, **kwargs)


def contexts(
    policy: Policy, held: Sequence[Held]
) -> tuple[contextlib.AbstractContextManager[Any], contextlib.AbstractContextManager[Any]]:
    """The contexts of the first pass and of the second."""
    if policy == "recompute":
        return contextlib.nullcontext(), as_before(held)
    first, second = _torch.create_selective_checkpoint_contexts(keeps_matmuls if policy == "keep_matmuls" else policy)
    return first, as_before(held, second)


def keeps_matmuls(context: Any, op: Any, *args: Any, **kwargs: Any) -> Any:
    """The policy "keep_matmuls"."""
    kept = op.namespace == "aten" and op._schema.name.removeprefix("aten::") in _MATMULS
    return _torch.CheckpointPolicy.MUST_SAVE if kept else _torch.CheckpointPolicy.PREFER_RECOMPUTE


@contextlib.contextmanager
def as_before(held: Sequence[Held], kept: contextlib.AbstractContextManager[Any] | None = None) -> Generator[None]:
    """Copies of what the buffers were, in their places, and what a policy has `kept`."""
    now = [(place, name, cast("torch.Tensor", place[name])) for place, name, _ in held]
    for place, name, old in held:
        place[name] = old.clone()
    try:
        with kept or contextlib.nullcontext():
            yield
    except RuntimeError as error:
        if kept is None or "encountered during backward but not found" not in str(error):
            raise
        raise CapabilityError(
            "a policy of activation_checkpointing that keeps results finds them by their number, and the second pass of"
            " a module made other operations than the first: some module inside of it gathers its weights"
            " (deepspeed_stage_3; fsdp whose units are smaller), or computes something else each time. Write"
            ' activation_checkpointing={"recompute": ...}, or choose modules inside of which nothing is gathered.'
        ) from error
    finally:
        for place, name, new in now:
            place[name] = new
