"""Logging: every row is there, whatever happens, once, on rank 0; folders, loggers, what is refused."""

import csv
import json
import math
import pickle
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st

import fabricfn as ff
from fabricfn import testing
from fabricfn.errors import ConfigurationError
from fabricfn.loggers import journal as journals

NAMES = st.text(st.characters(codec="utf-8", exclude_characters="\r\n"), min_size=1, max_size=5)
NUMBERS = st.floats(allow_nan=False) | st.integers(-5, 5)
ROWS = st.lists(st.dictionaries(NAMES, NUMBERS, min_size=1, max_size=3), max_size=6)


def runtime(loggers, **options):
    return ff.runtime(devices=1, accelerator="cpu", loggers=loggers, **options)


def kept(rows):
    """A logger that keeps what it is given."""
    return ff.loggers.Logger(log=lambda values, step: rows.append((step, dict(values))))


def csv_rows(path):
    """(step, the values that are there) of each row."""
    with open(path, newline="", encoding="utf-8") as file:
        header, *rows = csv.reader(file)
    assert header[0] == "step"
    return [
        (int(row[0]), {name: float(cell) for name, cell in zip(header[1:], row[1:], strict=True) if cell})
        for row in rows
    ]


@given(ROWS.filter(lambda rows: all("step" not in row for row in rows)), st.integers(0, 6))
def test_csv_holds_every_row_with_columns_as_they_come_and_goes_on_in_a_later_run(tmp_path_factory, rows, cut):
    folder = tmp_path_factory.mktemp("logs")
    for part in (rows[:cut], rows[cut:]):
        with runtime(ff.loggers.csv(folder, version="a")) as rt:
            for row in part:
                ff.log_dict(rt, row, step=7)
    if rows:
        assert csv_rows(folder / "a/metrics.csv") == [(7, {name: float(row[name]) for name in row}) for row in rows]
    assert [path.name for path in folder.glob("a/.*")] == []


@given(ROWS.filter(lambda rows: not any({"step", "time"} & set(row) for row in rows)))
def test_json_lines_hold_every_row(tmp_path_factory, rows):
    folder = tmp_path_factory.mktemp("logs")
    with runtime(ff.loggers.jsonl(folder)) as rt:
        for row in rows:
            ff.log_dict(rt, row)
    path = folder / "version_0/metrics.jsonl"
    found = [json.loads(line) for line in path.read_text().splitlines()] if rows else []
    assert [{k: v for k, v in row.items() if k not in ("step", "time")} for row in found] == rows
    assert [row["step"] for row in found] == list(range(len(rows)))


def test_an_unfinished_row_of_a_killed_run_is_cut_off(tmp_path):
    for logger, name in ((ff.loggers.csv, "metrics.csv"), (ff.loggers.jsonl, "metrics.jsonl")):
        for step in (1, 2):
            with runtime(logger(tmp_path, name, version=0)) as rt:
                ff.log(rt, "loss", 0.5, step)
            with open(tmp_path / name / "version_0" / name, "ab") as file:
                file.write(b'{"st')
        lines = (tmp_path / name / "version_0" / name).read_bytes().split(b"\n")
        assert len(lines) == (4 if name == "metrics.csv" else 3) and lines[-1] == b'{"st'
        assert not any(line.endswith(b'{"st') for line in lines[:-1])


def test_runs_take_numbers_of_their_own_and_none_before_the_first_row(tmp_path):
    names = []

    def one():
        with runtime(ff.loggers.csv(tmp_path, "exp")) as rt:
            ff.log(rt, "x", 1.0)
            names.append(rt.loggers[0].folder().name)

    threads = [threading.Thread(target=one) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(names) == [f"version_{number}" for number in range(8)]
    with runtime(ff.loggers.csv(tmp_path, "none")):
        pass
    assert not (tmp_path / "none").exists()


def test_folders_are_of_the_home_and_prefixes_come_first(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    with runtime(
        [ff.loggers.csv("~/logs", version=4, prefix="gan"), ff.loggers.jsonl(Path("~/logs"), version=4)]
    ) as rt:
        ff.log(rt, "loss", 2)
        ff.log_hyperparams(rt, {"lr": 0.1})
        ff.log_hyperparams(rt, {"model": {"width": 3, "act": torch.relu}, "lr": 0.2})
    assert (tmp_path / "logs/version_4/metrics.csv").read_text() == "step,gan/loss\n0,2\n"
    found = json.loads((tmp_path / "logs/version_4/hyperparams.json").read_text())
    assert found == {"lr": 0.2, "model/width": 3, "model/act": repr(torch.relu)}


def test_numbers_of_all_kinds_are_numbers_and_all_else_is_refused_by_name():
    rows = []
    with runtime(kept(rows)) as rt:
        ff.log_dict(rt, {"a": 1, "b": torch.tensor([[2.5]], requires_grad=True), "c": np.float32(0.5), "d": True})
        ff.log_dict(rt, {"a": torch.tensor(3), "b": np.array([4]), "c": float("nan")}, step=9)
        for bad in (torch.ones(2), np.ones(3), "text", None, torch.tensor(1j), [1.0]):
            with pytest.raises(ConfigurationError, match="'x/y' is a"):
                ff.log_dict(rt, {"x": {"y": bad}})
        with pytest.raises(ConfigurationError, match="names with values"):
            ff.log_dict(rt, 0.5)
    assert rows[0] == (0, {"a": 1, "b": 2.5, "c": 0.5, "d": True})
    assert rows[1][0] == 9 and rows[1][1]["a"] == 3 and rows[1][1]["b"] == 4 and math.isnan(rows[1][1]["c"])
    assert len(rows) == 2


def test_numbers_on_a_device_wait_together_and_keep_their_order(monkeypatch):
    """No second device is here: `meta` stands for one, and the copy from it is seen."""
    copies = []

    def on_host(values):
        copies.append(len(values))
        return [value if isinstance(value, float) else -1.0 for value in values]

    monkeypatch.setattr(journals, "_on_host", on_host)
    monkeypatch.setattr(journals, "ROWS", 3)
    rows = []
    with runtime(kept(rows)) as rt:
        ff.log(rt, "a", 0.0)
        ff.log(rt, "a", torch.ones((), device="meta"))
        ff.log(rt, "a", 2.0)
        assert copies == [1] and len(rows) == 1
        ff.log(rt, "a", 3.0)
        assert copies == [1, 3]
        ff.log(rt, "a", torch.ones((), device="meta"))
        ff.flush_logs(rt)
        ff.log(rt, "a", torch.ones((), device="meta"))
        monkeypatch.setattr(journals, "PATIENCE", 0.0)
        ff.log(rt, "a", 7.0)
        ff.log(rt, "a", torch.ones((), device="meta"))
        monkeypatch.setattr(journals, "PATIENCE", 60.0)
        ff.log(rt, "a", torch.ones((), device="meta"))
    assert rows == [
        (step, {"a": value}) for step, value in enumerate([0.0, -1.0, 2.0, 3.0, -1.0, -1.0, 7.0, -1.0, -1.0])
    ]


def test_a_tensor_may_be_overwritten_after_it_was_logged():
    held = journals.Journal(loggers=())
    assert journals._on_host([torch.tensor(2), 0.5, torch.tensor(0.25)]) == [2, 0.5, 0.25]
    rows = []
    with runtime(kept(rows)) as rt:
        loss = torch.tensor(1.0)
        ff.log(rt, "loss", loss)
        loss.zero_()
    assert rows == [(0, {"loss": 1.0})] and not held.rows


def averages(rt):
    ff.log_dict(rt, {"a": torch.tensor(float(rt.rank)), "b": rt.rank}, step=5, reduce="mean")
    ff.log(rt, "c", rt.rank, reduce="sum")
    ff.log(rt, "d", rt.rank)
    return rt.rank


@pytest.mark.parametrize("loggers", ["csv", "none"])
def test_ranks_reduce_and_rank_0_alone_writes(tmp_path, loggers):
    options = {"loggers": ff.loggers.csv(tmp_path)} if loggers == "csv" else {}
    assert ff.launch(averages, devices=2, accelerator="cpu", start_method="fork", **options) == [0, 1]
    found = [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()]
    assert found == (["version_0/metrics.csv"] if options else [])
    if options:
        rows = csv_rows(tmp_path / "version_0/metrics.csv")
        assert rows == [(5, {"a": 0.5, "b": 0.5}), (6, {"c": 1.0}), (7, {"d": 0.0})]


def test_a_logger_travels_until_it_is_open(tmp_path):
    logger = ff.loggers.csv(tmp_path)
    assert isinstance(pickle.loads(pickle.dumps(logger)), ff.loggers.Logger)
    pickle.loads(pickle.dumps(ff.loggers.tensorboard(tmp_path)))


ENDS = """
import os, signal, sys, torch
import fabricfn as ff
from fabricfn.loggers import journal
journal.ROWS = 10**6
rt = ff.init_runtime(devices=1, accelerator="cpu", loggers=ff.loggers.csv(sys.argv[1], version=sys.argv[2]))
for step in range(20):
    ff.log(rt, "loss", 1 / (1 + step), step)
if sys.argv[2] != "killed":  # as if on a device: it waits
    rt.journal.rows.append(({"late": 1.0}, 20))
if sys.argv[2] == "raises":
    raise RuntimeError("stop")
if sys.argv[2] == "exits":
    sys.exit(3)
if sys.argv[2] == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("end", ["returns", "raises", "exits", "killed"])
def test_no_row_is_lost_whatever_ends_the_process(tmp_path, end):
    done = subprocess.run([sys.executable, "-c", ENDS, tmp_path, end], capture_output=True, timeout=120, check=False)
    assert (done.returncode == 0) == (end == "returns"), done.stderr
    rows = csv_rows(tmp_path / end / "metrics.csv")
    assert [step for step, _ in rows] == list(range(20 if end == "killed" else 21))


def test_what_a_logger_raises_at_the_end_is_told_and_the_others_are_closed():
    closed = []

    def refuse():
        raise OSError(28, "No space left on device")

    bad = ff.loggers.Logger(log=lambda values, step: None, close=refuse)
    good = ff.loggers.Logger(log=lambda values, step: None, close=lambda: closed.append(1))
    with pytest.raises(OSError, match="No space left"), runtime([bad, good]) as rt:
        ff.log(rt, "loss", 1.0)
    assert closed == [1]


def test_what_is_no_logger_is_refused_and_one_list_or_tuple_will_do():
    for bad in (print, [3], "csv"):
        with pytest.raises(ConfigurationError, match="is no logger"):
            ff.init_runtime(devices=1, accelerator="cpu", loggers=bad)
    one = kept([])
    for loggers, callbacks in ((one, one), ([one], [one]), ((one,), (one,))):
        with runtime(loggers, callbacks=callbacks) as rt:
            assert rt.loggers == (one,) and rt.callbacks == (one,)


def test_tensorboard_reads_what_was_written(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with runtime(ff.loggers.tensorboard(tmp_path, "exp", prefix="p")) as rt:
        model = ff.setup_model(rt, torch.nn.Linear(2, 1))
        ff.log(rt, "loss", torch.tensor(0.5), step=3)
        ff.log_text(rt, "said", "To be", step=3)
        ff.log_image(rt, "seen", torch.rand(3, 4, 5), step=3)
        ff.log_image(rt, "grey", np.zeros((4, 5), np.uint8), step=3)
        ff.log_hyperparams(rt, {"lr": 0.1, "schedule": None})
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch's tracer
            ff.log_graph(rt, model, torch.zeros(1, 2))
    found = EventAccumulator(str(tmp_path / "exp/version_0"))
    found.Reload()
    tags = found.Tags()
    assert [(event.step, event.value) for event in found.Scalars("p/loss")] == [(3, 0.5)]
    assert sorted(tags["images"]) == ["p/grey", "p/seen"] and "p/said/text_summary" in tags["tensors"] and tags["graph"]
    assert found.Images("p/seen")[0].width == 5


def test_pictures_of_another_shape_are_refused():
    shown = ff.loggers.Logger(log=print, image=lambda name, image, step: None)
    with runtime(shown) as rt, pytest.raises(ConfigurationError, match=r"'grid' has shape \(2, 3, 8, 8\)"):
        ff.log_image(rt, "grid", torch.ones(2, 3, 8, 8))


def test_a_logger_of_lightnings_is_used_as_it_is(tmp_path):
    pytest.importorskip("lightning_fabric", reason="a peer of the benchmarks, not of the tests")
    from lightning_fabric.loggers import CSVLogger

    with runtime(ff.loggers.lightning(CSVLogger(tmp_path, "exp"))) as rt:
        for step in range(3):
            ff.log(rt, "loss", step / 2)
    with open(tmp_path / "exp/version_0/metrics.csv", newline="") as file:
        assert [float(row["loss"]) for row in csv.DictReader(file)] == [0.0, 0.5, 1.0]


def test_ranks_as_threads_have_no_loggers_unless_given():
    assert testing.run(averages, world_size=2) == [0, 1]
