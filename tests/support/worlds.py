"""What most tests over ranks share: the ranks of a file, and how many examples hypothesis draws."""

import pytest
from hypothesis import settings

from fabricfn import testing


def world_of(kind, size):
    """A fixture: ranks that are "threads" or "processes", open while the tests of one file run."""

    @pytest.fixture(scope="module")
    def ranks():
        with testing.world(kind, size) as ranks:
            yield ranks

    return ranks


def few(examples):
    """The same examples in every run: each may be a whole training on several ranks."""
    return settings(max_examples=examples, derandomize=True, database=None)
