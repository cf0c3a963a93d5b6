"""Hooks are given what their signatures take; progress shows on rank 0 and changes nothing."""

import dataclasses
import itertools
import sys
import warnings

import pytest

import fabricfn as ff
from fabricfn.errors import ConfigurationError


class Full:
    def on_end(self, rt, epoch, results=None):
        return rt.rank, epoch, results


class Some:
    def on_end(self, results):
        return results


class Any:
    def on_end(self, **kwargs):
        return kwargs


class Row:
    def on_end(self, *args, **kwargs):
        return args, kwargs


class Other:
    def on_start(self):
        return "start"


def on_end(epoch):
    return epoch + 1


def called(callbacks, *args, **kwargs):
    with ff.runtime(devices=1, accelerator="cpu", callbacks=callbacks) as rt:
        return ff.call(rt, *args, **kwargs)


def test_each_hook_is_given_what_its_signature_takes():
    everyone = [Full(), Some(), Any(), Row(), Other(), on_end]
    assert called(everyone, "on_end", epoch=2, results=[1]) == [
        (0, 2, [1]), [1], {"epoch": 2, "results": [1]}, ((), {"epoch": 2, "results": [1]}), 3,
    ]  # fmt: skip
    assert called([Full(), Row(), on_end], "on_end", 2) == [(0, 2, None), ((2,), {}), 3]
    assert called([Full()], "on_end", 2, results="r") == [(0, 2, "r")]
    assert called([Other()], "on_end") == [] == called([], "on_end")


def test_a_missing_argument_is_named_with_the_hook():
    with pytest.raises(ConfigurationError, match=r"'on_end' of .*Some.* needs .*'results'; the call has 'epoch'"):
        called([Some()], "on_end", epoch=3)


def test_errors_of_hooks_are_their_own():
    def on_end():
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        called([on_end], "on_end")


@pytest.mark.parametrize("slip", ["on_edn", "on_ends", "o_end", "on_emd"])
def test_a_slip_is_warned_about(slip):
    with pytest.warns(UserWarning, match=f"no '{slip}' in .*which has 'on_end'"):
        assert called([Some(), Other()], slip) == []


def test_other_hooks_are_no_slips():
    class Many:
        def on_train_batch_end(self):
            return 1

        def on_train_batch_start(self):
            return 2

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert called([Many()], "on_train_batch_end") == [1]
        assert called([Many()], "on_val_batch_end") == []
        assert called([Many()], "on_train_epoch_end") == []


def shown(rank, capsys):
    rt = ff.init_runtime(devices=1, accelerator="cpu")
    rt = dataclasses.replace(rt, world=dataclasses.replace(rt.world, rank=rank, world_size=2))
    items = list(ff.progress(rt, iter(range(3)), total=3, desc="epoch 1", values=lambda: {"loss": 0.5}, every=0.0))
    return items, capsys.readouterr().err


def test_lines_are_shown_on_rank_0_and_the_items_are_the_same(capsys):
    ranks = [shown(rank, capsys) for rank in (0, 1)]
    assert [items for items, _ in ranks] == [[0, 1, 2]] * 2
    assert ranks[1][1] == ""
    lines = ranks[0][1].splitlines()
    assert [line.split(" in ")[0] for line in lines] == [
        f"epoch 1: {n}/3 ({p}%)" for n, p in ((1, 33), (2, 67), (3, 100), (3, 100))
    ]
    assert all(line.endswith("loss=0.5") for line in lines)


def test_a_bar_in_a_terminal(monkeypatch, capsys):
    rt = ff.init_runtime(devices=1, accelerator="cpu")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert list(ff.progress(rt, range(5), desc="epoch 1", values=lambda: {"loss": 0.5})) == list(range(5))
    assert "epoch 1: 100%" in capsys.readouterr().err


def test_a_loop_that_is_left_tells_how_far_it_came(capsys):
    rt = ff.init_runtime(devices=1, accelerator="cpu")
    for item in ff.progress(rt, itertools.count(), desc="steps"):
        if item == 4:
            break
    assert capsys.readouterr().err.startswith("steps: 4 in ")
