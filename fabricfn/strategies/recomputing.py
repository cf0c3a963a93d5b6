"""Activation checkpointing: some sub-modules compute their forward pass again in the backward pass, instead of keeping
what it needs.

The forward of a sub-module of ours is replaced, not the sub-module: names, hooks and units stay. What a forward pass
changes in buffers (BatchNorm's statistics) it changes once: the second pass starts from copies of what the first one
found, and what it does to them is dropped.
"""

import contextlib
import functools
from collections.abc import Callable, Generator, Iterable, Sequence
from typing import Any, cast

import torch
from torch import nn
from torch.utils import checkpoint

from fabricfn.engine import named_modules
from fabricfn.errors import ConfigurationError
from fabricfn.strategies.units import Units, chosen

Held = tuple[dict[str, torch.Tensor | None], str, torch.Tensor]
"""A module's dict of buffers, a name in it, and what stood there."""

_checkpoint: Any = cast("Any", checkpoint).checkpoint


def planned(net: nn.Module, modules: Units) -> tuple[str, ...]:
    """The names of the sub-modules that `activation_checkpointing=modules` means.

    Raises:
        ConfigurationError: it chooses none, or one that has no forward.
    """
    names = chosen(net, modules, "activation_checkpointing", "what is computed again is a forward pass")
    if modules is not None and not names:
        raise ConfigurationError(
            f"activation_checkpointing={modules!r} chooses no module with parameters of this net, a"
            f" {type(net).__name__}. Name the class of its blocks, or a predicate (name, module) -> bool."
        )
    return names


def recompute(net: nn.Module, names: Iterable[str]) -> None:
    """Let these sub-modules of `net` compute again in the backward pass; all others as they were written."""
    for _, module in named_modules(net):
        replaced: Any = vars(module).get("forward")
        if isinstance(replaced, functools.partial) and replaced.func is twice:
            del module.forward
            if replaced.args[1] is not None:
                module.forward = replaced.args[1]
    for name in names:
        module = net.get_submodule(name)
        # a partial, since a deep copy of the module turns it into that of the copy
        module.forward = functools.partial(twice, module, vars(module).get("forward"))


def twice(module: nn.Module, own: Callable[..., Any] | None, *args: Any, **kwargs: Any) -> Any:
    """The forward of the module's class, or its `own` one, under activation checkpointing."""
    forward = own or functools.partial(type(module).forward, module)
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    held: list[Held] = [
        (part._buffers, name, buffer.detach().clone())
        for part in module.modules()
        for name, buffer in part._buffers.items()
        if buffer is not None
    ]
    if held:
        kwargs["context_fn"] = functools.partial(both, held)
    return _checkpoint(forward, *args, use_reentrant=False, **kwargs)


def both(
    held: Sequence[Held],
) -> tuple[contextlib.AbstractContextManager[None], contextlib.AbstractContextManager[None]]:
    """The contexts of the first pass and of the second."""
    return contextlib.nullcontext(), as_before(held)


@contextlib.contextmanager
def as_before(held: Sequence[Held]) -> Generator[None]:
    """Copies of what the buffers were, in their places."""
    now = [(place, name, cast("torch.Tensor", place[name])) for place, name, _ in held]
    for place, name, old in held:
        place[name] = old.clone()
    try:
        yield
    finally:
        for place, name, new in now:
            place[name] = new
