"""Run a program, and kill all its processes in the middle of a step. Usage: killed.py STEP program [words ...].

The program runs as it stands, until it has taken so many steps and has the gradients of the next; then comes SIGKILL.
"""

import os
import runpy
import signal
import sys

import fabricfn as ff


def main(last, program, *words):
    first = int(os.environ.setdefault("FIRST_PROCESS", str(os.getpid())))
    optimizer_step = ff.optimizer_step

    def step_or_die(rt, model, opt, *args, **kwargs):
        if opt.step == int(last) and rt.rank == 0:
            os.kill(first, signal.SIGKILL)  # takes the other ranks with it
            os.kill(os.getpid(), signal.SIGKILL)
        return optimizer_step(rt, model, opt, *args, **kwargs)

    ff.optimizer_step = step_or_die
    sys.argv = [program, *words]
    runpy.run_path(program, run_name="__main__")


if __name__ == "__main__":
    main(*sys.argv[1:])
