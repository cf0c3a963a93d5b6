"""What the tests of laws share: a problem, and the loop that trains on it."""

import torch

from fabricfn import testing
from fabricfn.testing import cases


def problem(kind, width=5, depth=2, rows=23):
    module, x_shape, y_shape = cases.build(kind, width, depth)
    x, y = (cases.filled((rows, *shape), torch.float64, seed) for seed, shape in enumerate((x_shape, y_shape)))
    return cases.initialised(module, 7), cases.mean_square, (x, y)


def loop(kind="mlp", **options):
    return testing.training_loop(*problem(kind), **{"lr": 0.1, "momentum": 0.9, **options})
