"""Recognise handwritten digits: 1,797 real scans of 8 x 8 pixels, which scikit-learn ships.

    python examples/digits.py                          # one process
    python examples/digits.py --devices 2              # two, started by this very command
    python examples/digits.py --devices 2 --strategy fsdp    # each holds a part of the model
    torchrun --nproc-per-node 2 examples/digits.py     # or by another launcher

Every epoch ends with a checkpoint, and with `--save-every 10` there is one after every tenth step too. Kill it when you
like: the same command goes on after the last checkpoint, and no bit shows that it was ever stopped. Another number of
processes or another strategy can go on with it as well.
"""

import argparse
import time
import warnings
from typing import TextIO

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import fabricfn as ff

BATCH_SIZE = 64  # over all processes together
LEARNING_RATE = 2e-3

# Uneven batches are fine here: the loss is weighted, and the accuracy counts samples.
warnings.filterwarnings("ignore", category=ff.errors.UnevenBatchesWarning)


def load_data() -> tuple[TensorDataset, TensorDataset]:
    """(training set, held-out fifth): images are (N, 1, 8, 8) float32 in 0 .. 1, labels (N,) int64 in 0 .. 9."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(digits.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    held_out, training = order[: len(order) // 5], order[len(order) // 5 :]
    return TensorDataset(images[training], labels[training]), TensorDataset(images[held_out], labels[held_out])


def make_net() -> nn.Module:
    """(N, 1, 8, 8) -> (N, 10) logits; a module as anyone would write it."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Dropout(0.5), nn.Linear(64 * 4 * 4, 10),
    )  # fmt: skip


def loss_fn(net: nn.Module, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, int]:
    """(summed loss, number of samples): with weighted=True the mean is exact even where the ranks' batches differ."""
    return F.cross_entropy(net(x), y, reduction="sum"), len(y)


def accuracy(rt: ff.Runtime, model: ff.Model, loader: DataLoader) -> float:
    """The share of right answers over all ranks: each sample is seen by one rank, once."""
    model = ff.eval_mode(model)
    counts = {"right": 0, "seen": 0}
    for x, y in ff.batches(rt, loader):
        guesses = ff.apply(rt, model, x).argmax(dim=1)
        counts = {"right": counts["right"] + (guesses == y).sum().item(), "seen": counts["seen"] + len(y)}
    counts = ff.all_reduce(rt, counts, op="sum")
    return counts["right"] / counts["seen"]


def open_log(path: str, step: int) -> TextIO:
    """The file of rows "step,loss", ready for the row after `step`.

    Later rows are cut off: a run that was killed has logged steps that no checkpoint holds, and they are taken again.
    """
    log = open(path, "a+", buffering=1)  # each row is written at once
    log.seek(0)
    log.readline() or log.write("step,loss\n")
    end = log.tell()
    while (row := log.readline()) and int(row.partition(",")[0]) <= step:
        end = log.tell()
    log.truncate(end)
    return log


def train(rt: ff.Runtime, num_epochs: int, folder: str, save_every: int = 0, losses: str | None = None) -> float:
    """Train up to `num_epochs`, going on from the newest checkpoint in `folder`; returns the test accuracy."""
    training, held_out = load_data()
    per_rank = BATCH_SIZE // rt.world_size
    loader = ff.setup_dataloader(rt, DataLoader(training, batch_size=per_rank, shuffle=True))
    test_loader = ff.setup_dataloader(rt, DataLoader(held_out, batch_size=256))

    torch.manual_seed(rt.seed)  # the initial weights
    model = ff.setup_model(rt, make_net())
    opt = ff.setup_optimizer(rt, model, torch.optim.AdamW, lr=LEARNING_RATE)
    schedule = ff.schedule_from_torch(
        torch.optim.lr_scheduler.CosineAnnealingLR, LEARNING_RATE, T_max=num_epochs * len(loader)
    )
    grad_fn = ff.value_and_grad(rt, loss_fn, weighted=True)
    cursor = ff.Cursor(seed=rt.seed)  # where we are in the data: epoch 0, sample 0

    path = ff.latest(folder)
    if path is not None:
        state = ff.load(rt, path, like={"model": model, "opt": opt, "cursor": cursor})
        model, opt, cursor = state["model"], state["opt"], state["cursor"]
        ff.print(rt, f"resumed from {path}: {cursor.epoch} of {num_epochs} epochs are done, {opt.step} steps")
    log = open_log(losses, opt.step) if losses and rt.rank == 0 else None

    for epoch in range(cursor.epoch, num_epochs):
        start = time.perf_counter()
        for (x, y), cursor in ff.batches(rt, loader, cursor, with_cursor=True):
            loss, grads = grad_fn(model, x, y, rng=ff.fold_in(ff.key(rt.seed), opt.step))
            grads, _ = ff.clip_gradients(rt, grads, max_norm=1.0)
            model, opt = ff.optimizer_step(rt, model, opt, grads, donate=True, **schedule(opt.step))
            if log:
                log.write(f"{opt.step},{loss.item()!r}\n")  # all digits: equal text is equal bits
            if cursor.epoch > epoch or (save_every and opt.step % save_every == 0):
                path = f"{folder}/step-{opt.step:06d}"
                ff.save(rt, path, {"model": model, "opt": opt, "cursor": cursor})
        seconds = time.perf_counter() - start
        ff.print(rt, f"epoch {epoch}: loss {loss:.4f}, {seconds:.1f} s, saved {path}")

    result = accuracy(rt, model, test_loader)
    ff.print(rt, f"test accuracy: {result:.2%} of {len(held_out)} scans that training never saw")
    return result


def main() -> None:
    """Read the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", default="auto", help="how many processes, one device each")
    parser.add_argument("--strategy", default="auto", help="how they train together: single, ddp, fsdp, functional")
    parser.add_argument("--precision", default="32-true", help="64-true, 32-true, bf16-mixed, bf16-true")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--checkpoint", default="checkpoints/digits", help="the folder of the checkpoints")
    parser.add_argument("--save-every", type=int, default=0, metavar="STEPS", help="save in mid-epoch, too")
    parser.add_argument("--losses", metavar="FILE", help="a CSV file for the loss of every step")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    options = {"devices": args.devices, "strategy": args.strategy, "precision": args.precision, "seed": args.seed}
    with ff.runtime(**options) as rt:
        ff.print(rt, rt)
        train(rt, args.epochs, args.checkpoint, args.save_every, args.losses)


if __name__ == "__main__":
    main()
