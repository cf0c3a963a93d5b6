"""All ranks go on, or none does: a piece of work on every rank whose failure on one rank is an error on all."""

import json
import pickle
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from fabricfn.collectives.groups import device_for_words
from fabricfn.errors import CheckpointError, FabricfnError
from fabricfn.world import World

T = TypeVar("T")

HEAD = 2048
"""Bytes that travel at once; a message that is longer needs a second collective."""
ROOM = HEAD - 8


def together(
    world: World, what: str, work: Callable[[], tuple[T, Any]], *, objects: bool = False
) -> tuple[T, list[Any]]:
    """Run `work` on every rank and learn how it went on all of them. Collective.

    Args:
        world: the ranks.
        what: begins the message of an error, as "ff.save to /checkpoints/last".
        work: returns what this rank keeps, and data that every rank shall have: what JSON knows.
        objects: the data are objects of the user's, which travel pickled between this job's own ranks.

    Returns:
        what this rank keeps, and every rank's data in the order of ranks, as JSON gives them back: tuples are lists.

    Raises:
        CheckpointError: it failed on some rank; the message names the ranks and their errors. With one rank, or when
            it failed on all, an error of this package is raised as it is. Or a rank ended, or did not call within
            the timeout of the group.
    """
    mine: Any = None
    answer = b""
    failure: BaseException | None = None
    try:
        mine, data = work()
        answer = b"[null,null]\n" + pickle.dumps(data) if objects else json.dumps([None, data]).encode()
    except BaseException as error:
        failure = error
        answer = json.dumps([f"{type(error).__name__}: {error}", None]).encode()
    if world.group is None:
        if failure is None:
            return mine, [_read(answer)[1]]
        if not isinstance(failure, OSError):
            raise failure
        raise CheckpointError(f"{what} failed: {failure}.") from failure
    try:
        answers = [_read(text) for text in _gathered(world, world.group, answer)]
    except RuntimeError as lost:
        if isinstance(lost, FabricfnError):
            raise
        if failure is not None and not isinstance(failure, Exception):
            raise failure from lost
        raise CheckpointError(
            f"{what} failed: the ranks lost each other (this is rank {world.rank}): {_line(lost)} Either another rank"
            " ended, or not every rank made this call: every rank must, not rank 0 alone (no `if rt.rank == 0:`)."
        ) from (lost if failure is None else failure)
    failed = {rank: said for rank, (said, _) in enumerate(answers) if said is not None}
    if not failed:
        return mine, [data for _, data in answers]
    if failure is not None and (not isinstance(failure, Exception) or _own(failure, len(failed), world)):
        raise failure
    details = "; ".join(f"rank {rank}: {said}" for rank, said in list(failed.items())[:4])
    error = CheckpointError(
        f"{what} failed on {len(failed)} of {world.world_size} ranks, so no rank went on (this is rank {world.rank})."
        f" {details}"
    )
    error.elsewhere = failure is None
    raise error from failure


def _read(answer: bytes) -> tuple[str | None, Any]:
    """(what went wrong, data)."""
    text, _, pickled = answer.partition(b"\n")
    said, data = json.loads(text)
    return said, pickle.loads(pickled) if pickled else data


def _gathered(world: World, group: dist.ProcessGroup, message: bytes) -> list[bytes]:
    """Every rank's message, in the order of ranks."""
    heads = _rows(world, group, len(message).to_bytes(8, "little") + message[:ROOM], HEAD)
    lengths = [int.from_bytes(head[:8], "little") for head in heads]
    found = [head[8:] for head in heads]
    if max(lengths) > ROOM:
        rest = _rows(world, group, message[ROOM:], max(lengths) - ROOM)
        found = [head + tail for head, tail in zip(found, rest, strict=True)]
    return [row[:length] for row, length in zip(found, lengths, strict=True)]


def _rows(world: World, group: dist.ProcessGroup, data: bytes, width: int) -> list[bytes]:
    device = device_for_words(world, group)
    mine = torch.frombuffer(bytearray(data.ljust(width, b"\0")), dtype=torch.uint8).to(device)
    rows = [torch.empty_like(mine) for _ in range(world.world_size)]
    dist.all_gather(rows, mine, group=group)
    return [row.cpu().numpy().tobytes() for row in rows]


def _own(failure: BaseException, num_failed: int, world: World) -> bool:
    return num_failed == world.world_size and isinstance(failure, FabricfnError)


def _line(error: BaseException) -> str:
    """The first line of what a backend says, without where in its source."""
    return str(error).partition("\n")[0].rpartition("] ")[2][:300].rstrip(". ") + "."
