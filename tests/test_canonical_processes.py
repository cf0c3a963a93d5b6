"""reduce="canonical" in processes: a small GPT trains to the same bits, and what differs between ranks is refused."""

import hashlib
import itertools
import textwrap
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import fabricfn as ff
from tests.support.canonical import batch, bits_of, mean_square, mine, same, seeded, small, sums
from tests.support.worlds import world_of

ranks = world_of("threads", 4)
real = world_of("processes", 4)


# Training: a small GPT with dropout, in processes


class Block(nn.Module):
    def __init__(self, width, heads, dropout):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.drop = nn.Dropout(dropout)

    def forward(self, x):
        batch, length, width = x.shape
        q, k, v = self.qkv(self.norms[0](x)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        dropout = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        x = x + self.drop(self.out(mixed.transpose(1, 2).reshape(batch, length, width)))
        return x + self.drop(self.mlp(self.norms[1](x)))


class Gpt(nn.Module):
    def __init__(self, length=12, width=16, layers=1, dropout=0.2):
        super().__init__()
        self.token, self.place = nn.Embedding(256, width), nn.Embedding(length, width)
        self.drop = nn.Dropout(dropout)
        self.blocks = nn.Sequential(*(Block(width, 2, dropout) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 256, bias=False)
        self.head.weight = self.token.weight
        generator = seeded(0)
        with torch.no_grad():
            for param in self.parameters():
                param.copy_(0.1 * torch.randn(param.shape, generator=generator))

    def forward(self, tokens):
        x = self.drop(self.token(tokens) + self.place.weight)
        return self.head(self.norm(self.blocks(x)))


def windows(length=12):
    """A module of the standard library, read as bytes."""
    text = torch.tensor(list(Path(textwrap.__file__).read_bytes()))
    return TensorDataset(text[: len(text) // (length + 1) * (length + 1)].view(-1, length + 1))


def next_byte(net, tokens):
    logits = net(tokens[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


GLOBAL_BATCH, MICROBATCH = 16, 2


def train(rt, reduce="canonical", steps=100):
    """The loop of docs/determinism.md: sha256 of all parameters, the last losses, the first one."""
    torch.set_num_threads(1)
    model = ff.setup_model(rt, Gpt())
    opt = ff.setup_optimizer(rt, model, torch.optim.AdamW, lr=3e-3)
    loader = DataLoader(windows(), batch_size=GLOBAL_BATCH // rt.world_size, shuffle=True, drop_last=True)
    loader = ff.setup_dataloader(rt, loader)
    grad_fn = ff.accumulate(rt, next_byte, reduce=reduce)
    losses = []
    for epoch in itertools.count():
        for (tokens,) in ff.batches(rt, loader, epoch):
            rng = ff.fold_in(ff.key(rt.seed), opt.step)
            loss, grads = grad_fn(model, tokens.split(MICROBATCH), rng=rng)
            grads, norm = ff.clip_gradients(rt, grads, max_norm=1.0)
            model, opt = ff.optimizer_step(rt, model, opt, grads, donate=True)
            losses.append((loss.item(), norm.item()))
            if opt.step == steps:
                return digest_of(ff.gather_params(rt, model)), losses


def digest_of(params):
    """sha256 of names and bits."""
    digest = hashlib.sha256()
    for name, value in params.items():
        digest.update(name.encode() + bits_of(value))
    return digest.hexdigest()


def test_the_same_bits_on_1_2_and_4_ranks_after_100_steps(real):
    ((expected, losses),) = real.run(train, world_size=1, strategy="single", timeout=200)
    assert sum(loss for loss, _ in losses[-10:]) < 0.8 * sum(loss for loss, _ in losses[:10]), "it learns"
    for strategy, size in (("functional", 2), ("ddp", 2), ("ddp", 4)):
        for digest, found in real.run(train, world_size=size, strategy=strategy, timeout=200):
            assert found == losses, (strategy, size)
            assert digest == expected, (strategy, size)


def step(rt):
    """One call on 12 micro-batches, dropout on: the loss and the gradients."""
    torch.set_num_threads(1)
    model = ff.setup_model(rt, Gpt())
    grad_fn = ff.accumulate(rt, next_byte, reduce="canonical")
    items = list(windows().tensors[0][: 12 * MICROBATCH].split(MICROBATCH))
    loss, grads = grad_fn(model, mine(rt, items), rng=ff.key(0))
    return [loss, *grads.params.values()]


def test_three_ranks_give_the_same_bits_too(real):
    (expected,) = real.run(step, world_size=1, strategy="single")
    for strategy, size in (("functional", 3), ("ddp", 3), ("functional", 4)):
        for found in real.run(step, world_size=size, strategy=strategy):
            assert all(map(same, found, expected))


def test_the_default_reduction_trains_other_bits(real):
    """So the sha256 above can fail."""
    found = {real.run(train, "mean", 10, world_size=size)[0][0] for size in (1, 4)}
    assert len(found) == 2


# Refusals: each rank raises, and nothing hangs


def uneven(rt, counts):
    model = ff.setup_model(rt, small())
    grad_fn = ff.accumulate(rt, sums, weighted=True, reduce="canonical")
    with pytest.raises(ff.ConfigurationError, match=rf"by rank there are \[{counts[0]}, {counts[1]}\]") as caught:
        grad_fn(model, [batch()] * counts[rt.rank], rng=ff.key(0))
    if min(counts):
        assert 'tail="drop"' in str(caught.value) and "into a number that 2 divides" in str(caught.value)
    return f"rank {rt.rank}" in str(caught.value)


@pytest.mark.parametrize("counts", [(2, 0), (3, 4), (1, 70)])
def test_uneven_numbers_of_micro_batches_are_an_error_on_every_rank(ranks, real, counts):
    for strategy in ("ddp", "functional"):
        assert ranks.run(uneven, counts, world_size=2, precision=64, strategy=strategy) == [True, True]
    assert real.run(uneven, counts, world_size=2, precision=64) == [True, True]


def other_threads(rt):
    torch.set_num_threads(1 + rt.rank)
    try:
        with pytest.raises(ff.ConfigurationError, match=r"threads, by rank \[1, 2\] .*torch.set_num_threads\(1\)"):
            ff.accumulate(rt, mean_square, reduce="canonical")(ff.setup_model(rt, small()), [batch()])
    finally:
        torch.set_num_threads(1)
    return True


def test_ranks_with_different_numbers_of_threads_are_refused(real):
    """Inside of an operation, torch adds up in another order then."""
    assert real.run(other_threads, world_size=2, precision=64) == [True, True]
