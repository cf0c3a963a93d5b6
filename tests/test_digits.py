"""The example, as a newcomer runs it: what it learns on one process and on two; tests/test_resume.py kills it."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def digits(folder: Path, *options: str) -> str:
    """What examples/digits.py prints."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "examples/digits.py", "--checkpoint", str(folder), *options]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, check=False, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def accuracy(output: str) -> float:
    (percent,) = re.findall(r"test accuracy: ([\d.]+)%", output)
    return float(percent)


def test_one_process_learns_and_a_second_call_has_nothing_left_to_train(tmp_path: Path):
    first = digits(tmp_path)
    assert accuracy(first) >= 98
    assert "epoch 9" in first
    assert "resumed" not in first

    again = digits(tmp_path)
    assert "10 of 10 epochs are done" in again
    assert "epoch 9:" not in again, "there is nothing left to train"
    assert accuracy(again) == accuracy(first)


@pytest.mark.parametrize(("strategy", "epochs"), [("ddp", "10"), ("fsdp", "6")])
def test_two_processes_learn_and_one_evaluates_their_checkpoint(tmp_path: Path, strategy: str, epochs: str):
    first = digits(tmp_path, "--devices", "2", "--strategy", strategy, "--epochs", epochs)
    assert accuracy(first) >= 98
    assert first.count("test accuracy") == 1, "only rank 0 prints"

    alone = digits(tmp_path, "--devices", "1", "--epochs", epochs)
    assert f"{epochs} of {epochs} epochs are done" in alone
    assert accuracy(alone) == accuracy(first)
