"""The site: the pages of this folder, and one page a task with the docstrings. `nox -s docs` builds it.

The pages are plain Markdown that also reads well as files. So nothing here is written twice: the order of the menu is
that of the links in index.md, and the tables of reference.md say which names stand on which page of `api/`, which is
made anew by every build and not kept.
"""

import ast
import re
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

import fabricfn as ff  # noqa: E402

project = "fabricfn"
version = release = ff.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]

html_theme = "furo"
html_title = f"fabricfn {release}"
html_show_copyright = html_show_sphinx = False

myst_heading_anchors = 4
highlight_language = "none"
default_role = "py:obj"  # one backtick in a docstring: a link where that is a name of ours, else code
add_module_names = False
python_maximum_signature_line_length = 88
smartquotes = False  # "mean" in a docstring is a string
autodoc_member_order = "bysource"

INNER = {"autocast_of", "cast_floating", "check_name"}
"""Functions that `fabricfn.precision` has for other files of the package."""


def slug(title: str) -> str:
    """The file name of a task: "Starting and stopping" -> "starting-and-stopping"."""
    return re.sub(r"\W+", "-", title.lower())


def tasks() -> dict[str, list[str]]:
    """The tables of reference.md: the title of each, and the names that it lists."""
    _, *sections = re.split(r"^## ", (HERE / "reference.md").read_text(), flags=re.MULTILINE)
    return {section.partition("\n")[0]: re.findall(r"^\| `(\w+)`", section, re.MULTILINE) for section in sections}


def members(module: str) -> list[str]:
    """What a module offers beside the names of `fabricfn` itself: what its file imports with `as`, or defines."""
    tree = ast.parse(Path(getattr(ff, module).__file__).read_text())
    aliases = [alias for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names]
    imported = [alias.asname for alias in aliases if alias.asname and not alias.asname.isupper()]
    names = imported or [node.name for node in tree.body if isinstance(node, ast.ClassDef)]
    return [name for name in names if name not in {*ff.__all__, *INNER}]


def directives(name: str) -> list[str]:
    """What autodoc is told about a public name; about a module, also for what is in it."""
    if name not in ff._MODULES:
        return directive(getattr(ff, name), name)
    module = getattr(ff, name)
    inner = [line for member in members(name) for line in directive(getattr(module, member), f"{name}.{member}")]
    title = f"fabricfn.{name}"
    return [title, "-" * len(title), "", f".. automodule:: {title}", "", *inner]


def directive(thing: object, name: str) -> list[str]:
    """One of autodoc's directives, and the blank line after it."""
    if not isinstance(thing, type):
        return [f".. autofunction:: fabricfn.{name}", ""]
    if issubclass(thing, BaseException):
        return [f".. autoexception:: fabricfn.{name}", ""]
    return [f".. autoclass:: fabricfn.{name}", "   :members:", ""]


def write_pages() -> None:
    """api/: one page a task."""
    (HERE / "api").mkdir(exist_ok=True)
    for title, names in tasks().items():
        lines = [title, "=" * len(title), "", *(line for name in names for line in directives(name))]
        (HERE / "api" / f"{slug(title)}.rst").write_text("\n".join(lines))


def menu(docname: str, text: str) -> list[str]:
    """The pages under this one in the table of contents: what `text` links to, in its order."""
    if docname == "reference":
        return [f"api/{slug(title)}" for title in tasks()]
    if docname == "decisions/index":
        return sorted(path.stem for path in (HERE / "decisions").glob("0*.md"))
    return list(dict.fromkeys(re.findall(r"\]\(([\w/-]+)\.md\)", text)))


def on_source_read(app, docname: str, content: list[str]) -> None:
    """Put in what only the site has: the menu, and links from the reference to the docstrings."""
    if docname in ("index", "reference", "decisions/index"):
        hidden = [":hidden:"] if docname == "index" else [":maxdepth: 1"]
        content[0] += "\n".join(["", "```{toctree}", *hidden, "", *menu(docname, content[0]), "```", ""])
    if docname == "reference":
        content[0] = re.sub(r"^\| `(\w+)`", r"| {py:obj}`\1 <fabricfn.\1>`", content[0], flags=re.MULTILINE)


def on_field(app, what: str, name: str, thing: object, options: object, lines: list[str]) -> None:
    """What stands before a colon in a field's docstring is no type, which napoleon takes it for."""
    if what == "attribute" and lines:
        lines[0] = f": {lines[0]}"


def on_docstring(app, what: str, name: str, thing: object, options: object, lines: list[str]) -> None:
    """A star in front of a word is a star: our docstrings emphasise nothing."""
    for number, line in enumerate(lines):
        if not line.lstrip().startswith((">>>", "...")):
            code = re.split(r"(`[^`]*`)", line)
            code[::2] = [re.sub(r"(?<![\\*])\*(?=[^\s*])", r"\\*", part) for part in code[::2]]
            lines[number] = "".join(code)


def setup(app) -> None:
    """Called by Sphinx."""
    write_pages()
    app.connect("source-read", on_source_read)
    app.connect("autodoc-process-docstring", on_field, priority=400)  # napoleon has 500, and comes before another 500
    app.connect("autodoc-process-docstring", on_docstring)
