"""What sub-modules keep for the backward pass, by policy: the same bits under every strategy, and less memory."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import CheckpointPolicy

import fabricfn as ff
from fabricfn import testing
from fabricfn.errors import CapabilityError, ConfigurationError
from fabricfn.strategies.recomputing import planned
from fabricfn.testing import cases
from tests.support.allocations import allocations, peak
from tests.support.runtimes import RT
from tests.support.worlds import world_of

threads = world_of("threads", 2)

WIDTH, ROWS = 32, 8


class Attention(nn.Module):
    """Its three inputs are views with strides of their own."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, WIDTH // 2)).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2))


class Block(nn.Module):
    """BatchNorm counts batches in a buffer."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.attention, self.norm = Attention(), nn.BatchNorm1d(ROWS)
        self.up, self.down, self.dropout = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH), nn.Dropout(dropout)

    def forward(self, x):
        x = x + self.attention(self.norm(x))
        return x + self.down(self.dropout(F.gelu(self.up(x))))


def built(**options):
    return cases.initialised(nn.Sequential(nn.Linear(WIDTH, WIDTH), *(Block(**options) for _ in range(3))), 7)


NET, X = built(), cases.filled((8, ROWS, WIDTH), torch.float64, 1)


def squares(net, x):
    return net(x).square().mean()


def keeps_norms(context, op, *args, **kwargs):
    return CheckpointPolicy.MUST_SAVE if "norm" in str(op) else CheckpointPolicy.PREFER_RECOMPUTE


POLICIES = {
    "recompute": {"recompute": Block},
    "keep_matmuls": {"keep_matmuls": Block},
    "offload": {"offload": Block},
    "a function": {keeps_norms: "auto"},
    "mixed": {
        "offload": lambda name, module: name == "1" or name.endswith("attention"),
        "keep_matmuls": lambda name, module: name == "2",
        "recompute": lambda name, module: name in ("3", "2.up"),
    },
}
EACH = pytest.mark.parametrize("policies", POLICIES.values(), ids=POLICIES)


def trained(rt, policies, net=NET, x=X):
    """(loss, gradients, buffers) of the second of two steps, each of two micro-batches."""
    model = ff.setup_model(rt, net, activation_checkpointing=policies)
    opt = ff.setup_optimizer(rt, model, torch.optim.SGD, lr=0.1)
    rows = x.chunk(rt.world_size)[rt.rank].chunk(2)
    for step in range(2):
        loss, grads = ff.accumulate(rt, squares)(model, rows, rng=ff.key(step))
        model, opt = ff.optimizer_step(rt, model, opt, grads)
    full = {name: g.full_tensor() if hasattr(g, "full_tensor") else g for name, g in grads.params.items()}
    return loss, full, dict(model.buffers)


@EACH
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_policy_changes_no_bit(policies, precision):
    rt = ff.init_runtime(accelerator="cpu", devices=1, precision=precision)
    net = built(dropout=0.3).float()
    expected, found = (trained(rt, each, net, X.float()) for each in (None, policies))
    assert testing.difference(found, expected) is None


STRATEGIES = {
    "functional": ff.strategies.functional(),
    "ddp": ff.strategies.ddp(),
    "ddp, static graph": ff.strategies.ddp(static_graph=True),
    "flat": ff.strategies.flat(),
    "fsdp": ff.strategies.fsdp(units=Block),
    "flat_sharded": ff.strategies.flat_sharded(units=Block),
    "flat_sharded, inner units": ff.strategies.flat_sharded(units=nn.BatchNorm1d),
    "fsdp, inner units": ff.strategies.fsdp(units=nn.BatchNorm1d),
    "model_parallel": ff.strategies.model_parallel(
        {"*.up": "colwise", "*.down": "rowwise"}, tensor_parallel=2, fsdp=False
    ),
}


@pytest.mark.parametrize("strategy", STRATEGIES.values(), ids=STRATEGIES)
def test_policies_change_no_bit_under_any_strategy(threads, strategy):
    expected = threads.run(trained, None, strategy=strategy, precision=64)
    for name in ("keep_matmuls", "offload", "mixed"):  # test_recomputing.py has the others
        found = threads.run(trained, POLICIES[name], strategy=strategy, precision=64)
        assert testing.difference(found, expected) is None, name


# What it costs, and saves


def test_no_product_is_computed_again_where_they_are_kept():
    def flops(policies):
        model = ff.setup_model(RT, NET, activation_checkpointing=policies)
        return ff.measure_flops(ff.value_and_grad(RT, squares), model, X)

    assert flops(None) == flops({"keep_matmuls": Block}) == flops({"offload": Block}) < flops(Block)


def test_what_is_computed_again_is_not_kept():
    x = X.repeat(16, 1, 1)

    def most(policies):
        model = ff.setup_model(RT, NET, activation_checkpointing=policies)
        grad_fn = ff.value_and_grad(RT, squares)
        grad_fn(model, x)
        return peak(allocations(lambda: grad_fn(model, x))[1])

    all_of_it, products, nothing = most(None), most({"keep_matmuls": Block}), most(Block)
    assert nothing < 0.6 * products and products < 0.9 * all_of_it


def kept_on_the_device(policies):
    """Bytes that autograd keeps where they were made, without parameters."""
    kept = []

    def loss_fn(net, x):
        own = {slot.untyped_storage()._cdata for slot in net.parameters()}

        def keep(tensor):
            if tensor.untyped_storage()._cdata not in own:
                kept.append(tensor.nbytes)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            return squares(net, x)

    ff.value_and_grad(RT, loss_fn)(ff.setup_model(RT, NET, activation_checkpointing=policies), X)
    return sum(kept)


def test_what_is_offloaded_is_not_kept_on_the_device():
    assert kept_on_the_device({"offload": lambda name, module: name == ""}) < 0.05 * kept_on_the_device(None)


# Words


def test_a_policy_that_means_nothing_is_refused():
    both = {"recompute": Block, "offload": lambda name, module: name == "2"}
    for wrong, match in (
        ({"keep": Block}, "no policy 'keep'; there are 'recompute', 'keep_matmuls', 'offload', and functions"),
        (both, "gives 2 two policies, 'recompute' and 'offload'"),
        ({"offload": nn.GRU}, "chooses no module with parameters"),
        ({"offload": "all"}, "chooses no modules; write"),
    ):
        with pytest.raises(ConfigurationError, match=match):
            ff.setup_model(RT, NET, activation_checkpointing=wrong)


def test_xla_is_refused_before_anything_is_computed():
    assert planned(NET, None, torch.device("xla")) == {}
    with pytest.raises(CapabilityError, match="does not work on XLA devices: .* Leave it out"):
        planned(NET, {"offload": Block}, torch.device("xla"))


class Overwriting(nn.Module):
    """Changes what autograd has kept: a result, or a parameter."""

    def __init__(self, which):
        super().__init__()
        self.scale, self.which = nn.Parameter(torch.ones(3)), which

    def forward(self, x):
        factor = (x * self.scale).exp()
        result = factor * self.scale
        with torch.no_grad():
            (factor if self.which == "result" else self.scale).mul_(2)
        return result


@pytest.mark.parametrize("which", ["result", "parameter"])
def test_what_is_overwritten_is_no_wrong_gradient(which):
    def gradient(policies):
        model = ff.setup_model(RT, Overwriting(which), activation_checkpointing=policies)
        return ff.value_and_grad(RT, squares)(model, torch.ones(2, 3))[1].params["scale"]

    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        gradient(None)
    if which == "parameter":
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            gradient({"offload": Overwriting})
    else:  # it was copied when it was kept
        expected = torch.full((3,), 4 / 3 * math.exp(2))  # of the mean of (s exp s)^2 over 3 numbers, where s is 1
        assert testing.difference(gradient({"offload": Overwriting}), expected, 1e-5) is None


class Fickle(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.calls = nn.Linear(WIDTH, WIDTH), 0

    def forward(self, x):
        self.calls += 1
        return self.fc(x).sin() if self.calls % 2 else self.fc(x).flip(0).tanh().flip(0)


def test_a_second_pass_with_other_operations_is_refused():
    model = ff.setup_model(RT, Fickle(), activation_checkpointing={"keep_matmuls": Fickle})
    with pytest.raises(CapabilityError, match="the second pass of a module made other operations than the first"):
        ff.value_and_grad(RT, squares)(model, X.float())
