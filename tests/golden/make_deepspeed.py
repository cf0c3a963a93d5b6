"""Made tests/golden/deepspeed by deepspeed 0.19.8 and torch 2.13, two ranks. In the root of the repository:

    python tests/golden/make_deepspeed.py

The ordinary test suite reads these files without deepspeed. The numbers follow from formulas: the gradient of every
parameter is `ramp` of its shape, a learning rate of 0 leaves values as they are, one of 1/1024 moves them exactly.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

FOLDER = Path(__file__).parent / "deepspeed"
STEP = 2**-10


def ramp(shape):
    return (torch.arange(torch.Size(shape).numel(), dtype=torch.float32) - 3).reshape(shape) / 4


class Part(nn.Module):
    """Its forward makes `ramp` the gradient of its parameters."""

    def __init__(self, *shapes):
        super().__init__()
        self.values = nn.ParameterList(nn.Parameter(ramp(shape) + 1) for shape in shapes)

    def forward(self, x):
        return sum((value * ramp(value.shape).to(value)).sum() for value in self.values) * x.sum()


class Net(nn.Module):
    """Odd sizes, a tied weight, a frozen one, buffers."""

    def __init__(self):
        super().__init__()
        self.one, self.two = Part((5, 3), (7,)), Part((2, 2, 3), (1,))
        self.three = Part((4,))
        self.three.twin = self.three.values[0]
        self.fixed = nn.Parameter(ramp((5,)), requires_grad=False)
        self.register_buffer("seen", torch.tensor([3, 5]))
        self.register_buffer("mean", torch.tensor([0.5, 0.25]))

    def forward(self, x):
        return self.one(x) + self.two(x) + self.three(x)


def groups(net):
    """Two groups of hyperparameters, in another order than the parameters'."""
    named = [(name, value) for name, value in net.named_parameters() if value.requires_grad]
    return [
        {"params": [value for name, value in named if "two" in name], "weight_decay": 0.0},
        {"params": [value for name, value in named if "two" not in name], "weight_decay": 0.5},
    ]


def optimizer(net, bf16):
    if bf16:
        return torch.optim.SGD(groups(net), lr=STEP, momentum=0.5, dampening=0.0)
    return torch.optim.AdamW(groups(net), lr=0.0, betas=(0.5, 0.25))


def run(rank, stage, bf16, name):
    import deepspeed

    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    dist.init_process_group("gloo", init_method=f"file://{FOLDER}/rendezvous", rank=rank, world_size=2)
    net = Net()
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0, "sub_group_size": 8},
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 0.0,
        "bf16": {"enabled": bf16},
    }
    if bf16:
        del config["zero_optimization"]["sub_group_size"]
    engine, *_ = deepspeed.initialize(
        model=net, optimizer=optimizer(net, bf16), config=config, dist_init_required=False
    )
    engine.backward(engine(torch.ones(1)))
    engine.step()
    engine.save_checkpoint(str(FOLDER), tag=name, client_state={"epoch": 7, "best": [0.5, "x"]})
    dist.destroy_process_group()


def main():
    os.environ["DS_ACCELERATOR"] = "cpu"
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir()
    runs = {"stage0": (0, False), "stage1": (1, False), "stage2_bf16": (2, True), "stage3": (3, False)}
    for name, (stage, bf16) in runs.items():
        mp.spawn(run, (stage, bf16, name), nprocs=2)
        (FOLDER / "rendezvous").unlink(missing_ok=True)
    for name in ("stage1", "stage3"):
        convert = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
        there = f"{FOLDER}/{name}"
        subprocess.run([*convert, "--input_folder", there, "--output_folder", f"{there}_universal"], check=True)
    for script in (*FOLDER.rglob("*.py"), *FOLDER.glob("latest*")):
        script.unlink()


if __name__ == "__main__":
    main()
