"""The public names: each resolves, is documented, and stands in the reference and the changelog; importing is free."""

import ast
import dataclasses
import doctest
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import fabricfn as ff

ROOT = Path(__file__).parents[1]
FUNCTIONS_AND_RECORDS = list(ff._HOMES)


def static_imports() -> set[tuple[str, str]]:
    """The (module, name) pairs under TYPE_CHECKING in fabricfn/__init__.py: what type checkers and editors see."""
    tree = ast.parse((ROOT / "fabricfn/__init__.py").read_text())
    (guarded,) = (node for node in tree.body if isinstance(node, ast.If))
    return {
        (statement.module, alias.name)
        for statement in guarded.body
        if isinstance(statement, ast.ImportFrom)
        for alias in statement.names
    }


def test_what_type_checkers_see_is_what_resolves():
    lazy = {(f"fabricfn.{home}", name) for name, home in ff._HOMES.items()}
    assert static_imports() == lazy | {("fabricfn", name) for name in ff._MODULES}
    assert set(dir(ff)) == set(ff.__all__)


@pytest.mark.parametrize("name", FUNCTIONS_AND_RECORDS)
def test_every_name_resolves_to_what_its_own_room_defines(name: str):
    thing = getattr(ff, name)
    assert thing.__module__.startswith(f"fabricfn.{ff._HOMES[name]}"), "re-exported from another room"


@pytest.mark.parametrize("name", FUNCTIONS_AND_RECORDS)
def test_every_name_has_a_docstring_that_starts_with_a_sentence(name: str):
    thing = getattr(ff, name)
    doc = inspect.getdoc(thing) or ""
    assert re.match(r"\S.*[.:]($|\n)", doc), "the first line is a sentence"
    if dataclasses.is_dataclass(thing):
        assert not doc.startswith(f"{name}("), "that is the signature, not a docstring"


@pytest.mark.parametrize("name", [name for name in FUNCTIONS_AND_RECORDS if inspect.isfunction(getattr(ff, name))])
def test_every_function_says_what_it_takes_what_it_returns_who_calls_it_and_shows_it(name: str):
    """`Raises` is left out: which errors are a function's own cannot be seen from outside."""
    thing = getattr(ff, name)
    doc, signature = inspect.getdoc(thing) or "", inspect.signature(thing)
    sections = dict(re.findall(r"^(Args|Returns|Example):\n((?:    .*\n?|\n)+)", doc, flags=re.MULTILINE))
    entries = re.findall(r"^ {4}(\S[^:]*):", sections.get("Args", ""), flags=re.MULTILINE)
    described = {one.strip(" *") for entry in entries for one in entry.split(",")}
    assert set(signature.parameters) - {"rt"} <= described
    assert described <= set(signature.parameters), "Args describes what the function does not take"
    assert signature.return_annotation is None or sections.get("Returns", "").strip()
    assert doctest.DocTestParser().get_examples(sections.get("Example", "")), "an Example is a doctest"
    assert re.search(r"\b(collective|(every|any|all) ranks?)\b", doc, flags=re.IGNORECASE), "who must call it"


def test_the_reference_lists_exactly_the_public_names():
    listed = re.findall(r"^\| `(\w+)", (ROOT / "docs/reference.md").read_text(), flags=re.MULTILINE)
    assert sorted(listed) == sorted(ff.__all__)


def test_the_changelog_names_every_public_name():
    entries = [ROOT / "CHANGELOG.md", *(ROOT / "changes").glob("*.md")]
    changelog = "".join(entry.read_text() for entry in entries)
    assert [name for name in ff.__all__ if f"`{name}`" not in changelog] == []


def test_an_unknown_name_points_to_the_reference():
    with pytest.raises(AttributeError, match=r"docs/coming-from-fabric\.md"):
        ff.Fabric  # noqa: B018


def test_importing_the_package_imports_no_torch():
    code = "import sys, fabricfn; assert 'torch' not in sys.modules; fabricfn.Model; assert 'torch' in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
