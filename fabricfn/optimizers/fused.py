"""One step by direct kernels: buckets, gradients that are missing or laid out otherwise, the state as users see it."""

import contextlib
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from itertools import repeat
from typing import Any, cast

import torch
from torch import Tensor

from fabricfn.errors import ConfigurationError, GradientError
from fabricfn.optimizers.kernels import Bucket, Columns, Hyper, Kernel, clones, is_contiguous, shape_of
from fabricfn.optimizers.layout import mirrored, rows_of
from fabricfn.optimizers.shards import shown
from fabricfn.states import Counter, Optimizer, Plan

_NOTHING = contextlib.nullcontext()


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Fused:
    """The detail of a plan that works by kernels."""

    kernel: Kernel
    buckets: tuple[Bucket, ...]


def buckets_of(
    groups: Sequence[tuple[int, ...]], params: Sequence[Tensor], labels: Sequence[str]
) -> tuple[Bucket, ...]:
    """The groups, divided by device and dtype."""
    sorted_out: dict[Any, list[int]] = {}
    for number, group in enumerate(groups):
        for i in group:
            sorted_out.setdefault((number, params[i].device, params[i].dtype), []).append(i)
    out: list[Bucket] = []
    for (number, device, dtype), index in sorted_out.items():
        strides = [torch.empty_like(params[i]).stride() for i in index]
        bucket = Bucket(
            group=number,
            index=tuple(index),
            whole=index == list(range(len(params))),
            shapes=[params[i].shape for i in index],
            strides=strides,
            contiguous=all(torch.empty_like(params[i]).is_contiguous() for i in index),
            dtype=dtype,
            device=device,
            names=tuple(labels[i] for i in index),
        )
        out.append(bucket)
    return tuple(out)


def start(detail: Fused, hyperparams: Sequence[Hyper], params: Sequence[Tensor]) -> tuple[Columns, ...]:
    """The state before the first step."""
    return tuple(
        detail.kernel.start(hyperparams[bucket.group], [params[i] for i in bucket.index]) for bucket in detail.buckets
    )


def advance(
    opt: Optimizer,
    params: list[Tensor],
    grads: list[Tensor | None],
    hyperparams: Sequence[Hyper],
    donate: bool,
    evaluate: Callable[[], tuple[Any, list[Tensor | None]]] | None,
) -> tuple[Any, Mapping[str, Any], Sequence[Hyper]]:
    """The step of a plan whose detail is `Fused`."""
    if evaluate is not None:
        grads = evaluate()[1]
    detail: Fused = opt.plan.detail
    watched = opt.lease.values is not None and not opt.lease.apart
    store: list[Columns] = []
    # nothing here requires grad, unless a user gave the gradients a graph: then nothing may be recorded
    with torch.no_grad() if any(map(getattr, grads, repeat("requires_grad"), repeat(False))) else _NOTHING:
        for bucket, old in zip(detail.buckets, opt.store, strict=True):
            values, found = params, grads
            if not bucket.whole:
                values, found = [params[i] for i in bucket.index], [grads[i] for i in bucket.index]
            if watched:
                _check_columns(bucket, old)
            step = detail.kernel.step if _fits(bucket, values, found) else _Careful(detail.kernel, bucket).step
            store.append(step(hyperparams[bucket.group], values, found, old if donate else _copied(old)))
    return tuple(store), opt.shared, opt.hyperparams


def in_place(old: Optimizer, new: Optimizer) -> bool:
    """Whether a step by kernels has left every tensor of the state in its column."""
    return type(old.plan.detail) is Fused and all(
        after.keys() == before.keys() and all(before[slot] is after[slot] for slot in before if slot != "step")
        for before, after in zip(old.store, new.store, strict=True)
    )


def _fits(bucket: Bucket, params: Sequence[Tensor], grads: Sequence[Any]) -> bool:
    """Whether the kernel can be called as it is: see [Note: layout]."""
    try:
        shapes = list(map(shape_of, grads))
    except AttributeError:  # a gradient is None
        return False
    if bucket.contiguous:
        return shapes == bucket.shapes and all(map(is_contiguous, params)) and all(map(is_contiguous, grads))
    strides = bucket.strides
    return shapes == bucket.shapes and [p.stride() for p in params] == [g.stride() for g in grads] == strides


def _copied(columns: Columns) -> Columns:
    """Columns whose tensors a kernel may change."""
    out: Columns = {}
    for slot, column in columns.items():
        if slot == "step":
            out[slot] = column
        elif type(None) in set(map(type, column)):
            out[slot] = [None if tensor is None else tensor.clone() for tensor in column]
        else:
            out[slot] = clones(column)
    return out


@dataclasses.dataclass(frozen=True, slots=True)
class _Careful:
    """The step where something is missing or laid out otherwise: those that are there, in the layout of the bucket."""

    kernel: Kernel
    bucket: Bucket

    def step(self, hyper: Hyper, params: Sequence[Tensor], grads: Sequence[Any], columns: Columns) -> Columns:
        bucket = self.bucket
        present = [i for i, grad in enumerate(grads) if grad is not None]
        for i in present:
            _check_gradient(bucket.names[i], params[i], grads[i], bucket.shapes[i])
        if not present:
            return columns
        everything = len(present) == len(params)
        works = [_in_layout(params[i], bucket.strides[i]) for i in present]
        some = [_in_layout(grads[i], bucket.strides[i]) for i in present]
        part = columns if everything else {slot: _taken(column, present) for slot, column in columns.items()}
        part = self.kernel.step(hyper, works, some, part)
        for i, work in zip(present, works, strict=True):
            if work is not params[i]:
                params[i].copy_(work)
        if everything:
            return part
        return {slot: _put(columns.get(slot), present, column, len(params)) for slot, column in part.items()}


def _taken(column: Any, index: Sequence[int]) -> list[Any]:
    return [column[i] for i in index] if type(column) is list else [_single(column)] * len(index)


def _put(column: Any, index: Sequence[int], part: Sequence[Any], count: int) -> list[Any]:
    out: list[Any] = [*column] if type(column) is list else [_single(column)] * count
    for i, value in zip(index, part, strict=True):
        out[i] = value
    return out


def _single(column: Any) -> Any:
    """What a column that is no list means for each parameter: the counter's tensor, or nothing yet."""
    return None if column is None else column.tensor().clone()


def _in_layout(tensor: Tensor, strides: tuple[int, ...]) -> Tensor:
    if tensor.stride() == strides:
        return tensor
    return torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype, device=tensor.device).copy_(tensor)


def _check_gradient(name: str, param: Tensor, grad: Tensor, shape: torch.Size) -> None:
    if param.shape == grad.shape == shape and param.dtype == grad.dtype and param.device == grad.device:
        if grad.layout == torch.strided:
            return
        raise GradientError(f"the gradient of {name} is {grad.layout}; use torch.optim.SparseAdam, or densify it.")
    raise GradientError(
        f"the gradient of {name} is {grad.dtype}{tuple(grad.shape)} on {grad.device}; the parameter is"
        f" {param.dtype}{tuple(param.shape)} on {param.device}. Pass the Grads of this very Model."
    )


def _check_columns(bucket: Bucket, columns: Columns) -> None:
    for slot, column in columns.items():
        for name, shape, tensor in zip(bucket.names, bucket.shapes, column if slot != "step" else (), strict=False):
            if tensor is not None and getattr(tensor, "shape", None) != shape:
                raise ConfigurationError(
                    f"the optimizer state {slot} of {name} is {tensor!r:.80}; a tensor of shape {tuple(shape)} is"
                    " expected. tree_map over an Optimizer must keep the shapes, if it is to be stepped."
                )


def read(plan: Plan, store: Sequence[Columns]) -> Any:
    """The state as name -> {slot: tensor}."""
    rows: dict[int, dict[str, Any]] = {}
    for bucket, columns in zip(plan.detail.buckets, store, strict=True):
        lists = {slot: _taken(column, range(len(bucket.index))) for slot, column in columns.items()}
        for at, position in enumerate(bucket.index):
            row = {slot: column[at] for slot, column in lists.items()}
            rows[position] = {slot: value for slot, value in row.items() if value is not None}
    return mirrored(plan, rows)


def dressed(plan: Plan, store: Sequence[Columns]) -> tuple[Columns, ...]:
    """The store with DTensors in place of parts."""
    likes: Any = plan.likes
    out: list[Columns] = []
    for bucket, columns in zip(plan.detail.buckets, store, strict=True):
        made: Columns = {}
        for slot, column in columns.items():
            values = cast("list[Any] | None", column if type(column) is list else None)
            made[slot] = (
                column if values is None else list(map(shown, [likes[i] for i in bucket.index], repeat(slot), values))
            )
        out.append(made)
    return tuple(out)


def write(like: Optimizer, state: Any) -> tuple[Columns, ...]:
    """The inverse of `read`; equal counters become one."""
    rows = rows_of(like, state)
    store: list[Columns] = []
    for bucket, known in zip(like.plan.detail.buckets, like.store, strict=True):
        own = [rows[position] for position in bucket.index]
        for slot in known:
            lacking = [name for name, row in zip(bucket.names, own, strict=True) if slot not in row]
            if lacking and slot != "momentum_buffer":
                raise ConfigurationError(f"this state of {like.plan.name} has no {slot} for {lacking[:6]}")
        columns: Columns = {}
        for slot in {slot: None for row in own for slot in row}:
            column = [row.get(slot) for row in own]
            columns[slot] = _one_counter(column) if slot == "step" else column
        _check_columns(bucket, columns)
        for slot, column in columns.items():
            if slot != "step":
                laid = zip(column, bucket.strides, strict=True)
                columns[slot] = [None if tensor is None else _in_layout(tensor, strides) for tensor, strides in laid]
        store.append(columns)
    return tuple(store)


def _one_counter(steps: list[Any]) -> Any:
    """The counter that all parameters share, or the list when they differ."""
    first: Tensor = steps[0]
    equal = all(step is first or torch.equal(step, first) for step in steps)
    return Counter(int(first), first.device) if equal else steps
