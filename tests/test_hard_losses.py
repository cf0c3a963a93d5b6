"""Losses that break naive binding: several models, nested gradients, checkpointing, torch.func, torch.compile."""

import dataclasses

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

import fabricfn as ff
from fabricfn.sharding import whole
from tests.support.gradients import data


def test_dcgan(rt):
    def generator():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.ConvTranspose2d(8, 8, 4), nn.BatchNorm2d(8), nn.ReLU(), nn.ConvTranspose2d(8, 1, 4, 2, 1), nn.Tanh()
        ).double()

    def discriminator():
        torch.manual_seed(1)
        return nn.Sequential(
            nn.Conv2d(1, 8, 4, 2, 1), nn.LeakyReLU(0.2), nn.Conv2d(8, 8, 2), nn.BatchNorm2d(8), nn.Flatten(),
            nn.Linear(72, 1),
        ).double()  # fmt: skip

    def d_loss(disc, gen, z, real):
        ones, zeros = torch.ones(4, 1).double(), torch.zeros(4, 1).double()
        real_loss = F.binary_cross_entropy_with_logits(disc(real), ones)
        return real_loss + F.binary_cross_entropy_with_logits(disc(gen(z)), zeros)

    def g_loss(gen, disc, z):
        return F.binary_cross_entropy_with_logits(disc(gen(z)), torch.ones(4, 1).double())

    real, zs = data(4, 1, 8, 8).tanh(), [data(4, 8, 1, 1, seed=s) for s in range(3)]
    gen, disc = ff.setup_model(rt, generator()), ff.setup_model(rt, discriminator())
    opts = [ff.setup_optimizer(rt, model, torch.optim.SGD, lr=0.1) for model in (gen, disc)]
    d_grad, g_grad = ff.value_and_grad(rt, d_loss), ff.value_and_grad(rt, g_loss)
    for z in zs:
        _, grads = d_grad(disc, gen, z, real)
        disc, opts[1] = ff.optimizer_step(rt, disc, opts[1], grads, donate=True)
        _, grads = g_grad(gen, disc, z)
        gen, opts[0] = ff.optimizer_step(rt, gen, opts[0], grads, donate=True)

    # by hand, with the other player's statistics left alone, as a constant's are
    g, d = generator(), discriminator()
    g_opt, d_opt = torch.optim.SGD(g.parameters(), lr=0.1), torch.optim.SGD(d.parameters(), lr=0.1)

    def constant(module):
        buffers = {name: value.clone() for name, value in module.named_buffers()}
        params = {name: value.detach() for name, value in module.named_parameters()}
        return lambda x: functional_call(module, {**params, **buffers}, (x,))

    for z in zs:
        d_opt.zero_grad()
        d_loss(d, constant(g), z, real).backward()
        d_opt.step()
        g_opt.zero_grad()
        g_loss(g, constant(d), z).backward()
        g_opt.step()
    for model, module in ((gen, g), (disc, d)):
        torch.testing.assert_close(ff.gather_params(rt, model), {n: p.detach() for n, p in module.named_parameters()})
        torch.testing.assert_close(dict(model.buffers), dict(module.named_buffers()))


def test_maml_second_order(rt):
    module = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    xs, ys = data(2, 6, 4), data(2, 6, 1, seed=2)

    def adapt(net, x, y):
        params = dict(net.named_parameters())
        inner = F.mse_loss(functional_call(net, params, (x,)), y)
        grads = torch.autograd.grad(inner, list(params.values()), create_graph=True)
        fast = {name: p - 0.1 * g for (name, p), g in zip(params.items(), grads, strict=True)}
        return F.mse_loss(functional_call(net, fast, (x + 1,)), y)

    def outer(net, xs, ys):
        return sum(adapt(net, x, y) for x, y in zip(xs, ys, strict=True))

    model = ff.setup_model(rt, module)
    loss, grads = ff.value_and_grad(rt, outer)(model, xs, ys)
    expected = outer(module, xs, ys)
    expected.backward()
    torch.testing.assert_close(loss, expected.detach())
    for name, param in module.named_parameters():
        torch.testing.assert_close(whole(grads.params[name]), param.grad, rtol=0, atol=1e-12)


def test_gradients_inside_a_loss(rt):
    """`value_and_grad` of the same engine within a loss function: a frame of its own."""
    model = ff.setup_model(rt, nn.Linear(4, 1))
    inner = ff.value_and_grad(rt, lambda net, x: net(x).square().mean())

    def outer(net, x):
        _, grads = inner(model, x)
        return net(x).mean() * whole(grads.params["weight"]).sum()

    loss, grads = ff.value_and_grad(rt, outer)(model, data(6, 4))
    module = ff.to_module(rt, model)
    slope = whole(inner(model, data(6, 4))[1].params["weight"]).sum()
    (module(data(6, 4)).mean() * slope).backward()
    torch.testing.assert_close(whole(grads.params["weight"]), module.weight.grad, rtol=0, atol=1e-13)


@pytest.mark.filterwarnings("ignore:Grad strides do not match bucket view strides")  # torch's reducer, on speed
def test_gradient_penalty(rt):
    module = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)).double()

    def penalised(net, x):
        x = x.clone().requires_grad_()
        out = net(x)
        (slope,) = torch.autograd.grad(out.sum(), x, create_graph=True)
        return out.mean() + (slope.norm(dim=1) - 1).square().mean()

    _, grads = ff.value_and_grad(rt, penalised)(ff.setup_model(rt, module), data(6, 4))
    penalised(module, data(6, 4)).backward()
    for name, param in module.named_parameters():
        torch.testing.assert_close(whole(grads.params[name]), param.grad, rtol=0, atol=1e-12)


def test_sam_takes_gradients_at_a_perturbed_model_and_steps_the_original(rt):
    module = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    model = ff.setup_model(rt, module)
    opt = ff.setup_optimizer(rt, model, torch.optim.SGD, lr=0.1)
    grad_fn = ff.value_and_grad(rt, lambda net, x: net(x).square().mean())
    for _ in range(3):
        _, ascent = grad_fn(model, data(6, 4))
        _, norm = ff.clip_gradients(rt, ascent, max_norm=1e9)
        step = ff.tree_map(lambda g, norm=norm: 0.05 * g / norm, ascent)
        up = dataclasses.replace(model, params={n: p + step.params[n] for n, p in model.params.items()})
        _, grads = grad_fn(up, data(6, 4))
        model, opt = ff.optimizer_step(rt, model, opt, grads, donate=True)
    for _ in range(3):
        module.zero_grad()
        module(data(6, 4)).square().mean().backward()
        steps = [p.grad.clone() for p in module.parameters()]
        norm = torch.stack([s.norm() for s in steps]).norm()
        with torch.no_grad():
            old = [p.clone() for p in module.parameters()]
            for p, s in zip(module.parameters(), steps, strict=True):
                p.add_(0.05 * s / norm)
        module.zero_grad()
        module(data(6, 4)).square().mean().backward()
        with torch.no_grad():
            for p, o in zip(module.parameters(), old, strict=True):
                p.copy_(o - 0.1 * p.grad)
    for name, param in module.named_parameters():
        torch.testing.assert_close(whole(model.params[name]), param.detach(), rtol=0, atol=1e-12)


def test_several_models_in_one_loss(rt):
    a, b = nn.Linear(4, 3).double(), nn.Linear(3, 1).double()
    models = {"a": ff.setup_model(rt, a), "b": [ff.setup_model(rt, b)]}

    def chained(nets, x):
        return nets["b"][0](nets["a"](x)).square().mean()

    _, grads = ff.value_and_grad(rt, chained)(models, data(6, 4))
    b(a(data(6, 4))).square().mean().backward()
    torch.testing.assert_close(whole(grads["a"].params["weight"]), a.weight.grad)
    torch.testing.assert_close(whole(grads["b"][0].params["weight"]), b.weight.grad)


def test_constants_are_found_anywhere_in_the_arguments(rt):
    student, teacher = ff.setup_model(rt, nn.Linear(4, 3)), ff.setup_model(rt, nn.Linear(4, 3))

    def distil(net, x, *, others):
        teacher = others["list"][0]
        assert not any(param.requires_grad for param in teacher.parameters())
        return (net(x) - teacher(x)).square().mean()

    loss, _ = ff.value_and_grad(rt, distil)(student, data(6, 4), others={"list": [teacher, 3]})
    assert loss > 0
    assert ff.apply(rt, student, teacher, data(6, 4), method=lambda a, b, x: a(x) - b(x)).shape == (6, 3)


class Mlp(nn.Sequential):
    """torch 2.9 compiles nothing of a module whose forward is torch's own."""

    def __init__(self):
        super().__init__(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))

    def forward(self, x):
        return self[2](self[1](self[0](x)))


def same_gradients(model, rt, grads, x):
    plain = ff.to_module(rt, model)
    plain(x).square().mean().backward()
    torch.testing.assert_close(whole(grads.params["0.weight"]), plain[0].weight.grad)


@pytest.mark.parametrize("strategy", ff.strategies.NAMES)
@pytest.mark.filterwarnings("ignore")  # torch._dynamo's own
def test_other_values_do_not_compile_again(one_rank, strategy):
    rt, compiled = one_rank(strategy, 32), []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph

    torch._dynamo.reset()
    model = ff.setup_model(rt, Mlp(), compile={"backend": backend})
    assert "0.weight" in model.params
    grad_fn, x = ff.value_and_grad(rt, lambda net, x: net(x).square().mean()), data(6, 4).float()
    grad_fn(model, x)
    before = len(compiled)
    assert before > 0
    for factor in (2.0, 3.0, 4.0):
        scaled = ff.map_params(lambda a, factor=factor: factor * a, model)
        _, grads = grad_fn(scaled, x)
    assert len(compiled) == before
    same_gradients(scaled, rt, grads, x)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("given", ["compile=True", "torch.compile(module)", "module.compile()"])
def test_compiling_with_torchs_default_back_end(one_rank, given):
    rt = one_rank("single", 32)
    module, x = Mlp(), data(6, 4).float()
    wrapped = torch.compile(module) if given == "torch.compile(module)" else module
    if given == "module.compile()":
        module.compile()
    model = ff.setup_model(rt, wrapped, compile=given == "compile=True")
    assert model.ref.engine.frames[0].net._compiled_call_impl is not None
    assert list(model.params) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    _, grads = ff.value_and_grad(rt, lambda net, x: net(x).square().mean())(model, x)
    same_gradients(model, rt, grads, x)


def test_torch_func_over_apply(one_rank):
    rt = one_rank("functional")
    module = nn.Linear(4, 1).double()
    model = ff.setup_model(rt, module)
    x = data(6, 4)
    slope = torch.func.grad(lambda m, x: ff.apply(rt, m, x).square().mean())(model, x)
    module(x).square().mean().backward()
    torch.testing.assert_close(slope.params["weight"], module.weight.grad)
    stacked = ff.tree_map(lambda leaf: torch.stack([leaf, 2 * leaf]), model)
    out = torch.func.vmap(lambda m: ff.apply(rt, m, x))(stacked)
    torch.testing.assert_close(out[0], module(x))
    with pytest.raises(ff.CapabilityError, match=r"torch\.func"):
        torch.func.vmap(lambda x: ff.value_and_grad(rt, lambda net, x: net(x).mean())(model, x)[0])(x)


def test_torch_func_over_an_engine_with_hooks_is_refused(one_rank):
    rt = one_rank("ddp")
    model = ff.setup_model(rt, nn.Linear(4, 1))
    with pytest.raises(ff.CapabilityError, match='strategy="functional"'):
        torch.func.grad(lambda m, x: ff.apply(rt, m, x).mean())(model, data(6, 4))


def test_parameters_kept_in_a_plain_list_get_their_gradients(rt):
    class Listed(nn.Linear):
        def __init__(self):
            super().__init__(4, 1)
            self.all = [self.weight]

        def forward(self, x):
            return super().forward(x) + x @ self.all[0].T

    module = Listed().double()
    if rt.strategy.shard:
        with pytest.raises(ff.CapabilityError, match="kept in a list"):
            ff.value_and_grad(rt, lambda net, x: net(x).square().mean())(ff.setup_model(rt, module), data(6, 4))
        return
    _, grads = ff.value_and_grad(rt, lambda net, x: net(x).square().mean())(ff.setup_model(rt, module), data(6, 4))
    module(data(6, 4)).square().mean().backward()
    torch.testing.assert_close(whole(grads.params["weight"]), module.weight.grad)


def test_reentrant_checkpointing_is_right_or_refused(rt):
    module = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1)).double()

    def checkpointed(net, x, reentrant):
        hidden = torch.utils.checkpoint.checkpoint(net[0], x.requires_grad_(), use_reentrant=reentrant)
        return (net[2](net[1](hidden)) + net[0](x).mean()).square().mean()

    model = ff.setup_model(rt, module)
    checkpointed(module, data(6, 4), False).backward()
    _, grads = ff.value_and_grad(rt, checkpointed)(model, data(6, 4), False)
    torch.testing.assert_close(whole(grads.params["0.weight"]), module[0].weight.grad, rtol=0, atol=1e-12)
    refusals = {"functional": (ff.CapabilityError, "use_reentrant=False"), "ddp": (RuntimeError, "reentrant backward")}
    if rt.strategy.name in refusals:  # torch's reducer refuses a module that is also used outside of the checkpoint
        kind, words = refusals[rt.strategy.name]
        with pytest.raises(kind, match=words):
            ff.value_and_grad(rt, checkpointed)(model, data(6, 4), True)
    else:
        _, grads = ff.value_and_grad(rt, checkpointed)(model, data(6, 4), True)
        torch.testing.assert_close(whole(grads.params["0.weight"]), module[0].weight.grad, rtol=0, atol=1e-12)
