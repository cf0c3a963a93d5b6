"""The command line: what it reads, what it tells the script, and real runs of it."""

import contextlib
import json
import os
import re
import shlex
import socket
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest

import fabricfn as ff
from fabricfn import cli
from fabricfn.environments.command_line import RUN, read, write
from fabricfn.errors import ConfigurationError
from fabricfn.starting.commanded import filled
from fabricfn.starting.request import Request
from tests.support.starts import PROGRAMS

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.timeout(120)


def start(*words, flags=(), **environ):
    """`fabricfn words`, as a process of its own in the folder of the programs."""
    command = [sys.executable, *flags, "-m", "fabricfn", *map(str, words)]
    environ = {**os.environ, "OMP_NUM_THREADS": "1", **{name: str(value) for name, value in environ.items()}}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=PROGRAMS, env=environ, **pipes)


def finish(process):
    """(status, stdout, stderr)."""
    out, err = process.communicate(timeout=90)
    return process.returncode, out, err


def facts(folder, count):
    return [json.loads((folder / f"rank-{rank}").read_text()) for rank in range(count)]


def dry(capsys, *words):
    """(the command, the options) of a dry run here, and all that it prints."""
    with pytest.raises(SystemExit) as ended:
        cli.main(["run", "--dry-run", *words])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    lines = [line.strip() for line in text.splitlines()]
    (variable,) = (line for line in lines if line.startswith(RUN))
    return shlex.split(lines[0].removeprefix("command: ")), json.loads(variable.partition("=")[2])["options"], text


# Words to options


def test_help_is_quick_and_imports_no_torch():
    best = float("inf")
    for words in (["run", "--help"], ["--help"], ["run", "--help"]):
        began = time.perf_counter()
        status, out, imported = finish(start(*words, flags=["-X", "importtime"]))
        best = min(best, time.perf_counter() - began)
        assert status == 0
        assert "usage: fabricfn" in out
        assert "argparse" in imported
        assert not re.search(r"\| +torch$", imported, flags=re.MULTILINE)
    assert best < 0.5


@pytest.mark.parametrize(
    ("words", "program", "options"),
    [
        (["a.py"], ["a.py"], {}),
        (["--devices", "2", "--accelerator=cpu", "a.py", "--devices", "3", "-m", "x"], None, {"devices": "2"}),
        (["--devices", "-1", "--accelerator", "cpu", "a.py", "--help"], None, {"devices": "-1"}),
        (["--accelerator", "cpu", "-m", "pkg.train", "--lr", "1"], ["-m", "pkg.train", "--lr", "1"], {}),
        (["--precision", "bf16", "a b.py", "", "--", "c"], ["a b.py", "", "--", "c"], {"precision": "bf16"}),
        (["--max-restarts", "3", "--strategy", "ddp", "a.py"], ["a.py"], {"max_restarts": 3, "strategy": "ddp"}),
        (
            ["--num_nodes", "2", "--node_rank=1", "--main_address", "h", "--main_port", "7", "a.py"],
            ["a.py"],
            {"num_nodes": 2, "node_rank": 1, "main_address": "h", "main_port": 7},
        ),
        (
            ["--num-nodes", "2", "--node-rank=1", "--main-address", "h", "--main-port", "7", "a.py"],
            ["a.py"],
            {"num_nodes": 2, "node_rank": 1, "main_address": "h", "main_port": 7},
        ),
        (
            ["--nnodes=1:4", "--rdzv-backend=c10d", "--rdzv-endpoint=h:7", "--nproc-per-node=2", "a.py"],
            ["a.py"],
            {"num_nodes": "1:4", "rendezvous": "c10d", "main_address": "h", "main_port": 7, "devices": "2"},
        ),
    ],
)
def test_options_before_the_script_are_ours_and_all_after_it_are_its_own(capsys, words, program, options):
    command, found, _ = dry(capsys, *words)
    assert command[0] == sys.executable
    assert command[1:] == (program or words[words.index("a.py") :])
    assert without_cpu(found) == options


def without_cpu(options):
    return {name: value for name, value in options.items() if name != "accelerator"}


def test_a_dry_run_says_what_would_be_started(capsys, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    _, _, text = dry(capsys, "--accelerator", "cpu", "--devices", "2", "--max-restarts", "1", "a.py")
    cores = max(1, len(os.sched_getaffinity(0)) // 2)
    assert "processes: 2 on cpu\n" in text
    assert "restarts: at most 1\n" in text
    assert f"OMP_NUM_THREADS={cores}" in text
    _, _, text = dry(capsys, "--accelerator", "cpu", "a.py")
    assert "processes: 1 on cpu, if the script leaves devices at its default" in text
    _, _, text = dry(capsys, "--accelerator", "cpu", "--num-nodes=2", "--node-rank=1", "--main-address=h", "a.py")
    assert "this is node 1 of 2, which meet at h:29500" in text
    _, _, text = dry(capsys, "--accelerator", "cpu", "--num-nodes=1:2", "--main-address=h:7", "a.py")
    assert "1 to 2 nodes, which meet at h:7 (c10d)" in text
    with pytest.raises(SystemExit, match="2"):
        cli.main(["run", "--dry-run", "--main-address", "h:7", "--main-port", "8", "a.py"])
    assert "--main-address says port 7, but --main-port=8" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        cli.main(["run", "--dry-run", "--accelerator", "cpu", "--num-nodes", "2", "a.py"])
    assert "--num-nodes 2 --node-rank 0 --main-address" in capsys.readouterr().err
    for name, value in {"MASTER_ADDR": "h", "MASTER_PORT": "1", "WORLD_SIZE": "2", "RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    _, _, text = dry(capsys, "--accelerator", "cpu", "a.py")
    assert "processes: none: kubeflow has started them (rank 1 of 2" in text


@pytest.mark.parametrize(
    "words", [["run"], ["run", "-m"], ["run", "--devices"], ["run", "--num-nodes", "x", "a.py"], []]
)
def test_a_command_that_makes_no_sense_ends_with_2(capsys, words):
    with pytest.raises(SystemExit) as ended:
        cli.main(words)
    assert ended.value.code == 2
    assert "usage: fabricfn" in capsys.readouterr().err


# Options and what the script says


def test_options_fill_in_what_the_script_left_at_its_default():
    options = {
        "devices": "2",
        "precision": "bf16",
        "strategy": "fsdp",
        "num_nodes": 2,
        "node_rank": 1,
        "max_restarts": 3,
    }
    request = filled(Request(seed=4), options)
    assert {name: getattr(request, name) for name in options} == options
    assert request.seed == 4
    assert filled(Request(devices=2), {}) == Request(devices=2)


@pytest.mark.parametrize(
    ("said", "options"),
    [
        ({"devices": 2}, {"devices": "2"}),
        ({"devices": [1, 4]}, {"devices": "1, 4"}),
        ({"devices": -1}, {"devices": "auto"}),
        ({"precision": 16}, {"precision": "16-mixed"}),
        ({"precision": ff.Precision.parse("bf16")}, {"precision": "bf16-mixed"}),
        ({"accelerator": "cuda"}, {"accelerator": "gpu"}),
        ({"strategy": ff.strategies.ddp()}, {"strategy": "ddp"}),
        ({"num_nodes": 2, "main_address": "h"}, {"num_nodes": 2, "main_address": "h"}),
    ],
)
def test_the_same_in_other_words_is_no_contradiction(said, options):
    request = filled(Request(**said), options)
    for name, value in said.items():
        if not isinstance(value, int | str | list):
            assert getattr(request, name) is value  # a record says more than a name
    assert request.accelerator == said.get("accelerator", "auto")


@pytest.mark.parametrize(
    ("said", "options", "says"),
    [
        ({"devices": 3}, {"devices": "2"}, "devices=3, but the command line says --devices=2"),
        ({"devices": 3}, {"devices": "auto"}, "devices=3, but the command line says --devices=auto"),
        ({"devices": None}, {"devices": "2"}, "devices=None, but"),
        ({"precision": 32}, {"precision": "bf16"}, "precision=32, but the command line says --precision=bf16"),
        ({"accelerator": "cpu"}, {"accelerator": "cuda"}, "accelerator='cpu', but"),
        ({"strategy": ff.strategies.ddp()}, {"strategy": "fsdp"}, "strategy='ddp', but"),
        ({"num_nodes": 2}, {"num_nodes": 3}, "num_nodes=2, but the command line says --num-nodes=3"),
        ({"max_restarts": 1}, {"max_restarts": 0}, "max_restarts=1, but"),
        ({"environment": "single"}, {"environment": "slurm"}, "environment='single', but"),
    ],
)
def test_something_else_is_an_error_that_names_both(said, options, says):
    with pytest.raises(ConfigurationError) as caught:
        filled(Request(**said), options)
    assert says in str(caught.value)


def test_the_options_hold_in_this_process_and_its_ranks_alone(monkeypatch):
    monkeypatch.setenv(RUN, write({"precision": "64-true", "accelerator": "cpu"}, os.getpid()))
    assert ff.init_runtime().precision == ff.Precision.parse(64)
    assert ff.launch(lambda rt: rt.precision, devices=1) == [ff.Precision.parse(64)]
    with pytest.raises(
        ConfigurationError, match="precision='bf16-true', but the command line says --precision=64-true"
    ):
        ff.init_runtime(precision="bf16-true")
    monkeypatch.setenv(RUN, write({"precision": "64-true"}, 1 << 30))
    assert ff.init_runtime(accelerator="cpu").precision == ff.Precision()
    for wrong in ("2", "{", "[]", '{"pid": 1}'):
        with pytest.raises(ConfigurationError, match=RUN):
            read({RUN: wrong}, (1,))


# Real runs


def test_a_script_runs_on_two_ranks_and_ends_with_its_own_status(tmp_path):
    words = ["exit", "--devices", "5", "-m", "two words"]
    options = ["--accelerator", "cpu", "--devices", "2", "--precision", "bf16-mixed", "--strategy", "functional"]
    status, _, err = finish(start("run", *options, "joining.py", *words, FACTS=tmp_path))
    assert status == 7, err
    assert err.splitlines()[-1].startswith("fabricfn: rank 1 exited with status 7")
    for fact in facts(tmp_path, 2):
        assert fact["words"] == words
        assert (fact["sum"], fact["environment"], fact["strategy"]) == ([3.0], "script", "functional")
        assert fact["compute"] == "torch.bfloat16"


def test_a_module_runs_under_the_same_flags_and_the_script_is_told_of_a_contradiction(tmp_path):
    status, _, err = finish(
        start("run", "--devices", "3", "-m", "script", "never", flags=["-W", "error"], FACTS=tmp_path)
    )
    assert status == 1
    assert "the script says devices=2, but the command line says --devices=3" in err


def test_two_nodes_start_again_together(tmp_path):
    with contextlib.closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = ["--accelerator", "cpu", "--num-nodes", "2", "--main-address", "127.0.0.1", "--main-port", port]
    common += ["--max-restarts", "1"]
    nodes = [start("run", *common, "--node-rank", node, "joining.py", "fail once", FACTS=tmp_path) for node in (0, 1)]
    ended = [finish(node) for node in nodes]
    assert [status for status, _, _ in ended] == [0, 0], ended
    told = facts(tmp_path, 2)
    assert [fact["attempt"] for fact in told] == [1, 1]
    assert [fact["sum"] for fact in told] == [[3.0], [3.0]]
    assert [fact["place"] for fact in told] == [[0, 1, 0, 2], [0, 1, 1, 2]]


def test_the_report_says_why_each_launcher_matched_or_not_and_keeps_secrets():
    seen = {"SLURM_JOB_ID": "7", "WANDB_API_KEY": "abc", "SLURM_JWT_TOKEN": "s3cret", "FAVOURITE": "tea"}
    text = ff.environment_report(seen)
    assert f"torch {__import__('torch').__version__}" in text
    assert "slurm: no: in a SLURM job, but srun did not start the process" in text
    assert "single: yes: rank 0 of 1" in text
    assert "SLURM_JOB_ID=7" in text
    assert not any(word in text for word in ("abc", "s3cret", "tea"))
    text = ff.environment_report({"MASTER_ADDR": "h", "MASTER_PORT": "7", "WORLD_SIZE": "4", "RANK": "2"})
    assert "kubeflow: yes: rank 2 of 4, local rank 0 of 1, node 2 of 4, at h:7" in text
    assert "single: yes, but an earlier one has matched" in text
    assert "ConfigurationError: the environment variable WORLD_SIZE is 'x'" in ff.environment_report(
        {"MASTER_ADDR": "h", "MASTER_PORT": "7", "WORLD_SIZE": "x", "RANK": "2"}
    )


def test_env_prints_the_report():
    status, out, err = finish(start("env"))
    assert status == 0, err
    assert "launchers, in the order in which they are asked:" in out


def test_the_command_is_installed_by_its_name():
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    module, _, function = scripts["fabricfn"].partition(":")
    assert getattr(__import__(module, fromlist=[function]), function) is cli.main
