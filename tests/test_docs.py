"""The guide and the pages of snippets run as they stand, and no page links to nowhere."""

import csv
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"  # its folders _build and api are made by Sphinx
PAGES = [*sorted(ROOT.glob("*.md")), *sorted(DOCS.glob("*.md")), *sorted(DOCS.glob("decisions/*.md"))]


def code_of(page: str) -> str:
    """All Python code of docs/`page`.md, one script."""
    return "\n".join(re.findall(r"^```python\n(.*?)^```", (DOCS / f"{page}.md").read_text(), re.MULTILINE | re.DOTALL))


def run_here(page: str, name: str = "__main__") -> dict[str, Any]:
    """Run the code of a page in this process; its names."""
    names: dict[str, Any] = {"__name__": name}
    exec(compile(code_of(page), f"{page}.md", "exec"), names)
    return names


@pytest.mark.parametrize("page", ["ideas", "big-models", "coming-from-accelerate"])
def test_the_code_of_a_page_is_one_script_that_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    run_here(page)


@pytest.mark.parametrize(("page", "count"), [("testing", 5), ("writing-a-strategy", 1)])
def test_the_code_of_a_page_is_a_test_file_that_passes(page: str, count: int):
    tests = [thing for name, thing in run_here(page, page).items() if name.startswith("test_")]
    assert len(tests) == count
    for test in tests:
        test()


def test_the_program_of_the_tutorial_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    """In one process; `nox -s docs` runs it on two, with the page's own commands (tests/programs/tutorial.py)."""
    monkeypatch.chdir(tmp_path)
    for num_epochs in (1, 2):
        monkeypatch.setattr(sys, "argv", ["train.py", str(num_epochs)])
        run_here("tutorial")
    said = capsys.readouterr().out
    assert re.findall(r"^(?:epoch|going on)", said, re.MULTILINE) == ["epoch", "going on", "epoch"]
    with open(tmp_path / "logs/digits/version_0/metrics.csv") as rows:
        steps = [int(row["step"]) for row in csv.DictReader(rows) if row["train/loss"]]
    assert steps == list(range(1, 89)), "two epochs of 44 steps, none twice"


def test_the_snippets_of_the_guide_are_one_script_that_runs(tmp_path: Path):
    script = tmp_path / "guide.py"
    script.write_text(code_of("loop"))
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
