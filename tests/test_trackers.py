"""Weights & Biases, MLflow and Trackio, offline: what their own readers find. `nox -s trackers` installs them."""

import json
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import fabricfn as ff
from fabricfn.errors import ConfigurationError

NAMES = ("wandb", "mlflow", "trackio")


@pytest.fixture(autouse=True)
def at_home(tmp_path, monkeypatch):
    """Nothing of the user's is touched, and no machine is called."""
    monkeypatch.chdir(tmp_path)
    for name in ("HOME", "TRACKIO_DIR", "WANDB_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name.lower()))
    (tmp_path / "wandb_dir").mkdir()
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.setenv("TRACKIO_TELEMETRY", "0")


def trained(logger):
    """Rows out of order, a number that is none, hyperparameters, a picture and a text where they can be shown."""
    with ff.runtime(devices=1, accelerator="cpu", loggers=logger) as rt:
        ff.log_hyperparams(rt, {"optimizer": {"lr": 0.1, "schedule": None}})
        ff.log_dict(rt, {"train": {"loss": torch.tensor(0.5), "accuracy": 0.25}}, step=3)
        ff.log(rt, "train/loss", float("nan"), step=2)
        ff.log_image(rt, "seen", np.zeros((3, 4, 5), np.uint8), step=3)
        ff.log_text(rt, "said", "To be", step=3)


def test_wandb_keeps_rows_in_any_order(tmp_path):
    pytest.importorskip("wandb", reason="nox -s trackers")
    trained(ff.loggers.wandb("digits", "one", "p", mode="offline"))
    (file,) = tmp_path.rglob("*.wandb")
    rows, config = records(file)
    assert {"p/train/loss": 0.5, "p/train/accuracy": 0.25, "step": 3}.items() <= rows[0].items()
    assert rows[1]["step"] == 2 and str(rows[1]["p/train/loss"]) in ("nan", "NaN")
    assert rows[2]["step"] == 3 and rows[2]["p/seen/width"] == 5
    assert config["optimizer/lr"] == 0.1


def records(file):
    """(rows, hyperparameters) of a run that Weights & Biases wrote."""
    from wandb.proto import wandb_internal_pb2

    rows, config = [], {}
    for data in pieces(file.read_bytes()):
        record = wandb_internal_pb2.Record.FromString(data)
        kind = record.WhichOneof("record_type")
        if kind == "history":
            rows.append(values_of(record.history.item))
        elif kind in ("config", "run"):
            config |= values_of((record.config if kind == "config" else record.run.config).update)
    return rows, config


def pieces(data):
    """The records of a log in LevelDB's format, behind seven bytes that say so; each here lies in one block."""
    start = 7
    while start < len(data):
        length, kind = struct.unpack_from("<HB", data, start + 4)
        assert kind == 1
        yield data[start + 7 : start + 7 + length]
        start += 7 + length


def values_of(items):
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of SQLAlchemy, by MLflow
def test_mlflow_keeps_numbers_hyperparameters_and_texts(tmp_path):
    mlflow = pytest.importorskip("mlflow", reason="nox -s trackers")
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    for name in ("one", "two"):
        trained(ff.loggers.mlflow("digits", name, "p", uri=uri))
    client = mlflow.MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("digits")
    found = client.search_runs([experiment.experiment_id])
    assert {run.info.run_name: run.info.status for run in found} == {"one": "FINISHED", "two": "FINISHED"}
    history = client.get_metric_history(found[0].info.run_id, "p/train/loss")
    assert {row.step: str(row.value) for row in history} == {3: "0.5", 2: "nan"}
    assert found[0].data.params == {"optimizer/lr": "0.1", "optimizer/schedule": "None"}
    artifacts = client.list_artifacts(found[0].info.run_id, "p/said")
    assert [artifact.path for artifact in artifacts] == ["p/said/3.txt"]


def test_trackio_keeps_rows_and_hyperparameters():
    pytest.importorskip("trackio", reason="nox -s trackers")
    from trackio.sqlite_storage import SQLiteStorage

    trained(ff.loggers.trackio("digits", "one", "p"))
    rows = SQLiteStorage.get_logs("digits", "one")
    assert {"p/train/loss": 0.5, "p/train/accuracy": 0.25, "step": 3}.items() <= rows[0].items()
    assert rows[1]["step"] == 2 and rows[2]["p/seen"]["_type"] == "trackio.image"
    assert SQLiteStorage.get_run_config("digits", "one")["optimizer/lr"] == 0.1
    with ff.runtime(devices=1, accelerator="cpu", loggers=ff.loggers.trackio("digits", "two")) as rt:
        ff.log(rt, "loss", 0.5)
        with pytest.raises(ConfigurationError, match="first row"):
            ff.log_hyperparams(rt, {"lr": 0.1})


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_client_is_named_with_its_extra(name):
    hidden = f"import sys; sys.modules[{name!r}] = None; import fabricfn as ff; ff.loggers.{name}('digits')"
    command, home = [sys.executable, "-c", hidden], Path(__file__).parents[1]
    done = subprocess.run(command, cwd=home, capture_output=True, text=True, check=False)
    assert f"pip install 'fabricfn[{name}]'" in done.stderr
