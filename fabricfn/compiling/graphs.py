"""From a step to a graph, and from a graph to a function: one trace, and what went wrong in it."""

import dataclasses
import linecache
import os
import threading
import time
import traceback
from array import array
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
import torch._inductor
from torch import fx
from torch._dynamo.backends.registry import lookup_backend
from torch._guards import TracingContext, tracing as tracing_context
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.distributed import _functional_collectives
from torch.fx.experimental.proxy_tensor import get_proxy_mode, make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from fabricfn.compiling.arguments import Part, unflatten
from fabricfn.compiling.capturing import Recorder, check_devices
from fabricfn.compiling.describing import described
from fabricfn.compiling.draws import Block, Draws
from fabricfn.compiling.hosted import Host, Of
from fabricfn.compiling.overlaps import Guard
from fabricfn.compiling.reading import Reader
from fabricfn.compiling.results import Results
from fabricfn.compiling.standins import Standins
from fabricfn.errors import CapabilityError, FabricfnError
from fabricfn.random import CPU
from fabricfn.runtimes import Runtime

Backend = str | Callable[[fx.GraphModule, list[torch.Tensor]], Callable[..., Any]]
COLLECTIVES = _functional_collectives
"""Named here, since a graph can hold them only once that file has told their shapes."""
_LOCK = threading.RLock()
"""Tracing changes torch's classes for a moment, so ranks that are threads take turns."""
_NOT_THE_USERS = tuple(os.path.dirname(os.path.abspath(path)) + os.sep for path in (torch.__file__, __file__ + "/.."))


class Numbers:
    """The numbers of a call as one tensor, in the widest dtype that the device has.

    The same memory in every call: making a tensor of a list takes 15 us in the middle of a step.
    """

    __slots__ = ("count", "hosted", "memory", "place", "views")

    def __init__(self, count: int, hosted: Sequence[Of], dtype: torch.dtype, device: torch.device) -> None:
        self.count = count
        """How many of them come first, as one tensor."""
        self.hosted = hosted
        """What makes the others, each a tensor of its own."""
        self.place = None if device == CPU else (device, dtype)
        self.memory = array("d", [0.0] * (count + len(hosted)))
        self.views = self._cut(torch.frombuffer(self.memory, dtype=torch.float64)) if self.memory else []

    def filled(self, numbers: list[float], parts: Sequence[Part]) -> Sequence[torch.Tensor]:
        """These numbers and those made of the arguments, until the next call."""
        if self.hosted:
            numbers = [*numbers, *[of(parts) for of in self.hosted]]
        self.memory[:] = array("d", numbers)
        if self.place is None:
            return self.views
        return self._cut(torch.frombuffer(self.memory, dtype=torch.float64).to(*self.place))

    def _cut(self, all_: torch.Tensor) -> list[torch.Tensor]:
        first = [all_[: self.count]] * bool(self.count)
        return [*first, *all_[self.count :].unbind()]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Trace:
    """One compiled graph, and what goes into it and comes out."""

    run: Callable[..., Sequence[torch.Tensor]]
    recorder: Recorder | None
    """What runs it by a recording, if that is wanted."""
    results: Results
    blocks: Sequence[Block]
    names: Sequence[str]
    """What the step calls its arguments."""
    described: Mapping[str, str]
    """What the graph depends on in them, as messages show it."""
    guard: Guard
    numbers: Numbers
    seconds: float


def trace(
    rt: Runtime,
    step_fn: Callable[..., Any],
    spec: Any,
    parts: Sequence[Part],
    names: Sequence[str],
    backend: Backend,
    options: Mapping[str, Any],
    capture: bool,
) -> Trace:
    """Trace the step for arguments like these, and compile it."""
    with _LOCK:
        start = time.perf_counter()
        # without shapes that depend on values; the cache of compiled graphs wants an environment for them all the same
        shapes = ShapeEnv(allow_scalar_outputs=False, allow_dynamic_output_shape_ops=False)
        fake = FakeTensorMode(allow_non_fake_inputs=True, shape_env=shapes, static_shapes=True)
        tensors = [tensor for part in parts for tensor in part.tensors]
        count = sum(len(part.numbers) for part in parts)
        draws = Draws(rt.device)
        wide = torch.float32 if rt.device.type == "mps" else torch.float64
        usual = torch.float64 if rt.precision.param_dtype is torch.float64 else torch.float32
        host = Host(draws, usual, wide, rt.device)
        standins = Standins(rt, host)
        found: list[Results] = []

        def flat(*inputs: torch.Tensor) -> list[torch.Tensor]:
            numbers = list((inputs[-1] * 1).unbind()) if count else []  # no result is a view of this memory
            left, left_numbers = iter(inputs[: len(tensors)]), iter(numbers)
            given = [standins.make(i, part, left, left_numbers) for i, part in enumerate(parts)]
            reader = Reader(
                standins=standins,
                given=given,
                counts=[len(part.tensors) for part in parts],
                places={id(tensor): place for place, tensor in enumerate(inputs[: len(tensors)])},
                numbers=number_places(parts, given, numbers),
                wide=wide,
            )
            args, kwargs = unflatten(spec, given)
            refusals: list[Any] = []
            cast("Any", get_proxy_mode()).tracer.refusals = refusals
            with draws:
                found.append(reader.read(step_fn(*args, **kwargs), refusals))
                return [output.detach() for output in reader.outputs]

        with fake, torch.autograd.set_multithreading_enabled(False):
            examples = [
                torch.empty_strided(one.shape, one.stride(), dtype=one.dtype, device=one.device) for one in tensors
            ]
            examples += [torch.empty(count, dtype=wide, device=rt.device)] * bool(count)
            try:
                gm = make_fx(flat)(*examples)
            except Exception as error:  # whatever the user's code raises: it is told where
                better = blamed(error)
                if better is error:
                    raise
                raise better from error
        if capture:
            check_devices(gm, rt.device)
        with torch.autocast(rt.device.type, enabled=False):  # one around the call is in the graph already
            run = compiled(gm, fake, backend, options)
        return Trace(
            run=run,
            recorder=Recorder(run, found[0].spent, [len(part.tensors) for part in parts]) if capture else None,
            results=found[0],
            blocks=[block for block in draws.blocks if block.draws],
            names=names,
            described=described(names, parts),
            guard=Guard(),
            numbers=Numbers(count, host.inputs, wide, rt.device),
            seconds=time.perf_counter() - start,
        )


def number_places(parts: Sequence[Part], given: Sequence[Any], numbers: Sequence[torch.Tensor]) -> dict[int, int]:
    """The id of a tensor that stands for a number -> its place; a float that is an argument has another dtype."""
    places = {id(number): place for place, number in enumerate(numbers)}
    place = 0
    for part, standin in zip(parts, given, strict=True):
        if type(part.given) is float:
            places[id(standin)] = place
        place += len(part.numbers)
    return places


def in_order(gm: fx.GraphModule) -> None:
    """Put inputs that were found on the way before everything else, and what was drawn behind other inputs."""
    first = next(node for node in gm.graph.nodes if node.op != "placeholder")
    for node in sorted(gm.graph.find_nodes(op="placeholder"), key=lambda node: node.target.startswith("draw_")):
        first.prepend(node)
    gm.graph.lint()
    gm.recompile()


def compiled(
    gm: fx.GraphModule, fake: FakeTensorMode, backend: Backend, options: Mapping[str, Any]
) -> Callable[..., Any]:
    """The function that a back end makes of a graph."""
    in_order(gm)
    examples = [node.meta["val"] for node in gm.graph.nodes if node.op == "placeholder"]
    with tracing_context(TracingContext(fake)):
        if backend == "inductor":
            inductor: Any = torch._inductor
            return inductor.compile(gm, examples, options={"size_asserts": False, **options})
        return (lookup_backend(backend) if isinstance(backend, str) else backend)(gm, examples, **options)


def blamed(error: Exception) -> Exception:
    """The error with the line of the user's code that it comes from."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not os.path.abspath(frame.filename).startswith(_NOT_THE_USERS)]
    where = ""
    if own:
        line = linecache.getline(own[-1].filename, own[-1].lineno or 0).strip()
        where = f"{own[-1].filename}:{own[-1].lineno}: {line}"
    asks = isinstance(error, DataDependentOutputException | DynamicOutputShapeException)
    asks = asks or any(words in str(error) for words in _ASKS)
    if asks and not isinstance(error, FabricfnError):
        return CapabilityError(
            "a compiled step cannot look at the numbers of a tensor, since it is traced once, without any; this line"
            f" does:\n  {where}\nWrite torch.where(condition, a, b) in place of `if`, a mask in place of tensor[mask]"
            " or nonzero(), keep the tensor in place of .item(), and return what you want to print."
        )
    error.add_note(f"while compile_step traced your step, at\n  {where}")
    return error


_ASKS = ("get value out of a tracing tensor", ".numpy() is not supported for tensor subclasses")
