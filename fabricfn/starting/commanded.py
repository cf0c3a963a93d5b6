"""The options of `fabricfn run` and those of the script, as one request."""

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

from fabricfn.accelerators import count_or_indices
from fabricfn.environments import command_line
from fabricfn.errors import ConfigurationError
from fabricfn.precision import Precision
from fabricfn.starting.request import Request
from fabricfn.strategy import Strategy

DEFAULTS = {field.name: field.default for field in dataclasses.fields(Request)}


def with_command_line(request: Request) -> Request:
    """The request of the script, in which `fabricfn run` has filled in what the script left at its default.

    Raises:
        ConfigurationError: the script says something else than the command line.
    """
    # The ranks of a script are children of the process that the command line started.
    return filled(request, command_line.read(os.environ, (os.getpid(), os.getppid())))


def filled(request: Request, options: Mapping[str, str | int]) -> Request:
    """The request with these options where it has its defaults.

    Raises:
        ConfigurationError: it has another value somewhere; the message names both.
    """
    for name, option in options.items():
        own = getattr(request, name)
        same = own == DEFAULTS[name] if isinstance(own, str | int | None) and type(own) is not bool else False
        if not same and not _agree(name, own, option):
            shown = own.name if isinstance(own, Strategy) else own
            word = command_line.spelling(name)
            raise ConfigurationError(
                f"the script says {name}={shown!r}, but the command line says {word}={option}. Leave {name} out of"
                f" init_runtime to let the command line decide, or leave out {word}."
            )
    return dataclasses.replace(request, **{name: _narrower(request, name, option) for name, option in options.items()})


def _narrower(request: Request, name: str, option: str | int) -> Any:
    """The option, or the script's value where that says the same and more: a record, "cuda" for "gpu"."""
    own = getattr(request, name)
    takes_own = isinstance(own, Strategy | Precision) or (name == "accelerator" and option == "gpu" and own != "auto")
    return own if takes_own else option


def _agree(name: str, own: Any, option: str | int) -> bool:
    """Whether both mean the same."""
    if name == "devices":
        return count_or_indices(own) == count_or_indices(str(option))
    if name == "precision":
        return Precision.parse(own) == Precision.parse(option)
    if name == "accelerator":
        return own == option or ("gpu" in (own, option) and bool({own, option} & {"cuda", "mps"}))
    if name == "strategy" and isinstance(own, Strategy):
        return own.name == option
    return own == option
