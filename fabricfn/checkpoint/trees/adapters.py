"""Records and plain containers: for each type of record, how it becomes a dict of its fields and comes back.

The only file of this room that knows classes. A manifest stores a record's tag and fields; the class comes from the
caller's template.
"""

import contextlib
import copy
import dataclasses
from collections.abc import Callable, Generator, Mapping
from types import MappingProxyType
from typing import Any, cast

import torch

from fabricfn.checkpoint.format.manifest import class_of, path_text
from fabricfn.errors import CheckpointError, FabricfnError
from fabricfn.leases import Lease, Place
from fabricfn.records import Grads, Model, handed_on
from fabricfn.states import Optimizer, optimizer_from_tree, optimizer_to_tree


def _nowhere(record: Any) -> Mapping[tuple[str | int, ...], Any]:
    """A record whose parts are all in its fields."""
    return {}


def _nothing(record: Any, where: Place) -> None:
    """A record without a lease: nothing to give away."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """How records of one type are taken apart and put together."""

    tag: str
    """The record's name in the manifest."""
    to_tree: Callable[[Any], Mapping[str, Any]]
    """record -> its fields, whose values are trees."""
    from_tree: Callable[[Any, dict[str, Any], Place | None], Any]
    """(template, fields, where) -> record. `where` is set when the template was given away there and its tensors were
    overwritten: then the fields hold those very tensors."""
    claim: Callable[[Any, Place], None] = _nothing
    """(record, where): spend its lease, before its tensors are overwritten."""
    free: frozenset[str] = frozenset()
    """The fields whose structure the checkpoint decides, not the template: state that grows while training."""
    optional: frozenset[str] = frozenset()
    """The fields that one side may lack: then the template stays as it is."""
    placed: Callable[[Any], Mapping[tuple[str | int, ...], Any]] = _nowhere
    """record -> {place in it: DTensor}: what a free field does not have yet, and will hold there in that shape, is
    sharded alike."""
    cls: type | None = None
    """The class, where the functions are the caller's: the checkpoint decides the structure of all fields, `from_tree`
    whether they will do."""


Types = Mapping[type, Adapter]
"""The types of the caller, by their classes."""


def _model_to_tree(model: Model) -> dict[str, Any]:
    model.lease.check("Model")
    fields = {"params": dict(model.params), "buffers": dict(model.buffers), "training": sorted(model.training)}
    return {**fields, **_scale_to_tree(model)}


def _scale_to_tree(record: Model | Grads) -> dict[str, Any]:
    """Nothing under a precision without a loss scale: such checkpoints fit those of any other precision."""
    return {} if record.loss_scale is None else {"loss_scale": record.loss_scale}


def _model_from_tree(like: Model, fields: dict[str, Any], where: Place | None) -> Model:
    changes = {"training": frozenset(fields["training"]), "loss_scale": fields.get("loss_scale")}
    if where is not None:
        return dataclasses.replace(handed_on(like, fields["buffers"], where), **changes)
    return dataclasses.replace(like, params=fields["params"], buffers=fields["buffers"], **changes)


def _grads_to_tree(grads: Grads) -> dict[str, Any]:
    grads.lease.check("Grads")
    new = grads.new_buffers
    fields = {"params": dict(grads.params), "new_buffers": None if new is None else dict(new)}
    return {**fields, **_scale_to_tree(grads)}


def _grads_from_tree(like: Grads, fields: dict[str, Any], where: Place | None) -> Grads:
    params = MappingProxyType(fields["params"])
    changes = {"new_buffers": fields["new_buffers"], "loss_scale": fields.get("loss_scale")}
    return dataclasses.replace(like, params=params, **changes, lease=Lease())


def _optimizer_from_tree(like: Optimizer, fields: dict[str, Any], where: Place | None) -> Optimizer:
    return optimizer_from_tree(like, fields)


def _optimizer_placed(opt: Optimizer) -> dict[tuple[str | int, ...], Any]:
    """The slots of a parameter that appear with the first step are sharded as the parameter."""
    plan = opt.plan
    if plan.likes is None:
        return {}
    models: list[tuple[Any, ...]] = [()] if plan.spec is None else list(plan.spec.paths())
    places = ((*path, name) for path, names in zip(models, plan.names, strict=True) for name in names)
    return {("state", *at): like for at, like in zip(places, plan.likes, strict=True) if like is not None}


def _spend(record: Any, where: Place) -> None:
    record.lease.spend(where)


ADAPTERS: dict[type, Adapter] = {
    Model: Adapter(
        tag="Model",
        to_tree=_model_to_tree,
        from_tree=_model_from_tree,
        claim=_spend,
        free=frozenset({"training"}),
        optional=frozenset({"loss_scale"}),
    ),
    Grads: Adapter(
        tag="Grads",
        to_tree=_grads_to_tree,
        from_tree=_grads_from_tree,
        claim=_spend,
        free=frozenset({"new_buffers"}),
        optional=frozenset({"loss_scale"}),
    ),
    Optimizer: Adapter(
        tag="Optimizer",
        to_tree=optimizer_to_tree,
        from_tree=_optimizer_from_tree,
        claim=_spend,
        free=frozenset({"state", "shared", "hyperparams"}),
        placed=_optimizer_placed,
    ),
}


OBJECT_STATE = "ObjectState"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ObjectState:
    """What is stored of an object with `state_dict` and `load_state_dict`."""

    states_by_rank: list[Any]
    """One state a rank; a single one where all ranks have the same."""
    plain_containers: bool
    """Its containers are dicts, lists and tuples of these very classes: no template is needed to make them."""


def _fields(record: Any) -> dict[str, Any]:
    kept = (field.name for field in dataclasses.fields(record) if field.metadata.get("checkpoint") != "skip")
    return {name: getattr(record, name) for name in kept if hasattr(record, name)}


def _copied(like: Any, fields: dict[str, Any], where: Place | None) -> Any:
    """Field for field, `init=False` too: `__post_init__` made its changes before the record was saved."""
    made = copy.copy(like)
    for name, value in fields.items():
        object.__setattr__(made, name, value)
    return made


def _named(record: Any) -> dict[str, Any]:
    return dict(zip(record._fields, record, strict=True))


def _named_again(like: Any, fields: dict[str, Any], where: Place | None) -> Any:
    return class_of(like)._make(fields.values())  # not through a __new__ of its own


def rides(value: object, types: Types) -> bool:
    """Whether an entry is an object with `state_dict` and `load_state_dict`; a Module is not: it has a Model."""
    kind = class_of(value)
    methods = ("load_state_dict", "state_dict")
    if kind in types or not all(callable(getattr(kind, name, None)) for name in methods):
        return False
    return not issubclass(kind, torch.nn.Module) and kind is not type


def adapter_of(value: object, types: Types) -> Adapter | None:
    """The adapter of a record: a type of the caller, one of our own, a named tuple, any dataclass; None otherwise."""
    kind = class_of(value)
    if kind in types:
        return types[kind]
    if kind in ADAPTERS:
        return ADAPTERS[kind]
    if isinstance(value, tuple) and hasattr(kind, "_fields"):
        return Adapter(tag=kind.__name__, to_tree=_named, from_tree=_named_again)
    if dataclasses.is_dataclass(kind):
        free = frozenset(field.name for field in dataclasses.fields(kind) if field.metadata.get("checkpoint") == "free")
        return Adapter(tag=kind.__name__, to_tree=_fields, from_tree=_copied, free=free)
    return None


@contextlib.contextmanager
def of_the_caller(what: str, then: str = "") -> Generator[None]:
    """Around a function of the caller's, which may raise anything: it becomes an error that names the function.

    Args:
        what: begins the message.
        then: ends it.
    """
    try:
        yield
    except FabricfnError:
        raise
    except Exception as error:
        raise CheckpointError(f"{what} raised {type(error).__name__}: {error}{then}") from error


def fields_of(adapter: Adapter, value: Any, path: tuple[str | int, ...]) -> dict[Any, Any]:
    """The fields of the record that stands at `path`.

    Raises:
        CheckpointError: the function of the caller failed, or returned no dict.
    """
    if adapter.cls is None:
        return dict(adapter.to_tree(value))
    where = f"{path_text(path)}: to_tree of the type {adapter.tag!r} (this is a {type(value).__name__})"
    with of_the_caller(where):
        fields: Any = adapter.to_tree(value)
    if not isinstance(fields, Mapping):
        raise CheckpointError(
            f"{where} returned a {type(fields).__name__}; it returns a dict of what the value is made of, by name:"
            ' to_tree=lambda value: {"items": list(value)}.'
        )
    return dict(cast("Mapping[Any, Any]", fields))


def record_from(adapter: Adapter, like: Any, fields: dict[Any, Any], where: Place | None, path: tuple[Any, ...]) -> Any:
    """The record of these fields.

    Raises:
        CheckpointError: the function of the caller failed.
    """
    if adapter.cls is None:
        return adapter.from_tree(like, fields, where)
    entries = ", ".join(map(str, fields)) or "of an empty dict"
    given = f". It was given the entries {entries}, as the checkpoint has them."
    with of_the_caller(f"{path_text(path)}: from_tree of the type {adapter.tag!r}", given):
        return adapter.from_tree(like, fields, where)
