"""`load`: the tree of a checkpoint, in the shape of a template, every byte checked."""

import contextlib
import dataclasses
import functools
import os
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

from fabricfn.checkpoint.agreement import together
from fabricfn.checkpoint.format.manifest import ARRAYS, Leaf, Node, path_text, plain_value
from fabricfn.checkpoint.format.pieces import Source
from fabricfn.checkpoint.meters import Progress, Tell, meter
from fabricfn.checkpoint.readers import by_readers
from fabricfn.checkpoint.storage.downloading import TURNS, Replaced
from fabricfn.checkpoint.storage.opening import opened
from fabricfn.checkpoint.trees.adapters import Types
from fabricfn.checkpoint.trees.arrays import identity
from fabricfn.checkpoint.trees.custom import CheckpointType, types_of
from fabricfn.checkpoint.trees.fitting import Terms, fit
from fabricfn.checkpoint.trees.outline import (
    Only,
    Path,
    idle_patterns,
    leaf_paths,
    listing,
    nothing_selected,
    places,
    prune,
    selector,
)
from fabricfn.checkpoint.trees.plans import Fit, Want, built
from fabricfn.checkpoint.trees.reading import needed_bytes, read_leaf, room_for
from fabricfn.checkpoint.trees.renaming import Rename, renamed
from fabricfn.checkpoint.trees.riding import put_back
from fabricfn.errors import CheckpointError, MismatchError
from fabricfn.leases import Place, caller
from fabricfn.runtimes import Runtime
from fabricfn.watching import collective


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """What `load` returns with `remainder=True` or `strict=False`."""

    tree: Any
    """The loaded tree, in the shape of the template."""
    rest: dict[str | int, Any]
    """What the checkpoint has and the template does not, as nested dicts by the parts of its paths."""
    missing: tuple[str, ...]
    """The paths that the template has and the checkpoint does not; the tree holds the template's own values there."""


@collective("load")
def load(
    rt: Runtime,
    path: str | os.PathLike[str],
    like: Any = None,
    *,
    only: Only = None,
    rename: Rename = None,
    types: Sequence[CheckpointType] = (),
    strict: bool = True,
    remainder: bool = False,
    donate: bool = False,
    progress: Progress = None,
    storage_options: Mapping[str, Any] | None = None,
) -> Any:
    """Read a checkpoint, whatever strategy and world size wrote it.

    Laws: `load(rt, path, like=tree)` after `save(rt, path, tree)` is `tree` bit for bit. A damaged or missing byte of
    what is read is an error, never a wrong value. Nothing is unpickled or imported.

    Args:
        rt: the runtime. Collective: every rank calls it, and every rank gets the whole tree; of a leaf that is a
            DTensor in `like`, its own part, and only the bytes of that are read.
        path: the folder that `save` made, or its URL; `latest(folder)` finds the newest.
        like: the template: a tree of the same structure, which decides the classes and devices. It is left alone.
            Where it has None, and without it, plain dicts, lists and tuples come back, tensors on `rt.device`.
            Tensors on the meta device stand for tensors on `rt.device`. A DTensor fits a tensor of its global shape,
            however that was sharded when it was saved. An object with `load_state_dict` (a scheduler, a loader) is
            given its rank's state, once all ranks have read everything, and returned itself.
        only: what to load, by path ("model", "model/params/*.weight", several, or a predicate of a leaf's path); only
            its bytes are read. Elsewhere the result holds the template's own values.
        rename: load as if the checkpoint had been saved under other names: {the name there: the name here}, of an entry
            or a container, with `*` for any text ({"model/params/encoder.*": "model/params/backbone.*"}); or a function
            of a leaf's path. An entry that has the new name already gives way. `only` takes the new names.
        types: `CheckpointType` of classes of your own. Without a template their `from_tree` is given None.
        strict: every entry of `like` must be in the checkpoint. Further entries of its dicts are the remainder, never
            an error; a record (a Model, an Optimizer, a dataclass) has the same entries on both sides.
        remainder: return `Loaded`, whose `rest` has what the template does not name, in records too.
        donate: overwrite the tensors of `like`, which is given away: no second copy in memory. When the load fails,
            their values are lost.
        progress: called with (bytes done, bytes in all) of what rank 0 reads on rank 0, every 0.1 s at most and at the
            end, an array at a time; what it raises fails the load. True prints a line to stderr every 3 s.
        storage_options: arguments of fsspec's file system for a URL.

    Returns:
        The tree; a `Loaded` when `remainder` or not `strict`. Tensors own their memory.

    Raises:
        CheckpointError: there is no whole checkpoint, it is damaged, or it does not fit `like`: then one message names
            every entry that is missing or has another shape or dtype. Or a rename fits nothing, or two contradict each
            other. Objects have then not been given a state, unless one of them refused its own.
        MismatchError: the ranks found different checkpoints at `path`.

    Example:
        >>> import tempfile, torch, fabricfn as ff
        >>> with tempfile.TemporaryDirectory() as folder, ff.runtime(devices=1, accelerator="cpu") as rt:
        ...     receipt = ff.save(rt, folder + "/last", {"w": torch.ones(2), "cursor": ff.Cursor(epoch=3)})
        ...     ff.load(rt, receipt.path, {"w": torch.zeros(2), "cursor": ff.Cursor()})
        {'w': tensor([1., 1.]), 'cursor': Cursor(seed=0, epoch=3, index=0)}
    """
    rt = rt.whole
    what, where = f"ff.load of {path!s:.300}", caller() if donate else None
    wrap = remainder or not strict

    def once(last: bool) -> tuple[bool, Any, States]:
        """False when another checkpoint took the place meanwhile, on any rank."""
        with contextlib.ExitStack() as stack:

            def plan() -> tuple[tuple[Source, Fit], tuple[str, list[str]]]:
                adapters = types_of(types)
                source = stack.enter_context(opened(path, options=storage_options))
                manifest = source.manifest
                tree = _part(renamed(manifest.tree, rename), like, only, adapters)
                terms = Terms(world=rt.world, only=only, types=adapters, exact=strict, extras=wrap, where=where)
                found = _accepted(fit(manifest, tree, like, terms), source)
                return (source, found), (manifest.save_id, [path_text(at) for at, _, _ in found.states])

            (source, found), answers = together(rt.world, what, plan)
            if not last and len({save_id for save_id, _ in answers}) > 1:
                return False, None, []
            _check_alike(rt, what, answers)
            tells = functools.partial(meter, progress if rt.rank == 0 else None, what)

            def read() -> tuple[tuple[Any, States], bool]:
                try:
                    return _read(rt, source, found, where, wrap, tells), True
                except Replaced:
                    if last:
                        raise
                    return (None, []), False

            (tree, states), read_by = together(rt.world, what, read)
            return all(read_by), tree, states

    whole, tree, states = once(last=donate)  # a second turn would find the template given away
    for turn in range(TURNS):
        if whole:
            break
        whole, tree, states = once(last=turn == TURNS - 1)
    if states:
        together(rt.world, what, lambda: (put_back(states), None))
    return tree


def _part(tree: Node | int, like: Any, only: Only, types: Types) -> Node | int:
    """What `only` selects. A pattern that fits nothing, neither here nor in the template, was misspelt."""
    found = prune(tree, only)
    if found is None:
        raise nothing_selected(only, tree)
    for pattern in idle_patterns(only, tree):
        if like is None or not any(map(selector(pattern), leaf_paths(like, (), types))):
            raise nothing_selected(pattern, tree)
    return found


def _check_alike(rt: Runtime, what: str, answers: Sequence[tuple[str, list[str]]]) -> None:
    save_ids = [save_id for save_id, _ in answers]
    if len(set(save_ids)) > 1:
        raise MismatchError(
            f"{what}: the ranks found different checkpoints there (save ids {', '.join(s[:8] for s in save_ids)};"
            f" this is rank {rt.rank}). Was it replaced meanwhile? Load again once the save is done."
        )
    if any(names != answers[0][1] for _, names in answers):
        each = "; ".join(f"rank {rank} {', '.join(names) or 'none'}" for rank, (_, names) in enumerate(answers))
        raise MismatchError(
            f"{what}: the templates of the ranks have objects that are given a state at different places: {each}"
            f" (this is rank {rt.rank})."
        )


def _accepted(found: Fit, source: Source) -> Fit:
    if found.problems:
        raise CheckpointError(
            f"{source.path} does not fit the template in {places(found.problems)}; build the template as when it was"
            " saved, or say how names differ (rename=...), load a part (only=...), take what fits (strict=False), or"
            " load without a template."
            f"{listing(found.problems)}"
        )
    return found


States = list[tuple[Path, Any, Any]]
"""(path, object, its state)."""


def _read(
    rt: Runtime, source: Source, found: Fit, where: Place | None, wrap: bool, tells: Callable[[int], Tell]
) -> tuple[Any, States]:
    if where is not None:
        for adapter, record in found.claims:
            adapter.claim(record, where)
    values = _values(rt, source, found.wants, where is not None, tells)
    tree = built(found.build, values)
    states = [(path, one, built(build, values)) for path, one, build in found.states]
    if not wrap:
        return tree, states
    rest: dict[str | int, Any] = {}
    for path, build in found.rest:
        place = rest
        for part in path[:-1]:
            place = place.setdefault(part, {})
        place[path[-1]] = built(build, values)
    return Loaded(tree=tree, rest=rest, missing=found.missing), states


def _values(
    rt: Runtime, source: Source, wants: Sequence[Want], donate: bool, tells: Callable[[int], Tell]
) -> list[Any]:
    """The values of leaves; what is one array in the checkpoint and in the template is one array again.

    Arrays are read by a few threads, one array each at a time: reading and checking use no lock of Python's. Their
    memory is taken here: what a thread takes, the allocator does not use again for another one, and new pages cost more
    than the reading.
    """
    leaves = source.manifest.leaves
    keys = [_key(leaves, want) for want in wants]
    first = {key: want for key, want in zip(reversed(keys), reversed(wants), strict=True) if key is not None}

    sizes = {key: needed_bytes(_whole(leaves, want), want.like) for key, want in first.items()}
    rooms = {key: room_for(_whole(leaves, want), want.like, rt.device, donate) for key, want in first.items()}
    tell = tells(sum(sizes.values()))

    def read(item: tuple[Hashable, Want]) -> tuple[Hashable, Any]:
        key, want = item
        leaf, what = _whole(leaves, want), path_text(want.path)
        value = read_leaf(source, leaf, want.like, what, room=rooms.pop(key), device=rt.device, donate=donate)
        tell(sizes[key])
        return key, value

    found = dict(by_readers(rt.world, read, first.items(), sum(sizes.values()), source.remote))
    pairs = zip(keys, wants, strict=True)
    return [plain_value(leaves[want.leaf]) if key is None else found[key] for key, want in pairs]


def _key(leaves: Sequence[Leaf], want: Want) -> Hashable | None:
    """Equal for wanted leaves that are one array in the checkpoint and in the template; None for plain values."""
    leaf = leaves[want.leaf]
    if leaf.kind not in ARRAYS:
        return None
    base = want.leaf if leaf.alias is None else leaf.alias
    return base, None if want.like is None else identity(want.like) or id(want.like)


def _whole(leaves: Sequence[Leaf], want: Want) -> Leaf:
    """The leaf that has the pieces."""
    leaf = leaves[want.leaf]
    return leaf if leaf.alias is None else leaves[leaf.alias]
