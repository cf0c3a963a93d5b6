"""The laws of `fabricfn.testing` over the table of strategies."""

import pytest
import torch
from hypothesis import given, strategies as st
from torch import nn
from torch.utils.data import DataLoader

import fabricfn as ff
from fabricfn import testing
from fabricfn.testing import cases
from tests.support.problems import loop, problem
from tests.support.worlds import few, world_of

ranks = world_of("threads", 4)
processes = world_of("processes", 2)

# A further strategy is a further row: everything below is held by it.
STRATEGIES = {
    "functional": ff.strategies.functional(),
    "flat": ff.strategies.flat(),
    "flat, many buckets": ff.strategies.flat(bucket_cap_mb=0.0001),
    "ddp": ff.strategies.ddp(),
    "ddp, many buckets": ff.strategies.ddp(bucket_cap_mb=0.0001),
    "ddp, bucket views": ff.strategies.ddp(gradient_as_bucket_view=True),
    "ddp, unused": ff.strategies.ddp(find_unused_parameters=True),
    "ddp, static graph": ff.strategies.ddp(static_graph=True),
    "ddp, sharded optimizer": ff.strategies.ddp(shard_optimizer=True),
    "flat_sharded": ff.strategies.flat_sharded(),
    "fsdp": ff.strategies.fsdp(),
    "fsdp, one unit": ff.strategies.fsdp(units=None),
    "fsdp, every layer": ff.strategies.fsdp(units=nn.Linear, reshard_after_forward=False),
    "fsdp, all options": ff.strategies.fsdp(
        cpu_offload=True, prefetch=1, ignored_params=lambda name, slot: slot.dim() == 1
    ),
}
ROWS = pytest.mark.parametrize("strategy", STRATEGIES.values(), ids=STRATEGIES)


# 1-4, 6: training


@ROWS
def test_the_whole_table(ranks, strategy):
    laws = ("purity", "equivalence", "donation", "accumulation", "resume")
    train = loop(batch_size=17)
    done = testing.check(train, laws, strategies=(strategy,), world_sizes=(1, 2, 3, 4), ranks=ranks)
    assert done == {"purity": 20, "equivalence": 30, "donation": 10, "accumulation": 30, "resume": 40}


@ROWS
@given(data=st.data())
@few(12)
def test_equivalence_for_any_module(ranks, strategy, data):
    case, size, number = data.draw(cases.problems()), data.draw(cases.world_sizes()), data.draw(cases.accumulations())
    train = testing.training_loop(case.module, case.loss_fn, case.batch, momentum=0.9, lr=0.05)
    testing.check_equivalence(
        train, accumulation=(number,), strategies=(strategy,), world_sizes=(size,), ranks=ranks, seed=size
    )


@ROWS
@pytest.mark.parametrize("buffers", ["rank0", "mean"])
def test_batch_statistics_are_pure_equal_on_all_ranks_and_resumed(ranks, strategy, buffers):
    train = loop("norm", buffers=buffers)
    testing.check(train, ("purity", "donation", "resume"), strategies=(strategy,), world_sizes=(3,), ranks=ranks)
    first, *others = ranks.run(train, strategy=strategy, precision="64-true")
    for other in others:
        assert testing.difference(other, first) is None
    assert first["buffers"]["1.num_batches_tracked"].item() == 3


@ROWS
def test_adam_obeys_the_laws_that_hold_bit_for_bit(ranks, strategy):
    train = testing.training_loop(*problem("tied"), torch.optim.AdamW, lr=1e-2, betas=(0.8, 0.9))
    laws = ("purity", "donation", "checkpoint")
    testing.check(train, laws, strategies=(strategy,), world_sizes=(1, 2), ranks=ranks)


def test_one_step_is_pure_and_leaves_its_inputs(ranks):
    module, loss_fn, batch = problem("tied")

    def make(rt):
        model = ff.setup_model(rt, module)
        return model, ff.setup_optimizer(rt, model, torch.optim.AdamW, lr=1e-3), batch

    def step(rt, model, opt, batch):
        loss, grads = ff.value_and_grad(rt, loss_fn)(model, *batch)
        return loss, grads, ff.optimizer_step(rt, model, opt, grads)

    assert testing.check_purity(step, make, ranks=ranks) == 2 * (1 + 5 * 10)


# 5: checkpoints


def test_checkpoints_between_all_strategies_and_world_sizes(ranks):
    module, _, _ = problem("tied")

    def make(rt):
        model = ff.setup_model(rt, module)
        opt = ff.setup_optimizer(rt, model, torch.optim.AdamW, lr=1e-3)
        ema = ff.map_params(lambda value: value / 2, model)
        _, grads = ff.value_and_grad(rt, lambda net: net(torch.ones(2, 5)).sum())(model)
        model, opt = ff.optimizer_step(rt, model, opt, grads)
        return {"nets": (model, ema), "opt": opt, "at": ff.Cursor(epoch=3, index=5), "plain": [0.1, 1, True, "x"]}

    assert testing.check_checkpoint(make, ranks=ranks) == 21 * (1 + 5 * 10)


@given(tree=cases.trees())
@few(40)
def test_checkpoints_of_any_tree(ranks, tree):
    testing.check_checkpoint(lambda rt: {"tree": tree}, ranks=ranks, world_sizes=(1, 3), strategies=("functional",))


# 7: data


@pytest.mark.filterwarnings("ignore::fabricfn.errors.UnevenBatchesWarning")
@given(data=st.data())
@few(25)
def test_data_come_exactly_once_in_an_order_of_their_own(ranks, data):
    size, batch_size = data.draw(st.integers(4, 40)), data.draw(st.integers(1, 5))
    shuffle = data.draw(st.booleans())

    def load(rt, epoch):
        loader = DataLoader(range(size), batch_size=batch_size, shuffle=shuffle)
        return ff.batches(rt, ff.setup_dataloader(rt, loader), epoch)

    testing.check_data(load, range(size), ranks=ranks)


# 8: collectives


def test_collectives_and_to_device_keep_trees(ranks):
    def make(rank, world_size):
        shared = torch.arange(3.0) + rank
        return {"a": [shared, shared], "n": torch.tensor([rank, 7]), "b": (torch.ones(2, 2, dtype=torch.bfloat16),)}

    def total(trees):
        return ff.tree_map(lambda *leaves: torch.stack(leaves).sum(0, dtype=leaves[0].dtype), *trees)

    for fn, oracle in (
        (lambda rt, tree: ff.all_reduce(rt, tree, op="sum"), total),
        (ff.broadcast, lambda trees: trees[0]),
        (ff.to_device, None),
    ):
        assert testing.check_collectives(fn, make, oracle, ranks=ranks) == 10


# The truth: real processes


def test_the_laws_hold_in_processes_too(processes):
    done = testing.check(loop(), ranks=processes, strategies=("functional", "ddp", "fsdp"), world_sizes=(2,))
    assert set(done) == set(testing.LAWS)


def test_dropout_is_pure_and_resumed_in_processes(processes):
    module = nn.Sequential(nn.Linear(5, 8), nn.Dropout(0.5), nn.Linear(8, 1)).double()
    train = testing.training_loop(cases.initialised(module, 0), cases.mean_square, problem("mlp")[2])
    laws = ("purity", "donation", "resume")
    testing.check(train, laws, ranks=processes, strategies=("functional", "ddp", "fsdp"), world_sizes=(2,))


# A loop of the user's own, and what the door says of it


def own_loop(rt):
    module, loss_fn, (x, y) = problem("layernorm", rows=24)
    model = ff.setup_model(rt, module)
    opt = ff.setup_optimizer(rt, model, torch.optim.SGD, lr=0.1)
    grad_fn = ff.value_and_grad(rt, loss_fn)
    for _ in range(2):
        _, grads = grad_fn(model, x.chunk(rt.world_size)[rt.rank], y.chunk(rt.world_size)[rt.rank])
        grads, norm = ff.clip_gradients(rt, grads, max_norm=0.1)
        model, opt = ff.optimizer_step(rt, model, opt, grads, donate=True)
    return {"params": ff.gather_params(rt, model), "norm": norm, "steps": opt.step}


def test_an_own_loop_is_checked_as_far_as_its_keywords_go(ranks):
    done = testing.check(own_loop, ranks=ranks, world_sizes=(1, 2, 3))
    assert done == {"purity": 62, "equivalence": 31, "checkpoint": 496}
    with pytest.raises(ff.errors.ConfigurationError, match="does not take donate"):
        testing.check(own_loop, ("donation",), ranks=ranks)
    with pytest.raises(ff.errors.ConfigurationError, match="no law 'speed'; there are purity, equivalence"):
        testing.check(own_loop, ("speed",), ranks=ranks)
    with pytest.raises(ff.errors.ConfigurationError, match="none of strategies"):
        testing.check(own_loop, ranks=ranks, strategies=("single",), world_sizes=(2,))
