"""Numbers that only the host knows, and that a traced step computes with: `opt.step`, and what is made of it.

[Note: hosted] While a step is traced `opt.step` is a `Hosted`: arithmetic with it is written down as a function of the
arguments, and a call repeats it in Python, so the numbers are those of the eager step. Where one meets a tensor it
becomes an input of the graph. Whoever asks for the number itself (`if`, `int`, `math.cos`) is refused: the answer would
stay for ever.
"""

import dataclasses
import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch

from fabricfn.compiling.draws import Draws, KeyBits, new_input
from fabricfn.errors import CapabilityError
from fabricfn.random import Key, fold_in
from fabricfn.tracing import Unknown
from fabricfn.tree import tree_flatten, tree_leaves, tree_map, tree_unflatten

Of = Callable[[Sequence[Any]], Any]
"""Makes a number of the arguments (`Part`s) of a call."""


@dataclasses.dataclass(slots=True, eq=False)
class Host:
    """What one trace knows of such numbers."""

    draws: Draws
    usual: torch.dtype
    """What a float becomes where it meets a tensor: no wider than what a Python number makes of one."""
    wide: torch.dtype
    device: torch.device
    inputs: list[Of] = dataclasses.field(default_factory=list[Of])
    """How those are made that are inputs of the graph."""

    def input(self, of: Of) -> torch.Tensor:
        """One more of them, as wide as there is."""
        self.inputs.append(of)
        example = functools.partial(torch.empty, (), dtype=self.wide, device=self.device)
        return new_input(f"host_{len(self.inputs)}", example)


class Hosted(Unknown):
    """A number of each call, a function of its arguments, which remembers nothing of the trace."""

    __slots__ = ("_input", "_tensor", "host", "now", "of")

    def __init__(self, of: Of, now: Any, host: Host) -> None:
        self.of = of
        self.now = now
        """The number in the call for which the step is traced: its type says how it counts."""
        self.host = host
        self._input: torch.Tensor | None = None
        self._tensor: torch.Tensor | None = None

    def then(self, fn: Callable[[Any], Any]) -> Any:
        """What a function of it gives: a tree of such numbers, in the structure that there is now."""
        of = self.of

        def leaf(i: int, now: Any) -> Hosted:
            return Hosted(lambda parts: tree_leaves(fn(of(parts)))[i], now, self.host)

        leaves, spec = tree_flatten(fn(self.now))
        return tree_unflatten(spec, [leaf(i, now) for i, now in enumerate(leaves)])

    def under(self, bits: int) -> KeyBits:
        """The bits of `fold_in(key, number)`, for a key that is no argument."""
        of = self.of
        return KeyBits(lambda parts: fold_in(Key(bits), of(parts)), self.host.draws)

    def input(self) -> torch.Tensor:
        """It as an input of the graph, as wide as there is."""
        if self._input is None:
            self._input = self.host.input(self.of)
        return self._input

    def tensor(self) -> torch.Tensor:
        """It as a tensor that leaves the dtype of others alone, as a Python number does."""
        if self._tensor is None:
            is_whole = type(self.now) is int
            self._tensor = (
                self.host.input(_whole(self.of)).to(torch.int64) if is_whole else self.input().to(self.host.usual)
            )
        return self._tensor

    def __neg__(self) -> Any:
        return self.then(operator.neg)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map(_tensor, (args, kwargs or {}))
        return func(*args, **kwargs)

    def _refuse(self, *_: object) -> Any:
        raise CapabilityError(
            "opt.step is another number at every call, and a compiled step would keep the first one for ever."
            " Arithmetic is repeated at every call (0.1 / (1 + opt.step), ff.fold_in(key, opt.step)); `if`, `min`,"
            " `int` and `math.cos` are not. Compute outside of the step and pass the result: step(model, opt, x, y,"
            " lr=schedule(opt.step)). Or let ff.schedule_from_torch call your function:"
            " schedule = ff.schedule_from_torch(torch.optim.lr_scheduler.LambdaLR, lr, lr_lambda=fn)."
        )

    __index__ = __int__ = __float__ = __bool__ = __round__ = _refuse
    # an object's own comparisons return a bool, and it has a hash; these never return
    __lt__ = __le__ = __gt__ = __ge__ = __eq__ = __ne__ = _refuse  # pyright: ignore[reportAssignmentType]
    __hash__ = None  # pyright: ignore[reportAssignmentType]


def as_inputs(tree: Any) -> Any:
    """Hyperparameters with inputs of the graph in place of such numbers, as wide as the others are."""
    return tree_map(_input, tree)


def _whole(of: Of) -> Of:
    def whole(parts: Sequence[Any]) -> int:
        number = of(parts)
        if type(number) is not int:
            raise CapabilityError(
                f"a number that a compiled step makes of opt.step is {number!r} now, and was an int when the step was"
                " traced, which made another graph of it. Make it a float from the beginning: 2.0 ** (5 - opt.step)."
            )
        return number

    return whole


def _input(leaf: Any) -> Any:
    return leaf.input() if type(leaf) is Hosted else leaf


def _tensor(leaf: Any) -> Any:
    return leaf.tensor() if type(leaf) is Hosted else leaf


def _arithmetic(op: Callable[[Any, Any], Any], *, reflected: bool) -> Callable[[Hosted, Any], Any]:
    def compute(self: Hosted, other: Any) -> Any:
        left, right = (other, self) if reflected else (self, other)
        if isinstance(other, torch.Tensor):
            return op(_tensor(left), _tensor(right))
        left_of, right_of = _of(left), _of(right)
        return Hosted(lambda parts: op(left_of(parts), right_of(parts)), op(_now(left), _now(right)), self.host)

    return compute


def _of(one: Any) -> Of:
    return one.of if type(one) is Hosted else lambda parts: one


def _now(one: Any) -> Any:
    return one.now if type(one) is Hosted else one


for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow"):
    setattr(Hosted, f"__{_name}__", _arithmetic(getattr(operator, _name), reflected=False))
    setattr(Hosted, f"__r{_name}__", _arithmetic(getattr(operator, _name), reflected=True))
