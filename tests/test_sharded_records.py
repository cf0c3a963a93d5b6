"""Records whose leaves are DTensors: states that come back, several models, and changes that are found out."""

import copy
import dataclasses

import pytest
import torch
from torch import optim
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import Partial

import fabricfn as ff
from fabricfn.leases import Lease
from fabricfn.sharding import is_sharded, local_of
from fabricfn.states import optimizer_from_tree, optimizer_to_tree
from tests.support.dtensors import Net, assert_equal, grads_of, line, numbers, setup, split, train, whole
from tests.support.runtimes import RT64
from tests.support.worlds import world_of

ranks = world_of("threads", 4)


def watched(rt):
    tensor = split(line(rt), numbers(0))["tall"]
    for change in (
        lambda: tensor.mul_(2),
        lambda: local_of(tensor).mul_(2),
        lambda: tensor.detach().mul_(2),
        lambda: local_of(tensor.data).mul_(2),
    ):
        lease = Lease({"tall": tensor})
        lease.check("Model")
        change()
        with pytest.raises(ff.DonatedError, match="changed in place"):
            lease.check("Model")
    return True


def test_a_change_in_place_of_a_dtensor_or_of_its_part_is_seen(ranks):
    ranks.run(watched, world_size=2)


def open_graph(rt):
    """A graph that saved the parameter must fail after a donated step, not give the gradient at other values."""
    mesh = line(rt)
    model = setup(mesh)
    state = ff.setup_optimizer(RT64, model, optim.SGD, lr=0.1)
    x = distribute_tensor(torch.ones(37, 5, dtype=torch.float64), mesh, [Shard(0)], src_data_rank=None)
    y = model.params["tall"] * x.requires_grad_()
    ff.optimizer_step(RT64, model, state, grads_of(model, numbers(1), mesh), donate=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward(torch.ones_like(y))
    return True


def test_an_open_graph_over_a_dtensor_fails_after_a_donated_step(ranks):
    ranks.run(open_graph, world_size=2)


@pytest.mark.parametrize("opt", [optim.AdamW, optim.NAdam, optim.SGD])
def test_the_state_is_a_tree_of_dtensors_and_comes_back(ranks, opt):
    ranks.run(round_trip, opt, {"momentum": 0.9} if opt is optim.SGD else {}, world_size=3)


def round_trip(rt, opt, options):
    mesh = line(rt)
    params, state = train(opt, options, mesh, steps=2)
    model = dataclasses.replace(setup(mesh), params=dict(params))
    fresh = ff.setup_optimizer(RT64, setup(mesh), opt, **options)
    tree = optimizer_to_tree(state)
    cut = {"whole": {**tree, "state": whole(tree["state"])}, "dtensors": tree}
    copies = {name: optimizer_from_tree(fresh, made) for name, made in cut.items()}
    copies |= {"copied": ff.tree_map(torch.clone, state), "deep": copy.deepcopy(state)}
    grads = grads_of(model, numbers(9), mesh)
    expected, there = ff.optimizer_step(RT64, model, state, grads)
    for value in (value for row in copies["whole"].state.values() for value in row.values() if is_sharded(value)):
        part = local_of(value)  # and not a view of the whole tensor
        assert part.untyped_storage().nbytes() == part.numel() * part.element_size()
    for made in copies.values():
        torch.testing.assert_close(whole(made.state), whole(state.state), rtol=0, atol=0)
        after, then = ff.optimizer_step(RT64, model, made, grads)
        assert_equal(after.params, whole(dict(expected.params)))
        torch.testing.assert_close(whole(then.state), whole(there.state), rtol=0, atol=0)
    leaves = torch.utils._pytree.tree_leaves(state)
    assert {type(leaf) for leaf in leaves if leaf.ndim} == {DTensor, torch.Tensor}
    slot = next(slot for slot, value in tree["state"]["tall"].items() if is_sharded(value))
    for wrong in (
        tree["state"]["tall"][slot].redistribute(placements=[Replicate()]),
        local_of(tree["state"]["tall"][slot]),
    ):
        rows = {**tree["state"], "tall": {**tree["state"]["tall"], slot: wrong}}
        with pytest.raises(ff.errors.ConfigurationError, match=f"{slot} of tall .*redistribute"):
            optimizer_from_tree(fresh, {**tree, "state": rows})
    terms = ff.tree_map(
        lambda x: DTensor.from_local(local_of(x), mesh, [Partial()], run_check=False) if is_sharded(x) else x, state
    )
    with pytest.raises((ff.FabricfnError, RuntimeError)):
        ff.optimizer_step(RT64, model, terms, grads)
    return True


def frozen(rt):
    mesh = line(rt)
    module = Net(torch.float64)
    module.tall.requires_grad_(False)
    model = ff.setup_model(RT64, module)
    model = dataclasses.replace(model, params=split(mesh, model.params))
    state = ff.setup_optimizer(RT64, model, optim.AdamW)
    values = {**numbers(1), "tall": None}
    twin = ff.tree_map(lambda value: value.detach() if is_sharded(value) else value.clone(), model)
    still = Lease({"tall": model.params["tall"]})
    pure, _ = ff.optimizer_step(RT64, model, state, grads_of(model, values, mesh))
    assert_equal({"tall": pure.params["tall"]}, {"tall": numbers(0)["tall"]})
    after, _ = ff.optimizer_step(RT64, model, state, grads_of(model, values, mesh), donate=True)
    assert_equal(after.params, whole(dict(pure.params)))
    still.check("frozen values")
    with pytest.raises(ff.DonatedError):
        twin.lease.check("Model")
    return True


def test_frozen_parameters_stay_and_the_others_are_found_out(ranks):
    ranks.run(frozen, world_size=2)


def trees(rt):
    """Two models in one optimizer, whose parameters have the same names."""
    mesh = line(rt)
    results = []
    for where in (None, mesh):
        models = {"a": setup(where), "b": [setup(where)]}
        grads = {"a": grads_of(models["a"], numbers(1), where), "b": [grads_of(models["a"], numbers(2), where)]}
        for opt, options in ((optim.NAdam, {}), ((start_momenta, momenta), {"elementwise": True})):
            state = ff.setup_optimizer(RT64, models, opt, **options)
            for donate in (False, True):
                start, own = ff.tree_map(torch.clone, (models, state))
                after, then = ff.optimizer_step(RT64, start, own, ff.tree_map(torch.clone, grads), donate=donate)
                tree = optimizer_to_tree(then)
                results.append(whole((dict(after["a"].params), dict(after["b"][0].params), then.state)))
                torch.testing.assert_close(whole(optimizer_from_tree(state, tree).state), results[-1][2])
    for mine, there in zip(results[4:], results[:4], strict=True):
        torch.testing.assert_close(mine, there, rtol=0, atol=0)
    return True


def start_momenta(params):
    return ff.tree_map(torch.zeros_like, params)


def momenta(grads, state, params):
    state = ff.tree_map(lambda m, g: 0.9 * m + g, state, grads)
    return ff.tree_map(lambda m: -0.1 * m, state), state


def test_several_models_in_one_optimizer(ranks):
    ranks.run(trees, world_size=3)
