"""Stopping and going on: the digits example is killed in mid-epoch and called again, and no bit shows it."""

import dataclasses
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

import fabricfn as ff

ROOT = Path(__file__).parents[1]
DIGITS = "examples/digits.py"
SHORT = ("--epochs", "2", "--save-every", "10")
"""46 steps, 23 an epoch; checkpoints after 10, 20, 23, 30, 40 and 46."""


def run(folder: Path, *options: str, command: tuple[str, ...] = (DIGITS,), status: int = 0) -> str:
    """The example with its checkpoints and losses in a folder; what it prints."""
    words = [sys.executable, *command, *SHORT, "--checkpoint", str(folder), "--losses", str(folder) + ".csv", *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, check=False, text=True, timeout=240)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout


def losses(folder: Path) -> list[tuple[int, float]]:
    rows = Path(str(folder) + ".csv").read_text().splitlines()
    assert rows[0] == "step,loss"
    return [(int(step), float(loss)) for step, loss in (row.split(",") for row in rows[1:])]


def whole(path: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint by its place, whole however it was sharded; read without the code that wrote it."""
    with ff.runtime(accelerator="cpu") as rt:
        tree = ff.load(rt, path)
    found: dict[str, torch.Tensor] = {}

    def walk(tree: object, name: str) -> None:
        if isinstance(tree, torch.Tensor):
            found[name] = tree
        elif isinstance(tree, dict):
            for key, value in tree.items():
                walk(value, f"{name}/{key}")

    walk(tree, "")
    # 8 parameters, their two moments each, and the running mean, variance and count of two BatchNorms
    assert len(found) >= 3 * 8 + 6
    return found


def differing(left: Path, right: Path, tolerance: float = 0.0) -> list[str]:
    """The tensors that are not equal: bit for bit, or within a tolerance for floating-point numbers."""
    ours, theirs = whole(left), whole(right)
    assert ours.keys() == theirs.keys()

    def same(a: torch.Tensor, b: torch.Tensor) -> bool:
        if tolerance and a.is_floating_point():
            return torch.allclose(a, b, rtol=tolerance, atol=tolerance)
        return a.dtype == b.dtype and a.shape == b.shape and a.numpy().tobytes() == b.numpy().tobytes()

    return [name for name in ours if not same(ours[name], theirs[name])]


FLOAT64 = ("--precision", "64-true")
WORLDS = {
    "single": ("--devices", "1"),
    "ddp": ("--devices", "2", "--strategy", "ddp", *FLOAT64),  # the run that fsdp is compared with
    "fsdp": ("--devices", "2", "--strategy", "fsdp"),
}


@pytest.fixture(scope="module")
def never_stopped(tmp_path_factory):
    """`never_stopped(strategy)`: the folder of a run that nobody touched."""
    found: dict[str, Path] = {}

    def make(strategy: str) -> Path:
        if strategy not in found:
            found[strategy] = tmp_path_factory.mktemp("never") / strategy
            run(found[strategy], *WORLDS[strategy])
        return found[strategy]

    return make


@pytest.mark.parametrize("strategy", WORLDS)
def test_a_run_that_was_killed_in_mid_epoch_goes_on_to_the_bit(tmp_path: Path, never_stopped, strategy: str):
    never, killed = never_stopped(strategy), tmp_path / "killed"
    assert [step for step, _ in losses(never)] == list(range(1, 47))

    run(killed, *WORLDS[strategy], command=("tests/programs/killed.py", "36", DIGITS), status=-9)
    assert len(losses(killed)) == 36, "six rows that no checkpoint knows"
    assert ff.latest(killed) == killed / "step-000030"

    output = run(killed, *WORLDS[strategy])
    assert "1 of 2 epochs are done, 30 steps" in output
    assert Path(f"{killed}.csv").read_bytes() == Path(f"{never}.csv").read_bytes()
    for step in (40, 46):
        assert differing(killed / f"step-{step:06d}", never / f"step-{step:06d}") == []


def test_what_ddp_began_fsdp_finishes(tmp_path: Path, never_stopped):
    ddp, fsdp = never_stopped("ddp"), tmp_path / "fsdp"
    shutil.copytree(ddp / "step-000030", fsdp / "step-000030")
    assert "1 of 2 epochs are done, 30 steps" in run(fsdp, *WORLDS["fsdp"], *FLOAT64)
    assert differing(fsdp / "step-000046", ddp / "step-000046", tolerance=1e-11) == []
    assert [step for step, _ in losses(fsdp)] == list(range(31, 47))
    for (_, ours), (_, theirs) in zip(losses(fsdp), losses(ddp)[30:], strict=True):
        assert abs(ours - theirs) <= 1e-11


# ---------------------------------------------------------------- the plot in the docs


def points(svg: str) -> dict[str, list[list[str]]]:
    """The points of the curves, by class."""
    found: dict[str, list[list[str]]] = {}
    for line in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}polyline"):
        found.setdefault(line.attrib["class"], []).append(line.attrib["points"].split())
    return found


def test_the_plot_of_the_docs_shows_curves_that_coincide():
    svg = (ROOT / "docs/resume.svg").read_text()
    assert "115 steps; largest difference between the runs: 0<" in svg
    curves = points(svg)
    assert [len(never) for never in curves["never"]] == [115, 115], "ddp and fsdp"
    for never, before, after in zip(*curves.values(), strict=True):
        assert before == never[:67]
        assert after == never[60:]


def test_the_plot_tells_runs_that_differ():
    spec = importlib.util.spec_from_file_location("resume_plot", ROOT / "docs/plots/resume.py")
    plot = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(plot)
    never = {step: 1 / step for step in range(1, 9)}
    before = {step: never[step] for step in range(1, 6)}
    story = plot.Story(title="ddp & more", never=never, before=before, after=dict(never), resumed=4)
    svg = plot.draw([story], "python x.py")
    assert "8 steps; largest difference between the runs: 0<" in svg
    curves = points(svg)
    assert [len(curves[name][0]) for name in ("never", "before", "after")] == [8, 5, 4]
    assert "kill -9 after step 5" in svg
    assert "goes on after step 4" in svg
    assert plot.difference(dataclasses.replace(story, before={**before, 4: 0.75})) == 0.5
    assert plot.difference(dataclasses.replace(story, after={**never, 8: 0.25})) == 0.125
    assert plot.difference(dataclasses.replace(story, after={**never, 8: float("nan")})) == float("inf")
    assert plot.difference(dataclasses.replace(story, after=before)) == float("inf"), "it never went on"
