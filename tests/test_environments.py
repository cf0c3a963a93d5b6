"""Who started this process: pure tables of the variables that launchers set."""

from pathlib import Path

import pytest

import fabricfn as ff
from fabricfn.accelerators import Choice
from fabricfn.environments import DETECTORS, Topology, find, lsf, mpi
from fabricfn.errors import ConfigurationError
from fabricfn.starting.joining import local_device
from fabricfn.starting.meeting import settle
from fabricfn.starting.request import Request
from tests.support.launchers import ELASTIC, KUBEFLOW, LSF, MPICH, OMPI, SLURM, SUBMITIT, place, without


@pytest.fixture
def rankfile(tmp_path):
    """LSF's file of hosts: the first line is the machine of the job script, then one line for each slot."""
    file = tmp_path / "rankfile"
    file.write_text("batch5\n" + "a11n01\n" * 3 + "a11n02\n" * 3)
    return {**LSF, "LSB_DJOB_RANKFILE": str(file)}


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
