"""Saves beside the training, and processes that end, fork or die meanwhile."""

import contextlib
import os
import signal
import subprocess
import sys

import pytest
import torch

import fabricfn as ff
from tests.support.gates import ends, gates
from tests.support.runtimes import RT

nothing_is_left = ends()
gate = gates()


LOOPBACK = "lo0" if sys.platform == "darwin" else "lo"


def program(text, *args):
    """A Python program, begun."""
    text = "import os, sys, threading, torch, fabricfn as ff\n" + text
    environment = {"GLOO_SOCKET_IFNAME": LOOPBACK, **os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "error", "-c", text, *map(str, args)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


def ran(text, *args):
    """(status, what was written) of a program."""
    with program(text, *args) as process:
        said = process.communicate(timeout=100)[0]
    return process.returncode, said


LEAVING = """
import atexit
atexit.register(print, "other exit functions run")
folder, how = sys.argv[1:]
rt = ff.init_runtime(accelerator="cpu", devices=1)
leaving = threading.Event()

def late(done, total):
    leaving.wait()  # all but the first bytes are written when Python has begun to end
    if how == "fails":
        raise OSError("the disk is full")

tree = {"w": [torch.full((400_000,), 2.0) for _ in range(3)]}
ff.save(rt, folder + "/c", tree, blocking=False, progress=late)
threading._register_atexit(leaving.set)
if how == "raises":
    raise ZeroDivisionError
if how == "exits":
    sys.exit(3)
"""


@pytest.mark.parametrize(("how", "status"), [("raises", 1), ("exits", 3), ("fails", 1)])
def test_leaving_python_waits_for_the_save(tmp_path, how, status):
    code, said = ran(LEAVING, tmp_path, how)
    assert code == status, said
    assert "other exit functions run" in said
    assert ("the disk is full" in said) == (how == "fails"), said
    assert ("ZeroDivisionError" in said) == (how == "raises"), said
    if how == "fails":
        assert os.listdir(tmp_path) == []
    else:
        assert ff.load(RT, tmp_path / "c")["w"][2].sum() == 800_000
        ff.verify_checkpoint(tmp_path / "c")


AT_ONCE = """
def work(rt, folder, how):
    tree = {"w": [torch.full((400_000,), 2.0) for _ in range(3)]}
    ff.save(rt, folder + "/c", tree, blocking=False)
    if how == "raises":
        raise ZeroDivisionError

if __name__ == "__main__":
    if sys.argv[2] == "ends":
        work(ff.init_runtime(accelerator="cpu", devices=2), *sys.argv[1:])
    else:
        ff.launch(work, *sys.argv[1:], accelerator="cpu", devices=2)
"""


@pytest.mark.parametrize("how", ["ends", "returns", "raises"])
def test_ranks_that_end_at_once_save_to_the_end_and_those_that_fail_all_or_nothing(tmp_path, how):
    (tmp_path / "train.py").write_text("import sys, torch, fabricfn as ff\n" + AT_ONCE)
    process = subprocess.run([sys.executable, tmp_path / "train.py", tmp_path, how], check=False, capture_output=True,
                             text=True, timeout=100, env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip
    assert (process.returncode == 0) == (how != "raises"), process.stderr
    if how != "raises" or (tmp_path / "c").exists():  # ranks of a job that failed are ended within seconds
        assert sum(ff.load(RT, tmp_path / "c")["w"]).sum() == 2_400_000


FORKING = """
folder = sys.argv[1]
rt = ff.init_runtime(accelerator="cpu", devices=1)
reached, forked = threading.Event(), threading.Event()

def hold(done, total):
    reached.set()
    forked.wait()

saving = ff.save(rt, folder + "/c", {"w": torch.ones(2_000_000), "v": torch.ones(9)}, blocking=False, progress=hold)
reached.wait()
child = os.fork()
if child == 0:
    try:
        saving.wait()
    except ff.FabricfnError as error:
        print(error)
    ff.save(rt, folder + "/child", {"w": torch.zeros(5)}, blocking=False)
    sys.exit(7)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
forked.set()
"""


def test_a_forked_child_has_nothing_to_wait_for_and_can_save(tmp_path):
    code, said = ran(FORKING, tmp_path)
    assert code == 0, said
    assert "goes on in the process that began it" in said
    assert said.splitlines()[-1] == "7"
    for name in ("c", "child"):
        ff.verify_checkpoint(tmp_path / name)
    assert sorted(os.listdir(tmp_path)) == ["c", "child"]


def test_data_workers_are_forked_beside_a_save(tmp_path, gate):
    saving = ff.save(RT, tmp_path / "c", {"w": torch.ones(50)}, blocking=False, progress=gate)
    assert gate.reached.wait(60)
    loader = torch.utils.data.DataLoader(list(range(8)), num_workers=1, multiprocessing_context="fork")
    assert sum(int(batch) for batch in loader) == 28
    gate.open.set()
    saving.wait()


DYING = """
import datetime, signal, torch.distributed as dist
rank, folder = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2,
                        timeout=datetime.timedelta(seconds=60))
world = ff.World(rank=rank, world_size=2, local_rank=rank, local_world_size=2, group=dist.group.WORLD)
rt = ff.Runtime(world=world, precision=ff.Precision(), strategy=ff.strategies.ddp())
w = [torch.full((500_000,), 1.0) for _ in range(2)]
ff.save(rt, folder + "/c", {"w": w}, blocking=False).wait()
gone = threading.Event()
ff.barrier(rt)
saving = ff.save(rt, folder + "/c", {"w": [2 * t for t in w]}, blocking=False, progress=lambda done, total: gone.wait())
if rank == 1:
    os.kill(os.getpid(), signal.SIGKILL)
try:
    rt.world.group.barrier().wait()
except RuntimeError:
    gone.set()  # the other rank is dead
try:
    saving.wait()
except ff.CheckpointError as error:
    print("told:", error)
os._exit(0)
"""


def test_a_rank_that_dies_is_an_error_on_the_other_and_the_old_checkpoint_stands(tmp_path):
    with contextlib.ExitStack() as stack:
        both = [stack.enter_context(program(DYING, rank, tmp_path)) for rank in range(2)]
        said = both[0].communicate(timeout=100)[0]
    assert [each.returncode for each in both] == [0, -signal.SIGKILL], said
    assert "told: ff.save to" in said
    assert "the ranks lost each other (this is rank 0)" in said
    assert ff.load(RT, tmp_path / "c")["w"][1].sum() == 500_000
