"""What the tests of sharded checkpoints share: how a tensor lies in a world, saving and loading it so, and its bits."""

import dataclasses

import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

import fabricfn as ff


def bits(tensor):
    """The bits of a plain tensor."""
    row = tensor.detach().contiguous().as_strided((tensor.numel(),), (1,))
    return tensor.dtype, tuple(tensor.shape), row.view(torch.uint8).tolist()


def filled(dtype, shape, seed=0):
    empty = torch.empty(shape, dtype=dtype)
    data = torch.randint(0, 2 if dtype is torch.bool else 256, (empty.nbytes,), dtype=torch.uint8,
                         generator=torch.Generator().manual_seed(seed))  # fmt: skip
    return data.view(dtype).reshape(shape) if empty.numel() else empty


@dataclasses.dataclass(frozen=True)
class Layout:
    """A world, and how a tensor lies in it: no mesh is a plain tensor on every rank."""

    world_size: int
    mesh: tuple = ()
    placements: tuple = ()

    def put(self, rt, value):
        """This rank's tensor; torch does the cutting."""
        if not self.mesh:
            return value.clone()
        if len(self.mesh) == 1:
            mesh = DeviceMesh.from_group(rt.world.group, "cpu", mesh_dim_names=("dp",))
        else:
            mesh = init_device_mesh("cpu", self.mesh, mesh_dim_names=("a", "b", "c")[: len(self.mesh)])
        return distribute_tensor(value, mesh, self.placements, src_data_rank=None)


def local(tensor):
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def save_as(rt, path, layout, value):
    ff.save(rt, path, {"w": layout.put(rt, value), "epoch": 3})


def load_as(rt, path, layout, value, donate=False):
    """Whether the loaded tensor is the value in this layout, and whether the template was left alone."""
    expected, like = layout.put(rt, value), layout.put(rt, torch.ones_like(value))
    before = bits(local(like))
    loaded = ff.load(rt, path, {"w": like, "epoch": 0}, donate=donate)
    assert loaded["epoch"] == 3
    assert type(loaded["w"]) is type(expected)
    assert (loaded["w"] is like) is donate
    if layout.mesh:
        assert loaded["w"]._spec == expected._spec
    assert bits(local(loaded["w"])) == bits(local(expected))
    assert local(loaded["w"]).stride() == local(expected).stride()
    if not donate:
        assert bits(local(like)) == before


def load_plain(rt, path, value):
    loaded = ff.load(rt, path)
    assert type(loaded["w"]) is torch.Tensor
    assert bits(loaded["w"]) == bits(value)


ROWS = Layout(4, (4,), (Shard(0),))
