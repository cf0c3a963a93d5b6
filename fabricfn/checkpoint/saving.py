"""`save`: the ranks agree on a tree, and what they agreed on is carried out, at once or beside the training."""

import dataclasses
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, overload

from fabricfn import errands
from fabricfn.checkpoint.jobs import Job, Receipt, carried_out, planned
from fabricfn.checkpoint.meters import Progress
from fabricfn.checkpoint.snapshots import snapshot
from fabricfn.checkpoint.trees.custom import CheckpointType
from fabricfn.checkpoint.trees.outline import Only
from fabricfn.collectives.groups import beside
from fabricfn.runtimes import Runtime
from fabricfn.watching import collective


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Saving:
    """A save that goes on beside the training: what `save(..., blocking=False)` returns.

    It belongs to the process that began it, and may be dropped: the save goes on, and its error is raised elsewhere.
    """

    path: Path | str
    """The folder, or the URL, that will be the checkpoint."""
    errand: errands.Errand = dataclasses.field(repr=False)

    def wait(self) -> Receipt:
        """Wait until the checkpoint stands, and return the receipt; every later call returns it again.

        No collective: any rank may call it, on any thread. Ctrl-C ends the waiting, not the save.

        Raises:
            CheckpointError: the save failed, on every rank; what stood at the path before is intact.
        """
        return errands.outcome(self.errand)

    def done(self) -> bool:
        """Whether the save has ended, in whatever way; never waits."""
        return self.errand.ended.is_set()


@overload
def save(
    rt: Runtime,
    path: str | os.PathLike[str],
    tree: Any,
    *,
    only: Only = None,
    export: str | None = None,
    types: Sequence[CheckpointType] = (),
    blocking: Literal[True] = True,
    progress: Progress = None,
    storage_options: Mapping[str, Any] | None = None,
) -> Receipt: ...
@overload
def save(
    rt: Runtime,
    path: str | os.PathLike[str],
    tree: Any,
    *,
    only: Only = None,
    export: str | None = None,
    types: Sequence[CheckpointType] = (),
    blocking: Literal[False],
    progress: Progress = None,
    storage_options: Mapping[str, Any] | None = None,
) -> Saving: ...
@collective("save")
def save(
    rt: Runtime,
    path: str | os.PathLike[str],
    tree: Any,
    *,
    only: Only = None,
    export: str | None = None,
    types: Sequence[CheckpointType] = (),
    blocking: bool = True,
    progress: Progress = None,
    storage_options: Mapping[str, Any] | None = None,
) -> Receipt | Saving:
    """Write a tree as a checkpoint, so that a crash at any instant leaves the old one or the new one.

    Laws: `load(rt, path, like=tree)` is `tree` bit for bit, at every world size. When any rank fails, nobody commits,
    and what stood at `path` is intact. With `blocking=False` the checkpoint holds the values of the instant of the
    call, bit for bit, whatever is done to the tensors afterwards; until its end `load` and `latest` find the old one.

    Args:
        rt: the runtime. Collective: every rank calls it.
        path: the folder that shall be the checkpoint, of whatever name; missing parents are made. A checkpoint that
            stands there is replaced in one step; a folder with anything else is refused. Or a URL that fsspec knows
            ("s3://bucket/run/last").
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
            `verify_checkpoint` do not look at these files. Not at a URL.
        types: `CheckpointType` of classes of your own in the tree.
        blocking: False returns once this rank's share is copied into host memory; a thread writes it, with a process
            group of its own. One save is in flight in a world: the next one, blocking or not, first waits for it. The
            copy's memory is kept for the next save of this kind, until a blocking save or `shutdown`. The process is
            not left before the save has ended. An error that no `wait` raised is raised by the next save or by
            `shutdown` (the end of `with ff.runtime`); else it is printed at exit, and the status is 1.
        progress: called with (bytes done, bytes in all) of rank 0's share on rank 0, every 0.1 s at most and at the
            end, on the writing thread when not blocking; what it raises fails the save. True prints a line to stderr
            every 3 s.
        storage_options: arguments of fsspec's file system for a URL.

    Returns:
        A `Receipt`, the same on every rank. A `Saving` when not blocking: its `wait()` returns the receipt.

    Raises:
        ConfigurationError: an unknown `export`.
        CheckpointError: a value cannot be stored (all of them are named), a DTensor is not whole on these ranks, or a
            rank failed (named on every rank); when not blocking, a failure to write is raised by `wait`. Or the save
            before failed and nobody was told; then this one was not begun.
        MismatchError: the ranks' trees, plain values or shardings differ; the message names the entries.
        DonatedError: a record in the tree was given away.

    Example:
        >>> import tempfile, torch, fabricfn as ff
        >>> with tempfile.TemporaryDirectory() as folder, ff.runtime(devices=1, accelerator="cpu") as rt:
        ...     receipt = ff.save(rt, folder + "/last", {"w": torch.arange(3), "epoch": 2})
        ...     ff.load(rt, receipt.path)
        {'w': tensor([0, 1, 2]), 'epoch': 2}
    """
    began, rt = time.perf_counter(), rt.whole
    error, buffer = errands.settled(rt.world)
    if error is not None:
        error.add_note(f"(of an earlier save, which nobody waited for; the save to {os.fspath(path)} was not begun)")
    job = planned(rt, path, tree, only, types, export, storage_options, error, blocking)
    if blocking:
        return carried_out(rt.world, job, began, progress=progress)
    return _beside(rt, job, began, progress, buffer)


def _beside(rt: Runtime, job: Job, began: float, progress: Progress, buffer: Any) -> Saving:
    try:
        world = beside(rt.world)
    except BaseException:
        job.clear()
        raise
    failure: BaseException | None = None
    copies: list[Any] = []
    try:
        copies, buffer = snapshot(job.arrays, buffer)
    except BaseException as error:  # the other ranks' threads wait for this one's, which tells them
        failure = error
    job = dataclasses.replace(job, arrays=copies)
    stalled = time.perf_counter() - began
    errand = errands.begin(
        rt.world,
        job.what,
        lambda: carried_out(world, job, began, stalled=stalled, failure=failure, progress=progress),
        buffer,
    )
    if failure is not None and not isinstance(failure, Exception):
        raise failure
    return Saving(path=job.store.path, errand=errand)
