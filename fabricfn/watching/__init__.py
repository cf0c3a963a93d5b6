"""Who waits for whom: ranks that disagree, leave, fail or stop answering are named, with the call and the line."""

from fabricfn.watching.board import shared_memory as shared_memory
from fabricfn.watching.calling import collective as collective, counted as counted, watch_of as watch_of
from fabricfn.watching.checked_group import CheckedGroup as CheckedGroup, check_everything as check_everything
from fabricfn.watching.guarding import guard as guard
from fabricfn.watching.watch import Watch as Watch
