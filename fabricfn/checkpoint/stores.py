"""Where a checkpoint is written: the functions of one place, by its path."""

import os

from fabricfn.checkpoint.exporting import export_beside
from fabricfn.checkpoint.format.manifest import DATA
from fabricfn.checkpoint.format.writing import write_file
from fabricfn.checkpoint.storage import commit
from fabricfn.checkpoint.storage.objects import Options, local_path, url_of
from fabricfn.checkpoint.storage.store import Clear, Parts, Store
from fabricfn.checkpoint.storage.uploading import store_at_url


def store_at(path: str | os.PathLike[str], options: Options = None) -> Store:
    """The store of a path or URL; nothing is looked at or asked yet."""
    url = url_of(path)
    if url is not None:
        return store_at_url(url, options)
    target = local_path(path)

    def begin(save_id: str) -> Clear:
        commit.check_target(target)
        work, lock = commit.work_folder(target, save_id)
        return lambda: commit.clear(work, target, lock)

    def write(save_id: str, name: str, head: bytes, size: int, parts: Parts) -> tuple[int, list[tuple[int, ...]]]:
        return write_file(str(commit.work_at(target, save_id) / name), head, parts())

    return Store(
        path=target,
        name=str(target),
        file_name=lambda save_id, rank: f"{DATA}/r{rank:05d}-000.safetensors",
        begin=begin,
        write=write,
        export=lambda save_id, manifest: export_beside(commit.work_at(target, save_id), manifest),
        commit=lambda save_id, manifest: commit.commit(commit.work_at(target, save_id), target, manifest),
    )
