"""SLURM: which process is a task of srun, and its lists of hosts."""

import pytest
from hypothesis import given, strategies as st

from fabricfn.environments import find, slurm
from fabricfn.environments.hostlists import counts, expand
from fabricfn.errors import ConfigurationError
from tests.support.launchers import MPICH, OMPI, SLURM, place, without


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
