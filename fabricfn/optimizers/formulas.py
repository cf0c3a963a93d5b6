"""The steps of the kernels in plain arithmetic: what `compile_step` traces, for a compiler to fuse.

Hyperparameters and counters may be 0-dim tensors here, so that a graph holds none of their values. A hyperparameter
that is the number 0 leaves its term out. Halves are computed in float32 and rounded once, as the kernels do.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from fabricfn.states import Counter

Columns: TypeAlias = dict[str, Any]
Hyper: TypeAlias = Mapping[str, Any]


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Counts(Sequence[Tensor]):
    """The numbers from one of a graph on, for a `Counter` whose own count begins with 0."""

    first: Tensor
    origin: tuple[int, int]
    """The argument that the counter came with, and its place among the leaves there."""
    chosen: bool = False
    """Whether a step may have been left out, so that only the graph knows the number."""

    def __len__(self) -> int:
        return 1 << 62

    def __getitem__(self, more: Any) -> Any:
        return self.first + more


def adam(hyper: Hyper, params: Sequence[Tensor], grads: Sequence[Tensor], columns: Columns) -> Columns:
    """AdamW and Adam."""
    step, corrections = _corrections(columns["step"], len(params), hyper["betas"])
    beta1, beta2 = hyper["betas"]
    for i, (param, grad, (first, second)) in enumerate(zip(params, grads, corrections, strict=True)):
        now, slope = _wide(param), _slope(hyper, grad)
        if hyper["decoupled_weight_decay"]:
            now = now - now * (hyper["lr"] * hyper["weight_decay"])
        else:
            slope = _decayed(hyper, now, slope)
        mean = _wide(columns["exp_avg"][i]) * beta1 + slope * (1 - beta1)
        square = _wide(columns["exp_avg_sq"][i]) * beta2 + slope * slope * (1 - beta2)
        columns["exp_avg"][i].copy_(mean)
        columns["exp_avg_sq"][i].copy_(square)
        if hyper["amsgrad"]:
            square = torch.maximum(_wide(columns["max_exp_avg_sq"][i]), square)
            columns["max_exp_avg_sq"][i].copy_(square)
        param.copy_(now - (hyper["lr"] / first) * mean / (square.sqrt() / second + hyper["eps"]))
    return {**columns, "step": step}


def adagrad(hyper: Hyper, params: Sequence[Tensor], grads: Sequence[Tensor], columns: Columns) -> Columns:
    """Adagrad."""
    step, steps = _counted(columns["step"], len(params))
    for param, grad, total, count in zip(params, grads, columns["sum"], steps, strict=True):
        now = _wide(param)
        slope = _decayed(hyper, now, _slope(hyper, grad))
        sum_ = _wide(total) + slope * slope
        total.copy_(sum_)
        rate = hyper["lr"] / (1 + (count - 1) * hyper["lr_decay"])
        param.copy_(now - rate * slope / (sum_.sqrt() + hyper["eps"]))
    return {"step": step, "sum": columns["sum"]}


def sgd(hyper: Hyper, params: Sequence[Tensor], grads: Sequence[Tensor], columns: Columns) -> Columns:
    """SGD; the first step of a momentum is the gradient itself."""
    momentum, decay = hyper["momentum"], hyper["dampening"]
    has_momentum = _is_there(momentum)
    buffers: list[Any] = list(columns.get("momentum_buffer") or [None] * len(params))
    for i, (param, grad) in enumerate(zip(params, grads, strict=True)):
        now = _wide(param)
        slope = _decayed(hyper, now, _slope(hyper, grad))
        if has_momentum:
            buffer = buffers[i]
            moving = slope if buffer is None else _wide(buffer) * momentum + slope * (1 - decay)
            if buffer is None:
                buffers[i] = moving.to(param.dtype, copy=True)
            else:
                buffer.copy_(moving)
            slope = slope + moving * momentum if hyper["nesterov"] else moving
        param.copy_(now - slope * hyper["lr"])
    return {"momentum_buffer": buffers} if has_momentum else columns


def _is_there(value: Any) -> bool:
    return isinstance(value, Tensor) or value != 0


def _wide(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor


def _slope(hyper: Hyper, grad: Tensor) -> Tensor:
    return -_wide(grad) if hyper["maximize"] else _wide(grad)


def _decayed(hyper: Hyper, now: Tensor, slope: Tensor) -> Tensor:
    return slope + now * hyper["weight_decay"] if _is_there(hyper["weight_decay"]) else slope


def _counted(step: Any, count: int) -> tuple[Any, list[Tensor]]:
    """(the next counter column, it as a list of float64)."""
    if type(step) is Counter:
        step = step.next()
        return step, [step.tensor().double()] * count
    steps = [one + 1 for one in step]
    return steps, [one.double() for one in steps]


def _corrections(step: Any, count: int, betas: tuple[Any, Any]) -> tuple[Any, list[tuple[Any, Any]]]:
    """(the next counter column, for each parameter what its two means are still divided by)."""
    step, steps = _counted(step, count)
    known: dict[int, tuple[Any, Any]] = {}
    for one in steps:
        if id(one) not in known:
            known[id(one)] = (1 - betas[0] ** one, (1 - betas[1] ** one).sqrt())
    return step, [known[id(one)] for one in steps]


Formula: TypeAlias = Callable[[Hyper, Any, Any, Columns], Columns]
