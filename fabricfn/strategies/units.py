"""What a sharding strategy gathers together: the plan of units, as data.

A *unit* is a sub-module whose parameters are gathered when its forward begins and let go when it ends; what belongs to
no unit belongs to the root, which is gathered for the whole loss function.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, Literal, cast

from torch import nn

from fabricfn.engine import named_modules
from fabricfn.errors import ConfigurationError

Units = Literal["auto"] | type[nn.Module] | tuple[type[nn.Module], ...] | Callable[[str, nn.Module], bool] | None


def plan(net: nn.Module, units: Units) -> tuple[str, ...]:
    """The names of the sub-modules that become units, in the net's order.

    A sub-module that holds a parameter which is also used outside of it (tied weights) cannot be one: the parameter
    would be gathered in one place and be missing in the other. It stays with the root, or the unit around it.

    Args:
        net: a module, on any device; the plan looks at its structure only.
        units: "auto" for repeated blocks: the children of one class that a ModuleList, ModuleDict or Sequential holds
            twice or more. A module class or a tuple of them. A predicate `(name, module) -> bool`. None for no unit:
            the whole model is gathered at once.

    Raises:
        ConfigurationError: `units` is something else, or chooses a container that has no forward of its own.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.LayerNorm(4))
        >>> plan(net, "auto"), plan(net, nn.LayerNorm), plan(net, None)
        (('0', '1'), ('2',), ())
    """
    modules = dict(named_modules(net))
    wanted = {*chosen(net, units, "units", "a unit is gathered when its forward begins")}
    return tuple(name for name in modules if name in wanted - {""} and not _is_tied(net, modules[name]))


def chosen(net: nn.Module, units: Units, option: str, reason: str) -> tuple[str, ...]:
    """The names of the sub-modules that an option chooses, those with parameters, in the net's order.

    Raises:
        ConfigurationError: as `plan`; the message names the option, and the reason why a unit needs a forward.
    """
    if units is None:
        return ()
    modules = dict(named_modules(net))
    wanted = _chosen(modules, units, option) & modules.keys()  # a module that stands twice has one name
    found = {name for name in wanted if next(modules[name].parameters(), None) is not None}
    for name in sorted(found):
        if type(modules[name]).forward is nn.Module.forward:
            raise ConfigurationError(
                f"{option}: {name or 'the net'} is a {type(modules[name]).__name__}, which has no forward, and"
                f" {reason}. Choose the modules inside it."
            )
    return tuple(name for name in modules if name in found)


def _chosen(modules: dict[str, nn.Module], units: Any, option: str) -> set[str]:
    if units == "auto":
        return set(_blocks(modules[""], ""))
    if isinstance(units, type | tuple):
        try:
            return {name for name, module in modules.items() if isinstance(module, units)}
        except TypeError:
            pass
    elif callable(units):
        return {name for name, module in modules.items() if units(name, module)}
    raise ConfigurationError(
        f'{option}={units!r} chooses no modules; write {option}="auto" (the repeated blocks), a module class or a'
        " tuple of them, a predicate (name, module) -> bool, or None for no part of the net."
    )


def _blocks(module: nn.Module, prefix: str) -> Iterator[str]:
    """The repeated children of lists, outermost ones only."""
    children = [(f"{prefix}{name}", child) for name, child in module._modules.items() if child is not None]
    is_list = isinstance(module, nn.ModuleList | nn.ModuleDict | nn.Sequential)
    kinds = Counter(type(child) for _, child in children)
    for name, child in children:
        runs = type(child).forward is not cast("Any", nn.Module).forward
        if is_list and runs and kinds[type(child)] > 1:
            yield name
        else:
            yield from _blocks(child, f"{name}.")


def _is_tied(net: nn.Module, unit: nn.Module) -> bool:
    """Whether a parameter of the unit hangs in a module outside of it, too."""
    inside = {id(part) for part in unit.modules()}
    own = {id(slot) for slot in unit.parameters()}
    outside = (part for part in net.modules() if id(part) not in inside)
    return any(id(slot) in own for part in outside for slot in part._parameters.values())
