"""value_and_grad, value, accumulate on one process: what a loss function may do, and what is refused."""

import dataclasses

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

import fabricfn as ff
from fabricfn.sharding import local_of, whole


@pytest.fixture(params=ff.strategies.NAMES)
def rt(request, one_rank):
    return one_rank(request.param)


def data(*shape, seed=1):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


class Net(nn.Module):
    """A tied weight, a frozen part, batch statistics, a method besides forward, a parameter used by itself."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Linear(4, 4, bias=False)
        self.decoder = nn.Linear(4, 4, bias=False)
        self.decoder.weight = self.encoder.weight
        self.fixed = nn.Linear(4, 4).requires_grad_(False)
        self.norm = nn.BatchNorm1d(4)
        self.scale = nn.Parameter(torch.ones(()))
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))
        self.register_buffer("cache", torch.zeros(1), persistent=False)

    def encode(self, x):
        return self.fixed(self.encoder(x)).tanh()

    def forward(self, x):
        self.seen += len(x)
        self.cache = x.detach().mean(0)
        return self.norm(self.decoder(self.encode(x))) * self.scale


def fresh():
    module = Net().double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for param in module.parameters():
            param.copy_(torch.randn(param.shape, generator=generator, dtype=torch.float64))
    return module


def loss_fn(net, x, y):
    """Several forwards, another method, a weight used by itself."""
    return F.mse_loss(net(x), y) + net.encode(x).square().mean() + net(y).mean().square() + net.scale.square()


def test_any_computation_of_the_net_gives_plain_autograds_gradients(rt):
    x, y = data(8, 4), data(8, 4, seed=2)
    module = fresh()
    model = ff.setup_model(rt, module)
    assert list(model.params) == [
        "scale", "encoder.weight", "fixed.weight", "fixed.bias", "norm.weight", "norm.bias",
    ]  # fmt: skip
    loss, grads = ff.value_and_grad(rt, loss_fn)(model, x, y)
    expected = loss_fn(module, x, y)
    expected.backward()
    torch.testing.assert_close(loss, expected.detach(), rtol=0, atol=1e-13)
    for name, param in module.named_parameters():
        if param.requires_grad:
            torch.testing.assert_close(whole(grads.params[name]), param.grad, rtol=0, atol=1e-13)
        else:
            assert grads.params[name] is None
    assert not loss.requires_grad


def test_buffers_are_values(rt):
    x, y = data(8, 4), data(8, 4, seed=2)
    module = fresh()
    model = ff.setup_model(rt, module)
    before = {name: value.clone() for name, value in model.buffers.items()}
    _, grads = ff.value_and_grad(rt, loss_fn)(model, x, y)
    _, again = ff.value_and_grad(rt, loss_fn)(model, x, y)
    assert all(torch.equal(before[name], value) for name, value in model.buffers.items())
    loss_fn(module, x, y)
    expected = {name: value for name, value in module.named_buffers() if name != "cache"}
    assert set(grads.new_buffers) == set(expected) == set(before)
    for name, value in expected.items():
        torch.testing.assert_close(grads.new_buffers[name], value, rtol=0, atol=1e-13)
        assert torch.equal(grads.new_buffers[name], again.new_buffers[name])
    new, _ = ff.optimizer_step(rt, model, ff.setup_optimizer(rt, model, torch.optim.SGD, lr=0.1), grads)
    assert torch.equal(new.buffers["seen"], expected["seen"]) and not model.buffers["seen"]
    _, quiet = ff.value_and_grad(rt, lambda net, x: net.encode(x).mean() + 0 * net.norm(x).sum() + 0 * net.scale)(
        ff.eval_mode(model), x
    )
    assert quiet.new_buffers is None


def test_apply_drops_buffers_and_honours_the_mode(rt):
    x = data(8, 4)
    model = ff.setup_model(rt, fresh())
    ff.apply(rt, model, x)
    assert not model.buffers["seen"]
    module = fresh().eval()
    torch.testing.assert_close(ff.apply(rt, ff.eval_mode(model), x), module(x))
    torch.testing.assert_close(ff.apply(rt, model, x, method="encode"), module.encode(x))
    torch.testing.assert_close(ff.apply(rt, model, x, method=lambda net, x: net.scale + x), 1 * module.scale + x)
    assert not ff.apply(rt, model, x).requires_grad


def test_modes_are_as_the_user_left_them(rt):
    module = fresh()
    module.norm.eval()
    model = ff.setup_model(rt, module)
    assert "norm" not in model.training and "encoder" in model.training
    assert ff.train_mode(ff.eval_mode(model)).training == model.training
    assert ff.eval_mode({"a": model})["a"].training == frozenset()
    assert "norm" in ff.train_mode(ff.setup_model(rt, fresh().eval())).training
    _, grads = ff.value_and_grad(rt, loss_fn)(model, data(8, 4), data(8, 4, seed=2))
    assert set(grads.new_buffers) == {"seen"}


def test_the_users_module_is_never_changed(rt):
    module = fresh()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    hooks = len(module._forward_pre_hooks)
    model = ff.setup_model(rt, module)
    _, grads = ff.value_and_grad(rt, loss_fn)(model, data(8, 4), data(8, 4, seed=2))
    opt = ff.setup_optimizer(rt, model, torch.optim.SGD, lr=0.1)
    ff.optimizer_step(rt, model, opt, grads, donate=True)
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())
    assert len(module._forward_pre_hooks) == hooks and all(p.grad is None for p in module.parameters())


def test_a_plain_module_comes_back(rt):
    model = ff.map_params(lambda a: 2 * a, ff.setup_model(rt, fresh()))
    module = ff.to_module(rt, model)
    assert type(module) is Net and module.decoder.weight is module.encoder.weight
    assert [p.requires_grad for p in module.parameters()] == [p.requires_grad for p in fresh().parameters()]
    assert torch.equal(module.encoder.weight, 2 * fresh().encoder.weight) and module.training
    assert not module._forward_pre_hooks and not module._forward_hooks
    module(data(8, 4).double()).mean().backward()
    assert all(torch.equal(value, whole(model.params[name])) for name, value in ff.gather_params(rt, model).items())


def test_a_step_along_gradients_by_map_params(rt):
    model = ff.setup_model(rt, fresh())
    _, grads = ff.value_and_grad(rt, loss_fn)(model, data(8, 4), data(8, 4, seed=2))
    assert grads.params["fixed.weight"] is None  # which stays
    found = ff.map_params(lambda value, grad: value - 0.1 * grad, model, grads)
    opt = ff.setup_optimizer(rt, model, torch.optim.SGD, lr=0.1)
    expected, _ = ff.optimizer_step(rt, model, opt, grads)
    for name, value in expected.params.items():
        torch.testing.assert_close(whole(found.params[name]), whole(value), rtol=0, atol=1e-12)
    assert all(torch.equal(value, model.buffers[name]) for name, value in found.buffers.items())


def test_aux_is_detached_and_any_tree(rt):
    model = ff.setup_model(rt, fresh())

    def with_aux(net, x):
        out = net(x)
        return out.square().mean() + net.encode(x).mean(), {"out": out, "n": len(x)}

    (loss, aux), grads = ff.value_and_grad(rt, with_aux, has_aux=True)(model, data(8, 4))
    assert aux["n"] == 8 and not aux["out"].requires_grad and grads.params["scale"] is not None
    value, aux = ff.value(rt, with_aux, has_aux=True)(model, data(8, 4))
    torch.testing.assert_close(value, loss)
    (_, several), _ = ff.accumulate(rt, with_aux, has_aux=True)(model, [(data(8, 4),), (data(2, 4),)])
    assert [aux["n"] for aux in several] == [8, 2]


@pytest.mark.parametrize("sizes", [(12,), (6, 6), (1, 11), (5, 4, 2, 1)])
def test_weighted_accumulation_is_exact(rt, sizes):
    x, y = data(12, 4), data(12, 4, seed=2)
    model = ff.eval_mode(ff.setup_model(rt, fresh()))

    def summed(net, x, y):
        return (net(x) + net.encode(x) - y).square().sum(), x.numel()

    micro = list(zip(x.split(sizes), y.split(sizes), strict=True))
    loss, grads = ff.accumulate(rt, summed, weighted=True)(model, iter(micro))
    whole, expected = ff.value_and_grad(rt, lambda net, x, y: (net(x) + net.encode(x) - y).square().mean())(model, x, y)
    torch.testing.assert_close(loss, whole, rtol=0, atol=1e-12)
    torch.testing.assert_close(dict(grads.params), dict(expected.params), rtol=0, atol=1e-12)
    torch.testing.assert_close(ff.value(rt, summed, weighted=True)(model, x, y), whole, rtol=0, atol=1e-12)


def test_unweighted_accumulation_is_the_mean_of_means(rt):
    model = ff.eval_mode(ff.setup_model(rt, fresh()))
    batches = [(data(4, 4, seed=s), data(4, 4, seed=s + 9)) for s in range(3)]
    loss, grads = ff.accumulate(rt, loss_fn)(model, batches)
    each = [ff.value_and_grad(rt, loss_fn)(model, *batch) for batch in batches]
    torch.testing.assert_close(loss, sum(one[0] for one in each) / 3)
    torch.testing.assert_close(whole(grads.params["scale"]), sum(one[1].params["scale"] for one in each) / 3)


def test_keys_decide_dropout_and_leave_the_global_generator_alone(rt):
    model = ff.setup_model(rt, nn.Sequential(nn.Linear(4, 64), nn.Dropout(0.5), nn.Linear(64, 1)).double())
    grad_fn = ff.value_and_grad(rt, lambda net, x: net(x).square().mean())
    state = torch.get_rng_state()
    a, b, c = (grad_fn(model, data(8, 4), rng=ff.fold_in(ff.key(0), step))[0] for step in (1, 1, 2))
    assert a == b and a != c
    assert torch.equal(torch.get_rng_state(), state)
    micro = ff.accumulate(rt, lambda net, x: net(x).square().mean())
    assert micro(model, [(data(8, 4),)] * 2, rng=ff.key(0))[0] == micro(model, [(data(8, 4),)] * 2, rng=ff.key(0))[0]
    assert torch.equal(ff.apply(rt, model, data(8, 4), rng=ff.key(3)), ff.apply(rt, model, data(8, 4), rng=ff.key(3)))


# What breaks naive binding


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


# Errors that users meet


def test_lazy_parameters_are_refused(rt):
    with pytest.raises(ff.ModelError, match=r"uninitialised \(lazy\) parameters: weight"):
        ff.setup_model(rt, nn.LazyLinear(3))


def test_a_donated_module_is_taken_over(rt):
    module = nn.Linear(4, 1).double()
    weight = module.weight
    model = ff.setup_model(rt, module, donate=True)
    shared = rt.strategy.shard is None  # what is cut is copied
    assert (local_of(model.params["weight"]).data_ptr() == weight.data_ptr()) is shared
    _, grads = ff.value_and_grad(rt, lambda net, x: net(x).mean())(model, data(6, 4))
    torch.testing.assert_close(whole(grads.params["weight"]), data(6, 4).mean(0, keepdim=True))


def test_devices_of_modules():
    rt = ff.Runtime(
        world=ff.World(device=torch.device("meta")),
        precision=ff.Precision.parse(64),
        strategy=ff.strategies.single(),
    )
    module = nn.Linear(4, 1)
    assert ff.setup_model(rt, module).params["weight"].device.type == "meta"
    assert ff.setup_model(rt, module, move_to_device=False).params["weight"].device.type == "cpu"
    assert ff.init_module(rt, lambda: nn.Linear(4, 1)).weight.device.type == "meta"
    assert module.weight.device.type == "cpu"


def test_parameters_without_memory_are_refused(rt):
    with torch.device("meta"):
        module = nn.Linear(2, 2)
    if rt.strategy.shard is not None:  # they get their values when they are cut
        assert whole(ff.setup_model(rt, module).params["weight"]).isfinite().all()
        return
    with pytest.raises(ff.ModelError, match="init_module"):
        ff.setup_model(rt, module)


def test_tensors_on_two_devices_are_named(rt):
    model = ff.setup_model(rt, nn.Linear(4, 1))
    elsewhere = {"x": torch.ones(2, 4, device="meta"), "n": torch.ones(2)}

    def loss(net, batch, extra=None):
        return net(batch["x"]).mean()

    for call in (ff.value_and_grad(rt, loss), ff.value(rt, loss)):
        with pytest.raises(
            ff.ModelError, match=r"the model is on cpu.*: argument 0/x on meta\. Move them with ff\.to_d"
        ):
            call(model, elsewhere)
    with pytest.raises(ff.ModelError, match="argument 0 on meta, extra on meta"):
        ff.value_and_grad(rt, lambda net, x, *, extra: net(x).mean() + extra)(
            model, elsewhere["x"], extra=torch.ones((), device="meta")
        )
    with pytest.raises(ff.ModelError, match="argument 0 on meta"):
        ff.apply(rt, model, elsewhere["x"])
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        ff.apply(rt, model, torch.ones(2, 5))


def test_a_loss_must_be_a_scalar_and_depend_on_the_model(rt):
    model = ff.setup_model(rt, nn.Linear(4, 1))
    with pytest.raises(ff.GradientError, match=r"scalar tensor, found one of shape \(6, 1\)"):
        ff.value_and_grad(rt, lambda net: net(data(6, 4)))(model)
    with pytest.raises(ff.GradientError, match=r"found float\. Return the loss itself, without \.item"):
        ff.value_and_grad(rt, lambda net: 1.0)(model)
    with pytest.raises(ff.GradientError, match="does not depend on any trainable parameter"):
        ff.value_and_grad(rt, lambda net: data(6, 4).mean())(model)
    with pytest.raises(ff.GradientError, match=r"must return \(loss, aux\)"):
        ff.value_and_grad(rt, lambda net: net(data(6, 4)).mean(), has_aux=True)(model)


def test_unused_parameters_are_named_or_allowed(rt):
    model = ff.setup_model(rt, nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))
    part = lambda net: net[0](data(6, 4)).mean()  # noqa: E731
    with pytest.raises(ff.GradientError, match=r"2 parameters got no gradient: 1\.weight, 1\.bias"):
        ff.value_and_grad(rt, part)(model)
    if rt.strategy.name == "ddp":  # with find_unused_parameters it can; see test_ddp.py
        with pytest.raises(ff.CapabilityError):
            ff.value_and_grad(rt, part, allow_unused=True)
        return
    _, grads = ff.value_and_grad(rt, part, allow_unused=True)(model)
    assert grads.params["1.weight"] is None and grads.params["0.weight"] is not None
    ff.value_and_grad(rt, lambda net: net(data(6, 4)).mean())(model)


def test_exceptions_in_forward_and_backward_leave_a_whole_engine(rt):
    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            raise ValueError("in backward")

    model = ff.setup_model(rt, nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1)))
    good = ff.value_and_grad(rt, lambda net: net(data(6, 4)).mean())
    expected = good(model)[1]

    def raising(net):
        net(data(6, 4)).mean()
        raise KeyError("in forward")

    def late(net):
        return net[1](Fails.apply(net[0](data(6, 4)))).mean()

    for bad, kind in ((raising, KeyError), (late, ValueError)):
        with pytest.raises(kind):
            ff.value_and_grad(rt, bad)(model)
        for a, b in zip(good(model)[1].params.values(), expected.params.values(), strict=True):
            assert torch.equal(a, b)


def test_gradients_are_for_models_only(rt):
    with pytest.raises(ff.ConfigurationError, match=r"found Linear.*setup_model"):
        ff.value_and_grad(rt, lambda net: net)(nn.Linear(1, 1))
    with pytest.raises(ff.ConfigurationError, match="no micro-batch"):
        ff.accumulate(rt, loss_fn)(ff.setup_model(rt, fresh()), [])
    with pytest.raises(ff.ConfigurationError, match='"rank0", "mean" and "local"'):
        ff.value_and_grad(rt, loss_fn, buffers="max")


def test_weights_that_sum_to_zero_are_refused(rt):
    with pytest.raises(ff.GradientError, match="sum to zero"):
        ff.value_and_grad(rt, lambda net, x: (net(x).sum(), 0), weighted=True)(
            ff.setup_model(rt, nn.Linear(4, 1)), data(2, 4)
        )


def test_a_step_with_another_models_gradients_is_refused(rt):
    model, other = ff.setup_model(rt, nn.Linear(4, 1)), ff.setup_model(rt, nn.Linear(4, 2))
    opt = ff.setup_optimizer(rt, model, torch.optim.SGD, lr=0.1)
    _, grads = ff.value_and_grad(rt, lambda net, x: net(x).mean())(other, data(2, 4))
    with pytest.raises(ff.GradientError, match="belong to another model"):
        ff.optimizer_step(rt, model, opt, grads)
    with pytest.raises(ff.ConfigurationError, match=r"found Grads\. Write optimizer_step\(rt, models, opt, grads\)"):
        ff.optimizer_step(rt, model, grads, opt)


def test_a_persistent_buffer_that_changes_its_shape_is_refused(rt):
    class Grows(nn.Linear):
        def forward(self, x):
            self.cache = torch.cat([self.cache, x.detach()])
            return super().forward(x)

    module = Grows(4, 1)
    module.register_buffer("cache", torch.zeros(0, 4))
    with pytest.raises(ff.ModelError, match="persistent=False"):
        ff.value_and_grad(rt, lambda net, x: net(x).mean())(ff.setup_model(rt, module), data(2, 4))


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


# What a review by attack found


def test_parameters_kept_in_a_plain_list_get_their_gradients(rt):
    class Listed(nn.Linear):
        def __init__(self):
            super().__init__(4, 1)
            self.all = [self.weight]

        def forward(self, x):
            return super().forward(x) + x @ self.all[0].T

    module = Listed().double()
    if rt.strategy.name == "fsdp":
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


def test_a_hook_that_writes_into_the_losss_gradient_does_not_reach_the_next_call(rt):
    model = ff.setup_model(rt, nn.Linear(4, 1))

    def doubled(net, x):
        loss = net(x).mean()
        loss.register_hook(lambda grad: grad.mul_(2))
        return loss

    plain = ff.value_and_grad(rt, lambda net, x: net(x).mean())
    before = plain(model, data(2, 4))[1].params["weight"]
    torch.testing.assert_close(ff.value_and_grad(rt, doubled)(model, data(2, 4))[1].params["weight"], 2 * before)
    assert torch.equal(plain(model, data(2, 4))[1].params["weight"], before)


def test_a_weight_that_requires_grad_is_refused(rt):
    model = ff.setup_model(rt, nn.Linear(4, 1))
    with pytest.raises(ff.GradientError, match="must not require grad"):
        ff.value_and_grad(rt, lambda net, x: (net(x).sum(), net.weight.sum()), weighted=True)(model, data(2, 4))


def test_complex_losses_are_refused(rt):
    model = ff.setup_model(rt, nn.Linear(4, 1))
    with pytest.raises(ff.GradientError, match="complex"):
        ff.value_and_grad(rt, lambda net, x: net(x).sum() * 1j)(model, data(2, 4))


def test_gradients_within_the_callers_no_grad(rt):
    model = ff.setup_model(rt, nn.Linear(4, 1))
    grad_fn = ff.value_and_grad(rt, lambda net, x: net(x).mean())
    expected = grad_fn(model, data(2, 4))[1]
    with torch.no_grad():
        found = grad_fn(model, data(2, 4))[1]
        assert not torch.is_grad_enabled()
    assert torch.equal(found.params["weight"], expected.params["weight"])
    with torch.inference_mode():
        with pytest.raises(ff.GradientError, match="inference_mode"):
            grad_fn(model, data(2, 4))
        with pytest.raises(ff.ModelError, match="inference_mode"):
            ff.setup_model(rt, nn.Linear(4, 1))


def test_what_a_loss_does_to_flags_and_modes_is_undone(rt):
    model = ff.setup_model(rt, nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Linear(4, 1)))

    def freezes(net, x):
        net[0].requires_grad_(False)
        return net(x).mean()

    plain = ff.value_and_grad(rt, lambda net, x: (net(x).mean(), net.training), has_aux=True)
    if rt.strategy.name == "single":
        with pytest.raises(ff.GradientError, match=r"0\.weight, 0\.bias"):
            ff.value_and_grad(rt, freezes)(model, data(2, 4))
    assert plain(model, data(2, 4))[1].params["0.weight"] is not None
    ff.value_and_grad(rt, lambda net, x: net.eval()(x).mean())(model, data(2, 4))
    ff.apply(rt, model, data(2, 4), method=lambda net, x: net.eval()(x))
    (_, training), _ = plain(model, data(2, 4))
    assert training and ff.apply(rt, model, method=lambda net: net.training)


def test_what_apply_returns_keeps_its_values(rt):
    model = ff.setup_model(rt, nn.Linear(4, 1))
    taken = ff.apply(rt, model, method=lambda net: {"w": net.weight, "row": net.weight[0]})
    ff.apply(rt, ff.map_params(torch.zeros_like, model), data(2, 4))
    right = whole(model.params["weight"])
    assert torch.equal(taken["w"], right) and torch.equal(taken["row"], right[0])
    (_, aux), _ = ff.value_and_grad(rt, lambda net, x: (net(x).mean(), net.weight[0]), has_aux=True)(model, data(2, 4))
    ff.value_and_grad(rt, lambda net, x: net(x).mean())(ff.map_params(torch.zeros_like, model), data(2, 4))
    assert torch.equal(aux, right[0])


def test_constants_with_other_buffers_are_told_apart(rt):
    module = nn.Linear(4, 1)
    module.register_buffer("offset", torch.zeros(()))
    model = ff.setup_model(rt, module)
    moved = dataclasses.replace(model, buffers={"offset": torch.full((), 5.0, dtype=torch.float64)})
    offsets = ff.apply(rt, model, model, moved, method=lambda net, a, b: (a.offset.clone(), b.offset.clone()))
    assert [float(one) for one in offsets] == [0, 5]
    with pytest.raises(ff.ModelError, match="other buffers.*offset"):
        ff.apply(rt, dataclasses.replace(model, buffers={}), data(2, 4))


class Counts(nn.Linear):
    def forward(self, x):
        self.n = self.n + 1
        return super().forward(x)


def test_a_buffer_replaced_in_evaluation_mode_is_kept(rt):
    module = Counts(4, 1)
    module.register_buffer("n", torch.zeros(()))
    model = ff.eval_mode(ff.setup_model(rt, module))
    _, grads = ff.value_and_grad(rt, lambda net, x: net(x).mean())(model, data(2, 4))
    assert grads.new_buffers["n"] == 1


def test_state_that_no_record_holds_is_refused(rt):
    class Lazy(nn.Linear):
        def forward(self, x):
            self.state = x.detach().mean()
            return super().forward(x)

    module = Lazy(4, 1)
    module.register_buffer("state", None)
    with pytest.raises(ff.ModelError, match="was None when the module was set up"):
        ff.value_and_grad(rt, lambda net, x: net(x).mean())(ff.setup_model(rt, module), data(2, 4))


def test_hooks_on_parameters_are_refused(rt):
    module = nn.Linear(4, 1)
    module.weight.register_hook(lambda grad: 0 * grad)
    with pytest.raises(ff.ModelError, match="hooks of their own.*: weight"):
        ff.setup_model(rt, module)


def test_a_module_that_keeps_an_activation_can_be_copied_later(rt):
    class Keeps(nn.Linear):
        def forward(self, x):
            self.attention = super().forward(x)
            self.history = [self.attention]
            return self.attention

    model = ff.setup_model(rt, Keeps(4, 1))
    ff.value_and_grad(rt, lambda net, x: net(x).mean())(model, data(2, 4))
    assert ff.apply(rt, model, data(2, 4)).shape == (2, 1)
    assert ff.to_module(rt, model)(data(2, 4)).shape == (2, 1)


def test_nested_gradients_under_autocast_see_their_own_values(one_rank):
    rt = one_rank("single", "bf16-mixed")
    model = ff.setup_model(rt, nn.Linear(4, 1))
    zero = ff.map_params(torch.zeros_like, model)
    inner = ff.value_and_grad(rt, lambda net, x: net(x).float().square().mean())

    def outer(net, x):
        return net(x).float().mean(), (inner(model, x)[0], inner(zero, x)[0])

    (_, (a, b)), _ = ff.value_and_grad(rt, outer, has_aux=True)(model, data(2, 4).float())
    assert a > 0 and b == 0


def test_a_seed_is_no_key(rt):
    model = ff.setup_model(rt, nn.Linear(4, 1))
    with pytest.raises(ff.ConfigurationError, match=r"found int.*ff\.key\(seed\)"):
        ff.value_and_grad(rt, lambda net, x: net(x).mean())(model, data(2, 4), rng=1)
    with pytest.raises(ff.ConfigurationError, match=r"found int"):
        ff.apply(rt, model, data(2, 4), rng=1)


def test_a_model_is_data_and_says_so(rt):
    model = ff.setup_model(rt, nn.Linear(4, 1))
    with pytest.raises(AttributeError, match=r"no 'state_dict': it is data.*ff\.to_module"):
        model.state_dict()
