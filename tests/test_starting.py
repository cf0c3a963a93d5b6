"""Starting ranks: what init_runtime finds, joins and refuses."""

import os
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist

import fabricfn as ff
from fabricfn.environments import Topology, find
from fabricfn.errors import ConfigurationError
from tests.support.starts import TWO, meet

pytestmark = pytest.mark.timeout(120)


def test_one_rank_needs_no_process_group():
    rt = ff.init_runtime(accelerator="cpu", precision=64, seed=7)
    assert (rt.rank, rt.world_size, rt.device, rt.seed, rt.strategy.name) == (0, 1, torch.device("cpu"), 7, "single")
    assert rt.world.group is None
    assert not dist.is_initialized()
    assert ff.init_runtime(accelerator="cpu", strategy="ddp").world.group is None
    assert ff.init_runtime(accelerator="cpu", strategy="functional").strategy.name == "functional"
    assert repr(rt) == "Runtime(rank 0 of 1 on cpu, single, float64, seed 7)"


def test_outside_a_script_several_devices_need_launch():
    assert ff.init_runtime(accelerator="cpu", devices="auto").world_size == 1
    with pytest.raises(ConfigurationError, match=r"this is a test.*ff\.launch\(fn, devices=2\)"):
        ff.init_runtime(devices=2, accelerator="cpu")


def test_runtime_ends_what_it_began_after_an_error_too():
    def inside(rt):
        ended = []
        for wrong in (False, True):
            ff.shutdown(rt)
            try:
                with ff.runtime() as inner:
                    meet(inner)
                    assert dist.is_initialized()
                    if wrong:
                        raise KeyError("body")
            except KeyError:
                pass
            ended.append(not dist.is_initialized())
            ff.shutdown(inner)  # twice
        return ended

    assert ff.launch(inside, **TWO) == [[True, True]] * 2


def test_a_group_that_the_user_made_is_joined_and_left_alone():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with ff.runtime(accelerator="cpu") as rt:
            assert rt.environment == "process group"
        assert dist.is_initialized()
        with pytest.raises(ConfigurationError, match="devices=2, but process group says 1"):
            ff.init_runtime(devices=2, accelerator="cpu")
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"strategy": "dpp"}, "'ddp'"),
        ({"strategy": "no.such.module:factory"}, "cannot be imported"),
        ({"strategy": "fabricfn.tree:tree_paths_"}, "cannot be imported"),
        ({"strategy": "builtins:dict"}, "no Strategy record but a dict"),
        ({"strategy": 3}, "no Strategy record"),
        ({"precision": "8-bit"}, "32-true"),
        ({"accelerator": "abacus"}, "a cpu"),
        ({"environment": "slurn"}, "torchrun"),
        ({"environment": "torchrun"}, "not started by it"),
        ({"spawn": "sometimes"}, "script, never"),
        ({"start_method": "clone"}, "fork"),
        ({"num_nodes": 0}, "at least 1"),
        ({"max_restarts": -1}, "at least 0"),
        ({"timeout": 0}, "positive"),
    ],
)
def test_what_is_unknown_is_an_error_that_says_what_there_is(options, says):
    with pytest.raises(ConfigurationError) as caught:
        ff.init_runtime(**{"accelerator": "cpu", **options})
    assert says in str(caught.value)


def test_a_strategy_may_be_a_record_or_a_path():
    record = ff.strategies.functional()
    assert ff.init_runtime(accelerator="cpu", strategy=record).strategy is record
    path = "fabricfn.strategies.functional:functional"
    assert ff.init_runtime(accelerator="cpu", strategy=path).strategy.name == "functional"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"devices": 2}, "devices=2, but my cluster says 1 processes on this node"),
        ({"num_nodes": 3}, "num_nodes=3, but my cluster says 1"),
        ({"node_rank": 1}, "node_rank=1, but my cluster says 0"),
        ({"main_address": "a"}, "main_address='a', but my cluster says 'b'"),
        ({"main_port": 1}, "main_port=1, but my cluster says 2"),
        ({"max_restarts": 1}, "max_restarts=1, but my cluster says 3"),
    ],
)
def test_an_option_that_contradicts_the_launcher_names_both(options, says):
    mine = Topology(name="my cluster", main_address="b", main_port=2, max_restarts=3)
    assert ff.init_runtime(accelerator="cpu", environment=mine).environment == "my cluster"
    with pytest.raises(ConfigurationError) as caught:
        ff.init_runtime(accelerator="cpu", environment=mine, **options)
    assert says in str(caught.value)


def test_who_started_this_process_is_a_pure_function_of_the_environment():
    elastic = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "GROUP_RANK": "1"}
    elastic |= {"GROUP_WORLD_SIZE": "2", "MASTER_ADDR": "head", "MASTER_PORT": "29", "TORCHELASTIC_RUN_ID": "x"}
    topology = find(elastic)
    assert (topology.name, topology.rank, topology.node_rank, topology.num_nodes) == ("torchrun", 5, 1, 2)
    assert (topology.main_address, topology.main_port) == ("head", 29)
    ours = {
        **elastic,
        "GROUP_RANK": "0",
        "GROUP_WORLD_SIZE": "1",
        "FABRICFN_STARTED_BY": "script",
        "FABRICFN_FOLDER": "/tmp/f",
    }
    ours["TORCHELASTIC_RESTART_COUNT"] = "2"
    assert find(ours).name == "script"
    assert (find(ours).folder, find(ours).main_address) == ("/tmp/f/attempt-2", None)
    assert find({}) == Topology()
    assert find(elastic, "single") == Topology()
    for wrong in ({**elastic, "RANK": "one"}, {name: elastic[name] for name in elastic if name != "RANK"}):
        with pytest.raises(ConfigurationError, match="RANK"):
            find(wrong)


def test_importing_needs_no_launcher_and_starts_nothing():
    code = (
        "import fabricfn as ff\n"
        "for name in ff.__all__: getattr(ff, name)\n"
        "import threading, torch.distributed as dist\n"
        "assert not dist.is_initialized() and threading.active_count() == 1\n"
    )
    environ = {**os.environ, "RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "nowhere.invalid"}
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, env=environ)
