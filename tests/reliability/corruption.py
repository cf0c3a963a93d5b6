"""R3: flipped, cut, zeroed, swapped, stale and missing files, edited manifests: errors that name the file."""

import hashlib
import json
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import fabricfn as ff
from fabricfn.errors import CheckpointError
from fabricfn.testing import threads
from tests.reliability.scene import ALONE, scratch

Files = dict[str, bytes]
MANIFEST = "manifest.json"


def tree_of_kinds(seed: int) -> dict[str, Any]:
    """Arrays of many dtypes, an array of more than one block, plain values; no byte block is all zero."""
    dice = torch.Generator().manual_seed(seed)
    row = torch.randint(1, 256, (5 << 20,), dtype=torch.uint8, generator=dice)
    return {
        "large": row,
        "model": {"w": torch.randn(300, 40, generator=dice), "b": torch.randn(300, generator=dice).bfloat16()},
        "long": [
            torch.randint(1, 1 << 60, (500,), generator=dice),
            torch.randn(9, generator=dice).to(torch.complex128),
        ],
        "numpy": torch.randn(4, 5, generator=dice).numpy(),
        "plain": (seed, "text", 0.5, None, b"bytes", True),
    }


def files_of(folder: Path) -> Files:
    """Name -> content of all files."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def signed(text: Any) -> bytes:
    """A manifest with a right checksum, whatever it says."""
    body = json.dumps(text, separators=(",", ":")).encode()
    body = body[:-1] if body.endswith(b"}") else body
    return body + b',\n"sha256":"%s"}\n' % hashlib.sha256(body).hexdigest().encode()


def unsigned(manifest: bytes) -> Any:
    """What a manifest says, without its checksum."""
    text = json.loads(manifest)
    del text["sha256"]
    return text


def flip(dice: random.Random, data: bytes, low: int = 0, high: int | None = None) -> bytes:
    """One bit flipped between two places."""
    place = dice.randrange(low, len(data) if high is None else min(high, len(data)))
    return data[:place] + bytes([data[place] ^ 1 << dice.randrange(8)]) + data[place + 1 :]


def zero(dice: random.Random, data: bytes) -> bytes:
    """A block of zeros, as a lost page or sector leaves."""
    size = dice.choice([512, 4096, 65536])
    start = dice.randrange(0, len(data), 512)
    return data[:start] + bytes(min(size, len(data) - start)) + data[start + size :]


def any_file(change: Callable[[random.Random, bytes], bytes], *suffixes: str) -> Callable[..., tuple[Files, list[str]]]:
    """The change of one file."""

    def corrupt(dice: random.Random, good: Files, stale: Files) -> tuple[Files, list[str]]:
        name = dice.choice([name for name in good if name.endswith(suffixes or "")])
        return {name: change(dice, good[name])}, [name]

    return corrupt


def take_stale(dice: random.Random, good: Files, stale: Files) -> tuple[Files, list[str]]:
    """A data file, or the manifest, of an older save of the same tree by the same ranks."""
    name = dice.choice(list(good))
    return {name: stale[name]}, list(good) if name == MANIFEST else [name]


def swap(dice: random.Random, good: Files, stale: Files) -> tuple[Files, list[str]]:
    """Two data files of one checkpoint have each other's names."""
    a, b = dice.sample([name for name in good if name != MANIFEST], 2)
    return {a: good[b], b: good[a]}, [a, b]


def edit(dice: random.Random, good: Files, stale: Files) -> tuple[Files, list[str]]:
    """The manifest is edited where the data files tell otherwise, and its checksum made right again."""
    text = unsigned(good[MANIFEST])
    leaves = text["leaves"]
    arrays = [i for i, leaf in enumerate(leaves) if leaf.get("pieces")]
    leaf = leaves[dice.choice(arrays)]
    piece = dice.choice(leaf["pieces"])
    a, b = dice.sample(arrays, 2)
    file, by = dice.choice(text["files"]), dice.choice([-1, 1, 8, 1 << 40])
    crc, place = dice.randrange(len(piece["crc32"])), dice.randrange(len(leaf["shape"]))
    match dice.randrange(13):
        case 0:
            file["bytes"] += by
        case 1:
            file["name"] = f"data/r0000{dice.randrange(2, 9)}-000.safetensors"
        case 2:
            text["files"].reverse()
        case 3:
            leaf["shape"][place] += by
        case 4:
            leaf["dtype"] = dice.choice([d for d in ("float64", "int32", "uint8", "bool") if d != leaf["dtype"]])
        case 5:
            piece["start"] += by
        case 6:
            piece["bytes"] += by
        case 7:
            piece["crc32"][crc] ^= 1 << dice.randrange(32)
        case 8:
            piece["offset"][place] += by
        case 9:
            piece["shape"][place] += by
        case 10:
            text["save_id"] = text["save_id"][::-1]
        case 11:
            leaves[a], leaves[b] = leaves[b], leaves[a]
        case _:
            piece["file"] = 1 - piece["file"]
    return {MANIFEST: signed(text)}, [*good, *(file["name"] for file in text["files"])]


KINDS: dict[str, tuple[int, Callable[..., tuple[Files, list[str]]]]] = {
    "bit flipped, data file": (30, any_file(flip, "safetensors")),
    "bit flipped, header": (12, any_file(lambda dice, data: flip(dice, data, 0, 700), "safetensors")),
    "bit flipped, manifest": (12, any_file(flip, "json")),
    "cut off": (12, any_file(lambda dice, data: data[: dice.randrange(len(data))])),
    "bytes added": (3, any_file(lambda dice, data: data + dice.randbytes(dice.choice([1, 8, 4096])))),
    "zeroed block": (12, any_file(zero)),
    "missing file": (2, lambda dice, good, stale: ({(name := dice.choice(list(good))): None}, [name])),
    "stale file of an older save": (2, take_stale),
    "swapped files": (1, swap),
    "manifest edited and signed again": (14, edit),
}
"""Kind -> how many of a hundred, and how."""


def outcome(read: Callable[[], Any], names: list[str]) -> str:
    """How a read of a damaged checkpoint ends."""
    try:
        read()
    except CheckpointError as error:
        return "named" if any(name in str(error) for name in names) else "unnamed"
    except Exception as error:
        return f"crash: {type(error).__name__}"
    return "silent"


def corruptions(count: int, seed: int = 0) -> dict[str, dict[str, int]]:
    """Damage a checkpoint of two ranks so often; load and verify it.

    Returns:
        kind -> counts: corruptions; errors that named the file, and that did not; silent reads; crashes. A corruption
        counts as the worse of the outcomes of `load` and `verify_checkpoint`.
    """
    dice = random.Random(seed)
    found: dict[str, Counter[str]] = {}
    worst = ["named", "unnamed"]
    with scratch("/dev/shm" if Path("/dev/shm").is_dir() else None) as folder, threads(2) as ranks:
        place = folder / "last"
        ranks.run(lambda rt: ff.save(rt, place, tree_of_kinds(1)) and None)
        stale = files_of(place)
        ranks.run(lambda rt: ff.save(rt, place, tree_of_kinds(2)) and None)
        good = files_of(place)
        assert good.keys() == stale.keys() and len(good) == 3
        for kind, (share, corrupt) in KINDS.items():
            counts = found[kind] = Counter(dict.fromkeys(("corruptions", "named", "unnamed", "silent"), 0))
            for _ in range(max(1, count * share // 100)):
                changed, names = corrupt(dice, good, stale)
                while all(good[name] == data for name, data in changed.items()):
                    changed, names = corrupt(dice, good, stale)  # a block that was zero before
                write(place, changed)
                counts["corruptions"] += 1
                outcomes = [
                    outcome(lambda: ff.load(ALONE, place), names),
                    outcome(lambda: ff.verify_checkpoint(place), names),
                ]
                counts[max(outcomes, key=lambda end: worst.index(end) if end in worst else 2)] += 1
                write(place, {name: good.get(name) for name in changed})
        ff.verify_checkpoint(place)
    return {kind: dict(counts) for kind, counts in found.items()}


def write(place: Path, files: dict[str, bytes | None]) -> None:
    """Put these contents there; None removes a file."""
    for name, data in files.items():
        if data is None:
            (place / name).unlink()
        else:
            (place / name).write_bytes(data)
