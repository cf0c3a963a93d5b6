"""`save`: the ranks agree on a tree, and what they agreed on is carried out."""

import os
import time
from collections.abc import Sequence
from typing import Any

from fabricfn.checkpoint.custom import CheckpointType
from fabricfn.checkpoint.jobs import Receipt, carried_out, planned
from fabricfn.checkpoint.outline import Only
from fabricfn.runtimes import Runtime


def save(
    rt: Runtime,
    path: str | os.PathLike[str],
    tree: Any,
    *,
    only: Only = None,
    export: str | None = None,
    types: Sequence[CheckpointType] = (),
) -> Receipt:
    """Write a tree as a checkpoint, so that a crash at any instant leaves the old one or the new one.

    Laws: `load(rt, path, like=tree)` is `tree` bit for bit, at every world size. When any rank fails, nobody commits,
    and what stood at `path` is intact.

    Args:
        rt: the runtime. Collective: every rank calls it.
        path: the folder that shall be the checkpoint, of whatever name; missing parents are made. A checkpoint that
            stands there is replaced in one step; a folder with anything else is refused.
        tree: dicts, lists, tuples, named tuples, dataclasses, `Model`, `Optimizer`, `Grads`, `Cursor`, `Key`; torch
            tensors of any dtype and device, numpy arrays; numbers, strings, bytes, None. Keys are strings or integers.
            All ranks hold the same tree; its tensors are written once, by the ranks together. Of a DTensor each rank
            writes its own part; nothing is gathered. The same memory at two places is written once. An object with
            `state_dict` and `load_state_dict` (a torch scheduler, a loader of torchdata) rides along: its state is
            written, that of every rank where they differ.
        only: what to save, by path ("model", "model/params/*.weight", several of them, or a predicate of a leaf's
            path); everything by default.
        export: "hf" puts the `Model`s of the tree beside the manifest once more, as `consolidate` writes them, for
            safetensors and transformers. Rank 0 does it, a block at a time, before the checkpoint appears; `load` and
            `verify_checkpoint` do not look at these files.
        types: `CheckpointType` of classes of your own in the tree.

    Returns:
        A `Receipt`, the same on every rank.

    Raises:
        ConfigurationError: an unknown `export`.
        CheckpointError: a value cannot be stored (all of them are named), a DTensor is not whole on these ranks, or a
            rank failed (named on every rank).
        MismatchError: the ranks' trees, plain values or shardings differ; the message names the entries.
        DonatedError: a record in the tree was given away.

    Example:
        >>> import tempfile, torch, fabricfn as ff
        >>> with tempfile.TemporaryDirectory() as folder, ff.runtime(devices=1, accelerator="cpu") as rt:
        ...     receipt = ff.save(rt, folder + "/last", {"w": torch.arange(3), "epoch": 2})
        ...     ff.load(rt, receipt.path)
        {'w': tensor([0, 1, 2]), 'epoch': 2}
    """
    began = time.perf_counter()
    return carried_out(rt.world, planned(rt, path, tree, only, types, export), began)
