"""ZeRO stage 1: `ddp(shard_optimizer=True)` has the bits of `ddp()`, and every rank a part of the optimizer's state."""

import dataclasses

import pytest
import torch
from torch import nn, optim

import fabricfn as ff
from fabricfn import testing
from fabricfn.errors import CapabilityError, ConfigurationError, GradientError
from fabricfn.optimizers.shares import UNIT, bounds_over
from fabricfn.sharding import is_sharded, local_of, whole
from fabricfn.strategies import ddp
from tests.support.worlds import world_of

SHARED = ddp(shard_optimizer=True)


class Net(nn.Module):
    """Tied, frozen, scalar, small and large parameters; `turned` and, later, `conv` may be laid out otherwise."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.inp = nn.Linear(8, 37)
        self.mid = nn.Linear(37, 37)
        self.out = nn.Linear(37, 37)
        self.out.weight = self.mid.weight
        self.gain = nn.Parameter(torch.tensor(0.7))
        self.fixed = nn.Parameter(torch.full((37,), 0.5), requires_grad=False)
        self.turned = nn.Parameter(torch.randn(37, 5))

    def forward(self, x):
        x = self.conv(x).mean((2, 3))
        x = self.out(self.mid(self.inp(x)).tanh()) * self.gain + self.fixed
        return x @ self.turned


def built(dtype):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Net().to(dtype)


NETS = {dtype: built(dtype) for dtype in (torch.float64, torch.float32, torch.bfloat16)}  # threads share the generator
X = torch.randn(6, 3, 5, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
PRECISIONS = {torch.float64: "64-true", torch.float32: "32-true", torch.bfloat16: "bf16-true"}


def squares(net, x):
    return net(x).square().mean()


def rows(rt, dtype=torch.float64):
    return X.to(dtype if type(dtype) is torch.dtype else torch.float64).tensor_split(rt.world_size)[rt.rank]


ranks = world_of("threads", 3)


class Sign(optim.Optimizer):
    """An optimizer of the user's own that works number by number."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for param in group["params"]:
                mean = self.state[param].setdefault("mean", torch.zeros_like(param))
                param.sub_(group["lr"] * mean.lerp_(param.grad, 0.3).sign())


def start(params):
    return {"mean": {name: torch.zeros_like(value) for name, value in params.items()}}


def momentum(grads, state, params):
    mean = {name: 0.9 * state["mean"][name] + grad for name, grad in grads.items()}
    return {name: -0.1 * value for name, value in mean.items()}, {"mean": mean}


OPTIMIZERS = {
    "AdamW": (optim.AdamW, {"lr": 0.1, "groups": {"*bias": {"weight_decay": 0.0, "lr": 0.01}}}),
    "Adam, all slots": (optim.Adam, {"lr": 0.1, "amsgrad": True, "maximize": True}),
    "SGD": (optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    "Adagrad": (optim.Adagrad, {"lr": 0.1}),
    "AdamW by torch": (optim.AdamW, {"lr": 0.1, "fused": False}),
    "NAdam": (optim.NAdam, {"lr": 0.1, "foreach": True}),
    "a class": (Sign, {"elementwise": True}),
    "a pair": ((start, momentum), {"elementwise": True}),
    "a part": (optim.RMSprop, {"lr": 0.1, "params": ["mid.*", "turned"]}),
}


def wholes(tree):
    return ff.tree_map(whole, tree)


def trained(rt, kind, options, dtype, donate):
    model = ff.setup_model(rt, NETS[dtype])
    opt = ff.setup_optimizer(rt, model, kind, **options)
    for _ in range(3):
        _, grads = ff.value_and_grad(rt, squares)(model, rows(rt, dtype))
        before = wholes((model, opt.state, grads))
        after = ff.optimizer_step(rt, model, opt, grads, donate=donate)
        assert donate or testing.difference(wholes((model, opt.state, grads)), before) is None
        model, opt = after
    return dict(model.params), wholes(opt.state), opt.step


@pytest.mark.parametrize("dtype", PRECISIONS, ids=str)
@pytest.mark.parametrize(("kind", "options"), OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_the_bits_are_those_of_ddp(ranks, monkeypatch, kind, options, dtype):
    if kind is optim.NAdam:  # in many pieces
        monkeypatch.setattr("fabricfn.flat.moving.PIECE", 1000)
    for size, donate in ((2, True), (3, False)):
        settings = {"precision": PRECISIONS[dtype], "world_size": size}
        expected = ranks.run(trained, kind, options, dtype, donate, strategy=ddp(), **settings)[0]
        for found in ranks.run(trained, kind, options, dtype, donate, strategy=SHARED, **settings):
            assert testing.difference(found, expected) is None


def test_parameters_that_are_laid_out_otherwise_step_too(ranks):
    """Kernels go through memory in its own order there, so the last bit may differ."""
    module = built(torch.float64).to(memory_format=torch.channels_last)
    module.turned.data = module.turned.data.T.contiguous().T
    NETS["otherwise"] = module
    assert not module.conv.weight.is_contiguous() and not module.turned.is_contiguous()
    for donate in (False, True):
        arguments = (trained, optim.AdamW, {"lr": 0.1}, "otherwise", donate)
        expected = ranks.run(*arguments, strategy=ddp(), precision=64)[0]
        for found in ranks.run(*arguments, strategy=SHARED, precision=64):
            assert found[0]["turned"].stride() == expected[0]["turned"].stride()
            assert testing.difference(found, expected, 1e-14) is None


# What a rank holds


def held(rt, kind, module):
    model = ff.setup_model(rt, module)
    opt = ff.setup_optimizer(rt, model, kind)
    _, grads = ff.value_and_grad(rt, lambda net: sum(p.square().sum() for p in net.parameters()))(model)
    _, opt = ff.optimizer_step(rt, model, opt, grads)
    slots = [value for row in opt.state.values() for slot, value in row.items() if slot != "step"]
    assert all(is_sharded(slot) and slot.shape in {p.shape for p in model.params.values()} for slot in slots)
    return [sum(local_of(slot).untyped_storage().nbytes() for slot in slots), sum(slot.nbytes for slot in slots)]


def test_a_rank_holds_its_share_of_the_state(ranks):
    module = nn.Sequential(nn.Embedding(101, 64), *(nn.LayerNorm(16) for _ in range(12)), nn.Linear(300, 200))
    for size in (2, 3):
        for kind in (optim.AdamW, optim.RMSprop):
            found = ranks.run(held, kind, module, strategy=SHARED, world_size=size)
            assert sum(mine for mine, _ in found) == found[0][1]
            assert max(mine for mine, _ in found) <= 1.01 * found[0][1] / size


def test_stretches_are_even_and_meet_where_vectors_do():
    for sizes, apart in (
        ([5] * 96, 0),
        ([768, 768 * 64, 192] * 20, 5 * UNIT),
        ([64, 65, 127, 128, 129, 0, 1], 7 * UNIT),
        ([10_001], UNIT),
    ):
        for count in (1, 2, 3, 8):
            found = bounds_over(sizes, count)
            for size, bounds in zip(sizes, found, strict=True):
                assert bounds[0] == 0 and bounds[-1] == size and sorted(bounds) == [*bounds]
                assert all(bound % UNIT == 0 or bound == size for bound in bounds)
            loads = [sum(bounds[rank + 1] - bounds[rank] for bounds in found) for rank in range(count)]
            assert max(loads) - min(loads) <= apart


# With everything else


def test_checkpoints_between_all_placements_of_the_state(ranks):
    def make(rt):
        model = ff.setup_model(rt, NETS[torch.float64])
        opt = ff.setup_optimizer(rt, model, optim.AdamW, lr=1e-3)
        _, grads = ff.value_and_grad(rt, squares)(model, rows(rt)[:1])
        model, opt = ff.optimizer_step(rt, model, opt, grads, donate=True)
        return {"net": model, "opt": opt, "averaged": ff.tree_map(lambda leaf: leaf * 2, opt)}

    done = testing.check_checkpoint(make, ranks=ranks, strategies=(SHARED, "fsdp"), world_sizes=(1, 2))
    assert done == 4 * (1 + 2) * 2


def going_on(rt, path):
    module = NETS[torch.float64]
    model = ff.setup_model(rt, module)
    opt = ff.load_raw(rt, path, ff.setup_optimizer(rt, model, optim.AdamW))
    instance = optim.AdamW(module.parameters(), lr=0.5)
    instance.load_state_dict(torch.load(path))
    built = ff.setup_optimizer(rt, model, instance)
    assert testing.difference(wholes(built.state), wholes(opt.state)) is None
    _, grads = ff.value_and_grad(rt, squares)(model, rows(rt))
    return wholes(opt.state), dict(ff.optimizer_step(rt, model, opt, grads)[0].params)


def test_the_state_of_an_optimizer_of_torch_is_cut(ranks, tmp_path):
    module = NETS[torch.float64]
    theirs = optim.AdamW(module.parameters(), lr=0.5)
    for seed, param in enumerate(module.parameters()):
        noise = torch.Generator().manual_seed(seed)
        param.grad = torch.randn(param.shape, generator=noise, dtype=param.dtype) if param.requires_grad else None
    values = {name: param.detach().clone() for name, param in module.named_parameters()}
    theirs.step()
    for name, param in module.named_parameters():
        param.data.copy_(values[name])
        param.grad = None
    torch.save(theirs.state_dict(), tmp_path / "opt.pt")
    settings = {"precision": "64-true", "world_size": 2}
    (expected, _) = ranks.run(going_on, tmp_path / "opt.pt", strategy=ddp(), **settings)
    for found in ranks.run(going_on, tmp_path / "opt.pt", strategy=SHARED, **settings):
        assert testing.difference(found, expected) is None


def closing(rt):
    model = ff.setup_model(rt, NETS[torch.float64])
    opt = ff.setup_optimizer(rt, model, Twice, elementwise=True)
    grad_fn = ff.value_and_grad(rt, squares)
    return dict(ff.optimizer_step(rt, model, opt, closure=lambda trial: grad_fn(trial, rows(rt)))[0].params)


class Twice(optim.SGD):
    """Evaluates the loss at the values after its first half, which all ranks must see."""

    def __init__(self, params):
        super().__init__(params, lr=0.1, foreach=False)

    def step(self, closure):
        for _ in range(2):
            closure()
            super().step()


def test_a_closure_sees_what_the_other_ranks_have_stepped(ranks):
    expected = ranks.run(closing, strategy=ddp(), precision=64)[0]
    for found in ranks.run(closing, strategy=SHARED, precision=64):
        assert testing.difference(found, expected) is None


def scaled(rt):
    model = ff.setup_model(rt, NETS[torch.float32])
    opt = ff.setup_optimizer(rt, model, optim.AdamW, lr=0.1)
    _, grads = ff.value_and_grad(rt, squares)(model, rows(rt, torch.float32))
    bad = ff.tree_map(lambda grad: grad / 0, grads)
    left_out, opt = ff.optimizer_step(rt, model, opt, bad)
    assert testing.difference(dict(left_out.params), dict(model.params)) is None
    return dict(ff.optimizer_step(rt, left_out, opt, grads)[0].params)


def test_steps_are_left_out_on_all_ranks(ranks):
    precision = ff.Precision(loss_scale=ff.DynamicScale())
    expected = ranks.run(scaled, strategy=ddp(), precision=precision)[0]
    for found in ranks.run(scaled, strategy=SHARED, precision=precision):
        assert testing.difference(found, expected) is None


def refusals(rt):
    model = ff.setup_model(rt, NETS[torch.float64])
    for kind, options, match in (
        (optim.LBFGS, {}, "needs all gradients in one vector"),
        (optim.Muon, {"params": "mid.weight"}, "needs whole matrices"),
        (Sign, {}, "elementwise=True"),
    ):
        with pytest.raises(CapabilityError, match=match):
            ff.setup_optimizer(rt, model, kind, **options)
    opt = ff.setup_optimizer(rt, model, optim.AdamW)
    _, grads = ff.value_and_grad(rt, squares)(model, rows(rt))
    for wrong in (grads.params["turned"].T.contiguous(), grads.params["turned"].to_sparse()):
        with pytest.raises(GradientError, match=r"gradient of turned .*\(37, 5\)"):
            ff.optimizer_step(rt, model, opt, dataclasses.replace(grads, params={**grads.params, "turned": wrong}))


def test_what_a_part_cannot_show_is_refused(ranks):
    ranks.run(refusals, strategy=SHARED, precision=64)
    with pytest.raises(ConfigurationError, match="shard_optimizer=1.*True or False"):
        ddp(shard_optimizer=1)
