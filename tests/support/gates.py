"""What the tests of saves beside the training share: a gate that holds one up, and a look at what is left."""

import threading

import pytest

from fabricfn import errands


def ends():
    """A fixture of every test: no save goes on after it, and no error of one is left."""

    @pytest.fixture(autouse=True)
    def nothing_is_left():
        yield
        assert errands.finish_all() == []

    return nothing_is_left


class Gate:
    """Holds a save up: a `progress` that lets rank 0's writing pass its first bytes when the gate is open."""

    def __init__(self):
        self.reached, self.open = threading.Event(), threading.Event()

    def __call__(self, done, total):
        self.reached.set()
        assert self.open.wait(60)


def gates():
    """A fixture: a gate that is open at the end."""

    @pytest.fixture
    def gate():
        held = Gate()
        yield held
        held.open.set()

    return gate
