"""Where figures go: files, TensorBoard, trackers of experiments, loggers of Lightning's, or a `Logger` of your own."""

from fabricfn.loggers.lightning_loggers import lightning_logger as lightning
from fabricfn.loggers.logger import Logger as Logger
from fabricfn.loggers.rows import csv_logger as csv, jsonl_logger as jsonl
from fabricfn.loggers.tensorboard_events import tensorboard_logger as tensorboard
from fabricfn.loggers.trackers import mlflow_logger as mlflow, trackio_logger as trackio, wandb_logger as wandb

__all__ = ["Logger", "csv", "jsonl", "lightning", "mlflow", "tensorboard", "trackio", "wandb"]
