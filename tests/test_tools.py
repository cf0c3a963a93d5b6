"""The tools of a loop together: their states are saved, and the guide runs."""

import dataclasses
import re
from pathlib import Path

import torch
from torch import nn

import fabricfn as ff
from tests.support.tools import NET
from tests.support.worlds import world_of

two = world_of("threads", 2)

GUIDE = Path(__file__).parents[1] / "docs/tools.md"


def test_their_states_are_saved_and_loaded(two, tmp_path):
    def follow(rt):
        stopper, guard = ff.EarlyStopping(), ff.SpikeGuard()
        model = ff.setup_model(rt, NET[0])
        for value in (0.3, 0.1, 0.2, 9.0):
            stopper = ff.early_stopping(rt, stopper, value)
            guard, _ = ff.spike_guard(rt, guard, value, model)
        ff.save(rt, tmp_path / "state", {"stopper": stopper, "guard": guard})
        like = {"stopper": ff.EarlyStopping(), "guard": ff.SpikeGuard(good="mine")}
        return stopper, guard, ff.load(rt, tmp_path / "state", like=like)

    for stopper, guard, loaded in two.run(follow, strategy="fsdp", precision=64):
        assert loaded == {"stopper": stopper, "guard": dataclasses.replace(guard, good="mine")}
        assert guard.values == (0.3, 0.1, 0.2) and guard.spike and guard.good is not None


def test_the_snippet_of_the_guide_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (snippet,) = re.findall(r"^```python\n(.*?)^```", GUIDE.read_text(), flags=re.MULTILINE | re.DOTALL)
    rt = ff.init_runtime(devices=1, accelerator="cpu", loggers=ff.loggers.jsonl("logs"))
    x = torch.linspace(-1, 1, 64)[:, None]
    data = torch.utils.data.TensorDataset(x, 3 * x + 1)
    loader = ff.setup_dataloader(rt, torch.utils.data.DataLoader(data, batch_size=16, shuffle=True))
    model = ff.setup_model(rt, nn.Linear(1, 1))
    mse = ff.value(rt, lambda net, x, y: nn.functional.mse_loss(net(x), y))
    names = {
        "ff": ff, "torch": torch, "rt": rt, "model": model, "loader": loader, "first_batch": (x[:16], x[:16]),
        "opt": ff.setup_optimizer(rt, model, torch.optim.SGD, lr=0.1), "schedule": lambda step: {"lr": 0.2},
        "grad_fn": ff.value_and_grad(rt, lambda net, x, y: nn.functional.mse_loss(net(x), y)),
        "validate": lambda model: mse(model, x, 3 * x + 1).item(),
    }  # fmt: skip
    exec(compile(snippet, str(GUIDE), "exec"), names)
    ff.shutdown(rt)
    assert names["stopper"].stop and 2 < names["epoch"] < 49
    kept = ff.list_checkpoints(tmp_path / "checkpoints")
    assert 2 <= len(kept) <= 3
    rows = (tmp_path / "logs/version_0/metrics.jsonl").read_text()
    assert '"lr"' in rows and "samples_per_sec" in rows and "device/flops_per_sec" in rows
