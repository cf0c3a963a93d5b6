"""What the tests of iterable datasets share: a stream without a length, and the law of its shares."""

from torch.utils.data import IterableDataset


class Stream(IterableDataset):
    """0 .. num - 1, without a length; `read` counts what this process took."""

    def __init__(self, num):
        self.num = num
        self.read = 0

    def __iter__(self):
        for place in range(self.num):
            self.read += 1
            yield place


def model(num, deal, start=0):
    """The law, written down: rank -> its batches."""
    found = [[] for _ in range(deal.world_size)]
    for begin in range(start, num, deal.step_size):
        step = range(num)[begin : begin + deal.step_size]
        if len(step) < deal.step_size and deal.tail == "drop":
            break
        for rank in range(deal.world_size):
            rows = list(step[rank :: deal.world_size])
            if len(step) < deal.world_size:
                found[rank][-1].extend(rows)
            else:
                found[rank].append(rows)
    return found
