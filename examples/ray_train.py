"""The digits on two processes of Ray Train.

    python examples/ray_train.py                          # pip install 'fabricfn[ray,examples]'

Ray starts the processes, on this machine or in the cluster that it is connected to, and makes their process group; each
of them only calls `init_runtime` (here within `ff.runtime`), which joins it.
"""

import argparse
from pathlib import Path
from typing import Any

import digits
import ray.train
from ray.train import Checkpoint, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

import fabricfn as ff


def loop(config: dict[str, Any]) -> None:
    """What every process runs; reports the test accuracy, and hands the last checkpoint to Ray."""
    with ff.runtime() as rt:
        accuracy = digits.train(rt, config["epochs"], config["checkpoint"])
        last = Checkpoint.from_directory(ff.latest(config["checkpoint"])) if rt.rank == 0 else None
        ray.train.report({"accuracy": accuracy, "ranks": rt.world_size}, checkpoint=last)


def main() -> None:
    """Train, and show what was reported."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--checkpoint", default="checkpoints/digits", help="the folder of the checkpoints")
    args = parser.parse_args()

    folder = Path(args.checkpoint).resolve()  # Ray runs the loop in a folder of its own
    trainer = TorchTrainer(
        loop,
        train_loop_config={"epochs": args.epochs, "checkpoint": str(folder)},
        scaling_config=ScalingConfig(num_workers=2),  # use_gpu=True
        run_config=RunConfig(storage_path=str(folder / "ray")),
    )
    print(trainer.fit().metrics)


if __name__ == "__main__":
    main()
