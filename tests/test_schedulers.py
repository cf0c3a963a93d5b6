"""A scheduler starts the ranks, which only call `init_runtime`; Ray is in test_ray.py."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_tasks_of_submitit_find_each_other_and_learn(tmp_path):
    command = [sys.executable, "examples/submitit_job.py", "--epochs", "3"]
    command += ["--checkpoint", str(tmp_path / "checkpoints"), "--logs", str(tmp_path / "logs")]
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, check=False, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    first, second = eval(done.stdout.splitlines()[-1])
    assert first == second > 0.9
    (log,) = tmp_path.glob("logs/*/*_0_log.out")
    assert "Runtime(" not in log.read_text() or "rank 0 of 2" in log.read_text()
    assert len(list(tmp_path.glob("checkpoints/step-*"))) == 3
