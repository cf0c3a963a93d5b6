"""Checkpoints at URLs: only what is needed is read, and all of that is checked."""

import json

import pytest
import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor

import fabricfn as ff
from fabricfn.errors import CheckpointError
from fabricfn.testing import threads
from tests.support.runtimes import RT
from tests.support.stores import MIB, Faulty, contents, data_names, faulty_store, restore, same, tree_of

store = faulty_store()


def test_a_part_reads_only_its_blocks_and_neighbours_at_once(store):
    rows, width = 24, MIB // 4  # rows of 1 MiB, so 4 to a block
    tree = {"a": torch.arange(rows * width, dtype=torch.float32).reshape(rows, width), "b": torch.ones(3 * MIB)}
    ff.save(RT, "faulty://run/c", tree)

    def load(rt):
        mesh = DeviceMesh.from_group(rt.world.group, "cpu", mesh_dim_names=("dp",))
        like = {"a": distribute_tensor(torch.zeros(rows, width), mesh, [Shard(0)], src_data_rank=None)}
        part = ff.load(rt, "faulty://run/c", like)["a"].to_local()
        return torch.equal(part, tree["a"].chunk(4)[rt.rank])

    Faulty.log.clear()
    with threads(4) as ranks:  # 6 rows each: 0-6, 6-12, ...
        assert ranks.run(load) == [True] * 4
    blocks = [(start, end - start) for kind, path, *span in Faulty.log if kind in ("get", "read") and "data" in path
              for start, end in [span] if end - start > MIB]  # fmt: skip
    assert sorted(size // MIB for _, size in blocks) == [8, 8, 8, 8]  # each rank two blocks, in one request
    Faulty.log.clear()
    loaded = ff.load(RT, "faulty://run/c", {"a": torch.zeros(rows, width)})
    assert torch.equal(loaded["a"], tree["a"])
    sizes = [span[1] - span[0] for kind, path, *span in Faulty.log if kind in ("get", "read") and "data" in path]
    assert sum(size for size in sizes if size > MIB) == 24 * MIB and len(sizes) == 1 + 3


def test_columns_are_read_in_one_go(store):
    value = torch.arange(3 * MIB, dtype=torch.float32).reshape(-1, 96)  # 12 MiB in 3 blocks
    ff.save(RT, "faulty://run/c", {"a": value})

    def load(rt):
        mesh = DeviceMesh.from_group(rt.world.group, "cpu", mesh_dim_names=("dp",))
        like = distribute_tensor(torch.zeros_like(value), mesh, [Shard(1)], src_data_rank=None)
        return torch.equal(ff.load(rt, "faulty://run/c", {"a": like})["a"].to_local(), value.chunk(2, 1)[rt.rank])

    Faulty.log.clear()
    with threads(2) as ranks:
        assert ranks.run(load) == [True] * 2
    sizes = [span[1] - span[0] for kind, path, *span in Faulty.log if kind in ("get", "read") and "data" in path]
    assert sorted(size // MIB for size in sizes if size >= MIB) == [4, 4, 8, 8]  # each block once a rank


def test_damage_is_named(store):
    url = "faulty://run/c"
    ff.save(RT, url, {"a": torch.ones(100), "b": torch.zeros(100)})
    whole, (name,) = contents(), data_names()
    url_of_data = "faulty://" + name[1:]

    def put(data):
        restore(whole)
        Faulty().pipe_file(name, data)

    put(whole[name][:-1] + b"x")
    for read in (lambda: ff.load(RT, url), lambda: ff.verify_checkpoint(url)):
        with pytest.raises(CheckpointError, match=rf"{url_of_data} is damaged: .*block 0 of 'b'"):
            read()
    assert same(ff.load(RT, url, only="a"), {"a": torch.ones(100)})
    put(whole[name][:-1])
    with pytest.raises(CheckpointError, match=rf"{url_of_data} has .* bytes, the manifest says"):
        ff.load(RT, url)
    put(b" " + whole[name][1:])
    with pytest.raises(CheckpointError, match=rf"{url_of_data} begins otherwise"):
        ff.load(RT, url)
    restore(whole)
    del Faulty.store[name]
    with pytest.raises(CheckpointError, match=r"is not a whole checkpoint: data/.* with a, b is missing"):
        ff.load(RT, url)
    restore(whole)
    manifest = json.loads(whole["/run/c/manifest.json"])
    manifest["strategy"] = "other"
    Faulty().pipe_file("/run/c/manifest.json", json.dumps(manifest).encode())
    with pytest.raises(CheckpointError, match=r"faulty://run/c/manifest.json is no whole manifest"):
        ff.load(RT, url)


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("kind", ["get", "read"])
def test_a_checkpoint_that_is_replaced_while_it_is_read_is_opened_again(store, world_size, kind):
    url, turns = "faulty://run/c", []
    ff.save(RT, url, tree_of(0, 100_000))

    def fault(operation, path):
        if operation == kind and "data" in path and len(turns) < 5:
            turns.append(path)
            saved, Faulty.fault = Faulty.fault, None
            ff.save(RT, url, tree_of(len(turns), 100_000))
            Faulty.fault = saved

    with threads(world_size) as ranks:
        Faulty.fault = fault
        loaded = ranks.run(lambda rt: ff.load(rt, url))
    assert len(turns) == 5
    assert all(same(found, tree_of(5, 100_000)) for found in loaded)


def test_a_checkpoint_that_is_replaced_while_it_overwrites_the_template_is_an_error(store):
    url = "faulty://run/c"
    ff.save(RT, url, {"a": torch.ones(9)})

    def fault(operation, path):
        if operation == "read":
            Faulty.fault = None
            ff.save(RT, url, {"a": torch.zeros(9)})

    Faulty.fault = fault
    with pytest.raises(CheckpointError, match=r"was replaced by another checkpoint while it was read"):
        ff.load(RT, url, {"a": torch.ones(9)}, donate=True)
