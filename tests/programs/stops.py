"""A loop that leaves when it is told to: `stops.py FOLDER MODE`. MODE is ask, never, slow, launch or chained."""

import os
import signal
import sys
import time
from pathlib import Path

import fabricfn as ff

FOLDER, MODE = Path(sys.argv[1]), sys.argv[2]


def loop(rt):
    for step in range(10**9):
        if MODE != "never" and ff.should_stop(rt):
            break
        time.sleep(0.01)
        if step == 2:
            (FOLDER / f"pid-{rt.rank}").write_text(str(os.getpid()))
    if MODE == "slow":
        time.sleep(60)
    (FOLDER / f"left-{rt.rank}").write_text(str(step))
    ff.barrier(rt, "saved")


if __name__ == "__main__":
    (FOLDER / f"starter-{os.getpid()}").touch()
    options = {"accelerator": "cpu", "devices": 2, "timeout": 60, "grace": 1 if MODE == "slow" else 30}
    if MODE == "chained":
        signal.signal(signal.SIGTERM, lambda *_: (FOLDER / f"own-{os.getpid()}").touch())
    if MODE == "launch":
        ff.launch(loop, **options)
    else:
        rt = ff.init_runtime(**options)
        loop(rt)
        ff.shutdown(rt)
        kept = signal.getsignal(signal.SIGTERM)
        assert (kept is signal.SIG_DFL) == (MODE != "chained"), kept
