"""What the tests of other tools' files share: a net, what it becomes here, and torch's own ways to write it."""

import warnings

import torch
import torch.distributed.checkpoint as dcp
from torch import nn

import fabricfn as ff


def dcp_save(tree, folder):
    """By one process; torch warns that it is one."""
    with warnings.catch_warnings(action="ignore"):
        dcp.save(tree, checkpoint_id=folder, no_dist=True)


class Net(nn.Module):
    """Uneven shards, a tied weight, a buffer that is kept and one that is not."""

    def __init__(self, seed=0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.inp, self.mid, self.out = nn.Linear(4, 7), nn.Linear(7, 3), nn.Linear(4, 7)
        self.out.weight = self.inp.weight
        self.register_buffer("seen", torch.zeros(3))
        self.register_buffer("scratch", torch.zeros(1), persistent=False)
        with torch.no_grad():
            for value in self.state_dict().values():
                value.copy_(torch.randn(value.shape, generator=generator))

    def forward(self, x):
        return (self.mid(self.inp(x)) + self.seen).sum() + self.out(x).sum()


def state_of(model):
    """The whole tensors by name; every rank calls it."""
    values = {**model.params, **model.buffers}
    return {name: getattr(value, "full_tensor", lambda: value)().clone() for name, value in values.items()}


def assert_same(model, net):
    """A Model has the values of a module, bit for bit."""
    expected, found = net.state_dict(), state_of(model)
    assert set(found) == set(expected) - {"out.weight"}
    for name, value in found.items():
        assert value.dtype == expected[name].dtype
        assert torch.equal(value, expected[name]), name


def setup(rt, seed=9):
    return ff.setup_model(rt, Net(seed))


def trained(net, make=torch.optim.AdamW, **options):
    """A torch optimizer after one step, and the module."""
    optimizer = make(net.parameters(), lr=0.1, **options)
    net(torch.ones(2, 4)).backward()
    optimizer.step()
    return optimizer
