"""Where the parts of checkpoints meet: what is saved can be loaded, ranks that differ are told."""

import os
import threading
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

import fabricfn as ff
from fabricfn import errands
from fabricfn.errors import CheckpointError, MismatchError
from tests.support.runtimes import RT
from tests.support.worlds import world_of

SPLIT = "\ud83d\ude00"


ranks = world_of("threads", 2)


UNREADABLE = [
    (SPLIT, "pair of surrogates"),
    ({SPLIT: 1, "\U0001f600": 2}, "has the key"),
    (torch.zeros([1] * 65), "Write value.flatten"),
    (torch.empty(0, 1 << 59), "Write value.flatten"),
    (np.zeros(3).view(np.recarray), r"a recarray cannot be stored. Write np.asarray\(value\)"),
]


@pytest.mark.parametrize(("value", "text"), UNREADABLE, ids=["text", "key", "dimensions", "length", "array"])
def test_what_no_load_would_give_back_is_not_saved(tmp_path, value, text):
    with pytest.raises(CheckpointError, match=text):
        ff.save(RT, tmp_path / "c", {"x": value})
    assert os.listdir(tmp_path) == []


def test_strange_texts_and_shapes_come_back(tmp_path):
    tree = {"\ud800": "a\udfff", "empty": torch.empty(0, 1 << 50), "many": torch.ones([1] * 64)}
    ff.save(RT, tmp_path / "c", tree)
    found = ff.load(RT, tmp_path / "c", tree)
    assert found["\ud800"] == "a\udfff"
    assert (found["empty"].shape, found["many"].shape) == (tree["empty"].shape, tree["many"].shape)


def test_long_integers_are_shown_and_are_no_metric(tmp_path):
    for step in range(3):
        ff.save(RT, tmp_path / f"step-{step}", {"state": -(1 << 20_000), "loss": 3.0 - step})
    assert f"state = {hex(-(1 << 20_000))}" in str(ff.inspect_checkpoint(tmp_path / "step-1"))
    removed = ff.prune_checkpoints(RT, tmp_path, last=1, best=1, metric="loss")
    assert [path.name for path in removed] == ["step-0", "step-1"]


def test_latest_says_that_a_damaged_one_was_put_aside_and_orders_it_by_its_time(tmp_path):
    for name in ("a", "b"):
        ff.save(RT, tmp_path / name, {"w": torch.ones(3)})
    aside = tmp_path / f".old-b-{'0' * 32}"
    os.rename(tmp_path / "b", aside)
    os.utime(tmp_path / "a/manifest.json", (1e9, 1e9))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ff.latest(tmp_path) == tmp_path / "b"
    os.truncate(aside / "data/r00000-000.safetensors", 5)
    with pytest.warns(UserWarning, match=r"falls back to .*/a\. .*has 5 bytes"):
        assert ff.latest(tmp_path) == tmp_path / "a"


def test_a_path_that_was_a_file_url_is_told_as_one(tmp_path):
    with pytest.raises(CheckpointError, match=f"'file://{tmp_path}/c'"):
        ff.save(RT, Path(f"file://{tmp_path}/c"), {"x": 1})


def test_other_files_are_found_by_a_file_url(tmp_path):
    net = torch.nn.Linear(2, 1)
    torch.save(net.state_dict(), tmp_path / "net.pt")
    loaded = ff.load_raw(RT, f"file://{tmp_path}/net.pt", ff.setup_model(RT, torch.nn.Linear(2, 1)))
    assert torch.equal(loaded.params["weight"], net.weight)


def calls_differ(rt, folder):
    messages: list[str] = []
    for options in ({"blocking": rt.rank == 0}, {"export": "hf" if rt.rank else None}):
        with pytest.raises(MismatchError) as caught:
            ff.save(rt, folder / "c", {"x": torch.ones(2)}, **options)
        messages.append(str(caught.value))
    return messages


def test_ranks_whose_calls_differ_are_told(tmp_path, ranks):
    for blocking, export in ranks.run(calls_differ, tmp_path, timeout=20):
        assert "blocking=: ranks 0 have True; ranks 1 have False" in blocking
        assert "export=: ranks 0 have None; ranks 1 have 'hf'" in export
    assert os.listdir(tmp_path) == []
    assert errands.finish_all() == []


def place_is_missing(rt, path):
    with pytest.raises(CheckpointError) as caught:
        ff.load_raw(rt, "memory://bucket/c" if rt.rank else path, {"x": torch.ones(1)})
    return str(caught.value)


def test_a_place_that_one_rank_cannot_open_is_an_error_on_all(tmp_path, ranks):
    torch.save({"x": torch.ones(1)}, tmp_path / "x.pt")
    for text in ranks.run(place_is_missing, tmp_path / "x.pt", timeout=20):
        assert "'memory://bucket/c' is a URL" in text


class Late:
    """A path; the first time that it is opened, another checkpoint takes the place before."""

    def __init__(self, path, other_has_opened):
        self.path, self.other_has_opened, self.asked = path, other_has_opened, 0

    def __fspath__(self):
        self.asked += 1
        if self.asked == 2:  # the first time is for messages
            assert self.other_has_opened.wait(20)
            ff.save(RT, self.path, {"x": 2})
        return str(self.path)


def loads_while_replaced(rt, folder, opened):
    def name(path):  # called when the checkpoint is open
        opened.set()
        return path

    path = Late(folder / "c", opened) if rt.rank else folder / "c"
    return ff.load(rt, path, rename=name if rt.rank == 0 else None)


def test_ranks_that_found_two_checkpoints_look_again(tmp_path, ranks):
    ff.save(RT, tmp_path / "c", {"x": 1})
    assert ranks.run(loads_while_replaced, tmp_path, threading.Event()) == [{"x": 2}, {"x": 2}]


def test_windows_that_overlap_cannot_be_filled(tmp_path):
    ff.save(RT, tmp_path / "c", {"x": torch.arange(6.0).view(2, 3)})
    with pytest.raises(CheckpointError, match=r"x: donate=True cannot fill a tensor whose elements share memory"):
        ff.load(RT, tmp_path / "c", {"x": torch.zeros(4).unfold(0, 3, 1)}, donate=True)
    for like in (torch.zeros(3, 2).t(), torch.zeros(2, 9)[:, ::3], torch.zeros(3, 1, 2).transpose(0, 2)[:, 0]):
        ff.load(RT, tmp_path / "c", {"x": like}, donate=True)
        assert like.flatten().tolist() == list(range(6))


class Held:
    """Work that takes a while to be let go of."""

    def __init__(self):
        self.begun, self.asked, self.gone = threading.Event(), threading.Event(), threading.Event()

    def work(self):
        begun, asked, gone = self.begun, self.asked, self.gone

        class Work:
            def __call__(self):
                assert begun.wait(20)

            def __del__(self):
                asked.wait(20)
                gone.set()

        return Work()


def test_the_end_of_a_save_is_the_end_of_its_thread():
    held = Held()
    errand = errands.begin(RT.world, "a save", held.work())
    held.begun.set()
    assert errand.ended.wait(20)
    threading.Timer(0.1, held.asked.set).start()
    assert errands.finish_all() == []
    assert held.gone.is_set(), "Python would end while the thread lets go of tensors, and abort"
