"""Pure and donated steps of optimizers: who keeps what, and what is spent."""

import dataclasses
import weakref

import optree
import pytest
import torch
from torch import nn

import fabricfn as ff
from fabricfn.errors import DonatedError, ModelError
from fabricfn.states import optimizer_to_tree
from tests.support.optimizers import assert_intact, functionally, grads_of, inputs, loss_fn, net, same, snapshot
from tests.support.runtimes import RT64


@pytest.mark.parametrize("cls", [torch.optim.AdamW, torch.optim.SGD, torch.optim.RMSprop])
def test_a_pure_step_leaves_its_inputs_as_they_are(cls):
    model = ff.setup_model(RT64, net())
    options = {"momentum": 0.9} if cls is torch.optim.SGD else {}
    model, opt = functionally(model, ff.setup_optimizer(RT64, model, cls, lr=0.1, **options), steps=1)
    grads = grads_of(model)
    before = snapshot(model, opt, grads)
    one, opt_one = ff.optimizer_step(RT64, model, opt, grads)
    two, opt_two = ff.optimizer_step(RT64, model, opt, grads)
    assert_intact(before, model, opt, grads)
    assert_intact(snapshot(one, opt_one), two, opt_two)
    ours = {tensor.data_ptr() for tensor in snapshot()} | {t.data_ptr() for t in optree.tree_leaves((model, opt))}
    assert not ours & {t.data_ptr() for t in optree.tree_leaves((one, opt_one))}


def test_donation_spends_all_three_and_says_where():
    model = ff.setup_model(RT64, net())
    opt = ff.setup_optimizer(RT64, model, torch.optim.AdamW, lr=0.1)
    grads = grads_of(model)
    new, new_opt = ff.optimizer_step(RT64, model, opt, grads, donate=True)
    fresh = grads_of(new)
    for arguments in ((model, new_opt, fresh), (new, opt, fresh), (new, new_opt, grads)):
        with pytest.raises(DonatedError, match=r"test_donated_steps\.py:\d+"):
            ff.optimizer_step(RT64, *arguments)
    with pytest.raises(DonatedError):
        optree.tree_map(torch.clone, opt)
    with pytest.raises(DonatedError):
        optimizer_to_tree(opt)
    ff.optimizer_step(RT64, new, new_opt, fresh)


def test_an_optimizer_that_shares_tensors_finds_out_in_both_directions():
    model = ff.setup_model(RT64, net())
    opt = ff.setup_optimizer(RT64, model, torch.optim.AdamW, lr=0.1)
    alias = optree.tree_map(lambda tensor: tensor, opt)
    copied = optree.tree_map(torch.clone, opt)
    grads = grads_of(model)
    mine = optree.tree_map(torch.clone, model)
    ff.optimizer_step(RT64, mine, opt, optree.tree_map(torch.clone, grads), donate=True)
    with pytest.raises(DonatedError, match="shares tensors"):
        ff.optimizer_step(RT64, model, alias, grads)
    again = optree.tree_map(lambda tensor: tensor, copied)
    ff.optimizer_step(RT64, optree.tree_map(torch.clone, model), again, grads, donate=True)
    with pytest.raises(DonatedError, match="shares tensors"):
        ff.optimizer_step(RT64, model, copied, grads_of(model))


def test_a_lineage_that_was_taken_apart_can_go_on_donating():
    model = ff.setup_model(RT64, net())
    opt = ff.setup_optimizer(RT64, model, torch.optim.AdamW, lr=0.1)
    first = optree.tree_map(lambda tensor: tensor, opt)
    for step in range(3):
        model, opt = ff.optimizer_step(RT64, model, opt, grads_of(model, step), donate=True)
        optree.tree_leaves(opt)
    assert opt.step == 3
    with pytest.raises(DonatedError):
        first.lease.check("Optimizer")


@pytest.mark.parametrize(
    ("cls", "options"),
    [(torch.optim.AdamW, {}), (torch.optim.SGD, {"momentum": 0.9}), (torch.optim.RMSprop, {})],
)
def test_leaves_that_were_kept_over_donated_steps_are_found_out_when_they_are_stepped(cls, options):
    model = ff.setup_model(RT64, net())
    opt = ff.setup_optimizer(RT64, model, cls, lr=0.1, **options)
    optree.tree_leaves(opt)  # before momentum has its buffers
    for _ in range(2):
        model, opt = ff.optimizer_step(RT64, model, opt, grads_of(model), donate=True)
    leaves, spec = optree.tree_flatten(opt, namespace="")
    for step in range(3):
        model, opt = ff.optimizer_step(RT64, model, opt, grads_of(model, step), donate=True)
    stale = optree.tree_unflatten(spec, leaves)  # made after the steps: it is not to blame, and may go on alone
    other = optree.tree_map(torch.clone, model)
    ff.optimizer_step(RT64, other, stale, grads_of(model), donate=True)
    with pytest.raises(DonatedError, match="shares tensors"):
        ff.optimizer_step(RT64, model, opt, grads_of(model))


def test_a_failing_step_leaves_pure_inputs_and_spends_donated_ones():
    class Failing(torch.optim.SGD):
        def step(self, closure=None):
            super().step(closure)
            raise ArithmeticError("in the middle")

    model = ff.setup_model(RT64, net())
    opt = ff.setup_optimizer(RT64, model, Failing, lr=0.1)
    grads = grads_of(model)
    before = snapshot(model, grads)
    with pytest.raises(ArithmeticError):
        ff.optimizer_step(RT64, model, opt, grads)
    assert_intact(before, model, grads)
    with pytest.raises(ArithmeticError):
        ff.optimizer_step(RT64, model, opt, grads, donate=True)
    with pytest.raises(DonatedError):
        ff.optimizer_step(RT64, model, opt, grads)


def test_after_a_failing_donated_step_no_record_over_the_tensors_goes_on():
    class Failing(torch.optim.SGD):
        def step(self, closure=None):
            with torch.no_grad():
                self.param_groups[0]["params"][0].data.add_(1.0)  # as a kernel: no version tells of it
            raise ArithmeticError("in the middle")

    for bound in (0, 1):
        model = ff.setup_model(RT64, net())
        opt = ff.setup_optimizer(RT64, model, Failing, lr=0.1)
        grads = grads_of(model)
        records = model, ff.tree_map(lambda tensor: tensor, model)
        grads_of(records[bound])
        with pytest.raises(ArithmeticError):
            ff.optimizer_step(RT64, model, opt, grads, donate=True)
        for record in records:
            with pytest.raises(DonatedError):
                grads_of(record)
        assert not model.lease.frames
        assert all(frame.owner is None for frame in model.ref.engine.frames)


def test_the_same_model_twice_cannot_be_donated():
    model = ff.setup_model(RT64, net())
    opt = ff.setup_optimizer(RT64, [model, model], torch.optim.SGD, lr=0.1)
    grads = grads_of(model)
    with pytest.raises(ModelError, match="twice"):
        ff.optimizer_step(RT64, [model, model], opt, [grads, grads], donate=True)


def test_parameters_that_share_memory_cannot_be_donated():
    model = ff.setup_model(RT64, net())
    grads = grads_of(model)
    pair = model, ff.tree_map(torch.detach, model)
    opt = ff.setup_optimizer(RT64, pair, torch.optim.SGD, lr=0.1)
    with pytest.raises(ModelError, match=r"0\.weight and 0\.weight share memory"):
        ff.optimizer_step(RT64, pair, opt, (grads, grads), donate=True)
    pure, _ = ff.optimizer_step(RT64, pair, opt, (grads, grads))
    donated, _ = ff.optimizer_step(RT64, ff.tree_map(torch.clone, pair), opt, (grads, grads), donate=True)
    assert_intact(snapshot(pure), donated)
    sgd = ff.setup_optimizer(RT64, model, torch.optim.SGD)
    once, _ = ff.optimizer_step(RT64, model, sgd, grads_of(model), donate=True)
    grads = grads_of(once)
    pair = once, ff.tree_map(torch.detach, once)
    opt = ff.setup_optimizer(RT64, pair, torch.optim.SGD)
    with pytest.raises(ModelError, match="share memory"):
        ff.optimizer_step(RT64, pair, opt, (grads, grads), donate=True)
    model = ff.map_params(torch.clone, once)
    tensor = model.params["0.weight"]
    tied = dataclasses.replace(model, params={**model.params, "0.weight": tensor, "1.weight": tensor})
    with pytest.raises(ModelError, match=r"0\.weight and 1\.weight share memory"):
        ff.optimizer_step(RT64, tied, ff.setup_optimizer(RT64, tied, torch.optim.SGD), grads_of(tied), donate=True)


def test_frozen_and_empty_parameters_that_share_memory_can_be_donated():
    module = nn.ModuleList([nn.Linear(2, 2).requires_grad_(False), nn.Linear(2, 2)])
    module.append(nn.ParameterDict({"weight": torch.ones(0)}))
    model = ff.setup_model(RT64, module.double())

    def loss(models):
        return sum(one[1](one[0](torch.ones(1, 2, dtype=torch.float64))).sum() + one[2].weight.sum() for one in models)

    other = ff.map_params(torch.clone, model)
    other = dataclasses.replace(other, params={**other.params, "0.weight": model.params["0.weight"]})
    opt = ff.setup_optimizer(RT64, (model, other), torch.optim.SGD, lr=0.1)
    _, grads = ff.value_and_grad(RT64, loss)((model, other))
    after, _ = ff.optimizer_step(RT64, (model, other), opt, grads, donate=True)
    assert after[0].params["0.weight"] is after[1].params["0.weight"]


def test_frozen_parameters_are_left_out_and_shared():
    module = net()
    module[0].requires_grad_(False)
    model = ff.setup_model(RT64, module)
    opt = ff.setup_optimizer(RT64, model, torch.optim.AdamW, lr=0.1)
    assert set(opt.state) == {"1.weight", "1.bias"}
    after, opt = ff.optimizer_step(RT64, model, opt, grads_of(model))
    assert after.params["0.weight"] is model.params["0.weight"]
    before = snapshot(model)
    donated, opt = ff.optimizer_step(RT64, after, opt, grads_of(after), donate=True)
    assert_intact(before, model)
    model.lease.check("Model")  # the pure step's input is not condemned by what happened to its successor
    reference = torch.optim.AdamW(module[1].parameters(), lr=0.1, fused=True)
    for found in (model, after):
        assert torch.equal(found.params["0.bias"], module[0].bias)
    for _ in range(2):
        module.zero_grad()
        loss_fn(module, inputs(0)).backward()
        reference.step()
    same(donated, [param.detach() for param in module.parameters()])


def test_pure_steps_of_a_part_share_nothing_that_a_later_step_overwrites():
    model = ff.setup_model(RT64, net())
    first = ff.setup_optimizer(RT64, model, torch.optim.SGD, params="0.*", lr=0.1)
    second = ff.setup_optimizer(RT64, model, torch.optim.SGD, params="1.*", lr=0.1)
    grads = grads_of(model)
    before = snapshot(model)
    after, _ = ff.optimizer_step(RT64, model, first, grads)
    ff.optimizer_step(RT64, after, second, grads, donate=True)
    assert_intact(before, model)


def test_the_optimizer_keeps_no_model_alive():
    model = ff.setup_model(RT64, net())
    kept = [ff.setup_optimizer(RT64, model, cls, params="0.weight") for cls in (torch.optim.AdamW, torch.optim.RMSprop)]
    independent = optree.tree_map(torch.clone, model)
    watched = weakref.ref(independent.params["0.weight"])
    opts = [ff.setup_optimizer(RT64, independent, cls) for cls in (torch.optim.AdamW, torch.optim.RMSprop)]
    del independent
    assert watched() is None
    assert len(kept) == len(opts)
