"""What travels between a parent and its ranks: the call going out, the results coming back. The file that names
cloudpickle, which carries functions without an importable name.
"""

import contextlib
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from fabricfn.errors import LaunchError

Call = tuple[Callable[..., Any], tuple[Any, ...], Any]
"""A function, its arguments, and the request under which it runs."""


def unpack(cargo: Call | bytes) -> Call:
    """The call, in the process that runs it.

    Raises:
        LaunchError: it names something that was defined at a prompt or in a notebook, and exists there alone.
    """
    try:
        return pickle.loads(cargo) if isinstance(cargo, bytes) else cargo
    except AttributeError as error:
        raise LaunchError(
            f"a spawned rank does not find what it is to call: {error}. What is defined at a prompt or in a notebook"
            " exists in that process alone. Install cloudpickle, which sends it along (pip install"
            " 'fabricfn[closures]'), write it into a file that is imported, or write start_method=\"fork\"."
        ) from error


def _cloudpickle() -> ModuleType | None:
    with contextlib.suppress(ImportError):
        import cloudpickle  # pyright: ignore[reportMissingImports]

        return cloudpickle
    return None


def pack(call: Call) -> bytes:
    """The call as bytes.

    Raises:
        LaunchError: it holds a closure, a lambda or an unpicklable value, and cloudpickle is not installed or fails.
    """
    clouds = _cloudpickle()
    main = sys.modules["__main__"]
    prompt = not hasattr(main, "__file__") or hasattr(sys, "ps1") or sys.flags.interactive
    try:
        if not prompt or clouds is None:  # what a prompt or a notebook defines cannot be imported by another process
            return pickle.dumps(call)
    except Exception as error:  # whatever a __reduce__ raises
        if clouds is None:
            raise LaunchError(
                f"the function or its arguments cannot be pickled: {error}. Functions that are not at the top level of"
                " a module (lambdas, closures) travel with cloudpickle: pip install 'fabricfn[closures]'. Or move the"
                ' function to the top level, or write start_method="fork".'
            ) from error
    try:
        return clouds.dumps(call)
    except Exception as error:  # whatever a __reduce__ raises
        raise LaunchError(
            f"the function or its arguments cannot be pickled, by cloudpickle either: {error}. Pass plain data and"
            " build everything else inside the function."
        ) from error


def write_result(path: Path, result: Any, rank: int) -> None:
    """Write what a rank returned; through a file, since a pipe of the size of a result can block for ever.

    Raises:
        LaunchError: it cannot be pickled.
    """
    draft = path.with_suffix(".draft")
    try:
        torch.save(result, draft)
    except Exception as error:  # whatever a __reduce__ raises
        raise LaunchError(
            f"what rank {rank} returned ({type(result).__name__}) cannot be pickled: {error}. Return tensors and"
            " plain data."
        ) from error
    draft.rename(path)


def read_result(path: Path) -> Any:
    """What a rank returned: its tensors on the CPU, in memory of this process."""
    return torch.load(path, map_location="cpu", weights_only=False)
