"""What a step gets while it is traced: records like the given ones, over tensors that are inputs of a graph."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from fabricfn.building import make_frame
from fabricfn.compiling.arguments import KnownState, Part
from fabricfn.compiling.draws import KeyBits, untraced
from fabricfn.compiling.hosted import Host, Hosted, as_inputs
from fabricfn.compiling.hyperparams import joined
from fabricfn.copying import copy_onto
from fabricfn.engine import Engine, Frame
from fabricfn.optimizers.formulas import Columns, Counts, Hyper
from fabricfn.optimizers.fused import Fused
from fabricfn.optimizers.kernels import Kernel
from fabricfn.random import Key
from fabricfn.records import Grads, Model, Ref
from fabricfn.runtimes import Runtime
from fabricfn.scaling import LossScale, first_scale
from fabricfn.states import Counter, Optimizer, Plan
from fabricfn.strategies.recomputing import recompute
from fabricfn.tree import tree_unflatten

Tensors = Iterator[torch.Tensor]


@dataclasses.dataclass(slots=True, eq=False)
class Standins:
    """Makes them, and knows afterwards what stood for what."""

    rt: Runtime
    host: Host
    engines: dict[int, tuple[Engine, Engine]] = dataclasses.field(default_factory=dict[int, tuple[Engine, Engine]])
    """The id of an engine, given or made here -> (the given one, the one made here)."""
    plans: dict[int, Plan] = dataclasses.field(default_factory=dict[int, Plan])
    """The id of a plan that was made here -> the given one."""

    def make(self, place: int, part: Part, tensors: Tensors, numbers: Tensors) -> Any:
        """What the step gets for this argument; takes its tensors and numbers from the inputs of the graph."""
        given = part.given
        kind: Any = given.__class__
        if kind is Model:
            return self._model(given, tensors, numbers)
        if kind is Optimizer:
            return self._optimizer(place, part, tensors, numbers)
        if kind is Grads:
            return self._grads(given, tensors, numbers)
        if kind is Key:
            return Key(KeyBits(lambda parts: parts[place].given, self.host.draws))  # pyright: ignore[reportArgumentType]  # no number yet
        if kind is float:
            return next(numbers).to(self.host.usual)
        if part.tensors:
            return next(tensors).requires_grad_(given.requires_grad)
        return given

    def _model(self, given: Model, tensors: Tensors, numbers: Tensors) -> Model:
        return Model(
            params={name: next(tensors) for name in given.params},
            buffers={name: next(tensors) for name in given.buffers},
            training=given.training,
            loss_scale=self._scale(given.loss_scale, numbers) or self._first_scale(),
            ref=self._ref(given.ref),
        )

    def _ref(self, ref: Ref) -> Ref:
        engine = ref.engine
        if engine is None:
            return ref
        if id(engine) not in self.engines:
            pair = (engine, stand_in(self.rt, engine))
            self.engines |= {id(one): pair for one in pair}
        return Ref(self.engines[id(engine)][1], ref.signature)

    def _scale(self, given: LossScale | None, numbers: Tensors) -> LossScale | None:
        found: Any = numbers
        return None if given is None else LossScale(scale=next(found), good_steps=next(found))

    def _first_scale(self) -> LossScale | None:
        first = first_scale(self.rt.precision.loss_scale)
        if first is None:
            return None
        both: Any = torch.tensor([first.scale, first.good_steps], dtype=torch.float64, device=self.rt.device)
        return LossScale(scale=both[0], good_steps=both[1])

    def _grads(self, given: Grads, tensors: Tensors, numbers: Tensors) -> Grads:
        params = {name: None if grad is None else next(tensors) for name, grad in given.params.items()}
        buffers = None if given.new_buffers is None else {name: next(tensors) for name in given.new_buffers}
        scale = self._scale(given.loss_scale, numbers)
        return Grads(params=params, new_buffers=buffers, ref=self._ref(given.ref), loss_scale=scale)

    def _optimizer(self, place: int, part: Part, tensors: Tensors, numbers: Tensors) -> Optimizer:
        given: Optimizer = part.given
        known: KnownState = part.known
        hyperparams = joined(given.hyperparams, lambda: next(numbers))
        leaves = [*known.leaves]
        for at in known.places:
            leaves[at] = next(tensors)
        for at in known.counters:
            count = next(numbers)
            leaves[at] = Counter(0, count.device, (0, Counts(count, (place, at))))
        store, shared = tree_unflatten(known.spec, leaves)
        plan = given.plan
        if type(plan.detail) is Fused:
            kernel = dataclasses.replace(plan.detail.kernel, step=_formula(plan.detail.kernel))
            plan = dataclasses.replace(plan, detail=dataclasses.replace(plan.detail, kernel=kernel))
        self.plans[id(plan)] = given.plan
        step: Any = Hosted(lambda parts: parts[place].given.step, given.step, self.host)
        return Optimizer(store=store, shared=shared, hyperparams=hyperparams, step=step, plan=plan)


def _formula(kernel: Kernel) -> Callable[..., Columns]:
    def step(hyper: Hyper, *rest: Any) -> Columns:
        return kernel.formula(as_inputs(dict(hyper)), *rest)

    return step


def stand_in(rt: Runtime, engine: Engine) -> Engine:
    """An engine whose frames are bound to inputs of a graph: each binding makes a net over them."""

    def grow(frozen: bool) -> Frame:
        model = engine.frames[0]
        frame = make_frame(engine.template, None)
        frame.names, frame.kinds = model.names, model.kinds
        frame.trainable = tuple(moves and not frozen for moves in model.trainable)
        return frame

    def point(frame: Frame, values: Sequence[torch.Tensor]) -> None:
        # a copy, since what is only detached shares the version of the value
        slots = [value.clone().requires_grad_(moves) for value, moves in zip(values, frame.trainable, strict=True)]
        with untraced():
            for slot in slots:
                slot._is_param = True  # of nn.Parameter, which cannot be made of these
            net = copy_onto(engine.template, slots, [buffer.clone() for buffer in engine.template.buffers()])
            recompute(net, {})
            fresh = make_frame(net, None)
        frame.net, frame.slots, frame.places, frame.absent = net, fresh.slots, fresh.places, fresh.absent
        frame.handle = rt.strategy.attach(net, rt.world, rt.precision, frozen=not any(frame.trainable))

    return dataclasses.replace(engine, frames=[], frozen=[], grow=grow, point=point, mend=_mended, traced=True)


def _mended(frame: Frame) -> None:
    frame.broken = False
