"""Who started this process: pure tables of the variables that launchers set, and real processes that join by them."""

import contextlib
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, strategies as st

import fabricfn as ff
from fabricfn.accelerators import Choice
from fabricfn.environments import DETECTORS, Topology, find, lsf, mpi, slurm
from fabricfn.environments.hostlists import counts, expand
from fabricfn.errors import ConfigurationError
from fabricfn.starting.joining import local_device
from fabricfn.starting.meeting import settle
from fabricfn.starting.request import Request

PROGRAMS = Path(__file__).parent / "programs"
LOOPBACK = {"0100007F", "00000000000000000000000001000000"}

pytestmark = pytest.mark.timeout(120)

# srun --nodes=2 --ntasks-per-node=2, the fourth task; as srun(1) documents its variables
SLURM = {
    "SLURM_JOB_ID": "1234567",
    "SLURM_JOB_NAME": "train",
    "SLURM_STEP_ID": "0",
    "SLURM_NTASKS": "4",
    "SLURM_NTASKS_PER_NODE": "2",
    "SLURM_NNODES": "2",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_NODELIST": "gpu[07-08]",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
}
# mpirun of Open MPI 5.0.11, one of three processes on one machine, as it was seen: rank 1 is local rank 2
OMPI = {
    "OMPI_COMM_WORLD_SIZE": "3",
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "3",
    "OMPI_COMM_WORLD_LOCAL_RANK": "2",
    "OMPI_COMM_WORLD_NODE_RANK": "2",
    "OMPI_UNIVERSE_SIZE": "3",
    "PMIX_NAMESPACE": "prterun-vm-10031@1",
    "PMIX_RANK": "1",
}
# mpiexec of MPICH 5.0.2 over two machines, as it was seen
MPICH = {"PMI_RANK": "1", "PMI_SIZE": "2", "PMI_FD": "9", "MPI_LOCALRANKID": "0", "MPI_LOCALNRANKS": "1"}
# submitit 1.5's LocalExecutor, tasks_per_node=2, the second task
SUBMITIT = {"SUBMITIT_EXECUTOR": "local", "SUBMITIT_LOCAL_JOB_ID": "12345", "SUBMITIT_LOCAL_NTASKS": "2"}
SUBMITIT |= {"SUBMITIT_LOCAL_GLOBALID": "1", "SUBMITIT_LOCAL_LOCALID": "1"}
KUBEFLOW = {"MASTER_ADDR": "job-master-0", "MASTER_PORT": "23456", "WORLD_SIZE": "4", "RANK": "3"}
LSF = {"LSB_JOBID": "123456", "JSM_NAMESPACE_RANK": "5", "JSM_NAMESPACE_SIZE": "6", "JSM_NAMESPACE_LOCAL_RANK": "2"}
ELASTIC = {"TORCHELASTIC_RUN_ID": "x", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "GROUP_WORLD_SIZE": "2"}
ELASTIC = {**KUBEFLOW, **ELASTIC, "GROUP_RANK": "1"}


def place(topology):
    """All that says which process this is."""
    ranks = (topology.rank, topology.world_size, topology.local_rank, topology.local_world_size)
    return (topology.name, *ranks, topology.node_rank, topology.num_nodes)


@pytest.fixture
def rankfile(tmp_path):
    """LSF's file of hosts: the first line is the machine of the job script, then one line for each slot."""
    file = tmp_path / "rankfile"
    file.write_text("batch5\n" + "a11n01\n" * 3 + "a11n02\n" * 3)
    return {**LSF, "LSB_DJOB_RANKFILE": str(file)}


def without(environ, *names):
    return {name: value for name, value in environ.items() if name not in names}


# SLURM


def test_a_task_of_srun():
    found = find(SLURM)
    assert place(found) == ("slurm", 3, 4, 1, 2, 1, 2)
    assert (found.main_address, found.main_port) == ("gpu07", 15000 + 4567)
    assert find({**SLURM, "SLURM_STEP_ID": "1"}).main_port != found.main_port  # two steps at a time
    said = find({**SLURM, "MASTER_ADDR": "head", "MASTER_PORT": "5"})
    assert (said.main_address, said.main_port, said.guessed) == ("head", 5, ())
    uneven = {**SLURM, "SLURM_NTASKS": "3", "SLURM_STEP_TASKS_PER_NODE": "2,1", "SLURM_PROCID": "2"}
    assert place(find({**uneven, "SLURM_LOCALID": "0"})) == ("slurm", 2, 3, 0, 1, 1, 2)
    # the step, not the job around it
    step = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_NODELIST": "gpu08"}
    step |= {"SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_NODEID": "0", "SLURM_PROCID": "1"}
    assert place(find({**SLURM, **step})) == ("slurm", 1, 2, 1, 2, 0, 1)
    assert find({**SLURM, **step}).main_address == "gpu08"


@pytest.mark.parametrize(
    ("environ", "reason"),
    [
        (without(SLURM, "SLURM_JOB_ID"), "SLURM_JOB_ID is not set"),
        # the batch script itself, in which sbatch sets SLURM_PROCID=0, and a shell of salloc
        ({**without(SLURM, "SLURM_STEP_ID"), "SLURM_PROCID": "0"}, "srun did not start"),
        (without(SLURM, "SLURM_STEP_ID", "SLURM_PROCID"), "srun did not start"),
        ({**SLURM, "SLURM_JOB_NAME": "bash", "SLURM_PROCID": "0"}, "SLURM_JOB_NAME=bash"),
        ({**SLURM, "SLURM_JOB_NAME": "interactive", "SLURM_PROCID": "0"}, "interactive"),
        ({**SLURM, "SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, "one process only"),
        # mpirun starts its own daemons by srun, whose numbers its processes inherit
        ({**SLURM, **OMPI}, "mpirun"),
        ({**SLURM, **MPICH}, "mpirun"),
    ],
)
def test_what_is_no_task_of_srun(environ, reason):
    assert slurm.detect(environ) is None
    assert reason in slurm.why_not(environ)
    assert find(environ).name != "slurm"
    with pytest.raises(ConfigurationError, match="was not started by it"):
        find(environ, "slurm")


def test_tasks_that_would_train_alone_or_anywhere_are_refused():
    with pytest.raises(ConfigurationError, match=r"srun --nodes=2 --ntasks-per-node=2 python train\.py"):
        find(without(SLURM, "SLURM_NTASKS_PER_NODE"))
    with pytest.raises(ConfigurationError, match="SLURM_JOB_NAME=train srun --nodes=2 --ntasks-per-node=2"):
        find({**SLURM, "SLURM_JOB_NAME": "interactive"})
    for name, value in (
        ("SLURM_PROCID", "x"),
        ("SLURM_PROCID", "4"),
        ("SLURM_NODELIST", "gpu[7"),
        ("SLURM_LOCALID", "2"),
    ):
        with pytest.raises(ConfigurationError):
            find({**SLURM, name: value})


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("node[01-03,7],x", ["node01", "node02", "node03", "node7", "x"]),
        ("host", ["host"]),
        ("a,b-1.cluster", ["a", "b-1.cluster"]),
        ("r[1-2]n[08-10]", ["r1n08", "r1n09", "r1n10", "r2n08", "r2n09", "r2n10"]),
        ("n[1-2]-ib", ["n1-ib", "n2-ib"]),
        ("127.0.0.[1-2]", ["127.0.0.1", "127.0.0.2"]),
        ("n[098-101]", ["n098", "n099", "n100", "n101"]),
    ],
)
def test_lists_of_hosts(text, hosts):
    assert list(expand(text)) == hosts


@given(st.lists(st.tuples(st.sampled_from(["n", "gpu-", "r1c"]), st.integers(0, 120), st.integers(0, 9)), min_size=1))
def test_ranges_of_hosts_are_what_counting_gives(groups):
    text = ",".join(f"{stem}[{low:03d}-{low + more:03d}]" for stem, low, more in groups)
    expected = [f"{stem}{number:03d}" for stem, low, more in groups for number in range(low, low + more + 1)]
    assert list(expand(text)) == expected


@pytest.mark.parametrize(
    "text", ["", "a,", ",a", "a[", "a]b", "a[]", "a[3-1]", "a[x]", "a[1-]", "a b", "a[1][", "[[1]]"]
)
def test_what_is_no_list_of_hosts(text):
    with pytest.raises(ConfigurationError, match="list of hosts"):
        list(expand(text))


def test_only_what_is_asked_for_is_expanded():
    assert next(expand("n[1-999999999999999999]")) == "n1"
    assert counts("2(x3),1") == [2, 2, 2, 1]
    with pytest.raises(ConfigurationError):
        counts("2(x3")


# The others


def test_a_task_of_jsrun(rankfile):
    found = lsf.detect(rankfile, "a11n02.site.org")
    assert place(found) == ("lsf", 5, 6, 2, 3, 1, 2)
    assert (found.main_address, found.main_port) == ("a11n01", 10456)
    assert lsf.detect(rankfile, "called otherwise") == found
    assert find(rankfile) == found
    assert lsf.why_not(without(rankfile, "LSB_JOBID")) == "LSB_JOBID is not set"
    assert lsf.detect({**rankfile, "JSM_NAMESPACE_SIZE": "1"}) is None
    Path(rankfile["LSB_DJOB_RANKFILE"]).write_text("")
    with pytest.raises(ConfigurationError, match="is empty"):
        lsf.detect(rankfile)
    with pytest.raises(ConfigurationError, match="cannot be read"):
        lsf.detect({**rankfile, "LSB_DJOB_RANKFILE": "/no/such/file"})


def test_a_process_of_mpirun():
    found = find(OMPI)
    assert place(found) == ("mpi", 1, 3, 2, 3, 0, 1)
    assert found.main_address == "127.0.0.1"
    assert found.main_port == find({**OMPI, "OMPI_COMM_WORLD_RANK": "0"}).main_port
    assert found.main_port != find({**OMPI, "PMIX_NAMESPACE": "another"}).main_port
    assert place(find(MPICH)) == ("mpi", 1, 2, 0, 1, 1, 2)
    assert (find(MPICH).main_address, find(MPICH).main_port) == (None, None)
    assert find({**MPICH, "MASTER_ADDR": "a", "MASTER_PORT": "1"}).guessed == ()
    filled = {"OMPI_COMM_WORLD_SIZE": "6", "OMPI_COMM_WORLD_RANK": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}
    assert find({**OMPI, **filled}).node_rank == 1  # ranks 3, 4, 5
    assert find({**OMPI, **filled, "OMPI_COMM_WORLD_LOCAL_RANK": "2"}).node_rank == 0  # ranks 0, 2, 4
    with pytest.raises(ConfigurationError, match="unequal numbers"):
        find({**OMPI, "OMPI_COMM_WORLD_SIZE": "4"})
    assert mpi.why_not(without(MPICH, "MPI_LOCALRANKID")) is not None
    assert mpi.why_not({**MPICH, "PMI_SIZE": "1", "PMI_RANK": "0"}) is not None


def test_a_task_of_submitit_here():
    found = find(SUBMITIT)
    assert place(found) == ("submitit", 1, 2, 1, 2, 0, 1)
    assert (found.main_port, found.guessed) == (15000 + 2345, ("main_port",))
    assert find({**SUBMITIT, "MASTER_PORT": "5"}).main_port == 5
    assert find({**SUBMITIT, "SUBMITIT_LOCAL_NTASKS": "1", "SUBMITIT_LOCAL_GLOBALID": "0"}).name == "single"
    # on a cluster its tasks are srun's, and inherit what is set here
    assert find({**SUBMITIT, **SLURM, "SUBMITIT_EXECUTOR": "slurm"}).name == "slurm"


def test_a_replica_of_kubeflow():
    found = find(KUBEFLOW)
    assert place(found) == ("kubeflow", 3, 4, 0, 1, 3, 4)
    assert (found.main_address, found.main_port) == ("job-master-0", 23456)
    local = {**KUBEFLOW, "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    assert place(find(local)) == ("kubeflow", 3, 4, 1, 2, 1, 2)
    with pytest.raises(ConfigurationError, match="LOCAL_WORLD_SIZE is not set"):
        find(without(local, "LOCAL_WORLD_SIZE"))
    assert find({**KUBEFLOW, "WORLD_SIZE": "1", "RANK": "0"}).name == "single"
    assert find(without(KUBEFLOW, "MASTER_PORT")).name == "single"


def test_the_order_in_which_launchers_are_asked(rankfile):
    everything = {**SLURM, **rankfile, **MPICH, **ELASTIC}
    order = ["workers", "torchrun", "submitit", "slurm", "lsf", "mpi", "kubeflow", "single"]
    assert list(DETECTORS) == order
    assert find(everything).name == "torchrun"
    assert find(without(everything, "TORCHELASTIC_RUN_ID", *MPICH)).name == "slurm"
    assert find(without(everything, "TORCHELASTIC_RUN_ID", *SLURM)).name == "lsf"
    assert find({**MPICH, **KUBEFLOW}).name == "mpi"
    assert find(everything, "single") == Topology()


@pytest.mark.parametrize("name", DETECTORS)
@pytest.mark.parametrize("environ", [{}, SLURM, OMPI, MPICH, SUBMITIT, KUBEFLOW, ELASTIC, {**SLURM, **OMPI}])
def test_a_launcher_matches_exactly_where_it_gives_no_reason_against(name, environ):
    assert (DETECTORS[name].detect(environ) is None) == (DETECTORS[name].why_not(environ) is not None)


# A cluster of one's own


def test_a_record_of_ones_own_is_completed():
    mine = Topology(name="mine", main_address="head", main_port=1, world_size=8, rank=5, num_nodes=2)
    assert place(mine) == ("mine", 5, 8, 1, 4, 1, 2)
    assert place(Topology(world_size=8, rank=5, local_world_size=2))[3:] == (1, 2, 2, 4)
    assert place(Topology()) == ("single", 0, 1, 0, 1, 0, 1)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"world_size": 4, "num_nodes": 2}, "no rank"),
        ({"world_size": 4, "rank": 1}, "num_nodes is missing"),
        ({"world_size": 4, "rank": 1, "num_nodes": 3}, "num_nodes is 3"),
        ({"world_size": 4, "rank": 4, "num_nodes": 2}, "rank=4 must be 0 .. world_size - 1"),
        ({"world_size": 4, "rank": 1, "num_nodes": 2, "local_rank": 2}, "local_rank=2"),
        ({"world_size": 4, "rank": -2, "num_nodes": 2}, "rank=-2"),
    ],
)
def test_a_record_that_cannot_be_completed_says_what_is_missing(fields, says):
    with pytest.raises(ConfigurationError) as caught:
        Topology(main_address="head", main_port=1, **fields)
    assert says in str(caught.value)


# Arguments and variables


def test_arguments_replace_what_a_rule_gave_and_contradict_what_a_launcher_said():
    ours = settle(Request(main_address="ib7", main_port=9), find(SLURM))
    assert (ours.main_address, ours.main_port, ours.guessed) == ("ib7", 9, ())
    assert settle(Request(), find(SLURM)) == find(SLURM)
    said = find({**SLURM, "MASTER_PORT": "5"})
    assert settle(Request(main_port=9), said).main_port == 5
    with pytest.raises(ConfigurationError, match="main_port=9, but slurm says 5"):
        ff.init_runtime(accelerator="cpu", environment=said, main_port=9)
    with pytest.raises(ConfigurationError, match="devices=4, but slurm says 2 processes on this node"):
        ff.init_runtime(accelerator="cpu", environment=find(SLURM), devices=4)


def test_a_task_that_sees_its_own_device_only_takes_that():
    topology = find(SLURM)
    assert local_device(topology, Choice(accelerator="cuda", indices=(0,), open=True)).index == 0
    assert local_device(topology, Choice(accelerator="cuda", indices=(0, 1), open=True)).index == 1
    with pytest.raises(ConfigurationError, match="finds none left"):
        local_device(find(ELASTIC), Choice(accelerator="cuda", indices=(0,), open=True))


# Real processes


def free_port():
    with contextlib.closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


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
