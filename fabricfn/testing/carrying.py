"""How functions, arguments, results and exceptions travel between processes."""

import functools
import pickle
import sys
from importlib.machinery import PathFinder
from typing import Any

from fabricfn.errors import LaunchError

try:
    import cloudpickle
except ImportError:  # the extra "closures"
    cloudpickle = None


FORK, END, READY, WHERE = b"fork", b"end", b"ready", b"where"
"""To the mother: fork ranks for these connections; kill them. From it: done. To a rank: in which line are you?"""


def pack(value: Any) -> bytes:
    """Bytes that `pickle.loads` understands; closures included when cloudpickle is installed.

    What comes from a module that another process could not import (a script, a test file) travels by value.

    Raises:
        LaunchError: the value cannot be pickled, and cloudpickle is not installed.
    """
    if cloudpickle is None:
        try:
            return pickle.dumps(value)
        except Exception as error:  # whatever a __reduce__ raises
            raise LaunchError(
                f"{error}: closures and functions of a script need cloudpickle. pip install 'fabricfn[closures]'."
            ) from error
    modules = list(sys.modules.items())
    loose = [module for name, module in modules if is_loose(name, getattr(module, "__file__", None))]
    for module in loose:
        cloudpickle.register_pickle_by_value(module)
    try:
        return cloudpickle.dumps(value)
    finally:
        for module in loose:
            cloudpickle.unregister_pickle_by_value(module)


@functools.cache
def is_loose(name: str, file: str | None) -> bool:
    """Whether a module of the user's would not be found again by its name, in an interpreter with this `sys.path`."""
    if name == "__main__" or file is None or file.startswith((sys.prefix, sys.base_prefix)):
        return False
    path: Any = None
    for end in range(1, name.count(".") + 2):
        spec = PathFinder.find_spec(".".join(name.split(".")[:end]), path)
        if spec is None:
            return True
        path = spec.submodule_search_locations
    return False
