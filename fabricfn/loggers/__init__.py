"""Where figures go: `csv`, `jsonl`, `tensorboard`, `lightning` (loggers of Lightning's), or a `Logger` of your own."""

from fabricfn.loggers.lightning_loggers import lightning_logger as lightning
from fabricfn.loggers.logger import Logger as Logger
from fabricfn.loggers.rows import csv_logger as csv, jsonl_logger as jsonl
from fabricfn.loggers.tensorboard_events import tensorboard_logger as tensorboard

__all__ = ["Logger", "csv", "jsonl", "lightning", "tensorboard"]
