"""A net cut into stages by names of its sub-modules: plain data that every rank reads alike."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from fabricfn.engine import named_modules
from fabricfn.errors import ConfigurationError, ModelError

Cut = Sequence[str] | tuple[Sequence[str], Callable[..., Any]]
"""One stage, as the user writes it: the sub-modules to call one after another, or those that it holds and a function
`(net, *inputs) -> outputs`."""


@dataclasses.dataclass(frozen=True, slots=True)
class Stage:
    """A part of a net."""

    names: tuple[str, ...]
    """Its sub-modules, or parameters that hang in the net itself."""
    run: Callable[..., Any] | None
    """What it computes, `run(net, *inputs)`; None calls the sub-modules one after another."""

    def __call__(self, net: nn.Module, *values: Any) -> Any:
        """The outputs of the stage."""
        if self.run is not None:
            return self.run(net, *values)
        for name in self.names:
            values = as_tuple(net.get_submodule(name)(*values))
        return values if len(values) != 1 else values[0]


def as_tuple(output: Any) -> tuple[Any, ...]:
    """What one module returns is what the next one takes: several arguments, if it is a tuple or a list."""
    return tuple(output) if type(output) in (tuple, list) else (output,)


def stages_of(cuts: Sequence[Cut]) -> tuple[Stage, ...]:
    """The stages that a user's data mean.

    Raises:
        ConfigurationError: something else than a list of stages.
    """
    found = tuple(_stage(number, cut) for number, cut in enumerate(cuts if _is_list(cuts) else ()))
    if not found:
        raise ConfigurationError(
            f"stages={cuts!r} has no stage; write one list of names for each:"
            ' ff.strategies.pipeline([["embed", "blocks.0"], ["blocks.1", "head"]]).'
        )
    return found


def _stage(number: int, cut: Any) -> Stage:
    names, run = cut if _is_list(cut) and len(cut) == 2 and callable(cut[1]) else (cut, None)
    if not (_is_list(names) and names and all(type(name) is str for name in names)):
        raise ConfigurationError(
            f"stage {number} is {cut!r}; a stage is a list of names of sub-modules, which are called one after"
            ' another, or such a list and a function: (["embed", "pos"], lambda net, x: net.embed(x) + net.pos).'
        )
    return Stage(tuple(names), run)


def _is_list(value: Any) -> bool:
    return isinstance(value, (list, tuple))


def stages_by_name(net: nn.Module, stages: Sequence[Stage]) -> dict[str, int]:
    """Which stage each parameter belongs to, and each buffer of the modules that stages name.

    Raises:
        ModelError: a name that the net does not have, or cannot call; a parameter in no stage; parameters or buffers in
            two. All that are wrong are named.
    """
    modules = dict(named_modules(net))
    holders: dict[int, set[int]] = {}
    problems: list[str] = []
    for number, stage in enumerate(stages):
        for name in stage.names:
            part = modules.get(name)
            slot = net._parameters.get(name) if part is None else None
            if part is None and (slot is None or stage.run is None):
                there_is = ", ".join(child for child, _ in net.named_children())
                problems.append(f"stage {number} names {name!r}, which is no sub-module of the net ({there_is})")
            for tensor in (slot,) if part is None else (*part.parameters(), *part.buffers()):
                holders.setdefault(id(tensor), set()).add(number)
    found: dict[str, int] = {}
    for kind, tensors in (("parameter", net.named_parameters()), ("buffer", net.named_buffers())):
        for name, tensor in tensors:
            numbers = sorted(holders.get(id(tensor), ()))
            if len(numbers) == 1:
                found[name] = numbers[0]
            elif numbers:
                problems.append(f"the {kind} {name} belongs to the stages {', '.join(map(str, numbers))}")
            elif kind == "parameter":
                problems.append(f"the parameter {name} belongs to no stage")
    if problems:
        raise ModelError(
            f"these stages do not cut the net: {'; '.join(problems[:8])}{'; ...' if problems[8:] else ''}. Every"
            " parameter belongs to one stage: name each sub-module once, give a parameter that hangs in the net itself"
            ' to a stage with a function, (["embed", "pos"], fn), and untie weights that two stages share, or put what'
            " shares them into one."
        )
    return found


def check_ranks(num_stages: int, num_ranks: int, in_all: int) -> None:
    """Raise `ConfigurationError` unless so many stages can be dealt out evenly to pipelines of so many ranks."""
    if num_ranks >= 1 and num_stages % num_ranks == 0 and in_all % num_ranks == 0:
        return
    raise ConfigurationError(
        f"{num_stages} stages are dealt out over pipelines of {num_ranks} ranks, as many to each rank, and there are"
        f" {in_all} ranks. The number of stages must be a multiple of {num_ranks}, and {num_ranks} must divide"
        f" {in_all}: cut the net into another number of stages, or write ff.strategies.pipeline(stages,"
        f" pipeline_parallel={_fitting(num_stages, in_all)})."
    )


def _fitting(num_stages: int, in_all: int) -> int:
    """The largest number of ranks that would do."""
    return max(number for number in range(1, num_stages + 1) if num_stages % number == 0 and in_all % number == 0)
