"""`load_raw`: what other tools wrote, into any strategy."""

import contextlib
import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import torch

from fabricfn.checkpoint.agreement import together
from fabricfn.checkpoint.foreign.dcp import has_more, whole_tree
from fabricfn.checkpoint.foreign.filling import Filling, Make, Options, values_of
from fabricfn.checkpoint.foreign.names import Rename, at_key
from fabricfn.checkpoint.foreign.optimizer_states import optimizer
from fabricfn.checkpoint.foreign.places import opened_raw
from fabricfn.checkpoint.foreign.values import PLAIN, Keys, Refused, Stored, leaves, settled
from fabricfn.checkpoint.format.manifest import class_of
from fabricfn.checkpoint.loading import Loaded
from fabricfn.checkpoint.readers import by_readers
from fabricfn.checkpoint.storage.objects import unresolved
from fabricfn.checkpoint.trees.outline import MAPPINGS, listing, places
from fabricfn.errors import CheckpointError, MismatchError
from fabricfn.records import Model
from fabricfn.runtimes import Runtime
from fabricfn.sharding import local_of
from fabricfn.states import Optimizer


def load_raw(
    rt: Runtime,
    path: str | os.PathLike[str],
    like: Any = None,
    *,
    key: str | None = None,
    prefix: str | None = None,
    rename: Rename | None = None,
    cast: bool = False,
    strict: bool = True,
) -> Any:
    """Read what another tool wrote: PyTorch, safetensors, Hugging Face, DCP, Fabric, DeepSpeed.

    Laws: the values are those of the file, bit for bit, unless `cast`. No class is unpickled and nothing is imported:
    PyTorch files are read by `torch.load(weights_only=True)` alone. Where it is not certain what is meant, it is an
    error. These formats have no checksums, so a flipped bit goes unseen; a missing byte does not.

    Args:
        rt: the runtime. Collective: every rank calls it; all ranks see the same files.
        path: a file of `torch.save` or safetensors; a folder with `model.safetensors`, or with shards and their
            `model.safetensors.index.json`; a folder of torch.distributed.checkpoint, of any number of ranks; what
            `fabric.save` made, one file or a folder; a checkpoint of DeepSpeed, of any ZeRO stage and number of ranks,
            or a universal one, whose `module` and `optimizer` are whole then.
        like: a `Model`, which takes a state dict; an `Optimizer`, which takes torch's `optimizer.state_dict()`; a
            tensor; or dicts, lists and tuples of these, by the names of the file. It decides devices and shardings, and
            is left alone. Where it has None, and without it, plain containers come back, tensors on `rt.device`.
        key: where in the file `like` begins: "model", "ema/state_dict". Without it, a Model takes the only state dict
            that there is, an Optimizer the only state of one.
        prefix: take the names that begin with it, without it: "encoder.", "" for names as they are. By default the
            parts that DDP, FSDP, Fabric, torch.compile and activation checkpointing put into names ("module.",
            "_orig_mod.", ...) are taken away where the model has no such name.
        rename: names of the file's state dict to the model's: {"backbone.*": "encoder.*"}, with `*` for any text, or a
            function of a name (None leaves it out).
        cast: convert floating tensors to the dtype that `like` has.
        strict: a Model's names and the file's must be the same. Entries of the file that a dict of `like` does not
            name are never an error.

    Returns:
        The tree in the shape of `like`, on every rank; of a DTensor its own part, for which only that is read. With
        `strict=False` a `Loaded`, whose `rest` has the further entries, and `missing` names what kept its value.

    Raises:
        CheckpointError: there is no such file, it is damaged, it wants to unpickle a class (named), or it does not fit:
            then one message names every entry that is missing, unexpected, or of another shape or dtype.
        MismatchError: the ranks found different files at `path`.

    Example:
        >>> import tempfile, torch, fabricfn as ff
        >>> net = torch.nn.Linear(2, 1)
        >>> with tempfile.TemporaryDirectory() as folder, ff.runtime(devices=1, accelerator="cpu") as rt:
        ...     torch.save({"model": net.state_dict(), "epoch": 3}, folder + "/last.pt")
        ...     model = ff.setup_model(rt, torch.nn.Linear(2, 1))
        ...     state = ff.load_raw(rt, folder + "/last.pt", {"model": model, "epoch": 0})
        >>> torch.equal(state["model"].params["weight"], net.weight), state["epoch"]
        (True, 3)
    """
    rt = rt.whole
    what = f"ff.load_raw of {path!s:.300}"
    options = Options(prefix=prefix, rename=rename, cast=cast, strict=strict)
    with contextlib.ExitStack() as stack:

        def plan() -> tuple[tuple[Filling, Make], str]:
            place, filling = unresolved(path), Filling(options, rt.device)
            tree = opened_raw(place, stack)
            if has_more(tree) and _wants_more(like, tree, key):
                tree = whole_tree(tree)
            try:
                make = _fill(filling, like, at_key(tree, key), tuple(key.split("/")) if key else ())
            except CheckpointError as error:
                raise CheckpointError(f"{place}: {error}") from None
            if filling.problems:
                raise CheckpointError(_misfit(place, filling.problems))
            return (filling, make), _fingerprint(tree)

        (filling, make), found = together(rt.world, what, plan)
        if len(set(found)) > 1:
            raise MismatchError(
                f"{what}: the ranks found different files there (this is rank {rt.rank}). All ranks must see the same"
                " files; is something being written there?"
            )

        def fill() -> tuple[Any, None]:
            values = values_of(filling, lambda work, items: _run(rt, work, items, filling))
            tree = make(values)
            if strict:
                return tree, None
            rest: dict[str | int, Any] = {}
            for keys, further in filling.rest:
                _put(rest, keys, further(values))
            return Loaded(tree=tree, rest=rest, missing=tuple(filling.missing)), None

        return together(rt.world, what, fill)[0]


def _misfit(path: Path, problems: Sequence[str]) -> str:
    return (
        f"{path} does not fit the template in {places(problems)}; build the template as when the file was written, say"
        " how names differ (key=, prefix=, rename=), or take what fits (strict=False)."
        f"{listing(problems)}"
    )


def _run(rt: Runtime, work: Callable[[Any], Any], items: list[Any], filling: Filling) -> list[Any]:
    """The work on all items, read at the same time where it is worth it."""
    wanted = 0
    for stored, like, _ in filling.wants:
        shape = torch.Size(stored.shape) if like is None else local_of(like).shape
        wanted += shape.numel() * stored.dtype.itemsize
    return by_readers(rt.world, work, items, wanted)


def _put(rest: dict[str | int, Any], keys: Keys, value: Any) -> None:
    for part in keys[:-1]:
        rest = rest.setdefault(part, {})
    rest[keys[-1]] = value


def _wants_more(like: Any, tree: dict[Any, Any], key: str | None) -> bool:
    """Whether something is asked for that is not among the tensors of Fabric's folder."""
    if key is not None:
        return key.split("/")[0] not in map(str, tree)
    return like is None or (class_of(like) in MAPPINGS and any(name not in tree for name in like))


def _fingerprint(tree: Any) -> str:
    """Equal where files have the same entries."""
    shown = (
        (keys, (str(leaf.dtype), leaf.shape) if type(leaf) is Stored else type(leaf).__name__)
        for keys, leaf in leaves(tree)
    )
    return hashlib.sha256("\n".join(map(repr, shown)).encode("utf-8", "surrogatepass")).hexdigest()


def _fill(filling: Filling, like: Any, tree: Any, keys: Keys) -> Make:
    """One place of the template."""
    tree, kind = settled(tree), class_of(like)
    if like is None:
        return filling.plain(tree, keys)
    if kind is Model:
        return filling.model(like, tree, keys)
    if kind is Optimizer:
        return optimizer(filling, like, tree, keys)
    if isinstance(like, torch.Tensor):
        return filling.tensor(like, tree, keys)
    if kind in MAPPINGS:
        return _mapping(filling, like, tree, keys)
    if kind in (list, tuple):
        return _sequence(filling, like, tree, keys)
    if isinstance(like, PLAIN):
        if isinstance(tree, PLAIN):
            return lambda values: tree
        text = (
            tree.text if type(tree) is Refused else f"the template has a plain value, the file a {type(tree).__name__}"
        )
        return filling.problem(keys, text)
    return filling.problem(
        keys,
        f"an object of class {kind.__name__} cannot be filled; write a dict, a Model (of a module: ff.setup_model(rt,"
        " module)), an Optimizer, a tensor, or None",
    )


def _mapping(filling: Filling, like: Any, tree: Any, keys: Keys) -> Make:
    if not isinstance(tree, dict):
        return filling.problem(keys, f"the template has a dict, the file a {type(tree).__name__}")
    items = cast("dict[Any, Any]", tree)
    made: dict[Any, Make] = {}
    there = ", ".join(map(str, [*items][:8])) or "nothing"
    for name, item in like.items():
        found = name if name in items else str(name)
        if found in items:
            made[name] = _fill(filling, item, items[found], (*keys, name))
        else:
            made[name] = filling.absent(item, (*keys, name), f" (there: {there}{', ...' if len(items) > 8 else ''})")
    return lambda values: {name: make(values) for name, make in made.items()}


def _sequence(filling: Filling, like: Any, tree: Any, keys: Keys) -> Make:
    if not isinstance(tree, list | tuple):
        return filling.problem(keys, f"the template has a {class_of(like).__name__}, the file a {type(tree).__name__}")
    items = cast("Sequence[Any]", tree)
    if len(items) != len(like):
        return filling.problem(keys, f"the template has {len(like)} elements, the file {len(items)}")
    parts = [_fill(filling, item, items[index], (*keys, index)) for index, item in enumerate(like)]
    return lambda values: class_of(like)(make(values) for make in parts)
