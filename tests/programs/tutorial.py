"""docs/tutorial.md as it stands: its program, and its commands in a shell; `nox -s docs` calls this.

Only the commands of its first section are left out, which install fabricfn.
"""

import csv
import re
import subprocess
import tempfile
from pathlib import Path

PAGE = (Path(__file__).parents[2] / "docs/tutorial.md").read_text()


def blocks(language: str) -> list[str]:
    """The code of the page in this language."""
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL)


with tempfile.TemporaryDirectory() as name:
    folder = Path(name)
    (program,) = blocks("python")
    (folder / "train.py").write_text(program)
    install, *commands = blocks("shell")
    assert "pip install" in install
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", "".join(commands)], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(re.findall(r"^epoch \d: [\d.]+% of the held-out", done.stdout, re.MULTILINE)) == 8
    assert re.search(r"^going on from .*/step-000088$", done.stdout, re.MULTILINE)
    with open(folder / "logs/digits/version_0/metrics.csv") as rows:
        steps = [int(row["step"]) for row in csv.DictReader(rows) if row["train/loss"]]
    assert steps == list(range(1, 177)), "one curve that knows no stop"
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
print("docs/tutorial.md: all of it ran")
