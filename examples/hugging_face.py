"""A Hugging Face model, from its configuration: which chapter of Python's documentation is a passage from?

    pip install transformers
    python examples/hugging_face.py
    python examples/hugging_face.py --devices 2 --strategy fsdp

Any model of theirs is a torch module, and takes part as it is; in the end it is saved as they save, for
`from_pretrained`. To start from weights that you have, build it with `from_pretrained(folder)` in place of the config.
"""

import argparse
import re
import zlib
from pydoc_data.topics import topics

import torch
from torch.utils.data import DataLoader, TensorDataset
from transformers import AutoModelForSequenceClassification, BertConfig, PreTrainedModel

import fabricfn as ff

CHAPTERS = sorted(sorted(topics, key=lambda name: len(topics[name]))[-8:])  # the longest ones
LENGTH, VOCABULARY = 32, 2000
BATCH_SIZE = 32  # over all processes together


def load_data() -> tuple[TensorDataset, TensorDataset]:
    """(training set, held-out fifth): passages are (N, LENGTH) int64 word numbers, labels (N,) int64 chapters."""
    passages, labels = [], []
    for label, chapter in enumerate(CHAPTERS):
        words = [zlib.crc32(word.encode()) % VOCABULARY for word in re.findall(r"\w+", topics[chapter].lower())]
        found = torch.tensor(words).unfold(0, LENGTH, LENGTH)
        passages.append(found)
        labels.append(torch.full((len(found),), label))
    x, y = torch.cat(passages), torch.cat(labels)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    held_out, training = order[: len(order) // 5], order[len(order) // 5 :]
    return TensorDataset(x[training], y[training]), TensorDataset(x[held_out], y[held_out])


def make_net() -> PreTrainedModel:
    """A BERT as small as our question, with random weights."""
    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=LENGTH, num_labels=len(CHAPTERS), id2label=dict(enumerate(CHAPTERS)),
    )  # fmt: skip
    return AutoModelForSequenceClassification.from_config(config)


def loss_fn(net: PreTrainedModel, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return net(input_ids=x, labels=y).loss


def train(rt: ff.Runtime, num_epochs: int) -> ff.Model:
    training, _ = load_data()
    batches = DataLoader(training, batch_size=BATCH_SIZE // rt.world_size, shuffle=True, drop_last=True)
    loader = ff.setup_dataloader(rt, batches)
    torch.manual_seed(rt.seed)
    model = ff.setup_model(rt, make_net())
    opt = ff.setup_optimizer(rt, model, torch.optim.AdamW, lr=2e-3, groups={"*LayerNorm*": {"weight_decay": 0.0}})
    grad_fn = ff.value_and_grad(rt, loss_fn)
    for epoch in range(num_epochs):
        for x, y in ff.batches(rt, loader, epoch):
            loss, grads = grad_fn(model, x, y, rng=ff.fold_in(ff.key(rt.seed), opt.step))
            grads, _ = ff.clip_gradients(rt, grads, max_norm=1.0)
            model, opt = ff.optimizer_step(rt, model, opt, grads, donate=True)
        ff.print(rt, f"epoch {epoch}: loss {loss:.3f}")
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", default="auto")
    parser.add_argument("--strategy", default="auto")
    parser.add_argument("--precision", default="32-true")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--out", default="checkpoints/hugging_face", help="the folder for the trained model")
    args = parser.parse_args()

    with ff.runtime(devices=args.devices, strategy=args.strategy, precision=args.precision, seed=0) as rt:
        model = train(rt, args.epochs)
        net = ff.to_module(rt, ff.eval_mode(model))  # their own class again, whole on every rank
        ff.run_once(rt, lambda: net.save_pretrained(args.out))

        _, held_out = load_data()
        x, y = ff.to_device(rt, held_out.tensors)
        again = AutoModelForSequenceClassification.from_pretrained(args.out).to(rt.device)
        with torch.no_grad():
            right = (again(input_ids=x).logits.argmax(dim=1) == y).double().mean().item()
        most = y.bincount().max().item() / len(y)
        ff.print(rt, f"{right:.1%} of {len(y)} held-out passages right; always naming the longest chapter: {most:.1%}")
        assert right > most + 0.1


if __name__ == "__main__":
    main()
