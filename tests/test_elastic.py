"""Several nodes that come and go, and nodes in networks of their own: real parents, real ranks."""

import contextlib
import os
import shutil
import socket
import subprocess
import sys
from collections import Counter

import pytest

import fabricfn as ff
from fabricfn.accelerators import Choice
from fabricfn.environments import Topology
from fabricfn.errors import ConfigurationError, LaunchError
from fabricfn.starting.joining import check_conflicts
from fabricfn.starting.meeting import own_address
from fabricfn.starting.request import Request, check_own_start, node_range, rendezvous_name
from tests.support.starts import PROGRAMS, free_port, wait_for

ENVIRON = {**os.environ, "OMP_NUM_THREADS": "1"}
ONE = Choice(accelerator="cpu", indices=(0,), open=True)

pytestmark = pytest.mark.timeout(120)


def listens(port):
    with contextlib.closing(socket.socket()) as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


# What is asked for


def test_a_range_of_nodes():
    assert [node_range(one) for one in (1, 3, "2", "1:4")] == [(1, 1), (3, 3), (2, 2), (1, 4)]
    for wrong in (0, -1, True, 1.5, None, "", "0:2", "3:2", "1:", ":2", "a", "1:2:3", "-1:2"):
        with pytest.raises(ConfigurationError, match="num_nodes"):
            node_range(wrong)


def test_who_knows_the_ranks_of_the_nodes():
    there = {"main_address": "head"}
    assert rendezvous_name(Request(num_nodes=2)) == "static"
    assert rendezvous_name(Request(num_nodes="1:2")) == "c10d"
    assert rendezvous_name(Request(num_nodes=2, rendezvous="c10d")) == "c10d"
    check_own_start(Request(num_nodes="1:2", **there), ONE)
    check_own_start(Request(num_nodes=2, rendezvous="c10d", **there), ONE)
    for wrong, says in (
        ({"num_nodes": "1:2"}, "needs main_address="),
        ({"num_nodes": "1:2", "node_rank": 0, **there}, "Leave node_rank out"),
        ({"num_nodes": "1:2", "rendezvous": "static", **there}, "for a fixed number of nodes"),
        ({"num_nodes": 2, **there}, "needs node_rank=0 .. 1"),
        ({"num_nodes": 2, "node_rank": 2, **there}, "must be 0 .. 1"),
    ):
        with pytest.raises(ConfigurationError) as caught:
            check_own_start(Request(**wrong), ONE)
        assert says in str(caught.value)


def test_a_rank_of_a_range_is_in_no_conflict_with_it():
    def at(num_nodes):
        return Topology(world_size=num_nodes, rank=0, num_nodes=num_nodes, main_address="node3", main_port=1)

    request = Request(num_nodes="1:2", main_address="head", main_port=2)
    for num_nodes in (1, 2):
        check_conflicts(request, at(num_nodes), ONE)
    with pytest.raises(ConfigurationError, match="num_nodes='1:2', but single says 3"):
        check_conflicts(request, at(3), ONE)


def test_the_address_for_the_others_is_never_the_loopback_unless_they_are_there():
    assert own_address("127.0.0.1", 1) == ("127.0.0.1", True)
    address, here = own_address("localhost", 1)
    assert address in ("127.0.0.1", "::1") and here
    with pytest.raises(ConfigurationError, match=r"no\.such\.host"):
        own_address("no.such.host.invalid", 1)


def test_a_node_waits_for_the_others_as_long_as_it_is_told_to():
    options = {"main_address": "127.0.0.1", "main_port": free_port(), "accelerator": "cpu", "timeout": 1}
    with pytest.raises(LaunchError, match=r"num_nodes=2: too few nodes came to 127\.0\.0\.1:\d+ within 1 s"):
        ff.launch(print, num_nodes=2, rendezvous="c10d", devices=1, **options)
    with pytest.raises(ConfigurationError, match="rendezvous='smoke'.*c10d"):
        ff.launch(print, num_nodes=2, rendezvous="smoke", devices=1, **options)


# Nodes that come and go


def test_a_node_is_killed_and_another_one_joins(tmp_path):
    port = free_port()
    words = ["--nnodes", "1:2", "--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}", "--max-restarts", "1"]
    command = [sys.executable, "-m", "fabricfn", "run", "--accelerator", "cpu", *words, "elastic.py", str(tmp_path)]

    def node():
        return subprocess.Popen(command, cwd=PROGRAMS, env=ENVIRON, stderr=subprocess.PIPE, text=True)

    def last(num_nodes):
        """The last attempt in which so many nodes have met; -1 where there is none."""
        met = [file for file in tmp_path.glob("attempt-*") if file.read_text() == f"{num_nodes} {num_nodes}"]
        counts = Counter(int(file.name.split("-")[1]) for file in met)
        return max((attempt for attempt, count in counts.items() if count == num_nodes), default=-1)

    nodes = [node()]
    try:
        assert wait_for(lambda: listens(port))  # it keeps the list of nodes, so it must stay
        nodes.append(node())
        assert wait_for(lambda: last(2) >= 0)
        nodes[1].kill()
        assert wait_for(lambda: last(1) > last(2))
        nodes.append(node())
        assert wait_for(lambda: last(2) > last(1))
        (tmp_path / "end").touch()
        errors = [one.communicate(timeout=60)[1] for one in nodes]
    finally:
        for one in nodes:
            one.kill()
            one.communicate()
    assert [one.returncode for one in nodes] == [0, -9, 0], errors


# Two networks

NETWORKS = """
set -e
ip link set lo up
unshare -n sleep 100 & other=$!
trap "kill $other" EXIT
until [ "$(readlink /proc/$other/ns/net)" != "$(readlink /proc/self/ns/net)" ]; do :; done
ip link add left type veth peer name right netns $other
ip addr add 10.77.0.1/24 dev left
ip link set left up
there="nsenter -t $other -n"
$there ip addr add 10.77.0.2/24 dev right
$there ip link set right up
$there ip link set lo up
$there "$@" &
"$@"
wait $!
"""


def networks_allowed():
    if not all(map(shutil.which, ("unshare", "nsenter", "ip"))):
        return False
    words = ["unshare", "-rn", "ip", "link", "add", "left", "type", "veth", "peer", "name", "right"]
    return subprocess.run(words, capture_output=True, check=False).returncode == 0


@pytest.mark.skipif(not networks_allowed(), reason="this machine makes no network namespaces")
def test_two_nodes_in_networks_of_their_own(tmp_path):
    """Neither can reach what the name of this machine stands for: only the address that the other one sees will do."""
    words = ["--num-nodes", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", "10.77.0.1:29500"]
    command = [sys.executable, "-m", "fabricfn", "run", "--accelerator", "cpu", *words, "joining.py"]
    environ = {**ENVIRON, "FACTS": str(tmp_path)}
    shell = ["unshare", "-rn", "sh", "-c", NETWORKS, "sh", *command]
    done = subprocess.run(shell, cwd=PROGRAMS, env=environ, text=True, capture_output=True, check=False, timeout=90)
    assert done.returncode == 0, done.stderr
    assert {file.name for file in tmp_path.iterdir()} == {"rank-0", "rank-1"}
    for rank in (0, 1):
        fact = (tmp_path / f"rank-{rank}").read_text()
        assert '"sum": [3.0]' in fact
        assert f'"place": [0, 1, {rank}, 2]' in fact
