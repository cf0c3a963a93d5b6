"""`optimizer.state_dict()` of torch into an Optimizer: state by index, or by name, becomes state by name."""

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch

from fabricfn.checkpoint.foreign.filling import Filling, Make
from fabricfn.checkpoint.foreign.names import is_optimizer, only_one, unwrapped
from fabricfn.checkpoint.foreign.values import Keys, Stored, read, settled, tensor_text
from fabricfn.errors import CheckpointError
from fabricfn.sharding import with_local
from fabricfn.states import Optimizer, Plan, optimizer_from_tree
from fabricfn.tree import tree_unflatten

HOW = frozenset({"foreach", "fused", "capturable", "differentiable"})
"""Hyperparameters that say how a step is computed, not what: those of the template stay."""
OF_SCHEDULES = frozenset({"initial_lr", "max_lr", "min_lr", "base_momentum", "max_momentum"})
"""What torch's schedulers leave in the groups."""
LIKE_PARAMS = frozenset(
    {
        *("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "square_avg", "grad_avg", "acc_delta"),
        *("exp_inf", "prev", "sum", "ax"),
    }
)
"""Slots that have the shape of their parameter in all classes of torch."""

Row = Mapping[str, Any]


def optimizer(filling: Filling, like: Optimizer, tree: Any, keys: Keys) -> Make:
    """The values of `like` from a state dict in `tree`, in which the groups are those of `like`."""
    if like.lease.spent is not None or like.lease.values is not None:
        like.lease.check("Optimizer")
    try:
        at, found = only_one(tree, is_optimizer, "state dict of an optimizer, with state and param_groups", bool)
    except CheckpointError as error:
        return filling.problem(keys, str(error))
    keys, plan = (*keys, *at), like.plan
    if not plan.groups:
        return filling.problem(keys, f"{plan.name} is an (init, update) pair, which no state dict of torch fits")
    groups = [_plain_dict(group) for group in cast("list[Any]", settled(found["param_groups"]))]
    rows = _plain_dict(found.get("state"))
    positions = _positions(filling, plan, groups, rows, keys)
    if positions is None:
        return lambda values: None
    return _State(filling, like, keys).make(rows, positions, groups)


def _plain_dict(value: Any) -> dict[Any, Any]:
    value = settled(value)
    return {key: settled(item) for key, item in cast("dict[Any, Any]", value).items()} if type(value) is dict else {}


def _positions(filling: Filling, plan: Plan, groups: Sequence[Row], rows: Row, keys: Keys) -> dict[int, Any] | None:
    """Position of a parameter -> its key in the state; None, and a problem, when the groups are others."""
    names = [name for part in plan.names for name in part]
    before = len(filling.problems)
    found: dict[int, Any] = {}
    if len(groups) != len(plan.groups):
        filling.problem(
            (*keys, "param_groups"),
            f"the template has {len(plan.groups)} groups, the file {len(groups)}. Set the optimizer up with the same"
            " groups, in the same order",
        )
        return None
    for number, (group, ours) in enumerate(zip(groups, plan.groups, strict=True)):
        place = (*keys, "param_groups", number)
        ids = list(cast("Sequence[Any]", settled(group.get("params", []))))
        given = settled(group.get("param_names")) or ids
        if given and all(type(name) is str for name in given) and len(given) == len(ids):
            known = {name: name for name in names}
            if len(known) < len(names):
                filling.problem(place, "it names parameters, and several models have the same names")
                continue
            at = {names.index(unwrapped(name, known)): key for name, key in zip(given, ids, strict=True)
                  if unwrapped(name, known) in known}  # fmt: skip
            strange = [name for name in given if unwrapped(name, known) not in known]
        elif len(ids) == len(ours):
            at, strange = dict(zip(ours, ids, strict=True)), []
        elif len(groups) == 1 and len(ids) == len(names):  # torch's own hold the frozen ones, too
            at, strange = dict(enumerate(ids)), []
        else:
            filling.problem(place, f"the template has {len(ours)} parameters in it, the file {len(ids)}")
            continue
        at = {position: key for position, key in at.items() if position in ours or _row(rows, key)}
        if set(at) != set(ours) or strange:
            differ = strange or [names[position] for position in set(at) ^ set(ours)]
            filling.problem(place, f"it has other parameters than in the template: {', '.join(sorted(differ)[:6])}")
        found |= at
    return found if len(filling.problems) == before else None


def _row(rows: Row, key: Any) -> dict[str, Any]:
    """The state of one parameter; torch's distributed checkpoints make its index a string."""
    items: Any = rows
    return _plain_dict(items[key] if key in items else items.get(str(key), {}))


class _State:
    """Builds one Optimizer, and notes what does not fit."""

    def __init__(self, filling: Filling, like: Optimizer, keys: Keys) -> None:
        self.filling, self.like, self.plan, self.keys = filling, like, like.plan, keys
        self.names = [name for part in self.plan.names for name in part]
        plan = self.plan
        trees: list[Any] = [like.state] if plan.spec is None else plan.spec.flatten_up_to(like.state)
        known: list[Row] = []
        for names, tree in zip(plan.names, trees, strict=True):
            known += [tree.get(name, {}) for name in names]
        self.known = known
        self.step = -1.0

    def make(self, rows: Row, positions: Mapping[int, Any], groups: Sequence[Row]) -> Make:
        joint = bool(getattr(self.plan.detail, "joint", False))
        hyperparams = [self.group(number, group) for number, group in enumerate(groups)]
        used = {str(key) for key in positions.values()}
        for key in rows:
            if str(key) not in used:
                self.filling.problem((*self.keys, "state", key), "is the state of no parameter of the template")
        made: dict[int, dict[str, Make]] = {}
        shared: dict[str, Make] = {}
        for position, key in sorted(positions.items()):
            row, place = _row(rows, key), (*self.keys, "state", key)
            if joint:
                shared |= {slot: self.filling.plain(item, (*place, slot)) for slot, item in row.items()}
                made[position] = {}
            else:
                made[position] = self.row(position, row, place)
        like, filling = self.like, self.filling
        step = self.counted(rows, filling)

        def build(values: list[Any]) -> Optimizer:
            state = {at: {slot: make(values) for slot, make in row.items()} for at, row in made.items()}
            others = {**like.shared, **{slot: make(values) for slot, make in shared.items()}}
            tree = {"state": self.mirrored(state), "shared": others, "hyperparams": hyperparams}
            return optimizer_from_tree(like, {**tree, "step": like.step if step is None else int(step(values))})

        return build

    def row(self, position: int, row: Row, keys: Keys) -> dict[str, Make]:
        """The state of one parameter."""
        known = self.known[position]
        found: dict[str, Make] = {}
        if not row:
            if known and self.like.step:
                self.filling.problem(keys, f"the file has no state for {self.names[position]}, the template has")
            return {slot: _kept(value) for slot, value in known.items()}
        for slot in known:
            if slot not in row and known[slot] is not None:
                self.filling.problem((*keys, slot), f"is in the template, not in the file ({self.names[position]})")
        for slot, item in row.items():
            if known and slot not in known and any(name in known for name in LIKE_PARAMS):
                self.filling.problem((*keys, slot), f"{self.plan.name} keeps no such state")
            found[slot] = self.slot(position, slot, item, (*keys, slot))
        return found

    def slot(self, position: int, slot: str, item: Any, keys: Keys) -> Make:
        """One value of the state, as the template has it, or as the parameter is placed."""
        before = self.known[position].get(slot)
        if type(item) in (int, float) and slot == "step":  # torch before 1.12 counted in numbers
            like = before if isinstance(before, torch.Tensor) else torch.empty((), device="cpu")
            counted = torch.full_like(like, float(item))
            return lambda values: counted
        if type(item) is not Stored:
            return self.filling.plain(item, keys)
        shape, placed = tuple(self.plan.shapes[position]), (self.plan.likes or {position: None})[position]
        if slot in LIKE_PARAMS and item.shape != shape:
            text = f"{self.names[position]} has the shape {list(shape)}, the file {tensor_text(item)}"
            return self.filling.problem(keys, text + "; are the parameters in the same order?")
        if isinstance(before, torch.Tensor):
            if slot == "step" and before.shape == () and item.shape in ((), (1,)):
                return self.counter(item, before, keys)
            return self.filling.tensor(before, item, keys)
        if slot == "step" and item.shape == ():
            return self.filling.want(item, torch.empty((), dtype=item.dtype, device="cpu"), keys)
        if placed is not None and item.shape == shape and shape:
            return self.filling.want(item, _placed(placed, item.dtype), keys)
        return self.filling.want(item, None, keys)

    def counter(self, item: Stored, before: torch.Tensor, keys: Keys) -> Make:
        """A count of steps, of whatever dtype it was written in."""
        found = self.filling.want(item, None, keys)
        return lambda values: found(values).to(device=before.device, dtype=before.dtype).reshape(before.shape)

    def counted(self, rows: Row, filling: Filling) -> Make | None:
        """The largest count of steps in the state; None where the class keeps none."""
        makes: list[Make] = []
        for key, row in rows.items():
            item: Any = _plain_dict(row).get("step")
            if type(item) in (int, float):
                makes.append(_kept(float(item)))
            elif type(item) is Stored and item.shape in ((), (1,)):
                makes.append(
                    filling.want(item, torch.empty(item.shape, dtype=item.dtype, device="cpu"), (*self.keys, key))
                )
        return (lambda values: max(float(make(values)) for make in makes)) if makes else None

    def group(self, number: int, group: Row) -> dict[str, Any]:
        """The hyperparameters of one group."""
        old = self.like.hyperparams[number]
        found: dict[str, Any] = {}
        for name, value in group.items():
            place = (*self.keys, "param_groups", number, name)
            if name in ("params", "param_names") or name in HOW:
                continue
            if name not in old:
                if name not in OF_SCHEDULES:
                    self.filling.problem(place, f"{self.plan.name} has no such hyperparameter")
                continue
            found[name] = self.hyperparam(old[name], value, place)
        return found

    def hyperparam(self, old: Any, value: Any, keys: Keys) -> Any:
        """A hyperparameter in the template's kind: a learning rate may be a tensor on either side."""
        if type(value) is Stored and value.shape in ((), (1,)):
            into = torch.empty(value.shape, dtype=value.dtype, device="cpu")
            found = read(value, into, "/".join(map(str, keys)), into.device)
            return found.to(old.device) if isinstance(old, torch.Tensor) else found.item()
        return value

    def mirrored(self, rows: Mapping[int, Any]) -> Any:
        """The rows by name, in the tree of the models."""
        made: list[dict[str, Any]] = []
        start = 0
        for names in self.plan.names:
            made.append({name: rows[start + i] for i, name in enumerate(names) if start + i in rows})
            start += len(names)
        return made[0] if self.plan.spec is None else tree_unflatten(self.plan.spec, made)


def _kept(value: Any) -> Make:
    return lambda values: value


def _placed(like: Any, dtype: torch.dtype) -> torch.Tensor:
    """A DTensor without memory, placed as `like`."""
    return with_local(like, torch.empty_like(like._local_tensor, dtype=dtype, device="meta"))
