"""k-fold cross-validation on handwritten digits, then all k nets vote on scans that none of them has seen.

    python examples/kfold.py
    python examples/kfold.py --devices 2 --folds 10

Every fold is a call of one function: models and optimizers are values, so none knows of another.
"""

import argparse
import statistics

import torch
from digits import load_data, make_net
from sklearn.model_selection import KFold
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

import fabricfn as ff

BATCH_SIZE = 64  # over all processes together


def loss_fn(net: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(net(x), y)


def train(rt: ff.Runtime, data: Dataset, num_epochs: int) -> ff.Model:
    """A net trained on `data`, in evaluation mode."""
    batches = DataLoader(data, batch_size=BATCH_SIZE // rt.world_size, shuffle=True, drop_last=True)
    loader = ff.setup_dataloader(rt, batches)
    torch.manual_seed(rt.seed)
    model = ff.setup_model(rt, make_net())
    opt = ff.setup_optimizer(rt, model, torch.optim.AdamW, lr=2e-3)
    grad_fn = ff.value_and_grad(rt, loss_fn)
    for epoch in range(num_epochs):
        for x, y in ff.batches(rt, loader, epoch):
            _, grads = grad_fn(model, x, y)
            model, opt = ff.optimizer_step(rt, model, opt, grads, donate=True)
    return ff.eval_mode(model)


def cross_validate(
    rt: ff.Runtime, data: TensorDataset, num_folds: int, num_epochs: int
) -> tuple[list[ff.Model], list[float]]:
    """(a net for each fold, how many of the samples that it never saw it gets right)."""
    models, scores = [], []
    for fold, (used, left_out) in enumerate(KFold(num_folds).split(data)):
        models.append(train(rt, Subset(data, used), num_epochs))
        x, y = ff.to_device(rt, data[left_out])
        scores.append((ff.apply(rt, models[-1], x).argmax(dim=1) == y).double().mean().item())
        ff.print(rt, f"fold {fold}: {scores[-1]:.2%} right")
    return models, scores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", default="auto")
    parser.add_argument("--strategy", default="auto")
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=5)
    args = parser.parse_args()

    with ff.runtime(devices=args.devices, strategy=args.strategy, seed=0) as rt:
        training, held_out = load_data()
        models, scores = cross_validate(rt, training, args.folds, args.epochs)
        ff.print(rt, f"on average {statistics.mean(scores):.2%}, give or take {statistics.stdev(scores):.2%}")

        x, y = ff.to_device(rt, held_out.tensors)
        votes = sum(ff.apply(rt, model, x).softmax(dim=1) for model in models)
        together = (votes.argmax(dim=1) == y).double().mean().item()
        ff.print(rt, f"all {args.folds} together: {together:.2%} of {len(y)} scans that none of them saw")
        assert statistics.mean(scores) > 0.95
        assert together > 0.95


if __name__ == "__main__":
    main()
