"""What several test files share: runtimes of one rank on which every strategy drives its real engine."""

import signal

import pytest
import torch
import torch.distributed as dist
from hypothesis import settings

import fabricfn as ff

# Whoever starts the tests in the background of a script lets SIGINT be ignored, which Python and its children inherit.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Assertions of helpers tell the values, as those of tests do.
pytest.register_assert_rewrite("tests.support")

# No example is timed: an idle machine and a busy one find the same.
settings.register_profile("tests", deadline=None)
settings.load_profile("tests")

torch.set_num_threads(1)  # tests fork, and a child of a process that has OpenMP's threads waits for them for ever


@pytest.fixture(scope="module")
def group(tmp_path_factory):
    """A real gloo group of one rank. Without a group ddp would have nothing to reduce, and no reducer."""
    store = dist.FileStore(str(tmp_path_factory.mktemp("group") / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.fixture
def one_rank(group):
    """`one_rank(strategy, precision) -> Runtime`."""

    def make(name="single", precision="64-true"):
        # several losses here use weights directly; units are the matter of test_fsdp.py
        cut = name in ("fsdp", "flat_sharded")
        strategy = getattr(ff.strategies, name)(units=None) if cut else ff.strategies.NAMES[name]()
        world = ff.World(group=None if strategy.max_ranks == 1 else group)
        return ff.Runtime(world=world, precision=ff.Precision.parse(precision), strategy=strategy)

    return make


@pytest.fixture(params=ff.strategies.NAMES)
def rt(request, one_rank):
    """Such a runtime of each strategy."""
    return one_rank(request.param)
