"""Distillation: a small net learns to read digits from a large one's average, and never sees a label.

    python examples/distillation.py
    python examples/distillation.py --devices 2

While the teacher trains, `ff.map_params` keeps a moving average of its weights, and that one teaches.
"""

import argparse

import torch
from digits import load_data, make_net
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

import fabricfn as ff

BATCH_SIZE = 64  # over all processes together
DECAY = 0.98
TEMPERATURE = 3.0


def make_student() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 24), nn.ReLU(), nn.Linear(24, 10))


def teaching_loss(net: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(net(x), y)


def learning_loss(student: nn.Module, teacher: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """How far the student's softened answers are from the teacher's."""
    answers = (teacher(x) / TEMPERATURE).softmax(dim=1)
    return F.cross_entropy(student(x) / TEMPERATURE, answers) * TEMPERATURE**2


def train_teacher(rt: ff.Runtime, loader: DataLoader, num_epochs: int) -> tuple[ff.Model, ff.Model]:
    """(the last weights, their moving average)."""
    model = ff.setup_model(rt, make_net())
    opt = ff.setup_optimizer(rt, model, torch.optim.AdamW, lr=2e-3)
    grad_fn = ff.value_and_grad(rt, teaching_loss)
    average = ff.map_params(torch.clone, model)
    for epoch in range(num_epochs):
        for x, y in ff.batches(rt, loader, epoch):
            _, grads = grad_fn(model, x, y)
            model, opt = ff.optimizer_step(rt, model, opt, grads, donate=True)
            average = ff.map_params(lambda old, new: DECAY * old + (1 - DECAY) * new, average, model)
    return model, average


def train_student(rt: ff.Runtime, loader: DataLoader, teacher: ff.Model, num_epochs: int) -> ff.Model:
    """A small model that agrees with the teacher; it gets images without labels."""
    student = ff.setup_model(rt, make_student())
    opt = ff.setup_optimizer(rt, student, torch.optim.AdamW, lr=1e-2)
    grad_fn = ff.value_and_grad(rt, learning_loss)
    teacher = ff.eval_mode(teacher)  # a model among the other arguments is a frozen net in the loss function
    for epoch in range(num_epochs):
        for x, _ in ff.batches(rt, loader, epoch):
            _, grads = grad_fn(student, teacher, x)
            student, opt = ff.optimizer_step(rt, student, opt, grads, donate=True)
    return student


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", default="auto")
    parser.add_argument("--strategy", default="auto")
    parser.add_argument("--epochs", type=int, default=10, help="of the teacher; the student takes twice as many")
    args = parser.parse_args()

    with ff.runtime(devices=args.devices, strategy=args.strategy, seed=0) as rt:
        training, held_out = load_data()
        batches = DataLoader(training, batch_size=BATCH_SIZE // rt.world_size, shuffle=True, drop_last=True)
        loader = ff.setup_dataloader(rt, batches)
        x, y = ff.to_device(rt, held_out.tensors)  # few enough to be looked at whole, on every rank

        torch.manual_seed(rt.seed)
        last, teacher = train_teacher(rt, loader, args.epochs)
        student = train_student(rt, loader, teacher, 2 * args.epochs)
        right = {}
        for name, model in {"last weights": last, "teacher": teacher, "student": student}.items():
            right[name] = (ff.apply(rt, ff.eval_mode(model), x).argmax(dim=1) == y).double().mean().item()
            size = sum(value.numel() for value in model.params.values())
            ff.print(rt, f"{name}: {right[name]:.2%} right, {size} parameters")
        assert right["teacher"] > 0.95
        assert right["student"] > 0.9


if __name__ == "__main__":
    main()
