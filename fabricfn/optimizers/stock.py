"""Any `torch.optim` class, a user's own included: its state is handed over by reference for one step and read back.

[Note: rows] The state is one dict per parameter, position by position, as the class itself keeps it. What belongs to no
parameter is `shared`: the history of LBFGS, and attributes that a class of the user's own keeps on itself. State in
tensors of a class of its own is kept in parts ([Note: packed]).
"""

import collections
import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from fabricfn.errors import ConfigurationError, GradientError
from fabricfn.optimizers import packed
from fabricfn.optimizers.layout import is_tensor, mirrored, rows_of
from fabricfn.optimizers.shards import shown
from fabricfn.states import Optimizer, Plan, addresses
from fabricfn.tree import tree_leaves, tree_map

Row = dict[str, Any]
Hyper = Mapping[str, Any]

_PLAIN = (bool, int, float, complex, str, Tensor)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Stock:
    """The detail of a plan that works by a `torch.optim` class."""

    cls: type[torch.optim.Optimizer]
    attributes: Mapping[str, Any]
    """What an instance has besides state and groups: defaults, hooks, settings."""
    own: bool
    """A class of the user's own: it may keep state on itself, and change gradients."""
    aliases: Mapping[str, tuple[int, ...]]
    """The attributes that are lists of parameters, as positions."""
    joint: bool
    """Its state belongs to all parameters together; the class keeps it under the first one (LBFGS)."""
    needs_closure: bool
    """Whether `step` cannot be called without a closure."""
    tensors: frozenset[str]
    """The hyperparameters that a class of the user's own keeps as tensors, and wants as such."""


def taken_apart(
    instance: torch.optim.Optimizer, groups: Sequence[tuple[int, ...]], positions: Mapping[int, int]
) -> tuple[Stock, list[Row], Row]:
    """(detail, rows, shared) of an instance.

    Args:
        groups: the positions of each of its groups, without frozen parameters.
        positions: id of a parameter object -> position.
    """
    cls = type(instance)
    aliases: dict[str, tuple[int, ...]] = {}
    attributes = dict(vars(instance))
    state, _ = attributes.pop("state"), attributes.pop("param_groups")
    for key, value in vars(instance).items():
        if type(value) in (list, tuple) and value and all(id(entry) in positions for entry in value):
            aliases[key] = tuple(positions[id(entry)] for entry in value)
            del attributes[key]
    if "_numel_cache" in attributes:  # of LBFGS; frozen parameters may have been left out since
        attributes["_numel_cache"] = None
    own = not cls.__module__.startswith("torch.optim")
    kept = frozenset(key for key, value in attributes.items() if own and key not in _BASE and _is_data(value))
    closure = inspect.signature(cls.step).parameters.get("closure")
    detail = Stock(
        cls=cls,
        attributes={key: value for key, value in attributes.items() if key not in kept},
        own=own,
        aliases=aliases,
        joint=issubclass(cls, torch.optim.LBFGS),
        needs_closure=closure is not None and closure.default is inspect.Parameter.empty,
        tensors=frozenset(k for g in instance.param_groups for k, v in g.items() if own and is_tensor(v)),
    )
    by_position = {positions[id(key)]: row for key, row in state.items() if id(key) in positions}
    rows: list[Row] = [_copied(packed.apart(by_position.get(i, {}))) for group in groups for i in group]
    shared: Row = {_prefix(detail) + key: _copied(attributes[key]) for key in kept}
    shared |= {f"state.{key}": _copied(row) for key, row in state.items() if isinstance(key, str)}
    if detail.joint:
        shared, rows = {**shared, **rows[0]}, [{} for _ in rows]
    return detail, rows, shared


def _prefix(detail: Stock) -> str:
    """Of the attributes in `shared`, where the slots of a joint state are their neighbours."""
    return "self." if detail.joint else ""


_BASE = frozenset(
    {
        "defaults",
        "_optimizer_step_pre_hooks",
        "_optimizer_step_post_hooks",
        "_optimizer_state_dict_pre_hooks",
        "_optimizer_state_dict_post_hooks",
        "_optimizer_load_state_dict_pre_hooks",
        "_optimizer_load_state_dict_post_hooks",
        "_zero_grad_profile_name",
        "_warned_capturable_if_run_uncaptured",
        "_need_device_dtype_check_for_fused",
        "_step_supports_amp_scaling",
    }
)
"""The attributes of `torch.optim.Optimizer` and its own sub-classes."""


def _is_data(value: Any) -> bool:
    return all(isinstance(leaf, _PLAIN) for leaf in tree_leaves(value))


def _copied(tree: Any) -> Any:
    def copy(leaf: Any) -> Any:
        return leaf.detach().clone() if is_tensor(leaf) else leaf

    return tree_map(copy, tree)


def _containers(tree: Any) -> Any:
    """The same leaves in new containers."""

    def same(leaf: Any) -> Any:
        return leaf

    return tree_map(same, tree)


def advance(
    opt: Optimizer,
    params: list[Tensor],
    grads: list[Tensor | None],
    hyperparams: Sequence[Hyper],
    donate: bool,
    evaluate: Callable[[], tuple[Any, list[Tensor | None]]] | None,
) -> tuple[Any, Mapping[str, Any], Sequence[Hyper]]:
    """The step of a plan whose detail is `Stock`."""
    plan = opt.plan
    detail: Stock = plan.detail
    if detail.needs_closure and evaluate is None:
        raise ConfigurationError(
            f"{plan.name} evaluates the loss several times a step: write models, opt = optimizer_step(rt, models, opt,"
            " closure=lambda models: grad_fn(models, x, y)), without grads."
        )
    positions = [i for group in plan.groups for i in group]
    used = [params[i] for i in positions]
    rows, shared = (_containers if donate else _copied)((opt.store, dict(opt.shared)))
    if detail.joint:
        rows[0] = {key: shared.pop(key) for key in [*shared] if not key.startswith(("self.", "state."))}
    if detail.tensors:
        hyperparams = [_as_kept(detail, hyper) for hyper in hyperparams]
    instance = _put_together(plan, detail, params, used, rows, shared, hyperparams)
    copying = (detail.own or _hooked(instance)) and not (donate and evaluate is None)

    def set_gradients(found: Sequence[Tensor | None]) -> None:
        own = [found[i] for i in positions]
        _set(used, [None if grad is None else grad.clone() for grad in own] if copying else own, plan)

    def closure() -> Any:
        assert evaluate is not None
        loss, found = evaluate()
        set_gradients(found)
        return loss

    try:
        if evaluate is None:
            set_gradients(grads)
            instance.step()
        else:
            instance.step(closure)
    finally:
        for param in used:
            param.grad = None
    return _read_back(opt, detail, instance, used, hyperparams)


def _hooked(instance: torch.optim.Optimizer) -> bool:
    """Whether the user's hooks run before or after the step: they may change gradients."""
    return bool(instance._optimizer_step_pre_hooks or instance._optimizer_step_post_hooks)


def _set(params: Sequence[Tensor], grads: Sequence[Tensor | None], plan: Plan) -> None:
    for param, grad in zip(params, grads, strict=True):
        try:
            param.grad = grad
        except RuntimeError as error:
            raise GradientError(f"{plan.name}: a gradient does not fit its parameter: {error}") from None


def _as_kept(detail: Stock, hyper: Hyper) -> Hyper:
    """The hyperparameters with tensors where the class wants some: an override may be a number."""
    return {k: torch.tensor(v) if k in detail.tensors and type(v) in (int, float) else v for k, v in hyper.items()}


def _put_together(
    plan: Plan,
    detail: Stock,
    params: Sequence[Tensor],
    used: Sequence[Tensor],
    rows: Sequence[Row],
    shared: Row,
    hyperparams: Sequence[Hyper],
) -> torch.optim.Optimizer:
    """An instance over these tensors. Without `__init__`: it would check and allocate again at every step."""
    instance: torch.optim.Optimizer = object.__new__(detail.cls)
    attributes = {key.removeprefix("self."): value for key, value in shared.items() if not key.startswith("state.")}
    aliases = {key: [params[i] for i in index] for key, index in detail.aliases.items()}
    vars(instance).update(detail.attributes, **attributes, **aliases)
    instance.param_groups = [
        {"params": [params[i] for i in group], **hyper} for group, hyper in zip(plan.groups, hyperparams, strict=True)
    ]
    state: dict[Any, Any] = collections.defaultdict(dict)
    state |= {param: row for param, row in zip(used, rows, strict=True) if row}
    for group in instance.param_groups if detail.own else ():
        for param in state.keys() & {*group["params"]}:
            state[param] = packed.together(state[param], functools.partial(_first_row, instance, group, param))
    state |= {key.removeprefix("state."): value for key, value in shared.items() if key.startswith("state.")}
    instance.state = state  # pyright: ignore[reportAttributeAccessIssue]
    return instance


def _first_row(instance: torch.optim.Optimizer, group: Row, param: Tensor) -> Row:
    """What the class keeps for a parameter, by a step of a copy that goes nowhere: its gradient is zero."""
    twin = param.detach().clone()
    twin.grad = torch.zeros_like(twin)
    trial: torch.optim.Optimizer = object.__new__(type(instance))
    hooks: Row = {"_optimizer_step_pre_hooks": {}, "_optimizer_step_post_hooks": {}}
    state = collections.defaultdict[Tensor, Row](dict)
    vars(trial).update(vars(instance), **hooks, state=state, param_groups=[{**group, "params": [twin]}])
    trial.step()
    return state[twin]


def _read_back(
    opt: Optimizer, detail: Stock, instance: torch.optim.Optimizer, used: Sequence[Tensor], given: Sequence[Hyper]
) -> tuple[Any, Mapping[str, Any], Sequence[Hyper]]:
    """What the step left: rows, shared, and hyperparameters (some optimizers keep state among them)."""
    state: Any = instance.state
    rows: list[Row] = [state.get(param, {}) for param in used]
    if detail.own:
        rows = [packed.apart(row) for row in rows]
    prefix, places = _prefix(detail), {*addresses(used)}
    shared: Row = {}
    for key, value in vars(instance).items() if detail.own else ():
        if key in detail.attributes or key in detail.aliases or key in ("state", "param_groups"):
            continue
        # what the step itself added is kept, too, but lists of parameters are for this instance alone
        if prefix + key in opt.shared or (_is_data(value) and places.isdisjoint(addresses(tree_leaves(value)))):
            shared[prefix + key] = value
    shared |= {f"state.{key}": value for key, value in state.items() if isinstance(key, str)}
    if detail.joint:
        shared, rows = {**shared, **rows[0]}, [{} for _ in rows]
    hyperparams: list[Hyper] = []
    for group, now, before in zip(instance.param_groups, given, opt.hyperparams, strict=True):
        changed = {key: value for key, value in group.items() if key != "params" and value is not now.get(key)}
        hyperparams.append(MappingProxyType({**before, **changed}) if changed else before)
    return rows, shared, tuple(hyperparams)


def read(plan: Plan, store: Sequence[Row]) -> Any:
    """The state as name -> {slot: value}."""
    positions = [i for group in plan.groups for i in group]
    return mirrored(plan, {i: packed.shown(row) for i, row in zip(positions, store, strict=True)})


def dressed(plan: Plan, store: Sequence[Row]) -> list[Row]:
    """The store with DTensors in place of parts."""
    likes: Any = plan.likes
    positions = [i for group in plan.groups for i in group]
    return [
        {slot: shown(likes[i], slot, value) for slot, value in row.items()}
        for i, row in zip(positions, store, strict=True)
    ]


def write(like: Optimizer, state: Any) -> list[Row]:
    """The inverse of `read`."""
    rows = rows_of(like, state)
    positions = [i for group in like.plan.groups for i in group]
    return [packed.hidden(rows[i], old) for i, old in zip(positions, like.store, strict=True)]
