"""Binding and donation: which uses of a record are refused, and which are right."""

import copy
import dataclasses
import pickle

import optree
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fabricfn as ff
from fabricfn.sharding import whole


def net(width=4, depth=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    module = nn.Sequential(*[nn.Linear(width, width) for _ in range(depth)]).double()
    for param in module.parameters():
        nn.init.normal_(param, generator=generator)
    return module


X = torch.randn(8, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def loss_fn(net, x=X):
    return net(x).square().mean()


def oracle(model, x=X):
    """Plain autograd at the model's values."""
    module = net(depth=len(model.params) // 2)
    module.load_state_dict({name: whole(value) for name, value in model.params.items()})
    loss_fn(module, x).backward()
    return [param.grad for param in module.parameters()]


def assert_right(rt, model):
    _, grads = ff.value_and_grad(rt, loss_fn)(model)
    for found, expected in zip(grads.params.values(), oracle(model), strict=True):
        torch.testing.assert_close(whole(found), expected, rtol=0, atol=1e-13)


@pytest.fixture
def model(rt):
    return ff.setup_model(rt, net())


def donated_step(rt, model, opt=None):
    opt = ff.setup_optimizer(rt, model, torch.optim.SGD, lr=0.1) if opt is None else opt
    _, grads = ff.value_and_grad(rt, loss_fn)(model)
    return (*ff.optimizer_step(rt, model, opt, grads, donate=True), grads)


def test_the_old_record_is_refused_and_the_message_says_where_it_was_given_away(rt, model):
    new, opt, grads = donated_step(rt, model)
    for use in (
        lambda: ff.value_and_grad(rt, loss_fn)(model),
        lambda: ff.apply(rt, model, X),
        lambda: ff.to_module(rt, model),
        lambda: ff.map_params(torch.neg, model),
        lambda: ff.gather_params(rt, model),
    ):
        with pytest.raises(ff.DonatedError, match=r"donate=True at test_leases\.py:\d+"):
            use()
    with pytest.raises(ff.DonatedError, match=r"donate=True at test_leases\.py:\d+"):
        ff.optimizer_step(rt, new, opt, grads)
    assert_right(rt, new)


@pytest.mark.parametrize("alias", [ff.eval_mode, lambda m: optree.tree_map(lambda leaf: leaf, m), dataclasses.replace])
def test_an_alias_of_a_donated_record_is_refused(rt, model, alias):
    other = alias(model)
    new, _, _ = donated_step(rt, model)
    with pytest.raises(ff.DonatedError):
        ff.apply(rt, other, X)
    assert_right(rt, new)


def test_the_original_is_refused_after_its_identity_copy_was_donated(rt, model):
    new, _, _ = donated_step(rt, optree.tree_map(lambda leaf: leaf, model))
    with pytest.raises(ff.DonatedError, match="shares tensors"):
        ff.apply(rt, model, X)
    assert_right(rt, new)


@pytest.mark.parametrize(
    "copied",
    [
        lambda m: optree.tree_map(torch.clone, m),
        lambda m: ff.map_params(lambda a: 0.5 * a, m),
        copy.deepcopy,
    ],
)
def test_independent_copies_live_on_and_train(rt, model, copied):
    other = copied(model)
    new, _, _ = donated_step(rt, model)
    assert_right(rt, other)
    assert_right(rt, new)
    trained, _, _ = donated_step(rt, other)
    assert_right(rt, trained)
    assert_right(rt, new)


def test_evaluating_another_record_between_donated_steps_changes_no_bits(rt):
    def train(evaluate):
        model = ff.setup_model(rt, net())
        opt = ff.setup_optimizer(rt, model, torch.optim.AdamW, lr=0.1)
        ema = ff.map_params(torch.clone, model)
        for _ in range(4):
            model, opt, _ = donated_step(rt, model, opt)
            ema = ff.map_params(lambda a, b: 0.9 * a + 0.1 * b, ema, model)
            if evaluate:
                ff.apply(rt, ema, X)
                ff.value_and_grad(rt, loss_fn)(ema)
        return model

    for a, b in zip(train(False).params.values(), train(True).params.values(), strict=True):
        assert torch.equal(a, b)


def test_gradients_at_arbitrary_values_are_right(rt, model):
    perturbed = ff.map_params(lambda a: a + 0.1 * a.sign(), model)  # SAM's ascent
    assert_right(rt, perturbed)
    assert_right(rt, model)
    assert_right(rt, perturbed)


def test_a_change_in_place_by_the_user_is_found_once_others_were_bound(rt, model):
    other = ff.map_params(torch.clone, model)
    model.params["0.weight"].mul_(2)
    ff.value_and_grad(rt, loss_fn)(other)
    with pytest.raises(ff.DonatedError, match="changed in place"):
        ff.value_and_grad(rt, loss_fn)(model)


def test_binding_while_a_graph_is_open_makes_its_backward_fail(rt, model):
    kept = []

    def leak(net):
        kept.append(F.layer_norm(net(X), (4,), net[0].weight[0], net[0].bias).square().sum())
        return loss_fn(net)

    ff.value_and_grad(rt, leak)(model)
    ff.value_and_grad(rt, loss_fn)(ff.map_params(torch.neg, model))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        kept[0].backward()


def test_a_donated_step_under_an_open_graph_makes_its_backward_fail(rt, model):
    kept = []
    opt = ff.setup_optimizer(rt, model, torch.optim.AdamW, lr=0.1)

    def leak(net):
        kept.append((net[0].weight * net(X).sum()).sum())
        return loss_fn(net)

    _, grads = ff.value_and_grad(rt, leak)(model)
    ff.optimizer_step(rt, model, opt, grads, donate=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        kept[0].backward()


def test_graphs_through_apply_survive_other_binds(rt, model):
    x = X.clone().requires_grad_()
    out = ff.apply(rt, model, x)
    ff.apply(rt, ff.map_params(torch.neg, model), X)
    out.square().mean().backward()
    y = X.clone().requires_grad_()
    module = ff.to_module(rt, model)
    loss_fn(module, y).backward()
    torch.testing.assert_close(x.grad, y.grad)


@pytest.mark.parametrize("change", [torch.Tensor.half, lambda t: torch.cat([t, t])])
def test_other_dtypes_and_shapes_are_refused(rt, model, change):
    mapped = ff.tree_map(change, model)
    with pytest.raises(ff.ModelError, match=r"0\.weight of this Model is"):
        ff.apply(rt, mapped, X)


def test_other_names_are_refused(rt, model):
    wrong = dataclasses.replace(model, params={"other": torch.zeros(1)})
    with pytest.raises(ff.ModelError, match=r"other names.*other"):
        ff.apply(rt, wrong, X)


def test_values_in_another_order_are_put_in_order(rt, model):
    shuffled = dataclasses.replace(model, params=dict(reversed(model.params.items())))
    assert torch.equal(ff.apply(rt, shuffled, X), ff.apply(rt, model, X))


def test_replace_with_other_values_is_not_taken_for_the_old_ones(rt, model):
    ff.apply(rt, model, X)
    zero = dataclasses.replace(model, params={name: torch.zeros_like(v) for name, v in model.params.items()})
    assert not ff.apply(rt, zero, X).any()


def test_leaves_may_be_anything_until_they_are_bound(rt, model):
    shapes = optree.tree_map(lambda leaf: tuple(leaf.shape), model)
    assert shapes.params["0.weight"] == (4, 4)


def test_params_cannot_be_assigned(model):
    with pytest.raises(TypeError):
        model.params["0.weight"] = torch.zeros(4, 4)
    with pytest.raises(dataclasses.FrozenInstanceError):
        model.params = {}


def test_models_of_two_engines_combine(rt, model):
    other = ff.setup_model(rt, net(seed=5))
    total = optree.tree_map(torch.add, model, ff.eval_mode(other))
    assert total.training == model.training
    assert torch.equal(total.params["0.bias"], model.params["0.bias"] + other.params["0.bias"])
    assert_right(rt, total)
    with pytest.raises(ValueError):
        optree.tree_map(torch.add, model, ff.setup_model(rt, net(depth=2)))


def test_identity_equality_and_hash(model):
    assert model == model and model != copy.copy(model) and len({model, model}) == 1  # noqa: PLR0124


def test_pickle_carries_values_and_says_what_is_missing(rt, model):
    back = pickle.loads(pickle.dumps(model))
    assert all(torch.equal(back.params[name], value) for name, value in model.params.items())
    pickle.dumps(optree.tree_structure(model))
    with pytest.raises(ff.ModelError, match=r"dataclasses\.replace"):
        ff.apply(rt, back, X)
    revived = dataclasses.replace(model, params=back.params, buffers=back.buffers)
    assert torch.equal(ff.apply(rt, revived, X), ff.apply(rt, model, X))


def test_grads_add_without_touching_statistics(rt):
    model = ff.setup_model(rt, nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).double())
    _, grads = ff.value_and_grad(rt, loss_fn)(model)
    total = optree.tree_map(torch.add, grads, grads)
    assert torch.equal(total.params["0.bias"], 2 * grads.params["0.bias"])
    assert total.new_buffers == grads.new_buffers and len(optree.tree_leaves(grads)) == 4


def test_torch_pytree_sees_the_leaves(model):
    assert len(torch.utils._pytree.tree_leaves(model)) == 6


def test_a_frame_of_its_own_for_each_record_of_one_engine_in_a_loss(rt, model):
    teacher = ff.map_params(torch.neg, model)

    def distil(student, teacher):
        return (student(X) - teacher(X)).square().mean()

    _, grads = ff.value_and_grad(rt, distil)(model, teacher)
    plain, fixed = ff.to_module(rt, model), ff.to_module(rt, teacher).requires_grad_(False)
    distil(plain, fixed).backward()
    for found, param in zip(grads.params.values(), plain.parameters(), strict=True):
        torch.testing.assert_close(whole(found), param.grad, rtol=0, atol=1e-13)
    both = ff.value_and_grad(rt, lambda nets: distil(nets["a"], nets["b"]))({"a": model, "b": teacher})[1]
    torch.testing.assert_close(both["a"].params["0.bias"], grads.params["0.bias"], rtol=0, atol=1e-13)
    assert whole(both["b"].params["0.bias"]).abs().sum() > 0


@pytest.mark.parametrize("strategy", ff.strategies.NAMES)
def test_a_second_record_of_the_engine_is_not_answered_from_the_autocast_cache(one_rank, strategy):
    rt = one_rank(strategy, "bf16-mixed")
    model = ff.setup_model(rt, net().float())
    zero = ff.map_params(torch.zeros_like, model)
    seen = {}

    def both(student, teacher, x):
        seen["student"], seen["teacher"] = student(x).detach(), teacher(x)
        return student(x).float().square().mean()

    ff.value_and_grad(rt, both)(model, zero, X.float())
    assert seen["student"].any() and not seen["teacher"].any()


def test_an_alias_that_was_never_bound_is_donated_and_the_bound_original_finds_out(rt, model):
    opt = ff.setup_optimizer(rt, model, torch.optim.SGD, lr=0.1)
    alias = optree.tree_map(lambda leaf: leaf, model)
    _, grads = ff.value_and_grad(rt, loss_fn)(model)
    new, _ = ff.optimizer_step(rt, alias, opt, grads, donate=True)
    for use in (
        lambda: ff.value_and_grad(rt, loss_fn)(model),
        lambda: ff.optimizer_step(rt, model, opt, grads),
        lambda: ff.apply(rt, model, X),
    ):
        with pytest.raises(ff.DonatedError):
            use()
    assert_right(rt, new)


@pytest.mark.parametrize(
    "use",
    [copy.deepcopy, pickle.dumps, ff.eval_mode, ff.train_mode, lambda m: optree.tree_map(torch.clone, m)],
)
def test_copying_too_late_is_refused(rt, model, use):
    donated_step(rt, model)
    with pytest.raises(ff.DonatedError, match=r"donate=True at test_leases\.py"):
        use(model)


def test_a_teacher_computes_in_the_middle_of_a_loss(rt, model):
    """Binding another record does not touch the versions that the graph under way has seen."""

    def loss(net, teacher):
        out = net(X) * net[0].weight.sum()
        return (out - ff.apply(rt, teacher, X)).square().mean()

    for factor in (0.5, 0.25):
        teacher = ff.map_params(lambda a, factor=factor: factor * a, model)
        _, grads = ff.value_and_grad(rt, lambda net, one=teacher: loss(net, one))(model)
        plain, fixed = ff.to_module(rt, model), ff.to_module(rt, teacher)
        (plain(X) * plain[0].weight.sum() - fixed(X).detach()).square().mean().backward()
        torch.testing.assert_close(whole(grads.params["0.weight"]), plain[0].weight.grad, rtol=0, atol=1e-12)
