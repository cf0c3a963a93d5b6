"""Damaged checkpoints, and manifests that contradict themselves: errors that name the place."""

import contextlib
import dataclasses
import hashlib
import json
import os
import zlib

import pytest
import torch

import fabricfn as ff
from fabricfn.checkpoint.format import manifest, validation, writing
from fabricfn.errors import CheckpointError
from fabricfn.testing import threads
from tests.support.checkpoints import bits, folder_of, save_common
from tests.support.runtimes import RT


def checkpoint_of_two_files(folder):
    with threads(2) as world:
        world.run(save_common, folder, 7)
    return folder


def test_cut_missing_swapped_and_foreign_files_are_named(tmp_path):
    whole = checkpoint_of_two_files(tmp_path / "c")
    again = checkpoint_of_two_files(tmp_path / "again")
    good = folder_of(whole)

    def check(name, text):
        with pytest.raises(CheckpointError, match=text):
            ff.load(RT, whole)
        with pytest.raises(CheckpointError, match=text):
            ff.verify_checkpoint(whole)
        with contextlib.suppress(FileNotFoundError):
            (whole / name).unlink()
        (whole / name).write_bytes(good[name])
        assert ff.load(RT, whole)["epoch"] == 7

    for name in good:
        for size in (0, 1, len(good[name]) // 2, len(good[name]) - 1):
            os.truncate(whole / name, size)
            check(name, name)
        (whole / name).write_bytes(good[name] + b"x")
        check(name, name)
        (whole / name).unlink()
        check(name, f"{name}.* is missing")
        (whole / name).unlink()
        os.symlink(again / name, whole / name)
        check(name, f"{name} is a symbolic link")
        (whole / name).unlink()
        os.mkfifo(whole / name)
        check(name, f"{name} is not a plain file")
    data = [name for name in good if name.startswith("data")]
    (whole / data[0]).write_bytes((again / data[0]).read_bytes())
    check(data[0], f"{data[0]} begins otherwise")
    zeroed = bytearray(good[data[0]])
    zeroed[-40:] = bytes(40)
    (whole / data[0]).write_bytes(zeroed)
    check(data[0], f"{data[0]} is damaged")


def signed(text):
    """A manifest with a right checksum, whatever it says."""
    body = json.dumps(text, separators=(",", ":")).encode()[:-1]
    return body + b',\n"sha256":"%s"}\n' % hashlib.sha256(body).hexdigest().encode()


def test_manifests_that_contradict_themselves_are_refused(tmp_path):
    ff.save(RT, tmp_path / "c", {"a": torch.ones(2, 3), "b": torch.ones(4), "n": 1})
    good = json.loads((tmp_path / "c/manifest.json").read_bytes())
    del good["sha256"]
    assert validation.from_bytes(signed(good), "x").leaves[2].value == "1"
    piece = ("leaves", 0, "pieces", 0)
    edits = {
        ("format",): ["other", None],
        ("version",): [2, "1", None],
        ("save_id",): ["x" * 32, 1],
        ("block",): [1],
        ("world_size",): [0, "1"],
        ("created",): ["now"],
        ("files", 0, "name"): ["../r00000-000.safetensors", "/etc/passwd", "data/../x", "manifest.json", 3],
        ("files", 0, "bytes"): [-1, 1 << 70, 1.5],
        ("files",): [[], good["files"] * 2, {}],
        ("tree", "c"): [[0, 1], [0, 1, 1], [0, 1, 9], [0, 1, -1], [0, 1, 2.0], [0, 1, None], 3],
        ("tree", "k"): [["a", "a", "n"], ["a"], ["a", [], "n"], ["a", 1.5, "n"]],
        ("tree", "t"): ["set", None],
        ("leaves", 0, "kind"): ["pickle", [], None],
        ("leaves", 0, "dtype"): ["object", "float64", []],
        ("leaves", 0, "shape"): [[2, 4], [-2, -3], [6], [1 << 60, 1 << 60], [1] * 65, "23", [True, 6]],
        ("leaves", 0, "alias"): [0, 1, -1, 2],
        ("leaves", 1, "alias"): [0, 1, 2],
        ("leaves", 2, "v"): ["0x", "1e5", None, [], "9" * 5000],
        ("leaves", 0, "pieces"): [[], good["leaves"][0]["pieces"] * 2, good["leaves"][1]["pieces"]],
        (*piece, "file"): [1, -1],
        (*piece, "bytes"): [0, 25],
        (*piece, "offset"): [[1, 0], [0], [0, -1]],
        (*piece, "shape"): [[1, 3], [3, 3]],
        (*piece, "crc32"): [[], [1, 2], [-1], [1 << 32]],
    }  # fmt: skip
    edits[*piece, "start"] = [
        start for start in (0, 1, 16, 1 << 61) if start != good["leaves"][0]["pieces"][0]["start"]
    ]
    for place, values in edits.items():
        for value in values:
            text = json.loads(json.dumps(good))
            inner = text
            for part in place[:-1]:
                inner = inner[part]
            inner[place[-1]] = value
            (tmp_path / "c/manifest.json").write_bytes(signed(text))
            with pytest.raises(CheckpointError, match="manifest.json"):
                ff.load(RT, tmp_path / "c")
    for body in (b"[]", b"{", b"[" * 100_000, b"\xff", b'{"format":"fabricfn-checkpoint","version":1'):
        data = body + b',\n"sha256":"%s"}\n' % hashlib.sha256(body).hexdigest().encode()
        with pytest.raises(CheckpointError):
            validation.from_bytes(data, "x")
    with pytest.raises(CheckpointError, match="format version 2, this fabricfn reads version 1"):
        validation.from_bytes(signed(good | {"version": 2}), "x")


def test_an_alias_that_calls_itself_nothing_is_refused(tmp_path):
    """Found by the fuzzer: it was loaded as None."""
    tied = torch.ones(2)
    ff.save(RT, tmp_path / "c", {"a": tied, "b": tied})
    text = json.loads((tmp_path / "c/manifest.json").read_bytes())
    del text["sha256"]
    assert text["leaves"][1]["alias"] == 0
    text["leaves"][1]["kind"] = "none"
    (tmp_path / "c/manifest.json").write_bytes(signed(text))
    with pytest.raises(CheckpointError, match="a leaf of kind 'none' has what arrays have"):
        ff.load(RT, tmp_path / "c")


def test_an_array_in_pieces_is_put_together_and_overlaps_are_refused(tmp_path):
    """Shards as several ranks will write them: a grid of pieces, over two files."""
    full = torch.arange(7.0 * 5).reshape(7, 5)

    def written(folder, boxes):
        names = ["data/r00000-000.safetensors", "data/r00001-000.safetensors"]
        (folder / "data").mkdir(parents=True)
        leaf = manifest.Leaf(kind="tensor", dtype="float32", shape=(7, 5))
        ends = [0, 0]
        pieces = []
        for number, (offset, shape) in enumerate(boxes):
            size = 4 * shape[0] * shape[1]
            pieces.append(
                manifest.Piece(file=number % 2, offset=offset, shape=shape, start=ends[number % 2], size=size)
            )
            ends[number % 2] += size
        found = []
        sizes = []
        for index, name in enumerate(names):
            entries = [(f"0.{i}", leaf, piece) for i, piece in enumerate(pieces) if piece.file == index]
            parts = []
            for _, _, piece in entries:
                (row, column), (height, width) = piece.offset, piece.shape
                part = full[row : row + height, column : column + width].contiguous()
                parts.append([memoryview(part.numpy()).cast("B")])
            size, checksums = writing.write_file(str(folder / name), writing.header("0" * 32, entries), parts)
            sizes.append((name, size))
            found += [
                (int(key[2:]), dataclasses.replace(piece, crc32=crc))
                for (key, _, piece), crc in zip(entries, checksums, strict=True)
            ]
        leaf = dataclasses.replace(leaf, pieces=tuple(piece for _, piece in sorted(found)))
        content = manifest.Manifest(
            save_id="0" * 32, created=0.0, world_size=2, strategy="fsdp", tree=0, leaves=(leaf,), files=tuple(sizes)
        )
        (folder / "manifest.json").write_bytes(manifest.to_bytes(content))
        return folder

    rows = [((0, 0), (4, 5)), ((4, 0), (3, 5))]
    grid = [((0, 0), (4, 2)), ((0, 2), (4, 3)), ((4, 0), (3, 1)), ((4, 1), (3, 4))]
    for name, boxes in [("rows", rows), ("grid", grid)]:
        path = written(tmp_path / name, boxes)
        assert bits(ff.load(RT, path)) == bits(full)
        assert bits(ff.load(RT, path, torch.zeros(5, 7).t())) == bits(full)
        ff.verify_checkpoint(path)
    bad = {
        "hole": [((0, 0), (4, 5)), ((5, 0), (2, 5))],
        "rows": [((0, 0), (4, 5)), ((3, 0), (3, 5))],
        "cells": [((0, 0), (4, 2)), ((0, 1), (4, 3)), ((4, 0), (3, 1)), ((4, 1), (3, 4))],
    }
    for name, boxes in bad.items():
        with pytest.raises(CheckpointError, match="overlap|as many elements"):
            ff.load(RT, written(tmp_path / f"bad-{name}", boxes))


def test_blocks_are_checked_across_chunk_borders(tmp_path, monkeypatch):
    monkeypatch.setattr(writing, "BLOCK", 1000)
    sizes = (0, 1, 999, 1000, 1001, 2500)
    data = bytes(range(256)) * 40
    for first in sizes:
        for second in sizes:
            chunks = [memoryview(data)[:first], memoryview(data)[first : first + second]]
            path = tmp_path / f"{first}-{second}"
            _, (checksums,) = writing.write_file(str(path), b"", [chunks])
            whole = data[: first + second]
            assert path.read_bytes() == whole
            assert list(checksums) == [zlib.crc32(whole[at : at + 1000]) for at in range(0, len(whole), 1000)]
