"""Tensors that no process group carries go over the host.

[Note: over the host] gloo takes tensors of the CPU, and a tensor of an XLA device has no memory that one could show to
anybody. So the list comes to the host, travels there, and the results go back. `World.wire` says so for single numbers.
"""

import functools
import sys
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch

from fabricfn.tree import tree_leaves, tree_map

F = TypeVar("F", bound=Callable[..., Any])


def over_the_host(run: F) -> F:
    """A function of lists of tensors on one device, the first argument, that returns such a list."""

    @functools.wraps(run)
    def call(tensors: Any, *args: Any, **options: Any) -> Any:
        if "torch_xla" not in sys.modules:
            return run(tensors, *args, **options)
        homes = [leaf.device for leaf in tree_leaves(tensors) if isinstance(leaf, torch.Tensor)]
        if not homes or homes[0].type != "xla":
            return run(tensors, *args, **options)
        return [one.to(homes[0]) for one in run(tree_map(_on_the_host, tensors), *args, **options)]

    return cast("F", call)


def _on_the_host(leaf: Any) -> Any:
    return leaf.cpu() if isinstance(leaf, torch.Tensor) else leaf
