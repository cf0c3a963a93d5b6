"""dp: replicas in one process take the mean over all rows, as `single` does."""

import dataclasses

import pytest
import torch

import fabricfn as ff
from fabricfn import testing
from fabricfn.accelerators import choose, in_one_process
from fabricfn.errors import ConfigurationError
from fabricfn.strategies import dp
from fabricfn.strategies.dp import Seam
from tests.support.blocks import NET, NORMED, Block, X, built, squares, wholes
from tests.support.runtimes import RT64


def apart(tensor, device):
    return tensor.clone()


def replicas(count, log=None, **options):
    """dp over `count` devices, all of them this CPU, with copies as between devices."""

    def chunk(tensor, number):
        parts = torch.chunk(tensor, number)
        if log is not None:
            log.append([len(part) for part in parts])
        return parts

    return dp(["cpu"] * count, seam=Seam(move=apart, chunk=chunk))


def under(strategy, precision=64):
    return ff.Runtime(world=ff.World(), precision=ff.Precision.parse(precision), strategy=strategy)


def nested(net, batch, *, more, scale):
    x, (y, label) = batch
    assert label == "x"
    assert scale.dim() == 0
    assert len(x) == len(y) == len(more[0]["z"])
    loss = (net(x) - y).square() * scale + more[0]["z"]
    return loss


def batch_of(count):
    return (X[:count], (X[:count, :3] * 2, "x")), {"more": [{"z": X[:count, 3:4]}], "scale": torch.tensor(0.5)}


@pytest.mark.parametrize("count", [1, 2, 5, 12])
@pytest.mark.parametrize("devices", [2, 3, 5])
def test_dp_scatters_nested_batches_and_takes_the_mean_over_rows(count, devices):
    log = []
    args, kwargs = batch_of(count)
    found = []
    for rt in (RT64, under(replicas(devices, log))):
        model = ff.setup_model(rt, NET)
        for weighted in (False, True):

            def loss_fn(net, *args, weighted=weighted, **kwargs):
                loss = nested(net, *args, **kwargs)
                aux = {
                    "each": loss.detach().mean(1),
                    "mean": loss.mean().item(),
                    "rows": loss.detach().mean(),
                    "n": "x",
                }
                return ((loss.sum(), len(loss)) if weighted else loss.mean()), aux

            grad_fn = ff.value_and_grad(rt, loss_fn, has_aux=True, weighted=weighted)
            (loss, aux), grads = grad_fn(model, args, **kwargs)
            found.append((loss, aux, dict(grads.params)))
    for one, other in zip(found[:2], found[2:], strict=True):
        assert testing.difference(other, one, 1e-12) is None
    assert all(sizes == [len(part) for part in torch.chunk(X[:count], min(count, devices))] for sizes in log)
    assert len(log) == (6 if count > 1 else 0)


def test_dp_with_buffers_constants_checkpointing_and_two_models():
    def run(rt, **options):
        model, other = (ff.setup_model(rt, built(seed), **options) for seed in (0, 1))
        opt = ff.setup_optimizer(rt, (model, other), torch.optim.SGD, lr=0.1)

        def loss_fn(nets, x, teacher):
            return ((nets[0](x) - teacher(x)) * nets[1](x)).square().mean()

        for _ in range(2):
            _, grads = ff.accumulate(rt, loss_fn)((model, other), [(part, model) for part in X.chunk(2)])
            (model, other), opt = ff.optimizer_step(rt, (model, other), opt, grads, donate=True)
        return wholes(model.params), wholes(other.params), ff.apply(rt, model, X)

    expected = run(RT64)
    for options in ({}, {"activation_checkpointing": Block}):
        assert testing.difference(run(under(replicas(3)), **options), expected, 1e-12) is None


def test_dp_keeps_the_buffers_of_the_first_replica():
    model = ff.setup_model(RT64, NORMED)
    _, grads = ff.value_and_grad(RT64, squares)(model, X[:6])
    first = grads.new_buffers
    rt = under(replicas(2))
    _, grads = ff.value_and_grad(rt, squares)(ff.setup_model(rt, NORMED), X)
    assert testing.difference(grads.new_buffers, first, 0) is None


def test_what_dp_refuses():
    rt = under(replicas(2))
    model = ff.setup_model(rt, NET)
    with pytest.raises(ff.CapabilityError, match=r"these have \[3, 12\] rows"):
        ff.value_and_grad(rt, lambda net, x, y: net(x).mean())(model, X, X[:3])
    with pytest.raises(ff.CapabilityError, match="dp adds up rows on each"):
        ff.accumulate(rt, squares, reduce="canonical")
    with pytest.raises(ConfigurationError, match=r'a CPU is one device; asked for are 2. Write strategy="ddp"'):
        ff.init_runtime(accelerator="cpu", devices=2, strategy="dp")
    with pytest.raises(ConfigurationError, match="serves at most 1 rank"):
        ff.strategies.resolve("dp", 2)


def test_dp_has_one_process_and_alone_it_is_single():
    rt = ff.init_runtime(accelerator="cpu", strategy="dp")
    assert (rt.strategy.name, rt.world_size) == ("dp", 1)
    for field in dataclasses.fields(ff.Strategy):
        if field.name != "name":
            assert getattr(rt.strategy, field.name) is getattr(ff.strategies.single(), field.name)
    choice = in_one_process(choose("cuda", [1, 3], {"cuda": 4, "cpu": 1}))
    assert (choice.indices, choice.replicas) == ((1,), (1, 3))
    assert in_one_process(choose("mps", "auto", {"mps": 1, "cpu": 1})).replicas == (0,)
