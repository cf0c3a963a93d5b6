"""What carries a loss scale along: records, copies, checkpoints."""

import copy
import dataclasses
import pickle

import torch

import fabricfn as ff
from fabricfn.tree import tree_leaves
from tests.support.scales import DONATE, assert_same, batch, net, runtime, squares, values


def test_records_carry_the_scale_and_trees_have_no_leaf_of_it():
    rt = runtime()
    model = ff.setup_model(rt, net())
    newer = dataclasses.replace(model, loss_scale=ff.LossScale(scale=2.0, good_steps=7))
    assert len(tree_leaves(newer)) == len(model.params) + len(model.buffers)
    assert ff.tree_map(torch.clone, newer).loss_scale is newer.loss_scale
    assert ff.tree_map(lambda a, b: a, model, newer).loss_scale is model.loss_scale
    assert ff.train_mode(ff.eval_mode(newer)).loss_scale is newer.loss_scale
    ema = ff.map_params(lambda a, b: (a + b) / 2, model, newer)
    assert ema.loss_scale == newer.loss_scale
    for copied in (pickle.loads(pickle.dumps(newer)), copy.deepcopy(newer)):
        assert copied.loss_scale == newer.loss_scale
    _, grads = ff.value_and_grad(rt, squares)(newer, batch())
    for copied in (pickle.loads(pickle.dumps(grads)), ff.tree_map(torch.clone, grads), copy.deepcopy(grads)):
        assert copied.loss_scale == newer.loss_scale


ODD = ff.LossScale(scale=0.1 + 0.2, good_steps=1234)


@DONATE
def test_it_is_saved_and_loaded_bit_for_bit(tmp_path, donate):
    rt = runtime()
    model = dataclasses.replace(ff.setup_model(rt, net()), loss_scale=ODD)
    _, grads = ff.value_and_grad(rt, squares)(model, batch())
    before = values(model)
    ff.save(rt, tmp_path / "last", {"model": model, "grads": grads})
    like = {"model": ff.setup_model(rt, net(5)), "grads": grads}
    loaded = ff.load(rt, tmp_path / "last", like, donate=donate)
    assert_same(values(loaded["model"]), before)
    assert loaded["model"].loss_scale == loaded["grads"].loss_scale == ODD
    assert ff.load(rt, tmp_path / "last")["model"]["loss_scale"] == {"scale": ODD.scale, "good_steps": 1234}


@DONATE
def test_a_checkpoint_fits_models_of_every_precision(tmp_path, donate):
    """Only a model that has a loss scale has a place for one: it keeps its own where the checkpoint has none."""
    mixed, plain = runtime(), runtime(None)
    with_scale = dataclasses.replace(ff.setup_model(mixed, net()), loss_scale=ODD)
    without = ff.setup_model(plain, net())
    ff.save(mixed, tmp_path / "with", {"model": with_scale})
    ff.save(plain, tmp_path / "without", {"model": without})
    for rt, name, expected in ((plain, "with", None), (mixed, "without", ff.LossScale(scale=65536.0))):
        like = {"model": ff.setup_model(rt, net(5))}
        found = ff.load(rt, tmp_path / name, like, donate=donate)["model"]
        assert found.loss_scale == expected
        assert_same(values(found), values(without))
    like = {"model": ff.setup_model(mixed, net(5))}
    missing = ff.load(mixed, tmp_path / "without", like, strict=False).missing
    assert missing == ("model/loss_scale",)
    like = {"model": ff.setup_model(plain, net(5))}
    rest = ff.load(plain, tmp_path / "with", like, remainder=True).rest
    assert rest == {"model": {"loss_scale": {"scale": ODD.scale, "good_steps": 1234}}}
