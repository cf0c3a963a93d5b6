"""The plan of units: data, without ranks."""

import pytest
from torch import nn

import fabricfn as ff
from fabricfn.strategies.units import plan


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention, self.mlp = nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))

    def forward(self, x):
        return self.mlp(self.attention(x))


class Language(nn.Module):
    def __init__(self, tie):
        super().__init__()
        self.embed, self.head = nn.Embedding(9, 4), nn.Linear(4, 9, bias=False)
        self.blocks = nn.ModuleList([Block() for _ in range(3)])
        if tie:
            self.head.weight = self.embed.weight

    def forward(self, x):
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


BLOCKS = ("blocks.0", "blocks.1", "blocks.2")


def test_repeated_blocks_are_found_and_not_what_is_inside_them():
    assert plan(Language(tie=False), "auto") == BLOCKS
    assert plan(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2), nn.LayerNorm(2)), "auto") == ("0", "2")
    assert plan(nn.Linear(2, 2), "auto") == ()
    assert plan(nn.ModuleList([nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])] * 2), "auto") == ("0.0", "0.1")


def test_classes_predicates_and_none():
    net = Language(tie=False)
    assert plan(net, Block) == BLOCKS
    assert plan(net, (nn.Embedding, nn.Sequential)) == ("embed", "blocks.0.mlp", "blocks.1.mlp", "blocks.2.mlp")
    assert plan(net, lambda name, module: name.endswith("attention")) == tuple(f"{b}.attention" for b in BLOCKS)
    assert plan(net, None) == ()
    assert plan(net, Language) == ()  # the net itself is the root


def test_modules_without_parameters_are_no_units():
    assert plan(nn.Sequential(nn.ReLU(), nn.ReLU()), "auto") == ()


def test_tied_weights_stay_with_the_root():
    assert plan(Language(tie=True), (nn.Embedding, nn.Linear, Block))[:1] == ("blocks.0",)
    net = Language(tie=False)
    net.blocks[0].attention.weight = net.blocks[2].attention.weight
    assert plan(net, Block) == ("blocks.1",)
    inside = Block()
    inside.mlp[0].weight = nn.Parameter(inside.mlp[2].weight.detach().T.contiguous())
    inside.attention.weight = nn.Parameter(inside.attention.weight)
    assert plan(nn.ModuleList([inside, Block()]), "auto") == ("0", "1")


def test_a_module_that_stands_twice_is_one_unit():
    block = Block()
    assert plan(nn.Sequential(block, block), Block) == ("0",)


def test_what_cannot_be_a_unit_is_refused():
    with pytest.raises(ff.ConfigurationError, match="blocks is a ModuleList, which has no forward"):
        plan(Language(tie=False), nn.ModuleList)
    for wrong in ("blocks", 3, (Block, "x")):
        with pytest.raises(ff.ConfigurationError, match="chooses no modules"):
            plan(Language(tie=False), wrong)
