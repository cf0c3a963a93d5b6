"""`compile_step`: a user's step as one graph for each signature of its arguments."""

import sys
import warnings
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import torch

from fabricfn import reporting
from fabricfn.compiling.arguments import Part, parts_of
from fabricfn.compiling.describing import described, difference, names_of
from fabricfn.compiling.graphs import Backend, Trace, trace
from fabricfn.compiling.results import Call, lose
from fabricfn.errors import CapabilityError, ConfigurationError
from fabricfn.leases import Place, caller
from fabricfn.runtimes import Runtime
from fabricfn.tracing import tracing
from fabricfn.watching import counted

STRATEGIES = ("single", "functional")
CAPTURES = ("cuda",)
SHOWN = 1.0
"""Seconds of compiling that somebody wonders about."""


class CompiledStep:
    """A step that runs as one graph: call it as the step.

    `traces` is the number of graphs so far, `seconds` what tracing and compiling them took.
    """

    def __init__(
        self,
        rt: Runtime,
        step_fn: Callable[..., Any],
        backend: Backend,
        options: Mapping[str, Any],
        limit: int,
        capture: bool,
    ) -> None:
        self.rt = rt
        self.kind = rt.device.type
        self.step_fn = step_fn
        self.backend: Backend = backend
        self.options = options
        self.limit = limit
        self.capture = capture
        self.seconds = 0.0
        self._graphs: dict[Hashable, Trace] = {}
        self._run = counted(rt.world, "a compiled step", self._here)

    @property
    def traces(self) -> int:
        """How many graphs there are, one for each signature."""
        return len(self._graphs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """One step; within the trace of another step it is a part of that one."""
        if tracing():
            return self.step_fn(*args, **kwargs)
        return self._run(caller(), args, kwargs)

    def __repr__(self) -> str:
        name = getattr(self.step_fn, "__name__", type(self.step_fn).__name__)
        graphs = f"{self.traces} graph{'s' * (self.traces != 1)}"
        return f"CompiledStep({name}, {graphs}, {self.seconds:.1f} s of compiling)"

    def _here(self, where: Place, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        parts, spec = parts_of(args, kwargs)
        key = (spec, torch.is_autocast_enabled(self.kind), *[part.key for part in parts])
        found = self._graphs.get(key)
        if found is None:
            names = names_of(self.step_fn, args, kwargs, spec)
            if self.traces >= self.limit:
                self._warn(described(names, parts))
            found = trace(self.rt, self.step_fn, spec, parts, names, self.backend, self.options, self.capture)
            self._graphs[key] = found
            self.seconds += found.seconds
            if found.seconds >= SHOWN:
                reporting.print(self.rt, f"fabricfn: {self!r}", file=sys.stderr)
        return compute(self.rt, found, parts, where)

    def _warn(self, now: Mapping[str, str]) -> None:
        before = list(self._graphs.values())[-1].described
        warnings.warn(
            f"{self!r} is compiled once more, since its arguments changed: {difference(before, now)}. Keep shapes,"
            ' dtypes, modes and constants as they are: drop the last batch (ff.setup_dataloader(..., tail="drop")) or'
            " pad it, pass what changes as a float or a tensor. Or allow more graphs: compile_step(..., limit=n).",
            stacklevel=4,
        )


def compute(rt: Runtime, found: Trace, parts: Sequence[Part], where: Place) -> Any:
    """One call: tensors and numbers into the graph, its outputs into records."""
    inputs: list[Any] = []
    numbers: list[float] = []
    for part in parts:
        inputs += part.tensors
        numbers += part.numbers
    results = found.results
    call = Call(parts, where, inputs, numbers)
    if results.spent:
        found.guard.check(results.spent, parts, found.names)
    passed = [*inputs, *found.numbers.filled(numbers, parts)]
    for block in found.blocks:
        passed += block.drawn(parts, rt.device)
    run = found.run if found.recorder is None else found.recorder.run_for(parts, passed)
    try:
        outputs = run(*passed)
    except BaseException:
        lose(results.spent, call)
        raise
    call.pool = [*inputs, *outputs]
    return results.make(call)


def compile_step(
    rt: Runtime,
    step_fn: Callable[..., Any],
    *,
    backend: Backend = "inductor",
    options: Mapping[str, Any] | None = None,
    limit: int = 8,
    capture: bool = False,
) -> CompiledStep:
    """A training step as one compiled graph: forward, backward, all-reduce, clipping, optimizer.

    Laws: the compiled step means what `step_fn` means, up to rounding: values, gradients, buffers, random numbers,
    `donate=True` and who may use what afterwards. Its results are ordinary records, and so are its arguments. It is
    traced once for each signature of its arguments (shapes, dtypes, modes, constants); learning rates, step counts,
    other floats and keys may change from call to call. Everything else that Python computes in `step_fn`, closures
    included, is computed once, while it is traced.

    Under the strategies "single" and "functional"; "functional" averages gradients inside the graph. Where there are
    several ranks every rank must call the compiled step, with arguments of the same signature.

    Args:
        step_fn: `step_fn(*args, **kwargs) -> results`, built of `value_and_grad`, `accumulate`, `clip_gradients`,
            `optimizer_step`, `apply`, `map_params` and operations on tensors. All Models and Optimizers that it uses
            are arguments. Trees of arguments and of results may be any.
        backend: what compiles the graph: "inductor"; another of `torch.compile`'s back ends ("aot_eager" and "eager"
            compile nothing, for finding mistakes); or a function `(graph_module, example_inputs) -> callable`, whose
            result bumps the versions of tensors that it changes, as operations do.
        options: settings of the back end; for inductor those of `torch._inductor.config`.
        limit: how many graphs are made without a warning that names the argument that changed.
        capture: record the kernels as a CUDA graph at the second call, and start all of them at once from then on. On
            CUDA, one rank. Written for torch's documented interface and not yet run on a GPU: docs/compiling.md.

    Returns:
        A function to be called as `step_fn`, with the attributes `traces` and `seconds`. Every rank gets its own.

    Raises:
        ConfigurationError: `capture=True` on another device than CUDA, on several ranks, or with inductor's own.
        CapabilityError: another strategy; (from the compiled step) a step that looks at the numbers of a tensor (the
            message names the line), an optimizer that has no formula.
        GradientError: (from the compiled step) weights that sum to zero; gradients that are still not finite at the
            smallest loss scale. What the step gives away is lost then.
        DonatedError: (from the compiled step) an argument was given away.
        ModelError: (from the compiled step) what is given away shares memory with another argument.

    Example:
        >>> import torch, fabricfn as ff
        >>> rt = ff.init_runtime(devices=1, accelerator="cpu")
        >>> model = ff.setup_model(rt, torch.nn.Linear(2, 1))
        >>> opt = ff.setup_optimizer(rt, model, torch.optim.SGD, lr=0.1)
        >>> grad_fn = ff.value_and_grad(rt, lambda net, x: net(x).square().mean())
        >>> def step(model, opt, x, lr):
        ...     loss, grads = grad_fn(model, x)
        ...     model, opt = ff.optimizer_step(rt, model, opt, grads, lr=lr, donate=True)
        ...     return model, opt, loss
        >>> step = ff.compile_step(rt, step, backend="eager")
        >>> for lr in (0.1, 0.05, 0.025):
        ...     model, opt, loss = step(model, opt, torch.ones(4, 2), lr)
        >>> step.traces, opt.step
        (1, 3)
    """
    if rt.strategy.name not in STRATEGIES:
        raise CapabilityError(
            f"strategy={rt.strategy.name!r} works by hooks or by parts of parameters, which cannot be one graph;"
            f' compile_step serves {" and ".join(map(repr, STRATEGIES))}. Write init_runtime(strategy="functional") for'
            " replicas on several ranks, or leave the step as it is and compile the net:"
            " ff.setup_model(rt, module, compile=True)."
        )
    settings = dict(options or {})
    if capture:
        check_capture(rt, settings)
    return CompiledStep(rt, step_fn, backend, settings, limit, capture)


def check_capture(rt: Runtime, options: Mapping[str, Any]) -> None:
    """Raise `ConfigurationError` where no CUDA graph can be recorded."""
    found = ""
    if rt.device.type not in CAPTURES:
        found = f"is for CUDA graphs, and the device of rank {rt.rank} is {rt.device}"
    elif rt.world.group is not None:
        found = f"is for one rank, and there are {rt.world_size}: collectives in a CUDA graph are untried here"
    elif options.get("triton.cudagraphs"):
        found = 'and options={"triton.cudagraphs": True} both record; leave one out'
    if found:
        raise ConfigurationError(
            f"compile_step(..., capture=True) {found}. Without it the step is compiled all the same."
        )
