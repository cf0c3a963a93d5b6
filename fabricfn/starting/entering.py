"""The first steps of a rank of `launch`, before it imports anything of fabricfn's."""

import gc
from importlib import import_module
from typing import Any


def enter(spawned: bool, *args: Any) -> None:
    """Keep what is there, torch above all, out of the garbage collector's way; then `working.run_rank(*args)`.

    It lives as long as the process. One pass over torch's objects takes 80 ms, and copies their pages in a fork.
    """
    gc.freeze()
    if spawned:  # `parents.bound_spawn` has switched it off
        gc.enable()
    import_module("fabricfn.starting.working").run_rank(*args)
