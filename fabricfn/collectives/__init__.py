"""Collectives on trees: all ranks (or those of `axis`) call the same function with trees that are alike.

[Note: collectives] For all of them: results are new trees whose tensors have memory of their own and are contiguous,
also in a world of one rank; inputs are untouched; structure is kept, and so are aliases (a tensor that stands twice in
the tree, on all ranks, is one tensor in the result). Whatever differs between ranks (kind of call, op, structure,
shapes, dtypes) is a `MismatchError` on every rank that names the ranks and leaves, before anything travels. Small
tensors travel together. Results are detached from the graph unless `differentiable=True`.

`axis` is None for all ranks or a tuple of ranks, which then all must call it, with the same tuple: ranks of another
tuple are in another group, and wait for each other until the group's timeout. Order does not matter in it, results are
by ascending rank. A rank that calls no collective at all, or one of torch's own, cannot be seen either.
"""

from fabricfn.collectives.objects import all_gather_object as all_gather_object, barrier as barrier
from fabricfn.collectives.point_to_point import recv as recv, send as send
from fabricfn.collectives.roots import broadcast as broadcast, gather as gather, scatter as scatter
from fabricfn.collectives.trees import (
    all_gather as all_gather,
    all_reduce as all_reduce,
    all_to_all as all_to_all,
    reduce_scatter as reduce_scatter,
)
