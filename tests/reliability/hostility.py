"""R4: manifests and folders made to harm: an error or the right load, in bounded time and memory."""

import contextlib
import copy
import hashlib
import json
import math
import os
import pickle
import resource
import socket
import stat
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hypothesis import HealthCheck, Phase, given, seed as seeded, settings, strategies as st

import fabricfn as ff
from fabricfn.errors import CheckpointError
from tests.reliability.corruption import signed, unsigned
from tests.reliability.scene import ALONE, scratch

SECONDS = 1.0
FIXED = 96 << 20
"""Bytes of address space beside twice the size of the files."""
MANIFEST = "manifest.json"
HOSTILE: tuple[Any, ...] = (
    *(0, 1, -1, 2, 3, 1 << 31, 1 << 48, 1 << 62, 1 << 64, 10**30, 10**400, 0.5, -0.0, 1e308, math.nan, math.inf),
    *("", "../x", "/etc/passwd", "data/../../x", "\0", "\ud800", "x" * 5000, "0x" + "f" * 3000, "9" * 5000, "1e5"),
    *("pickle", "tensor", "array", "number", "int", "float", "str", "bytes", "none", "record", "dict", "list", "tuple"),
    *("float32", "bfloat16", "bool", "complex32", "float4_e2m1fn_x2", "float8_e8m0fnu", "object", "uint64"),
    *(None, True, False, [], {}, [0], [[]], [0] * 70, [1 << 40] * 5, {"t": "list", "c": []}, [1, [2, [3]]]),
)
"""What is put in the place of anything."""


def made(folder: Path) -> Path:
    """A small valid checkpoint that has every kind of entry."""
    tied = torch.arange(6.0)
    tree = {
        "model": {"w": torch.randn(4, 3), "b": torch.randn(3).bfloat16(), "tied": [tied, tied]},
        "numpy": (np.arange(5), np.float32(2.5)),
        "raw": torch.randn(2).to(torch.complex64),
        "empty": torch.zeros(0, 3),
        "plain": [1, 1 << 5000, 0.5, 1j, "text", b"bytes", None, True],
        "cursor": ff.Cursor(epoch=3),
        7: torch.tensor(True),
    }
    return ff.save(ALONE, folder / "c", tree).path


def agrees(loaded: Any, folder: Path) -> bool:
    """Whether a load is what the manifest says, as a reader that knows nothing of fabricfn finds it."""
    text = json.loads((folder / MANIFEST).read_bytes())
    sections = []
    for file in text["files"]:
        data = (folder / file["name"]).read_bytes()
        sections.append(data[8 + int.from_bytes(data[:8], "little") :])

    def fits(node: Any, value: Any) -> bool:
        if isinstance(node, dict):
            keys = node["k"] if node["t"] in ("dict", "record") else range(len(node["c"]))
            return len(value) == len(keys) and all(fits(c, value[k]) for k, c in zip(keys, node["c"], strict=True))
        leaf = text["leaves"][node]
        leaf = text["leaves"][leaf["alias"]] if "alias" in leaf else leaf
        if leaf["kind"] not in ("tensor", "array", "number"):
            return True
        tensor = value if isinstance(value, torch.Tensor) else torch.from_numpy(np.array(value))
        if list(tensor.shape) != leaf["shape"] or str(tensor.dtype) != f"torch.{leaf['dtype']}":
            return False
        size = tensor.element_size()
        have = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().reshape(*leaf["shape"], size)
        for piece in leaf["pieces"]:
            stored = np.frombuffer(sections[piece["file"]], np.uint8, piece["bytes"], piece["start"])
            place = tuple(slice(o, o + n) for o, n in zip(piece["offset"], piece["shape"], strict=True))
            if not np.array_equal(have[place], stored.reshape(*piece["shape"], size)):
                return False
        return True

    return fits(text["tree"], loaded)


def attempt(place: Path) -> str:
    """Load, verify, inspect and list: "error", "right load", or what should not be."""
    try:
        loaded = ff.load(ALONE, place)
    except CheckpointError as error:
        named = str(error).count("\n") < 50 and len(str(error)) < 5000
        ends = "error" if named else "a flood of an error"
    except BaseException as error:
        return f"load: {type(error).__name__}: {str(error)[:200]}"
    else:
        ends = "right load" if agrees(loaded, place) else "wrong load"
    try:
        str(ff.verify_checkpoint(place))
        again = "right load"
    except CheckpointError:
        again = "error"
    except BaseException as error:
        return f"verify: {type(error).__name__}: {str(error)[:200]}"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        try:
            ff.latest(place.parent)
        except BaseException as error:
            return f"latest: {type(error).__name__}: {str(error)[:200]}"
    return ends if again == ends else f"{ends}, but verify_checkpoint: {again}"


def limit_memory(room: int) -> None:
    """Let this process have so many bytes of address space beside what it has now."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + room, resource.RLIM_INFINITY))


def guarded(work: Callable[[], Any], room: int, seconds: int) -> Any:
    """What `work` returns in a forked child with so many bytes of further address space and seconds of CPU."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(read)
            limit_memory(room)
            resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
            answer = work()
        except BaseException as error:
            answer = f"{type(error).__name__}: {error}"
        with os.fdopen(write, "wb") as out:
            pickle.dump(answer, out)
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as source:
        told = source.read()
    _, status = os.waitpid(child, 0)
    return pickle.loads(told) if told else f"the process ended with status {status}"


# ---------------------------------------------------------------- made by hand


def replacements(good: Any) -> Iterator[tuple[str, Any]]:
    """Every field of a manifest once removed, and once replaced by something else."""
    for number, path in enumerate(paths_in(good)):
        for change in ("remove", "replace"):
            text = copy.deepcopy(good)
            holder = inner(text, path[:-1])
            if change == "replace":
                holder[path[-1]] = HOSTILE[(7 * number) % len(HOSTILE)]
            else:
                del holder[path[-1]]
            yield f"{change} {'/'.join(map(str, path))}", text


def paths_in(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of all entries of JSON data."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [found for key, child in items for found in [(*path, key), *paths_in(child, (*path, key))]]


def inner(value: Any, path: tuple[Any, ...]) -> Any:
    """The entry at a path."""
    for key in path:
        value = value[key]
    return value


def resigned(body: bytes) -> bytes:
    """Any bytes with a right checksum."""
    return body + b',\n"sha256":"%s"}\n' % hashlib.sha256(body).hexdigest().encode()


def many(good: Any, leaf: dict[str, Any], count: int, **files: Any) -> Any:
    """A manifest of so many equal leaves in a list."""
    return {**good, "tree": {"t": "list", "c": list(range(count))}, "leaves": [leaf] * count, "files": [], **files}


def array(shape: list[int], boxes: list[tuple[list[int], list[int]]]) -> dict[str, Any]:
    """A leaf of bytes in these boxes, one after the other in file 0."""
    pieces, start = [], 0
    for offset, size in boxes:
        piece = {"file": 0, "offset": offset, "shape": size, "start": start, "bytes": math.prod(size)}
        pieces.append({**piece, "crc32": [0] * -(-math.prod(size) // (4 << 20))})
        start += math.prod(size)
    return {"path": "x", "kind": "tensor", "dtype": "uint8", "shape": shape, "pieces": pieces}


def staircase(count: int) -> list[tuple[list[int], list[int]]]:
    """Boxes of which each straight cut parts one from the rest, along one dimension and then the other."""
    boxes, top, left = [], 0, 0
    for number in range(count):
        if number % 2:
            boxes.append(([top, left], [1, count - left]))
            top += 1
        else:
            boxes.append(([top, left], [count - top, 1]))
            left += 1
    return [*boxes, ([top, left], [count - top, count - left])]


def pinwheels(count: int) -> list[tuple[list[int], list[int]]]:
    """Rings of four boxes around the next ring: no straight cut parts them."""
    boxes, low, high = [], 0, 2 * count + 1
    for _ in range(count):
        size = high - low - 1
        boxes += [([low, low], [1, size]), ([low, high - 1], [size, 1])]
        boxes += [([high - 1, low + 1], [1, size]), ([low + 1, low], [size, 1])]
        low, high = low + 1, high - 1
    return [*boxes, ([low, low], [1, 1])]


def large_ones(good: Any, parts: int = 1) -> Iterator[tuple[str, bytes]]:
    """Manifests of about a megabyte, or so many parts of it, each made to cost much."""
    none, empty = {"path": "", "kind": "none"}, array([0], [([0], [0])])
    file = {"files": good["files"][:1]}
    yield "20,000 leaves of nothing", signed(many(good, none, 20_000 // parts))
    yield "6,000 arrays without elements", signed(many(good, empty, 6_000 // parts, **file))
    yield (
        "one array in 10,000 empty pieces",
        signed(many(good, array([0], [([0], [0])] * (10_000 // parts)), 1, **file)),
    )
    yield (
        "a staircase of 8,000 boxes",
        signed(many(good, array([8000 // parts] * 2, staircase(8000 // parts)), 1, **file)),
    )
    yield "a staircase of 1,000 boxes, cut late", signed(many(good, wide(staircase(1000), 30), 1, **file))
    yield (
        "pinwheels, 2,000 rings",
        signed(many(good, array([4000 // parts + 1] * 2, pinwheels(2000 // parts)), 1, **file)),
    )
    yield "50 arrays, each a tangle", signed(many(good, array([125, 125], pinwheels(62)), 50 // parts, **file))
    yield "1,300 arrays, each a small tangle", signed(many(good, array([11, 11], pinwheels(5)), 650 // parts, **file))
    for opening, name in ((b"[", "lists"), (b'{"t":"list","c":[', "containers"), (b'{"a":', "objects")):
        yield f"{name}, 50,000 deep", resigned(opening * (50_000 // parts))
    body = json.dumps(good, separators=(",", ":")).encode()[:-1]
    yield "a million empty lists", resigned(body + b',"x":[' + b"[]," * (350_000 // parts) + b"0]")
    yield "a long number", resigned(body + b',"x":' + b"9" * (1_000_000 // parts))
    yield "a long string", resigned(body + b',"x":"' + b"\\u0041" * (170_000 // parts) + b'"')
    yield "every key twice", resigned(body + b"," + body[1:])
    yield "200 dimensions", signed(many(good, array([1] * 200, [([0] * 200, [1] * 200)]), 1, **file))
    chain = [array([0], [([0], [0])]), *({**empty, "pieces": None, "alias": 0} for _ in range(9_000 // parts))]
    aliased = {**good, **file, "tree": {"t": "tuple", "c": list(range(len(chain)))}, "leaves": chain}
    yield "9,000 names for one array", signed(aliased)


def wide(boxes: list[tuple[list[int], list[int]]], ndim: int) -> dict[str, Any]:
    """The same boxes behind dimensions in which nothing can be cut."""
    ones, zeros = [1] * (ndim - 2), [0] * (ndim - 2)
    size = len(boxes) - 1
    return array([*ones, size, size], [([*zeros, *offset], [*ones, *shape]) for offset, shape in boxes])


def folders(place: Path, good: Any) -> Iterator[tuple[str, Callable[[], None]]]:
    """What stands in the folder is not what it should be."""
    name = good["files"][0]["name"]

    def instead(part: str, put: Callable[[Path], Any]) -> Callable[[], None]:
        def change() -> None:
            (place / part).rename(place.parent / "aside")
            put(place / part)

        return change

    def listening(path: Path) -> None:
        here = os.getcwd()
        os.chdir(path.parent)  # the path of a socket is short
        with socket.socket(socket.AF_UNIX) as door:
            door.bind(path.name)
        os.chdir(here)

    for part in (MANIFEST, name):
        yield f"{part} is a link", instead(part, lambda path: path.symlink_to(place.parent / "aside"))
        yield f"{part} is a link to nothing", instead(part, lambda path: path.symlink_to("/nowhere"))
        yield f"{part} is a link to itself", instead(part, lambda path: path.symlink_to(path))
        yield f"{part} is a device", instead(part, lambda path: path.symlink_to("/dev/zero"))
        yield f"{part} is a pipe", instead(part, os.mkfifo)
        yield f"{part} is a socket", instead(part, listening)
        yield f"{part} is a folder", instead(part, Path.mkdir)
        yield f"{part} is empty", instead(part, Path.touch)
        yield f"{part} has holes of 2 TiB", instead(part, lambda path: (path.touch(), os.truncate(path, 2 << 40)))
        yield f"{part} is missing", instead(part, lambda path: None)
    yield "data is a link", instead("data", lambda path: path.symlink_to(place.parent / "aside"))
    yield "data is a pipe", instead("data", os.mkfifo)
    yield "data is missing", instead("data", lambda path: None)


def handmade(parts: int = 1, report: Callable[[str, str], None] = lambda name, end: None) -> dict[str, int]:
    """Every manifest and folder made by hand, each in a child of its own.

    Args:
        parts: take one of so many of the manifests with one wrong field, and make the large ones so much smaller.
        report: called with the name and the end of each that is neither an error nor a right load in time.
    """
    counts: Counter[str] = Counter(dict.fromkeys(("inputs", "error", "right load", "slow", "other"), 0))
    with scratch("/dev/shm" if os.path.isdir("/dev/shm") else None) as folder:
        place = made(folder)
        whole = (place / MANIFEST).read_bytes()
        good = unsigned(whole)
        cases: list[tuple[str, Callable[[], Any]]] = []

        def manifest(data: bytes) -> Callable[[], Any]:
            return lambda: (place / MANIFEST).write_bytes(data)

        cases += [(name, manifest(signed(text))) for name, text in list(replacements(good))[::parts]]
        cases += [(name, manifest(data)) for name, data in large_ones(good, parts)]
        cases += folders(place, good)
        for name, change in cases:
            change()
            size = sum(min(p.stat().st_size, 64 << 20) for p in place.rglob("*") if p.is_file())
            began = time.process_time(), resource.getrusage(resource.RUSAGE_CHILDREN)
            end = guarded(lambda: attempt(place), 2 * size + FIXED, 20)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            # three reads: load, verify_checkpoint and latest
            spent = (after.ru_utime + after.ru_stime - began[1].ru_utime - began[1].ru_stime) / 3
            counts["inputs"] += 1
            counts[end if end in ("error", "right load") else "other"] += 1
            counts["slow"] += spent > SECONDS
            if end not in ("error", "right load") or spent > SECONDS:
                report(name, f"{end} ({spent:.2f} s)")
            restore(place, name.partition(" ")[0], whole)
    return dict(counts)


def restore(place: Path, part: str, whole: bytes) -> None:
    """Put back what a case changed."""
    aside = place.parent / "aside"
    if aside.exists():
        with contextlib.suppress(FileNotFoundError):
            (place / part).rmdir() if stat.S_ISDIR(os.lstat(place / part).st_mode) else (place / part).unlink()
        aside.rename(place / part)
    (place / MANIFEST).write_bytes(whole)


# ---------------------------------------------------------------- fuzzed

mutation = st.tuples(
    st.integers(0, 1 << 20),
    st.sampled_from(["replace", "remove", "twice", "swap", "add", "wrap", "int"]),
    st.sampled_from(HOSTILE),
    st.integers(-2, 1 << 66) | st.integers(-2, 70),
)
inputs = st.one_of(
    st.lists(mutation, min_size=1, max_size=3),
    st.binary(max_size=60),
    st.tuples(st.integers(0, 1 << 20), st.integers(0, 1 << 20), st.binary(max_size=8)),
)


def mutated(good: Any, changes: list[Any]) -> bytes:
    """A valid manifest, changed here and there, signed again."""
    text = copy.deepcopy(good)
    for place, kind, value, number in changes:
        paths = paths_in(text)
        path = paths[place % len(paths)]
        holder, key, value = inner(text, path[:-1]), path[-1], copy.deepcopy(value)
        if kind in ("replace", "int"):
            holder[key] = value if kind == "replace" else number
        elif kind == "remove":
            del holder[key]
        elif kind == "wrap":
            holder[key] = [holder[key]] if number % 2 else {"t": "list", "c": [holder[key]]}
        elif isinstance(holder, list):
            other = number % len(holder)
            if kind == "swap":
                holder[key], holder[other] = holder[other], holder[key]
            else:
                holder.insert(other, copy.deepcopy(holder[key]) if kind == "twice" else value)
        else:
            holder[str(value)[:40]] = copy.deepcopy(holder[key])
    return signed(text)


def fuzzed(good: Any, whole: bytes, change: Any) -> bytes:
    """The manifest of one input of the fuzzer."""
    if isinstance(change, list):
        return mutated(good, change)
    if isinstance(change, bytes):
        return resigned(change)
    start, length, data = change
    body = whole[: whole.rindex(b",\n")]
    start %= len(body)
    return resigned(body[:start] + data + body[start + length % 200 :])


def batch(place: Path, count: int, seed: int) -> dict[str, Any]:
    """Run the fuzzer for so many inputs in this process."""
    whole = (place / MANIFEST).read_bytes()
    good = unsigned(whole)
    counts: Counter[str] = Counter()
    bad: list[tuple[str, bytes]] = []

    @seeded(seed)
    @settings(
        *(), max_examples=count, database=None, deadline=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(inputs)
    def run(change: Any) -> None:
        data = fuzzed(good, whole, change)
        (place / MANIFEST).write_bytes(data)
        limit_memory(2 * len(data) + FIXED)  # the fuzzer itself takes more and more
        began = time.process_time()
        end = attempt(place)
        slow = time.process_time() - began > SECONDS
        counts["inputs"] += 1
        limit_memory(1 << 30)
        counts[end if end in ("error", "right load") else "other"] += 1
        counts["slow"] += slow
        if slow or end not in ("error", "right load"):
            bad.append((end, data))

    run()
    return {**counts, "bad": bad[:5]}


def fuzz(
    count: int, seed: int = 0, size: int = 2000, report: Callable[[str, bytes], None] = lambda end, data: None
) -> dict[str, int]:
    """Fuzz so many manifests, in children of `size` inputs each whose memory is bounded."""
    counts: Counter[str] = Counter(dict.fromkeys(("inputs", "error", "right load", "slow", "other"), 0))
    with scratch("/dev/shm" if os.path.isdir("/dev/shm") else None) as folder:
        place = made(folder)
        whole = (place / MANIFEST).read_bytes()
        while counts["inputs"] < count:
            share = min(size, count - counts["inputs"])
            seed += 1
            (place / MANIFEST).write_bytes(whole)
            found = guarded(lambda: batch(place, share, seed), FIXED, 600)
            if isinstance(found, str):
                raise AssertionError(f"the fuzzer of seed {seed}: {found}")
            for end, data in found.pop("bad"):
                report(end, data)
            counts.update(found)
    return dict(counts)
