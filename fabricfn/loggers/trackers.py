"""Trackers of experiments by their own clients: Weights & Biases, MLflow, Trackio; on a server or on this machine."""

import dataclasses
import importlib
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from fabricfn.errors import ConfigurationError
from fabricfn.loggers.logger import Logger
from fabricfn.loggers.rows import prefixed

STEP = "step"
"""The name under which Weights & Biases is given the step of a row."""
MLFLOW_LIMIT = 100
"""How many parameters MLflow takes in one call."""


@dataclasses.dataclass(slots=True, kw_only=True)
class Run:
    """A run of a client's, once it is open."""

    begin: Callable[[], Any]
    """Opens it."""
    prefix: str
    client: Any = None
    config: dict[str, Any] = dataclasses.field(default_factory=dict[str, Any])
    """Hyperparameters that wait for the first row."""


def wandb_logger(project: str, name: str | None = None, prefix: str = "", **options: Any) -> Logger:
    """A run of Weights & Biases: numbers, hyperparameters, images.

    Rows may come in any order of steps: the step is a value of the row, and the axis of all curves.

    Args:
        project: where the run belongs.
        name: of the run; None lets the service choose one.
        prefix: comes before each name, with "/" between.
        options: of `wandb.init`: `mode="offline"` keeps it on this machine (`wandb sync` sends it later), `dir=` says
            where, `id=` with `resume="allow"` goes on with a run.

    Returns:
        The logger, for `init_runtime(loggers=...)`.

    Raises:
        ConfigurationError: the package wandb is missing.

    Example:
        >>> logger = wandb_logger("digits", mode="offline")  # doctest: +SKIP
    """
    _package("wandb")
    run = Run(begin=partial(_begin_wandb, project, name, options), prefix=prefix)
    return Logger(
        log=partial(_log_wandb, run),
        hyperparams=partial(_configure_wandb, run),
        image=partial(_show_wandb, run),
        close=partial(_close, run, "finish"),
    )


def mlflow_logger(experiment: str, name: str | None = None, prefix: str = "", uri: str | None = None) -> Logger:
    """A run of MLflow's tracking: numbers, hyperparameters, and texts as files beside them.

    Args:
        experiment: where the run belongs; made when it is not there.
        name: of the run; None lets MLflow choose one.
        prefix: comes before each name, with "/" between.
        uri: of the server, or of a file: `"sqlite:///mlflow.db"`. None is `MLFLOW_TRACKING_URI`, or MLflow's default.

    Returns:
        The logger, for `init_runtime(loggers=...)`. A run that goes on is a new run of the experiment.

    Raises:
        ConfigurationError: the package mlflow is missing.

    Example:
        >>> logger = mlflow_logger("digits", uri="sqlite:///mlflow.db")  # doctest: +SKIP
    """
    _package("mlflow")
    run = Run(begin=partial(_begin_mlflow, experiment, name, uri), prefix=prefix)
    return Logger(
        log=partial(_log_mlflow, run),
        hyperparams=partial(_configure_mlflow, run),
        text=partial(_tell_mlflow, run),
        close=partial(_close, run, "end"),
    )


def trackio_logger(project: str, name: str | None = None, prefix: str = "", **options: Any) -> Logger:
    """A run of Trackio, on this machine unless `space_id=` names a Space: numbers, hyperparameters, images.

    Args:
        project: where the run belongs; `trackio show --project` shows it.
        name: of the run; None lets Trackio choose one.
        prefix: comes before each name, with "/" between.
        options: of `trackio.init`: `resume="allow"` goes on with the run of this name.

    Returns:
        The logger, for `init_runtime(loggers=...)`.

    Raises:
        ConfigurationError: the package trackio is missing; or (from `log_hyperparams`) a row was logged before, and
            Trackio takes them with the first.

    Example:
        >>> logger = trackio_logger("digits")  # doctest: +SKIP
    """
    _package("trackio")
    config: dict[str, Any] = {}
    run = Run(begin=partial(_begin_trackio, project, name, options, config), prefix=prefix, config=config)
    return Logger(
        log=partial(_log_trackio, run),
        hyperparams=partial(_configure_trackio, run),
        image=partial(_show_trackio, run),
        close=partial(_close, run, "finish"),
    )


def _package(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigurationError(
            f"ff.loggers.{name} needs the package {name} ({error}). Write: pip install 'fabricfn[{name}]', or take"
            " ff.loggers.csv(folder)."
        ) from None


def _opened(run: Run) -> Any:
    if run.client is None:
        run.client = run.begin()
    return run.client


def _close(run: Run, end: str) -> None:
    if run.config and run.client is None:  # hyperparameters of a run without a row
        _opened(run)
    if run.client is not None:
        getattr(run.client, end)()
        run.client = None


def _begin_wandb(project: str, name: str | None, options: Mapping[str, Any]) -> Any:
    client = _package("wandb").init(project=project, name=name, **options)
    client.define_metric(STEP)
    client.define_metric("*", step_metric=STEP)
    return client


def _log_wandb(run: Run, values: Mapping[str, float], step: int) -> None:
    _opened(run).log({**prefixed(run.prefix, values), STEP: step})


def _configure_wandb(run: Run, values: Mapping[str, Any]) -> None:
    _opened(run).config.update(dict(values), allow_val_change=True)


def _show_wandb(run: Run, name: str, image: Any, step: int) -> None:
    _opened(run).log({**prefixed(run.prefix, {name: _package("wandb").Image(image)}), STEP: step})


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class MlflowRun:
    """What MLflow's client needs for one run."""

    client: Any
    run_id: str

    def end(self) -> None:
        """Say that it is over."""
        self.client.set_terminated(self.run_id)


def _begin_mlflow(experiment: str, name: str | None, uri: str | None) -> MlflowRun:
    client = _package("mlflow").MlflowClient(tracking_uri=uri)
    found = client.get_experiment_by_name(experiment)
    number = client.create_experiment(experiment) if found is None else found.experiment_id
    return MlflowRun(client=client, run_id=client.create_run(number, run_name=name).info.run_id)


def _log_mlflow(run: Run, values: Mapping[str, float], step: int) -> None:
    metric, now = _package("mlflow.entities").Metric, int(time.time() * 1000)
    rows = [metric(name, value, now, step) for name, value in prefixed(run.prefix, values).items()]
    opened = _opened(run)
    opened.client.log_batch(opened.run_id, metrics=rows)


def _configure_mlflow(run: Run, values: Mapping[str, Any]) -> None:
    param, opened = _package("mlflow.entities").Param, _opened(run)
    rows = [param(name, str(value)) for name, value in values.items()]
    for start in range(0, len(rows), MLFLOW_LIMIT):
        opened.client.log_batch(opened.run_id, params=rows[start : start + MLFLOW_LIMIT])


def _tell_mlflow(run: Run, name: str, text: str, step: int) -> None:
    (named,), opened = prefixed(run.prefix, {name: text}), _opened(run)
    opened.client.log_text(opened.run_id, text, f"{named}/{step}.txt")


def _begin_trackio(project: str, name: str | None, options: Mapping[str, Any], config: Mapping[str, Any]) -> Any:
    return _package("trackio").init(project=project, name=name, config=dict(config), **{"embed": False, **options})


def _log_trackio(run: Run, values: Mapping[str, float], step: int) -> None:
    _opened(run).log(prefixed(run.prefix, values), step=step)


def _configure_trackio(run: Run, values: Mapping[str, Any]) -> None:
    if run.client is not None:
        raise ConfigurationError(
            "Trackio takes hyperparameters with the first row of a run, and one was logged before. Call"
            " ff.log_hyperparams first."
        )
    run.config.update(values)


def _show_trackio(run: Run, name: str, image: Any, step: int) -> None:
    _opened(run).log(prefixed(run.prefix, {name: _package("trackio").Image(image)}), step=step)
