"""What the benchmarks measure on a GPU, at a size for the CPU; the captured graphs where there is CUDA."""

import json
import warnings

import pytest
import torch

from tests.benchmarks import devices, report
from tests.benchmarks.__main__ import FIGURES, measure_all, medians
from tests.benchmarks.jobs import GPTS, job
from tests.benchmarks.steps import check

TINY = "GPT-2 tiny"
HERE = "cuda" if torch.cuda.is_available() else "cpu"


def test_every_contender_learns_what_the_loop_by_hand_learns():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # those of the peers, where they are installed
        found = devices.measure_steps(1, TINY, HERE, "bf16-mixed", backend="eager")
    assert found.keys() >= {"plain", "fused", "compiled", "fabricfn, donated", "fabricfn, pure", "fabricfn, compiled"}
    assert (HERE == "cuda") == ({"captured", "fabricfn, captured"} <= found.keys())
    assert min(found.values()) > 0


def test_one_that_learns_something_else_is_found():
    check({"plain": [2.0, 1.0], "other": [2.001, 1.0]}, "bf16-mixed")
    with pytest.raises(AssertionError, match="other computes something else"):
        check({"plain": [2.0, 1.0], "other": [2.0, 1.1]}, "bf16-mixed")


def test_six_operations_a_parameter_and_token_and_those_of_attention():
    layers, width, vocabulary, length, rows = GPTS[TINY]
    matrices = layers * 12 * width**2 + vocabulary * width
    expected = rows * length * (6 * matrices + 12 * layers * width * length)
    assert devices.flops_of(job(TINY, device="meta")) == expected


def test_the_section_has_what_was_measured():
    names = ("plain", "fabricfn, donated")
    found = devices.measure_training(1, TINY, "cpu", names=names)
    assert found.keys() == {"step", "tokens"}  # memory and MFU are those of a GPU
    for name in names:
        assert found["tokens"][name] == pytest.approx(2 * 32 / found["step"][name] / 1e3)

    results = {key: value for key, value in json.loads(FIGURES.read_text()).items() if not key.startswith("gpu")}
    assert report.render(results).partition("## On a GPU\n\n")[2].startswith("Not measured")
    results["gpu"] = {"name": "this one", "torch": "2", "cuda": "13"}
    results |= {f"gpu GPT-2 350M {part}": medians([values], "plain") for part, values in found.items()}
    section = report.render(results).partition("## On a GPU\n\n")[2]
    assert section.startswith("Measured on this one; torch 2, CUDA 13.\n")
    ratio = found["step"]["fabricfn, donated"] / found["step"]["plain"]
    assert f"| GPT-2 350M | {report.amount(found['step']['plain'])} | not measured |" in section
    assert f" {ratio:.2f} (<= 1) |" in section
    tokens = " | ".join(f"{found['tokens'][name]:.2f}" for name in names)
    assert (
        f"|  | by hand | fabricfn, donated |\n| --- | --- | --- |\n| 350M: 1,000 tokens a second | {tokens} |\n"
        in section
    )


@pytest.mark.skipif(HERE == "cuda", reason="then there is nothing to leave out")
def test_without_cuda_one_line_says_so_and_old_figures_stay(capsys):
    assert measure_all(quick=True, only="gpu") == json.loads(FIGURES.read_text())
    assert capsys.readouterr().out == "There is no CUDA device: the rows that begin with gpu are left out.\n"
