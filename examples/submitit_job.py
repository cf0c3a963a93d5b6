"""The digits on two processes of a job that submitit hands to SLURM; where there is no SLURM, it starts them here.

    python examples/submitit_job.py                       # pip install 'fabricfn[submitit,examples]'

submitit starts the processes; each of them only calls `init_runtime` (here within `ff.runtime`) to find the others.
"""

import argparse

import cloudpickle
import digits
import submitit

import fabricfn as ff

cloudpickle.register_pickle_by_value(digits)  # no installed package, so it travels with the job


def job(num_epochs: int, folder: str) -> float:
    """What every process runs; returns the test accuracy."""
    with ff.runtime() as rt:
        return digits.train(rt, num_epochs, folder)


def main() -> None:
    """Submit the job, wait for it, and show what its processes returned."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--checkpoint", default="checkpoints/digits", help="the folder of the checkpoints")
    parser.add_argument("--logs", default="logs", help="what submitit and the processes write")
    args = parser.parse_args()

    executor = submitit.AutoExecutor(folder=f"{args.logs}/%j")
    executor.update_parameters(nodes=1, tasks_per_node=2, timeout_min=10)  # gpus_per_node=2, slurm_partition="..."
    print(executor.submit(job, args.epochs, args.checkpoint).results())


if __name__ == "__main__":
    main()
