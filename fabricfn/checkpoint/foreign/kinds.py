"""Which files and folders are of other tools. No torch."""

import os
from pathlib import Path

from fabricfn.checkpoint.format.manifest import MANIFEST
from fabricfn.checkpoint.storage.objects import unresolved, url_of

Keys = tuple[str | int, ...]
"""A place in a tree."""

INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
SINGLES = ("model.safetensors", "pytorch_model.bin")
METADATA = ".metadata"
"""The file by which a folder of torch.distributed.checkpoint is known."""


def is_foreign(path: str | os.PathLike[str]) -> bool:
    """Whether what stands at a path is a file, or a folder of another tool's; what is missing is nobody's."""
    if url_of(path) is not None:
        return False
    place = unresolved(path)
    if not place.is_dir() or os.path.lexists(place / MANIFEST):
        return place.is_file()
    return any(os.path.lexists(place / name) for name in (METADATA, *INDEXES, *SINGLES))


def is_safetensors(path: Path, name: str = "") -> bool:
    """Whether a file is one of safetensors, by its name (`name` where a link lost it) or by what it begins with."""
    with path.open("rb") as file:
        begin = file.read(9)
    return (name or path.name).endswith(".safetensors") or (begin[8:] == b"{" and begin[:2] != b"PK")
