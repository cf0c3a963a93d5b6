"""Random numbers of several ranks: masks go with the micro-batches, and the states of all ranks are saved."""

import pytest
import torch

import fabricfn as ff
from tests.support.generators import CHECKPOINTS, data, draws, dropout_net, generators_put_back, same
from tests.support.runtimes import RT64
from tests.support.worlds import world_of

put_back = generators_put_back()
ranks = world_of("processes", 4)


def each_rank_goes_on(rt, folder):
    ff.seed_everything(10 + rt.rank)
    draws()
    ff.save(rt, folder, {"random": ff.all_gather(rt, ff.random_state())})
    expected = draws()
    like = ff.all_gather(rt, ff.random_state())
    rows = ff.load(rt, folder, like={"random": like})["random"]
    ff.set_random_state(ff.tree_map(lambda states: states[rt.rank], rows))
    return draws() == expected, expected


def test_the_states_of_all_ranks_are_saved_by_gathering_them(ranks, tmp_path):
    found = ranks.run(each_rank_goes_on, tmp_path / "ranks", world_size=2, strategy="ddp")
    assert [same for same, _ in found] == [True, True]
    assert found[0][1] != found[1][1], "the ranks had numbers of their own"


def squares(net, x):
    return net(x).square().sum(), len(x)


def masked_step(rt, micro_per_rank, whole, checkpointed=None):
    """The gradient and the masks of a global batch of four micro-batches, cut contiguously over ranks."""
    model = ff.setup_model(rt, dropout_net(checkpointed))
    mine = whole.chunk(4)[rt.rank * micro_per_rank : (rt.rank + 1) * micro_per_rank]

    def loss_fn(net, x):
        with seeded_like_the_loss():
            mask = torch.rand(6)
        total, weight = squares(net, x)
        return (total, weight), mask

    key = ff.fold_in(ff.key(1), 2)
    (loss, masks), grads = ff.accumulate(rt, loss_fn, has_aux=True, weighted=True)(model, [(x,) for x in mine], rng=key)
    result = {"loss": loss, "grads": dict(grads.params), "masks": masks}
    if micro_per_rank == 1:
        (_, mask), one = ff.value_and_grad(rt, loss_fn, has_aux=True, weighted=True)(model, mine[0], rng=key)
        result["alone"] = {"mask": mask, "grads": dict(one.params)}
        result["value"] = ff.value(rt, squares, weighted=True)(model, mine[0], rng=key)
    return result


class seeded_like_the_loss:
    """What is drawn here is undone, so that the masks of the net stay those it has without looking."""

    def __enter__(self):
        self.state = torch.get_rng_state()

    def __exit__(self, *_):
        torch.set_rng_state(self.state)


@pytest.mark.parametrize(("strategy", "checkpointed"), [("ddp", None), ("functional", None), *CHECKPOINTS[2:]])
def test_masks_depend_on_the_micro_batch_and_not_on_how_the_ranks_share_them(ranks, strategy, checkpointed):
    whole = data(12)
    oracle = masked_step(RT64, 4, whole)
    assert len({tuple(mask.tolist()) for mask in oracle["masks"]}) == 4, "each micro-batch has masks of its own"
    for world_size in (1, 2, 4):
        options = {"strategy": strategy, "precision": 64, "world_size": world_size}
        found = ranks.run(masked_step, 4 // world_size, whole, checkpointed, **options)
        masks = [mask for one in found for mask in one["masks"]]
        assert torch.equal(torch.stack(masks), torch.stack(oracle["masks"]))
        for result in found:
            torch.testing.assert_close(result["grads"], oracle["grads"], rtol=0, atol=1e-14)
            torch.testing.assert_close(result["loss"], oracle["loss"], rtol=1e-15, atol=0)
        if world_size == 4:
            for result, mask in zip(found, oracle["masks"], strict=True):
                assert torch.equal(result["alone"]["mask"], mask)
                assert same(result["alone"]["grads"], result["grads"])
                assert torch.equal(result["value"], result["loss"])
