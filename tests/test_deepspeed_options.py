"""DeepSpeed's options are checked, its names and files are read, and what cannot run says so."""

import json
import subprocess
import sys

import pytest

import fabricfn as ff
from fabricfn import testing
from fabricfn.errors import CapabilityError, ConfigurationError
from tests.support.zero_stages import SINGLE, made, strategy

pytest.importorskip("deepspeed", reason='the extra "test" has it')


def test_threads_are_refused():
    with testing.threads(2) as world, pytest.raises(CapabilityError, match=r"ranks are processes.*processes\(n\)"):
        world.run(lambda rt: ff.setup_model(rt, made()), strategy=strategy({}), precision=SINGLE)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"stage": 4}, ConfigurationError, "there are 0, 1, 2 and 3"),
        ({"stage": 1, "config": {"zero_optimization": {"stage": 2}}}, ConfigurationError, "differs"),
        ({"offload_optimizer": "gpu"}, ConfigurationError, 'None and "cpu"'),
        ({"stage": 2, "offload_param": "cpu"}, ConfigurationError, "needs stage 3"),
        ({"stage": 0, "offload_optimizer": "cpu"}, ConfigurationError, "needs stage 1"),
        ({"stage": 3, "offload_param": "nvme"}, CapabilityError, "deepspeed_stage_3_offload"),
        ({"config": {"gradient_clipping": 1.0}}, ConfigurationError, "clip_gradients"),
        ({"config": {"optimizer": {"type": "Adam"}, "bf16": {"enabled": True}}}, ConfigurationError, "setup_optimizer"),
        ({"config": "no such file.json"}, ConfigurationError, "cannot be read"),
    ],
)
def test_options_are_checked(options, error, match):
    with pytest.raises(error, match=match):
        strategy(options)


def test_names_and_files(tmp_path):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"train_batch_size": "auto", "zero_optimization": {"stage": 3}}))
    assert ff.strategies.deepspeed(config=path).name == "deepspeed_stage_3"
    for name, expected in (
        ("deepspeed", "deepspeed_stage_2"),
        ("deepspeed_stage_1", "deepspeed_stage_1"),
        ("deepspeed_stage_1_offload", "deepspeed_stage_1_offload"),
        ("deepspeed_stage_3_offload", "deepspeed_stage_3_offload"),
    ):
        assert ff.strategies.resolve(name, 2).name == expected
    with pytest.raises(CapabilityError, match="nvme"):
        ff.strategies.resolve("deepspeed_stage_3_offload_nvme", 2)


def test_a_missing_package_is_a_clear_error():
    code = """if True:
        import sys
        sys.modules["deepspeed"] = None
        import fabricfn as ff
        try:
            ff.strategies.resolve("deepspeed", 2)
        except ff.errors.CapabilityError as error:
            assert 'pip install "fabricfn[deepspeed]"' in str(error), error
        else:
            raise SystemExit("it was found")
    """
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
