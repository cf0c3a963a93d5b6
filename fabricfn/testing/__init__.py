"""Property-test your own training loop: worlds of ranks, the laws that every loop should obey, and cases.

* worlds: `threads(n)`, `processes(n)`, `world(kind, n)`, with a method `run(fn, *args)`; `run(fn)` opens one for a call
* laws: `check(train)` and one `check_...` function a law; `training_loop(module, loss_fn, data)` makes a `train`
* cases: `fabricfn.testing.cases` has generators for hypothesis (the extra "testing")
"""

from fabricfn.testing.bench import Settings as Settings
from fabricfn.testing.checking import LAWS as LAWS, check as check
from fabricfn.testing.comparing import Difference as Difference, difference as difference
from fabricfn.testing.laws import (
    check_accumulation as check_accumulation,
    check_checkpoint as check_checkpoint,
    check_donation as check_donation,
    check_equivalence as check_equivalence,
    check_purity as check_purity,
    check_resume as check_resume,
)
from fabricfn.testing.loops import training_loop as training_loop
from fabricfn.testing.process_worlds import processes as processes
from fabricfn.testing.ranks import Ranks as Ranks
from fabricfn.testing.thread_worlds import threads as threads
from fabricfn.testing.tree_laws import check_collectives as check_collectives, check_data as check_data
from fabricfn.testing.worlds import run as run, world as world
