"""A convolutional net on CIFAR-10: mixed precision, augmentation, a schedule, validation, a checkpoint an epoch.

    python examples/cifar10.py --download                            # by torchvision, once
    python examples/cifar10.py --devices 4 --precision bf16-mixed
    python examples/cifar10.py --stand-in --epochs 2 --lr 1e-3       # offline: digits in the shape of CIFAR-10

Without torchvision the digits stand in as well.
"""

import argparse
import importlib.util

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset

import fabricfn as ff


class SimpleCNN(nn.Module):
    def __init__(self, num_classes=10):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 32, kernel_size=3, padding=1)
        self.conv2 = nn.Conv2d(32, 64, kernel_size=3, padding=1)
        self.conv3 = nn.Conv2d(64, 128, kernel_size=3, padding=1)
        self.pool = nn.MaxPool2d(2, 2)
        self.fc1 = nn.Linear(128 * 4 * 4, 256)
        self.fc2 = nn.Linear(256, num_classes)
        self.dropout = nn.Dropout(0.25)

    def forward(self, x):
        x = self.pool(F.relu(self.conv1(x)))
        x = self.pool(F.relu(self.conv2(x)))
        x = self.pool(F.relu(self.conv3(x)))
        x = x.view(x.size(0), -1)
        x = self.dropout(F.relu(self.fc1(x)))
        return self.fc2(x)


def cifar10(rt: ff.Runtime, folder: str, download: bool) -> tuple[Dataset, Dataset]:
    """(training set, test set) by torchvision, the training set flipped and cropped at random."""
    from torchvision import datasets, transforms

    normal = [
        transforms.ToTensor(),
        transforms.Normalize((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    ]
    augmented = transforms.Compose([transforms.RandomHorizontalFlip(), transforms.RandomCrop(32, padding=4), *normal])
    with ff.rank_zero_first(rt):  # the others find the files there
        training = datasets.CIFAR10(folder, train=True, download=download, transform=augmented)
        return training, datasets.CIFAR10(folder, train=False, transform=transforms.Compose(normal))


def stand_in() -> tuple[Dataset, Dataset]:
    """(training set, test set): digits as (3, 32, 32) images and labels 0 .. 9."""
    digits = load_digits()
    images = F.interpolate(torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 8 - 1, size=32)
    images, labels = images.expand(-1, 3, -1, -1), torch.tensor(digits.target)
    return TensorDataset(images[:-360], labels[:-360]), TensorDataset(images[-360:], labels[-360:])


def loss_fn(net: nn.Module, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss, and how many are right."""
    logits = net(x)
    return F.cross_entropy(logits, y), (logits.argmax(dim=1) == y).sum()


def share_right(net: nn.Module, batches) -> tuple[torch.Tensor | int, int]:
    """(how many are right, of how many): with weighted=True their quotient over all ranks."""
    right, seen = 0, 0
    for x, y in batches:
        right, seen = right + (net(x).argmax(dim=1) == y).sum(), seen + len(y)
    return right, seen


def train(rt: ff.Runtime, training: Dataset, test: Dataset, num_epochs: int, lr: float, folder: str) -> float:
    """The accuracy on the test set after `num_epochs`."""
    loader, test_loader = ff.setup_dataloaders(
        rt,
        DataLoader(training, batch_size=128 // rt.world_size, shuffle=True, drop_last=True),
        DataLoader(test, batch_size=256),
    )
    torch.manual_seed(rt.seed)
    model = ff.setup_model(rt, SimpleCNN())
    opt = ff.setup_optimizer(rt, model, torch.optim.AdamW, lr=lr, weight_decay=1e-2)
    schedule = ff.schedule_from_torch(torch.optim.lr_scheduler.CosineAnnealingLR, lr, T_max=num_epochs)
    grad_fn = ff.value_and_grad(rt, loss_fn, has_aux=True)
    accuracy_fn = ff.value(rt, share_right, weighted=True)

    for epoch in range(num_epochs):
        for x, y in ff.batches(rt, loader, epoch):
            (loss, right), grads = grad_fn(model, x, y)
            model, opt = ff.optimizer_step(rt, model, opt, grads, donate=True, **schedule(epoch))
            if opt.step % 100 == 1:
                ff.print(rt, f"epoch {epoch}, step {opt.step}: loss {loss:.4f}, {right / len(y):.1%} right")
        accuracy = accuracy_fn(ff.eval_mode(model), ff.batches(rt, test_loader)).item()
        ff.print(rt, f"epoch {epoch}: test accuracy: {accuracy:.1%}")
        ff.save(rt, f"{folder}/last", {"model": model, "opt": opt, "epoch": epoch, "accuracy": accuracy})
    return accuracy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", default="auto")
    parser.add_argument("--strategy", default="auto")
    parser.add_argument("--precision", default="32-true", help="bf16-mixed; 16-mixed on a GPU")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--data", default="data", help="the folder of CIFAR-10")
    parser.add_argument("--download", action="store_true")
    parser.add_argument("--stand-in", action="store_true", help="digits in place of CIFAR-10")
    parser.add_argument("--checkpoints", default="checkpoints/cifar10")
    args = parser.parse_args()

    with ff.runtime(devices=args.devices, strategy=args.strategy, precision=args.precision, seed=0) as rt:
        digits = args.stand_in or importlib.util.find_spec("torchvision") is None
        training, test = stand_in() if digits else cifar10(rt, args.data, args.download)
        ff.print(rt, f"{len(training)} {'digits in place of CIFAR-10' if digits else 'pictures of CIFAR-10'}")
        accuracy = train(rt, training, test, args.epochs, args.lr, args.checkpoints)
        assert accuracy > 0.3, "three times what guessing gives"


if __name__ == "__main__":
    main()
