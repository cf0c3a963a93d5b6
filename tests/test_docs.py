"""The guide runs as it stands, and no page links to nowhere."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def test_the_snippets_of_the_guide_are_one_script_that_runs(tmp_path: Path):
    snippets = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs/loop.md").read_text(), flags=re.MULTILINE | re.DOTALL)
    script = tmp_path / "guide.py"
    script.write_text("\n".join(snippets))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "error", script]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, check=False, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "epoch 2: loss" in done.stdout


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_inside_the_repository_lead_somewhere(page: Path):
    links = re.findall(r"\]\(([^)#]+)\)", page.read_text())
    assert [link for link in links if "://" not in link and not (page.parent / link).exists()] == []
