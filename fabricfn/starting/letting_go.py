"""Waiting until gloo's threads have let go of the last collective's tensors.

They do so after its caller has gone on, and need the GIL. A thread that asks for it while Python ends aborts the
process: "terminate called without an active exception" (pytorch issue 190489). The group itself lives on, since records
hold it, so its threads are not joined. A collective in flight cannot be told from none: fabricfn waits for all of its
own, and whoever calls torch's with `async_op=True` waits for those.
"""

import contextlib
import time
from pathlib import Path

TASKS = Path("/proc/self/task")
NAME = "pt_gloo_runloop"
"""What torch calls these threads."""
INTERVAL = 0.005
"""Seconds without the GIL between two looks."""
AT_MOST = 2.0
"""Seconds to wait on a machine that has no processor for them."""
UNSEEN = 0.05
"""Seconds to wait where threads cannot be looked at."""


def await_gloo() -> None:
    """Wait until no thread of gloo has anything to do.

    A thread that waits for the GIL wakes up when this one sleeps; so one that slept all through such an interval,
    without being switched to, waits for work.
    """
    if not TASKS.exists():
        time.sleep(UNSEEN)
        return
    deadline = time.monotonic() + AT_MOST
    before = _switches()
    while time.monotonic() < deadline:
        time.sleep(INTERVAL)
        now = _switches()
        if now is not None and now == before:
            return
        before = now


def _switches() -> dict[str, str] | None:
    """How often each thread of gloo was switched to; None when one is running or ready."""
    found: dict[str, str] = {}
    for task in TASKS.iterdir():
        with contextlib.suppress(OSError):  # the thread has ended
            if (task / "comm").read_text().strip() != NAME:
                continue
            fields = dict(line.split(":\t", 1) for line in (task / "status").read_text().splitlines() if ":\t" in line)
            if not fields["State"].startswith("S"):
                return None
            found[task.name] = fields["voluntary_ctxt_switches"] + fields["nonvoluntary_ctxt_switches"]
    return found
