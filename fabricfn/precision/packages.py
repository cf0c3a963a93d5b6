"""Packages that a precision needs: found without being imported, or an error that says how to install them."""

import importlib.util
from importlib import import_module
from typing import Any

from fabricfn.errors import CapabilityError


def require(package: str, install: str, instead: str, hardware: str = "") -> None:
    """Raise `CapabilityError` unless the package is there.

    Args:
        package: the name that is imported.
        install: what pip is told.
        instead: a precision that needs no package.
        hardware: what the package needs itself.
    """
    try:
        there = importlib.util.find_spec(package) is not None
    except (ImportError, ValueError):  # the package around it is missing, or its import is blocked
        there = False
    if not there:
        raise CapabilityError(
            f"this precision needs the package {package}, which is not installed{hardware and ', and ' + hardware}."
            f' Install it: pip install {install}; or write precision="{instead}".'
        )


def package(name: str, install: str, instead: str) -> Any:
    """The imported package.

    Raises:
        CapabilityError: it is missing, or fails as it is imported.
    """
    require(name, install, instead)
    try:
        return import_module(name)
    except (ImportError, OSError, RuntimeError) as error:
        raise CapabilityError(
            f"this precision needs the package {name}, which is installed but cannot be imported: {error}. Install it"
            f' anew: pip install {install}; or write precision="{instead}".'
        ) from error
