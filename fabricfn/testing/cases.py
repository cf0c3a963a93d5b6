"""Cases: generators of test data for hypothesis, which calls them strategies; here that word is taken.

A case is plain, reproducible data: modules are built from explicit `torch.Generator`s, never from the global one, so a
failing example replays anywhere, on threads too. Needs the extra "testing".
"""

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from fabricfn.tree import Tree

try:
    from hypothesis import strategies as st
    from hypothesis.strategies import SearchStrategy
except ImportError as error:
    raise ImportError("fabricfn.testing.cases needs hypothesis. pip install 'fabricfn[testing]'.") from error

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.complex128)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)
DTYPES = (*FLOATS, *INTEGERS)
"""The dtypes of the tensors in `trees`."""


def seeds() -> SearchStrategy[int]:
    """Seeds of generators."""
    return st.integers(0, 2**32 - 1)


def world_sizes(largest: int = 4) -> SearchStrategy[int]:
    """Numbers of ranks, 1 .. largest.

    Args:
        largest: the size of the world that is open.
    """
    return st.integers(1, largest)


def accumulations(largest: int = 4) -> SearchStrategy[int]:
    """Numbers of micro-batches, 1 .. largest.

    Args:
        largest: the largest number.
    """
    return st.integers(1, largest)


@st.composite
def splits(draw: st.DrawFn, total: int, parts: int) -> tuple[int, ...]:
    """`parts` positive sizes that sum to `total`, uneven ones too: how micro-batches or ranks may share rows.

    Args:
        draw: given by hypothesis.
        total: the number of rows; at least `parts`.
        parts: the number of sizes.
    """
    ends = draw(st.sets(st.integers(1, total - 1), min_size=parts - 1, max_size=parts - 1)) if parts > 1 else set[int]()
    bounds = [0, *sorted(ends), total]
    return tuple(end - start for start, end in itertools.pairwise(bounds))


def filled(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    """A tensor of small random numbers from a generator of its own: exact sums of a few of them for integers.

    Args:
        shape: its shape.
        dtype: any of `DTYPES`.
        seed: of the generator.
    """
    generator = torch.Generator().manual_seed(seed)
    if dtype.is_floating_point or dtype.is_complex:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    return torch.randint(0, 2 if dtype is torch.bool else 8, shape, generator=generator).to(dtype)


@st.composite
def tensors(draw: st.DrawFn, dtypes: tuple[torch.dtype, ...] = DTYPES) -> torch.Tensor:
    """Tensors of 0 to 3 dims, empty ones and strided views too.

    Args:
        draw: given by hypothesis.
        dtypes: which dtypes may come.
    """
    shape = tuple(draw(st.lists(st.integers(0, 4), max_size=3)))
    tensor = filled(shape, draw(st.sampled_from(dtypes)), draw(seeds()))
    return tensor.transpose(0, 1) if len(shape) > 1 and draw(st.booleans()) else tensor


def trees(leaves: SearchStrategy[Any] | None = None, *, max_leaves: int = 8) -> SearchStrategy[Tree]:
    """Nested dicts, lists and tuples of leaves; empty containers and None may be in them.

    Args:
        leaves: what the leaves are; None is `tensors()`.
        max_leaves: about how many there are at most.
    """
    names = st.text("abcxyz.0_", min_size=1, max_size=4)

    def grow(children: SearchStrategy[Any]) -> SearchStrategy[Any]:
        few: SearchStrategy[Any] = st.lists(children, max_size=3)
        return few | few.map(tuple) | st.dictionaries(names, children, max_size=3)

    return st.recursive(st.none() | (tensors() if leaves is None else leaves), grow, max_leaves=max_leaves)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """Something to train: a module, a loss and a batch."""

    name: str
    """What is in it, for messages."""
    module: nn.Module
    """Float64; built from a generator of its own."""
    loss_fn: Callable[..., torch.Tensor]
    """`loss_fn(net, x, y)`, the mean over the rows."""
    batch: tuple[torch.Tensor, torch.Tensor]
    """(x, y), with the same number of rows."""

    def __repr__(self) -> str:
        return f"Problem({self.name}, {len(self.batch[0])} rows)"


class Tied(nn.Module):
    """An encoder and a decoder that are one parameter, and another one that is used twice."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed = nn.Linear(width, width, bias=False)
        self.middle = nn.Linear(width, width)
        self.head = nn.Linear(width, width, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(rows, width) -> (rows, width)."""
        return self.head(torch.tanh(self.middle(torch.tanh(self.middle(self.embed(x))))))


def mean_square(net: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """The mean over rows and columns of the squared error."""
    return F.mse_loss(net(x), y)


def initialised(module: nn.Module, seed: int) -> nn.Module:
    """The module in float64, with parameters from a generator; its buffers as they are.

    Args:
        module: changed in place.
        seed: of the generator.
    """
    generator = torch.Generator().manual_seed(seed)
    module.double()
    with torch.no_grad():
        for parameter in module.parameters():
            scale = 1 / math.sqrt(max(1, parameter[0].numel() if parameter.dim() > 1 else parameter.numel()))
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * scale)
    return module


def build(kind: str, width: int, depth: int) -> tuple[nn.Module, tuple[int, ...], tuple[int, ...]]:
    """(module, shape of a row of x, shape of a row of y); what `modules` draws from.

    Args:
        kind: one of `KINDS` or "norm".
        width: the number of features.
        depth: the number of layers.
    """
    if kind == "tied":
        return Tied(width), (width,), (width,)
    if kind == "conv":
        layers: list[nn.Module] = [nn.Conv1d(2, width, 3, padding=1), nn.GELU(), nn.Flatten(), nn.Linear(width * 5, 2)]
        return nn.Sequential(*layers), (2, 5), (2,)
    blocks: list[nn.Module] = []
    for _ in range(depth):
        norm = [nn.BatchNorm1d(width)] if kind == "norm" else [nn.LayerNorm(width)] if kind == "layernorm" else []
        blocks += [nn.Linear(width, width), *norm, nn.Tanh()]
    return nn.Sequential(*blocks, nn.Linear(width, 1)), (width,), (1,)


KINDS = ("mlp", "layernorm", "conv", "tied", "frozen")
"""Kinds of modules that obey the law of equivalence. "norm" (BatchNorm) depends on the ranks' own batches."""


@st.composite
def problems(draw: st.DrawFn, kinds: tuple[str, ...] = KINDS, *, min_rows: int = 16, max_rows: int = 32) -> Problem:
    """Small modules with a loss and a batch.

    Args:
        draw: given by hypothesis.
        kinds: which kinds of modules: those of `KINDS`, and "norm" with batch normalisation.
        min_rows: of the batch; ranks times micro-batches must find a row each.
        max_rows: of the batch.
    """
    kind, width, depth = draw(st.sampled_from(kinds)), draw(st.integers(1, 6)), draw(st.integers(1, 3))
    rows, seed = draw(st.integers(min_rows, max_rows)), draw(seeds())
    module, x_shape, y_shape = build(kind, width, depth)
    initialised(module, seed)
    if kind == "frozen":
        for parameter in list(module.parameters())[: draw(st.integers(1, 2))]:
            parameter.requires_grad_(False)
    x = filled((rows, *x_shape), torch.float64, seed + 1)
    y = filled((rows, *y_shape), torch.float64, seed + 2)
    return Problem(name=f"{kind} {width}x{depth}, seed {seed}", module=module, loss_fn=mean_square, batch=(x, y))
