"""Lists of tensors through a process group: small ones travel together in flat buffers, large ones alone.

No signature is checked here: every rank must come with the same shapes and dtypes in the same order (`collectives`
makes sure of that). Every result is a new, contiguous, detached tensor with memory of its own; inputs are untouched.
`group=None` is a world of one rank.
"""

from fabricfn.flat.moving import (
    all_gather as all_gather,
    all_gather_rows as all_gather_rows,
    all_to_all as all_to_all,
    broadcast as broadcast,
    gather as gather,
    recv as recv,
    scatter as scatter,
    send as send,
    share as share,
    spread as spread,
)
from fabricfn.flat.pairwise import (
    Stack as Stack,
    add_lists as add_lists,
    blocks_of as blocks_of,
    fold as fold,
    push as push,
    sum_in_tree as sum_in_tree,
)
from fabricfn.flat.reducing import (
    all_reduce as all_reduce,
    all_reduce_mean as all_reduce_mean,
    anywhere as anywhere,
    reduce_scatter as reduce_scatter,
)
from fabricfn.flat.riding import ROOM as ROOM, combined as combined, loaded as loaded, unloaded as unloaded
from fabricfn.flat.wire import HALVES as HALVES, Group as Group
