"""What `accelerator` and `devices` mean, on machines of every kind; `choose` is pure, so none is needed."""

import pytest
import torch

from fabricfn.accelerators import available, choose, describe, device_of
from fabricfn.errors import ConfigurationError
from fabricfn.precision import Precision, check_name

CPU = {"cpu": 1}
GPUS = {"cuda": 8, "cpu": 1}
MAC = {"mps": 1, "cpu": 1}
TPU = {"tpu": 8, "cuda": 1, "cpu": 1}
OTHER = {"xpu": 2, "cpu": 1}
ALL = tuple(range(8))


@pytest.mark.parametrize(
    ("accelerator", "devices", "found", "kind", "indices", "left_open"),
    [
        ("auto", "auto", TPU, "tpu", ALL, True),
        ("auto", "auto", GPUS, "cuda", ALL, True),
        ("auto", "auto", MAC, "mps", (0,), True),
        ("auto", "auto", CPU, "cpu", (0,), True),
        ("auto", "auto", OTHER, "cpu", (0,), True),  # other back ends by name only
        ("xpu", "auto", OTHER, "xpu", (0, 1), True),
        ("gpu", 2, GPUS, "cuda", (0, 1), False),
        ("gpu", 1, MAC, "mps", (0,), False),
        ("gpu", "auto", TPU, "cuda", (0,), True),
        ("cuda", -1, GPUS, "cuda", ALL, True),
        ("cuda", "-1", GPUS, "cuda", ALL, True),
        ("auto", "2", GPUS, "cuda", (0, 1), False),
        ("auto", [1, 4], GPUS, "cuda", (1, 4), False),
        ("auto", (4, 1), GPUS, "cuda", (4, 1), False),
        ("auto", "1, 4", GPUS, "cuda", (1, 4), False),
        ("auto", "3,", GPUS, "cuda", (3,), False),
        ("auto", [0], GPUS, "cuda", (0,), False),
        ("auto", None, GPUS, "cpu", (0,), True),
        ("auto", 0, GPUS, "cpu", (0,), True),
        ("auto", "0", GPUS, "cpu", (0,), True),
        ("cpu", 4, GPUS, "cpu", (0, 1, 2, 3), False),
        ("cpu", "4", CPU, "cpu", (0, 1, 2, 3), False),
        ("cpu", -1, CPU, "cpu", (0,), True),
        ("cpu", None, CPU, "cpu", (0,), True),
    ],
)
def test_what_the_arguments_mean(accelerator, devices, found, kind, indices, left_open):
    choice = choose(accelerator, devices, found)
    assert (choice.accelerator, choice.indices, choice.open) == (kind, indices, left_open)


@pytest.mark.parametrize(
    ("accelerator", "devices", "found", "says"),
    [
        ("gpu", 1, CPU, "a cpu only"),
        ("cuda", 1, MAC, "1 mps device and a cpu"),
        ("tpu", 1, GPUS, "8 cuda devices and a cpu"),
        ("npu", 1, GPUS, "8 cuda devices and a cpu"),
        ("cuda", 9, GPUS, "0 to 7"),
        ("cuda", [0, 8], GPUS, "asks for cuda device 8"),
        ("mps", 2, MAC, 'Write devices=1, or accelerator="cpu", devices=2.'),
        ("auto", [0, 1], MAC, "is one device"),
        ("mps", [1], MAC, "1 mps device"),
        ("cpu", [0, 1], CPU, "devices=2"),
        ("cpu", "0, 1", CPU, "devices=2"),
        ("auto", [0], CPU, "devices=1"),
        ("cuda", None, GPUS, 'accelerator="cpu"'),
        ("gpu", 0, GPUS, "means the CPU"),
        ("auto", -2, GPUS, "not understood"),
        ("auto", "many", GPUS, "'many'"),
        ("auto", "", GPUS, "not understood"),
        ("auto", [], GPUS, "not understood"),
        ("auto", [1, 1], GPUS, "not understood"),
        ("auto", [-1], GPUS, "not understood"),
        ("auto", True, GPUS, "not understood"),
        ("auto", 1.5, GPUS, "not understood"),
    ],
)
def test_what_has_no_meaning_is_an_error_that_says_what_there_is(accelerator, devices, found, says):
    with pytest.raises(ConfigurationError) as caught:
        choose(accelerator, devices, found)
    assert says in str(caught.value)


def test_this_machine():
    found = available()
    assert found["cpu"] == 1
    assert found.get("cuda", 0) == torch.cuda.device_count()
    assert not torch.cuda.is_initialized()
    assert describe(found).endswith("a cpu") or describe(found) == "a cpu only"


def test_devices_of_torch():
    assert device_of("cpu", 3) == torch.device("cpu")
    assert device_of("cuda", 3) == torch.device("cuda", 3)
    assert device_of("xla", 3) == torch.device("xla", 0)  # a process has its own device only


@pytest.mark.parametrize(
    "precision",
    [
        *("64-true", 64, "double"),
        Precision(reduce_dtype=torch.float64),
        Precision(compute_dtype=torch.float64),
        Precision(output_dtype=torch.float64),
    ],
)
def test_an_apple_gpu_has_no_float64(precision):
    with pytest.raises(ConfigurationError, match='needs float64, which Apple GPUs .*accelerator="cpu"'):
        check_name(precision, "mps")
    for accelerator in ("cpu", "cuda"):
        check_name(precision, accelerator)


def test_an_apple_gpu_alone_serves_what_one_process_needs():
    choice = choose("auto", "auto", MAC)
    assert (choice.indices, choice.accelerator, device_of(choice.accelerator, 0)) == (
        (0,),
        "mps",
        torch.device("mps:0"),
    )
    for precision in ("32-true", "16-mixed", "bf16-mixed", "bf16-true", "16-true"):
        check_name(precision, "mps")
