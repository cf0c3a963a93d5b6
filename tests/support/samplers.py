"""What the tests of samplers share: samplers and batch samplers as users write them."""

import random

import numpy as np
import torch
from torch.utils.data import RandomSampler, Sampler, SubsetRandomSampler, WeightedRandomSampler


class Backwards(Sampler):
    """A user's own class, with a required argument and no randomness."""

    def __init__(self, num, *, step):
        self.num, self.step = num, step

    def __iter__(self):
        return iter(range(self.num - 1, -1, -self.step))

    def __len__(self):
        return len(range(self.num - 1, -1, -self.step))


class ByEpoch(Backwards):
    """The usual recipe: the epoch comes from `set_epoch`."""

    epoch = 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        order = list(super().__iter__())
        random.Random(self.epoch).shuffle(order)
        return iter(order)


class Drawing(Backwards):
    """Draws from generators of its own, which go on from pass to pass."""

    def __init__(self, num, seed):
        super().__init__(num, step=1)
        self.torch, self.numpy, self.python = torch.Generator(), np.random.default_rng(seed), random.Random(seed)
        self.old = np.random.RandomState(seed)
        self.torch.manual_seed(seed)

    def __iter__(self):
        order = torch.randperm(self.num, generator=self.torch).numpy()
        self.numpy.shuffle(order)
        self.old.shuffle(order)
        order = order.tolist()
        self.python.shuffle(order)
        return iter(order)


class Global(Backwards):
    """Draws from the three global generators."""

    def __iter__(self):
        order = torch.randperm(self.num).numpy()
        np.random.shuffle(order)
        order = order.tolist()
        random.shuffle(order)
        return iter(order)


class Buckets(Sampler):
    """Batches of samples of like length, of different sizes; required arguments that no attribute is named after."""

    def __init__(self, lengths, max_tokens, shuffle=True):
        self._lengths, self._limit, self._shuffle = lengths, max_tokens, shuffle

    def __iter__(self):
        found, batch = [], []
        for place in sorted(range(len(self._lengths)), key=self._lengths.__getitem__):
            if (len(batch) + 1) * self._lengths[place] > self._limit and batch:
                found.append(batch)
                batch = []
            batch.append(place)
        found.append(batch)
        if self._shuffle:
            random.shuffle(found)
        return iter(found)


SAMPLERS = {
    "weighted": lambda: WeightedRandomSampler([1.0, 5.0, 2.0, 1.0] * 5, 23),
    "subset": lambda: SubsetRandomSampler([2, 3, 5, 7, 11, 13, 17, 19]),
    "replacement": lambda: RandomSampler(range(20), replacement=True, num_samples=31),
    "part": lambda: RandomSampler(range(20), num_samples=7),
    "own": lambda: Backwards(20, step=3),
    "by epoch": lambda: ByEpoch(20, step=1),
    "drawing": lambda: Drawing(20, 1),
    "global": lambda: Global(20, step=1),
    "list": lambda: [5, 1, 1, 17],
}


LENGTHS = [3, 9, 4, 1, 1, 8, 2, 7, 7, 3, 6, 5, 2, 2, 9, 4, 1, 3, 8, 6]


def buckets():
    return Buckets(LENGTHS, 12)
