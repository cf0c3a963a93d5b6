"""What holds the repository together: one version, and changelog fragments that the tool will not pass over."""

import tomllib
from pathlib import Path

import pytest

import fabricfn as ff
from fabricfn import cli

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_the_version_stands_in_one_place(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"fabricfn {ff.__version__}\n"

    assert "version" in PROJECT["project"]["dynamic"]
    source = ROOT / PROJECT["tool"]["hatch"]["version"]["path"]
    assert source == Path(ff.__file__)
    others = [ROOT / name for name in ("pyproject.toml", "README.md", "docs/conf.py", "noxfile.py")]
    assert [path.name for path in others if f'"{ff.__version__}"' in path.read_text()] == []


def test_each_fragment_has_a_kind_and_is_one_entry():
    kinds = {kind["directory"] for kind in PROJECT["tool"]["towncrier"]["type"]}
    for fragment in (ROOT / PROJECT["tool"]["towncrier"]["directory"]).iterdir():
        _, kind, suffix = fragment.name.rsplit(".", 2)
        assert kind in kinds and suffix == "md", fragment.name
        text = fragment.read_text()
        assert text.strip() and not text.startswith("- ") and "\n\n" not in text, "towncrier adds the dash"
