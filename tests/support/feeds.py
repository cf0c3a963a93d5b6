"""What the tests of data share: ranks that need no processes, a data set that counts, and batches as lists."""

import pytest
import torch
from hypothesis import assume, strategies as st
from torch.utils.data import Dataset

from fabricfn.order import Deal
from fabricfn.precision import Precision
from fabricfn.runtimes import Runtime
from fabricfn.strategies.single import single
from fabricfn.world import World

uneven = pytest.mark.filterwarnings("ignore::fabricfn.errors.UnevenBatchesWarning")
# Two workers on a machine with one core; fork in a process with threads (Python 3.12).
workers = pytest.mark.filterwarnings("ignore:This DataLoader will create", "ignore:This process .* is multi-threaded")


def ranks_of(world_size: int, seed: int = 0) -> list[Runtime]:
    """One runtime per rank: sharing out data needs no communication, so no processes either."""
    return [
        Runtime(world=World(rank=rank, world_size=world_size), precision=Precision(), strategy=single(), seed=seed)
        for rank in range(world_size)
    ]


ONE = ranks_of(1)[0]


@st.composite
def deals(draw, tails=("spread", "drop")):
    deal = Deal(
        num_samples=draw(st.integers(1, 120)),
        world_size=draw(st.integers(1, 6)),
        batch_size=draw(st.integers(1, 9)),
        tail=draw(st.sampled_from(tails)),
    )
    assume(deal.tail == "drop" or deal.num_samples >= deal.world_size)
    return deal


seeds, epochs = st.integers(0, 2**64), st.integers(0, 1000)


class Numbers(Dataset):
    """0 .. num - 1, and which of them were read in this process."""

    def __init__(self, num):
        self.num = num
        self.read = []

    def __len__(self):
        return self.num

    def __getitem__(self, place):
        self.read.append(place)
        return torch.tensor(place)


def lists(found):
    return [batch.tolist() for batch in found]
