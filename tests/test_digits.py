"""The example, as a newcomer runs it: accuracy on one process and on two, and resuming to the bit."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

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


def contents(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Every stored tensor."""
    return {name: tensor for path in (checkpoint / "data").iterdir() for name, tensor in load_file(path).items()}


def test_one_process_learns_and_resumes_to_the_bit(tmp_path: Path):
    first = digits(tmp_path)
    assert accuracy(first) >= 98
    assert "epoch 9" in first
    assert "resumed" not in first

    again = digits(tmp_path)
    assert "10 of 10 epochs are done" in again
    assert "epoch 9:" not in again, "there is nothing left to train"
    assert accuracy(again) == accuracy(first)

    never_stopped = contents(tmp_path / "epoch-009")
    for epoch in range(6, 10):
        shutil.rmtree(tmp_path / f"epoch-{epoch:03d}")
    resumed = digits(tmp_path)
    assert "6 of 10 epochs are done" in resumed
    found = contents(tmp_path / "epoch-009")
    assert found.keys() == never_stopped.keys()
    assert [name for name, tensor in found.items() if not torch.equal(tensor, never_stopped[name])] == []


def test_two_processes_learn_and_one_goes_on_with_their_checkpoint(tmp_path: Path):
    first = digits(tmp_path, "--devices", "2")
    assert accuracy(first) >= 98
    assert first.count("test accuracy") == 1, "only rank 0 prints"

    alone = digits(tmp_path, "--devices", "1")
    assert "10 of 10 epochs are done" in alone
    assert accuracy(alone) == accuracy(first)
