"""The ranks of a test file."""

import pytest

from fabricfn import testing


def world_of(kind, size):
    """A fixture: ranks that are "threads" or "processes", open while the tests of one file run."""

    @pytest.fixture(scope="module")
    def ranks():
        with testing.world(kind, size) as ranks:
            yield ranks

    return ranks
