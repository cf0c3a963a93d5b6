"""The hyperparameters of a `torch.optim` class: which it takes, and what they are when nothing is said."""

import inspect
import types
from collections.abc import Callable, Mapping
from typing import Any

import torch

from fabricfn.errors import ConfigurationError

Hyper = Mapping[str, Any]


def check_names(cls: type, options: Hyper) -> None:
    """Raise `ConfigurationError` for hyperparameters that the class does not take."""
    known = inspect.signature(cls).parameters
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in known.values()):
        return
    there = list(known)[1:]
    unknown = sorted(set(options) - set(there))
    if unknown:
        raise ConfigurationError(
            f"{cls.__name__} has no hyperparameter {', '.join(unknown)}; there are: {', '.join(there)}"
        )


class _Probe(torch.optim.Optimizer):
    """Takes the place of the base class, so that a class checks its arguments and nothing else happens.

    The real constructor imports torch._dynamo, which takes longer than everything else up to the first step.
    """

    def __init__(self, params: Any, defaults: dict[str, Any]) -> None:
        self.defaults = defaults
        self.param_groups = []


def defaults_of(cls: type[torch.optim.Optimizer], hyperparams: Hyper) -> dict[str, Any]:
    """All hyperparameters of a class, checked by its own constructor."""
    probe: Callable[..., Any] = types.new_class(cls.__name__, (cls, _Probe))
    return probe([], **hyperparams).defaults
