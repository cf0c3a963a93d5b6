"""Saves beside the training: the copy that the call makes, and what waits until the save has ended."""

import signal
import threading

import numpy as np
import pytest
import torch

import fabricfn as ff
from fabricfn import errands
from fabricfn.checkpoint.format import manifest
from fabricfn.checkpoint.snapshots import snapshot
from tests.support.checkpoints import bits
from tests.support.gates import ends, gates
from tests.support.runtimes import RT

nothing_is_left = ends()
gate = gates()


DTYPES = [getattr(torch, name) for name in (*manifest.DTYPES, *manifest.RAW_DTYPES)]


@pytest.mark.filterwarnings("ignore:ComplexHalf")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_is_copied_bit_for_bit(tmp_path, dtype):
    size = torch.empty(0, dtype=dtype).element_size()
    data = torch.randint(0, 2 if dtype is torch.bool else 256, (24 * size,), dtype=torch.uint8)
    value = data.view(dtype).reshape(4, 6)
    tree = {
        "odd": torch.zeros(3, dtype=torch.uint8), "plain": value, "t": value.t(), "cut": value[1:3, ::2],
        "scalar": value[0, 0], "none": value[:0], "tied": value, "wide": value[:1].expand(3, 6),
    }  # fmt: skip
    if dtype.is_complex and dtype is not torch.complex32:
        tree |= {"conj": value.conj(), "neg": value.conj().imag}
    ff.save(RT, tmp_path / "a", tree)
    with torch.inference_mode():
        saving = ff.save(RT, tmp_path / "b", tree, blocking=False)
    saving.wait()
    assert bits(ff.load(RT, tmp_path / "b")) == bits(ff.load(RT, tmp_path / "a"))
    assert ff.save(RT, tmp_path / "b", tree, blocking=False).wait().path.exists()  # the memory of inference mode


def test_numpy_arrays_and_empty_trees_are_copied(tmp_path, gate):
    array = np.arange(12.0).reshape(3, 4)
    tree = {"first": torch.ones(9), "t": array.T, "number": np.float32(2.5), "none": np.zeros((0, 2))}
    expected = bits({**tree, "t": array.T.copy()})
    saving = ff.save(RT, tmp_path / "c", tree, blocking=False, progress=gate)
    array += 1
    gate.open.set()
    saving.wait()
    assert bits(ff.load(RT, tmp_path / "c")) == expected
    assert ff.load(RT, ff.save(RT, tmp_path / "e", {"n": 1}, blocking=False).wait().path) == {"n": 1}


def test_the_memory_of_the_copy_is_handed_on_and_given_back(tmp_path):
    """Fresh pages cost several copies: that is what the stall of a save would be."""

    def place(size):
        return ff.save(RT, tmp_path / "c", {"w": torch.ones(size)}, blocking=False).errand.kept.data_ptr()

    first = place(1000)
    assert place(1000) == place(10) == first
    assert place(5000) != first
    ff.save(RT, tmp_path / "c", {"w": torch.ones(5)})
    assert all(errand.world != RT.world for errand in errands._errands)


def test_a_buffer_is_taken_when_it_is_large_enough():
    copies, buffer = snapshot([torch.arange(3.0), None, np.arange(2)], None)
    assert [copy.tobytes() for copy in copies] == [torch.arange(3.0).numpy().tobytes(), b"", np.arange(2).tobytes()]
    assert snapshot([torch.ones(8)], buffer)[1] is buffer
    assert snapshot([torch.ones(800)], buffer)[1] is not buffer


# ---------------------------------------------------------------- until its end


def test_until_the_end_the_old_checkpoint_is_there(tmp_path, gate):
    ff.save(RT, tmp_path / "c", {"w": torch.zeros(5)})
    saving = ff.save(RT, tmp_path / "c", {"w": torch.ones(5)}, blocking=False, progress=gate)
    assert gate.reached.wait(60)
    assert not saving.done()
    assert ff.load(RT, ff.latest(tmp_path))["w"].sum() == 0
    assert "errand" not in repr(saving)
    gate.open.set()
    assert saving.wait().path == saving.path == tmp_path / "c"
    assert ff.load(RT, tmp_path / "c")["w"].sum() == 5


@pytest.mark.parametrize("blocking", [True, False])
def test_a_second_save_waits_for_the_first(tmp_path, gate, blocking):
    first = ff.save(RT, tmp_path / "a", {"w": torch.ones(5)}, blocking=False, progress=gate)
    assert gate.reached.wait(60)
    opener = threading.Timer(0.05, gate.open.set)
    opener.start()
    second = ff.save(RT, tmp_path / "b", {"w": torch.zeros(5)}, blocking=blocking)
    assert gate.open.is_set()
    assert first.done()
    if not blocking:
        second.wait()
    assert ff.load(RT, tmp_path / "b")["w"].sum() == 0
    opener.join()


def test_ctrl_c_ends_the_waiting_and_not_the_save(tmp_path, gate):
    caught = threading.Event()

    def handle(number, frame):
        caught.set()
        raise KeyboardInterrupt

    usual = signal.signal(signal.SIGINT, handle)

    def interrupt(done, total):
        gate.reached.wait(60)
        while not caught.wait(0.2):  # Python overlooks a signal that comes right before it begins to wait for a lock
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        gate(done, total)

    saving = ff.save(RT, tmp_path / "c", {"w": torch.ones(5)}, blocking=False, progress=interrupt)

    def wait():
        gate.reached.set()
        saving.wait()

    try:
        with pytest.raises(KeyboardInterrupt):
            wait()
    finally:
        signal.signal(signal.SIGINT, usual)
    assert not saving.done()
    gate.open.set()
    saving.wait()
    ff.verify_checkpoint(tmp_path / "c")
