"""`send` and `recv`: a tree from one rank to another."""

import json
from typing import cast

import torch

from fabricfn import flat
from fabricfn.collectives.agreement import Agreement, Parcel, attempt, description, disagreement, take_apart, words
from fabricfn.collectives.groups import Members, device_for_words, members_of
from fabricfn.collectives.messages import recv_bytes, send_bytes
from fabricfn.collectives.parcels import movable, rebuild, travel
from fabricfn.errors import ConfigurationError, MismatchError
from fabricfn.runtimes import Runtime
from fabricfn.tree import Tree


def send(rt: Runtime, tree: Tree, dst: int) -> None:
    """Send a tree to rank `dst`, which must call `recv(rt, like, src)` with a tree that is alike.

    It returns when the other rank has taken it: two ranks that both send first get an error, and in a ring of more
    than two, where everybody sends first, all wait for each other. There, use `all_to_all`.

    Not collective: the two ranks alone call it.

    Args:
        rt: the runtime.
        tree: dense tensors of any dtype, and numbers.
        dst: another rank.

    Raises:
        ConfigurationError: there is no such other rank, or a leaf cannot be sent.
        MismatchError: the trees differ, or both ranks send; on both ranks.

    Example:
        >>> import torch, fabricfn as ff
        >>> def pass_on(rt):  # on every rank of two
        ...     if rt.rank == 0:
        ...         return ff.send(rt, {"x": torch.tensor([1, 2])}, dst=1)
        ...     return ff.recv(rt, {"x": torch.tensor([0, 0])}, src=0)
        >>> ff.testing.run(pass_on, world_size=2)
        [None, {'x': tensor([1, 2])}]
    """
    members, parcel, tensors, agreement = _meet(rt, tree, rt.rank, dst)
    assert members.group is not None
    group = members.group

    def run(sent: list[torch.Tensor]) -> list[torch.Tensor]:
        flat.send(sent, dst, group)
        return sent

    travel(parcel, tensors, agreement, rt.world, members, run)


def recv(rt: Runtime, like: Tree, src: int) -> Tree:
    """Receive the tree that rank `src` sends. Not collective: the two ranks alone call it.

    Args:
        rt: the runtime.
        like: a tree of the same structure, shapes, dtypes and devices; its values are not used, and not changed.
        src: another rank, which calls `send(rt, tree, dst)`.

    Returns:
        A new tree, on the devices of `like`.

    Raises:
        ConfigurationError: there is no such other rank, or a leaf cannot be received.
        MismatchError: the trees differ, or both ranks receive; on both ranks.

    Example:
        >>> import fabricfn as ff
        >>> def swap(rt):  # one of two ranks sends first, the other one receives first
        ...     if rt.rank == 0:
        ...         ff.send(rt, 10, dst=1)
        ...         return ff.recv(rt, 0, src=1)
        ...     received = ff.recv(rt, 0, src=0)
        ...     ff.send(rt, 11, dst=0)
        ...     return received
        >>> ff.testing.run(swap, world_size=2)
        [11, 10]
    """
    members, parcel, tensors, agreement = _meet(rt, like, src, rt.rank)
    assert members.group is not None
    group = members.group

    def run(like: list[torch.Tensor]) -> list[torch.Tensor]:
        return flat.recv(like, src, group)

    return rebuild(parcel, travel(parcel, tensors, agreement, rt.world, members, run))


def _meet(rt: Runtime, tree: Tree, src: int, dst: int) -> tuple[Members, Parcel, list[torch.Tensor], Agreement]:
    """What `agree` does, between two ranks; the lower one speaks first, so that nobody waits for a listener."""
    members = members_of(rt.world, None)
    peer = dst if rt.rank == src else src
    if members.group is None or peer == rt.rank or not 0 <= peer < rt.world_size:
        raise ConfigurationError(
            f"send and recv are for two different ranks of 0 to {rt.world_size - 1}; here rank {src} sends to {dst}."
        )
    call = f"send from rank {src} to rank {dst}, recv there"
    parcel = take_apart(tree)
    tensors, problem = attempt(movable, parcel, rt.world, members, "send" if rt.rank == src else "recv")
    device, group = device_for_words(rt.world, members.group), members.group
    mine = words(call, parcel, problem)
    sent = torch.tensor(mine, device=device)
    first = rt.rank < peer
    if first:
        flat.send([sent], peer, group)
    theirs = cast("list[int]", flat.recv([sent], peer, group)[0].tolist())
    if not first:
        flat.send([sent], peer, group)
    if theirs[:2] != mine[:2] or theirs[3] or problem is not None:
        data = json.dumps(description(call, parcel, problem)).encode()
        if first:
            send_bytes(data, peer, group, device)
        answer = recv_bytes(peer, group, device)
        if not first:
            send_bytes(data, peer, group, device)
        if problem is not None:
            raise problem
        found = {rt.rank: json.loads(data), peer: json.loads(answer)}
        raise MismatchError(disagreement(dict(sorted(found.items())), rt.rank))
    return members, parcel, tensors, Agreement(same_tree=True, same_aliases=theirs[2] == mine[2])
