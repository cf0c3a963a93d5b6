"""What checkpoints cost: 384 MiB written to the disk and read from the page cache, against bare files and the peers."""

import contextlib
import importlib.util
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

import fabricfn as ff
from tests.benchmarks.timing import Contenders, clock_of, interleaved

ROWS, COLUMNS, TENSORS = 4096, 1024, 24  # of float32: 24 tensors of 16 MiB


def tensors(device: str = "cpu", count: int = TENSORS) -> dict[str, torch.Tensor]:
    """By default 384 MiB; of numbers that do not compress."""
    generator = torch.Generator().manual_seed(0)
    return {f"layer{index}": torch.randn(ROWS, COLUMNS, generator=generator).to(device) for index in range(count)}


def installed(package: str) -> bool:
    """Whether a peer can be measured."""
    return importlib.util.find_spec(package) is not None


def flushed(path: Path) -> None:
    """What a peer wrote, on the disk as ours is."""
    for file in [path] if path.is_file() else path.rglob("*"):
        if file.is_file():
            with open(file, "rb") as opened:
                os.fsync(opened.fileno())


def write_bare(path: Path, parts: list[torch.Tensor]) -> None:
    """The bytes alone: one file, one fsync."""
    with open(path, "wb", buffering=0) as file:
        for part in parts:
            file.write(memoryview(part.cpu().numpy()).cast("B"))
        os.fsync(file.fileno())


def fabric_saver(state: dict[str, torch.Tensor], device: str) -> dict[str, Callable[[Path], object]]:
    """Lightning Fabric's `save`, where it is installed."""
    if not installed("lightning_fabric") and not installed("lightning"):
        return {}
    from lightning_fabric import Fabric

    fabric = Fabric(accelerator=device, devices=1)
    return {"Lightning Fabric": lambda path: (fabric.save(path, {"model": state}), flushed(path))}


def accelerate_saver(state: dict[str, torch.Tensor], device: str) -> dict[str, Callable[[Path], object]]:
    """Accelerate's `save_state` of a model with these parameters, where it is installed."""
    if not installed("accelerate"):
        return {}
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=device == "cpu")
    module = torch.nn.ParameterDict({name: torch.nn.Parameter(value) for name, value in state.items()})
    accelerator.prepare(module)
    return {"Accelerate": lambda path: (accelerator.save_state(str(path)), flushed(path))}


def measure_save(rounds: int, device: str = "cpu", count: int = TENSORS) -> dict[str, float]:
    """Median seconds of a save into a new place, everything on the disk, one process."""
    torch.set_num_threads(1)
    rt, state = ff.init_runtime(accelerator=device, devices=1), tensors(device, count)
    values = list(state.values())
    savers: dict[str, Callable[[Path], object]] = {
        "bare": lambda path: write_bare(path, values),
        "bare again (noise)": lambda path: write_bare(path, values),
        "fabricfn": lambda path: ff.save(rt, path, {"model": state}),
        "torch.save": lambda path: (torch.save(state, path), flushed(path)),
        "DCP": lambda path: (dcp.save({"model": state}, checkpoint_id=path, no_dist=True), flushed(path)),
        **fabric_saver(state, device),
        **accelerate_saver(state, device),
    }
    with new_places() as (place, clean):
        contenders: Contenders = {name: lambda save=save: save(place) for name, save in savers.items()}
        return interleaved(contenders, rounds, clock_of(device), warmup=1, between=clean, again=True)


@contextlib.contextmanager
def new_places() -> Generator[tuple[Path, Callable[[], None]]]:
    """A path, and what removes everything there and lets the disk come to rest."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "there"

        def clean() -> None:
            shutil.rmtree(place, ignore_errors=True)
            place.unlink(missing_ok=True)
            os.sync()

        yield place, clean


def measure_load(rounds: int, device: str = "cpu", count: int = TENSORS) -> dict[str, float]:
    """Median seconds of a load into new tensors, from the page cache, one process; ours checks every byte."""
    torch.set_num_threads(1)
    rt, state = ff.init_runtime(accelerator=device, devices=1), tensors(device, count)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ff.save(rt, folder / "ours", state)
        torch.save(state, folder / "torch")
        safetensors.torch.save_file(state, folder / "safetensors")
        dcp.save(state, checkpoint_id=folder / "dcp", no_dist=True)

        def load_dcp() -> None:
            into = {key: torch.empty_like(value) for key, value in state.items()}
            dcp.load(into, checkpoint_id=folder / "dcp", no_dist=True)

        contenders: Contenders = {
            "DCP": load_dcp,
            "DCP again (noise)": load_dcp,
            "fabricfn": lambda: ff.load(rt, folder / "ours", state),
            "torch.load": lambda: torch.load(folder / "torch", weights_only=True),
            "safetensors, copied": lambda: {
                key: value.clone() for key, value in safetensors.torch.load_file(folder / "safetensors", device).items()
            },
        }
        return interleaved(contenders, rounds, clock_of(device), warmup=1, again=True)


def measure_sharded(rt: ff.Runtime, rounds: int) -> dict[str, dict[str, float]]:
    """Median seconds on two ranks, half of every tensor on each: saved to the disk, and loaded from the page cache."""
    torch.set_num_threads(1)
    mesh = init_device_mesh("cpu", (rt.world_size,))
    state = {key: distribute_tensor(value, mesh, [Shard(0)]) for key, value in tensors().items()}
    parts = [value.to_local() for value in state.values()]
    root = Path(ff.run_once(rt, tempfile.mkdtemp))

    def bare() -> None:
        write_bare(root / f"bare{rt.rank}", parts)
        ff.barrier(rt)

    def save_dcp() -> None:
        dcp.save({"model": state}, checkpoint_id=root / "dcp")
        if rt.rank == 0:
            flushed(root / "dcp")
        ff.barrier(rt)

    def clean() -> None:
        ff.barrier(rt)
        if rt.rank == 0:
            for path in root.iterdir():
                shutil.rmtree(path, ignore_errors=True)
                path.unlink(missing_ok=True)
            os.sync()
        ff.barrier(rt)

    saved = interleaved(
        {
            "bare": bare,
            "bare again (noise)": bare,
            "fabricfn": lambda: ff.save(rt, root / "ours", {"model": state}),
            "DCP": save_dcp,
        },
        *(rounds, time.perf_counter, 1, clean, True),
    )
    ff.save(rt, root / "ours", {"model": state})
    save_dcp()

    def load_dcp() -> None:
        into = {key: fresh(value) for key, value in state.items()}
        dcp.load({"model": into}, checkpoint_id=root / "dcp")
        ff.barrier(rt)

    loaded = interleaved(
        {
            "DCP": load_dcp,
            "DCP again (noise)": load_dcp,
            "fabricfn": lambda: ff.load(rt, root / "ours", {"model": state}),
        },
        *(rounds, time.perf_counter, 1, lambda: None, True),
    )
    clean()
    ff.run_once(rt, root.rmdir)
    return {"save": saved, "load": loaded}


def fresh(value: DTensor) -> DTensor:
    """A DTensor like it, of new memory."""
    return DTensor.from_local(torch.empty_like(value.to_local()), value.device_mesh, value.placements, run_check=False)


def measure_stall(rounds: int) -> dict[str, float]:
    """Median seconds for which a save that does not block keeps the caller, against one copy into memory in use."""
    torch.set_num_threads(1)
    rt, state = ff.init_runtime(accelerator="cpu", devices=1), tensors()
    buffers = {key: torch.empty_like(value).copy_(value) for key, value in state.items()}
    running: list[Any] = []

    def copy() -> None:
        for key, value in state.items():
            buffers[key].copy_(value)

    with new_places() as (place, clean):

        def settle() -> None:
            while running:
                running.pop().wait()
            clean()

        contenders: Contenders = {
            "copy": copy,
            "copy again (noise)": copy,
            "fresh clones": lambda: [value.clone() for value in state.values()],
            "fabricfn": lambda: running.append(ff.save(rt, place, state, blocking=False)),
        }
        try:
            return interleaved(contenders, rounds, time.perf_counter, warmup=2, between=settle)
        finally:
            settle()


def bytes_read() -> int:
    """What this process has asked the system to read."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(lines[0].removeprefix("rchar: "))


def measure_partial(rt: ff.Runtime, rounds: int) -> dict[str, dict[str, float]]:
    """The bytes that a rank of two reads when it loads a part, and those that it needs."""
    state = {"layer": torch.zeros(ROWS, COLUMNS), **tensors()}
    folder = ff.run_once(rt, tempfile.mkdtemp)
    ff.save(rt, folder + "/ours", state)
    mesh = init_device_mesh("cpu", (rt.world_size,))
    found: dict[str, dict[str, float]] = {}
    for name, placement in (("rows", Shard(0)), ("columns", Shard(1))):
        like = {"layer": distribute_tensor(state["layer"], mesh, [placement])}
        before = bytes_read()
        ff.load(rt, folder + "/ours", like)
        found[name] = {"needed": float(like["layer"].to_local().nbytes), "fabricfn": float(bytes_read() - before)}
    before = bytes_read()
    ff.load(rt, folder + "/ours", only="layer3")
    found["one"] = {"needed": ROWS * COLUMNS * 4.0, "fabricfn": float(bytes_read() - before)}
    ff.barrier(rt)
    ff.run_once(rt, lambda: shutil.rmtree(folder))
    return found
