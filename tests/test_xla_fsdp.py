"""The strategy xla_fsdp over the real torch_xla, on four virtual devices of the CPU: `nox -s xla`."""

import os

import pytest
import torch
from torch import nn

import fabricfn as ff
from fabricfn import testing
from fabricfn.errors import ConfigurationError
from fabricfn.testing import cases
from fabricfn.tree import tree_leaves

torch_xla = pytest.importorskip("torch_xla", reason="an extra, with a torch of its own: nox -s xla")
DEVICES = int(os.environ.get("CPU_NUM_DEVICES", "1"))
SETTINGS = {"strategies": ("xla_fsdp",), "world_sizes": (1,), "timeout": 240}


@pytest.fixture(scope="module", autouse=True)
def rt():
    """Before the first backward pass, which the oracle on the CPU makes."""
    assert DEVICES == 4, "run it as nox does: PJRT_DEVICE=CPU CPU_NUM_DEVICES=4"
    with ff.runtime(strategy="xla_fsdp", precision="64-true") as rt:
        yield rt


class Net(nn.Module):
    """Blocks, tied weights, a frozen one, a scalar, a buffer, rows that four devices do not divide."""

    def __init__(self):
        super().__init__()
        self.inp = nn.Linear(3, 6)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(2))
        self.out = nn.Linear(6, 3, bias=False)
        self.out.weight.requires_grad_(False)
        self.blocks[1][0].weight = self.blocks[0][0].weight
        self.scale = nn.Parameter(torch.tensor(0.7))
        self.register_buffer("offset", torch.ones(3))

    def forward(self, x):
        h = self.inp(x)
        for block in self.blocks:
            h = h + block(h)
        return self.out(h) * self.scale + self.offset


def data(rows=10):
    return cases.filled((rows, 3), torch.float64, 1), cases.filled((rows, 3), torch.float64, 2)


def loop(optimizer=torch.optim.SGD, **options):
    return testing.training_loop(
        cases.initialised(Net(), 7), cases.mean_square, data(), optimizer, **{"lr": 0.1, **options}
    )


def spec(tensor):
    """How the numbers lie: "{devices=[4,1]0,1,2,3}"."""
    return torch_xla._XLAC._get_xla_sharding_spec(tensor)


def is_spread(tensor):
    return tensor.dim() == 0 or spec(tensor).startswith("{devices=[4")


def test_the_laws_of_training():
    train = loop(momentum=0.9)
    assert testing.check_equivalence(train, accumulation=(1, 2), tolerance=1e-12, **SETTINGS) == 2
    testing.check_accumulation(train, accumulation=(3,), tolerance=1e-12, **SETTINGS)
    testing.check(train, ("purity", "donation"), **SETTINGS)
    testing.check_resume(train, tolerance=1e-12, **SETTINGS | {"strategies": ("xla_fsdp", "single")})


def test_float32_is_that_of_single_within_its_tolerance():
    module, x_shape, y_shape = cases.build("mlp", 8, 2)
    batch = tuple(cases.filled((10, *shape), torch.float32, seed) for seed, shape in enumerate((x_shape, y_shape)))
    train = testing.training_loop(cases.initialised(module, 3).float(), cases.mean_square, batch, lr=0.1, momentum=0.9)
    testing.check_equivalence(train, accumulation=(1,), tolerance=3e-6, precision="32-true", **SETTINGS)


def test_adam_obeys_the_laws_that_hold_bit_for_bit():
    testing.check(loop(torch.optim.AdamW, lr=1e-2), ("purity", "donation", "checkpoint"), **SETTINGS)


def test_batch_statistics_are_pure_and_resumed():
    module, x_shape, y_shape = cases.build("norm", 5, 2)
    batch = tuple(cases.filled((10, *shape), torch.float64, seed) for seed, shape in enumerate((x_shape, y_shape)))
    train = testing.training_loop(cases.initialised(module, 3), cases.mean_square, batch, lr=0.1)
    testing.check(train, ("purity", "resume"), **SETTINGS)


@pytest.mark.parametrize("donate", [False, True])
def test_values_gradients_and_state_stay_spread_over_the_devices(rt, tmp_path, donate):
    model = ff.setup_model(rt, cases.initialised(Net(), 7))
    opt = ff.setup_optimizer(rt, model, torch.optim.AdamW, lr=1e-2)
    x, y = ff.to_device(rt, data())
    for _ in range(2):
        loss, grads = ff.value_and_grad(rt, cases.mean_square)(model, x, y)
        present = [grad for grad in grads.params.values() if grad is not None]
        assert len(present) == len(model.params) - 1 and all(map(is_spread, present))
        model, opt = ff.optimizer_step(rt, model, opt, grads, donate=donate)
        state = [leaf for leaf in tree_leaves(opt) if isinstance(leaf, torch.Tensor) and leaf.is_xla]
        assert len(state) >= 2 * len(present) and all(map(is_spread, state))
    (part,) = {tuple(shard.data.shape) for shard in shards(model.params["inp.weight"])}
    assert part == (2, 3)  # of (6, 3): three devices have two rows each, the last one has padding alone
    ff.save(rt, tmp_path / "last", model)
    loaded = ff.load(rt, tmp_path / "last", like=model)
    ff.apply(rt, ff.eval_mode(loaded), x)
    assert all(map(is_spread, loaded.params.values()))


def shards(tensor):
    torch_xla.sync(wait=True)
    return torch_xla.distributed.spmd.wrap_if_sharded(tensor).local_shards


def test_a_module_that_is_taken_back_knows_nothing_of_devices(rt):
    model = ff.setup_model(rt, cases.initialised(Net(), 7))
    x, y = ff.to_device(rt, data())
    ff.value_and_grad(rt, cases.mean_square)(model, x, y)
    net = ff.to_module(rt, model)
    assert not [name for name, part in net.named_modules() if part._forward_hooks]
    host = cases.initialised(Net(), 7)
    assert testing.difference(net.cpu()(x.cpu()), host(x.cpu()), 1e-12) is None


def test_the_capabilities_are_those_of_the_table(rt):
    def jobs(rt):
        model = ff.setup_model(rt, cases.initialised(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)), 3))
        (x, _) = ff.to_device(rt, data(4))
        _, some = ff.value_and_grad(rt, lambda net, x: net[0](x).square().mean(), allow_unused=True)(model, x)
        loss, grads = ff.accumulate(rt, square, reduce="canonical")(model, [(x[:2],), (x[2:],)])
        rows = torch.func.vmap(lambda row: ff.apply(rt, model, row))(x)
        opt = ff.setup_optimizer(rt, model, torch.optim.LBFGS, lr=0.1, max_iter=2)
        model, opt = ff.optimizer_step(rt, model, opt, closure=lambda m: ff.value_and_grad(rt, square)(m, x))
        assert [name for name, grad in some.params.items() if grad is None] == ["2.weight", "2.bias"]
        return loss, dict(grads.params), rows, dict(model.params)

    def square(net, x):
        return net(x).square().mean()

    with ff.runtime(accelerator="cpu", devices=1, precision="64-true") as host:
        assert testing.difference(jobs(rt), jobs(host), 1e-12) is None


def test_several_processes_are_refused():
    with pytest.raises(ConfigurationError, match="serves at most 1 rank"):
        ff.strategies.resolve("xla_fsdp", 2)
