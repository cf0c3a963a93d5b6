"""value_and_grad, value, accumulate on one process: what they give, and that no call reaches the next."""

import dataclasses

import pytest
import torch
from torch import nn

import fabricfn as ff
from fabricfn.sharding import whole
from tests.support.gradients import data, fresh, loss_fn


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


class Sum(nn.Module):
    """Autograd gives both parameters views of one tensor for gradients."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))

    def forward(self, x):
        return ((self.a.unsqueeze(0) + self.b.unsqueeze(0)) * x).sum()


def test_a_weighted_mean_divides_gradients_in_one_memory_once():
    single = ff.init_runtime(accelerator="cpu", devices=1)
    model = ff.setup_model(single, Sum())
    x = torch.tensor([[1.0, 2.0, 3.0]])
    _, plain = ff.value_and_grad(single, lambda net, x: net(x))(model, x)
    assert plain.params["a"].data_ptr() == plain.params["b"].data_ptr(), "the case that this is about"
    _, grads = ff.value_and_grad(single, lambda net, x: (net(x), 4), weighted=True)(model, x)
    assert {name: grad.tolist() for name, grad in grads.params.items()} == {
        "a": [0.25, 0.5, 0.75],
        "b": [0.25, 0.5, 0.75],
    }


def test_a_weighted_loss_of_other_tensors_gives_no_gradient():
    single = ff.init_runtime(accelerator="cpu", devices=1)
    model = ff.setup_model(single, nn.Linear(2, 1))
    outside = torch.ones(2, requires_grad=True)
    grad_fn = ff.value_and_grad(single, lambda net, x: ((outside * x).sum(), 4), weighted=True, allow_unused=True)
    loss, grads = grad_fn(model, torch.ones(2))
    assert loss.item() == 0.5 and set(grads.params.values()) == {None}


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


def test_nested_gradients_under_autocast_see_their_own_values(one_rank):
    rt = one_rank("single", "bf16-mixed")
    model = ff.setup_model(rt, nn.Linear(4, 1))
    zero = ff.map_params(torch.zeros_like, model)
    inner = ff.value_and_grad(rt, lambda net, x: net(x).float().square().mean())

    def outer(net, x):
        return net(x).float().mean(), (inner(model, x)[0], inner(zero, x)[0])

    (_, (a, b)), _ = ff.value_and_grad(rt, outer, has_aux=True)(model, data(2, 4).float())
    assert a > 0 and b == 0
