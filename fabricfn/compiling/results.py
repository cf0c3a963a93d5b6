"""What a compiled step gives back: its results over the tensors of this call; what it gave away is spent."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch

from fabricfn.compiling.arguments import Part
from fabricfn.compiling.overlaps import Spent
from fabricfn.leases import Place, bump, unbind
from fabricfn.records import Model, handed_on
from fabricfn.tree import TreeSpec, tree_unflatten


@dataclasses.dataclass(slots=True, eq=False)
class Call:
    """One call of a compiled step, while its results are put together."""

    parts: Sequence[Part]
    where: Place
    pool: Sequence[Any]
    """The tensors: inputs of the graph, then its outputs."""
    numbers: Sequence[float]
    told: Sequence[float] = ()
    """Numbers that the graph has computed for the host."""
    handed: dict[int, Model] = dataclasses.field(default_factory=dict[int, Model])
    """The argument's place -> the model that its memory belongs to now."""


Recipe = Callable[[Call], Any]


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Results:
    """How the results of a call are made."""

    spec: TreeSpec
    recipes: Sequence[Recipe]
    spent: Spent
    """What the step gives away."""
    tells: bool
    """Whether the last output of the graph holds numbers for the host, which waits for them."""
    refusals: Sequence[tuple[int, Callable[[], Exception]]]
    """Which of these numbers are true where the step must fail, and how."""

    def make(self, call: Call) -> Any:
        """The results of one call; what it gave away is spent."""
        if self.tells:
            call.told = call.pool[-1].tolist()
            for place, error in self.refusals:
                if call.told[place]:
                    lose(self.spent, call)
                    raise error()
        give_away(self.spent, call, counted=True)
        return tree_unflatten(self.spec, [recipe(call) for recipe in self.recipes])


def give_away(spent: Spent, call: Call, *, counted: bool) -> None:
    """Mark what the step gave away; its memory belongs to other records now, those of models to `call.handed`.

    `counted`: the graph has bumped the versions of what it changed, as operations do.
    """
    for place, changed in spent:
        given = call.parts[place].given
        lease = given.lease
        if type(given) is Model:
            values = () if counted else [*given.params.values()]
            updated = () if counted else [values[i] for i in changed]
            unbind(lease)  # what looks at the values is bound again when it is used, and not counted up at every step
            made = call.handed[place] = handed_on(given, None, call.where, updated)
            made.lease.known, made.lease.apart = lease.known, True
            continue
        lease.spend(call.where)
        if lease.values is not None and not counted:
            bump([value for value in lease.values.values() if isinstance(value, torch.Tensor)])


def lose(spent: Spent, call: Call) -> None:
    """After a failure in the middle: what was to be given away is lost."""
    give_away(spent, call, counted=False)
    for model in call.handed.values():
        model.lease.spend(call.where)
