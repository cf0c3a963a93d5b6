"""The shape of the package, held by the imports in its files. `FLOORS` is its table of contents."""

import ast
import graphlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import fabricfn as ff

PACKAGE = Path(ff.__file__).parent

# A room is a file or a folder; it imports only rooms on lower floors. Inside a folder, no cycles.
FLOORS = (
    (
        "errors",
        "world",
        "tree",
        "tracing",
    ),  # words: exceptions, who am I, pytrees, whether all this is only written down
    (
        "random",
        "interrupts",
        "precision",
        "default_dtypes",
        "accelerators",
        "environments",
        "failures",
        "errands",
        "loggers",
        "plots",
        "flat",
        "sharding",
        "meshes",
    ),  # facts, and plain machinery
    # behind a model; permutations with random access; the loss scale; global generators; who waits for whom
    ("engine", "permutations", "scaling", "generators", "watching"),
    ("strategy", "leases", "order"),  # what a strategy is; who may use which values; the order of the data
    ("strategies", "records", "seeding"),  # the strategies; the values of training; generators that are not ours
    ("runtimes", "states", "passes", "samplers"),  # where and how; the optimizer's values; the order of a user's data
    ("losses", "copying", "deferring", "streams"),  # what a loss function returns; nets of ours; data that only flow
    ("binding", "cutting", "transfers", "collectives"),  # values meet machinery; ranks meet ranks
    ("runs", "building", "feeds", "votes", "ledgers"),  # one pass; a module to an engine; what a rank takes and adds
    ("iterating", "canonical", "replicas"),  # from a cursor to the end of the epoch; passes added up in one fixed tree
    (
        "starting",
        "reporting",
        "hooks",
        "progress_bars",
        "stopping",
        "model",
        "gathering",
        "modes",
        "gradients",
        "clipping",
        "optimizers",
        "data",
        "checkpoint",
        "relays",
    ),  # verbs
    # a step as one graph; what there is on this machine; what a run measures; gradients of a net in stages; what a loop
    # is made up of; commands that start nothing
    ("compiling", "facts", "figures", "pipelining", "patience", "averaging", "meters", "peaks", "spikes", "commands"),
    ("testing", "cli"),  # worlds, cases, laws; the command line
    ("__init__", "__main__"),  # every public name; python -m fabricfn
)

# Third-party libraries that a file may import inside a function, because they are optional and it is about them.
OPTIONAL: dict[str, set[str]] = {
    "starting.cargo": {"cloudpickle"},
    "checkpoint.storage.objects": {"fsspec"},
    "checkpoint.format.checksums": {"isal"},
    "environments.mpi": {"mpi4py"},
    "loggers.tensorboard_events": {"torch"},  # whose `tensorboard` needs that package
    "progress_bars": {"tqdm"},
    "plots.pictures": {"matplotlib"},
}

# The files that name a library which belongs to them alone.
OWNED = {"optree": {"tree"}}

MAX_LINES, MAX_FUNCTION_LINES = 300, 60

FILES = sorted(PACKAGE.rglob("*.py"))


def module_of(path: Path) -> str:
    """`checkpoint/format/manifest.py` -> "checkpoint.format.manifest"; a folder's `__init__.py` -> the folder."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in FILES}
TREES = {module: ast.parse(path.read_text()) for module, path in MODULES.items()}
ROOM_FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}


def room_of(module: str) -> str:
    return module.partition(".")[0]


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def statements(node: ast.AST, inside: bool = False) -> Iterator[tuple[ast.Import | ast.ImportFrom, bool]]:
    """(import, whether it is inside a function), without those that only type checkers run."""
    if isinstance(node, ast.Import | ast.ImportFrom):
        yield node, inside
    for child in ast.iter_child_nodes(node):
        if not is_type_checking(node) or child not in node.body:
            nested = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from statements(child, inside or nested)


def targets(statement: ast.Import | ast.ImportFrom) -> list[str]:
    """The full names of the modules that a statement imports; `from fabricfn import tree` is fabricfn.tree."""
    if isinstance(statement, ast.Import):
        return [alias.name for alias in statement.names]
    assert statement.level == 0, f"line {statement.lineno}: imports are absolute here"
    module = statement.module or ""
    below = [f"{module}.{alias.name}" for alias in statement.names]
    return [name if name.removeprefix("fabricfn.") in MODULES else module for name in below]


def own_imports(module: str) -> set[str]:
    """The modules of this package that `module` imports; `import fabricfn` itself is the top floor."""
    names = {name for statement, _ in statements(TREES[module]) for name in targets(statement)}
    own = {name.removeprefix("fabricfn.") for name in names if name.partition(".")[0] == "fabricfn"}
    return {"__init__" if name == "fabricfn" else name for name in own}


def test_every_file_is_on_a_floor_and_every_room_of_the_table_exists():
    assert {room_of(module) for module in MODULES} == set(ROOM_FLOOR)


@pytest.mark.parametrize("module", MODULES)
def test_a_file_imports_only_lower_floors(module: str):
    room = room_of(module)
    above = {
        name for name in own_imports(module) if room_of(name) != room and ROOM_FLOOR[room_of(name)] >= ROOM_FLOOR[room]
    }
    assert not above, f"{module} (floor {ROOM_FLOOR[room]}) imports {sorted(above)}"


def test_no_cycles_inside_a_folder():
    graphlib.TopologicalSorter({module: own_imports(module) - {module} for module in MODULES}).prepare()


def test_no_cycles_between_the_folders_of_a_folder():
    inner: dict[str, set[str]] = {}
    for module in MODULES:
        here = ".".join(module.split(".")[:2])
        inner.setdefault(here, set()).update({".".join(name.split(".")[:2]) for name in own_imports(module)} - {here})
    graphlib.TopologicalSorter(inner).prepare()


@pytest.mark.parametrize("module", MODULES)
def test_imports_stand_at_the_top(module: str):
    allowed = OPTIONAL.get(module, set())
    hidden = {name for statement, inside in statements(TREES[module]) if inside for name in targets(statement)}
    assert {name.partition(".")[0] for name in hidden} <= allowed


@pytest.mark.parametrize("module", MODULES)
def test_a_library_is_named_only_by_the_file_about_it(module: str):
    libraries = {name.partition(".")[0] for statement, _ in statements(TREES[module]) for name in targets(statement)}
    for library, owners in OWNED.items():
        assert library not in libraries or module in owners


def test_no_file_bears_the_name_of_a_public_function():
    stems = {module.rpartition(".")[2] for module in MODULES}
    assert not stems & set(ff._HOMES)


@pytest.mark.parametrize("module", MODULES)
def test_files_and_functions_are_short(module: str):
    lines = len(MODULES[module].read_text().splitlines())
    assert lines <= MAX_LINES, f"{module} has {lines} lines: more than one idea?"
    functions = (node for node in ast.walk(TREES[module]) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))
    for function in functions:
        body = function.body[1:] if ast.get_docstring(function) else function.body
        lines = body[-1].end_lineno - body[0].lineno + 1 if body else 0
        assert lines <= MAX_FUNCTION_LINES, f"{function.name} has {lines} lines without its docstring"


def test_only_known_libraries_are_imported():
    known = {"torch", "optree", "safetensors", "numpy", "fabricfn", *sys.stdlib_module_names}
    optional = set().union(*OPTIONAL.values()) | {"hypothesis"}
    for module, tree in TREES.items():
        libraries = {name.partition(".")[0] for statement, _ in statements(tree) for name in targets(statement)}
        extra = optional if room_of(module) == "testing" or module in OPTIONAL else set()
        assert libraries <= known | extra, module
