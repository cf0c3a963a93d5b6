"""Replicas that must be equal on all ranks: are they?"""

import zlib
from collections.abc import Callable
from typing import Any, cast

import torch

from fabricfn import flat
from fabricfn.collectives.agreement import agree, take_apart
from fabricfn.collectives.groups import device_for_words, members_of
from fabricfn.errors import MismatchError
from fabricfn.runs import flatten_models
from fabricfn.runtimes import Runtime
from fabricfn.sharding import is_sharded
from fabricfn.tracing import tracing
from fabricfn.tree import Tree
from fabricfn.watching import collective

EVERY = 100
"""Under debug=True every so many steps compare the parameters."""
WORDS = 1 << 18
"""So many words at a time are multiplied on an accelerator."""
SHOWN = 8


@collective("check_replicas", apart=True)
def check_replicas(rt: Runtime, tree: Tree) -> None:
    """Raise unless every rank holds the same values, bit for bit. Every rank must call it.

    Under ddp and functional each rank has a copy of the model and of the optimizer's state, and nothing ever compares
    them: a rank that changed its copy by hand, or read another batch of numbers into it, goes on with it. Under
    `init_runtime(debug=True)` the parameters are compared every 100 calls of `value_and_grad` by themselves.

    Args:
        rt: the runtime.
        tree: tensors, records, numbers and strings. Parts of sharded tensors differ by nature, and are not looked at.
            Buffers under `buffers="local"` differ too: pass `model.params` then.

    Returns:
        None, where all are equal. A digest a leaf goes around: 32 bits on CPU, 64 elsewhere.

    Raises:
        MismatchError: a leaf differs, or the trees do; the message names leaves and ranks. On every rank.

    Example:
        >>> import torch, fabricfn as ff
        >>> rt = ff.init_runtime(devices=1, accelerator="cpu")
        >>> ff.check_replicas(rt, {"w": torch.ones(3), "epoch": 2})
    """
    rt = rt.whole  # tensor-parallel peers, too, hold copies of what is not cut
    members = members_of(rt.world, None)
    parcel = take_apart(tree)
    agree(rt.world, members, "check_replicas()", parcel, None)
    if members.group is None or not parcel.leaves:
        return
    digests = torch.tensor([_digest(leaf) for leaf in parcel.leaves], dtype=torch.int64)
    rows = flat.all_gather([digests.to(device_for_words(rt.world, members.group))], members.group)[0]
    columns = cast("list[list[int]]", rows.T.tolist())
    differing = [place for place, column in enumerate(columns) if len(set(column)) > 1]
    if not differing:
        return
    names = parcel.names()
    lines = [f"\n  {names[place]}: {_sides(columns[place])}" for place in differing[:SHOWN]]
    more = f"\n  and {len(differing) - SHOWN} further leaves" if len(differing) > SHOWN else ""
    raise MismatchError(
        f"Replicas must be equal on every rank, but {len(differing)} of {len(columns)} leaves differ (seen on rank"
        f" {rt.rank}):{''.join(lines)}{more}\nWhat changed a copy on some ranks only? To go on with those of rank 0:"
        " ff.broadcast(rt, tree)."
    )


def now_and_then(rt: Runtime, grad_fn: Callable[..., Any]) -> Callable[..., Any]:
    """`grad_fn`, which under debug=True compares the parameters of the ranks in the first call and every 100."""
    watch = rt.world.watch
    if watch is None or not watch.debug:
        return grad_fn
    calls = 0

    def call(models: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        if calls % EVERY == 0 and not tracing():
            check_replicas(rt, [dict(model.params) for model in flatten_models(models)[0]])
        calls += 1
        return grad_fn(models, *args, **kwargs)

    return call


def _sides(column: list[int]) -> str:
    ranks: dict[int, list[int]] = {}
    for rank, digest in enumerate(column):
        ranks.setdefault(digest, []).append(rank)
    sides = sorted(ranks.values(), key=len, reverse=True)
    words = [f"rank{'s' * (len(side) > 1)} {', '.join(map(str, side[:SHOWN]))}" for side in sides[:SHOWN]]
    return " against ".join(words)


def _digest(leaf: Any) -> int:
    if not isinstance(leaf, torch.Tensor):
        return zlib.crc32(repr(leaf).encode("utf-8", "replace"))
    if is_sharded(leaf) or leaf.layout is not torch.strided or leaf.is_meta:
        return 0
    data = leaf.detach().resolve_conj().resolve_neg().contiguous().view(-1).view(torch.uint8)
    if data.device.type == "cpu":
        return zlib.crc32(cast(Any, data.numpy()))
    return _mixed(data)


def _mixed(data: torch.Tensor) -> int:
    """A sum of the words times different odd numbers, modulo 2**64: any single change, and any exchange, changes it."""
    words = torch.nn.functional.pad(data, (0, -data.numel() % 8)).view(torch.int64)
    odd = torch.arange(min(WORDS, words.numel()), device=data.device) * 2 + 1
    total = torch.zeros((), dtype=torch.int64, device=data.device)
    for place, part in enumerate(torch.split(words, WORDS)):
        total = total * 31 + (part * odd[: part.numel()]).sum() + place
    return int(total.item())
