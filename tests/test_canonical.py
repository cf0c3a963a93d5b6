"""reduce="canonical": the same bits, however many ranks share the micro-batches of a global batch."""

import functools
import gc
import hashlib
import itertools
import textwrap
from pathlib import Path

import pytest
import torch
from hypothesis import given, strategies as st
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import fabricfn as ff
from fabricfn import flat
from tests.worlds import few, world_of

DISTRIBUTED = {
    "functional": ff.strategies.functional(),
    "ddp": ff.strategies.ddp(),
    "ddp, bucket views": ff.strategies.ddp(gradient_as_bucket_view=True),
    "ddp, unused": ff.strategies.ddp(find_unused_parameters=True),
}
ROWS = pytest.mark.parametrize("strategy", DISTRIBUTED.values(), ids=DISTRIBUTED)
LARGE = flat.buckets.LARGE // 4 + 1001
"""More float32 numbers than travel to every rank."""


ranks = world_of("threads", 4)
real = world_of("processes", 4)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def same(found, expected):
    """Bit for bit: 0.0 and -0.0 differ."""
    return found.dtype == expected.dtype and found.shape == expected.shape and bits_of(found) == bits_of(expected)


def bits_of(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def mine(rt, items):
    """The micro-batches of this rank: a contiguous part of the global batch."""
    count, rest = divmod(len(items), rt.world_size)
    assert not rest
    return items[rt.rank * count : (rt.rank + 1) * count]


# The tree


def written(counts):
    """The sum as text."""

    def add(left, right):
        return f"({left}+{right})"

    whole, first = [], 0
    for count in counts:
        held = []
        for leaf in range(first, first + count):
            flat.push(held, (leaf, 1), str(leaf), add)
        assert [block for block, _ in held] == flat.pairwise.blocks_of(first, count)
        for block, text in held:
            flat.push(whole, block, text, add)
        first += count
    return flat.fold(whole, add)


def test_every_way_of_dealing_out_the_leaves_gives_the_same_tree():
    assert written([7]) == "(((0+1)+(2+3))+((4+5)+6))"
    for n in range(1, 13):
        for ends in itertools.product((False, True), repeat=n - 1):
            counts = [1]
            for end in ends:
                counts = [*counts, 1] if end else [*counts[:-1], counts[-1] + 1]
            assert written(counts) == written([n]), counts


def test_the_number_of_sums_held_is_logarithmic():
    for first, count in itertools.product(range(0, 70, 7), range(1, 300)):
        held, most = [], 0
        for leaf in range(first, first + count):
            flat.push(held, (leaf, 1), None, lambda left, right: None)
            most = max(most, len(held))
        assert most <= (1 if first == 0 else 2) * count.bit_length() + (first > 0)
        if first % count == 0 and count & (count - 1) == 0:
            assert len(held) == 1, "a block by itself: one sum travels"


# Random gradients, in threads


class Vectors(nn.Module):
    """Its gradients are whatever the loss is given."""

    def __init__(self, *sizes):
        super().__init__()
        self.vectors = nn.ParameterList([torch.zeros(size) for size in sizes])


def dots(net, *vectors):
    return sum((param * vector).sum() for param, vector in zip(net.vectors, vectors, strict=True)) + vectors[0][0] / 3


def rows(n, seed, *sizes):
    """n micro-batches of vectors whose numbers differ by orders of magnitude, so that each order of adding shows."""
    generator = seeded(seed)

    def vector(size):
        return torch.randn(size, generator=generator) * 10 ** (4 * torch.rand(size, generator=generator))

    return [tuple(vector(size) for size in sizes) for _ in range(n)]


def reduced(rt, items, reduce="canonical", weights=None):
    model = ff.setup_model(rt, Vectors(*(len(vector) for vector in items[0])))
    if weights is None:
        grad_fn = ff.accumulate(rt, dots, reduce=reduce)
    else:
        items = [(weight, *item) for weight, item in zip(weights, items, strict=True)]
        grad_fn = ff.accumulate(rt, lambda net, w, *v: (dots(net, *v), w), reduce=reduce, weighted=True)
    loss, grads = grad_fn(model, mine(rt, items))
    return [loss, *grads.params.values()]


@ROWS
@given(data=st.data())
@few(25)
def test_the_bits_depend_on_the_sequence_of_micro_batches_alone(ranks, strategy, data):
    size = data.draw(st.integers(1, 4), "ranks")
    count = data.draw(st.integers(1, 13), "micro-batches a rank")
    items = rows(size * count, data.draw(st.integers(0, 1000), "seed"), 3, 20)
    weights = data.draw(st.none() | st.just([0.1 * (1 + i % 5) for i in range(len(items))]), "weights")
    (expected,) = ranks.run(reduced, items, "canonical", weights, world_size=1)
    for found in ranks.run(reduced, items, "canonical", weights, world_size=size, strategy=strategy):
        assert all(map(same, found, expected))


@pytest.mark.parametrize(("number", "size"), [(8, 2), (6, 2), (8, 4), (12, 4), (6, 3), (9, 3)])
def test_large_gradients_too(ranks, number, size):
    """They are swapped where the tree splits evenly between ranks, otherwise added up in parts."""
    items = rows(number, 0, LARGE, 5)
    (expected,) = ranks.run(reduced, items, world_size=1)
    for found in ranks.run(reduced, items, world_size=size):
        assert all(map(same, found, expected))
        assert all(len(grad.untyped_storage()) < 4 * (len(grad) + 8) for grad in found[1:]), "memory of its own"


def test_the_default_reduction_gives_other_bits(ranks):
    """So what is tested here can fail."""
    items = rows(8, 0, 64)
    found = [ranks.run(reduced, items, "mean", world_size=size)[0][1] for size in (1, 2, 4)]
    assert not same(found[0], found[1]) and not same(found[1], found[2])


def test_a_gradient_that_some_micro_batches_lack_is_zero_there_and_its_sign_is_the_same(ranks):
    """-0.0 + 0.0 is 0.0, but -0.0 alone is -0.0."""

    def partly(net, use, vector):
        loss = (net.vectors[0] * vector).sum()
        return loss + (net.vectors[1] * vector).sum() if use else loss

    def run(rt, uses):
        model = ff.setup_model(rt, Vectors(3, 3))
        grad_fn = ff.accumulate(rt, partly, reduce="canonical")
        items = [(use, torch.tensor([-0.0, 1.0, 1e-8])) for use in uses]
        return list(grad_fn(model, mine(rt, items))[1].params.values())

    for uses in itertools.product((False, True), repeat=4):
        if any(uses):
            (expected,) = ranks.run(run, uses, world_size=1)
            for size, strategy in ((2, "ddp"), (2, "functional"), (4, "ddp")):
                for found in ranks.run(run, uses, world_size=size, strategy=strategy):
                    assert all(map(same, found, expected)), (uses, size)


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


# What a loss function may do


def small(seed=0, dtype=torch.float64):
    module = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).to(dtype)
    generator = seeded(seed)
    with torch.no_grad():
        for param in module.parameters():
            param.copy_(torch.randn(param.shape, generator=generator, dtype=dtype))
    return module


def batch(n=24, dtype=torch.float64):
    return torch.randn(n, 4, generator=seeded(1), dtype=dtype)


def sums(net, x):
    return net(x).square().sum(), len(x)


def mean_square(net, x):
    return net(x).square().mean()


def compared(rt):
    """Against the default reduction, weights and unequal micro-batches, several models and a frozen part included."""
    frozen = small(2)
    frozen[0].requires_grad_(False)
    models = {"a": ff.setup_model(rt, small(1)), "b": ff.setup_model(rt, frozen)}

    def both(nets, x):
        total = nets["a"](x).square().sum() + nets["b"](x + nets["a"](x)[:, :1]).abs().sum()
        return (total, len(x)), {"rows": len(x)}

    x = list(batch().split([1, 5, 1, 1, 2, 4, 2, 1, 1, 1, 3, 2]))
    results = {}
    for reduce in ("mean", "canonical"):
        grad_fn = ff.accumulate(rt, both, weighted=True, has_aux=True, reduce=reduce)
        (loss, aux), grads = grad_fn(models, mine(rt, x))
        assert [one["rows"] for one in aux] == [len(one) for one in mine(rt, x)]
        assert grads["b"].params["0.weight"] is None and grads["a"].params["0.weight"] is not None
        results[reduce] = [loss, *(grad for one in "ab" for grad in grads[one].params.values() if grad is not None)]
    for found, expected in zip(results["canonical"], results["mean"], strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    plain = [ff.accumulate(rt, mean_square, reduce=reduce) for reduce in ("mean", "canonical")]
    y = list(batch().split(2))[rt.rank * 3 : rt.rank * 3 + 3]
    one, two = (grad_fn(models["a"], iter(y))[1].params for grad_fn in plain)
    torch.testing.assert_close(dict(two), dict(one), rtol=1e-12, atol=1e-12)
    return results["canonical"]


@ROWS
def test_it_is_the_mean_that_the_default_reduction_gives(ranks, strategy):
    (expected,) = ranks.run(compared, world_size=1, precision=64, strategy="single")
    for size in (1, 2, 3, 4):
        for found in ranks.run(compared, world_size=size, precision=64, strategy=strategy):
            assert all(map(same, found, expected))


def test_gradients_that_share_memory_are_separated(ranks):
    """Autograd hands out two views of one tensor here."""

    def run(rt, reduce):
        model = ff.setup_model(rt, Vectors(3, 3))

        def loss_fn(net, x):
            return ((net.vectors[0].unsqueeze(0) + net.vectors[1].unsqueeze(0)) * x).sum()

        _, grads = ff.accumulate(rt, loss_fn, reduce=reduce)(model, [torch.full((1, 3), 2.0**i) for i in range(4)])
        return [grads.params[name].clone() for name in grads.params]

    for strategy in ("single", "functional"):
        ((canonical,), (plain,)) = (
            ranks.run(run, reduce, world_size=1, strategy=strategy) for reduce in ("canonical", "mean")
        )
        assert torch.equal(canonical[0], torch.full((3,), 15 / 4)) and all(map(torch.equal, canonical, plain))


def test_16_bit_sums_are_held_in_32_bits(ranks):
    def run(rt):
        model = ff.setup_model(rt, Vectors(1))
        grad_fn = ff.accumulate(rt, lambda net, x: (net.vectors[0] * x.to(torch.bfloat16)).sum(), reduce="canonical")
        items = [torch.tensor([256.0]) if rt.rank == 0 and not i else torch.tensor([1.0]) for i in range(4)]
        return grad_fn(model, items)[1].params["vectors.0"]

    for found in ranks.run(run, world_size=2, precision="bf16-true"):
        assert same(found, torch.tensor([263 / 8], dtype=torch.bfloat16))


def test_layouts_do_not_depend_on_the_world(ranks):
    """Norms add up in the order of the memory, so a channels_last gradient comes back alike everywhere."""

    def run(rt):
        module = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
        with torch.no_grad():
            for param in module.parameters():
                param.copy_(torch.randn(param.shape, generator=seeded(0)))
        model = ff.setup_model(rt, module)
        x = torch.randn(8, 3, 6, 6, generator=seeded(1)).to(memory_format=torch.channels_last)
        grad_fn = ff.accumulate(rt, lambda net, x: net(x).square().mean(), reduce="canonical")
        _, grads = grad_fn(model, mine(rt, list(x.split(1))))
        return [*grads.params.values(), ff.clip_gradients(rt, grads, max_norm=1e-3)[1]], grads.params["weight"].stride()

    ((expected, strides),) = ranks.run(run, world_size=1)
    for found, others in ranks.run(run, world_size=4):
        assert all(map(same, found, expected)) and others == strides


def test_models_stay_as_they_are_and_calls_are_pure(ranks):
    def run(rt):
        model = ff.setup_model(rt, small())
        before = {name: value.clone() for name, value in model.params.items()}
        grad_fn = ff.accumulate(rt, sums, weighted=True, reduce="canonical")
        plain = ff.value_and_grad(rt, sums, weighted=True)
        parts = list(batch().split(3))
        expected = plain(model, batch())[1].params
        first = grad_fn(model, parts)[1].params
        kept = {name: grad.clone() for name, grad in first.items()}
        again = grad_fn(model, parts)[1].params
        assert all(torch.equal(plain(model, batch())[1].params[name], expected[name]) for name in expected)
        with torch.no_grad():
            last = grad_fn(model, parts)[1].params
            assert not torch.is_grad_enabled()
        assert all(torch.equal(model.params[name], before[name]) for name in before)
        return all(
            torch.equal(first[name], kept[name]) and torch.equal(again[name], kept[name])
            and torch.equal(last[name], kept[name])
            for name in kept
        )  # fmt: skip

    for strategy in DISTRIBUTED.values():
        assert ranks.run(run, world_size=2, precision=64, strategy=strategy) == [True, True]


def test_log2_sums_are_alive(ranks):
    """Tensors of the parameter's shape, seen from inside of the loss function."""

    def run(rt, number):
        module, most = Vectors(4321), []

        def loss_fn(net, x):
            tensors = [one for one in gc.get_objects() if type(one) in (torch.Tensor, nn.Parameter)]
            alive = [one for one in tensors if one.shape == (4321,)]
            most.append(len({one.data_ptr() for one in alive}))
            return (net.vectors[0] * x).sum()

        model = ff.setup_model(rt, module)
        ff.accumulate(rt, loss_fn, reduce="canonical")(model, [torch.ones(())] * number)
        return [count - most[0] for count in most]

    (found,) = ranks.run(run, 32, world_size=1, strategy="single")
    assert found == [leaf.bit_count() for leaf in range(32)]


# Buffers


def normed():
    module = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 1))
    with torch.no_grad():
        for param in module.parameters():
            param.copy_(torch.randn(param.shape, generator=seeded(3)))
    return module


def with_statistics(rt, buffers, evaluated=False, weighted=False):
    model = ff.setup_model(rt, normed())
    model = ff.eval_mode(model) if evaluated else model
    loss_fn = sums if weighted else mean_square
    grad_fn = ff.accumulate(rt, loss_fn, reduce="canonical", buffers=buffers, weighted=weighted)
    x = list(batch(48, torch.float32).split(4))
    _, grads = grad_fn(model, mine(rt, x))
    return dict(grads.params), grads.new_buffers, x


@ROWS
def test_the_mean_of_the_buffers_is_the_same_on_every_world(ranks, strategy):
    ((expected, buffers, x),) = ranks.run(with_statistics, "mean", world_size=1)
    for size in (2, 3, 4):
        for found, others, _ in ranks.run(with_statistics, "mean", world_size=size, strategy=strategy):
            assert all(same(found[name], expected[name]) for name in expected)
            assert all(same(others[name], buffers[name]) for name in buffers)
    hidden = [normed()[0](part) for part in x]
    mean = sum(part.mean(0) for part in hidden) / len(hidden)
    torch.testing.assert_close(buffers["1.running_mean"], 0.1 * mean.detach())
    assert buffers["1.num_batches_tracked"].item() == 1
    _, others, _ = ranks.run(with_statistics, "mean", False, True, world_size=2)[0]
    assert same(others["1.running_mean"], buffers["1.running_mean"]), "weights are for the loss"


def test_buffers_that_change_are_refused_unless_somebody_says_what_to_do(ranks):
    for size in (1, 2):
        with pytest.raises(ff.CapabilityError, match=r'1\.running_mean, .*buffers="mean".*GroupNorm or LayerNorm'):
            ranks.run(with_statistics, "rank0", world_size=size)
        with pytest.raises(ff.ConfigurationError, match='buffers="mean"'):
            ranks.run(with_statistics, "local", world_size=size)
        assert ranks.run(with_statistics, "rank0", True, world_size=size)[0][1] is None


def test_counters_that_differ_are_refused_on_every_rank(ranks):
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))
            self.register_buffer("seen", torch.zeros((), dtype=torch.long))

        def forward(self, x):
            self.seen += len(x)
            return (self.weight * x).sum()

    def run(rt, sizes):
        model = ff.setup_model(rt, Counting())
        grad_fn = ff.accumulate(rt, lambda net, x: net(x), reduce="canonical", buffers="mean")
        return grad_fn(model, [torch.ones(size, 3) for size in mine(rt, sizes)])[1]

    assert ranks.run(run, [2, 2, 2, 2], world_size=2)[1].new_buffers["seen"].item() == 2
    for sizes in ([2, 2, 2, 3], [2, 2, 3, 3]):
        assert ranks.run(refused, run, sizes, world_size=2) == [True, True]


def refused(rt, run, sizes):
    with pytest.raises(ff.CapabilityError, match="the buffers seen hold no floating numbers"):
        run(rt, sizes)
    return True


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


def test_no_micro_batch_at_all_is_an_error(ranks):
    def run(rt):
        ff.accumulate(rt, sums, weighted=True, reduce="canonical")(ff.setup_model(rt, small()), [])

    with pytest.raises(ff.ConfigurationError, match="every rank needs at least one"):
        ranks.run(run, world_size=1, precision=64)


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


def unused_somewhere(rt):
    """Layer 2 is used by one micro-batch of the last rank only, or by none."""
    model = ff.setup_model(rt, small())

    def loss_fn(net, x, whole):
        return (net(x) if whole else net[0](x)).square().mean()

    def items(whole):
        return [(part, whole and rt.rank == 1 and i == 2) for i, part in enumerate(batch().split(6))]

    grad_fn = ff.accumulate(rt, loss_fn, reduce="canonical")
    _, grads = grad_fn(model, items(True))
    assert grads.params["2.weight"].abs().sum() > 0
    with pytest.raises(ff.GradientError, match=r"2 parameters got no gradient: 2\.weight, 2\.bias"):
        grad_fn(model, items(False))
    _, grads = ff.accumulate(rt, loss_fn, reduce="canonical", allow_unused=True)(model, items(False))
    assert grads.params["2.weight"] is None and grads.params["0.weight"] is not None
    return True


@ROWS
def test_unused_means_by_no_micro_batch_of_any_rank(ranks, strategy):
    assert ranks.run(unused_somewhere, world_size=2, precision=64, strategy=strategy) == [True, True]


def test_sparse_gradients_are_refused_on_every_rank(ranks):
    def run(rt):
        model = ff.setup_model(rt, nn.Embedding(5, 3, sparse=rt.rank == 1))
        grad_fn = ff.accumulate(rt, lambda net, i: net(i).sum(), reduce="canonical")
        with pytest.raises(ff.CapabilityError, match=r"weight are sparse.*sparse=False"):
            grad_fn(model, [torch.tensor([rt.rank])] * 2)
        return True

    assert ranks.run(run, world_size=2) == [True, True]


def zero_weights(rt):
    model = ff.setup_model(rt, small())
    with pytest.raises(ff.GradientError, match="sum to zero"):
        ff.accumulate(rt, lambda net, x: (net(x).sum(), 0), weighted=True, reduce="canonical")(model, [batch()])
    return True


def test_weights_that_sum_to_zero_are_an_error(ranks):
    assert ranks.run(zero_weights, world_size=2, precision=64) == [True, True]


def other_strategies():
    functional = ff.strategies.functional()
    made = {name: getattr(functional, name) for name in ("attach", "forward", "backward", "gradients")}
    return {
        "fsdp": ff.strategies.fsdp(),
        "of the user's own": ff.Strategy(name="mine", **made),
        "static graph": ff.strategies.ddp(static_graph=True),
        "hook": ff.strategies.ddp(comm_hook=lambda state, bucket: None),
    }


@pytest.mark.parametrize("strategy", other_strategies().values(), ids=other_strategies())
def test_strategies_that_do_not_know_it_refuse_it_at_once(ranks, strategy):
    with pytest.raises(ff.CapabilityError, match=r'reduce="canonical".*strategy="ddp".*reduce="mean"'):
        ranks.run(functools.partial(ff.accumulate, loss_fn=sums, reduce="canonical"), strategy=strategy, world_size=2)


def test_an_unknown_reduction_is_an_error():
    rt = ff.Runtime(world=ff.World(), precision=ff.Precision(), strategy=ff.strategies.single())
    with pytest.raises(ff.ConfigurationError, match='reduce=\'sum\' is unknown; there are "mean" and "canonical"'):
        ff.accumulate(rt, sums, reduce="sum")


def test_an_exception_in_the_loss_leaves_nothing_behind(ranks):
    def run(rt):
        model = ff.setup_model(rt, small())

        def fails(gradient):
            raise KeyError("here")

        def breaks(net, x):
            hidden = net[0](x)
            if len(x) == 3:
                hidden.register_hook(fails)  # in the backward pass, when the last layer has its gradients already
            return net[2](net[1](hidden)).square().mean()

        grad_fn = ff.accumulate(rt, breaks, reduce="canonical")
        with pytest.raises(KeyError):
            grad_fn(model, [batch(4), batch(4), batch(3)])
        return dict(grad_fn(model, [batch(4)])[1].params)

    for strategy in ("ddp", "functional"):
        for found in ranks.run(run, world_size=2, precision=64, strategy=strategy):
            plain = small()
            plain(batch(4)).square().mean().backward()
            for name, param in plain.named_parameters():
                torch.testing.assert_close(found[name], param.grad, rtol=0, atol=1e-13)


HALF = ff.Precision(compute_dtype=torch.float16, autocast=True, loss_scale=ff.DynamicScale(init_scale=1024.0))


def test_a_loss_scale_is_taken_out_again_in_the_same_bits(ranks):
    def run(rt, reduce="canonical"):
        model = ff.setup_model(rt, small(dtype=torch.float32))
        grad_fn = ff.accumulate(rt, mean_square, reduce=reduce)
        loss, grads = grad_fn(model, mine(rt, list(batch(24, torch.float32).split(2))))
        return [loss, *grads.params.values()]

    (expected,) = ranks.run(run, world_size=1, precision=HALF)
    (plain,) = ranks.run(run, "mean", world_size=1, precision=HALF)
    for found, other in zip(expected, plain, strict=True):
        torch.testing.assert_close(found, other, rtol=1e-3, atol=1e-4)
    for size, strategy in ((2, "ddp"), (3, "functional")):
        for found in ranks.run(run, world_size=size, strategy=strategy, precision=HALF):
            assert all(map(same, found, expected))


@ROWS
def test_sums_are_held_in_the_dtype_that_the_precision_names(ranks, strategy):
    items = rows(6, 0, 64)
    precise = ff.Precision(reduce_dtype=torch.float64)
    (expected,) = ranks.run(reduced, items, world_size=1, precision=precise)
    torch.testing.assert_close(expected[1], (sum(v.double() for (v,) in items) / 6).float(), rtol=1e-7, atol=0)
    (short,) = ranks.run(reduced, items, world_size=1)
    assert not same(short[1], expected[1])
    for found in ranks.run(reduced, items, world_size=3, precision=precise, strategy=strategy):
        assert all(map(same, found, expected))
