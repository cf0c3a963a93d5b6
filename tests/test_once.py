"""What one rank does for all: it prints, runs once, goes first, on each machine or on one."""

import dataclasses
import os

import pytest
import torch

import fabricfn as ff
from fabricfn.errors import LaunchError
from tests.support.starts import TWO, own

pytestmark = pytest.mark.timeout(120)


def test_one_rank_prints(capsys):
    rt = ff.init_runtime(accelerator="cpu")
    ff.print(rt, "a", 1, sep="-")
    assert capsys.readouterr().out == "a-1\n"


def test_several_ranks_print_once(capfd):
    ff.launch(lambda rt: ff.print(rt, "from", rt.rank), **TWO)
    assert own(capfd.readouterr().out) == "from 0"


def test_run_once_gives_every_rank_the_result_or_the_error():
    def fn(rt):
        result = ff.run_once(rt, lambda: {"by": rt.rank, "x": torch.arange(3)})
        errors = []
        for bad in (lambda: {}[1], lambda: lambda: None):
            try:
                ff.run_once(rt, bad)
            except (KeyError, LaunchError) as error:
                errors.append(type(error).__name__)
        return result["by"], result["x"].tolist(), errors

    assert ff.launch(fn, **TWO) == [(0, [0, 1, 2], ["KeyError", "LaunchError"])] * 2


def test_rank_zero_goes_first(tmp_path):
    def fn(rt):
        with ff.rank_zero_first(rt):
            found = (tmp_path / "cache").exists()
            (tmp_path / "cache").touch()
        try:
            with ff.rank_zero_first(rt):
                entered = True
                raise OSError("disk full")
        except OSError as error:
            entered = rt.rank == 0
            return found, entered, str(error)

    assert ff.launch(fn, **TWO) == [(False, True, "disk full"), (True, False, "disk full")]


def on_two_nodes(rt):
    """The runtime as if every second rank were on another machine, as far as such calls can tell."""
    place = {"node_rank": rt.rank // 2, "local_rank": rt.rank % 2, "num_nodes": 2, "local_world_size": 2}
    return dataclasses.replace(rt, world=dataclasses.replace(rt.world, **place))


def test_once_and_first_on_every_machine(tmp_path):
    def inside(rt):
        rt, ran = on_two_nodes(rt), []
        value = ff.run_once(rt, lambda: ran.append(1) or f"from {rt.rank}", per_node=True)
        with ff.rank_zero_first(rt, per_node=True):
            cache = tmp_path / str(rt.node_rank)
            first = not cache.exists()
            cache.touch()
        with pytest.raises(KeyError, match="disk"):
            ff.run_once(rt, lambda: {}["disk"] if rt.rank == 2 else None, per_node=True)
        return value, len(ran), first

    told = ff.testing.run(inside, world_size=4)
    assert told == [("from 0", 1, True), ("from 0", 0, False), ("from 2", 1, True), ("from 2", 0, False)]


def test_whether_a_file_system_is_shared(tmp_path):
    def inside(rt):
        own = tmp_path / str(rt.rank)
        own.mkdir()
        os.chdir(own)
        shared = ff.is_shared_filesystem(rt, tmp_path / "not" / "there")
        apart = ff.is_shared_filesystem(rt, "/proc/self/cwd")  # the same name, another folder in each process
        return shared, apart, [file.name for file in tmp_path.rglob(".*")]

    assert ff.launch(inside, **TWO) == [(True, False, [])] * 2
