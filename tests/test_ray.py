"""Ray Train starts the ranks, in real worker processes; they only call `init_runtime`."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("ray", reason="an extra: nox -s ray")

ROOT = Path(__file__).parents[1]


def test_the_workers_of_ray_find_each_other_and_learn(tmp_path):
    command = [sys.executable, "examples/ray_train.py", "--epochs", "3", "--checkpoint", str(tmp_path)]
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, check=False, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"'ranks': 2\b", done.stdout), done.stdout
    (accuracy,) = re.findall(r"'accuracy': ([\d.]+)", done.stdout)
    assert float(accuracy) > 0.9
    assert len(list(tmp_path.glob("step-*"))) == 3
