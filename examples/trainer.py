"""A trainer of your own: epochs, accumulation, hooks, logs, a progress bar, validation, resuming; copy it, change it.

    python examples/trainer.py                # the digits, one process
    python examples/trainer.py --devices 2    # two

The settings are a record, `fit` is a function, and what happens around it comes in as callbacks of the Runtime.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from digits import accuracy, load_data, make_net
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

import fabricfn as ff


@dataclass(frozen=True, slots=True, kw_only=True)
class Trainer:
    """How to train; each epoch ends with `validate(rt, model)`, whose numbers are logged, and with a checkpoint."""

    loss_fn: Callable[..., torch.Tensor]
    validate: Callable[[ff.Runtime, ff.Model], dict[str, float]]
    num_epochs: int = 5
    num_microbatches: int = 1
    max_norm: float | None = None
    folder: str = "checkpoints/trainer"
    keep: int = 2


def fit(rt: ff.Runtime, trainer: Trainer, model: ff.Model, opt: ff.Optimizer, loader: DataLoader) -> ff.Model:
    """The trained model. Hooks: on_fit_start, on_step_end, on_epoch_end (which may return "stop"), on_fit_end.

    `loader` is from `ff.setup_dataloader`. Every rank calls it. It goes on from the newest checkpoint in the folder.
    """
    grad_fn = ff.accumulate(rt, trainer.loss_fn)
    state = {"model": model, "opt": opt, "epoch": 0}
    if path := ff.latest(trainer.folder):
        state = ff.load(rt, path, like=state)
        ff.print(rt, f"resumed from {path}")
    model, opt, first = state["model"], state["opt"], state["epoch"]

    ff.call(rt, "on_fit_start", model=model, opt=opt, epoch=first)
    for epoch in range(first, trainer.num_epochs):
        stream = ff.batches(rt, loader, epoch)
        num_steps = -(-len(loader) // trainer.num_microbatches)
        for _ in ff.progress(rt, range(num_steps), desc=f"epoch {epoch}"):
            loss, grads = grad_fn(model, islice(stream, trainer.num_microbatches))
            if trainer.max_norm is not None:
                grads, _ = ff.clip_gradients(rt, grads, max_norm=trainer.max_norm)
            model, opt = ff.optimizer_step(rt, model, opt, grads, donate=True)
            ff.log(rt, "train/loss", loss, step=opt.step)
            ff.call(rt, "on_step_end", model=model, opt=opt, loss=loss)

        results = trainer.validate(rt, model)
        ff.log_dict(rt, {"val": results}, step=opt.step)
        ff.save(rt, f"{trainer.folder}/epoch-{epoch:03d}", {"model": model, "opt": opt, "epoch": epoch + 1})
        ff.prune_checkpoints(rt, trainer.folder, last=trainer.keep)
        if "stop" in ff.call(rt, "on_epoch_end", model=model, opt=opt, epoch=epoch, results=results):
            break
    ff.call(rt, "on_fit_end", model=model, opt=opt)
    return model


# ---- its use ----


class Tell:
    """A callback: any object with methods named as the hooks, which take of the arguments what they want."""

    def on_epoch_end(self, rt: ff.Runtime, epoch: int, results: dict[str, float]) -> None:
        ff.print(rt, f"epoch {epoch}: test accuracy: {results['accuracy']:.2%}")


def on_epoch_end(results: dict[str, float]) -> str | None:
    """Another one: a function bears the name of its hook."""
    return "stop" if results["accuracy"] > 0.99 else None


def loss_fn(net: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(net(x), y)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", default="auto")
    parser.add_argument("--strategy", default="auto")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--checkpoints", default="checkpoints/trainer")
    parser.add_argument("--logs", default="logs")
    args = parser.parse_args()

    options: dict[str, Any] = {"devices": args.devices, "strategy": args.strategy, "seed": 0}
    with ff.runtime(**options, loggers=ff.loggers.csv(args.logs, "trainer"), callbacks=[Tell(), on_epoch_end]) as rt:
        training, held_out = load_data()
        microbatch = DataLoader(training, batch_size=32 // rt.world_size, shuffle=True, drop_last=True)
        loader, test_loader = ff.setup_dataloaders(rt, microbatch, DataLoader(held_out, batch_size=256))
        torch.manual_seed(rt.seed)
        model = ff.setup_model(rt, make_net())
        opt = ff.setup_optimizer(rt, model, torch.optim.AdamW, lr=2e-3)
        trainer = Trainer(
            loss_fn=loss_fn,
            validate=lambda rt, model: {"accuracy": accuracy(rt, model, test_loader)},
            num_epochs=args.epochs,
            num_microbatches=2,
            folder=args.checkpoints,
        )
        model = fit(rt, trainer, model, opt, loader)
        assert trainer.validate(rt, model)["accuracy"] > 0.95


if __name__ == "__main__":
    main()
