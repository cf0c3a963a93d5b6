"""Checkpoints at URLs: a real server that speaks S3 over HTTP, and one in front of it that fails."""

import http.client
import http.server
import threading

import fsspec
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from moto.server import ThreadedMotoServer
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor

import fabricfn as ff
from fabricfn.checkpoint.storage import retrying
from fabricfn.errors import CheckpointError
from fabricfn.testing import processes
from tests.support.runtimes import RT
from tests.support.stores import MIB, TREES, check_round_trip, same, tree_of


@given(TREES)
@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_load_of_save_is_the_tree_over_s3(s3, tree):
    check_round_trip(f"{s3.bucket}/law", tree, storage_options=s3.options)


class Proxy(http.server.BaseHTTPRequestHandler):
    """In front of the server: every so often it answers 503, hangs up, or cuts an answer off."""

    protocol_version = "HTTP/1.1"
    turns, faults = 0, True
    lock = threading.Lock()

    def forward(self):
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        with Proxy.lock:
            Proxy.turns += 1
            turn = Proxy.turns if Proxy.faults else 1
        if turn % 4 == 0:
            self.answer(503, {}, b"<Error><Code>ServiceUnavailable</Code><Message>busy</Message></Error>")
            return
        if turn % 7 == 0:
            self.close_connection = True
            return
        upstream = http.client.HTTPConnection(*self.server.upstream)
        try:
            upstream.request(self.command, self.path, body, dict(self.headers))
            answer = upstream.getresponse()
            data = answer.read()
        finally:
            upstream.close()
        cut = turn % 5 == 0 and len(data) > 100
        headers = {key: value for key, value in answer.getheaders() if key.lower() not in ("connection", "date")}
        self.answer(answer.status, headers, data[:-50] if cut else data, keep=not cut)

    def answer(self, status, headers, data, keep=True):
        self.send_response(status)
        for key, value in ({"content-length": str(len(data))} | {k.lower(): v for k, v in headers.items()}).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)
        self.close_connection = not keep

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = forward

    def log_message(self, *args):
        pass


class S3:
    """A server that speaks S3."""

    def __init__(self, address):
        self.bucket = "s3://checkpoints"
        self.address = address
        self.options = self.options_at(*address)

    def options_at(self, host, port):
        # without the retries of botocore, which sleep for seconds: those of fabricfn are the matter here
        return {"key": "k", "secret": "s", "client_kwargs": {"endpoint_url": f"http://{host}:{port}"},
                "config_kwargs": {"retries": {"max_attempts": 0}}}  # fmt: skip


@pytest.fixture(scope="module")
def s3():
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    found = S3(server.get_host_and_port())
    fsspec.filesystem("s3", **found.options).mkdir("checkpoints")
    yield found
    server.stop()


def sharded(rt, seed=0):
    mesh = DeviceMesh.from_group(rt.world.group, "cpu", mesh_dim_names=("dp",))
    whole = torch.arange(12.0).reshape(6, 2) + seed
    return {"w": distribute_tensor(whole, mesh, [Shard(0)], src_data_rank=None), "epoch": seed}


def save_sharded(rt, url, options, seed):
    return ff.save(rt, url, sharded(rt, seed), storage_options=options)


def load_sharded(rt, url, options):
    loaded = ff.load(rt, url, sharded(rt, 9), storage_options=options)
    return loaded["w"].to_local(), loaded["epoch"]


def save_apart(rt):
    with pytest.raises(CheckpointError) as caught:
        ff.save(rt, "memory://run/c", sharded(rt))
    return str(caught.value)


def test_ranks_in_processes_of_their_own_write_one_checkpoint(s3):
    url = f"{s3.bucket}/run/step-1"
    with processes(2) as ranks:
        first, second = (ranks.run(save_sharded, url, s3.options, seed) for seed in (1, 2))
        parts = ranks.run(load_sharded, url, s3.options)
        apart = ranks.run(save_apart)
    assert first[0] == first[1] and second[0] == second[1]
    expected = torch.arange(12.0).reshape(6, 2) + 2
    assert same([part for part, _ in parts], list(expected.chunk(2)))
    assert [epoch for _, epoch in parts] == [2, 2]
    loaded = ff.load(RT, url, storage_options=s3.options)
    assert same(loaded, {"w": expected, "epoch": 2})
    fs = fsspec.filesystem("s3", **s3.options)
    fs.invalidate_cache()
    ids = [name.rpartition("/")[2].split("-")[0] for name in fs.ls("checkpoints/run/step-1/data")]
    assert ids == [second[0].save_id] * 2
    assert ff.latest(f"{s3.bucket}/run", storage_options=s3.options) == url
    assert all("is not there" in text and "memory:// is another one in each process" in text for text in apart)


def test_large_arrays_go_up_in_parts(s3, monkeypatch):
    tree = {"w": torch.arange(11 * MIB, dtype=torch.int32), "v": torch.ones(5)}  # 44 MiB: parts of 16 MiB
    url = f"{s3.bucket}/large"
    receipt = ff.save(RT, url, tree, storage_options=s3.options)
    fs = fsspec.filesystem("s3", **s3.options)
    etag = fs.info(f"checkpoints/large/data/{receipt.save_id}-r00000-000.safetensors")["ETag"]
    assert etag.strip('"').endswith("-3")  # S3's mark of an object that came in three parts
    assert same(ff.load(RT, url, tree, storage_options=s3.options), tree)


def test_faults_on_the_wire_are_survived(s3, monkeypatch):
    monkeypatch.setattr(retrying, "PAUSE", 0.001)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Proxy)
    server.upstream = s3.address
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        options = s3.options_at(*server.server_address)
        for seed in range(3):
            ff.save(RT, f"{s3.bucket}/wire", tree_of(seed), storage_options=options)
            assert same(ff.load(RT, f"{s3.bucket}/wire", storage_options=options), tree_of(seed))
        assert Proxy.turns > 20
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    assert same(ff.load(RT, f"{s3.bucket}/wire", storage_options=s3.options), tree_of(2))


def test_refusals_of_a_server_are_told_at_once(s3):
    with pytest.raises(CheckpointError, match=r"writing s3://nowhere/c/data/.* failed: there is no such place"):
        ff.save(RT, "s3://nowhere/c", tree_of(), storage_options=s3.options)
    with pytest.raises(CheckpointError, match=r"there is no checkpoint at s3://nowhere/c"):
        ff.load(RT, "s3://nowhere/c", storage_options=s3.options)
