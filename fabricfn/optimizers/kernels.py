"""AdamW, Adam, SGD and Adagrad by torch's fused kernels, called directly on prepared lists of tensors.

[Note: columns] The state of a bucket (parameters of one group, device and dtype) is a dict of columns: slot -> one
tensor per parameter. While all parameters have been stepped equally often, the column "step" is one `Counter`;
afterwards it is a list of tensors, which are never changed in place. A direct call costs 47 us for 80 tensors, where
the stock step costs 320 us (CPU).

[Note: layout] The kernels walk over memory: a gradient with other strides or another shape than its parameter gives
wrong numbers without an error (checked on CPU, torch 2.13). `fused.py` looks at that before every call.
"""

import dataclasses
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from fabricfn.errors import ConfigurationError
from fabricfn.optimizers import formulas
from fabricfn.states import Counter

Columns: TypeAlias = dict[str, Any]
Hyper: TypeAlias = Mapping[str, Any]

shape_of = operator.attrgetter("shape")
is_contiguous = Tensor.is_contiguous
_kernels: Any = torch
"""The fused kernels and the functions on lists of tensors have no types."""
_clones: Callable[[Sequence[Tensor]], Sequence[Tensor]] | None = getattr(torch, "_foreach_clone", None)


def clones(tensors: Sequence[Tensor]) -> list[Tensor]:
    """A copy of each tensor."""
    if not tensors:
        return []
    return list(_clones(tensors)) if _clones is not None else [tensor.clone() for tensor in tensors]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Kernel:
    """One optimizer: how its state starts, and one step of it on lists that fit together."""

    start: Callable[[Hyper, Sequence[Tensor]], Columns]
    """(hyperparameters, parameters) -> the columns before the first step."""
    step: Callable[[Hyper, Any, Any, Columns], Columns]
    """(hyperparameters, parameters, gradients, columns) -> the next columns; works in place."""
    formula: Callable[[Hyper, Any, Any, Columns], Columns]
    """The same as `step`, to be traced."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Bucket:
    """Parameters of one group, one device and one dtype."""

    group: int
    index: tuple[int, ...]
    """Their positions."""
    whole: bool
    """Whether they are all the positions of the plan, in order."""
    shapes: list[torch.Size]
    strides: list[tuple[int, ...]]
    """The layout of parameters, gradients and state in which the kernel is called."""
    contiguous: bool
    """Whether all the strides are the usual ones."""
    dtype: torch.dtype
    device: torch.device
    names: tuple[str, ...]
    """For messages."""


def _start_adam(hyper: Hyper, params: Sequence[Tensor]) -> Columns:
    slots = ["exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if hyper["amsgrad"] else [])]
    return {"step": Counter(0, params[0].device), **{slot: [torch.zeros_like(p) for p in params] for slot in slots}}


def _start_adagrad(hyper: Hyper, params: Sequence[Tensor]) -> Columns:
    first = hyper["initial_accumulator_value"]
    return {"step": Counter(0, params[0].device), "sum": [torch.full_like(p, first) for p in params]}


def _start_sgd(hyper: Hyper, params: Sequence[Tensor]) -> Columns:
    return {}


def _counted(columns: Columns, count: int) -> tuple[Any, list[Tensor]]:
    """(the next counter column, it as a list)."""
    step = columns["step"]
    if type(step) is list:
        steps = list(_kernels._foreach_add(step, 1))
        return steps, steps
    step = step.next()
    return step, [step.tensor()] * count


def _step_adam(hyper: Hyper, params: Any, grads: Any, columns: Columns) -> Columns:
    step, steps = _counted(columns, len(params))
    beta1, beta2 = hyper["betas"]
    amsgrad = hyper["amsgrad"]
    kernel = _kernels._fused_adamw_ if hyper["decoupled_weight_decay"] else _kernels._fused_adam_
    kernel(
        params,
        grads,
        columns["exp_avg"],
        columns["exp_avg_sq"],
        columns["max_exp_avg_sq"] if amsgrad else [],
        steps,
        lr=hyper["lr"],
        beta1=beta1,
        beta2=beta2,
        weight_decay=hyper["weight_decay"],
        eps=hyper["eps"],
        amsgrad=amsgrad,
        maximize=hyper["maximize"],
    )
    return {**columns, "step": step}


def _step_adagrad(hyper: Hyper, params: Any, grads: Any, columns: Columns) -> Columns:
    step, steps = _counted(columns, len(params))
    _kernels._fused_adagrad_(
        params,
        grads,
        columns["sum"],
        steps,
        lr=hyper["lr"],
        lr_decay=hyper["lr_decay"],
        weight_decay=hyper["weight_decay"],
        eps=hyper["eps"],
        maximize=hyper["maximize"],
    )
    return {"step": step, "sum": columns["sum"]}


def _step_sgd(hyper: Hyper, params: Any, grads: Any, columns: Columns) -> Columns:
    if hyper["momentum"] == 0:
        _fused_sgd(hyper, params, grads, [], first=False)
        return columns
    buffers: list[Any] | None = columns.get("momentum_buffer")
    if buffers is None:
        buffers = [torch.empty_like(param) for param in params]
        _fused_sgd(hyper, params, grads, buffers, first=True)
    elif type(None) not in set(map(type, buffers)):
        _fused_sgd(hyper, params, grads, buffers, first=False)
    else:
        fresh = [i for i, buffer in enumerate(buffers) if buffer is None]
        started = [i for i, buffer in enumerate(buffers) if buffer is not None]
        buffers = [torch.empty_like(params[i]) if b is None else b for i, b in enumerate(buffers)]
        for some, first in ((fresh, True), (started, False)):
            if some:
                _fused_sgd(hyper, *([column[i] for i in some] for column in (params, grads, buffers)), first=first)
    return {"momentum_buffer": buffers}


def _fused_sgd(hyper: Hyper, params: Any, grads: Any, buffers: Any, *, first: bool) -> None:
    _kernels._fused_sgd_(
        params,
        grads,
        buffers,
        weight_decay=hyper["weight_decay"],
        momentum=hyper["momentum"],
        lr=hyper["lr"],
        dampening=hyper["dampening"],
        nesterov=hyper["nesterov"],
        maximize=hyper["maximize"],
        is_first_step=first,
    )


_ADAM = Kernel(start=_start_adam, step=_step_adam, formula=formulas.adam)
KERNELS: dict[type, Kernel] = {
    torch.optim.AdamW: _ADAM,
    torch.optim.Adam: _ADAM,
    torch.optim.SGD: Kernel(start=_start_sgd, step=_step_sgd, formula=formulas.sgd),
    torch.optim.Adagrad: Kernel(start=_start_adagrad, step=_step_adagrad, formula=formulas.adagrad),
}
"""By exact class; a sub-class of the user's may do anything."""

_DEVICES = ("cpu", "cuda", "mps", "xpu")
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


_HALVES = (torch.bfloat16, torch.float16)


def kernel_for(cls: type, groups: Sequence[Hyper], params: Sequence[Tensor]) -> Kernel | None:
    """The kernel that does what this class with these options does; None where the class itself must."""
    if cls not in KERNELS:
        return None
    for hyper in groups:
        exotic = hyper.get("foreach") is not None or hyper.get("fused") is False or hyper.get("capturable")
        tensors = any(isinstance(value, Tensor) for value in (*hyper.values(), *hyper.get("betas", ())))
        if exotic or tensors or hyper.get("differentiable"):
            return None
    if cls is torch.optim.SGD and any(p.device.type == "cpu" and p.dtype in _HALVES for p in params):
        if any(hyper.get("fused") for hyper in groups):
            raise ConfigurationError(
                "torch's fused SGD on CPU leaves most bfloat16 and float16 numbers as they are (measured, torch 2.13)."
                " Leave fused=True out."
            )
        return None
    usual = (Tensor, torch.nn.Parameter)
    fits = (type(p) in usual and p.dtype in _DTYPES and p.device.type in _DEVICES for p in params)
    return KERNELS[cls] if all(fits) else None
