"""`fabricfn inspect` on checkpoints that are real; commands are quick, and their errors one line."""

import math
import os
import pickle
import re
import shutil
import subprocess
import sys
import time
import zipfile

import pytest
import torch
from torch import nn

import fabricfn as ff
from fabricfn.checkpoint.foreign.torch_outlines import torch_outline
from fabricfn.errors import CheckpointError
from tests.support.commands import GOLDEN, checkpoints, command

made = checkpoints()


# ---------------------------------------------------------------- quick, and without torch


def test_inspect_and_plot_import_no_torch_and_help_is_quick(made, tmp_path):
    (tmp_path / "metrics.csv").write_text("step,loss\n1,0.5\n2,0.25\n")
    things = [made / name for name in ("two", "hub", "one.safetensors", "one.pt")]
    calls = [["inspect", str(path)] for path in (*things, GOLDEN / "fabric/sharded")] + [["plot", str(tmp_path)]]
    code = f"""
import sys
from fabricfn.cli import main
for words in {calls!r}:
    try:
        main(words)
    except SystemExit as ended:
        assert not ended.code, (words, ended.code)
    assert "torch" not in sys.modules and "numpy" not in sys.modules, words
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    best = math.inf
    for name in ("inspect", "diff", "convert", "consolidate", "plot"):
        began = time.perf_counter()
        words = [sys.executable, "-m", "fabricfn", name, "--help"]
        usage = "usage: fabricfn " + name.replace("consolidate", "convert")
        assert usage in subprocess.run(words, capture_output=True, text=True, check=True).stdout
        best = min(best, time.perf_counter() - began)
    assert best < 0.5


def test_a_reader_that_goes_away_is_no_traceback(made):
    command = f"{sys.executable} -m fabricfn inspect {made}/two | true; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True, timeout=60)
    assert done.stderr == ""
    assert done.stdout in ("0\n", "141\n")


# ---------------------------------------------------------------- inspect


def rows_of(text):
    """Name -> the rest of its row, of the rows without children."""
    lines = text.partition("\n\n")[2].splitlines()
    return {line.split()[0]: " ".join(line.split()[1:]) for line in lines}


def test_inspect_shows_tree_shards_sizes_and_writer(capsys, made):
    status, out, err = command(capsys, "inspect", made / "two")
    assert (status, err) == (0, "")
    summary = ff.inspect_checkpoint(made / "two")
    assert out.startswith(f"{made / 'two'}: fabricfn, {summary.created:%Y-%m-%d %H:%M:%S} UTC, by 2 ranks under fsdp")
    assert f"{summary.bytes:,} bytes in 3 files" in out
    assert re.search(r"^  1: data/r00001-000\.safetensors +[\d,]+ bytes$", out, re.MULTILINE)
    rows = rows_of(out)
    assert rows["model"].startswith("Model ")
    assert rows["epoch"] == "3"
    assert rows["note"] == "'first'"
    assert re.search(r"^    0\.weight +float64\[4, 3\] +96  2 shards in files 0, 1$", out, re.MULTILINE)
    assert re.search(r"^    1\.num_batches_tracked +int64\[\] +8  file [01]$", out, re.MULTILINE)
    names = {entry.path.rpartition("/")[2] for entry in summary.entries}
    assert names <= set(rows)
    total = sum(entry.bytes for entry in summary.entries if entry.path.startswith("model/"))
    assert re.search(rf"^model +Model +{total:,}$", out, re.MULTILINE)


def test_inspect_stops_at_a_depth(capsys, made):
    _, out, _ = command(capsys, "inspect", made / "two", "--depth", "1")
    assert list(rows_of(out)) == ["model", "opt", "epoch", "note"]


@pytest.mark.parametrize(
    ("name", "writer"), [("hub", "safetensors"), ("one.safetensors", "safetensors"), ("one.pt", "PyTorch")]
)
def test_inspect_shows_other_tools_files_as_they_are(capsys, made, name, writer):
    status, out, _ = command(capsys, "inspect", made / name)
    assert status == 0
    assert f": {writer}" in out.splitlines()[0]
    state = torch.load(made / "one.pt", weights_only=True)
    expected = {key: f"{str(value.dtype)[6:]}{list(value.shape)} {value.nbytes:,}" for key, value in state.items()}
    assert rows_of(out) == expected


def test_inspect_shows_sharded_folders_and_those_of_torch(capsys, made, tmp_path):
    ff.consolidate(made / "two", tmp_path / "hub", max_shard_size=100)
    _, out, _ = command(capsys, "inspect", tmp_path / "hub")
    assert "shards and their index" in out
    assert rows_of(out)["0.weight"].startswith("float64[4, 3] 96 file ")
    _, out, _ = command(capsys, "inspect", GOLDEN / "fabric/sharded")
    assert re.search(r"^  lin\.weight +float32\[3, 4\] +48  2 shards in files 0, 1$", out, re.MULTILINE)


class Evil:
    def __reduce__(self):
        return os.system, ("touch evil",)


def test_inspect_names_what_a_file_wants_to_run_and_does_not_run_it(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shared = torch.arange(6.0)
    tree = {
        "a\x1b[31m": Evil(),
        "w": nn.Parameter(shared),
        "twin": [shared, shared[:2]],
        "n": float("nan"),
        "d": torch.int8,
    }
    torch.save(tree, tmp_path / "a.pt")
    _, out, _ = command(capsys, "inspect", "a.pt")
    assert not (tmp_path / "evil").exists()
    assert "\x1b" not in out
    rows = rows_of(out)
    assert rows["a\\x1b[31m"].split(".")[1] == "system>"
    assert rows["w"] == "float32[6] 24"
    assert rows["0"] == "float32[6] 0 the same array as w"
    assert rows["1"] == "float32[2] 8"
    assert rows["n"] == "nan"
    assert rows["d"] == "<torch.int8>"


def test_a_pickle_that_grows_or_holds_itself_is_an_error(tmp_path):
    rows = [0]
    for _ in range(40):
        rows = [rows, rows]
    mine = []
    mine.append(mine)
    for value in (rows, mine):
        with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:
            archive.writestr("a/data.pkl", pickle.dumps(value))
        with pytest.raises(CheckpointError, match="nests too deep, or has too many entries"):
            torch_outline(tmp_path / "a.pt")


# ---------------------------------------------------------------- errors


def test_errors_are_one_clear_line_and_status_2(capsys, made, tmp_path):
    shutil.copytree(made / "one", tmp_path / "bad")
    file = next((tmp_path / "bad" / "data").iterdir())
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    (tmp_path / "text.pt").write_text("no pickle")
    for words, text in (
        (["inspect", tmp_path / "none"], "there is no checkpoint at"),
        (["inspect", tmp_path / "text.pt"], "cannot be read as a PyTorch file"),
        (["diff", made / "one", tmp_path / "none"], "there is no checkpoint at"),
        (["diff", made / "one", tmp_path / "bad"], "is damaged"),
        (["diff", made / "one", made / "two", "--only", "modell"], "selects nothing"),
        (["convert", made / "one", tmp_path / "x.pt", "--only", "modell"], "selects nothing"),
        (["convert", made / "one", tmp_path / "text.txt" / "x.pt"], ""),
        (["plot", tmp_path / "none"], "there is no"),
        (["plot", tmp_path], "holds no metrics.csv"),
    ):
        if not text:
            (tmp_path / "text.txt").write_text("")
        status, out, err = command(capsys, *words)
        assert (status, out) == (2, "")
        assert err.startswith(f"fabricfn {words[0]}: error: ")
        assert text in err
    assert not (tmp_path / "x.pt").exists()
