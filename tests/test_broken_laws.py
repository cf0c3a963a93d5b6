"""The laws of `fabricfn.testing` can fail, and say where; the cases they are tried on are what they say."""

import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, strategies as st

import fabricfn as ff
from fabricfn import testing
from fabricfn.testing import cases
from tests.support.problems import loop, problem
from tests.support.worlds import few, world_of

ranks = world_of("threads", 4)


# Each law can fail, and says where


def unsynchronised(rt, *, accumulation=1):
    module, loss_fn, batch = problem("mlp", rows=24)
    rows = torch.arange(24).chunk(rt.world_size)[rt.rank]
    loss_fn(module := ff.to_module(rt, ff.setup_model(rt, module)), *(part[rows] for part in batch)).backward()
    return {"grads": {name: parameter.grad * accumulation for name, parameter in module.named_parameters()}}


def test_equivalence_fails_where_gradients_are_not_synchronised(ranks):
    message = (
        r"law of equivalence is broken under strategy 'ddp' on 2 ranks, rank 0, accumulation 1: grads/\S+ differs by up"
        r" to 0\.\d+ \(.*\); expected a tolerance of 1e-11, compared with single on the whole batch"
    )
    with pytest.raises(AssertionError, match=message):
        testing.check_equivalence(unsynchronised, strategies=("ddp",), world_sizes=(2,), ranks=ranks)


def test_accumulation_fails_where_micro_batches_are_summed(ranks):
    with pytest.raises(AssertionError, match=r"law of accumulation .* on 1 rank, rank 0, accumulation 2: grads/"):
        testing.check_accumulation(unsynchronised, ranks=ranks)


def test_purity_fails_on_hidden_state_and_on_changed_inputs(ranks):
    calls = iter(range(100))
    with pytest.raises(AssertionError, match="law of purity .* rank 0: count differs by up to 1 "):
        testing.check_purity(lambda rt: {"count": next(calls)}, ranks=ranks, world_sizes=(1,))

    def step(rt, tree):
        return tree["w"].add_(tree["w"] * 0).neg() if rt.rank == 0 else tree["w"].mul_(2).neg() * 0

    with pytest.raises(AssertionError, match=r"on 2 ranks, rank 1: the function changed its input at 0/w by up to 3"):
        testing.check_purity(step, lambda rt: ({"w": torch.ones(2)},), ranks=ranks, world_sizes=(2,))


def test_donation_fails_where_it_changes_a_bit(ranks):
    def train(rt, donate=False):
        return {"zero": torch.zeros(2) * (-1 if donate else 1)}

    with pytest.raises(AssertionError, match=r"law of donation .*: zero differs by up to 0 \(-0.0 instead of 0.0"):
        testing.check_donation(train, ranks=ranks)


def test_checkpoint_fails_where_ranks_hold_different_values(ranks):
    def make(rt):
        return {name: torch.full((4,), float(rt.rank)) for name in "ab"}

    with pytest.raises(
        AssertionError, match=r"law of checkpoints .*: [ab] differs by up to 1 .* what strategy 'ddp' on 2"
    ):
        testing.check_checkpoint(make, ranks=ranks, world_sizes=(2,), strategies=("ddp",))


def test_resume_fails_where_state_is_lost(ranks):
    right = loop()

    def forgets(rt, *, folder=None, stop=None):
        """Goes on from the parameters, but starts the momentum anew."""
        result = right(rt, folder=folder, stop=stop)
        if folder is not None and stop is None:
            model = ff.setup_model(rt, problem("mlp")[0])
            opt = ff.setup_optimizer(rt, model, torch.optim.SGD, lr=0.1, momentum=0.9)
            model = ff.load(rt, f"{folder}/last", like={"model": model})["model"]
            _, grads = ff.value_and_grad(rt, cases.mean_square)(model, *problem("mlp")[2])
            model, _ = ff.optimizer_step(rt, model, opt, grads)
            return {**result, "params": ff.gather_params(rt, model)}
        return result

    with pytest.raises(
        AssertionError, match=r"law of resume .* for 1 steps, then .*: params/.* compared with no inter"
    ):
        testing.check_resume(forgets, ranks=ranks, strategies=("functional",), world_sizes=(1,))
    with pytest.raises(AssertionError, match="saved nothing"):
        testing.check_resume(lambda rt, folder=None, stop=None: {}, ranks=ranks)


@pytest.mark.parametrize(
    ("load", "match"),
    [
        (lambda rt, epoch: torch.arange(12).split(3), "0 samples never come, 12 too often, of 12"),
        (lambda rt, epoch: torch.arange(rt.rank, 12, rt.world_size).split(2), "global order differs .* at row 1"),
        (lambda rt, epoch: torch.arange(12).chunk(2)[rt.rank : 1].__iter__(), "different numbers of steps|never come"),
        (lambda rt, epoch: [torch.arange(12)] * (rt.world_size - rt.rank), r"numbers of steps, \[2, 1\]"),
    ],
)
def test_data_laws_fail(ranks, load, match):
    with pytest.raises(AssertionError, match=match):
        testing.check_data(load, range(12), ranks=ranks, world_sizes=(2,))


def test_collective_laws_fail(ranks):
    def make(rank, world_size):
        shared = torch.ones(2) * (rank + 1)
        return {"a": shared, "b": shared}

    def in_place(rt, tree):
        dist.all_reduce(tree["a"], group=rt.world.group)
        return ff.tree_map(torch.clone, tree)

    for fn, options, match in (
        (in_place, {}, "2 ranks, rank 0: the input was changed at a: 3.0 instead of 1.0"),
        (lambda rt, tree: [tree["a"], tree["b"]], {}, "the structure changed"),
        (lambda rt, tree: ff.tree_map(torch.Tensor.double, tree), {}, "a was torch.float32 and is torch.float64"),
        (lambda rt, tree: ff.tree_map(torch.clone, tree), {}, "tensors that were one are not one any more"),
        (lambda rt, tree: tree, {"oracle": lambda trees: trees[1]}, r"rank 0: a differs by up to 1 \(1.0 instead of 2"),
    ):
        with pytest.raises(AssertionError, match=match):
            testing.check_collectives(fn, make, ranks=ranks, world_sizes=(2,), **options)


def test_differences_are_found_and_named():
    nan, tensor = float("nan"), torch.tensor
    same = [
        (tensor([nan, 1.0]), tensor([nan, 1.0])),
        ({"a": None, "b": [1, "x", nan]}, {"a": None, "b": [1, "x", nan]}),
        (torch.ones(0, 3), torch.ones(0, 3)),
    ]
    for found, expected in same:
        assert testing.difference(found, expected) is None
        assert testing.difference(found, expected, 1e-3) is None
    different = [
        (tensor([nan]), tensor([1.0])),
        (tensor([1]), tensor([1.0])),
        (torch.ones(2), torch.ones(2, 1)),
        ({"a": 1}, {"b": 1}),
        ([1], (1,)),
        (1, True),
        (1.0, 2.0),
        ("x", "y"),
        (tensor([1.0, float("inf")]), tensor([1.0, 2.0])),
    ]
    for found, expected in different:
        assert testing.difference(found, expected, 1e-3) is not None
        assert testing.difference(found, expected) is not None
    worst = testing.difference(
        {"a": tensor([1.0, 2.0]), "b": tensor([5.0])}, {"a": tensor([1.0, 5.0]), "b": tensor([6.0])}
    )
    assert (worst.path, worst.largest) == ("a", 3.0)
    assert testing.difference(tensor([1000.0]), tensor([1000.5]), 1e-3) is None


# Cases


@given(case=cases.problems(), total=st.integers(4, 20), parts=st.integers(1, 4), data=st.data())
@few(25)
def test_cases_are_what_they_say(case, total, parts, data):
    x, y = case.batch
    assert len(x) == len(y) >= 16
    assert case.loss_fn(case.module, x, y).dtype is torch.float64
    sizes = data.draw(cases.splits(total, parts))
    assert (len(sizes), sum(sizes)) == (parts, total)
    assert min(sizes) > 0


def test_cases_leave_the_global_generators_alone():
    state = torch.get_rng_state()
    first, again = (cases.filled((3,), torch.float64, 5) for _ in range(2))
    assert torch.equal(first, again)
    assert torch.equal(torch.get_rng_state(), state)


def test_without_hypothesis_only_cases_are_missing():
    code = """if True:
        import sys
        sys.modules["hypothesis"] = None
        from fabricfn import testing
        assert testing.run(lambda rt: rt.rank) == [0, 1]
        try:
            import fabricfn.testing.cases
        except ImportError as error:
            assert "fabricfn[testing]" in str(error), error
        else:
            raise SystemExit("cases were imported")
    """
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
