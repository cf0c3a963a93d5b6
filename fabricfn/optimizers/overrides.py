"""The keyword arguments of one step, in place of the optimizer's own hyperparameters."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from fabricfn.errors import ConfigurationError
from fabricfn.states import Optimizer


def overridden(opt: Optimizer, overrides: Mapping[str, Any]) -> tuple[Mapping[str, Any], ...]:
    """The hyperparameters of one step."""
    if not opt.hyperparams:
        return (overrides,)
    known = opt.hyperparams[0]
    unknown = sorted(set(overrides) - set(known))
    if unknown:
        raise ConfigurationError(
            f"{opt.plan.name} has no hyperparameter {', '.join(unknown)}; there are: {', '.join(known)}"
        )
    count = len(opt.hyperparams)
    for name, value in overrides.items():
        if value.__class__ is list and len(value) != count:
            raise ConfigurationError(f"{name}={value} has {len(value)} values; the optimizer has {count} groups")
    out: list[Mapping[str, Any]] = []
    for i, group in enumerate(opt.hyperparams):
        own: dict[str, Any] = {key: value[i] if type(value) is list else value for key, value in overrides.items()}
        for name in _SETTLED & own.keys():
            if own[name] and not group[name]:
                raise ConfigurationError(
                    f"{name} needs state from the first step on and cannot begin with an override; it must be given to"
                    f" setup_optimizer: setup_optimizer(rt, models, {opt.plan.name}, {name}={own[name]})."
                )
        out.append(MappingProxyType({**group, **own}))
    return tuple(out)


_SETTLED = frozenset({"amsgrad", "centered"})
"""The hyperparameters of torch's classes that decide which state there is."""
