"""Random numbers of a compiled step: drawn on the host before the graph runs, and handed to it.

[Note: draws] So they are those of the eager step: the same generator, from the same key, in the same order. While a
step is traced, each operation that draws becomes an input of the graph, and is written down together with the key
under which it stood; a call repeats the operations and passes what they give. What they draw cannot depend on numbers
that the graph computes.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
from torch.fx.experimental.proxy_tensor import (
    ProxyTorchDispatchMode,
    disable_proxy_modes_tracing,
    get_proxy_mode,
    track_tensor_tree,
)
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from fabricfn.errors import CapabilityError
from fabricfn.random import CPU, Key, device_generator, fold_in, seeded
from fabricfn.tracing import Unknown

Draw = Callable[[], torch.Tensor]

aten = torch.ops.aten
_FILLS = frozenset(
    (
        *(aten.bernoulli_.float, aten.uniform_.default, aten.normal_.default, aten.exponential_.default),
        *(aten.geometric_.default, aten.cauchy_.default, aten.log_normal_.default),
        *(aten.random_.default, getattr(aten.random_, "from"), aten.random_.to),
    )
)
"""What writes over all that was there."""
untraced: Any = _disable_current_modes
"""True tensors, for a moment."""


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class KeyBits:
    """What stands for the bits of a key that was an argument, while a step is traced."""

    of: Callable[[Sequence[Any]], Key]
    """The key, of the arguments of a call."""
    draws: "Draws"

    def folded(self, data: Any) -> "KeyBits":
        """Of `fold_in(key, data)`."""
        if isinstance(data, torch.Tensor):
            raise CapabilityError(
                "a compiled step folds integers and opt.step into a key, found a tensor. Fold outside of it: pass"
                " rng=ff.fold_in(key, number) at every call."
            )
        of, number = self.of, data
        if isinstance(data, Unknown):
            number_of = cast("Any", data).of
            return KeyBits(lambda parts: fold_in(of(parts), number_of(parts)), self.draws)
        return KeyBits(lambda parts: fold_in(of(parts), number), self.draws)

    def enter(self) -> None:
        """From now on what is drawn stands under this key, from its beginning."""
        self.draws.blocks.append(Block(self.of))

    def leave(self) -> None:
        """Back to the global generators."""
        self.draws.blocks.append(Block())

    def __xor__(self, other: int) -> int:
        raise CapabilityError(
            "a compiled step passes keys on to rng=; generators and seeds are made outside of it. Draw there, and pass"
            " the tensor."
        )


@dataclasses.dataclass(slots=True)
class Block:
    """What is drawn under one key, in order."""

    key: Callable[[Sequence[Any]], Key] | None = None
    """None: the global generators go on from where they are."""
    draws: list[Draw] = dataclasses.field(default_factory=list[Draw])

    def drawn(self, parts: Sequence[Any], device: torch.device) -> Iterator[torch.Tensor]:
        """The numbers of the call with these arguments."""
        with contextlib.nullcontext() if self.key is None else seeded(self.key(parts), device):
            for draw in self.draws:
                yield draw()


class Draws(TorchDispatchMode):
    """Writes down what is drawn, and leaves the generators as they were."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.blocks = [Block()]
        self.generators = [torch.default_generator, *([] if device == CPU else [device_generator(device)])]
        self.known: dict[tuple[bytes, ...], tuple[torch.Tensor, int]] = {}
        """The states of the generators -> what was drawn there, and the seed with which they went on."""

    def __enter__(self) -> "Draws":
        with untraced():
            self.before = [generator.get_state() for generator in self.generators]
        return super().__enter__()

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        with untraced():
            for generator, state in zip(self.generators, self.before, strict=True):
                generator.set_state(state)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options: dict[str, Any] = dict(kwargs or {})
        if torch.Tag.nondeterministic_seeded not in func.tags or _draws_nothing(func, args, options):
            return func(*args, **options)
        first: Any = None
        rest = args
        if args and isinstance(args[0], torch.Tensor):
            first, *rest = args
        if func in _FILLS:
            return first.copy_(self._drawn(first, lambda like: func(like, *rest, **options)))
        if func is aten.native_dropout.default:  # what accelerators do in one kernel
            kept = self._drawn(first, lambda like: func(torch.ones_like(like), *rest, **options)[0])
            return first * kept, kept != 0
        if first is not None and "_like" in str(func):
            return self._drawn(first, lambda like: func(like, *rest, **options))
        if not any(isinstance(leaf, torch.Tensor) for leaf in args):
            return self._drawn(None, lambda _: func(*rest, **options))
        raise CapabilityError(
            f"{func} draws random numbers that depend on what the graph computes, which a compiled step cannot. Draw"
            " outside of it and pass the tensor, or start from torch.rand_like and torch.randn_like."
        )

    def _drawn(self, like: torch.Tensor | None, draw: Callable[[Any], torch.Tensor]) -> torch.Tensor:
        """An input of the graph for what `draw` gives, which looks at the shape of `like` only."""
        empty = functools.partial(lambda: None)
        if like is not None:
            place = {"dtype": like.dtype, "device": like.device}
            empty = functools.partial(torch.empty_strided, like.shape, like.stride(), **place)

        def drawn() -> torch.Tensor:
            return draw(empty())

        # what is recomputed puts the generator back to where it was, and meets the numbers that it drew there
        with untraced():
            state = tuple(generator.get_state().numpy().tobytes() for generator in self.generators)
        if state not in self.known:
            self.blocks[-1].draws.append(drawn)
            self.known[state] = (new_input(f"draw_{len(self.known)}", drawn), len(self.known) + 1)
        found, seed = self.known[state]
        for generator in self.generators:
            generator.manual_seed(seed)
        return found


def new_input(name: str, example: Draw) -> torch.Tensor:
    """One more input of the graph that is being traced."""
    with disable_proxy_modes_tracing():
        found = example()
    mode = get_proxy_mode()
    assert isinstance(mode, ProxyTorchDispatchMode)
    tracer: Any = mode.tracer
    track_tensor_tree(found, tracer.create_proxy("placeholder", name, (), {}), constant=None, tracer=tracer)
    return found


def _draws_nothing(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether an operation that may draw does not, since its dropout is off."""
    arguments = func._schema.arguments
    given = {one.name: one.default_value for one in arguments}
    given |= {one.name: value for one, value in zip(arguments, args, strict=False)} | kwargs
    off = given.get("train") is False or given.get("training") is False
    return off or any(given.get(name) == 0 for name in ("dropout_p", "dropout") if name in given)
