"""Training on eight simulated devices gives what one gives, whatever is split."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Of how far SGD moved in two steps: float32 sums in another order.
BOUND = 1e-4
ROUNDING = 1.5e-8  # two steps of float32 at 0.1, the size of the parameters


def _checks(phantoms, tmp_path, mode):
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "tests.training.sharding_checks",
            str(phantoms),
            str(tmp_path),
            mode,
        ],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        },
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def _judge(found):
    assert found["moved"] > 1e-5
    for name, run in found["runs"].items():
        assert run["pairs"], name
        assert run["loss"] == pytest.approx(found["loss"], rel=1e-4), name
        assert run["params"] < BOUND * found["moved"] + ROUNDING, name
        assert run["ema"] < BOUND * found["moved"] + ROUNDING, name


@pytest.mark.slow
def test_split_volumes_and_accumulated_batches_train_as_one_device(phantoms, tmp_path):
    """Data x space, in parts, with overlapping organs; what does not divide is told."""
    found = _checks(phantoms, tmp_path, "quick")
    batch, parts, space = found["refused"]
    assert batch.startswith("2 config.data.batch_size: a multiple of 8"), batch
    assert "accumulate 3" in parts and parts.startswith("2 "), parts
    assert "a divisor of the 8 devices" in space, space
    _judge(found)


@pytest.mark.slow
def test_any_number_of_devices_trains_as_one(phantoms, tmp_path):
    """Same pairs, parameters within the bound; bit-identical twice, and restored."""
    found = _checks(phantoms, tmp_path, "all")
    _judge(found)
    assert found["restored"] == dict.fromkeys(("twice", "1", "2", "4", "8"), True)
