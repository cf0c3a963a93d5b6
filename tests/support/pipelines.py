"""What the tests of pipeline share: nets and their stages, batches, and runs with stages and without."""

import copy

import torch
from torch import nn
from torch.nn import functional as F

import fabricfn as ff
from fabricfn import testing
from fabricfn.sharding import local_of
from fabricfn.testing import cases

VOCAB, WIDTH, TIME, ROWS = 11, 6, 5, 16


class Block(nn.Module):
    def __init__(self, dropout):
        super().__init__()
        self.norm, self.mix = nn.LayerNorm(WIDTH), nn.Linear(TIME, TIME)
        self.up, self.down, self.drop = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH), nn.Dropout(dropout)

    def forward(self, x):
        x = x + self.drop(self.mix(x.transpose(1, 2)).transpose(1, 2))
        return x + self.drop(self.down(F.gelu(self.up(self.norm(x)))))


class Net(nn.Module):
    """A small language model: the user's code knows nothing of stages."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.embed, self.pos = nn.Embedding(VOCAB, WIDTH), nn.Parameter(torch.zeros(TIME, WIDTH))
        self.blocks = nn.ModuleList([Block(dropout) for _ in range(6)])
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCAB)

    def begin(self, tokens):
        return self.embed(tokens) + self.pos

    def forward(self, tokens):
        x = self.begin(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


FIRST = (["embed", "pos"], Net.begin)
BLOCKS = [f"blocks.{i}" for i in range(6)]
TWO = [
    (["embed", "pos", "blocks.0"], lambda net, tokens: net.blocks[0](net.begin(tokens))),
    [*BLOCKS[1:], "norm", "head"],
]
FOUR = [FIRST, BLOCKS[:1], BLOCKS[1:4], [*BLOCKS[4:], "norm", "head"]]
EIGHT = [FIRST, *([block] for block in BLOCKS), ["norm", "head"]]

NET, DROPPED = cases.initialised(Net(), 3), cases.initialised(Net(0.3), 3)  # not in the ranks: one generator a process
TOKENS = torch.randint(VOCAB, (ROWS, TIME + 1), generator=torch.Generator().manual_seed(5))
INPUTS, TARGET = TOKENS[:, :-1].contiguous(), TOKENS[:, 1:].contiguous()


def cross_entropy(output, target):
    return F.cross_entropy(output.flatten(0, 1), target.flatten())


def whole_loss(net, tokens, target):
    return cross_entropy(net(tokens), target)


def run(ranks, fn, *args, stages, world_size, precision="64-true", **options):
    strategy = ff.strategies.pipeline(stages, **options)
    return ranks.run(fn, *args, strategy=strategy, world_size=world_size, precision=precision)


def alone(fn, *args, strategy="single", precision="64-true"):
    with testing.threads(1) as one:
        return one.run(fn, *args, strategy=strategy, precision=precision)[0]


def mine(rt, tensor):
    return tensor.chunk(rt.world_size)[rt.rank]


def steps(rt, grad_fn, *batch, net=NET, num=3, donate=True, start=None):
    """A few clipped steps of SGD: (losses, norms, parameters)."""
    model = ff.setup_model(rt, copy.deepcopy(net))
    opt = ff.setup_optimizer(rt, model, torch.optim.SGD, lr=0.3, momentum=0.9)
    if start is not None:
        loaded = ff.load(rt, start, {"model": model, "opt": opt}, donate=True)
        model, opt = loaded["model"], loaded["opt"]
    seen = []
    for _ in range(num):
        loss, grads = grad_fn(model, *batch)
        grads, norm = ff.clip_gradients(rt, grads, max_norm=0.5, donate=donate)
        model, opt = ff.optimizer_step(rt, model, opt, grads, donate=donate)
        seen.append((loss, norm))
    return seen, ff.gather_params(rt, model), model, opt


def train(rt, schedule, num_microbatches, donate=True):
    grad_fn = ff.pipeline_value_and_grad(rt, cross_entropy, num_microbatches=num_microbatches, schedule=schedule)
    seen, params, model, _ = steps(rt, grad_fn, mine(rt, INPUTS), mine(rt, TARGET), donate=donate)
    held = sum(local_of(value).numel() for value in model.params.values())
    assert held == sum(slot.numel() for slot in model.ref.engine.frames[0].slots if not slot.is_meta)
    return [(loss.item(), norm.item()) for loss, norm in seen], params, held


def train_single(rt):
    return steps(rt, ff.value_and_grad(rt, whole_loss), INPUTS, TARGET)[:2]


class Counting(nn.Module):
    """Stages that change buffers, pass several tensors on (one is not contiguous), and return a tree at the end."""

    def __init__(self):
        super().__init__()
        self.first, self.bn = nn.Linear(3, 4), nn.BatchNorm1d(4)
        self.second, self.late = nn.Linear(4, 4), nn.BatchNorm1d(4)
        self.left, self.right = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))

    def begin(self, x, shift):
        return self.bn(self.first(x + shift)).T, x.sum(1, keepdim=True), torch.arange(len(x), device=x.device)

    def end(self, h, total, index):
        scale = self.left.unsqueeze(0) + self.right.unsqueeze(0)  # autograd gives both views of one gradient
        return {"y": self.late(self.second(h.T)) * scale + total, "index": index}

    def forward(self, x, shift):
        return self.end(*self.begin(x, shift))


COUNTING = [(["first", "bn"], Counting.begin), (["second", "late", "left", "right"], Counting.end)]
COUNTED = cases.initialised(Counting(), 4)
X = torch.randn(8, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
Y = torch.randn(8, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def weighed(output, target):
    error = (output["y"] - target["y"]).square().sum(1) * target["weight"]
    return (error.sum(), target["weight"].sum()), {"last": output["index"][-1], "rows": len(error), "error": error}


def parts(rt):
    weight = torch.arange(1, 9, dtype=torch.float64)
    return (mine(rt, X), mine(rt, X + 1)), {"y": mine(rt, Y), "weight": mine(rt, weight)}


def stepped(rt, model, grads):
    return ff.optimizer_step(rt, model, ff.setup_optimizer(rt, model, torch.optim.SGD, lr=0.1), grads)[0]


OPTIONS = {"has_aux": True, "weighted": True}


def count(rt):
    model = ff.setup_model(rt, copy.deepcopy(COUNTED))
    num = 8 // rt.world_size // 2
    grad_fn = ff.pipeline_value_and_grad(rt, weighed, num_microbatches=num, schedule="gpipe", buffers="mean", **OPTIONS)
    (loss, aux), grads = grad_fn(model, *parts(rt))
    model = stepped(rt, model, grads)
    value_fn = ff.pipeline_value(rt, weighed, num_microbatches=2, schedule="gpipe", **OPTIONS)
    value, found = value_fn(ff.eval_mode(model), *parts(rt))
    return (
        loss,
        aux,
        ff.gather_params(rt, model),
        dict(model.buffers),
        value,
        torch.cat([one["error"] for one in found]),
    )


def count_single(rt):
    def loss_fn(net, x, shift, y, weight):
        return weighed(net(x, shift), {"y": y, "weight": weight})

    model = ff.setup_model(rt, copy.deepcopy(COUNTED))
    (x, shift), target = parts(rt)
    batch = (x, shift, target["y"], target["weight"])
    rows = list(zip(*(tensor.chunk(4) for tensor in batch), strict=True))
    (loss, aux), grads = ff.accumulate(rt, loss_fn, **OPTIONS)(model, rows)
    model = stepped(rt, model, grads)
    value, found = ff.value(rt, loss_fn, **OPTIONS)(ff.eval_mode(model), *batch)
    return loss, aux, ff.gather_params(rt, model), dict(model.buffers), value, found["error"]


def raised(rt, fn, *args):
    try:
        fn(rt, *args)
    except Exception as error:  # which one it is, the tests compare
        return type(error).__name__, str(error)
    return None


class Odd(nn.Module):
    """Stages that do what they should not; the second one has a parameter that no loss depends on."""

    def __init__(self, spare=False):
        super().__init__()
        self.first, self.second, self.calls = nn.Linear(3, 3), nn.Linear(3, 3), 0
        if spare:
            self.second.spare = nn.Parameter(torch.zeros(2))

    def shrinking(self, x):
        self.calls += 1
        return self.first(x)[: len(x) if self.calls < 4 else 1]

    def picking(self, x):
        return self.first(x)[x.sum(1) > 0]

    def naming(self, x):
        return {"h": self.first(x)}
