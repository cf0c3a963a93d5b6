"""Files of other tools that are damaged or mean harm: they are refused by name, and run nothing."""

import json
import os
import pickle
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import fabricfn as ff
from fabricfn.errors import CheckpointError
from tests.support.runtimes import RT
from tests.support.torch_files import dcp_save


class Evil:
    """What runs code where it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_a_pickle_that_runs_code_is_refused_by_name_and_nothing_runs(tmp_path):
    ran = tmp_path / "ran"
    torch.save({"w": torch.ones(2), "x": Evil(ran)}, tmp_path / "a.pt")
    (tmp_path / "b.pt").write_bytes(pickle.dumps(Evil(ran), protocol=2))
    for name in ("a.pt", "b.pt"):
        with pytest.raises(CheckpointError, match=rf"(?s){name}.*(posix|nt)\.system.*torch\.save"):
            ff.load_raw(RT, tmp_path / name)
    torch.save({"w": torch.ones(2), "x": nn.Linear(1, 1)}, tmp_path / "c.pt")
    with pytest.raises(CheckpointError, match=r"c\.pt wants to unpickle torch\.nn\.modules\.linear\.Linear"):
        ff.load_raw(RT, tmp_path / "c.pt")
    assert not ran.exists()


@pytest.fixture
def distributed(tmp_path):
    """A folder of torch.distributed.checkpoint."""
    dcp_save({"w": torch.arange(6.0).reshape(2, 3), "n": 3}, tmp_path / "dcp")
    return tmp_path / "dcp"


def test_metadata_that_names_other_classes_is_refused_and_nothing_runs(distributed, tmp_path):
    ran, path = tmp_path / "ran", distributed / ".metadata"
    whole = path.read_bytes()
    metadata = pickle.loads(whole)
    metadata.planner_data["w"] = Evil(ran)
    path.write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match=r"(?s)\.metadata wants to unpickle (posix|nt)\.system.*StorageMetadata"):
        ff.load_raw(RT, distributed)
    for global_name in ("builtins\neval", "torch\nload", "torch.hub\nload", "fabricfn\nload"):
        path.write_bytes(b"c" + global_name.encode() + b"\n(S'1'\ntR.")
        with pytest.raises(CheckpointError, match="wants to unpickle " + global_name.replace("\n", r"\.")):
            ff.load_raw(RT, distributed)
    # the stand-ins of one file are not those of the next: what a file does to them stays there
    path.write_bytes(b"\x80\x02ctorch.distributed.checkpoint.metadata\nMetadata\n}U\x05stateK\x01s\x86b.")
    with pytest.raises(CheckpointError, match="no whole metadata"):
        ff.load_raw(RT, distributed)
    path.write_bytes(whole)
    assert ff.load_raw(RT, distributed)["n"] == 3
    assert not ran.exists()


def test_metadata_that_contradicts_itself_or_the_files_is_refused(distributed):
    path = distributed / ".metadata"
    whole = path.read_bytes()

    def refused(change, match):
        metadata = pickle.loads(whole)
        change(metadata)
        path.write_bytes(pickle.dumps(metadata))
        with pytest.raises(CheckpointError, match=match):
            ff.load_raw(RT, distributed)

    def place(metadata, **changes):
        for index, info in metadata.storage_data.items():
            if index.fqn == "w":
                for key, value in changes.items():
                    setattr(info, key, value)

    refused(lambda m: place(m, relative_path="../other.distcp"), r"file name '\.\./other\.distcp'")
    refused(lambda m: place(m, relative_path="/etc/passwd"), r"file name '/etc/passwd'")
    refused(lambda m: place(m, relative_path="__9_9.distcp"), r"__9_9\.distcp is missing")
    refused(lambda m: place(m, offset=1 << 40), "cut off or of another save")
    refused(lambda m: place(m, length=4), "fewer than its elements")
    refused(lambda m: place(m, transform_descriptors=["ZStandard"]), "cannot be undone")
    refused(lambda m: setattr(m.state_dict_metadata["w"], "size", torch.Size([4, 3])), "leave a gap")
    refused(lambda m: setattr(m.state_dict_metadata["w"], "size", torch.Size([1, 3])), "lies outside")
    refused(lambda m: m.state_dict_metadata["w"].chunks.append(m.state_dict_metadata["w"].chunks[0]), "overlap")
    refused(lambda m: setattr(m.state_dict_metadata["w"].properties, "dtype", torch.float16), "something else for 'w'")
    refused(lambda m: m.planner_data.update(n=("w", "n")), "inside of another|two entries")
    for size in (0, 1, 100, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=r"\.metadata is no whole metadata"):
            ff.load_raw(RT, distributed)


def test_a_piece_of_a_distributed_checkpoint_runs_nothing_and_a_link_is_refused(distributed, tmp_path):
    ran = tmp_path / "ran"
    file = distributed / "__0_0.distcp"
    whole = file.read_bytes()
    dcp_save({"w": torch.ones(2), "x": Evil(ran)}, tmp_path / "evil")
    with pytest.raises(CheckpointError, match=r"(?s)distcp, the entry 'x', wants to unpickle (posix|nt)\.system"):
        ff.load_raw(RT, tmp_path / "evil")
    assert ff.load_raw(RT, tmp_path / "evil", {"w": None})["w"].tolist() == [1, 1]  # what is not wanted is not read
    file.write_bytes(whole[:-10])
    with pytest.raises(CheckpointError, match=r"__0_0\.distcp has .* bytes, \.metadata wants"):
        ff.load_raw(RT, distributed)
    file.write_bytes(whole[:40] + b"\0" * (len(whole) - 40))
    with pytest.raises(CheckpointError, match=r"__0_0\.distcp, the entry"):
        ff.load_raw(RT, distributed)
    (tmp_path / "elsewhere").write_bytes(whole)
    file.unlink()
    file.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=r"__0_0\.distcp cannot be opened"):
        ff.load_raw(RT, distributed)
    assert not ran.exists()


@pytest.mark.parametrize("name", ["../a.safetensors", "/a.safetensors", "sub/a.safetensors", "..", "a.txt", "", 3,
                                  "C:\\a.safetensors", ".hidden.safetensors"])  # fmt: skip
def test_an_index_leads_nowhere_but_beside_itself(tmp_path, name):
    save_file({"w": torch.ones(1)}, tmp_path / "a.safetensors")
    folder = tmp_path / "model"
    folder.mkdir()
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"w": name}}))
    with pytest.raises(CheckpointError, match=r"index\.json names the file"):
        ff.load_raw(RT, folder)


def test_shards_that_are_links_missing_or_of_another_save_are_refused(tmp_path):
    save_file({"w": torch.ones(1)}, tmp_path / "outside.safetensors")
    folder = tmp_path / "model"
    folder.mkdir()
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"w": "a.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"a\.safetensors is missing"):
        ff.load_raw(RT, folder)
    (folder / "a.safetensors").symlink_to(tmp_path / "outside.safetensors")
    with pytest.raises(CheckpointError, match=r"a\.safetensors is a link that leads out of the folder"):
        ff.load_raw(RT, folder)
    (folder / "a.safetensors").unlink()
    save_file({"v": torch.ones(1)}, folder / "a.safetensors")
    with pytest.raises(CheckpointError, match=r"not in their files: w in a\.safetensors"):
        ff.load_raw(RT, folder)
    for text in ("", "{}", "[]", '{"weight_map": {}}', '{"weight_map": 3}', "[" * 100_000):
        index.write_text(text)
        with pytest.raises(CheckpointError, match=r"index\.json is no whole index"):
            ff.load_raw(RT, folder)


def test_damaged_safetensors_files_are_errors_that_name_the_file(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({"w": torch.arange(6.0), "v": torch.ones(2, dtype=torch.int8)}, path)
    whole = path.read_bytes()

    def refused(data):
        path.write_bytes(data)
        with pytest.raises(CheckpointError, match=r"a\.safetensors is no whole safetensors file"):
            ff.load_raw(RT, path)

    for size in range(0, len(whole), 7):
        refused(whole[:size])
    refused(whole + b"x")
    header = {"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}

    def packed(header, size=8):
        text = json.dumps(header).encode() if not isinstance(header, bytes) else header
        return len(text).to_bytes(8, "little") + text + bytes(size)

    path.write_bytes(packed(header))
    assert ff.load_raw(RT, path)["w"].tolist() == [0, 0]
    refused((1 << 63).to_bytes(8, "little") + whole[8:])
    entry = header["w"]
    for change in ({"shape": [3]}, {"shape": [-2]}, {"shape": "2"}, {"shape": [1 << 62, 1 << 62]},
                   {"data_offsets": [8, 0]}, {"data_offsets": [0]}, {"shape": [2.0]},
                   {"shape": [1] * 70 + [2]}):  # fmt: skip
        refused(packed({"w": {**entry, **change}}))
    refused(packed({"w": entry, "v": entry}))
    refused(
        packed(
            b'{"w": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}, "w": ' + json.dumps(entry).encode() + b"}"
        )
    )
    refused(packed({"w": entry}, 16))
    path.write_bytes(packed({"w": {"dtype": "F4", "shape": [16], "data_offsets": [0, 8]}}))
    with pytest.raises(CheckpointError, match="dtype F4, which is not known"):
        ff.load_raw(RT, path)


def test_damaged_torch_files_and_other_files_are_errors_that_name_the_file(tmp_path):
    path = tmp_path / "a.pt"
    torch.save({"w": torch.arange(600.0)}, path)
    whole = path.read_bytes()
    for size in (0, 1, 3, 4, 30, 200, 1000, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=r"a\.pt cannot be read as a PyTorch file"):
            ff.load_raw(RT, path)
    path.write_text("hello, this is no checkpoint")
    with pytest.raises(CheckpointError, match=r"a\.pt"):
        ff.load_raw(RT, path)
    torch.save({"w": torch.ones(1).expand(1 << 40)}, path)
    with pytest.raises(CheckpointError, match=r"w: .* are a view of 4"):
        ff.load_raw(RT, path)


def test_folders_that_are_nothing_known_say_what_is_there(tmp_path):
    with pytest.raises(CheckpointError, match="no file or folder"):
        ff.load_raw(RT, tmp_path / "none")
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(CheckpointError, match=r"holds no checkpoint that is known.*notes\.txt"):
        ff.load_raw(RT, tmp_path)
    receipt = ff.save(RT, tmp_path / "ours", {"w": torch.ones(1)})
    with pytest.raises(CheckpointError, match=r"ff\.load\(rt"):
        ff.load_raw(RT, receipt.path)
    with pytest.raises(CheckpointError, match="URL"):
        ff.load_raw(RT, "s3://bucket/a.pt")


def test_nothing_is_unpickled_by_pickle_itself_and_nothing_is_run(distributed):
    """An audit hook sees every class that Python's pickle looks up, in a process of its own."""
    code = """
import sys, torch, fabricfn as ff
rt = ff.Runtime(world=ff.World(), precision=ff.Precision(), strategy=ff.strategies.single())
load, watched, seen = ff.load_raw, ("pickle.find_class", "exec", "compile", "os.system", "subprocess.Popen"), []
sys.addaudithook(lambda event, args: event in watched and seen.append((event, args)))
print(load(rt, sys.argv[1])["n"], [entry for entry in seen if entry[0] not in ("exec", "compile")])
print(sorted(name for name in sys.modules if name.startswith("torch.distributed.checkpoint")))
"""
    done = subprocess.run([sys.executable, "-c", code, str(distributed)], check=True, capture_output=True, text=True,
                          timeout=120)  # fmt: skip
    assert done.stdout.splitlines() == ["3 []", "[]"]
