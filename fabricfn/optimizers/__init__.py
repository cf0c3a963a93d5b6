"""Optimizers: any `torch.optim` class or (init, update) pair as a function of values; schedules of the step."""

from fabricfn.optimizers.making import setup_optimizer as setup_optimizer
from fabricfn.optimizers.schedules import (
    Plateau as Plateau,
    reduce_on_plateau as reduce_on_plateau,
    schedule_from_torch as schedule_from_torch,
)
from fabricfn.optimizers.stepping import optimizer_step as optimizer_step
from fabricfn.states import Optimizer as Optimizer
