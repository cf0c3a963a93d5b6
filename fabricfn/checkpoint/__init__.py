"""Checkpoints: `save`, `load`, and what is there. A name is looked up in its file when it is first used.

From below: `format` is what is written, byte for byte; `storage` where it stands, on disks and in object stores;
`trees` what a user hands in and gets back. The verbs beside them put these together over all ranks. `foreign` reads
what other tools wrote.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fabricfn.checkpoint.contents import Contents as Contents, contents_of as contents_of
    from fabricfn.checkpoint.differing import (
        Change as Change,
        Differences as Differences,
        diff_checkpoints as diff_checkpoints,
    )
    from fabricfn.checkpoint.exporting import consolidate as consolidate
    from fabricfn.checkpoint.foreign.loading import load_raw as load_raw
    from fabricfn.checkpoint.jobs import Receipt as Receipt
    from fabricfn.checkpoint.listing import (
        Entry as Entry,
        Summary as Summary,
        inspect_checkpoint as inspect_checkpoint,
        latest as latest,
        list_checkpoints as list_checkpoints,
        verify_checkpoint as verify_checkpoint,
    )
    from fabricfn.checkpoint.loading import Loaded as Loaded, load as load
    from fabricfn.checkpoint.retention import prune_checkpoints as prune_checkpoints, retained as retained
    from fabricfn.checkpoint.saving import Saving as Saving, save as save
    from fabricfn.checkpoint.tables import table as table
    from fabricfn.checkpoint.trees.custom import CheckpointType as CheckpointType
else:
    # Looking at checkpoints imports no torch, so the functions are not imported all at once.
    _FILES = {
        "saving": ("save", "Saving"),
        "jobs": ("Receipt",),
        "loading": ("load", "Loaded"),
        "trees.custom": ("CheckpointType",),
        "foreign.loading": ("load_raw",),
        "exporting": ("consolidate",),
        "differing": ("diff_checkpoints", "Differences", "Change"),
        "contents": ("contents_of", "Contents"),
        "tables": ("table",),
        "retention": ("retained", "prune_checkpoints"),
        "listing": (
            *("latest", "list_checkpoints", "verify_checkpoint", "inspect_checkpoint"),
            *("Summary", "Entry"),
        ),
    }
    _HOMES = {name: file for file, names in _FILES.items() for name in names}
    __all__ = list(_HOMES)

    def __getattr__(name):
        if name not in _HOMES:
            raise AttributeError(f"fabricfn.checkpoint has no {name!r}; it has {', '.join(_HOMES)}.")
        return getattr(import_module(f"fabricfn.checkpoint.{_HOMES[name]}"), name)
