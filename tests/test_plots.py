"""`fabricfn plot`, on logs that are real."""

import math
import re
import sys

import pytest

import fabricfn as ff
from fabricfn.errors import ConfigurationError
from fabricfn.plots.logs import curves_of
from fabricfn.plots.scales import scale_of
from fabricfn.plots.terminal import drawn
from tests.support.commands import command


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
