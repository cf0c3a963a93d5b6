"""DCGAN on handwritten digits: two models, two optimizers, and gradients of each with the other one frozen.

    python examples/dcgan.py
    python examples/dcgan.py --devices 2

In the end it draws a few digits of its own, and says how far they are from the real ones.
"""

import argparse

import torch
from digits import load_data
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

import fabricfn as ff

BATCH_SIZE = 32  # over all processes together
NOISE = 16


def make_generator() -> nn.Module:
    """(N, NOISE, 1, 1) noise -> (N, 1, 8, 8) images in 0 .. 1."""
    return nn.Sequential(
        nn.ConvTranspose2d(NOISE, 64, 2, bias=False), nn.BatchNorm2d(64), nn.ReLU(),
        nn.ConvTranspose2d(64, 32, 4, stride=2, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
        nn.ConvTranspose2d(32, 1, 4, stride=2, padding=1), nn.Sigmoid(),
    )  # fmt: skip


def make_discriminator() -> nn.Module:
    """(N, 1, 8, 8) images -> (N,) logits: real or not."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 4, stride=2, padding=1), nn.LeakyReLU(0.2),
        nn.Conv2d(32, 64, 4, stride=2, padding=1), nn.LeakyReLU(0.2),
        nn.Conv2d(64, 1, 2), nn.Flatten(0),
    )  # fmt: skip


def noise(like: torch.Tensor) -> torch.Tensor:
    return torch.randn(len(like), NOISE, 1, 1, device=like.device)


def discriminator_loss(discriminator: nn.Module, generator: nn.Module, real: torch.Tensor) -> torch.Tensor:
    return F.softplus(-discriminator(real)).mean() + F.softplus(discriminator(generator(noise(real)))).mean()


def generator_loss(generator: nn.Module, discriminator: nn.Module, real: torch.Tensor) -> torch.Tensor:
    return F.softplus(-discriminator(generator(noise(real)))).mean()


def train(rt: ff.Runtime, num_epochs: int) -> tuple[ff.Model, ff.Model]:
    """(the generator as it began, as it became)."""
    training, _ = load_data()
    batch_size = BATCH_SIZE // rt.world_size
    loader = ff.setup_dataloader(rt, DataLoader(training, batch_size=batch_size, shuffle=True, drop_last=True))

    torch.manual_seed(rt.seed)
    first = generator = ff.setup_model(rt, make_generator())
    discriminator = ff.setup_model(rt, make_discriminator())
    generator_opt = ff.setup_optimizer(rt, generator, torch.optim.Adam, lr=4e-3, betas=(0.5, 0.999))
    discriminator_opt = ff.setup_optimizer(rt, discriminator, torch.optim.Adam, lr=2e-3, betas=(0.5, 0.999))
    # Gradients are for the first model; the other one arrives in the loss function as a frozen net.
    discriminator_grad = ff.value_and_grad(rt, discriminator_loss)
    generator_grad = ff.value_and_grad(rt, generator_loss)

    for epoch in range(num_epochs):
        for real, _ in ff.batches(rt, loader, epoch):
            one, two = ff.split(ff.fold_in(ff.key(rt.seed), generator_opt.step))  # each rank draws noise of its own
            d_loss, grads = discriminator_grad(discriminator, generator, real, rng=one)
            discriminator, discriminator_opt = ff.optimizer_step(rt, discriminator, discriminator_opt, grads)
            g_loss, grads = generator_grad(generator, discriminator, real, rng=two)
            generator, generator_opt = ff.optimizer_step(rt, generator, generator_opt, grads)
        ff.print(rt, f"epoch {epoch}: discriminator {d_loss:.3f}, generator {g_loss:.3f}")
    return first, generator


def draw(rt: ff.Runtime, generator: ff.Model, num: int) -> torch.Tensor:
    """`num` images, the same at every call."""
    random = torch.randn(num, NOISE, 1, 1, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return ff.apply(rt, ff.eval_mode(generator), ff.to_device(rt, random)).cpu()


def distance(fake: torch.Tensor, real: torch.Tensor) -> float:
    """Fréchet's between two sets of images: how far their means and covariances are apart."""
    a, b = fake.flatten(1).double(), real.flatten(1).double()
    cross = torch.linalg.eigvals(a.T.cov() @ b.T.cov()).real.clamp(min=0).sqrt().sum()
    return ((a.mean(0) - b.mean(0)).square().sum() + a.var(0).sum() + b.var(0).sum() - 2 * cross).item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", default="auto")
    parser.add_argument("--strategy", default="auto")
    parser.add_argument("--epochs", type=int, default=20)
    args = parser.parse_args()

    with ff.runtime(devices=args.devices, strategy=args.strategy, seed=0) as rt:
        first, last = train(rt, args.epochs)
        _, held_out = load_data()
        real = held_out.tensors[0]
        before, after = (distance(draw(rt, generator, 1000), real) for generator in (first, last))
        for rows in zip(*draw(rt, last, 8)[:, 0], strict=True):  # eight digits side by side
            ff.print(rt, "  ".join("".join(2 * " .:+#@"[int(5.99 * pixel)] for pixel in row) for row in rows))
        ff.print(rt, f"distance to the real digits: {before:.2f} before, {after:.2f} after")
        assert after < before * 2 / 3


if __name__ == "__main__":
    main()
