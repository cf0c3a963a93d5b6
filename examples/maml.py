"""MAML: learn a start from which a few steps on ten points find any sine wave (Finn et al., 2017, section 5.1).

    python examples/maml.py
    python examples/maml.py --devices 2

The steps of adaptation are part of the loss, so its gradient goes through them: second order, in plain torch.
"""

import argparse
import math

import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

import fabricfn as ff

TASKS = 8  # per step, over all processes together
POINTS = 10  # to adapt to, and as many to be judged by
INNER_STEPS, INNER_LR = 3, 0.03

Task = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def make_net() -> nn.Module:
    return nn.Sequential(nn.Linear(1, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 1))


def sample_tasks(num: int, seed: int) -> list[Task]:
    """Sine waves of random amplitude and phase: (x, y) to adapt to, (x, y) to be judged by, (POINTS, 1) each."""
    random = torch.Generator().manual_seed(seed)
    amplitude = torch.empty(num, 1, 1).uniform_(0.1, 5.0, generator=random)
    phase = torch.empty(num, 1, 1).uniform_(0, math.pi, generator=random)
    x = torch.empty(num, 2 * POINTS, 1).uniform_(-5, 5, generator=random)
    y = amplitude * torch.sin(x - phase)
    return list(zip(x[:, :POINTS], y[:, :POINTS], x[:, POINTS:], y[:, POINTS:], strict=True))


def adapted_loss(net: nn.Module, tasks: list[Task]) -> torch.Tensor:
    """The loss on each task's second points after a few steps of gradient descent on its first."""
    losses = []
    for x, y, later_x, later_y in tasks:
        params = dict(net.named_parameters())
        for _ in range(INNER_STEPS):
            loss = F.mse_loss(functional_call(net, params, x), y)
            grads = torch.autograd.grad(loss, list(params.values()), create_graph=True)
            params = {name: p - INNER_LR * grad for (name, p), grad in zip(params.items(), grads, strict=True)}
        losses.append(F.mse_loss(functional_call(net, params, later_x), later_y))
    return torch.stack(losses).mean()


def start(rt: ff.Runtime) -> ff.Model:
    torch.manual_seed(rt.seed)
    return ff.setup_model(rt, make_net())


def train(rt: ff.Runtime, num_steps: int) -> ff.Model:
    """The start from which adaptation goes well."""
    model = start(rt)
    opt = ff.setup_optimizer(rt, model, torch.optim.Adam, lr=3e-3)
    grad_fn = ff.value_and_grad(rt, adapted_loss)
    while opt.step < num_steps:
        tasks = sample_tasks(TASKS, seed=opt.step)[rt.rank :: rt.world_size]
        loss, grads = grad_fn(model, ff.to_device(rt, tasks))
        grads, _ = ff.clip_gradients(rt, grads, max_norm=10.0)
        model, opt = ff.optimizer_step(rt, model, opt, grads, donate=True)
        if opt.step % 100 == 0:
            ff.print(rt, f"step {opt.step}: loss after adaptation {ff.all_reduce(rt, loss):.3f}")
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", default="auto")
    parser.add_argument("--strategy", default="auto", help="single, ddp, functional")
    parser.add_argument("--steps", type=int, default=600)
    args = parser.parse_args()

    with ff.runtime(devices=args.devices, strategy=args.strategy, seed=0) as rt:
        model = train(rt, args.steps)
        tasks = ff.to_device(rt, sample_tasks(100, seed=2**32))
        # adapted_loss is plain torch: it takes a plain module as well.
        before, after = (adapted_loss(ff.to_module(rt, one), tasks).item() for one in (start(rt), model))
        ff.print(rt, f"loss on new waves once adapted: {before:.3f} from a random start, {after:.3f} from ours")
        assert after < before / 2


if __name__ == "__main__":
    main()
