"""All ranks go on, or none does: a piece of work on every rank whose failure on one rank is an error on all."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from fabricfn.errors import CheckpointError, FabricfnError
from fabricfn.world import World

T = TypeVar("T")


def together(world: World, what: str, work: Callable[[], tuple[T, Any]]) -> tuple[T, list[Any]]:
    """Run `work` on every rank and learn how it went on all of them. Collective.

    Args:
        world: the ranks.
        what: begins the message of an error, as "ff.save to /checkpoints/last".
        work: returns what this rank keeps, and plain data that every rank shall have.

    Returns:
        what this rank keeps, and every rank's data in the order of ranks.

    Raises:
        CheckpointError: it failed on some rank; the message names the ranks and their errors. With one rank, or when
            it failed on all, an error of this package is raised as it is. Or a rank ended, or did not call within
            the timeout of the group.
    """
    mine: Any = None
    data: Any = None
    failure: BaseException | None = None
    try:
        mine, data = work()
    except BaseException as error:
        failure = error
    if world.group is None:
        if failure is None:
            return mine, [data]
        if not isinstance(failure, OSError):
            raise failure
        raise CheckpointError(f"{what} failed: {failure}.") from failure
    answers: list[Any] = [None] * world.world_size
    said = None if failure is None else f"{type(failure).__name__}: {failure}"
    try:
        dist.all_gather_object(answers, (said, data), group=world.group)
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
    raise CheckpointError(
        f"{what} failed on {len(failed)} of {world.world_size} ranks, so no rank went on (this is rank {world.rank})."
        f" {details}"
    ) from failure


def _own(failure: BaseException, num_failed: int, world: World) -> bool:
    return num_failed == world.world_size and isinstance(failure, FabricfnError)


def _line(error: BaseException) -> str:
    """The first line of what a backend says, without where in its source."""
    return str(error).partition("\n")[0].rpartition("] ")[2][:300].rstrip(". ") + "."
