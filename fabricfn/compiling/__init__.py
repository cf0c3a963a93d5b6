"""A user's whole step as one graph: forward, backward, reduction, clipping, optimizer."""

from fabricfn.compiling.step import compile_step as compile_step
