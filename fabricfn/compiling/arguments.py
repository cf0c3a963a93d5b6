"""What a compiled step is called with: tensors for the graph, numbers for it, and the rest, on which it depends.

[Note: signature] A trace serves all calls with the same *signature*: structure, shapes, strides, dtypes, devices,
engines, optimizer plans, modes, and every value that is neither a tensor nor a float nor a key. Floats and the numbers
of optimizers (learning rates, counters) are no part of it: they go into the graph as numbers. The signature of a
record's tensors is found once and kept with its lease, since asking 240 tensors costs as much as a small step.
"""

import dataclasses
import functools
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any

import torch

from fabricfn.binding import engine_of
from fabricfn.errors import CapabilityError
from fabricfn.optimizers import transforms
from fabricfn.optimizers.fused import Fused
from fabricfn.random import Key
from fabricfn.records import Grads, Model
from fabricfn.states import Counter, Optimizer
from fabricfn.tree import TreeSpec, tree_flatten, tree_unflatten

Hyper = Mapping[str, Any]
RECORDS = (Model, Optimizer, Grads, Key)


class Kinds:
    """A part of a signature that is long: compared by identity first, hashed once."""

    __slots__ = ("_hash", "of")

    def __init__(self, of: Hashable) -> None:
        self.of = of
        self._hash = hash(of)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return self is other or (type(other) is Kinds and self._hash == other._hash and self.of == other.of)


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Layout:
    """How the leaves of an optimizer's store are made up; kept with its lease."""

    kinds: Kinds
    tensors: Sequence[int]
    """Which of the leaves are tensors."""
    counters: Sequence[int]
    """Which are counters."""


@dataclasses.dataclass(slots=True, eq=False)
class Part:
    """One argument: a leaf of the tree of arguments, where records are leaves, too."""

    given: Any
    key: Hashable
    tensors: Sequence[torch.Tensor] = ()
    numbers: Sequence[float] = ()
    leaves: Sequence[Any] = ()
    """Of an optimizer: those of its store."""


def is_record(node: Any) -> bool:
    """Where the flattening of arguments and results stops."""
    return type(node) in RECORDS


def flatten(tree: Any) -> tuple[list[Any], TreeSpec]:
    """The arguments, with records as leaves."""
    return tree_flatten(tree, is_record)


def part_of(leaf: Any) -> Part:
    """What a call brings with this argument.

    Raises:
        DonatedError: it was given away.
        CapabilityError: a graph cannot take it.
    """
    take = _TAKES.get(type(leaf))
    if take is not None:
        return take(leaf)
    if isinstance(leaf, torch.Tensor):
        return _tensor(leaf)
    try:
        hash(leaf)
    except TypeError:
        raise CapabilityError(
            f"a compiled step takes tensors, records of fabricfn, numbers and other values that can be compared; it got"
            f" a {type(leaf).__name__}. Make a tensor of it, or leave it to a closure, where it is read once."
        ) from None
    return Part(leaf, (type(leaf), leaf))


def _float(leaf: float) -> Part:
    return Part(leaf, float, (), (leaf,))


def _key(leaf: Key) -> Part:
    return Part(leaf, Key)


def kind_of(tensor: torch.Tensor) -> Hashable:
    """What a graph depends on in a tensor.

    Raises:
        CapabilityError: it is not a plain tensor with strides.
    """
    if (type(tensor) is not torch.Tensor and type(tensor) is not torch.nn.Parameter) or (
        tensor.layout is not torch.strided
    ):
        raise CapabilityError(
            f"a compiled step takes plain dense tensors; it got a {type(tensor).__name__} with layout {tensor.layout}."
        )
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device


def kinds_of(tensors: Iterable[torch.Tensor]) -> Kinds:
    """The kinds of many tensors."""
    return Kinds(tuple(map(kind_of, tensors)))


def _tensor(leaf: torch.Tensor) -> Part:
    return Part(leaf, (torch.Tensor, kind_of(leaf), leaf.requires_grad), (leaf.detach() if leaf.requires_grad else leaf,))


def _model(leaf: Model) -> Part:
    lease, params, buffers = leaf.lease, leaf.params, leaf.buffers
    lease.check("Model")
    if lease.known is None:
        lease.known = kinds_of(params.values())
    key = (Model, engine_of(leaf), lease.known, leaf.training, tuple(buffers), tuple(map(kind_of, buffers.values())))
    return Part(leaf, key, (*params.values(), *buffers.values()))


def _grads(leaf: Grads) -> Part:
    if leaf.lease.spent is not None or leaf.lease.values is not None:
        leaf.lease.check("Grads")
    given = {name: grad for name, grad in leaf.params.items() if grad is not None}
    buffers = leaf.new_buffers or {}
    tensors = (*given.values(), *buffers.values())
    key = (Grads, leaf.ref.engine, leaf.ref, tuple(given), leaf.new_buffers is None, tuple(buffers), kinds_of(tensors))
    return Part(leaf, key, tensors)


def _optimizer(leaf: Optimizer) -> Part:
    lease = leaf.lease
    if lease.spent is not None or lease.values is not None:
        lease.check("Optimizer")
    if type(leaf.plan.detail) is Fused and not all(leaf.store):
        leaf = _begun(leaf)
    leaves, spec = tree_flatten((leaf.store, leaf.shared))
    if lease.known is None:
        lease.known = layout_of(leaf, leaves, spec)
    layout: Layout = lease.known
    static, numbers = split_hyperparams(leaf.hyperparams)
    numbers += [leaves[place].count for place in layout.counters]
    tensors = [leaves[place] for place in layout.tensors]
    return Part(leaf, (Optimizer, leaf.plan, layout.kinds, static), tensors, numbers, leaves)


def layout_of(opt: Optimizer, leaves: Sequence[Any], spec: TreeSpec) -> Layout:
    if opt.plan.likes is not None or type(opt.plan.detail) not in (Fused, transforms.Pair):
        raise CapabilityError(
            f"{opt.plan.name} cannot be compiled as it was set up: there are AdamW, Adam, SGD and Adagrad by torch's"
            " own kernels (without foreach=, capturable= and the like, floating parameters), and (init, update) pairs"
            " of functions of tensors. Call ff.optimizer_step outside of the compiled step, which returns the gradients."
        )
    kinds = tuple(
        kind_of(leaf) if isinstance(leaf, torch.Tensor) else Counter if type(leaf) is Counter else (type(leaf), leaf)
        for leaf in leaves
    )
    tensors = [place for place, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
    counters = [place for place, leaf in enumerate(leaves) if type(leaf) is Counter]
    return Layout(Kinds((spec, kinds)), tensors, counters)


def _begun(opt: Optimizer) -> Optimizer:
    """In the structure that it has after its first step, where zeros mean the same: one trace less."""
    store: list[Any] = []
    for bucket, columns in zip(opt.plan.detail.buckets, opt.store, strict=True):
        hyper = opt.hyperparams[bucket.group]
        if not columns and hyper.get("momentum") and not hyper["dampening"]:
            zeros = functools.partial(torch.zeros, dtype=bucket.dtype, device=bucket.device)
            pairs = zip(bucket.shapes, bucket.strides, strict=True)
            columns = {"momentum_buffer": [zeros(shape).as_strided(shape, strides) for shape, strides in pairs]}
        store.append(columns)
    return dataclasses.replace(opt, store=tuple(store))


def is_lifted(name: str, value: Any) -> bool:
    """Whether a hyperparameter goes into the graph as a number. One that is 0 leaves its term out; a rate never does."""
    return type(value) is float and (value != 0.0 or name == "lr") or (type(value) is int and name == "lr")


def split_hyperparams(groups: Sequence[Hyper]) -> tuple[Hashable, list[float]]:
    """(what the graph depends on, the numbers that go into it)."""
    static: list[Any] = []
    numbers: list[float] = []
    for group in groups:
        for name, value in group.items():
            if is_lifted(name, value):
                numbers.append(value)
                static.append((name, float))
            elif name == "betas":
                numbers += value
                static.append((name, len(value)))
            else:
                static.append((name, value))
        static.append(None)
    return tuple(static), numbers


def with_numbers(groups: Sequence[Hyper], number: Callable[[], Any]) -> tuple[dict[str, Any], ...]:
    """The hyperparameters with `number()` in place of each number, in the order of `split_hyperparams`."""
    return tuple(
        {
            name: number()
            if is_lifted(name, value)
            else tuple(number() for _ in value)
            if name == "betas"
            else value
            for name, value in group.items()
        }
        for group in groups
    )


_TAKES: dict[type, Callable[[Any], Part]] = {
    torch.Tensor: _tensor,
    Model: _model,
    Optimizer: _optimizer,
    Grads: _grads,
    Key: _key,
    float: _float,
}


def described_of(step_fn: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, str]:
    """The arguments as messages show them, by name."""
    return {}
