"""Made tests/golden/fabric by lightning-fabric 2.6.6 and torch 2.13. In the root of the repository:

    python tests/golden/make_fabric.py full
    python tests/golden/make_fabric.py sharded

The test suite has no lightning-fabric (the extra `bench` has); it reads these files. The numbers follow from formulas:
a learning rate of 0 leaves the parameters as they are, and halves as betas keep the moments exact.
"""

import sys
from pathlib import Path

import torch
from lightning_fabric import Fabric
from lightning_fabric.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import distribute_tensor

FOLDER = Path("tests/golden/fabric")  # relative: the metadata have it in them


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(4, 3)
        self.register_buffer("seen", torch.zeros(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lin(x).sum()


def net() -> Net:
    made = Net()
    with torch.no_grad():
        made.lin.weight.copy_(torch.arange(12.0).reshape(3, 4) / 8)
        made.lin.bias.copy_(torch.arange(3.0) - 1)
        made.seen.copy_(torch.tensor([5.0, 6.0]))
    return made


def run(fabric: Fabric, path: Path) -> None:
    model = fabric.setup_module(net())
    with torch.no_grad():  # a strategy that shards may have made the parameters anew
        for name, value in net().state_dict().items():
            target = model.module.get_parameter(name) if name != "seen" else model.module.get_buffer(name)
            if hasattr(target, "_local_tensor"):
                value = distribute_tensor(value, target.device_mesh, target.placements)
            target.copy_(value)
    optimizer = fabric.setup_optimizers(torch.optim.AdamW(model.parameters(), lr=0.0, betas=(0.5, 0.5)))
    fabric.backward(model(torch.tensor([1.0, 2.0, 3.0, 4.0])))
    optimizer.step()
    fabric.save(path, {"model": model, "optimizer": optimizer, "epoch": 7, "note": {"rates": [0.5, 0.25]}})


def sharded(model: nn.Module, mesh: torch.distributed.DeviceMesh) -> nn.Module:
    return fully_shard(model, mesh=mesh["data_parallel"])


if __name__ == "__main__":
    torch.manual_seed(0)
    FOLDER.mkdir(exist_ok=True)
    if sys.argv[1:] == ["full"]:
        run(Fabric(accelerator="cpu", devices=1), FOLDER / "full.ckpt")
    elif sys.argv[1:] == ["sharded"]:
        fabric = Fabric(accelerator="cpu", devices=2, strategy=ModelParallelStrategy(sharded, 2, 1))
        fabric.launch()
        run(fabric, FOLDER / "sharded")
    else:
        sys.exit("python tests/golden/make_fabric.py full, or sharded (two processes)")
