"""What a traced step returned, read off as recipes: how the same is made over the tensors of another call."""

import dataclasses
import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, cast

import torch

from fabricfn.compiling.arguments import KnownState, is_record, know_model, layout_of
from fabricfn.compiling.draws import KeyBits
from fabricfn.compiling.hosted import Hosted
from fabricfn.compiling.results import Call, Recipe, Results
from fabricfn.compiling.standins import Standins
from fabricfn.errors import CapabilityError
from fabricfn.leases import NO_LEASE
from fabricfn.random import Key
from fabricfn.records import Grads, Model, Ref
from fabricfn.scaling import LossScale
from fabricfn.states import Counter, Optimizer
from fabricfn.tree import tree_flatten, tree_leaves, tree_unflatten

Pick = Callable[[Sequence[Any]], Sequence[Any]]


def picking(places: Sequence[int]) -> Pick:
    """The function that takes these places out of a list."""
    if len(places) > 1:
        return operator.itemgetter(*places)
    return lambda pool: [pool[place] for place in places]


@dataclasses.dataclass(slots=True, eq=False)
class Reader:
    """Reads off what a traced step returned."""

    standins: Standins
    given: Sequence[Any]
    """What stood for each argument."""
    counts: Sequence[int]
    """How many tensors each argument has."""
    places: dict[int, int]
    """The id of a tensor -> its place among the inputs of the graph and then the outputs."""
    numbers: Mapping[int, int]
    """The id of a number's tensor -> its place among the numbers."""
    wide: torch.dtype
    """That of numbers."""
    outputs: list[torch.Tensor] = dataclasses.field(default_factory=list[torch.Tensor])
    """What the graph must put out."""
    told: list[torch.Tensor] = dataclasses.field(default_factory=list[torch.Tensor])
    """Numbers for the host; they become the last output."""

    def read(self, result: Any, refusals: Sequence[tuple[torch.Tensor, Callable[[], Exception]]]) -> Results:
        """What it takes to make such results again."""
        leaves, spec = tree_flatten(result, is_record)
        recipes = [self._recipe(leaf) for leaf in leaves]
        spent: list[tuple[int, Sequence[int]]] = []
        for place, one in enumerate(self.given):
            if type(one) is Model and one.lease.spent is not None:
                spent.append((place, [i for i, value in enumerate(one.params.values()) if value._version]))
            elif type(one) in (Optimizer, Grads) and one.lease.spent is not None:
                spent.append((place, range(self.counts[place])))
        refused = [(self._tell(flag), error) for flag, error in refusals]
        if self.told:
            self.outputs.append(torch.stack([number.to(self.wide) for number in self.told]))
        return Results(spec, recipes, spent, bool(self.told), refused)

    def _tell(self, number: torch.Tensor) -> int:
        """Where the host finds the number among those that it is told."""
        for place, one in enumerate(self.told):
            if one is number:
                return place
        self.told.append(number)
        return len(self.told) - 1

    def _scale(self, leaf: LossScale | None) -> Callable[[Call], LossScale | None]:
        if leaf is None:
            return lambda call: None
        scale, good = self._number(leaf.scale), self._number(leaf.good_steps)
        return lambda call: LossScale(scale=scale(call), good_steps=int(good(call)))

    def _number(self, number: Any) -> Callable[[Call], float]:
        """A number that came with the arguments, or that the host is told."""
        if id(number) in self.numbers:
            given = self.numbers[id(number)]
            return lambda call: call.numbers[given]
        place = self._tell(number)
        return lambda call: call.told[place]

    def _recipe(self, leaf: Any) -> Recipe:
        kind: Any = leaf.__class__
        if kind is Model and (leaf.ref.engine is None or leaf.ref.engine.traced):
            return self._model(leaf)
        if kind is Optimizer and id(leaf.plan) in self.standins.plans:
            return self._optimizer(leaf)
        if kind is Grads:
            return self._grads(leaf)
        if kind is Hosted or (kind is Key and type(leaf.bits) is KeyBits):
            of = leaf.of if kind is Hosted else leaf.bits.of
            return lambda call: of(call.parts)
        if isinstance(leaf, torch.Tensor):
            if id(leaf) in self.numbers:
                number = self.numbers[id(leaf)]
                return lambda call: call.numbers[number]
            place = self._place(leaf)
            return lambda call: call.pool[place]
        for place, standin in enumerate(self.given):
            if leaf is standin:
                return lambda call: call.parts[place].given
        return functools.partial(_constant, leaf)

    def _place(self, tensor: torch.Tensor) -> int:
        """Where the tensor is; one that is no input becomes an output."""
        if id(tensor) not in self.places:
            self.places[id(tensor)] = len(self.places)
            self.outputs.append(tensor)
        return self.places[id(tensor)]

    def _pick(self, tensors: Sequence[torch.Tensor]) -> Pick:
        return picking([self._place(tensor) for tensor in tensors])

    def _ref(self, ref: Ref) -> Ref:
        return ref if ref.engine is None else Ref(self.standins.engines[id(ref.engine)][0], ref.signature)

    def _model(self, leaf: Model) -> Recipe:
        values, names, training, ref = [*leaf.params.values()], tuple(leaf.params), leaf.training, self._ref(leaf.ref)
        buffer_names, buffers = tuple(leaf.buffers), self._pick([*leaf.buffers.values()])
        scale, key = self._scale(leaf.loss_scale), None
        source, same = self._source(leaf)
        params = self._pick(values) if source is None else None

        def make(call: Call) -> Model:
            nonlocal key
            base: Any = None if source is None else call.handed.get(source) or call.parts[source].given
            if same:
                return base
            made = Model(
                params=base.params
                if params is None
                else MappingProxyType(dict(zip(names, params(call.pool), strict=True))),
                buffers=MappingProxyType(dict(zip(buffer_names, buffers(call.pool), strict=True))),
                training=training,
                loss_scale=scale(call),
                ref=ref,
                lease=NO_LEASE if base is None else base.lease,
            )
            made.lease.known = known = know_model(made, made.lease.known, key)
            key = known.key
            return made

        return make

    def _source(self, leaf: Model) -> tuple[int | None, bool]:
        """(the argument whose parameters these are, changed in place or not; whether the rest is the same, too)."""
        for place, one in enumerate(self.given):
            if type(one) is Model and _same([*one.params.values()], [*leaf.params.values()]):
                rest = _same([*one.buffers.values()], [*leaf.buffers.values()])
                same = one.training == leaf.training and one.loss_scale is leaf.loss_scale
                return place, rest and same
        return None, False

    def _grads(self, leaf: Grads) -> Recipe:
        names = [name for name, grad in leaf.params.items() if grad is not None]
        params = self._pick([grad for grad in leaf.params.values() if grad is not None])
        none: dict[str, Any] = dict.fromkeys(leaf.params)
        buffer_names = None if leaf.new_buffers is None else tuple(leaf.new_buffers)
        buffers, ref = self._pick([*(leaf.new_buffers or {}).values()]), self._ref(leaf.ref)
        scale = self._scale(leaf.loss_scale)

        def make(call: Call) -> Grads:
            new = None if buffer_names is None else dict(zip(buffer_names, buffers(call.pool), strict=True))
            values = MappingProxyType({**none, **dict(zip(names, params(call.pool), strict=True))})
            return Grads(params=values, new_buffers=new, ref=ref, loss_scale=scale(call))

        return make

    def _optimizer(self, leaf: Optimizer) -> Recipe:
        leaves, spec = tree_flatten((leaf.store, leaf.shared))
        places = [place for place, one in enumerate(leaves) if isinstance(one, torch.Tensor)]
        pick = self._pick([leaves[place] for place in places])
        counters = [(place, self._counter(one)) for place, one in enumerate(leaves) if type(one) is Counter]
        ats = [place for place, _ in counters]
        fixed: list[Any] = [None if isinstance(one, torch.Tensor) else one for one in leaves]
        hyperparams, count = self._hyperparams(leaf.hyperparams), self._recipe(leaf.step)
        plan, kinds = self.standins.plans[id(leaf.plan)], None
        donor = self._donor(leaf)

        def make(call: Call) -> Optimizer:
            nonlocal kinds
            given = None if donor is None else call.parts[donor]
            if given is None:
                tensors, own = pick(call.pool), [*fixed]
                for place, tensor in zip(places, tensors, strict=True):
                    own[place] = tensor
            else:
                tensors, own = given.tensors, [*given.known.leaves]
            for place, counted in counters:
                own[place] = counted(call)
            store, shared = tree_unflatten(spec, own)
            hyper = hyperparams(call)
            made = Optimizer(store=store, shared=shared, hyperparams=hyper, step=count(call), plan=plan)
            kinds = kinds or (layout_of(own, spec) if given is None else given.known.kinds)
            made.lease.known = known = KnownState(kinds, object(), store, spec, own, tensors, places, ats)
            if given is not None:
                known.take_over(given.known, hyper)
            return made

        return make

    def _donor(self, leaf: Optimizer) -> int | None:
        """The argument whose tensors, changed in place, are all the tensors of this optimizer."""
        ours = [one for one in tree_leaves((leaf.store, leaf.shared)) if isinstance(one, torch.Tensor)]
        for place, one in enumerate(self.given):
            if type(one) is Optimizer and one.plan is leaf.plan and one.lease.spent is not None:
                theirs = [one for one in tree_leaves((one.store, one.shared)) if isinstance(one, torch.Tensor)]
                if _same(ours, theirs):
                    return place
        return None

    def _counter(self, leaf: Counter) -> Callable[[Call], Counter]:
        """The counter that came with an argument, some steps later."""
        counts: Any = leaf.tensors
        argument, at = cast("tuple[int, int]", counts.origin)
        count = self._number(leaf.tensor()) if counts.chosen else None
        more = leaf.count

        def counted(call: Call) -> Counter:
            given = cast("Counter", call.parts[argument].known.leaves[at])
            return given.next(more if count is None else int(count(call)) - given.count)

        return counted

    def _hyperparams(self, groups: Sequence[Mapping[str, Any]]) -> Recipe:
        for place, standin in enumerate(self.given):
            if type(standin) is Optimizer and standin.hyperparams is groups:
                return lambda call: call.parts[place].given.hyperparams
        made = [{name: self._hyperparam(name, value) for name, value in group.items()} for group in groups]
        return lambda call: tuple(
            MappingProxyType({name: recipe(call) for name, recipe in group.items()}) for group in made
        )

    def _hyperparam(self, name: str, value: Any) -> Recipe:
        if type(value) is tuple:
            several = [self._hyperparam(name, one) for one in cast("tuple[Any, ...]", value)]
            return lambda call: tuple(one(call) for one in several)
        if isinstance(value, torch.Tensor) and id(value) not in self.numbers:
            raise CapabilityError(
                f"the compiled step returns an optimizer whose {name} it computes. Compute it outside of the step and"
                f" pass it: a float as an argument, for optimizer_step(..., {name}={name})."
            )
        return self._recipe(value)


def _constant(value: Any, call: Call) -> Any:
    return value


def _same(left: Sequence[Any], right: Sequence[Any]) -> bool:
    return len(left) == len(right) and all(a is b for a, b in zip(left, right, strict=True))
