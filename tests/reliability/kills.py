"""R1: kill -9 at a random instant of a save over an existing checkpoint, or of a save into a new folder."""

import functools
import os
import random
import select
import signal
import sys
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

import fabricfn as ff
from fabricfn.checkpoint.storage import commit
from fabricfn.errors import CheckpointError
from tests.reliability.scene import (
    ALONE,
    Save,
    blocking,
    load_quietly,
    member,
    non_blocking,
    number_of,
    scratch,
    tree_of,
)

WORLDS = {
    "1 rank": (1, (0,)),
    "2 ranks, both killed": (2, (0, 1)),
    "2 ranks, rank 0 killed": (2, (0,)),
    "2 ranks, rank 1 killed": (2, (1,)),
}
"""What is killed -> how many ranks, and which of them are killed."""
OVER, ASIDE, STEPS = TARGETS = ("over the last one", "over the last one, no exchange", "a folder a step")
PATIENCE = 20.0
"""Seconds that a survivor gets to fail and end."""


def place_of(folder: Path, target: str, number: int) -> Path:
    """Where the save of this number goes."""
    return folder / (f"step-{number}" if target == STEPS else "last")


def rank_main(rank: int, size: int, folder: Path, meeting: str, save: Save, target: str, number: int, out: int) -> None:
    """Save one number after the other and tell each on the pipe, for ever; a survivor tells its error's kind."""
    if target == ASIDE:
        commit.put_in_place = functools.partial(commit.put_in_place, exchange=lambda a, b: False)
    try:
        with member(rank, size, meeting) as rt:
            while True:
                number += 1
                save(rt, place_of(folder, target, number), tree_of(number))
                os.write(out, f"{rank} {number}\n".encode())
    except CheckpointError:
        os.write(out, f"{rank} CheckpointError\n".encode())
    except BaseException as error:
        traceback.print_exc()
        os.write(out, f"{rank} {type(error).__name__}\n".encode())
    finally:
        os._exit(1)


def one_kill(dice: random.Random, size: int, victims: tuple[int, ...], folder: Path, **options: Any) -> list[list[str]]:
    """Fork the ranks, let each save once, kill the victims at a random instant; returns what all told."""
    meeting = str(folder / f"meeting-{dice.getrandbits(64)}")
    read, write = os.pipe()
    sys.stdout.flush()
    children = []
    for rank in range(size):
        child = os.fork()
        if child == 0:
            os.close(read)
            rank_main(rank, size, folder, meeting, out=write, **options)
        children.append(child)
    os.close(write)
    told = b""
    while told.count(b"\n") < size:
        if not select.select([read], [], [], PATIENCE)[0] or not (data := os.read(read, 1000)):
            break  # a rank that failed before its first save; judged by what it told
        told += data
    time.sleep(dice.uniform(0, 0.03))  # the instant of the kill: within the next save or two
    for rank in victims:
        os.kill(children[rank], signal.SIGKILL)
    deadline = time.monotonic() + PATIENCE
    while (left := deadline - time.monotonic()) > 0 and select.select([read], [], [], left)[0]:
        if not (data := os.read(read, 1000)):
            break
        told += data
    os.close(read)
    for child in children:
        if left <= 0:
            os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    if os.path.exists(meeting):
        os.unlink(meeting)
    return [line.split() for line in told.decode().splitlines()]


def judge(folder: Path, target: str, before: int, told: list[list[str]], counts: Counter[str]) -> int:
    """Compare what is there with what was promised; returns the number that stands now."""
    promised = max([before, *(int(word) for _, word in told if word.isdigit())])
    path: Path | None = place_of(folder, target, 0)
    if target == STEPS:
        path = ff.latest(folder)
    try:
        found = None if path is None else number_of(load_quietly(path))
    except CheckpointError:
        counts["lost"] += 1
        raise
    if found is None:
        counts["lost" if path is None else "mixed"] += 1
        return promised
    kind = {promised: "the old", promised + 1: "the new"}.get(found, "lost")
    counts[kind] += 1
    return found


def kills(
    count: int, *, world: str, target: str, save: Save = blocking, seed: int = 0, base: str | None = None
) -> dict[str, int]:
    """Kill so often.

    Returns:
        how often the old and the new one were found afterwards, how often one was lost or mixed; survivors that got no
        `CheckpointError`; and what was left after the next save.
    """
    size, victims = WORLDS[world]
    counts = Counter(dict.fromkeys(("kills", "the old", "the new", "lost", "mixed", "survivors unclear", "left"), 0))
    dice = random.Random(seed)
    with scratch(base) as folder:
        number = 0
        save(ALONE, place_of(folder, target, 0), tree_of(0))
        for _ in range(count):
            told = one_kill(dice, size, victims, folder, save=save, target=target, number=number)
            counts["kills"] += 1
            errors = [word for rank, word in told if not word.isdigit()]
            counts["survivors unclear"] += errors != ["CheckpointError"] * (size - len(victims))
            number = judge(folder, target, number, told, counts)
            save(ALONE, place_of(folder, target, number + 1), tree_of(number + 1))
            number += 1
            counts["left"] += sum(name.startswith(".") for name in os.listdir(folder))
    return dict(counts)


def rows(count: int, seed: int = 0, **options: Any) -> dict[str, dict[str, int]]:
    """Every row of R1, `count` kills over all of them."""
    saves = {"blocking": blocking, "non-blocking": non_blocking}
    combinations = [(name, world, target) for name in saves for target in TARGETS for world in WORLDS]
    return {
        f"{name}, {target}, {world}": kills(
            -(-count // len(combinations)),
            **{**options, "world": world, "target": target, "save": saves[name], "seed": seed + number},
        )
        for number, (name, world, target) in enumerate(combinations)
    }
