"""What the tests of commands share: a call of `fabricfn`, and checkpoints of one training."""

from pathlib import Path

import pytest

import fabricfn as ff
from fabricfn import cli
from fabricfn.testing import threads
from tests.support.checkpoints import trained
from tests.support.runtimes import RT64

GOLDEN = Path(__file__).parents[1] / "golden"


def save_trained(rt, path):
    model, opt = trained(rt)
    ff.save(rt, path, {"model": model, "opt": opt, "epoch": 3, "note": "first"})


def checkpoints():
    """A fixture: one training by two ranks under fsdp and by one; its model for the hub, as one file, as PyTorch's."""

    @pytest.fixture(scope="module")
    def made(tmp_path_factory):
        folder = tmp_path_factory.mktemp("made")
        with threads(2) as world:
            world.run(save_trained, folder / "two", strategy="fsdp", precision="64-true")
        save_trained(RT64, folder / "one")
        for name in ("hub", "one.safetensors", "one.pt"):
            ff.consolidate(folder / "one", folder / name)
        return folder

    return made


def command(capsys, *words):
    """(status, stdout, stderr) of `fabricfn words` in this process."""
    with pytest.raises(SystemExit) as ended:
        cli.main([str(word) for word in words])
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    return ended.value.code, out, err
