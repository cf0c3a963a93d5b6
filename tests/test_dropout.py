"""Keys decide every mask of dropout, whatever ran before, and whatever is recomputed."""

import dataclasses

import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st

import fabricfn as ff
from tests.support.generators import CHECKPOINTS, data, dropout_net, generators_put_back, same

put_back = generators_put_back()
STRATEGIES = {"single": ff.strategies.single, "ddp": ff.strategies.ddp, "functional": ff.strategies.functional}


def mean_square(net, x):
    return net(x).square().mean()


@pytest.mark.parametrize(("strategy", "checkpointed"), CHECKPOINTS)
def test_recomputed_activations_are_dropped_alike(one_rank, strategy, checkpointed):
    rt = one_rank(strategy)
    (plain_loss, plain), (loss, grads) = (
        ff.value_and_grad(rt, mean_square)(ff.setup_model(rt, dropout_net(kind)), data(), rng=ff.key(5))
        for kind in (None, checkpointed)
    )
    assert torch.equal(loss, plain_loss) and same(grads.params, plain.params)
    other, _ = ff.value_and_grad(rt, mean_square)(ff.setup_model(rt, dropout_net()), data(), rng=ff.key(6))
    assert other != loss


@pytest.mark.parametrize("strategy", STRATEGIES)
@given(ran=st.lists(st.sampled_from(["step", "seed", "draw", "apply", "value", "failure"]), max_size=4))
@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_masks_are_a_function_of_the_key_whatever_ran_before(one_rank, strategy, ran):
    rt = one_rank(strategy)
    model = ff.setup_model(rt, dropout_net())
    grad_fn = ff.value_and_grad(rt, mean_square)
    expected, grads = grad_fn(model, data(), rng=ff.fold_in(ff.key(0), 7))
    for what in ran:
        if what == "step":
            grad_fn(model, data(3), rng=ff.fold_in(ff.key(0), 6))
        elif what == "seed":
            ff.seed_everything(1)
        elif what == "draw":
            torch.randn(3)
        elif what == "apply":
            ff.apply(rt, model, data(), rng=ff.key(1))
        elif what == "value":
            ff.value(rt, mean_square)(model, data(2))
        else:
            with pytest.raises(RuntimeError):
                grad_fn(model, torch.ones(1, 3), rng=ff.key(2))
    again, grads_again = grad_fn(model, data(), rng=ff.fold_in(ff.key(0), 7))
    assert torch.equal(again, expected) and same(grads_again.params, grads.params)


def test_apply_under_a_key_inside_a_loss_leaves_the_masks_around_it_alone(one_rank):
    rt = one_rank()
    model, teacher = ff.setup_model(rt, dropout_net()), ff.setup_model(rt, dropout_net())

    def loss_fn(net, x, inside):
        first = net(x)
        target = ff.apply(rt, teacher, x, rng=ff.key(9)) if inside else 0.0
        second = net(x)
        return (first * second).mean(), (first.detach(), second.detach(), target)

    grad_fn = ff.value_and_grad(rt, loss_fn, has_aux=True)
    (_, without), _ = grad_fn(model, data(), False, rng=ff.key(1))
    (_, within), _ = grad_fn(model, data(), True, rng=ff.key(1))
    assert torch.equal(without[0], within[0]) and torch.equal(without[1], within[1])
    assert not torch.equal(within[0], within[1])
    assert torch.equal(within[2], ff.apply(rt, teacher, data(), rng=ff.key(9)))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_teacher_with_dropout_draws_from_the_same_key(one_rank, strategy):
    rt = one_rank(strategy)
    model = ff.setup_model(rt, dropout_net())
    teacher = ff.map_params(torch.clone, model)

    def distance(net, target, x):
        return (net(x) - target(x)).square().mean()

    grad_fn = ff.value_and_grad(rt, distance)
    loss, grads = grad_fn(model, teacher, data(), rng=ff.key(1))
    assert loss > 0, "the two have equal values and masks of their own"
    again, grads_again = grad_fn(model, teacher, data(), rng=ff.key(1))
    assert torch.equal(loss, again) and same(grads.params, grads_again.params)
    calm, _ = grad_fn(ff.eval_mode(model), ff.eval_mode(teacher), data(), rng=ff.key(1))
    assert calm == 0


def test_a_key_of_another_runtime_record_is_just_a_key(one_rank):
    rt = one_rank()
    model = ff.setup_model(rt, dropout_net())
    other = dataclasses.replace(rt, seed=99)
    assert torch.equal(
        ff.apply(rt, model, data(), rng=ff.key(4)), ff.apply(other, model, data(), method="forward", rng=ff.key(4))
    )
