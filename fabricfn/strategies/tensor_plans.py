"""What tensor parallelism does to which sub-module: the plan, as data. No ranks are needed to make or check one.

[Note: words] Between modules that a word has parallelised, a plain tensor is whole and equal on all tensor-parallel
peers, and a DTensor has the global shape and knows how it is cut. So `view`, `mean` or a head count in the user's code
mean what they mean on one device: torch computes them rightly or refuses. torch's own styles with local outputs give
the user's code parts that look like whole tensors; whoever puts one into a plan answers for that.
"""

import fnmatch
from collections.abc import Callable, Mapping
from typing import Any, Literal

from torch import nn

from fabricfn.engine import named_modules
from fabricfn.errors import ConfigurationError

Word = Literal["colwise", "colwise_gathered", "rowwise", "rowwise_scattered", "sequence", "replicate"]
WORDS: tuple[Word, ...] = ("colwise", "colwise_gathered", "rowwise", "rowwise_scattered", "sequence", "replicate")
Plan = Mapping[str, Any] | Callable[[nn.Module, Any], nn.Module]
"""Pattern of module names -> a word or one of torch's `ParallelStyle`s; or a function `(module, mesh) -> module`."""

_OUT: dict[type[nn.Module], str] = {nn.Linear: "out_features", nn.Embedding: "embedding_dim"}
_IN: dict[type[nn.Module], str] = {nn.Linear: "in_features", nn.Embedding: "num_embeddings"}
_CUT = {"colwise": _OUT, "colwise_gathered": _OUT, "rowwise": _IN, "rowwise_scattered": _IN}
"""word -> the modules that it can cut -> the attribute whose number is cut."""


def check_plan(plan: Any) -> None:
    """Raise `ConfigurationError` for what is no plan; the names of modules come later, with a module."""
    if callable(plan):
        return
    if not isinstance(plan, Mapping) or not plan:
        raise ConfigurationError(
            f'plan={plan!r} is no plan. Write {{"*.up": "colwise", "*.down": "rowwise"}}, from patterns of the names of'
            f" sub-modules to one of {', '.join(WORDS)} or a ParallelStyle of torch, or a function (module, mesh) ->"
            " module."
        )
    for pattern, what in plan.items():  # pyright: ignore[reportUnknownVariableType]
        known = what in WORDS if isinstance(what, str) else hasattr(what, "_apply")  # pyright: ignore[reportUnknownArgumentType]
        if not isinstance(pattern, str) or not known:
            raise ConfigurationError(
                f"plan[{pattern!r}] is {what!r}; it takes one of {', '.join(WORDS)}, or a ParallelStyle of torch"
                " (torch.distributed.tensor.parallel)."
            )


def assigned(net: nn.Module, plan: Mapping[str, Any], parts: int) -> dict[str, Any]:
    """Sub-module name -> what the plan says of it, for those of which it says something.

    Args:
        net: a module, on any device; only its structure counts.
        plan: patterns as of `fnmatch` (`*` matches dots, too), each against the whole names.
        parts: into how many parts dimensions are cut.

    Raises:
        ConfigurationError: a pattern matches nothing, two contradict each other, a word does not fit a module, or a
            dimension cannot be cut into so many parts.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
        >>> assigned(net, {"0": "colwise", "2": "rowwise"}, 2)
        {'0': 'colwise', '2': 'rowwise'}
    """
    modules = dict(named_modules(net))
    found: dict[str, tuple[str, Any]] = {}
    for pattern, what in plan.items():
        names = [name for name in modules if name and fnmatch.fnmatchcase(name, pattern)]
        if not names:
            near = [name for name in modules if name][:12]
            raise ConfigurationError(
                f"plan[{pattern!r}] matches no sub-module. Their names are {', '.join(near)}"
                f"{', ...' if len(modules) > 13 else ''}; in a pattern, * stands for any part of a name."
            )
        for name in names:
            if name in found and found[name][1] != what:
                raise ConfigurationError(
                    f"{name} is {what!r} by plan[{pattern!r}] and {found[name][1]!r} by plan[{found[name][0]!r}]. Make"
                    " the patterns narrower, so that each module has one."
                )
            found[name] = (pattern, what)
    for name, (pattern, what) in found.items():
        if isinstance(what, str):
            _check_fits(name, modules[name], what, pattern, parts)
    return {name: what for name, (_, what) in found.items()}


def _check_fits(name: str, module: nn.Module, word: str, pattern: str, parts: int) -> None:
    kind = type(module).__name__
    cuts = _CUT.get(word)
    if cuts is None:
        if any(True for child in module.children() for _ in child.parameters()):
            raise ConfigurationError(
                f"plan[{pattern!r}] = {word!r} matches {name}, a {kind} whose parameters belong to modules inside it."
                " Name these: the innermost modules are what a plan speaks of."
            )
        return
    dims = [attribute for cut, attribute in cuts.items() if isinstance(module, cut)]
    if not dims:
        takes = " and ".join(cut.__name__ for cut in cuts)
        raise ConfigurationError(
            f"plan[{pattern!r}] = {word!r} matches {name}, a {kind}; {word} is for {takes}. Make the pattern narrower,"
            " or write a function (module, mesh) -> module as the plan."
        )
    size = getattr(module, dims[0])
    if size % parts:
        raise ConfigurationError(
            f"{name} has {dims[0]}={size}, which {word!r} cannot cut into {parts} equal parts"
            f" (tensor_parallel={parts}). Choose a size that {parts} divides, another tensor_parallel, or leave"
            f" {name} out of the plan."
        )
