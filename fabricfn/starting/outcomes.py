"""How the workers of a node ended, and how that is told."""

import dataclasses
import pickle
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path

from fabricfn.failures import Failure, ending, first_cause
from fabricfn.starting.parents import crash_file, marked


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How the workers of this node ended."""

    ranks: tuple[int, ...]
    """The global ranks of this node."""
    folder: Path
    """What the last attempt left behind."""
    failed_rank: int | None = None
    """The rank that failed first; None when all succeeded."""
    failure: Failure | None = None
    """Its exception, if it recorded one."""
    status: int = 0
    """Its exit status (negative: a signal); 0 when all succeeded."""
    stack: str = ""
    """Where it was when it crashed, if it could still say so; what another one says of it when it left."""

    @property
    def failed(self) -> bool:
        """Whether a rank of this node failed."""
        return self.failed_rank is not None or self.status != 0


def failures_in(folder: Path) -> list[Failure]:
    """What the ranks of this attempt recorded."""
    return [pickle.loads(path.read_bytes()) for path in folder.glob("rank-*.failure")]


def outcome_of(folder: Path, ranks: Sequence[int], ended: Mapping[int, int]) -> Outcome:
    """Which rank of a failed attempt was the first.

    Args:
        folder: what the attempt left behind.
        ranks: the global ranks of this node.
        ended: rank -> exit status of those that ended before the others were told to; 0 where that was too early.
    """
    failures = failures_in(folder)
    told = {failure.rank for failure in failures} | {
        rank for rank in ranks if (folder / f"rank-{rank}.result").exists()
    }
    silent = {rank: status for rank, status in ended.items() if rank not in told}
    deaths = {rank: status for rank, status in silent.items() if status} or silent
    # Python itself takes its time to end: a second of a busy machine
    leaving = {rank: 0 for rank in ranks if rank not in told and marked(folder, rank, "left")}
    rank, failure = first_cause(failures, deaths or leaving)
    status = (leaving | dict(ended)).get(-1 if rank is None else rank, 1)
    crash = crash_file(folder, -1 if rank is None else rank)
    stack = crash.read_text(errors="replace").rstrip() if status < 0 and crash.exists() else ""
    if rank is not None and failure is None and status == 0:  # what the others say of a rank that has left
        stack = "\n".join(one.text for one in sorted(failures, key=lambda one: one.time)[:1])
    return Outcome(
        ranks=tuple(sorted(ranks)), folder=folder, failed_rank=rank, failure=failure, status=status, stack=stack
    )


def story(outcome: Outcome) -> str:
    """What a failed attempt is to its user: the rank and the cause in the first line, then where it stood."""
    failure, rank = outcome.failure, outcome.failed_rank
    if failure is not None and failure.consequence:
        return f"fabricfn: rank {rank} has lost another rank, and none of this node says why: {failure.summary}"
    if failure is not None:
        return f"fabricfn: rank {rank} failed first: {failure.summary}\n{failure.text}"
    if rank is None:
        return "fabricfn: another node has ended the job, and says why"
    text = f"fabricfn: rank {rank} {how_it_ended(outcome)}"
    if outcome.status > 0:
        text += "; what it printed stands above"
    return f"{text}\n{outcome.stack}" if outcome.stack else text


def how_it_ended(outcome: Outcome) -> str:
    """The end of a rank that left no exception, in words."""
    if outcome.status == 0:
        return "left with status 0 while the others went on"
    hint = "; was the machine out of memory?" if outcome.status == -signal.SIGKILL else ""
    return ending(outcome.status) + hint
