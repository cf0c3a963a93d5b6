"""Before tensors travel: do all ranks make the same call with the same kind of tree? If not, every rank hears of it.

[Note: agreement] gloo returns garbage without an error when dtypes, operations or the order of tensors differ between
ranks, aborts the process when sizes differ, and hangs when the kinds of call differ. So every collective of ours begins
with the same one: an all_gather of four integers a rank, 64-bit digests of the call, of the tree and of its aliases,
and flags. Only when they differ do the ranks exchange descriptions, and all of them raise. Up to `CROWD` ranks the
message has room for a small tree's tensors, which then need no message of their own.
"""

import dataclasses
import functools
import hashlib
import json
from collections import OrderedDict, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch

from fabricfn import flat
from fabricfn.collectives.groups import Members, device_for_words
from fabricfn.collectives.messages import all_gather_bytes
from fabricfn.errors import CapabilityError, FabricfnError, MismatchError
from fabricfn.tracing import tracing
from fabricfn.tree import Leaf, Tree, TreeSpec, path_name, tree_flatten, tree_paths
from fabricfn.world import World

PLAIN = (torch.Tensor, torch.nn.Parameter)
SHOWN = 8
"""So many differing leaves does a message list."""
CROWD = 64
"""Beyond as many ranks every row is as short as can be."""
_CANNOT, _RIDES = 1, 2
_EMPTY = (0,) * flat.ROOM


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Parcel:
    """A tree taken apart."""

    tree: Tree
    leaves: list[Leaf]
    spec: TreeSpec
    texts: list[str]
    """One description a leaf: what must be equal on all ranks."""
    odd: list[int]
    """Places of the leaves that need a closer look before they travel: all but plain, dense, real tensors."""
    firsts: list[int]
    """For each leaf the place of the first leaf that is the same tensor object."""

    def names(self) -> list[str]:
        """The leaves' paths, as messages show them."""
        return [path_name(path) for path in tree_paths(self.tree)]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """What the ranks found out about each other."""

    same_tree: bool
    """Structure, shapes and dtypes are equal on all ranks."""
    same_aliases: bool
    """So is which leaves are one tensor: then it travels once."""
    rows: torch.Tensor | None = None
    """[size, flat.ROOM] words: the tensors of all ranks, where they rode along."""


def take_apart(tree: Tree, *, uneven: bool = False, graph: bool = False) -> Parcel:
    """The leaves of a tree and their descriptions.

    Args:
        tree: any pytree.
        uneven: leave the first dimension out of the descriptions.
        graph: put into them whether a tensor requires a gradient, as then the backward pass is collective too.
    """
    leaves, spec = tree_flatten(tree)
    texts: list[str] = []
    odd: list[int] = []
    for place, leaf in enumerate(leaves):
        text, simple = _facts(leaf, uneven, graph)
        texts.append(text)
        if not simple:
            odd.append(place)
    firsts = list(range(len(leaves)))
    ids = [id(leaf) for leaf in leaves]
    if len(set(ids)) < len(ids):
        seen: dict[int, int] = {}
        for place, leaf in enumerate(leaves):
            if isinstance(leaf, torch.Tensor):
                firsts[place] = seen.setdefault(id(leaf), place)
    return Parcel(tree=tree, leaves=leaves, spec=spec, texts=texts, odd=odd, firsts=firsts)


def agree(
    world: World,
    members: Members,
    call: str,
    parcel: Parcel,
    problem: Exception | None,
    *,
    same_tree: bool = True,
    tensors: Sequence[torch.Tensor] | None = None,
) -> Agreement:
    """Find out whether the members make the same call. Each of them must call it.

    Args:
        world: this process' place.
        members: who takes part.
        call: what must be equal, as the user wrote it: "all_reduce(op='sum')".
        parcel: the tree.
        problem: why this rank cannot make its call; None if it can.
        same_tree: whether trees that differ are an error.
        tensors: those of the tree, if the call needs nothing but the tensors of all ranks: see `Agreement.rows`.

    Raises:
        FabricfnError: `problem`, on this rank.
        MismatchError: on every other rank, and wherever calls or trees differ.
    """
    if members.group is None:
        if problem is not None:
            raise problem
        return Agreement(same_tree=True, same_aliases=True)
    if tracing():
        raise CapabilityError(f"{call} sends messages of its own, which a compiled step cannot. Call it outside of it.")
    device = device_for_words(world, members.group)
    mine = words(call, parcel, problem)
    room = device.type == "cpu" and len(members.ranks) <= CROWD
    cargo = flat.loaded(tensors) if room and tensors is not None and problem is None else None
    if cargo is not None:
        mine[3] |= _RIDES
    message = torch.tensor([*mine, *_EMPTY] if room else mine, device=device)
    if cargo is not None:
        message[4:] = cargo
    (gathered,) = flat.all_gather([message], members.group)
    rows = cast("list[list[int]]", gathered[:, :4].tolist())
    trees_agree = all(row[1] == mine[1] for row in rows)
    if (
        any(row[3] & _CANNOT for row in rows)
        or any(row[0] != mine[0] for row in rows)
        or (same_tree and not trees_agree)
    ):
        data = json.dumps(description(call, parcel, problem)).encode()
        texts = all_gather_bytes(data, members.group, device)
        if problem is not None:
            raise problem
        found = dict(zip(members.ranks, map(json.loads, texts), strict=True))
        raise MismatchError(disagreement(found, world.rank, same_tree=same_tree))
    return Agreement(
        same_tree=trees_agree,
        same_aliases=all(row[2] == mine[2] for row in rows),
        rows=gathered[:, 4:] if all(row[3] & _RIDES for row in rows) else None,
    )


def words(call: str, parcel: Parcel, problem: Exception | None) -> list[int]:
    """[call, tree, aliases, flags]: what the ranks compare."""
    tree = digest("\n".join([containers_text(parcel.spec), str(parcel.spec.paths()), *parcel.texts]))
    aliases = [] if parcel.firsts == list(range(len(parcel.firsts))) else parcel.firsts
    return [digest(call), tree, digest(str(aliases)), 0 if problem is None else _CANNOT]


def digest(text: str) -> int:
    """64 bits, the same in every process (Python's own `hash` is not)."""
    data = hashlib.blake2b(text.encode("utf-8", "backslashreplace"), digest_size=8).digest()
    return int.from_bytes(data, "little", signed=True)


def containers_text(spec: TreeSpec) -> str:
    """The containers of a structure and the keys of its dicts: `dict['w', 'b'](*, list(*))`.

    The static parts of records are left out: an engine belongs to its rank.
    """
    return str(spec.walk(["*"] * spec.num_leaves, _container_text))


def _container_text(kind: Any, static: Any, inside: tuple[str, ...]) -> str:
    keys = static if kind in (dict, OrderedDict) else static[1] if kind is defaultdict else ""
    return f"{kind.__qualname__}{keys}({', '.join(inside)})"


def _facts(leaf: Leaf, uneven: bool, graph: bool) -> tuple[str, bool]:
    """(what must be equal on all ranks about a leaf, whether it can travel as it is)."""
    if isinstance(leaf, torch.Tensor):
        if leaf.is_nested:
            return "nested tensor", False
        text, simple = _tensor_facts(leaf.dtype, leaf.shape, leaf.device, uneven, graph and leaf.requires_grad)
        if type(leaf) in PLAIN and leaf.layout is torch.strided:
            return text, simple and not leaf.is_neg()
        return f"{text} ({type(leaf).__qualname__}, {leaf.layout})", False
    for kind in (bool, int, float, complex):
        if isinstance(leaf, kind):
            return f"a Python {kind.__name__}", False
    return f"an object of type {type(leaf).__qualname__}", False


@functools.lru_cache(maxsize=4096)
def _tensor_facts(
    dtype: torch.dtype, shape: torch.Size, device: torch.device, uneven: bool, graph: bool
) -> tuple[str, bool]:
    sizes = [str(size) for size in shape]
    if uneven:
        sizes = ["*", *sizes[1:]]
    name = str(dtype).removeprefix("torch.")
    # a complex tensor may be a conjugate that is not computed yet; quantized ones have a dtype of their own
    simple = device.type != "meta" and not dtype.is_complex and not name.startswith("q")
    return f"{name}[{', '.join(sizes)}] on {device.type}{' requires_grad' if graph else ''}", simple


def description(call: str, parcel: Parcel, problem: Exception | None) -> dict[str, Any]:
    """What a rank tells the others when something differs; plain data."""
    return {
        "call": call,
        "structure": containers_text(parcel.spec),
        "leaves": list(zip(parcel.names(), parcel.texts, strict=True)),
        "problem": None if problem is None else str(problem),
    }


def disagreement(found: Mapping[int, Mapping[str, Any]], rank: int, *, same_tree: bool = True) -> str:
    """The message: which ranks differ, in what.

    Args:
        found: rank -> description.
        rank: the rank that reads it.
        same_tree: whether the trees matter.
    """
    law = "Every rank must make the same collective calls in the same order"
    calls = {member: what["call"] for member, what in found.items()}
    broken = {member: what["problem"] for member, what in found.items() if what["problem"]}
    lines: list[str] = []
    if len(set(calls.values())) > 1:
        lines.append(_by_value(calls))
    elif broken:
        lines += [f"{calls[member]} is impossible on rank {member}: {why}" for member, why in broken.items()]
    elif same_tree:
        law = f"{calls[rank]} needs a tree of the same structure, shapes, dtypes and kinds of device on every rank"
        lines += _differing_leaves(found) or [_by_value({m: what["structure"][:400] for m, what in found.items()})]
    return f"{law}, but (seen on rank {rank})\n  " + "\n  ".join(lines)


def _differing_leaves(found: Mapping[int, Mapping[str, Any]]) -> list[str]:
    of_rank = {member: dict(what["leaves"]) for member, what in found.items()}
    names = dict.fromkeys(name for leaves in of_rank.values() for name in leaves)
    lines: list[str] = []
    for name in names:
        texts = {member: leaves.get(name, "no such leaf") for member, leaves in of_rank.items()}
        if len(set(texts.values())) > 1:
            lines.append(f"leaf {name}: {_by_value(texts)}")
    return lines[:SHOWN] + ([f"and {len(lines) - SHOWN} further leaves"] if len(lines) > SHOWN else [])


def _by_value(values: Mapping[int, str]) -> str:
    ranks: dict[str, list[int]] = {}
    for rank, value in values.items():
        ranks.setdefault(value, []).append(rank)
    return "; ".join(f"{_rank_list(members)}: {value}" for value, members in ranks.items())


def _rank_list(ranks: Sequence[int]) -> str:
    shown = ", ".join(map(str, ranks[:SHOWN])) + (", ..." if len(ranks) > SHOWN else "")
    return f"rank{'s' if len(ranks) > 1 else ''} {shown}"


def attempt(prepare: Any, *args: Any) -> tuple[Any, FabricfnError | None]:
    """(`prepare(*args)`, None), or (None, the error): a rank that cannot go on must still tell the others."""
    try:
        return prepare(*args), None
    except FabricfnError as error:
        return None, error
