"""Made tests/golden/v1: a checkpoint of format version 1 with every kind of leaf, by two ranks.

    python tests/golden/make_v1.py

It is never made again: what it wrote in 2026 must load for ever, and a later format gets a folder of its own. What must
come out is said by formulas that use nothing of fabricfn; tests/test_golden.py compares.
"""

import collections
import dataclasses
from pathlib import Path

import numpy as np
import torch
from torch import nn

FOLDER = Path(__file__).parent / "v1"
DTYPES = (
    *("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint64", "uint32", "uint16"),
    *("uint8", "bool", "float8_e4m3fn", "float8_e5m2", "complex128", "complex64", "complex32", "float8_e4m3fnuz"),
    *("float8_e5m2fnuz", "float8_e8m0fnu", "float4_e2m1fn_x2"),
)
Pair = collections.namedtuple("Pair", "first second")


@dataclasses.dataclass(frozen=True)
class Own:
    weights: torch.Tensor
    note: str


def patterned(dtype, shape, start=0):
    """Bytes 11, 48, 85, ... modulo 251, seen as this dtype; bools alternate."""
    kind = getattr(torch, dtype)
    count = torch.Size(shape).numel() * kind.itemsize
    row = [(11 + 37 * (start + i)) % (2 if dtype == "bool" else 251) for i in range(count)]
    return torch.tensor(row, dtype=torch.uint8).view(kind).reshape(shape)


def counted(*shape):
    return torch.arange(float(torch.Size(shape).numel())).reshape(shape) / 4


class Net(nn.Module):
    """Parameters and a buffer by a formula."""

    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(3, 2)
        self.register_buffer("seen", torch.tensor(9))
        with torch.no_grad():
            self.lin.weight.copy_(counted(2, 3))
            self.lin.bias.copy_(-counted(2))


PLAIN = {
    "int": 3, "negative": -(1 << 40), "large": 1 << 2000, "huge": 1 << 20_000, "true": True, "none": None,
    "floats": [0.1, -0.0, float("inf"), float("-inf"), 5e-324], "nan": float("nan"), "complex": 1.5 - 2j,
    "text": "naïve \N{SNOWMAN} \n\"'\\", "bytes": bytes(range(256)), "empty": {}, "nothing": [], "void": (),
    "nested": [(1, {"a": [2.5, ("b",)]})],
}  # fmt: skip
KEYED = {0: "zero", -5: "minus", "": "empty", "a/b": "slash", "ü": "umlaut"}


def plain_part():
    """What needs nothing of fabricfn: the values by kind."""
    shared = counted(4)
    return {
        "dtypes": {name: patterned(name, (2, 3)) for name in DTYPES},
        "shapes": {"scalar": torch.tensor(2.5), "empty": torch.empty(0, 3), "long": counted(2, 1, 3, 1, 2)},
        "alias": {"one": shared, "two": [shared]},
        "numpy": {"array": np.arange(6, dtype=np.int16).reshape(2, 3), "number": np.float32(1.25)},
        "plain": PLAIN,
        "keyed": KEYED,
        "own": Own(weights=counted(3), note="own"),
        "pair": Pair(first=torch.tensor([1, 2]), second=3),
    }


def records(rt):
    """Model, Grads, Optimizer after one step that leaves the parameters as they are, Cursor, Key."""
    import fabricfn as ff

    model = ff.setup_model(rt, Net())
    opt = ff.setup_optimizer(rt, model, torch.optim.AdamW, lr=0.0, betas=(0.5, 0.5), groups={"*bias": {"eps": 1e-3}})
    loss_fn = lambda net, x: net.lin(x).sum()  # noqa: E731
    grads = ff.value_and_grad(rt, loss_fn)(model, torch.tensor([[1.0, 2.0, 4.0]]))[1]
    model, opt = ff.optimizer_step(rt, model, opt, grads)
    cursor, key = ff.Cursor(seed=3, epoch=4, index=5), ff.fold_in(ff.key(7), 11)
    scaled = dataclasses.replace(model, loss_scale=ff.LossScale(scale=1024.0, good_steps=3))
    return {"model": model, "scaled": scaled, "grads": grads, "opt": opt, "cursor": cursor, "key": key}


def make(rt, path):
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    import fabricfn as ff

    mesh = DeviceMesh.from_group(rt.world.group, "cpu")
    whole = counted(5, 3)
    kinds = {"rows": Shard(0), "columns": Shard(1), "copy": Replicate()}
    cut = {name: distribute_tensor(whole, mesh, [kind], src_data_rank=None) for name, kind in kinds.items()}
    ff.save(rt, path, {**plain_part(), "records": records(rt), "sharded": cut})


if __name__ == "__main__":
    from fabricfn.testing import threads

    with threads(2) as world:
        world.run(make, FOLDER, strategy="ddp")
