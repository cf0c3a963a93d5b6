"""Real processes, started by hand with a launcher's variables, join as it would start them."""

import json
import os
import socket
import subprocess
import sys

import pytest

import fabricfn as ff
from fabricfn.environments import Topology
from fabricfn.errors import ConfigurationError
from tests.support.launchers import OMPI, SLURM
from tests.support.starts import LOOPBACK, PROGRAMS, free_port

pytestmark = pytest.mark.timeout(120)


def join(folder, *environs):
    """What joining.py told, started by hand once for each environment."""
    words = [sys.executable, "joining.py"]
    common = {**os.environ, "FACTS": str(folder), "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(words, cwd=PROGRAMS, env={**common, **environ}, stderr=subprocess.PIPE, text=True)
        for environ in environs
    ]
    errors = [rank.communicate(timeout=90)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0] * len(ranks), errors
    return [json.loads((folder / f"rank-{rank}").read_text()) for rank in range(len(ranks))]


def test_processes_started_by_hand_join_as_slurm_would_start_them(tmp_path):
    one = {**SLURM, "SLURM_JOB_ID": str(os.getpid()), "SLURM_NODELIST": "127.0.0.[1-2]", "SLURM_NTASKS": "2"}
    one |= {"SLURM_NTASKS_PER_NODE": "1", "SLURM_STEP_TASKS_PER_NODE": "1(x2)", "SLURM_LOCALID": "0"}
    facts = join(tmp_path, *({**one, "SLURM_PROCID": str(task), "SLURM_NODEID": str(task)} for task in range(2)))
    assert [fact["sum"] for fact in facts] == [[3.0], [3.0]]
    assert [(fact["environment"], fact["place"]) for fact in facts] == [
        ("slurm", [0, 1, 0, 2]),
        ("slurm", [0, 1, 1, 2]),
    ]


def test_processes_started_by_hand_join_as_mpirun_would_start_them_and_listen_to_nobody_else(tmp_path):
    one = {**OMPI, "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_SIZE": "2", "PMIX_NAMESPACE": str(tmp_path)}
    ranks = [{"OMPI_COMM_WORLD_RANK": str(rank), "OMPI_COMM_WORLD_LOCAL_RANK": str(1 - rank)} for rank in range(2)]
    facts = join(tmp_path, *({**one, **rank} for rank in ranks))
    assert [(fact["sum"], fact["environment"]) for fact in facts] == [([3.0], "mpi")] * 2
    assert [fact["place"] for fact in facts] == [[1, 2, 0, 1], [0, 2, 0, 1]]
    for fact in facts:
        assert fact["listens"]
        assert set(fact["listens"]) <= LOOPBACK


def test_processes_started_by_hand_join_as_kubeflow_would_start_them(tmp_path):
    one = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    facts = join(tmp_path, *({**one, "RANK": str(rank)} for rank in range(2)))
    assert [(fact["sum"], fact["environment"]) for fact in facts] == [([3.0], "kubeflow")] * 2
    assert [fact["place"] for fact in facts] == [[0, 1, 0, 2], [0, 1, 1, 2]]


def test_ranks_that_do_not_know_where_to_meet_say_so():
    nowhere = Topology(name="mine", world_size=2, rank=1, num_nodes=2)
    with pytest.raises(ConfigurationError, match="not where they meet"):
        ff.init_runtime(accelerator="cpu", environment=nowhere)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        mine = Topology(name="mine", world_size=2, rank=0, num_nodes=1, main_port=taken.getsockname()[1])
        with pytest.raises(ConfigurationError, match="that port cannot be had"):
            ff.init_runtime(accelerator="cpu", environment=mine)
