"""The record Optimizer: the values of an optimizer, and the plan that says how they move.

[Note: store] The state is kept in the form that its functions need (`store`: prepared columns, or one row a
parameter), since building name -> {slot: value} at every step would cost more than the step. `state` builds it when
somebody looks.

[Note: parts] Where models hold DTensors, or ranks share the state ([Note: shares]), the store holds the parts of this
rank as plain tensors, so that a step costs what it costs on plain tensors. Whoever looks (`state`, `tree_map`, a
checkpoint) sees DTensors.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch

from fabricfn.errors import ConfigurationError
from fabricfn.leases import Lease, versions_of
from fabricfn.records import Ref, Static
from fabricfn.sharding import local_of, part_for
from fabricfn.tracing import tracing
from fabricfn.tree import TreeSpec, path_name, register, tree_flatten, tree_leaves, tree_paths, tree_unflatten


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Plan:
    """What an `Optimizer` is besides its values: made by `setup_optimizer`, shared by all its successors."""

    name: str
    """As messages call it: "AdamW"."""
    ref: Ref
    """Two optimizers combine in `tree_map` when their plans' refs are equal."""
    spec: TreeSpec | None
    """The structure of the tree of models; None for one Model."""
    names: tuple[tuple[str, ...], ...]
    """The parameters' names, one tuple a model. A position counts through all of them."""
    shapes: tuple[torch.Size, ...]
    """The parameters' shapes, by position."""
    moving: tuple[bool, ...] | None
    """Which positions some optimizer may change (not frozen); None is all."""
    groups: tuple[tuple[int, ...], ...]
    """The positions of each group of hyperparameters."""
    detail: Any
    """What the functions below need."""
    advance: Callable[..., tuple[Any, Mapping[str, Any], Sequence[Mapping[str, Any]]]]
    """(opt, params, grads, hyperparams, donate, evaluate) -> the next (store, shared, hyperparams). Changes the
    tensors of `params` in place; those of the store only when `donate`."""
    read: Callable[["Plan", Any], Any]
    """(plan, store) -> state, as the user sees it."""
    write: Callable[["Optimizer", Any], Any]
    """(like, state) -> store."""
    likes: tuple[Any, ...] | None = None
    """By position: a sharded tensor without memory, placed as the state of the parameter is, or None. None where all
    tensors are plain; otherwise `read` and `write` work on parts: see [Note: parts]."""
    parted: bool = False
    """The parameters are placed so, too, and `advance` works on parts; otherwise they are whole, and it cuts them."""
    dressed: Callable[["Plan", Any], Any] | None = None
    """(plan, store) -> the store with DTensors in place of parts; None where `likes` is."""

    def __deepcopy__(self, memo: dict[int, Any]) -> "Plan":
        return self


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Optimizer:
    """The state of an optimizer: data. Made by `setup_optimizer` and `optimizer_step`; a pytree of its tensors.

    `dataclasses.replace(opt, hyperparams=...)` changes hyperparameters for good; keyword arguments of `optimizer_step`
    change them for one step.
    """

    shared: Mapping[str, Any]
    """What belongs to no single parameter: the history of LBFGS, attributes that a class of your own keeps."""
    hyperparams: tuple[Mapping[str, Any], ...]
    """One mapping a group; empty for an (init, update) pair."""
    step: int
    """How many times `optimizer_step` was called."""
    store: Any = dataclasses.field(repr=False)
    """The state as the optimizer's functions keep it; read `state`."""
    plan: Plan = dataclasses.field(repr=False)
    lease: Lease = dataclasses.field(default_factory=Lease, repr=False)
    """Watches the tensors' versions only once other records may hold them (see `exposed`)."""

    @property
    def state(self) -> Any:
        """By name -> {slot: value} (in the tree of the models, if there are several); or what a custom `init` returned.

        A view of the tensors: copy what you want to keep over a donated step.
        """
        plan = self.plan
        return plan.read(plan, self.store if plan.dressed is None else plan.dressed(plan, self.store))

    def __repr__(self) -> str:
        rates = [group["lr"] for group in self.hyperparams if "lr" in group]
        count = sum(map(len, self.plan.groups)) or sum(map(len, self.plan.names))
        lr = f"lr {rates[0] if len(rates) == 1 else rates}, " if rates else ""
        return f"Optimizer({self.plan.name}, {count} params, {lr}step {self.step})"

    def __reduce__(self) -> tuple[Any, ...]:
        hyperparams = tuple(map(dict, self.hyperparams))
        return (_optimizer, (self.store, dict(self.shared), hyperparams, self.step, self.plan))


def _optimizer(store: Any, shared: Any, hyperparams: Any, step: int, plan: Plan) -> Optimizer:
    frozen = tuple(MappingProxyType[str, Any](group) for group in hyperparams)
    return Optimizer(store=store, shared=shared, hyperparams=frozen, step=step, plan=plan)


class Counter:
    """How many steps all parameters of a bucket have made: a number, at hand as the tensor that kernels read.

    The tensors are made many at a time: adding 1 to a tensor at every step would cost as much as the kernel (CPU).
    """

    __slots__ = ("count", "device", "first", "tensors")

    def __init__(self, count: int, device: torch.device, upcoming: tuple[int, Sequence[torch.Tensor]] | None = None):
        self.count = count
        self.device = device
        if upcoming is None:
            upcoming = count, torch.arange(count, count + 64, dtype=torch.float32, device=device).unbind()
        self.first, self.tensors = upcoming

    def tensor(self) -> torch.Tensor:
        """The number as a 0-dim float32 tensor, not to be changed."""
        return self.tensors[self.count - self.first]

    def next(self, steps: int = 1) -> "Counter":
        """The counter after one more step, or some."""
        count = self.count + steps
        at_hand = count - self.first < len(self.tensors)
        return Counter(count, self.device, (self.first, self.tensors) if at_hand else None)

    def __reduce__(self) -> tuple[Any, ...]:
        return (Counter, (self.count, self.device))

    def __deepcopy__(self, memo: dict[int, Any]) -> "Counter":
        return self


_PLAIN = (bool, int, float, complex, str, bytes, Counter)


def addresses(leaves: Iterable[Any]) -> list[int]:
    """Where the memory of each tensor among the leaves is, of those that have any; views of one memory agree.

    Of a DTensor it is the memory of this rank's part.
    """
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    if tracing():  # there is no memory yet, but it is known which tensors will share it
        return [tensor.untyped_storage()._cdata for tensor in tensors]
    try:
        places = [tensor.untyped_storage().data_ptr() for tensor in tensors]
    except RuntimeError:
        places = [_address(tensor) for tensor in tensors]
    return [place for place in places if place]


def _address(tensor: torch.Tensor) -> int:
    try:
        return local_of(tensor).untyped_storage().data_ptr()
    except RuntimeError:  # sparse, or a sub-class without a storage of its own
        return id(tensor)


def overlap(tensors: Sequence[torch.Tensor]) -> tuple[int, int] | None:
    """The positions of the first two tensors that share memory, or None. Disjoint views of one storage share none."""
    places = addresses(tensors)
    if len(set(places)) == len(places):
        return None
    spans: list[tuple[int, int, int]] = []
    for position, tensor in enumerate(map(local_of, tensors)):
        if tensor.layout is not torch.strided:
            spans.append((id(tensor), id(tensor) + 1, position))
        elif tensor.numel() and tensor.data_ptr():
            reach = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True)) + 1
            spans.append((tensor.data_ptr(), tensor.data_ptr() + reach * tensor.element_size(), position))
    end, owner = 0, -1
    found: list[tuple[int, int]] = []
    for start, stop, position in sorted(spans):
        if start < end:
            found.append((min(owner, position), max(owner, position)))
        if stop > end:
            end, owner = stop, position
    return min(found, default=None)


def _flatten_optimizer(opt: Optimizer) -> tuple[Sequence[Any], Static, Sequence[str]]:
    plan = opt.plan
    shown = (opt.store if plan.dressed is None else plan.dressed(plan, opt.store), opt.shared)
    leaves, spec = tree_flatten(shown)
    paths = tree_paths(shown)
    plain = [leaf if type(leaf) in _PLAIN else None for leaf in leaves]
    places = [i for i, leaf in enumerate(leaves) if type(leaf) not in _PLAIN]
    exposed(opt)
    parted = [getattr(leaves[i], "_spec", None) for i in places] if plan.likes is not None else None
    static = Static(plan.ref, (plan, spec, plain, places, parted, opt.hyperparams, opt.step))
    return [leaves[i] for i in places], static, [path_name(paths[i][1:]) for i in places]


def _unflatten_optimizer(static: Static, children: Iterable[Any]) -> Optimizer:
    plan, spec, plain, places, parted, hyperparams, step = static.payload
    leaves = list(plain)
    if parted is not None:
        children = map(part_for, parted, children)
    for place, child in zip(places, children, strict=True):
        leaves[place] = child
    store, shared = tree_unflatten(spec, leaves)
    opt = Optimizer(store=store, shared=shared, hyperparams=hyperparams, step=step, plan=plan)
    return exposed(opt)


def exposed(opt: Optimizer) -> Optimizer:
    """The same optimizer, whose lease watches the tensors from now on, since another record may hold them.

    As long as nobody has taken it apart, no other record can, and the hot loop need not look at versions.
    """
    lease = opt.lease
    if lease.spent is not None or lease.values is not None:
        lease.check("Optimizer")
        return opt
    tensors = [leaf for leaf in tree_leaves((opt.store, opt.shared)) if type(leaf) not in _PLAIN]
    lease.values = {str(i): tensor for i, tensor in enumerate(tensors)}
    lease.versions = versions_of(tensors)
    return opt


def exposed_after(values: Mapping[str, Any], after: Optimizer, *, in_place: bool) -> None:
    """What a donated step makes of an exposed optimizer is exposed, too.

    Args:
        values: the tensors of the optimizer that was given away.
        after: what came of it.
        in_place: whether its tensors are all of these; then their shapes are what they were, and fit.
    """
    if not in_place:
        exposed(after)
        return
    after.lease.values, after.lease.versions = values, versions_of(values.values())
    after.lease.apart = True


register(Optimizer, _flatten_optimizer, _unflatten_optimizer)


def optimizer_to_tree(opt: Optimizer) -> dict[str, Any]:
    """The optimizer as plain containers, for a checkpoint: `state`, `shared`, `hyperparams`, `step`. Not a copy."""
    if opt.lease.spent is not None or opt.lease.values is not None:
        opt.lease.check("Optimizer")
    return {
        "state": opt.state,
        "shared": dict(opt.shared),
        "hyperparams": [dict(group) for group in opt.hyperparams],
        "step": opt.step,
    }


def optimizer_from_tree(like: Optimizer, tree: Mapping[str, Any]) -> Optimizer:
    """The optimizer of `like` with the values of `optimizer_to_tree`; the tensors are used as they are.

    State that `like` does not have yet (slots that appear with the first step) is taken over, too.

    Raises:
        ConfigurationError: other parameters, other groups, or slots that this optimizer does not know.
    """
    groups = tree["hyperparams"]
    if len(groups) != len(like.hyperparams):
        raise ConfigurationError(
            f"this state has {len(groups)} groups of hyperparameters; the optimizer that it is loaded into has"
            f" {len(like.hyperparams)}. Set it up with the same `groups`."
        )
    hyperparams = tuple(
        MappingProxyType({**old, **{key: _as(old.get(key), value) for key, value in new.items()}})
        for old, new in zip(like.hyperparams, groups, strict=True)
    )
    store = like.plan.write(like, tree["state"])
    shared = dict(tree.get("shared") or {})
    return Optimizer(store=store, shared=shared, hyperparams=hyperparams, step=int(tree["step"]), plan=like.plan)


def _as(old: Any, new: Any) -> Any:
    made: Any = (*new,) if type(old) is tuple and type(new) is list else new
    return made
