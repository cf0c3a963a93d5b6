"""Setting an optimizer up: from a `torch.optim` class, from an instance, or from an (init, update) pair."""

import functools
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from fabricfn.errors import ConfigurationError
from fabricfn.optimizers import fused, shares, stock, transforms
from fabricfn.optimizers.defaults import check_names, defaults_of
from fabricfn.optimizers.kernels import KERNELS, clones, kernel_for
from fabricfn.optimizers.layout import Pattern, divide, models_of, moving_of, select
from fabricfn.optimizers.shards import check_elementwise, likes_of, taken_row
from fabricfn.records import Model, Ref
from fabricfn.runtimes import Runtime
from fabricfn.sharding import local_of
from fabricfn.states import Optimizer, Plan
from fabricfn.tree import Tree

Hyper = Mapping[str, Any]


def setup_optimizer(
    rt: Runtime,
    models: Tree,
    optimizer: Any,
    *,
    groups: Mapping[Pattern, Hyper] | None = None,
    params: Pattern | Sequence[Pattern] | None = None,
    elementwise: bool = False,
    **hyperparams: Any,
) -> Optimizer:
    """The state of an optimizer for a model, before its first step.

    AdamW, Adam, SGD and Adagrad work by torch's fused kernels unless you ask otherwise (`foreach=True`,
    `fused=False`, ...). Frozen parameters are left out. Not collective.

    Where parameters are sharded (DTensors, under fsdp), each rank updates its own parts at full speed, which is right
    for optimizers that work number by number: Adadelta, Adagrad, Adam, AdamW, Adamax, ASGD, NAdam, RAdam, RMSprop,
    Rprop, SGD. `opt.state` shows DTensors of the parameters' shapes. The numbers are those of the whole tensors, up to
    the last bit of torch's fused kernels; with `fused=False` they are the same bits. Under `ddp(shard_optimizer=True)`
    the state alone is sharded, with the bits of `ddp()`.

    Args:
        models: one Model, or any pytree of Models that are updated together. In a tree, names are "path/name".
        optimizer: any `torch.optim` class, also one of your own; an instance that you built over the parameters of
            the module given to `setup_model` (or over its `named_parameters()`), with the state that it has; or an
            (init, update) pair in the shape of optax: `init(params) -> state`, `update(grads, state, params) ->
            (updates, state)`, on trees name -> tensor; the step is `params + updates`.
        groups: name pattern ("*.bias") or predicate of the name -> hyperparameters of its own. The first that fits
            counts; what none fits makes the last group.
        params: a pattern, a predicate or a list of them: the part of the model that this optimizer updates.
        elementwise: your word that an optimizer of your own (class, instance with hooks, or pair) updates every number
            by itself, from its own gradient and state: no norm, no mean, no matrix product. Only then may it update
            sharded parameters. Without a meaning where they are whole.
        **hyperparams: what the class takes beside the parameters: `lr=3e-4`.

    Returns:
        An `Optimizer`, on the devices of the parameters.

    Raises:
        ConfigurationError: an unknown hyperparameter (says which there are), a pattern that fits nothing, an instance
            over other parameters.
        CapabilityError: parameters or state are sharded, and the optimizer may need more than parts.

    Example:
        >>> import torch, fabricfn as ff
        >>> rt = ff.init_runtime(devices=1, accelerator="cpu")
        >>> model = ff.setup_model(rt, torch.nn.Linear(2, 1))
        >>> ff.setup_optimizer(rt, model, torch.optim.AdamW, lr=0.1, groups={"*bias": {"weight_decay": 0.0}})
        Optimizer(AdamW, 2 params, lr [0.1, 0.1], step 0)
    """
    whole = _Whole(rt, models)
    if whole.likes is not None or whole.shares:
        check_elementwise(optimizer, promised=elementwise)
    if isinstance(optimizer, type) and issubclass(optimizer, torch.optim.Optimizer):
        positions = select(params, whole.labels, whole.positions)
        whole.cover(positions)
        return _from_class(whole, optimizer, divide(groups, whole.labels, positions), hyperparams)
    if isinstance(optimizer, torch.optim.Optimizer):
        _refuse(f"an instance of {type(optimizer).__name__}", groups=groups, params=params, **hyperparams)
        return _from_instance(whole, optimizer)
    pair = transforms.pair_of(optimizer)
    if pair is None:
        raise ConfigurationError(
            f"optimizer is a torch.optim class, an instance of one, or an (init, update) pair; it is {optimizer!r:.80}."
            " Write setup_optimizer(rt, model, torch.optim.AdamW, lr=1e-3)."
        )
    _refuse("an (init, update) pair", groups=groups, **hyperparams)
    return _from_pair(whole, pair, params)


def _from_pair(
    whole: "_Whole",
    pair: tuple[Callable[..., Any], Callable[..., Any]],
    params: Pattern | Sequence[Pattern] | None,
) -> Optimizer:
    covered = tuple(select(params, whole.labels, whole.positions))
    whole.cover(covered)
    name = getattr(pair[1], "__qualname__", "update").partition(".")[0]
    plan = whole.plan(name, (), transforms.Pair(init=pair[0], update=pair[1], covered=covered), transforms)
    with torch.no_grad():
        state = pair[0](transforms.tree_of(plan, clones(whole.values), covered))
    return Optimizer(store=state, shared={}, hyperparams=(), step=0, plan=plan)


def _refuse(what: str, **options: Any) -> None:
    given = sorted(name for name, value in options.items() if value is not None)
    if given:
        raise ConfigurationError(
            f"{what} has its hyperparameters already; leave out {', '.join(given)}. To set them, pass a torch.optim"
            " class."
        )


class _Whole:
    """The models that an optimizer is set up for."""

    def __init__(self, rt: Runtime, models: Tree) -> None:
        records, self.spec, self.labels = models_of(models)
        self.records: list[Model] = records
        for record in records:
            record.lease.check("Model")
        self.values: list[Tensor] = [value for record in records for value in record.params.values()]
        self.moving = [moves for record in records for moves in moving_of(record)]
        self.shapes = [value.shape for value in self.values]
        self.likes = likes_of(self.values)
        if self.likes is not None:  # [Note: parts]; `check_elementwise` refuses what cannot work on them
            self.values = [local_of(value) for value in self.values]
        self.parted, self.world = self.likes is not None, rt.world
        self.shares = rt.strategy.shard_optimizer and not self.parted and rt.world.group is not None
        self.positions = [i for i, moves in enumerate(self.moving) if moves]
        if not self.positions:
            raise ConfigurationError("this model has no trainable parameter; every one is frozen")

    def cover(self, positions: Iterable[int]) -> None:
        """What the optimizer updates is known now; where ranks share its state, the values become this rank's parts."""
        if self.shares:
            self.likes = shares.likes_over(self.values, positions, self.world)
            self.values = shares.parts(self.likes, self.values)

    def plan(self, name: str, groups: Sequence[tuple[int, ...]], detail: Any, way: Any) -> Plan:
        names = tuple(tuple(record.params) for record in self.records)
        return Plan(
            name=name,
            ref=Ref(None, (name, names, tuple(groups))),
            spec=self.spec,
            names=names,
            shapes=tuple(self.shapes),
            moving=None if all(self.moving) else tuple(self.moving),
            groups=tuple(groups),
            detail=detail,
            advance=functools.partial(shares.advance, way.advance) if self.shares else way.advance,
            read=way.read,
            write=way.write,
            likes=self.likes,
            parted=self.parted,
            dressed=None if self.likes is None else way.dressed,
        )


def _from_class(
    whole: _Whole,
    cls: type[torch.optim.Optimizer],
    divided: Sequence[tuple[tuple[int, ...], Hyper]],
    hyperparams: Hyper,
) -> Optimizer:
    for options in (hyperparams, *(own for _, own in divided)):
        check_names(cls, options)
    groups = [index for index, _ in divided]
    if cls in KERNELS:
        merged = [defaults_of(cls, {**hyperparams, **own}) for _, own in divided]
        direct = _direct(whole, cls, groups, merged)
        if direct is not None:
            return direct
    given: Any = [{"params": [whole.values[i] for i in index], **own} for index, own in divided]
    return _from_stock(whole, cls(given, **hyperparams), groups, {id(value): i for i, value in enumerate(whole.values)})


def _direct(whole: _Whole, cls: type, groups: Sequence[tuple[int, ...]], merged: Sequence[Hyper]) -> Optimizer | None:
    """The optimizer that works by kernels, where they do what these options ask for."""
    kernel = kernel_for(cls, merged, [whole.values[i] for index in groups for i in index])
    if kernel is None:
        return None
    buckets = fused.buckets_of(groups, whole.values, whole.labels)
    detail = fused.Fused(kernel=kernel, buckets=buckets)
    store = fused.start(detail, merged, whole.values)
    frozen = tuple(MappingProxyType(dict(hyper)) for hyper in merged)
    return Optimizer(
        store=store, shared={}, hyperparams=frozen, step=0, plan=whole.plan(cls.__name__, groups, detail, fused)
    )


def _from_stock(
    whole: _Whole,
    instance: torch.optim.Optimizer,
    groups: Sequence[tuple[int, ...]],
    positions: Mapping[int, int],
    *,
    theirs: bool = False,
) -> Optimizer:
    """By the class itself; `theirs` says that the instance is the user's, whose state is of whole tensors."""
    detail, rows, shared = stock.taken_apart(instance, groups, positions)
    hyperparams = tuple(
        MappingProxyType({key: value for key, value in group.items() if key not in ("params", "param_names")})
        for group in instance.param_groups
    )
    plan = whole.plan(type(instance).__name__, groups, detail, stock)
    if theirs and plan.likes is not None:
        order = [i for index in groups for i in index]
        rows = [taken_row(plan, i, row, whole.labels[i]) for i, row in zip(order, rows, strict=True)]
    return Optimizer(store=rows, shared=shared, hyperparams=hyperparams, step=0, plan=plan)


def _from_instance(whole: _Whole, instance: torch.optim.Optimizer) -> Optimizer:
    """The user's own instance: groups matched by the identity of the parameters, then by their names."""
    positions = _sources(whole)
    covered: list[tuple[int, ...]] = []
    for number, group in enumerate(instance.param_groups):
        index: list[int] = []
        names = group.get("param_names", ())
        for param, name in itertools.zip_longest(group["params"], names):
            at = positions.get(id(param))
            if at is None and name is not None:
                at = _named(whole, name)
            if at is None:
                raise ConfigurationError(
                    f"group {number} of this {type(instance).__name__} holds a parameter of shape {tuple(param.shape)}"
                    f"{'' if name is None else f' named {name!r}'} that is none of the module given to setup_model."
                    " Build it over module.parameters() of that very module, over module.named_parameters(), or pass"
                    " the class: setup_optimizer(rt, model, torch.optim.AdamW, lr=1e-3)."
                )
            positions[id(param)] = at
            index.append(at)
        covered.append(tuple(i for i in index if whole.moving[i]))
    whole.cover(i for index in covered for i in index)
    hooked = any(vars(instance).get(f"_optimizer_step_{when}_hooks") for when in ("pre", "post"))
    if type(instance) in KERNELS and not instance.state and not hooked:
        hyper = [
            {key: value for key, value in group.items() if key not in ("params", "param_names")}
            for group in instance.param_groups
        ]
        direct = _direct(whole, type(instance), covered, hyper)
        if direct is not None:
            return direct
    return _from_stock(whole, instance, covered, positions, theirs=True)


def _sources(whole: _Whole) -> dict[int, int]:
    """The position of each of the user's own parameters, by its id."""
    out: dict[int, int] = {}
    start = 0
    for record in whole.records:
        engine = record.ref.engine
        for i, source in enumerate(engine.sources if engine is not None else ()):
            param = source()
            if param is not None:
                out[id(param)] = start + i
        start += len(record.params)
    return out


def _named(whole: _Whole, name: str) -> int | None:
    names = [own for record in whole.records for own in record.params]
    found = [i for i, (label, own) in enumerate(zip(whole.labels, names, strict=True)) if name in (label, own)]
    return found[0] if len(found) == 1 else None
