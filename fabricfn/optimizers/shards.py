"""Optimizers over DTensors: which may work on the parts of this rank, and the way from DTensors to parts and back.

An optimizer that works number by number gives on the parts what it gives on the whole tensors: the same bits, or those
of torch's fused kernels, which round the last numbers of a tensor, those that fill no vector, by other instructions.

Others could run on the DTensors themselves, but not safely (torch 2.13): `.item()` of a sum is that of the part,
without an error, Adafactor raises in its row norms, Muon where a part is uneven. They are refused.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fabricfn.errors import CapabilityError, ConfigurationError, GradientError, ModelError
from fabricfn.sharding import any_sharded, hollow, is_sharded, local_of, same_placement, sharded_as, with_local
from fabricfn.states import Plan

NUMBER_BY_NUMBER: frozenset[type] = frozenset(
    {
        torch.optim.Adadelta,
        torch.optim.Adagrad,
        torch.optim.Adam,
        torch.optim.AdamW,
        torch.optim.Adamax,
        torch.optim.ASGD,
        torch.optim.NAdam,
        torch.optim.RAdam,
        torch.optim.RMSprop,
        torch.optim.Rprop,
        torch.optim.SGD,
    }
)
"""By exact class; a sub-class of the user's may do anything."""

_COUNTERS = frozenset({"step", "eta", "mu", "mu_product"})
"""The slots of these classes that hold one number and not one for each number of the parameter."""


def likes_of(values: Sequence[Any]) -> tuple[Any, ...] | None:
    """The DTensors among the values without their memory, by position; None if there are none."""
    return tuple(hollow(value) if is_sharded(value) else None for value in values) if any_sharded(values) else None


_WHOLE: tuple[tuple[type, str], ...] = (
    (torch.optim.LBFGS, "all gradients in one vector"),
    (torch.optim.Muon, "whole matrices"),
    (torch.optim.Adafactor, "the means of whole rows and columns"),
    (torch.optim.SparseAdam, "sparse gradients"),
)
"""What no promise can change."""

_IN_BLOCKS = re.compile("4bit|8bit|Fp8")
"""The names of optimizers, torchao's and bitsandbytes', whose state is packed: numbers of a block share a scale."""


def check_elementwise(optimizer: Any, *, promised: bool) -> None:
    """Raise `CapabilityError` unless an optimizer works number by number, by what is known or promised."""
    kind: Any = optimizer if isinstance(optimizer, type) else type(optimizer)
    needs = [need for known, need in _WHOLE if issubclass(kind, known)]
    if _IN_BLOCKS.search(kind.__name__):
        needs = ["whole blocks of numbers, which share a scale"]
    for need in needs:
        raise CapabilityError(
            f"{kind.__name__} cannot work where parameters, or its own state, are sharded: it needs {need}. Use a"
            ' strategy that keeps whole tensors, strategy="ddp", or another optimizer: torch.optim.AdamW.'
        )
    hooked = any(getattr(optimizer, f"_optimizer_step_{when}_hooks", None) for when in ("pre", "post"))
    if promised or (kind in NUMBER_BY_NUMBER and not hooked):
        return
    what = f"{kind.__name__} with hooks" if hooked else kind.__name__ if kind is not tuple else "this pair"
    raise CapabilityError(
        f"each rank steps a part of each parameter here, and {what} may look at more than one number at a time, which a"
        " part cannot show. If it updates every number by itself, say so: setup_optimizer(..., elementwise=True). If it"
        ' does not, use a strategy that keeps whole tensors: strategy="ddp".'
    )


def parts_of_params(plan: Plan, params: Sequence[Tensor]) -> list[Tensor]:
    """The part of this rank of each parameter.

    Raises:
        ModelError: a parameter is placed otherwise than the one that the optimizer was set up for.
    """
    wrong = _misplaced(plan, params)
    if wrong is not None:
        raise ModelError(f"{wrong}. Set up an optimizer for this Model, or place the parameter as it was.")
    return [local_of(param) for param in params]


def parts_of_grads(plan: Plan, grads: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The part of this rank of each gradient.

    Raises:
        GradientError: a gradient is placed otherwise than its parameter.
    """
    wrong = _misplaced(plan, grads)
    if wrong is not None:
        raise GradientError(
            f"the gradient of {wrong}. A step works on this rank's parts, which must fit together: write"
            " grad.redistribute(placements=param.placements)."
        )
    return [local_of(grad) for grad in grads]


def _misplaced(plan: Plan, values: Sequence[Any]) -> str | None:
    """What is wrong with the first value that is placed otherwise than its parameter."""
    assert plan.likes is not None
    names = (name for names in plan.names for name in names)
    for name, like, value in zip(names, plan.likes, values, strict=True):
        if value is None or (like is None and not is_sharded(value)):
            continue
        if like is None or not is_sharded(value) or not same_placement(like, value):
            return f"{name} is {_described(value)}; the optimizer was set up for {_described(like)}"
    return None


def _described(value: Any) -> str:
    if not is_sharded(value):
        return "a plain tensor" if value is None else f"a plain tensor of shape {tuple(value.shape)}"
    return f"a DTensor of shape {tuple(value.shape)}, {list(value.placements)} on {value.device_mesh}"


def shown(like: Any, slot: str, value: Any) -> Any:
    """A value of the state as its owner sees it: a DTensor, where it is a part as the parameter's is."""
    if like is None or slot in _COUNTERS or type(value) is not Tensor:
        return value
    return with_local(like, value) if value.shape == like._local_tensor.shape else value


def taken(plan: Plan, position: int, slot: str, value: Any, name: str) -> Any:
    """A value of the state as the plan keeps it: the part, from a DTensor or from a whole tensor that all ranks have.

    Raises:
        ConfigurationError: it is placed otherwise than the parameter, or has another shape.
    """
    like = None if plan.likes is None else plan.likes[position]
    if like is None or slot in _COUNTERS or not isinstance(value, Tensor):
        return value
    if not is_sharded(value) and value.shape not in (like.shape, like._local_tensor.shape):
        return value  # no part: a number for the whole parameter; or wrong, which the step finds out
    placed: Any = sharded_as(like, value) if not is_sharded(value) and value.shape == like.shape else value
    if not is_sharded(placed) or not same_placement(like, placed):
        raise ConfigurationError(
            f"the optimizer state {slot} of {name} is {_described(value)}; expected is {_described(like)}."
            " Write value.redistribute(placements=param.placements), or hand over the whole tensor."
        )
    return local_of(placed)


def taken_row(plan: Plan, position: int, row: Mapping[str, Any], name: str) -> dict[str, Any]:
    """`taken` on the state of one parameter, slot -> value."""
    return {slot: taken(plan, position, slot, value, name) for slot, value in row.items()}
