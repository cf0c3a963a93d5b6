"""The values of training: Model, Grads, Cursor. Frozen; pytrees where they hold tensors; identity equality.

Optimizer is in `states.py`.

How long their values live is in [Note: lease], `leases.py`.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch

from fabricfn.engine import Engine
from fabricfn.errors import GradientError
from fabricfn.leases import NO_LEASE, Lease, Place, bump, increment_version, versions_of
from fabricfn.scaling import LossScale
from fabricfn.sharding import is_sharded, local_of, with_local
from fabricfn.tree import register


class Ref:
    """The static part of a record: which engine stands behind it. Equal when names and shapes are."""

    __slots__ = ("engine", "signature")

    def __init__(self, engine: Engine | None, signature: tuple[Any, ...]) -> None:
        self.engine = engine
        self.signature = signature

    def __eq__(self, other: object) -> bool:
        return type(other) is Ref and (self is other or self.signature == other.signature)

    def __hash__(self) -> int:
        return hash(self.signature)

    def __reduce__(self) -> tuple[Any, ...]:
        return (Ref, (None, self.signature))

    def __deepcopy__(self, memo: dict[int, Any]) -> "Ref":
        return self


class Static:
    """What rides along through tree_map: `ref` decides equality, the payload comes from the first tree."""

    __slots__ = ("payload", "ref")

    def __init__(self, ref: Ref, payload: Any) -> None:
        self.ref = ref
        self.payload = payload

    def __eq__(self, other: object) -> bool:
        return type(other) is Static and self.ref == other.ref

    def __hash__(self) -> int:
        return hash(self.ref)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Model:
    """The values of a network: data, not a wrapper. Made by `setup_model` and `optimizer_step`; a pytree of tensors.

    To compute with it, pass it to `apply`, or to a function made by `value_and_grad`.
    """

    params: Mapping[str, torch.Tensor]
    """name -> tensor, the names of `named_parameters()`, a tied parameter once; tensors without grad, under a
    strategy that shards DTensors, whose shape is the global one."""
    buffers: Mapping[str, torch.Tensor]
    """name -> tensor, the persistent buffers."""
    training: frozenset[str]
    """The names of the sub-modules in training mode ("" is the root); see `eval_mode`, `train_mode`."""
    loss_scale: LossScale | None = None
    """Where the loss scale of fp16 has got to; None under a precision without one. Not a leaf: `tree_map` hands on that
    of the first model, `map_params` that of the last."""
    ref: Ref = dataclasses.field(repr=False)
    lease: Lease = dataclasses.field(default=NO_LEASE, repr=False)

    def __post_init__(self) -> None:
        params = self.params
        if type(params) is not MappingProxyType:
            names = [name for name, *_ in self.ref.signature]
            ordered = list(params) == names or set(params) != set(names)
            params = MappingProxyType(dict(params) if ordered else {name: params[name] for name in names})
            object.__setattr__(self, "params", params)
        if type(self.buffers) is not MappingProxyType:
            object.__setattr__(self, "buffers", MappingProxyType(dict(self.buffers)))
        if self.lease.values is not self.params:
            object.__setattr__(self, "lease", Lease(self.params))

    def __repr__(self) -> str:
        count = sum(getattr(leaf, "numel", int)() for leaf in self.params.values())
        mode = "train" if self.training else "eval"
        return f"Model({len(self.params)} params, {count:,} numbers, {len(self.buffers)} buffers, {mode})"

    def __reduce__(self) -> tuple[Any, ...]:
        if self.lease.spent is not None:
            self.lease.check("Model")
        return (_model, (dict(self.params), dict(self.buffers), self.training, self.ref, self.loss_scale))

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"a Model has no {name!r}: it is data, with params, buffers and training. Compute with ff.apply(rt, model,"
            " x), change the mode with ff.eval_mode and ff.train_mode, get an nn.Module with ff.to_module(rt, model)."
        )


def _model(params: Any, buffers: Any, training: frozenset[str], ref: Ref, loss_scale: LossScale | None = None) -> Model:
    return Model(params=params, buffers=buffers, training=training, ref=ref, loss_scale=loss_scale)


def _flatten_model(model: Model) -> tuple[Sequence[Any], Static, Sequence[str]]:
    if model.lease.spent is not None:
        model.lease.check("Model")
    children = (*model.params.values(), *model.buffers.values())
    static = Static(model.ref, (tuple(model.params), tuple(model.buffers), model.training, model.loss_scale))
    return children, static, (*model.params, *model.buffers)


def _unflatten_model(static: Static, children: Iterable[Any]) -> Model:
    names, buffer_names, training, loss_scale = static.payload
    leaves = tuple(children)
    return Model(
        params=dict(zip(names, leaves[: len(names)], strict=True)),
        buffers=dict(zip(buffer_names, leaves[len(names) :], strict=True)),
        training=training,
        loss_scale=loss_scale,
        ref=static.ref,
    )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Grads:
    """True, unscaled gradients, with the names of the model's parameters. A pytree whose leaves are `params` alone."""

    params: Mapping[str, torch.Tensor | None]
    """name -> gradient of the parameter's shape and dtype; None where the parameter is frozen or was not used."""
    new_buffers: Mapping[str, torch.Tensor] | None = dataclasses.field(default=None, repr=False)
    """The buffers that the forward pass changed, which `optimizer_step` puts into the next model. Not leaves: adding
    or scaling gradients must not change batch statistics."""
    loss_scale: LossScale | None = dataclasses.field(default=None, repr=False)
    """That of the model when the gradients were made, from which `optimizer_step` goes on. The gradients are true all
    the same: they were divided by it."""
    ref: Ref = dataclasses.field(repr=False)
    lease: Lease = dataclasses.field(default_factory=Lease, repr=False)

    def __reduce__(self) -> tuple[Any, ...]:
        new_buffers = None if self.new_buffers is None else dict(self.new_buffers)
        # torch cannot copy or pickle a DTensor whose part is a view, as FSDP makes them
        params = {name: _apart(grad) for name, grad in self.params.items()}
        return (_grads, (params, new_buffers, self.ref, self.loss_scale))

    def __repr__(self) -> str:
        count = sum(getattr(leaf, "numel", int)() for leaf in self.params.values())
        return f"Grads({len(self.params)} params, {count:,} numbers)"


def _apart(grad: torch.Tensor | None) -> torch.Tensor | None:
    return with_local(grad, local_of(grad).clone()) if grad is not None and is_sharded(grad) else grad


def _grads(params: Any, new_buffers: Any, ref: Ref, loss_scale: LossScale | None = None) -> Grads:
    return Grads(params=MappingProxyType(params), new_buffers=new_buffers, ref=ref, loss_scale=loss_scale)


def _flatten_grads(grads: Grads) -> tuple[Sequence[Any], Static, Sequence[str]]:
    lease = grads.lease
    if lease.spent is not None or lease.values is not None:
        lease.check("Grads")
    else:  # from now on another record may hold the tensors
        watch = watching(grads.params)
        lease.values, lease.versions = watch.values, watch.versions
    names = tuple(grads.params)
    return tuple(grads.params.values()), Static(grads.ref, (names, grads.new_buffers, grads.loss_scale)), names


def _unflatten_grads(static: Static, children: Iterable[Any]) -> Grads:
    names, new_buffers, loss_scale = static.payload
    params = MappingProxyType(dict(zip(names, children, strict=True)))
    lease = watching(params)
    return Grads(params=params, new_buffers=new_buffers, ref=static.ref, loss_scale=loss_scale, lease=lease)


def watching(params: Mapping[str, torch.Tensor | None]) -> Lease:
    """A lease for gradients that other records may hold, too; one that nobody else holds need not look at versions."""
    return Lease({name: grad for name, grad in params.items() if grad is not None})


register(Model, _flatten_model, _unflatten_model)
register(Grads, _flatten_grads, _unflatten_grads)


def renewed(model: Model, params: Mapping[str, torch.Tensor], new_buffers: Mapping[str, torch.Tensor] | None) -> Model:
    """The model with other values; `model` stays as it is."""
    buffers = model.buffers if new_buffers is None else MappingProxyType({**model.buffers, **new_buffers})
    return Model(params=params, buffers=buffers, training=model.training, ref=model.ref, loss_scale=model.loss_scale)


def handed_on(
    model: Model,
    new_buffers: Mapping[str, torch.Tensor] | None,
    where: Place,
    updated: Sequence[torch.Tensor] | None = None,
) -> Model:
    """The model whose tensors were just updated in place; `model` is spent, and so is every record over its tensors.

    Fused kernels bump no version counter by themselves (measured on CPU), so this does, for the tensors and for the
    slots that look at them: an older open graph then fails in backward instead of giving a wrong gradient. `updated`
    are the tensors in question, where they are not all: the frozen ones may belong to other records, too.
    """
    old, params = model.lease, model.params
    bump(tuple(params.values()) if updated is None else updated)
    old.spend(where)
    new = Lease(params)
    new.frames = [frame for frame in old.frames if not frame.copied]
    old.frames = ()
    engine = model.ref.engine
    for frame in () if engine is None else (*engine.frames, *engine.frozen):
        owner = frame.owner
        if owner is old:
            increment_version(frame.slots)
            frame.owner = None if frame.copied else new
        elif owner is not None and owner.versions != versions_of((owner.values or {}).values()):
            # another record over the same tensors is bound here: it must be found out, and its graphs must fail
            increment_version(frame.slots)
            owner.frames, frame.owner = (), None
    buffers = model.buffers if new_buffers is None else MappingProxyType({**model.buffers, **new_buffers})
    return Model(
        params=params, buffers=buffers, training=model.training, ref=model.ref, loss_scale=model.loss_scale, lease=new
    )


def check_fit(model: Model, grads: Grads) -> None:
    """Raise `GradientError` unless the gradients are those of a model with these names and shapes."""
    if grads.ref is model.ref or grads.ref == model.ref:
        return
    ours, theirs = set(model.params), set(grads.params)
    detail = f"names differ: {sorted(ours ^ theirs)[:6]}" if ours != theirs else "shapes or dtypes differ"
    raise GradientError(
        f"these gradients belong to another model ({detail}). Pass the Grads that value_and_grad returned for"
        " this Model."
    )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Cursor:
    """Where a stream of data is: plain integers, so resuming is exact at any world size and batch size."""

    seed: int = 0
    """Decides the order together with the epoch."""
    epoch: int = 0
    """How many times the data have been gone through."""
    index: int = 0
    """How many samples of this epoch's global order are consumed, over all ranks."""
