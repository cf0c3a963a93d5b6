"""Under a real mpiexec (MPICH's wheel), with mpi4py: ranks of one machine, and of two."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

MPIEXEC = Path(sys.executable).parent / "mpiexec"
JOB = Path(__file__).parent / "programs/mpi_job.py"
# MPICH tells each process how many there are on its machine; so told, each is alone on one of its own.
ALONE = ["env", "MPI_LOCALRANKID=0", "MPI_LOCALNRANKS=1"]

pytestmark = pytest.mark.skipif(not MPIEXEC.exists(), reason="MPICH's wheel is for Linux on x86-64 alone")


@pytest.mark.parametrize("nodes", [1, 2])
def test_ranks_that_mpiexec_started_meet(nodes):
    command = [MPIEXEC, "-n", "2", *(ALONE if nodes == 2 else []), sys.executable, JOB]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert sorted(re.findall(r"rank .*?, mpi", done.stdout)) == [  # mpiexec may put one line into another's end
        f"rank {rank} of 2 on node {rank if nodes == 2 else 0} of {nodes}: 3.0, mpi" for rank in range(2)
    ]
