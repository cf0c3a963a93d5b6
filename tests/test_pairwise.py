"""The tree of sums: every way of dealing out its leaves gives the same one, and few sums are held."""

import itertools

from fabricfn import flat


def written(counts):
    """The sum as text."""

    def add(left, right):
        return f"({left}+{right})"

    whole, first = [], 0
    for count in counts:
        held = []
        for leaf in range(first, first + count):
            flat.push(held, (leaf, 1), str(leaf), add)
        assert [block for block, _ in held] == flat.pairwise.blocks_of(first, count)
        for block, text in held:
            flat.push(whole, block, text, add)
        first += count
    return flat.fold(whole, add)


def test_every_way_of_dealing_out_the_leaves_gives_the_same_tree():
    assert written([7]) == "(((0+1)+(2+3))+((4+5)+6))"
    for n in range(1, 13):
        for ends in itertools.product((False, True), repeat=n - 1):
            counts = [1]
            for end in ends:
                counts = [*counts, 1] if end else [*counts[:-1], counts[-1] + 1]
            assert written(counts) == written([n]), counts


def test_the_number_of_sums_held_is_logarithmic():
    for first, count in itertools.product(range(0, 70, 7), range(1, 300)):
        held, most = [], 0
        for leaf in range(first, first + count):
            flat.push(held, (leaf, 1), None, lambda left, right: None)
            most = max(most, len(held))
        assert most <= (1 if first == 0 else 2) * count.bit_length() + (first > 0)
        if first % count == 0 and count & (count - 1) == 0:
            assert len(held) == 1, "a block by itself: one sum travels"
