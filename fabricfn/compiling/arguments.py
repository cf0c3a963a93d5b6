"""What a compiled step is called with: tensors for the graph, numbers for it, and the rest, on which it depends.

[Note: signature] A trace serves all calls with the same *signature*: structure, shapes, strides, dtypes, devices,
engines, optimizer plans, modes, and every value that is neither a tensor nor a float nor a key. Floats and the numbers
of optimizers (learning rates, counters) are no part of it: they go into the graph as numbers. What is found out about
the tensors of a record is kept with its lease, since asking 240 tensors costs as much as a small step.
"""

import dataclasses
import functools
import operator
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any

import numpy as np
import torch

from fabricfn.binding import engine_of
from fabricfn.compiling.hyperparams import split
from fabricfn.errors import CapabilityError
from fabricfn.optimizers import transforms
from fabricfn.optimizers.fused import Fused
from fabricfn.random import Key
from fabricfn.records import Grads, Model
from fabricfn.states import Counter, Optimizer
from fabricfn.tree import TreeSpec, tree_flatten, tree_unflatten

_version = operator.attrgetter("_version")
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


@dataclasses.dataclass(slots=True, eq=False)
class Known:
    """What is known of a record's tensors."""

    kinds: Kinds
    memory: object = dataclasses.field(default_factory=object)
    """The same object says that the tensors lie where those of another record did."""


@dataclasses.dataclass(slots=True, eq=False)
class KnownModel(Known):
    """What is kept with the lease of a Model: about its parameters, buffers and modes, which a lease does not know."""

    buffers: Any = None
    training: Any = None
    unscaled: bool = True
    """It has no loss scale."""
    key: Hashable = None
    tensors: Sequence[torch.Tensor] = ()

    def fits(self, model: Model) -> bool:
        """Whether it is about this very record: `dataclasses.replace` keeps the lease."""
        same = self.buffers is model.buffers and self.training is model.training
        return same and self.unscaled is (model.loss_scale is None)


@dataclasses.dataclass(slots=True, eq=False)
class KnownState(Known):
    """What is kept with the lease of an Optimizer."""

    store: Any = None
    """What the rest is about: `dataclasses.replace` keeps the lease."""
    spec: Any = None
    leaves: Sequence[Any] = ()
    tensors: Sequence[torch.Tensor] = ()
    places: Sequence[int] = ()
    """Where among the leaves the tensors are."""
    counters: Sequence[int] = ()
    """Where the counters are."""
    hyperparams: Any = None
    static: Hashable = None
    numbers: Sequence[float] = ()
    """The hyperparameters, divided: see `hyperparams.split`."""

    def take_over(self, before: "KnownState", hyperparams: Any) -> None:
        """What holds for another record over the same memory, too."""
        self.memory = before.memory
        if hyperparams is before.hyperparams:
            self.hyperparams, self.static, self.numbers = hyperparams, before.static, before.numbers


@dataclasses.dataclass(slots=True, eq=False)
class Part:
    """One argument: a leaf of the tree of arguments, where records are leaves, too."""

    given: Any
    key: Hashable
    tensors: Sequence[torch.Tensor] = ()
    numbers: Sequence[float] = ()
    known: Any = None


def is_record(node: Any) -> bool:
    """Where the flattening of arguments and results stops."""
    return type(node) in RECORDS


def parts_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Part], Any]:
    """(what a call brings, records being leaves; the structure). The usual call has no containers.

    Raises:
        DonatedError: an argument was given away.
        CapabilityError: a graph cannot take it.
    """
    leaves = [*args, *kwargs.values()]
    takes = [_TAKES.get(leaf.__class__) for leaf in leaves]
    if None in takes:
        leaves, spec = tree_flatten((args, kwargs), is_record)
        return [_TAKES.get(leaf.__class__, _other)(leaf) for leaf in leaves], spec
    return [take(leaf) for take, leaf in zip(takes, leaves, strict=True) if take], (len(args), *kwargs)


def unflatten(spec: Any, leaves: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of this structure."""
    if type(spec) is TreeSpec:
        return tree_unflatten(spec, leaves)
    count, *names = spec
    return tuple(leaves[:count]), dict(zip(names, leaves[count:], strict=True))


def kind_of(tensor: torch.Tensor) -> Hashable:
    """What a graph depends on in a tensor.

    Raises:
        CapabilityError: it is not a plain tensor with strides.
    """
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter) or tensor.layout is not torch.strided:
        raise CapabilityError(
            f"a compiled step takes plain dense tensors; it got a {type(tensor).__name__} with layout {tensor.layout}."
        )
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device


def kinds_of(tensors: Iterable[torch.Tensor]) -> Kinds:
    """The kinds of many tensors."""
    return Kinds(tuple(map(kind_of, tensors)))


def _tensor(leaf: torch.Tensor) -> Part:
    wants_grad = leaf.requires_grad
    return Part(leaf, (torch.Tensor, kind_of(leaf), wants_grad), (leaf.detach() if wants_grad else leaf,))


def _float(leaf: float) -> Part:
    number = float(leaf)
    return Part(number, float, (), (number,))


def _key(leaf: Key) -> Part:
    return Part(leaf, Key)


def _other(leaf: Any) -> Part:
    if isinstance(leaf, torch.Tensor):
        return _tensor(leaf)
    try:
        hash(leaf)
    except TypeError:
        raise CapabilityError(
            "a compiled step takes tensors, records of fabricfn, numbers and other values that can be compared; it got"
            f" a {type(leaf).__name__}. Make a tensor of it, or leave it to a closure, where it is read once."
        ) from None
    return Part(leaf, (leaf.__class__, leaf))


def _model(leaf: Model) -> Part:
    lease, scale = leaf.lease, leaf.loss_scale
    known: KnownModel | None = lease.known
    # what is known has no parts on other ranks, so there are no other versions
    if known is None or lease.spent is not None or lease.versions != tuple(map(_version, leaf.params.values())):
        lease.check("Model")
    if known is None or not known.fits(leaf):
        known = lease.known = know_model(leaf, known)
    return Part(leaf, known.key, known.tensors, () if scale is None else (scale.scale, scale.good_steps), known)


def know_model(leaf: Model, before: Known | None, key: Hashable = None) -> KnownModel:
    """All that a call needs to know of a model.

    Args:
        before: what is known of its parameters.
        key: what a graph depends on in it, where that is known.
    """
    params, buffers, training, unscaled = leaf.params, leaf.buffers, leaf.training, leaf.loss_scale is None
    before = before or Known(kinds_of(params.values()))
    if key is None:
        key = (Model, engine_of(leaf), before.kinds, training, tuple(buffers), kinds_of(buffers.values()), unscaled)
    tensors = (*params.values(), *buffers.values())
    return KnownModel(before.kinds, before.memory, buffers, training, unscaled, key, tensors)


def _grads(leaf: Grads) -> Part:
    if leaf.lease.spent is not None or leaf.lease.values is not None:
        leaf.lease.check("Grads")
    given = {name: grad for name, grad in leaf.params.items() if grad is not None}
    buffers = leaf.new_buffers or {}
    kinds = kinds_of((*given.values(), *buffers.values()))
    key = (Grads, leaf.ref.engine, leaf.ref, tuple(given), leaf.new_buffers is None, tuple(buffers), kinds)
    scale = leaf.loss_scale
    numbers = () if scale is None else (scale.scale, scale.good_steps)
    return Part(leaf, (*key, scale is None), (*given.values(), *buffers.values()), numbers, Known(kinds))


def _optimizer(leaf: Optimizer) -> Part:
    lease = leaf.lease
    if lease.spent is not None or lease.values is not None:
        lease.check("Optimizer")
    known: KnownState | None = lease.known
    if known is None or known.store is not leaf.store:
        known = lease.known = _look(leaf)
    if known.hyperparams is not leaf.hyperparams:
        known.static, known.numbers = split(leaf.hyperparams)
        known.hyperparams = leaf.hyperparams
    numbers = [*known.numbers, *[known.leaves[place].count for place in known.counters]]
    return Part(leaf, (Optimizer, leaf.plan, known.kinds, known.static), known.tensors, numbers, known)


def _look(opt: Optimizer) -> KnownState:
    if opt.plan.likes is not None or type(opt.plan.detail) not in (Fused, transforms.Pair):
        raise CapabilityError(
            f"{opt.plan.name} cannot be compiled as it was set up: there are AdamW, Adam, SGD and Adagrad by torch's"
            " own kernels (floating parameters; no foreach=, capturable= and the like), and (init, update) pairs of"
            " functions of tensors. Let the compiled step return the gradients, and call ff.optimizer_step with them."
        )
    leaves, spec = tree_flatten((_begun(opt), opt.shared))
    places = [place for place, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
    return KnownState(
        layout_of(leaves, spec),
        store=opt.store,
        spec=spec,
        leaves=leaves,
        tensors=[leaves[place] for place in places],
        places=places,
        counters=[place for place, leaf in enumerate(leaves) if type(leaf) is Counter],
    )


def layout_of(leaves: Sequence[Any], spec: TreeSpec) -> Kinds:
    """The signature of an optimizer's state."""

    def kind(leaf: Any) -> Hashable:
        if isinstance(leaf, torch.Tensor):
            return kind_of(leaf)
        return Counter if type(leaf) is Counter else (leaf.__class__, leaf)

    return Kinds((spec, *map(kind, leaves)))


def _begun(opt: Optimizer) -> Any:
    """The store in the structure that it has after the first step, where zeros mean the same: one trace less."""
    if type(opt.plan.detail) is not Fused or all(opt.store):
        return opt.store
    store: list[Any] = []
    for bucket, columns in zip(opt.plan.detail.buckets, opt.store, strict=True):
        hyper = opt.hyperparams[bucket.group]
        if not columns and hyper.get("momentum") and not hyper["dampening"]:
            empty = functools.partial(torch.empty_strided, dtype=bucket.dtype, device=bucket.device)
            layouts = zip(bucket.shapes, bucket.strides, strict=True)
            store.append({"momentum_buffer": [empty(*layout).zero_() for layout in layouts]})
        else:
            store.append(columns)
    return tuple(store)


_TAKES: dict[type, Callable[[Any], Part]] = {
    torch.Tensor: _tensor,
    Model: _model,
    Optimizer: _optimizer,
    Grads: _grads,
    Key: _key,
    float: _float,
    np.float64: _float,
}
