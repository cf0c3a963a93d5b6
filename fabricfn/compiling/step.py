"""`compile_step`: a user's step as one graph per signature of its arguments."""

import contextlib
import inspect
import warnings
from itertools import chain
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import torch

from fabricfn.compiling.arguments import Part, flatten, part_of
from fabricfn.compiling.describing import described, difference, names_of
from fabricfn.compiling.graphs import Backend, Trace, empty_numbers, trace
from fabricfn.compiling.results import Call, lose
from fabricfn.errors import CapabilityError
from fabricfn.leases import Place, caller
from fabricfn.runtimes import Runtime
from fabricfn.watching import counted

STRATEGIES = ("single", "functional")


class CompiledStep:
    """A step that runs as one graph. Call it as the step; `traces` and `seconds` say what compiling cost so far."""

    def __init__(
        self, rt: Runtime, step_fn: Callable[..., Any], backend: Backend, options: Mapping[str, Any], limit: int
    ) -> None:
        self.rt = rt
        self.step_fn = step_fn
        self.backend = backend
        self.options = options
        self.limit = limit
        self.seconds = 0.0
        """What tracing and compiling took, all together."""
        self.known: dict[Hashable, Trace] = {}
        self._counted = counted(rt.world, "a compiled step", self._run)

    @property
    def traces(self) -> int:
        """How many graphs were made."""
        return len(self.known)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._counted(caller(), args, kwargs)

    def __repr__(self) -> str:
        name = getattr(self.step_fn, "__name__", type(self.step_fn).__name__)
        return f"CompiledStep({name}, {self.traces} traces, {self.seconds:.1f} s of compiling)"

    def _run(self, where: Place, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        leaves, spec = flatten(args, kwargs)
        parts = [part_of(leaf) for leaf in leaves]
        key = (spec, *[part.key for part in parts])
        found = self.known.get(key)
        if found is None:
            names = names_of(self.step_fn, args, kwargs, spec)
            self._warn(described(names, parts))
            found = trace(self.rt, self.step_fn, spec, parts, names, self.backend, self.options)
            self.known[key] = found
            self.seconds += found.seconds
        return self._compute(found, parts, where)

    def _compute(self, found: Trace, parts: Sequence[Part], where: Place) -> Any:
        inputs = [*chain.from_iterable([part.tensors for part in parts])]
        numbers = [*chain.from_iterable([part.numbers for part in parts])]
        results = found.results
        call = Call(parts, where, inputs, numbers)
        if results.spent:
            refuse_overlaps(results.spent, parts)
        passed = [*inputs]
        if numbers:
            passed.append(torch.tensor(numbers, dtype=torch.float64, device=self.rt.device))
        for block in found.blocks:
            passed += block.drawn([part.given for part in parts], self.rt.device)
        try:
            with torch.no_grad():
                outputs = found.run(*passed)
        except BaseException:
            lose(results.spent, call)
            raise
        call.pool = [*inputs, *outputs]
        return results.make(call)

    def _warn(self, now: Mapping[str, str]) -> None:
        if len(self.known) < self.limit:
            return
        found = difference(list(self.known.values())[-1].described, now)
        warnings.warn(
            f"{self!r} is compiled once more, since its arguments changed: {found}. Keep shapes, dtypes, modes and"
            ' constants as they are: drop the last batch (ff.setup_dataloader(..., tail="drop")) or pad it, pass what'
            " changes as a float or a tensor. Or allow more graphs: compile_step(..., limit=n).",
            stacklevel=4,
        )


def refuse_overlaps(spent: Any, parts: Sequence[Part]) -> None:
    """Raise `ModelError` if memory that is given away is that of another argument, too."""


_ = (contextlib, inspect, CapabilityError, empty_numbers)


def compile_step(
    rt: Runtime,
    step_fn: Callable[..., Any],
    *,
    backend: Backend = "inductor",
    options: Mapping[str, Any] | None = None,
    limit: int = 8,
) -> CompiledStep:
    """x."""
    return CompiledStep(rt, step_fn, backend, dict(options or {}), limit)
