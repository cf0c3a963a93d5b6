"""What `consolidate` writes is opened by safetensors and transformers; what transformers wrote, `load_raw` reads."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import fabricfn as ff
from fabricfn.checkpoint import exporting
from fabricfn.checkpoint.exporting import boxes
from fabricfn.checkpoint.format.boxes import Box, flaw, whole
from fabricfn.checkpoint.storage.opening import opened
from fabricfn.errors import CheckpointError
from fabricfn.testing import threads
from tests.support.runtimes import RT


def net(seed=0):
    """An odd count of numbers of 4 bytes, and then one of 8."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 4, bias=False))


def read_all(files):
    """By safetensors' own reader."""
    return {name: value for file in files if file.suffix == ".safetensors" for name, value in load_file(file).items()}


def same(found, expected):
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value), name


def test_a_model_becomes_one_file_with_its_own_names(tmp_path):
    module = net()
    model = ff.setup_model(RT, module)
    opt = ff.setup_optimizer(RT, model, torch.optim.AdamW, lr=0.1)
    ff.save(RT, tmp_path / "last", {"model": model, "opt": opt, "epoch": 3})
    files = ff.consolidate(tmp_path / "last", tmp_path / "new" / "hub")
    assert files == (tmp_path / "new" / "hub" / "model.safetensors",)
    same(read_all(files), module.state_dict())
    header = json.loads(files[0].read_bytes()[8:].split(b"}}", 1)[0] + b"}}")
    sizes = {"F32": 4, "I64": 8}
    assert all(entry["data_offsets"][0] % sizes[entry["dtype"]] == 0 for entry in header.values() if "dtype" in entry)
    with safe_open(files[0], "pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert files[0].stat().st_mode & 0o777 == 0o666 & ~_umask()
    assert [entry.name for entry in files[0].parent.iterdir()] == ["model.safetensors"]
    assert all(torch.equal(v, model.params[n]) for n, v in ff.load_raw(RT, files[0].parent, model).params.items())


def _umask():
    found = os.umask(0)
    os.umask(found)
    return found


@pytest.mark.parametrize("limit", [1, 60, 100, 10_000])
def test_shards_keep_to_the_limit_and_the_index_names_each_tensor(tmp_path, limit):
    module = net()
    ff.save(RT, tmp_path / "last", {"model": ff.setup_model(RT, module)})
    files = ff.consolidate(tmp_path / "last", tmp_path / "hub", max_shard_size=limit)
    same(read_all(files), module.state_dict())
    if limit == 10_000:
        return
    *shards, index = files
    placed = json.loads(index.read_text())
    state = module.state_dict()
    assert placed["metadata"]["total_size"] == sum(value.nbytes for value in state.values())
    for number, shard in enumerate(shards):
        assert shard.name == f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        names = list(load_file(shard))
        assert all(placed["weight_map"][name] == shard.name for name in names)
        assert len(names) == 1 or sum(state[name].nbytes for name in names) <= limit
    assert set(placed["weight_map"]) == set(state)
    same(ff.load_raw(RT, tmp_path / "hub"), state)


def test_an_older_export_is_replaced_whole_and_other_files_stay(tmp_path):
    ff.save(RT, tmp_path / "last", {"model": ff.setup_model(RT, net())})
    target = tmp_path / "hub"
    ff.consolidate(tmp_path / "last", target, max_shard_size=60)
    (target / "config.json").write_text("{}")
    (target / f".export-{'a' * 32}-model.safetensors").write_text("what a killed one left")
    assert len(list(target.iterdir())) > 5
    ff.consolidate(tmp_path / "last", target)
    assert sorted(entry.name for entry in target.iterdir()) == ["config.json", "model.safetensors"]
    before = (target / "model.safetensors").read_bytes()
    ff.consolidate(tmp_path / "last", target, max_shard_size=60)
    assert not (target / "model.safetensors").exists()
    ff.consolidate(tmp_path / "last", target)
    assert (target / "model.safetensors").read_bytes() == before


def test_a_damaged_block_leaves_the_older_export_as_it_was(tmp_path):
    ff.save(RT, tmp_path / "last", {"model": ff.setup_model(RT, net())})
    ff.consolidate(tmp_path / "last", tmp_path / "hub")
    before = {entry.name: entry.read_bytes() for entry in (tmp_path / "hub").iterdir()}
    data = next((tmp_path / "last" / "data").iterdir())
    content = bytearray(data.read_bytes())
    content[-3] ^= 1
    data.write_bytes(content)
    with pytest.raises(CheckpointError, match="is damaged: the checksum"):
        ff.consolidate(tmp_path / "last", tmp_path / "hub", max_shard_size=60)
    assert {entry.name: entry.read_bytes() for entry in (tmp_path / "hub").iterdir()} == before


def test_several_models_bear_their_path_and_only_chooses(tmp_path):
    one, two = net(1), net(2)
    tree = {"a": {"student": ff.setup_model(RT, one)}, "teacher": ff.setup_model(RT, two),
            "stats": {"mean": torch.ones(2), "more": [torch.zeros(1)], "n": 3}}  # fmt: skip
    ff.save(RT, tmp_path / "last", tree)
    found = read_all(ff.consolidate(tmp_path / "last", tmp_path / "both"))
    expected = {f"a.student.{n}": v for n, v in one.state_dict().items()}
    expected |= {f"teacher.{n}": v for n, v in two.state_dict().items()}
    same(found, expected)
    same(read_all(ff.consolidate(tmp_path / "last", tmp_path / "one", only="teacher")), two.state_dict())
    part = read_all(ff.consolidate(tmp_path / "last", tmp_path / "part", only="teacher/params/0.*"))
    same(part, {name: value for name, value in two.state_dict().items() if name.startswith("0.")})
    stats = read_all(ff.consolidate(tmp_path / "last", tmp_path / "stats", only="stats"))
    same(stats, {"mean": torch.ones(2), "more.0": torch.zeros(1)})


def test_what_cannot_be_exported_is_said(tmp_path):
    ff.save(RT, tmp_path / "plain", {"w": torch.ones(2), "n": 3})
    with pytest.raises(CheckpointError, match=r"holds no Model.*only=.*w, n"):
        ff.consolidate(tmp_path / "plain", tmp_path / "hub")
    with pytest.raises(CheckpointError, match="has no tensors"):
        ff.consolidate(tmp_path / "plain", tmp_path / "hub", only="n")
    with pytest.raises(CheckpointError, match="selects nothing"):
        ff.consolidate(tmp_path / "plain", tmp_path / "hub", only="x")
    with pytest.raises(CheckpointError, match="number of bytes"):
        ff.consolidate(tmp_path / "plain", tmp_path / "hub", only="w", max_shard_size=0)
    ff.save(RT, tmp_path / "complex", {"w": torch.ones(2, dtype=torch.complex128)})
    with pytest.raises(CheckpointError, match="w: not every safetensors reads the dtype complex128"):
        ff.consolidate(tmp_path / "complex", tmp_path / "hub", only="w")
    ff.save(RT, tmp_path / "names", {"a": {"b.c": torch.ones(1), "b": {"c": torch.ones(1)}}})
    with pytest.raises(CheckpointError, match=r"the name b\.c is that of a/b\.c, too"):
        ff.consolidate(tmp_path / "names", tmp_path / "hub", only="a")
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="is a file"):
        ff.consolidate(tmp_path / "plain", tmp_path / "file", only="w")
    assert not (tmp_path / "hub").exists()


def save_sharded(rt, path, values):
    mesh = DeviceMesh.from_group(rt.world.group, "cpu")
    placements = (Shard(0), Shard(1), Replicate())
    tree = {
        f"{name}{number}": distribute_tensor(value, mesh, [placement], src_data_rank=None)
        for name, value in values.items()
        for number, placement in enumerate(placements)
        if value.ndim > number or number == 2
    }
    ff.save(rt, path, {"w": tree})


def test_shards_of_several_ranks_are_put_together(tmp_path, monkeypatch):
    values = {"a": torch.randn(7, 5), "b": torch.arange(30).reshape(3, 5, 2), "c": torch.ones(0, 3), "d": torch.ones(9)}
    with threads(3) as world:
        world.run(save_sharded, tmp_path / "last", values)
    for buffer in (exporting.BUFFER, 24):  # 24 bytes: tensors go in many slices
        monkeypatch.setattr(exporting, "BUFFER", buffer)
        found = read_all(ff.consolidate(tmp_path / "last", tmp_path / "hub", only="w"))
        assert len(found) == 11
        same(found, {name: values[name[0]] for name in found})


@pytest.mark.parametrize("shape", [(), (0, 3), (5,), (1, 1, 7), (3, 4, 5), (2, 100)])
@pytest.mark.parametrize("most", [1, 3, 7, 1000])
def test_slices_cover_a_box_in_the_order_of_its_elements(shape, most):
    values = torch.arange(max(1, Box(shape, shape).size) if 0 not in shape else 0).reshape(shape)
    found = list(boxes(whole(shape), most))
    assert all(0 < box.size <= most for box in found)
    taken = [values[tuple(slice(o, o + n) for o, n in zip(box.offset, box.shape, strict=True))] for box in found]
    assert (
        torch.cat([part.reshape(-1) for part in taken] or [values.reshape(-1)]).tolist() == values.reshape(-1).tolist()
    )
    assert not found or not flaw(found, shape)


def test_memory_stays_far_below_the_size_of_the_model(tmp_path):
    size = 160 << 20
    ff.save(RT, tmp_path / "last", {"w": torch.empty(size // 4096, 1024), "v": torch.empty(8)})
    code = """
import resource, sys, torch, fabricfn as ff
import fabricfn.checkpoint.exporting
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
ff.consolidate(sys.argv[1], sys.argv[2], only="*")
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "last"), str(tmp_path / "hub")], check=True,
                          capture_output=True, text=True, timeout=120)  # fmt: skip
    assert int(done.stdout) << 10 < 80 << 20
    assert (tmp_path / "hub" / "model.safetensors").stat().st_size > size


# ---------------------------------------------------------------- Hugging Face


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A model of the real package, in shards, and its module."""
    import transformers  # 4 s, of one fixture

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    config = transformers.GPT2Config(
        vocab_size=50, n_positions=16, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
    )
    torch.manual_seed(0)
    net = transformers.GPT2LMHeadModel(config)
    folder = tmp_path_factory.mktemp("hub")
    net.save_pretrained(folder / "sharded", max_shard_size="8KB")
    net.save_pretrained(folder / "single")
    return folder, net


@pytest.mark.parametrize("name", ["sharded", "single", "single/model.safetensors", "cached"])
def test_what_transformers_saved_is_read_tied_weights_and_all(hub, name, tmp_path):
    folder, net = hub
    transformers = sys.modules["transformers"]
    place = folder / name
    if name == "cached":  # as the hub's own cache has it: links to files that bear their digest
        place = tmp_path / "models--x" / "snapshots" / "abc"
        place.mkdir(parents=True)
        (tmp_path / "models--x" / "blobs").mkdir()
        for number, file in enumerate(sorted((folder / "sharded").iterdir())):
            shutil.copy(file, tmp_path / "models--x" / "blobs" / f"{number}")
            (place / file.name).symlink_to(f"../../blobs/{number}")
    if name == "sharded":
        assert len(list(place.glob("*.safetensors"))) > 3
    model = ff.setup_model(RT, transformers.GPT2LMHeadModel(net.config))
    loaded = ff.load_raw(RT, place, model)
    expected = net.state_dict()
    assert set(loaded.params) == set(expected) - {"lm_head.weight"}
    assert all(torch.equal(value, expected[key]) for key, value in loaded.params.items())


def test_transformers_opens_what_consolidate_wrote(hub, tmp_path):
    folder, module = hub
    transformers = sys.modules["transformers"]
    ff.save(RT, tmp_path / "last", {"model": ff.setup_model(RT, module), "epoch": 3})
    for limit in (8 << 10, 1 << 30):
        files = ff.consolidate(tmp_path / "last", tmp_path / "hub", max_shard_size=limit)
        assert len(files) == 1 or len(files) > 4
        module.config.save_pretrained(tmp_path / "hub")
        found, facts = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "hub", output_loading_info=True)
        assert not facts["missing_keys"]
        assert not facts["unexpected_keys"]
        same(found.state_dict(), module.state_dict())
        assert found.lm_head.weight is found.transformer.wte.weight


def test_a_checkpoint_that_is_not_committed_yet_is_exported_into_its_own_folder(tmp_path):
    """What `save` does before the commit: the manifest is in memory alone."""
    module = net()
    ff.save(RT, tmp_path / "last", {"model": ff.setup_model(RT, module), "n": 3})
    with opened(tmp_path / "last") as source:
        manifest = source.manifest
    (tmp_path / "last" / "manifest.json").unlink()
    size = exporting.export_beside(tmp_path / "last", manifest)
    assert size == (tmp_path / "last" / "model.safetensors").stat().st_size
    same(load_file(tmp_path / "last" / "model.safetensors"), module.state_dict())


def save_exported(rt, path, modules):
    model = ff.setup_model(rt, modules[0])
    return ff.save(rt, path, {"model": model, "epoch": 3}, export="hf")


def test_save_exports_what_several_ranks_sharded_and_appears_whole(tmp_path):
    module, path = net(), tmp_path / "last"
    with threads(2) as world:
        receipt, _ = world.run(save_exported, path, [net(), net()], strategy=ff.strategies.fsdp(units=None))
    same(load_file(path / "model.safetensors"), module.state_dict())
    assert receipt.bytes == sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    ff.verify_checkpoint(path)
    assert ff.list_checkpoints(tmp_path) == [path]
    assert ff.load(RT, path)["epoch"] == 3
    ff.save(RT, path, {"epoch": 4})  # the export is a checkpoint's own, and goes with it
    assert sorted(entry.name for entry in path.iterdir()) == ["data", "manifest.json"]
    alone = tmp_path / "hub"
    alone.mkdir()
    (alone / "model.safetensors").write_text("a user's own")
    with pytest.raises(CheckpointError, match="files that no checkpoint has"):
        ff.save(RT, alone, {"epoch": 4})


def test_an_export_that_fails_leaves_the_checkpoint_that_stood(tmp_path):
    ff.save(RT, tmp_path / "last", {"epoch": 3})
    with pytest.raises(CheckpointError, match="holds no Model"):
        ff.save(RT, tmp_path / "last", {"w": torch.ones(2)}, export="hf")
    assert ff.load(RT, tmp_path / "last") == {"epoch": 3}
    assert [entry.name for entry in tmp_path.iterdir()] == ["last"]
    with pytest.raises(ff.ConfigurationError, match="export='hf'"):
        ff.save(RT, tmp_path / "last", {"w": torch.ones(2)}, export="onnx")
