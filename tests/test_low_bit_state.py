"""Optimizer state in tensors of a library's own: a small one of these tests, and those of torchao and bitsandbytes."""

import importlib.util
import subprocess
import sys

import pytest
import torch
from torch import nn

import fabricfn as ff
from fabricfn import testing
from fabricfn.errors import CapabilityError
from fabricfn.testing import cases
from fabricfn.tree import tree_leaves
from tests.support.runtimes import RT
from tests.support.worlds import world_of

threads = world_of("threads", 2)


class Rounded(torch.Tensor):
    """A tensor as libraries make them: it can be neither cloned nor stored, and looks like what it stands for."""

    @staticmethod
    def __new__(cls, codes, dtype):
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=dtype, device=codes.device)

    def __init__(self, codes, dtype):
        self.codes = codes

    def __tensor_flatten__(self):
        return ["codes"], self.dtype

    @classmethod
    def __tensor_unflatten__(cls, parts, dtype, size, stride):
        return cls(parts["codes"], dtype)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise NotImplementedError(func)


class Momentum(torch.optim.Optimizer):
    """SGD with its momentum in bfloat16, for parameters of two dimensions; the learning rate is a tensor."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, {"lr": torch.tensor(lr)})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            assert type(group["lr"]) is torch.Tensor
            for param in group["params"]:
                state = self.state[param]
                if not state:
                    codes = torch.zeros_like(param, dtype=torch.bfloat16)
                    state["momentum"] = Rounded(codes, param.dtype) if param.dim() > 1 else codes
                    state["extremes"] = {"low": param.min(), "high": param.max()}
                momentum = state["momentum"]
                codes = momentum.codes if type(momentum) is Rounded else momentum
                codes.mul_(0.9).add_(param.grad)
                param.sub_(codes.to(param.dtype) * group["lr"])


def built():
    net = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 64))
    return cases.initialised(net, 7).float()


X, Y = cases.filled((16, 64), torch.float32, 1), cases.filled((16, 64), torch.float32, 2)


def squares(net, x, y):
    return (net(x) - y).square().mean()


def by_hand(cls, steps, **options):
    net = built()
    optimizer = cls(net.parameters(), **options)
    for _ in range(steps):
        optimizer.zero_grad()
        squares(net, X, Y).backward()
        optimizer.step()
    return [param.detach() for param in net.parameters()]


def stepped(rt, model, opt, steps, donate=True, **overrides):
    for _ in range(steps):
        _, grads = ff.value_and_grad(rt, squares)(model, X, Y)
        model, opt = ff.optimizer_step(rt, model, opt, grads, donate=donate, **overrides)
    return model, opt


def begun(rt, cls, **options):
    model = ff.setup_model(rt, built())
    return model, ff.setup_optimizer(rt, model, cls, **options)


def equal(model, expected):
    return all(map(torch.equal, model.params.values(), expected))


def holds(rt, folder, cls, **options):
    """The laws of one optimizer: by hand, pure, donated, saved and loaded into one that has made no step."""
    five = by_hand(cls, 5, **options)
    model, opt = stepped(rt, *begun(rt, cls, **options), 4)
    assert equal(model, by_hand(cls, 4, **options))
    ff.save(rt, folder / "c", {"model": model, "opt": opt})
    for _ in range(2):  # the first of the two changed nothing
        assert equal(stepped(rt, model, opt, 1, donate=False)[0], five)
    copied = ff.tree_map(lambda leaf: leaf.clone(), opt)
    assert equal(stepped(rt, model, copied, 1, donate=False)[0], five)
    fresh, new = begun(rt, cls, **options)
    loaded = ff.load(rt, folder / "c", like={"model": fresh, "opt": new})
    assert equal(stepped(rt, loaded["model"], loaded["opt"], 1, donate=False)[0], five)
    assert equal(stepped(rt, model, opt, 1)[0], five)
    return loaded["opt"]


def test_state_in_tensors_of_a_class_of_its_own(tmp_path):
    opt = holds(RT, tmp_path, Momentum)
    assert opt.state["0.weight"]["momentum"]["codes"].dtype is torch.bfloat16
    assert opt.state["0.bias"]["extremes"].keys() == {"low", "high"}


def test_a_number_overrides_a_hyperparameter_that_is_a_tensor():
    model, opt = begun(RT, Momentum, lr=0.5)
    once, after = stepped(RT, model, opt, 1, donate=False, lr=0.25)
    assert equal(once, by_hand(Momentum, 1, lr=0.25))
    assert after.hyperparams[0]["lr"] == 0.5


@pytest.mark.parametrize("strategy", ["ddp", "flat", "functional"])
def test_it_follows_the_laws_under_strategies_with_whole_parameters(threads, strategy):
    data = X.double(), Y.double()
    train = testing.training_loop(built().double(), squares, data, Momentum, lr=0.05)
    laws = ("purity", "donation", "resume")
    testing.check(train, laws, strategies=(strategy,), world_sizes=(2,), ranks=threads)


def refused(rt, name, elementwise):
    cls = type(name, (Momentum,), {})
    with pytest.raises(CapabilityError, match=f"{name} cannot work where .* whole blocks of numbers, which share"):
        ff.setup_optimizer(rt, ff.setup_model(rt, built()), cls, elementwise=elementwise)


@pytest.mark.parametrize("strategy", ["fsdp", ff.strategies.ddp(shard_optimizer=True)])
def test_blocks_are_not_cut_whatever_is_promised(threads, strategy):
    for name, elementwise in (("AdamW8bit", True), ("AdamWFp8", False)):
        threads.run(refused, name, elementwise, strategy=strategy)


# torchao and bitsandbytes, in a process of their own, which may warn as these packages do


def classes():
    import bitsandbytes
    import torchao.optim

    torchao8, torchao_fp8 = torchao.optim.AdamW8bit, torchao.optim.AdamWFp8
    return [(torchao8, {}), (torchao_fp8, {}), (bitsandbytes.optim.AdamW8bit, {"min_8bit_size": 1024})]


def nbytes(opt):
    return sum(leaf.nbytes for leaf in tree_leaves(opt.state) if isinstance(leaf, torch.Tensor))


def packages(folder):
    from pathlib import Path

    _, whole = stepped(RT, *begun(RT, torch.optim.AdamW), 1)
    for cls, options in classes():
        opt = holds(RT, Path(folder) / cls.__module__ / cls.__name__, cls, lr=1e-2, **options)
        assert nbytes(opt) < 0.3 * nbytes(whole), (cls, nbytes(opt), nbytes(whole))
        model, opt = begun(RT, cls, lr=1e-2, **options)
        assert equal(stepped(RT, model, opt, 2, lr=1e-3)[0], by_hand(cls, 2, lr=1e-3, **options)), cls
    with testing.processes(2) as ranks:
        for strategy in ("ddp", "flat"):
            assert all(ranks.run(on_ranks, strategy=strategy))


def on_ranks(rt):
    """On equal rows the mean over ranks has the bits of one of them."""
    found = []
    for cls, options in classes():
        model, _ = stepped(rt, *begun(rt, cls, lr=1e-2, **options), 3)
        found.append(equal(model, by_hand(cls, 3, lr=1e-2, **options)))
    return all(found)


def needs(*names):
    there = all(importlib.util.find_spec(name) is not None for name in names)
    return pytest.mark.skipif(not there, reason=f"{' and '.join(names)} are extras: nox -s lowbits")


@needs("torchao", "bitsandbytes")
@pytest.mark.timeout(600)
def test_torchao_and_bitsandbytes(tmp_path):
    program = f"from tests.test_low_bit_state import packages; packages({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", program], check=True)
