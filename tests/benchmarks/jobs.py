"""What the benchmarks train."""

import dataclasses
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

Loss = Callable[[nn.Module, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A net and one batch; the same values on every call, the batch another one on each rank."""

    net: nn.Module
    unit: type[nn.Module]
    """What a sharded run gathers at a time."""
    loss_fn: Loss
    batch: tuple[torch.Tensor, torch.Tensor]

    @property
    def device(self) -> str:
        """The type of the device that it is on."""
        return self.batch[0].device.type


class Block(nn.Module):
    """A unit that is little arithmetic and much bookkeeping."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(256, 256)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.gelu(self.linear(x))


class Layer(nn.TransformerEncoderLayer):
    """A layer of a GPT: it looks back only."""

    def __init__(self, width: int) -> None:
        super().__init__(width, width // 64, 4 * width, 0.0, F.gelu, batch_first=True, norm_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], device=x.device)
        return super().forward(x, src_mask=mask, is_causal=True)


class GPT(nn.Module):
    """`length` tokens at a time."""

    def __init__(self, layers: int, width: int, vocabulary: int, length: int) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.layers = nn.ModuleList(Layer(width) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.tokens(tokens) + self.places.weight[: tokens.shape[1]]
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


# layers, width, vocabulary, tokens in a row; rows of a batch
GPTS = {
    "GPT": (6, 384, 256, 64, 4),  # bytes: 10.8 million parameters
    "GPT-2 124M": (12, 768, 50304, 1024, 16),
    "GPT-2 350M": (24, 1024, 50304, 1024, 8),
    "GPT-2 tiny": (2, 64, 128, 32, 2),
}


def squares(net: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return F.mse_loss(net(x), y)


def next_token(net: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(net(x).flatten(0, 1), y.flatten())


def blocks(count: int, kind: Callable[[], nn.Module]) -> nn.Module:
    """Repeated blocks, and a head that stays with the root."""
    return nn.Sequential(nn.Sequential(*(kind() for _ in range(count))), nn.Linear(256, 256))


def encoder_layer() -> nn.Module:
    return nn.TransformerEncoderLayer(256, 4, 1024, dropout=0.0, batch_first=True)


def small(kind: str) -> bool:
    """Whether it is layers of `Linear(32, 32)`."""
    return kind.removesuffix(" layers").isdigit()


def job(kind: str, rank: int = 0, device: torch.device | str = "cpu") -> Job:
    """ "N layers" of `Linear(32, 32)`, "8 blocks", "4 encoder layers", or one of `GPTS`."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1 + rank)
    if kind in GPTS:
        *sizes, rows = GPTS[kind]
        net = GPT(*sizes)
        if kind != "GPT":  # GPT-2 embeds tokens by the weights of its head
            net.tokens.weight = net.head.weight
        tokens = torch.randint(net.head.out_features, (rows, sizes[-1] + 1), generator=generator).to(device)
        return Job(net=net.to(device), unit=Layer, loss_fn=next_token, batch=(tokens[:, :-1], tokens[:, 1:]))
    if kind == "8 blocks":
        net, unit, shape = blocks(8, Block), Block, (16, 256)
    elif kind == "4 encoder layers":
        net, unit, shape = blocks(4, encoder_layer), nn.TransformerEncoderLayer, (8, 64, 256)
    else:
        count = int(kind.removesuffix(" layers"))
        net, unit, shape = nn.Sequential(*(nn.Linear(32, 32) for _ in range(count))), nn.Linear, (8, 32)
    x, y = (torch.randn(shape, generator=generator).to(device) for _ in range(2))
    return Job(net=net.to(device), unit=unit, loss_fn=squares, batch=(x, y))
