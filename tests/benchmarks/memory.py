"""Peak memory of setting a model up and of training it, each way of writing it in a process of its own (Linux)."""

import json
import subprocess
import sys
from importlib.util import find_spec

PARAMETERS = 8 * (2048 * 2048 + 2048) * 4
"""Bytes."""

# What every program begins and ends with: a net of 128 MiB and one row of data; the peak above what was there before.
COMMON = """
import gc, json, torch
from torch import nn

def kib(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name))

def peak(fn):
    gc.collect()
    open("/proc/self/clear_refs", "w").write("5")  # the peak is that of now
    before = kib("VmRSS")
    return fn(), (kib("VmHWM") - before) * 1024

def build():
    return nn.Sequential(*(nn.Linear(2048, 2048) for _ in range(8)))

def loss_fn(net, x):
    return net(x).square().mean()

x = torch.ones(1, 2048)
loss_fn(nn.Linear(2048, 1), x).backward()
{program}
net, first = peak(set_up)
print(json.dumps([first, first + peak(lambda: train(net))[1]]))
"""

PROGRAMS = {
    "by hand": """
set_up = build

def train(net):
    optimizer = torch.optim.AdamW(net.parameters(), fused={fused})
    for _ in range(3):
        optimizer.zero_grad()
        loss_fn(net, x).backward()
        optimizer.step()
""",
    "fabricfn": """
import fabricfn as ff
rt = ff.init_runtime(accelerator="cpu", devices=1)
ff.setup_model, ff.setup_optimizer, ff.value_and_grad, ff.optimizer_step

def set_up():
    return [ff.setup_model(rt, build(), donate={donate})]

def train(state):
    state.append(ff.setup_optimizer(rt, state[0], torch.optim.AdamW, lr=1e-3))
    grad_fn = ff.value_and_grad(rt, loss_fn)
    for _ in range(3):
        grads = grad_fn(state[0], x)[1]
        state[:] = ff.optimizer_step(rt, *state, grads, donate={donate})
        del grads
""",
    "Lightning Fabric": """
from lightning_fabric import Fabric
fabric = Fabric(accelerator="cpu", devices=1)

def set_up():
    return fabric.setup_module(build())

def train(net):
    optimizer = fabric.setup_optimizers(torch.optim.AdamW(net.parameters()))
    for _ in range(3):
        optimizer.zero_grad()
        fabric.backward(loss_fn(net, x))
        optimizer.step()
""",
}


def measure(rounds: int) -> dict[str, dict[str, float]]:
    """Bytes, for "model" and for "three steps", by contender; "parameters" is the size of the net."""
    programs = {
        "by hand": PROGRAMS["by hand"].format(fused=None),
        "by hand, fused": PROGRAMS["by hand"].format(fused=True),
        "fabricfn, donated": PROGRAMS["fabricfn"].format(donate=True),
        "fabricfn, pure": PROGRAMS["fabricfn"].format(donate=False),
    }
    if find_spec("lightning_fabric"):
        programs["Lightning Fabric"] = PROGRAMS["Lightning Fabric"]
    found: dict[str, dict[str, float]] = {part: {"parameters": PARAMETERS} for part in ("model", "three steps")}
    for name, program in programs.items():
        command = [sys.executable, "-c", COMMON.replace("{program}", program)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        for part, peak in zip(found, json.loads(done.stdout.splitlines()[-1]), strict=True):
            found[part][name] = peak
    return found
