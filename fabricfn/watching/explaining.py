"""Why a collective call of this rank failed: which rank is behind it, and where that one is."""

import os
import time

from fabricfn.errors import FabricfnError, HangError, LeftError, MismatchError, PeerError
from fabricfn.failures import is_consequence
from fabricfn.watching.board import FAILED, LEFT, LOST, Place
from fabricfn.watching.stacks import stack_of, standing
from fabricfn.watching.watch import Watch

PATIENCE = 1.0
"""Seconds to wait, after the connection to a rank is lost, for that rank to say why."""
ASKED = 8
"""So many ranks at most are asked where they stand."""


def explained(watch: Watch, error: Exception) -> Exception:
    """The error that names the rank which this one waited for in vain; `error` itself where it is not about that.

    Args:
        watch: this rank's, inside the call that failed.
        error: what the back end raised.
    """
    if isinstance(error, MismatchError | PeerError) or not is_consequence(error):
        return error
    late = "timed out" in str(error).lower()
    deadline = time.monotonic() + PATIENCE
    while (found := cause(watch)) is None and not late and time.monotonic() < deadline:
        time.sleep(0.02)
    if found is None:
        found = hang(watch) if late else lost(watch)
    if isinstance(error, FabricfnError):  # a save that failed: it stays one
        error.add_note(str(found))
        return error
    found.add_note(f"The back end's own words: {str(error).strip()}")
    return found


def cause(watch: Watch) -> FabricfnError | None:
    """What is on the board: a call that differs, a rank that failed, died or left."""
    problem = next((found for base in watch.others if (found := watch.disagreement(base)) is not None), None)
    if problem is not None:
        return MismatchError(problem)
    mine, places = watch.mine(), sorted(watch.places(), key=lambda place: place.since)
    for place in places:
        if place.state == FAILED:
            return PeerError(f"{_waited(mine)} rank {place.rank}, which failed: {place.words}")
    for place in places:
        if place.state < LEFT and place.ended:
            return PeerError(
                f"{_waited(mine)} rank {place.rank}, whose process {place.pid} has ended without a word (killed, out of"
                f" memory, a crash). {_told(place)}"
            )
    for place in places:
        if place.state == LEFT and place.calls < mine.calls:
            return LeftError(
                f"Every rank must make the same collective calls in the same order, but {_waited(mine)} rank"
                f" {place.rank}, which has left. {_told(place)} Loaders of ff.setup_dataloader have the same number of"
                " steps on every rank; a call under `if rt.rank == 0:` is not made on the others."
            )
    return None


def lost(watch: Watch) -> PeerError:
    """For a connection that broke although every rank of this node is there."""
    mine = watch.mine()
    told = [f"rank {p.rank} lost another one: {p.words}" for p in watch.places() if p.state == LOST]
    return PeerError(
        f"{_waited(mine)} another rank, whose connection is lost. {' '.join(told[:1]) or _nobody(watch, 'has ended')}"
    )


def hang(watch: Watch) -> HangError:
    """For a rank that does not come; the message says which, and the line where it stands."""
    mine, places = watch.mine(), watch.places()
    behind = [place for place in places if place.calls < mine.calls and not place.ended]
    stacks = {place.rank: standing(stack_of(place)) for place in (behind or places)[:ASKED]}
    # in the same call: those are late whose innermost line is not the waiting itself
    late = behind or [place for place in places if stacks.get(place.rank, ("", False))[1]]
    names = f"rank{'s' * (len(late) > 1)} {', '.join(str(place.rank) for place in late[:ASKED])}" if late else "a rank"
    lines = [f"{names} stopped answering: {_waited(mine)} {'it' if len(late) == 1 else 'them'}."]
    for place in (late or places)[:ASKED]:
        shown = stacks.get(place.rank, ("", False))[0]
        lines.append(f"  {_told(place)} It stands at\n{shown}" if shown else f"  {_told(place)}")
    if not late:
        lines.append(f"  {_nobody(watch, 'is late')}")
    lines.append(f"  Where it only needs longer: init_runtime(timeout=...), now {watch.limit:g} s.")
    return HangError("\n".join(lines))


def _waited(mine: Place) -> str:
    seconds = (time.monotonic_ns() - mine.since) / 1e9
    return f"rank {mine.rank} has waited {seconds:.1f} s in {mine.call} (call {mine.calls}) for"


def _told(place: Place) -> str:
    seconds = (time.monotonic_ns() - place.since) / 1e9
    if not place.calls:
        return f"Rank {place.rank} has made no collective call yet."
    last = f"the last one {place.call}, {seconds:.1f} s ago"
    return f"Rank {place.rank} has made {place.calls} collective call{'s' * (place.calls > 1)}, {last}."


def _nobody(watch: Watch, what: str) -> str:
    seen = len(watch.places()) + 1
    if seen < watch.world_size:
        return f"No rank of this machine {what}; the other {watch.world_size - seen} cannot be seen from here."
    return f"No rank {what} as far as can be seen from here (process {os.getpid()})."
