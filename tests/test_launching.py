"""`launch` from a prompt, a notebook and a script, by each start method; and what stands in its way."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import nbclient
import nbformat
import pytest
import torch

from fabricfn.accelerators import Choice, available
from fabricfn.errors import ConfigurationError
from fabricfn.starting.launching import start_method
from fabricfn.starting.request import Request
from tests.support.starts import PROGRAMS

ROOT = Path(__file__).parents[1]
ENVIRON = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
CPUS = Choice(accelerator="cpu", indices=(0, 1), open=False)
GPUS = Choice(accelerator="cuda", indices=(0, 1), open=False)

pytestmark = pytest.mark.timeout(120)


def run(*words, stdin=None):
    return subprocess.run(
        [sys.executable, *words],
        input=stdin,
        cwd=PROGRAMS,
        env=ENVIRON,
        text=True,
        capture_output=True,
        timeout=90,
        check=False,
    )


PROMPT = """
import sys
import fabricfn as ff

def add(rt, x):
    return rt.rank + x

ff.launch(add, 10, devices=2, accelerator="cpu", start_method="fork")
ff.launch(add, 20, devices=2, accelerator="cpu", start_method="spawn")
sys.modules["cloudpickle"] = None  # as if it were not installed
ff.launch(add, 30, devices=2, accelerator="cpu", start_method="spawn")
ff.init_runtime(devices=2, accelerator="cpu")
"""


def test_a_function_of_the_prompt():
    done = run("-i", "-q", stdin=PROMPT)
    assert done.stdout.splitlines() == ["[10, 11]", "[20, 21]"], done.stderr
    told = [line for line in done.stderr.splitlines() if line.startswith("fabricfn.errors.")]
    assert "pip install 'fabricfn[closures]'" in told[-2]
    assert 'start_method="fork"' in told[-2]
    assert "an interactive Python" in told[-1]
    assert "ff.launch(fn, devices=2)" in told[-1]


def executed(folder, *cells):
    """The text that each cell of the example showed, and each of these further ones; run in `folder`."""
    shutil.copy(ROOT / "examples" / "digits.py", folder)
    notebook = nbformat.read(ROOT / "examples" / "notebook.ipynb", as_version=4)
    notebook.cells += [nbformat.v4.new_code_cell(cell) for cell in cells]
    client = nbclient.NotebookClient(notebook, timeout=60, resources={"metadata": {"path": str(folder)}})
    client.execute(env=ENVIRON)
    outputs = [cell.get("outputs", []) for cell in notebook.cells]
    return ["".join(out.get("text", "") or out.data["text/plain"] for out in shown) for shown in outputs]


def test_a_notebook(tmp_path):
    spawned = 'ff.launch(lambda rt: rt.world_size, devices=2, accelerator="cpu", start_method="spawn")'
    failing = """
    def fail(rt):
        if rt.rank == 1:
            raise KeyError("of rank 1")
        ff.barrier(rt)
    try:
        ff.launch(fail, devices=2, accelerator="cpu")
    except KeyError as error:
        print(repr(error), "rank 1" in str(error.__cause__))
    """
    *_, trained, spawned, failed = executed(tmp_path, spawned, failing.replace("\n    ", "\n"))
    assert "Runtime(rank 0 of 2 on cpu, ddp" in trained
    assert "rank 1 of 2" not in trained
    (_, first), (_, second) = eval(trained.splitlines()[-1])
    assert first == second > 0.8
    assert spawned == "[2, 2]"
    assert failed == "KeyError('of rank 1') True\n"


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_a_script_that_forgot_to_ask_for_its_name_is_told_so_once(method):
    done = run("unguarded.py", method)
    assert done.returncode == 1
    assert done.stderr.count("Traceback") == 1
    assert 'Put the call under: if __name__ == "__main__":' in done.stderr.splitlines()[-1]


def test_what_forks_and_what_does_not():
    def method(choice, initialised, **options):
        return start_method(Request(**options), choice, lambda: initialised)

    assert method(CPUS, False) == "fork"
    assert method(CPUS, True) == "spawn"
    assert method(GPUS, False) == "spawn"
    for name in ("ddp_notebook", "ddp_fork"):
        assert method(GPUS, False, strategy=name) == "fork"
        with pytest.raises(ConfigurationError, match="has initialised CUDA already"):
            method(GPUS, True, strategy=name)
    with pytest.raises(ConfigurationError, match="has initialised CUDA already"):
        method(CPUS, True, start_method="fork")
    assert method(CPUS, True, start_method="forkserver") == "forkserver"


def test_to_count_the_devices_does_not_initialise_them(monkeypatch):
    """`torch.cuda.is_available` does, and a forked rank could not use them any more."""

    def poison():
        raise AssertionError("asked")

    monkeypatch.setattr(torch.cuda, "is_available", poison)
    probe = SimpleNamespace(current_accelerator=lambda: torch.device("cuda"), is_available=poison)
    assert available(probe)["cpu"] == 1
