"""What the tests of model_parallel share: nets, plans, strategies, and a run of them in float64."""

import torch
from torch import nn
from torch.nn import functional as F

import fabricfn as ff
from fabricfn import testing
from fabricfn.sharding import is_sharded
from fabricfn.testing import cases

VOCAB, WIDTH, TIME = 12, 8, 4


class Block(nn.Module):
    def __init__(self, heads, dropout):
        super().__init__()
        self.heads = heads
        if heads:
            self.norm1 = nn.LayerNorm(WIDTH)
            self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.norm2 = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH, bias=False)
        self.drop = nn.Dropout(dropout)

    def attend(self, x):
        batch, time, width = x.shape
        q, k, v = (
            part(x).view(batch, time, self.heads, width // self.heads).transpose(1, 2)
            for part in (self.q, self.k, self.v)
        )
        weights = self.drop((q @ k.transpose(-2, -1) / width**0.5).softmax(-1))
        return self.o((weights @ v).transpose(1, 2).reshape(batch, time, width))

    def forward(self, x):
        if self.heads:
            x = x + self.drop(self.attend(self.norm1(x)))
        return x + self.drop(self.down(self.drop(F.gelu(self.up(self.norm2(x))))))


class Net(nn.Module):
    """A small language model: the user's code knows nothing of parts."""

    def __init__(self, heads=2, dropout=0.0, tied=True):
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.blocks = nn.ModuleList([Block(heads, dropout), Block(0, dropout)])
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)
        self.scale = nn.Parameter(torch.tensor(1.5))
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, tokens):
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x * self.scale))


PLAN = {
    "embed": "rowwise",
    "*.norm1": "sequence",
    "*.[qkv]": "colwise",
    "*.o": "rowwise",
    "*.up": "colwise",
    "*.down": "rowwise",
    "head": "colwise",
}
SEQUENCE = PLAN | {  # what lies between the blocks is cut along time
    "embed": "rowwise_scattered",
    "*norm*": "sequence",
    "*.o": "rowwise_scattered",
    "*.down": "rowwise_scattered",
}
del SEQUENCE["*.norm1"]


def made(**options):
    return cases.initialised(Net(**options), 3)


NETS = {tied: made(tied=tied) for tied in (True, False)}  # not in the ranks: threads share the generator
GENERATOR = torch.Generator().manual_seed(5)
TOKENS = torch.randint(VOCAB, (12, TIME + 1), generator=GENERATOR)


def cross_entropy(net, tokens):
    return F.cross_entropy(net(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


def loop(net=None, **options):
    return testing.training_loop(net or NETS[True], cross_entropy, TOKENS, **{"lr": 0.1, "momentum": 0.9, **options})


def parallel(size=2, plan=PLAN, **options):
    return ff.strategies.model_parallel(plan, tensor_parallel=size, **options)


ROWS = {
    "tensor parallel": parallel(),
    "2-D with fsdp": parallel(fsdp=True),
    "2-D, one unit": parallel(fsdp={"units": None, "reshard_after_forward": False}),
    "2-D, options": parallel(
        fsdp={"cpu_offload": True, "prefetch": 1, "ignored_params": ("embed.weight", "*.down.*", "*.up.bias")}
    ),
}


def double(ranks, fn, strategy, *args, world_size=4):
    return ranks.run(fn, *args, strategy=strategy, world_size=world_size, precision="64-true")


def close(found, expected, tolerance=1e-11):
    assert (text := testing.difference(found, expected, tolerance)) is None, text


def gradients(rt, net, allow_unused=False):
    model = ff.setup_model(rt, net)
    loss, grads = ff.value_and_grad(rt, cross_entropy, allow_unused=allow_unused)(model, mine(rt))
    clipped, norm = ff.clip_gradients(rt, grads, max_norm=0.01)
    whole = {name: None if grad is None else ff_full(grad) for name, grad in clipped.params.items()}
    return {"loss": ff.all_reduce(rt, loss), "norm": norm, "grads": whole}


def ff_full(tensor):
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def mine(rt):
    return TOKENS.chunk(rt.world_size)[rt.rank]


class Mlp(nn.Module):
    def __init__(self, width, hidden, bias):
        super().__init__()
        self.up, self.down = nn.Linear(3, hidden, bias=bias), nn.Linear(hidden, width, bias=bias)

    def forward(self, x):
        return self.down(torch.tanh(self.up(x)))
