"""The examples, as a newcomer runs them, in a reduced form: each asserts by itself what it has learnt."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# What runs in seconds, and what rank 0 says in the end.
RUNS = {
    "dcgan": ("--epochs 7", r"distance to the real digits: [\d.]+ before, [\d.]+ after"),
    "distillation": ("--epochs 4", r"student: 9\d\.\d+% right"),
    "maml": ("--steps 120", r"random start, [\d.]+ from ours"),
    "kfold": ("--folds 3 --epochs 3", r"all 3 together: 9\d\.\d+%"),
    "ppo": ("--updates 9", r"update 8: \d+ games"),
    "cifar10": ("--stand-in --epochs 1 --lr 1e-3 --checkpoints {folder}", r"epoch 0: test accuracy: \d+"),
    "hugging_face": ("--epochs 4 --out {folder}", r"of \d+ held-out passages right"),
}

# The functions that docs/examples.md counts.
TRAINING = {
    "digits": {"loss_fn", "accuracy", "train"},
    "char_gpt": {"loss_fn", "train"},
    "trainer": {"Trainer", "fit"},
    "dcgan": {"noise", "discriminator_loss", "generator_loss", "train"},
    "distillation": {"teaching_loss", "learning_loss", "train_teacher", "train_student"},
    "maml": {"adapted_loss", "start", "train"},
    "kfold": {"loss_fn", "train", "cross_validate"},
    "ppo": {"play", "loss_fn", "train"},
    "cifar10": {"loss_fn", "share_right", "train"},
    "hugging_face": {"loss_fn", "train"},
}


def run(script: str, options: str) -> str:
    """What examples/`script`.py prints; a warning is an error."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "error", f"examples/{script}.py", *options.split()]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, check=False, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("script", RUNS)
def test_one_process_learns(script: str, tmp_path: Path):
    options, says = RUNS[script]
    assert len(re.findall(says, run(script, options.format(folder=tmp_path)))) == 1


def test_two_processes_play_the_two_parts_of_a_gan():
    options, says = RUNS["dcgan"]
    assert len(re.findall(says, run("dcgan", f"--devices 2 {options}"))) == 1, "only rank 0 prints"


def test_a_gpt_trained_in_two_parts_goes_on_in_one_process(tmp_path: Path):
    options = f"--save-every 10 --checkpoints {tmp_path}"
    first = run("char_gpt", f"--devices 2 --strategy fsdp --steps 30 {options}")
    assert first.count("held-out loss") == 1
    assert {folder.name for folder in tmp_path.iterdir()} == {"step-000020", "step-000030"}

    again = run("char_gpt", f"--steps 40 {options}")
    assert "step-000030" in again and "step 40: loss" in again
    assert "step 30: loss" not in again, "that was trained already"


def test_the_trainer_goes_on_stops_when_told_and_logs(tmp_path: Path):
    options = f"--checkpoints {tmp_path}/checkpoints --logs {tmp_path}/logs"
    assert "resumed" not in run("trainer", f"--epochs 1 {options}")
    again = run("trainer", f"--epochs 20 {options}")
    assert "epoch-000" in again and "epoch 0: test" not in again
    assert "epoch 19" not in again, "a hook said stop before"
    for version in (0, 1):
        header = (tmp_path / f"logs/trainer/version_{version}/metrics.csv").read_text().splitlines()[0]
        assert {"train/loss", "val/accuracy"} <= set(header.split(","))


def code_lines(path: Path, functions: set[str]) -> int:
    """The lines of these functions and classes that are no docstring, no comment and not blank."""
    text = path.read_text()
    lines, count = text.splitlines(), 0
    for node in ast.parse(text).body:
        if getattr(node, "name", None) in functions:
            first = node.body[0]
            docstring = range(first.lineno, first.end_lineno + 1) if ast.get_docstring(node) else ()
            code = (lines[i - 1].strip() for i in range(node.lineno, node.end_lineno + 1) if i not in docstring)
            count += sum(line[:1] not in ("", "#") for line in code)
    return count


@pytest.mark.parametrize("script", TRAINING)
def test_the_page_counts_the_lines_of_each_training_part(script: str):
    rows = re.findall(rf"^\| `{script}.py` \|.*\| (\d+) \|.*\|$", (ROOT / "docs/examples.md").read_text(), re.MULTILINE)
    assert rows == [str(code_lines(ROOT / f"examples/{script}.py", TRAINING[script]))]
