"""An installed fabricfn is whole: `nox -s build` calls this in an environment that has nothing else, outside of the
repository. It compares the files with those of the repository that this program lies in, and trains a little.
"""

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import torch
from torch import nn

import fabricfn as ff

HERE = Path(__file__).parents[2] / "fabricfn"
THERE = Path(ff.__file__).parent


def files(package: Path) -> set[str]:
    """What a package is made of."""
    return {str(path.relative_to(package)) for path in package.rglob("*") if path.suffix in (".py", ".typed")}


assert HERE != THERE, "this is the repository, not what was installed"
assert files(THERE) == files(HERE), files(THERE) ^ files(HERE)
assert "py.typed" in files(THERE)
assert version("fabricfn") == ff.__version__
said = subprocess.run(
    [sys.executable, "-m", "fabricfn", "--version"], check=True, capture_output=True, text=True
).stdout
assert said == f"fabricfn {ff.__version__}\n"
for name in ff.__all__:
    getattr(ff, name)

with ff.runtime(devices=1, accelerator="cpu") as rt:
    x = torch.linspace(-1, 1, 32).unsqueeze(1)
    model = ff.setup_model(rt, nn.Linear(1, 1))
    opt = ff.setup_optimizer(rt, model, torch.optim.SGD, lr=0.5)
    grad_fn = ff.value_and_grad(rt, lambda net: (net(x) - 3 * x).square().mean())
    losses = []
    for _ in range(20):
        loss, grads = grad_fn(model)
        model, opt = ff.optimizer_step(rt, model, opt, grads, donate=True)
        losses.append(float(loss))
    ff.save(rt, "trained", {"model": model, "opt": opt})
    assert ff.load(rt, "trained", like={"model": model, "opt": opt})["opt"].step == 20
assert losses[-1] < 0.01 * losses[0], losses
print(f"fabricfn {ff.__version__} from {THERE}: {len(files(THERE))} files, loss {losses[0]:.3f} -> {losses[-1]:.5f}")
