"""`fabricfn inspect`, `diff`, `convert`, `plot`, on checkpoints and logs that are real."""

import dataclasses
import itertools
import math
import os
import pickle
import re
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import fabricfn as ff
from fabricfn import cli
from fabricfn.checkpoint import exporting
from fabricfn.checkpoint.foreign.torch_outlines import torch_outline
from fabricfn.errors import CheckpointError, ConfigurationError
from fabricfn.plots.logs import curves_of
from fabricfn.plots.scales import scale_of
from fabricfn.plots.terminal import drawn
from fabricfn.testing import threads
from tests.checkpoints import trained

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "golden"
RT = ff.Runtime(world=ff.World(), precision=ff.Precision(), strategy=ff.strategies.single())
DOUBLE = dataclasses.replace(RT, precision=ff.Precision.parse("64-true"))


def save_trained(rt, path):
    model, opt = trained(rt)
    ff.save(rt, path, {"model": model, "opt": opt, "epoch": 3, "note": "first"})


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """One training by two ranks under fsdp and by one; the same model for the hub, as one file and as PyTorch's."""
    folder = tmp_path_factory.mktemp("made")
    with threads(2) as world:
        world.run(save_trained, folder / "two", strategy="fsdp", precision="64-true")
    save_trained(DOUBLE, folder / "one")
    for name in ("hub", "one.safetensors", "one.pt"):
        ff.consolidate(folder / "one", folder / name)
    return folder


def command(capsys, *words):
    """(status, stdout, stderr) of `fabricfn words` in this process."""
    with pytest.raises(SystemExit) as ended:
        cli.main([str(word) for word in words])
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    return ended.value.code, out, err


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


# ---------------------------------------------------------------- diff


def test_diff_is_0_for_the_same_training_however_it_was_cut(capsys, made):
    for other in ("one", "hub", "one.pt"):
        status, out, err = command(capsys, "diff", made / "one", made / other)
        assert (status, err) == (0, "")
        assert " entries equal, 0 differ" in out
    # two ranks add up in another order
    assert command(capsys, "diff", made / "one", made / "two", "--atol", "1e-9")[0] == 0
    assert ff.diff_checkpoints(made / "two", made / "two").equal


def test_diff_names_what_differs_by_how_much_and_what_is_missing(capsys, tmp_path):
    base = torch.arange(12.0).reshape(3, 4)
    tree = {"w": base, "i": torch.tensor([1, 2]), "gone": 1, "x": 0.0, "same": base.half(), "shape": base, "kind": base}
    other = {
        **tree, "w": base.clone(), "i": torch.tensor([1, 2 + (1 << 60)]), "new": torch.ones(2), "x": -0.0,
        "shape": base[:2], "kind": base.double(),
    }  # fmt: skip
    del other["gone"]
    other["w"][1, 2] += 0.5
    other["w"][2, 3] = float("-inf")
    ff.save(RT, tmp_path / "a", tree)
    ff.save(RT, tmp_path / "b", other)
    status, out, _ = command(capsys, "diff", tmp_path / "a", tmp_path / "b")
    assert status == 1
    assert out.splitlines() == [
        f"{tmp_path}/a and {tmp_path}/b: 1 entries equal, 5 differ, 1 only in the first, 1 only in the second",
        "  w: float32[3, 4], 2 of 12 differ, by at most inf",
        "  i: int64[2], 1 of 2 differ, by at most 1.15e+18",
        "  gone: only in the first, 1",
        "  x: 0.0 -> -0.0",
        "  shape: float32[3, 4] -> float32[2, 4]",
        "  kind: float32[3, 4] -> float64[3, 4], 0 of 12 differ, by at most 0",
        "  new: only in the second, float32[2]",
    ]
    assert command(capsys, "diff", tmp_path / "a", tmp_path / "b", "--only", "same", "-q") == (0, "", "")
    assert command(capsys, "diff", tmp_path / "a", tmp_path / "b", "--only", "x")[0] == 1


@pytest.mark.parametrize("buffer", [8, 24, 1 << 20])
def test_differences_are_counted_over_all_blocks(tmp_path, monkeypatch, buffer):
    monkeypatch.setattr(exporting, "BUFFER", buffer)
    a, b = torch.zeros(5, 7), torch.zeros(5, 7, dtype=torch.float64)
    b[0, 0], b[2, 3], b[4, 6] = -2.5, 1e-30, float("nan")
    torch.save({"same": {"w": a}, "kind": {"w": a}}, tmp_path / "a.pt")
    torch.save({"same": {"w": b.float()}, "kind": {"w": b}}, tmp_path / "b.pt")
    for change in ff.diff_checkpoints(tmp_path / "a.pt", tmp_path / "b.pt").changes:
        assert (change.count, change.size) == (3, 35)
        assert math.isnan(change.max_abs)
    b[4, 6] = 0
    torch.save({"same": {"w": b.float()}}, tmp_path / "b.pt")
    (change,) = ff.diff_checkpoints(tmp_path / "a.pt", tmp_path / "b.pt", only="same").changes
    assert (change.count, change.max_abs) == (2, 2.5)
    assert ff.diff_checkpoints(tmp_path / "a.pt", tmp_path / "b.pt", only="same", atol=2.5).equal


@pytest.mark.filterwarnings("ignore:ComplexHalf support:UserWarning")
def test_a_nan_is_itself_and_every_dtype_can_be_compared(tmp_path):
    assert ff.diff_checkpoints(GOLDEN / "v1", GOLDEN / "v1").equal
    whole = ff.load(RT, GOLDEN / "v1")
    for name, value in whole["dtypes"].items():
        raw = value.contiguous().view(torch.uint8).clone()
        raw.reshape(-1)[0] ^= 1
        ff.save(RT, tmp_path / "b", {"dtypes": {**whole["dtypes"], name: raw.view(value.dtype)}})
        (change,) = ff.diff_checkpoints(GOLDEN / "v1", tmp_path / "b", only="dtypes").changes
        assert (change.path, change.count) == (f"dtypes/{name}", 1)
        assert math.isnan(change.max_abs) or change.max_abs >= 0


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


# ---------------------------------------------------------------- convert


def test_convert_goes_to_each_format_and_back_with_the_same_bits(capsys, made, tmp_path):
    model, _ = trained(DOUBLE)
    state = {**model.params, **model.buffers}
    ways = [made / "two", "a.safetensors", "b.pt", "hub", "c.ckpt", "d.safetensors"]
    for source, target in itertools.pairwise(ways):
        status, out, _ = command(capsys, "convert", tmp_path / source, tmp_path / target)
        assert status == 0
        assert out.startswith(str(tmp_path / target))
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "d.safetensors").read_bytes()
    for found in (load_file(tmp_path / "d.safetensors"), torch.load(tmp_path / "b.pt", weights_only=True)):
        assert set(found) == set(state)
        for name, value in found.items():
            torch.testing.assert_close(value, state[name], rtol=1e-9, atol=1e-11)
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "a.safetensors",
        "b.pt",
        "c.ckpt",
        "d.safetensors",
        "hub",
    ]
    loaded = ff.load_raw(DOUBLE, tmp_path / "b.pt", model)
    assert ff.diff_checkpoints(made / "two", tmp_path / "b.pt").equal
    assert torch.equal(loaded.params["0.weight"], load_file(tmp_path / "a.safetensors")["0.weight"])


def test_convert_takes_what_only_says_and_the_state_dicts_of_a_training(capsys, made, tmp_path):
    status, _, _ = command(
        capsys, "consolidate", GOLDEN / "fabric/full.ckpt", tmp_path / "hub", "--max-shard-size", "20B"
    )
    assert status == 0
    assert len(list((tmp_path / "hub").glob("*.safetensors"))) == 3
    command(capsys, "convert", GOLDEN / "fabric/sharded", tmp_path / "a.safetensors")
    assert ff.diff_checkpoints(tmp_path / "a.safetensors", tmp_path / "hub").equal
    assert set(load_file(tmp_path / "a.safetensors")) == {"seen", "lin.weight", "lin.bias"}
    command(capsys, "convert", GOLDEN / "fabric/full.ckpt", tmp_path / "b.pt", "--only", "optimizer/state/0")
    assert set(torch.load(tmp_path / "b.pt", weights_only=True)) == {"step", "exp_avg", "exp_avg_sq"}
    torch.save({"a": {"w": torch.ones(1)}, "b": {"w": torch.zeros(1)}}, tmp_path / "two.pt")
    command(capsys, "convert", tmp_path / "two.pt", tmp_path / "two.safetensors")
    assert {name: value.item() for name, value in load_file(tmp_path / "two.safetensors").items()} == {
        "a.w": 1,
        "b.w": 0,
    }


def test_one_array_under_two_names_is_one_in_a_pytorch_file(made, tmp_path):
    net = nn.ModuleDict({"inp": nn.Linear(3, 3, bias=False), "out": nn.Linear(3, 3, bias=False)})
    tied = net["inp"].weight.detach()
    ff.save(RT, tmp_path / "a", {"x": tied, "y": tied, "z": tied.clone()})
    ff.consolidate(tmp_path / "a", tmp_path / "a.pt", only=["x", "y", "z"])
    found = torch.load(tmp_path / "a.pt", weights_only=True)
    assert found["x"].data_ptr() == found["y"].data_ptr() != found["z"].data_ptr()


def test_a_failed_conversion_leaves_the_file_that_stood_there(made, tmp_path):
    (tmp_path / "a.pt").write_bytes(b"mine")
    shutil.copytree(made / "one", tmp_path / "bad")
    file = next((tmp_path / "bad" / "data").iterdir())
    data = file.read_bytes()
    file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(CheckpointError, match="damaged"):
        ff.consolidate(tmp_path / "bad", tmp_path / "a.pt", only="opt/state")
    assert (tmp_path / "a.pt").read_bytes() == b"mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.pt", "bad"]


# ---------------------------------------------------------------- plot


@pytest.fixture
def logs(tmp_path):
    """Two runs that ff.log wrote, one of each kind."""
    for number, logger in enumerate((ff.loggers.csv, ff.loggers.jsonl)):
        with ff.runtime(devices=1, accelerator="cpu", loggers=logger(tmp_path / "logs", "digits")) as rt:
            for step in range(60):
                ff.log(rt, "train/loss", math.exp(-step / (20 + 10 * number)), step=step)
            ff.log(rt, "val/accuracy", 0.5 + number / 4, step=59)
    return tmp_path / "logs"


def test_the_rows_of_both_loggers_are_curves(logs):
    found = curves_of([str(logs)])
    assert list(found) == ["train/loss", "val/accuracy"]
    assert [curve.run for curve in found["train/loss"]] == ["version_0", "version_1"]
    for number, curve in enumerate(found["train/loss"]):
        assert curve.steps == tuple(range(60))
        assert curve.values == tuple(math.exp(-step / (20 + 10 * number)) for step in range(60))
    assert curves_of([str(logs)], ["val/*"])["val/accuracy"][1].values == (0.75,)
    with pytest.raises(ConfigurationError, match=r"no name fits x; there is train/loss, val/accuracy"):
        curves_of([str(logs)], ["x"])


def test_a_run_that_went_on_or_was_killed_is_read_as_it_stands(tmp_path):
    file = tmp_path / "a" / "metrics.csv"
    file.parent.mkdir()
    file.write_text("step,loss,new\n1,4.0,\n2,3.0,nan\n3,9.0,inf\n2,2.0,1\n3,1.0,2\n4,0.")
    (loss,), (new,) = curves_of([str(tmp_path)]).values()
    assert (loss.steps, loss.values) == ((1, 2, 3), (4.0, 2.0, 1.0))
    assert (new.steps, new.values, new.num_strange) == ((2, 3), (1.0, 2.0), 0)
    for name, text in (("metrics.csv", "step,loss\n1,a\n"), ("b.jsonl", '{"loss": 1}\n'), ("c.jsonl", "[1]\n")):
        (tmp_path / name).write_text(text)
        with pytest.raises(ConfigurationError, match=rf"{name}: row 1 is none of a logger's"):
            curves_of([str(tmp_path / name)])


def test_the_terminal_shows_each_point_where_it_is(tmp_path):
    (tmp_path / "metrics.csv").write_text("step,loss\n" + "".join(f"{step},{step}\n" for step in range(101)))
    (curve,) = curves_of([str(tmp_path)])["loss"]
    lines = drawn([curve], width=26, height=4, log=False, braille=False, colours=False).splitlines()
    assert lines[0] == "loss"
    assert lines[1].startswith("100 |")
    assert lines[4].startswith("  0 |")
    places = [[column for column, mark in enumerate(line[5:]) if mark == "a"] for line in lines[1:5]]
    assert places[3][0] == 0
    assert places[0][-1] == 20
    flat = [column for row in reversed(places) for column in row]
    assert flat == sorted(flat)
    assert lines[-1].endswith("last 100 at 100, least 0 at 0")
    dots = drawn([curve], width=26, height=4, log=False, braille=True, colours=False)
    count = sum((ord(mark) - 0x2800).bit_count() for mark in dots if 0x2800 <= ord(mark) < 0x2900)
    assert 42 <= count <= 60
    assert max(map(len, dots.splitlines()[1:5])) <= 26


def test_odd_numbers_have_places_too():
    for values in ([1.0], [2.0, 2.0], [-1e308, 1e308], [5e-324, 1e-320]):
        scale = scale_of([values])
        assert all(0 <= scale.of(value) <= 1 for value in values)
        assert math.isclose(scale.at(scale.of(values[0])), values[0], rel_tol=1e-9)
    assert scale_of([[0.0, -1.0]], log=True) is None
    assert scale_of([[0.0, 10.0, 1000.0]], log=True).of(0.0) is None
    assert math.isclose(scale_of([[0.0, 10.0, 1000.0]], log=True).of(100.0), 0.5)


def test_plot_draws_in_the_terminal(capsys, logs, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    status, out, err = command(capsys, "plot", logs)
    assert (status, err) == (0, "")
    first, second = out.split("\n\n")
    assert first.startswith("train/loss\n      1 |bb")
    assert "  a: version_0: last 0.05234 at 59, least 0.05234 at 59" in first
    assert {"a", "b"} <= set(first.partition("|")[2])
    assert "b: version_1: last 0.75 at 59" in second
    _, out, _ = command(capsys, "plot", logs / "digits" / "version_0", "--only", "train/*", "--log", "--height", "5")
    assert "⠀" < max(out) < "⣿"
    assert all(len(line) <= 60 for line in out.splitlines())
    _, out, _ = command(capsys, "plot", logs / "digits" / "version_0" / "metrics.csv", "--ascii")
    assert out.isascii()


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_plot_draws_pictures(capsys, logs, tmp_path, ending):
    status, out, _ = command(capsys, "plot", logs, "-o", tmp_path / f"curves.{ending}", "--log")
    assert (status, out) == (0, f"{tmp_path / f'curves.{ending}'}\n")
    data = (tmp_path / f"curves.{ending}").read_bytes()
    if ending == "png":
        assert data.startswith(b"\x89PNG")
        width, height = (int.from_bytes(data[at : at + 4], "big") for at in (16, 20))
        assert (width, height) == (1000, 320)
    else:
        text = data.decode()
        curves = re.findall(r'<path d="(M[^"]+)"[^>]*stroke: #(1f77b4|ff7f0e)', text)
        assert {colour for _, colour in curves} == {"1f77b4", "ff7f0e"}
        assert "<!-- train/loss -->" in text
    status, _, err = command(capsys, "plot", logs, "-o", tmp_path / "curves.txt")
    assert status == 2
    assert "the ending says the format" in err


def test_a_picture_without_matplotlib_says_what_to_install(capsys, logs, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    status, _, err = command(capsys, "plot", logs, "-o", tmp_path / "curves.png")
    assert status == 2
    assert "pip install 'fabricfn[plot]'" in err
