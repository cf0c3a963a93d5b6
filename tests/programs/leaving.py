"""Ranks whose interpreter ends while their group is warm, many times. Usage: leaving.py ranks times [kind].

One process imports torch and forks the ranks, which then end as any program does, by Python's own way out: so one time
takes tenths of a second and not several. The exit status is the number of ranks whose status was not 0.
"""

import os
import shutil
import sys
import tempfile

import torch

import fabricfn as ff
import fabricfn.starting.joining
from fabricfn.environments import Topology


def collective(rt):
    for _ in range(50):
        ff.all_reduce(rt, torch.ones(4))


def step(rt):
    model = ff.setup_model(rt, torch.nn.Linear(8, 8))
    opt = ff.setup_optimizer(rt, model, torch.optim.SGD, lr=0.1)
    grad_fn = ff.value_and_grad(rt, lambda net, x: net(x).sum())
    for _ in range(5):
        _, grads = grad_fn(model, torch.ones(2, 8))
        model, opt = ff.optimizer_step(rt, model, opt, grads)


def saving(rt):
    ff.save(rt, f"{mine.folder}/checkpoint", {"x": torch.ones(1000), "y": torch.ones(9)}, blocking=False)


def gathering(rt):
    ff.all_gather_object(rt, [rt.rank])


KINDS = {"collective": collective, "saving": saving, "gathering": gathering, "step": step}


def forked(size, times, kinds):
    """Returns in each rank, with its place and what it does; the parent ends here."""
    broken, folder = 0, tempfile.mkdtemp()
    for time in range(times):
        pids = []
        for rank in range(size):
            if (pid := os.fork()) == 0:
                mine = Topology(name="forked", rank=rank, world_size=size, num_nodes=1, folder=f"{folder}/{time}")
                return mine, kinds[time % len(kinds)]
            pids.append(pid)
        broken += sum(os.waitpid(pid, 0)[1] != 0 for pid in pids)
    shutil.rmtree(folder)
    sys.exit(min(broken, 100))


size, times, *chosen = sys.argv[1:]
mine, kind = forked(int(size), int(times), chosen or list(KINDS))
torch.set_num_threads(1)
os.makedirs(mine.folder, exist_ok=True)
rt = ff.init_runtime(environment=mine, accelerator="cpu", timeout=60)
KINDS[kind](rt)
