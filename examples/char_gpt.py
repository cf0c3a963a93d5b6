"""A small GPT learns to write Python's own documentation, character by character: the text ships with CPython.

    python examples/char_gpt.py                                # one process
    python examples/char_gpt.py --devices 2 --strategy fsdp    # two, each holds a part of the model

Kill it when you like: the same command goes on after the last checkpoint, on another number of processes as well.
"""

import argparse
from pydoc_data.topics import topics

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import fabricfn as ff

TEXT = "\n".join(topics.values())
LETTERS = sorted(set(TEXT))
CONTEXT, WIDTH, HEADS, LAYERS = 64, 64, 4, 2
BATCH_SIZE = 32  # over all processes together


def load_data() -> tuple[TensorDataset, torch.Tensor]:
    """(training windows, held-out windows): each is CONTEXT letters and the one after, (CONTEXT + 1,) int64."""
    number = {letter: index for index, letter in enumerate(LETTERS)}
    windows = torch.tensor([number[letter] for letter in TEXT]).unfold(0, CONTEXT + 1, CONTEXT)
    return TensorDataset(windows[:-256]), windows[-256:]


def letter_entropy() -> float:
    """The loss of the best guess that looks at no context, in nats."""
    shares = torch.tensor([TEXT.count(letter) for letter in LETTERS]) / len(TEXT)
    return -(shares * shares.log()).sum().item()


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x):
        q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in self.qkv(self.norm1(x)).chunk(3, dim=-1))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    """(N, T) letters -> (N, T, len(LETTERS)) logits of the next ones."""

    def __init__(self):
        super().__init__()
        self.letters, self.places = nn.Embedding(len(LETTERS), WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.head = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, len(LETTERS)))

    def forward(self, x):
        places = torch.arange(x.shape[1], device=x.device)
        return self.head(self.blocks(self.letters(x) + self.places(places)))


def loss_fn(net: nn.Module, windows: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(net(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())


def train(rt: ff.Runtime, num_steps: int, folder: str, save_every: int) -> ff.Model:
    """The model after `num_steps`, going on from the newest checkpoint in `folder`."""
    training, _ = load_data()
    batch_size = BATCH_SIZE // rt.world_size
    loader = ff.setup_dataloader(rt, DataLoader(training, batch_size=batch_size, shuffle=True, drop_last=True))

    torch.manual_seed(rt.seed)
    model = ff.setup_model(rt, GPT())
    opt = ff.setup_optimizer(rt, model, torch.optim.AdamW, lr=3e-3)
    grad_fn = ff.value_and_grad(rt, loss_fn)
    state = {"model": model, "opt": opt, "cursor": ff.Cursor(seed=rt.seed)}
    if path := ff.latest(folder):
        state = ff.load(rt, path, like=state)
        ff.print(rt, f"resumed from {path}")
    model, opt, cursor = state["model"], state["opt"], state["cursor"]

    while opt.step < num_steps:
        for (windows,), cursor in ff.batches(rt, loader, cursor, with_cursor=True):
            loss, grads = grad_fn(model, windows)
            grads, _ = ff.clip_gradients(rt, grads, max_norm=1.0)
            model, opt = ff.optimizer_step(rt, model, opt, grads, donate=True)
            if opt.step % save_every == 0 or opt.step == num_steps:
                ff.save(rt, f"{folder}/step-{opt.step:06d}", {"model": model, "opt": opt, "cursor": cursor})
                ff.prune_checkpoints(rt, folder, last=2)
                ff.print(rt, f"step {opt.step}: loss {loss:.3f}")
            if opt.step == num_steps:
                break
    return model


@torch.no_grad()
def write(net: nn.Module, start: str, length: int) -> str:
    """`start` and `length` letters more, drawn one by one from a plain module."""
    random = torch.Generator().manual_seed(0)
    text = [LETTERS.index(letter) for letter in start]
    for _ in range(length):
        logits = net(torch.tensor([text[-CONTEXT:]]))[0, -1]
        text.append(int(torch.multinomial((logits / 0.8).softmax(dim=0), 1, generator=random)))
    return "".join(LETTERS[index] for index in text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", default="auto")
    parser.add_argument("--strategy", default="auto", help="single, ddp, fsdp, ...")
    parser.add_argument("--precision", default="32-true")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--save-every", type=int, default=100, metavar="STEPS")
    parser.add_argument("--checkpoints", default="checkpoints/char_gpt", help="the folder of the checkpoints")
    args = parser.parse_args()

    with ff.runtime(devices=args.devices, strategy=args.strategy, precision=args.precision, seed=0) as rt:
        model = train(rt, args.steps, args.checkpoints, args.save_every)
        _, held_out = load_data()
        loss = ff.value(rt, loss_fn)(ff.eval_mode(model), ff.to_device(rt, held_out)).item()
        ff.print(rt, f"held-out loss: {loss:.3f} nats a letter; without looking at the context: {letter_entropy():.3f}")
        net = ff.to_module(rt, model).cpu()  # whole again on every rank, so anyone can use it
        ff.print(rt, write(net, "The ", 200))
        assert loss < letter_entropy() - 0.2


if __name__ == "__main__":
    main()
