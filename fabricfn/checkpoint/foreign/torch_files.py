"""PyTorch files: read by `torch.load(weights_only=True)` alone, which makes tensors and plain containers."""

import contextlib
import io
import re
import threading
from collections.abc import Generator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from fabricfn.checkpoint.foreign.values import taken_up
from fabricfn.errors import CheckpointError

_TABLE = threading.Lock()
"""torch's table of names that may be unpickled is one for the process."""
ZIP = b"PK\x03\x04"
WANTED = re.compile(r"(?:GLOBAL|global:?)\s+([\w.]+\.[\w.]+)|[Cc]lass (?:'|<class ')?([\w.]+\.[\w.]+)")


def opened_torch(path: Path) -> Any:
    """The tree of a PyTorch file. Where it can be, the file is mapped, so that only the bytes that are wanted are read.

    Raises:
        CheckpointError: it is damaged, or wants to unpickle a class; the message names the file and the class.
    """
    return taken_up(loaded(path), path)


def loaded(path: Path, known: Mapping[str, type] = MappingProxyType({})) -> Any:
    """What `torch.load` makes of a file; `known` are stand-ins for classes, by their names."""
    with path.open("rb") as file:
        mapped = file.read(4) == ZIP  # files from before torch 1.6 are one pickle
    with _allowed(known):
        return unpickled(str(path), str(path), mapped)


@contextlib.contextmanager
def _allowed(known: Mapping[str, type]) -> Generator[None]:
    if not known:
        yield
        return
    stand_ins: list[Any] = [(stand_in, name) for name, stand_in in known.items()]
    with _TABLE, torch.serialization.safe_globals(stand_ins):
        yield


def blob(data: bytes, where: str, file: Path) -> Any:
    """The tree of a PyTorch file that lies inside another one."""
    return taken_up(unpickled(io.BytesIO(data), where, False), file)


def unpickled(source: Any, where: str, mapped: bool) -> Any:
    """What `torch.load` makes without any class but its own few."""
    try:
        return torch.load(source, map_location="cpu", weights_only=True, mmap=mapped or None)
    except MemoryError:
        raise
    except Exception as error:  # damaged bytes lead torch.load to any of them
        text = str(error)
        wanted = WANTED.search(text)
        if wanted is not None:
            raise CheckpointError(_refusal(where, wanted[1] or wanted[2])) from None
        raise CheckpointError(
            f"{where} cannot be read as a PyTorch file: {type(error).__name__}: {_first(text)}. It is damaged, cut off,"
            " or no file of torch.save; nothing was unpickled but tensors and plain values."
        ) from None


def _refusal(where: str, wanted: str) -> str:
    return (
        f"{where} wants to unpickle {wanted}, and unpickling a class can run code; only tensors and plain values are"
        " read. Write the tensors alone where the file was made: torch.save({'model': net.state_dict()}, path). If you"
        " know the class and trust it, torch.serialization.add_safe_globals([TheClass]) lets torch read it; what is no"
        " tensor can then still be left out with key=."
    )


def _first(text: str) -> str:
    return " ".join(text.split())[:200]
