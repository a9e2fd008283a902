"""The package's network gives the field it gave when its weights were released.

A body painted by arithmetic, its double moved by a known shift, described and predicted
on a small grid of the network's voxels. golden.json beside this file holds every 12th
vector along each axis. New weights, or a change that is meant to alter the field, need
another one:

    python -m tests.registration.test_golden
"""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from unireg_jax.imaging import preprocess
from unireg_jax.imaging.grids import Grid
from unireg_jax.imaging.nifti import Volume
from unireg_jax.registration import load_model, selftest, weights
from unireg_jax.registration.compiled import compile_register
from unireg_jax.tasks import PairType, Region

FILE = Path(__file__).with_name("golden.json")
COMMAND = "python -m tests.registration.test_golden"
SHAPE = (64, 48, 64)
SHIFT_MM = (8.0, -5.0, 6.0)
CONDITIONS = ((Region.CHEST, PairType.INTRA), (Region.HEADNECK, PairType.INTER))
TOLERANCE = 1e-3  # voxel
_KEPT = (slice(None), *(slice(5, None, 12),) * 3)


def package_model():
    """The package's own, whatever $UNIREG_WEIGHTS says."""
    return load_model(weights.PACKAGE / weights.DEFAULT)


def compiled(model):
    """Program of the small grid; vectors are as long as on the network's own."""
    return compile_register(
        model,
        SHAPE,
        conditions=len(CONDITIONS),
        unit_shape=model.preprocess.shape,
    )


def field(program, spec):
    """Kept vectors of the pair under both conditions, [2, 5, 4, 5, 3], voxels."""
    place = np.diag([*spec.spacing_mm, 1.0])
    place[:3, 3] = -np.array(spec.spacing_mm) * (np.array(SHAPE) - 1) / 2
    pair = (
        preprocess.prepare_image(
            Volume(selftest.torso(shift), selftest.vox2world()),
            Grid(SHAPE, place),
            spec,
        )
        for shift in ((0.0, 0.0, 0.0), SHIFT_MM)
    )
    codes = (np.array(c) for c in zip(*CONDITIONS, strict=True))
    return np.asarray(program(*pair, *codes))[_KEPT]


@pytest.fixture(scope="module")
def model():
    if jax.default_backend() != "cpu":
        pytest.skip("the golden is a CPU's: matrix units round")
    return package_model()


@pytest.fixture(scope="module")
def program(model):
    return compiled(model)


@pytest.fixture(scope="module")
def golden(model):
    """Vectors that the shipped weights gave."""
    kept = json.loads(FILE.read_text())
    shipped = model.spec["sha256"]
    assert kept["weights_sha256"] == shipped, (
        f"{FILE.name} is of the weights {kept['weights_sha256'][:16]}, the package "
        f"ships {shipped[:16]}: run `{COMMAND}`, read what it prints, commit the file"
    )
    return np.array(kept["vectors"], np.float32)


def test_field_of_the_shipped_weights_is_reproduced(model, program, golden):
    got = field(program, model.preprocess)
    worst = np.abs(got - golden).max()
    assert worst < TOLERANCE, (
        f"the field moved by up to {worst:.2g} voxel: a change of what the network "
        f"computes; if it is meant, run `{COMMAND}`"
    )
    # A golden of zeros would be reproduced by any broken network.
    assert np.abs(golden).max(axis=(1, 2, 3)).min() > 1


@pytest.mark.parametrize("name", ["backbone/encoder_0/kernel", "head/controller/bias"])
def test_one_weight_off_by_a_hundredth_is_seen(model, program, golden, name):
    def nudge(path, leaf):
        here = "/".join(key.key for key in path) == name
        return leaf.at[(0,) * leaf.ndim].add(1e-2) if here else leaf

    params = jax.tree_util.tree_map_with_path(nudge, model.params)
    other = dataclasses.replace(program, _params=params)
    assert np.abs(field(other, model.preprocess) - golden).max() > TOLERANCE


def main() -> None:
    """Writes golden.json anew and says by how much it differs."""
    model = package_model()
    vectors = field(compiled(model), model.preprocess)
    if FILE.is_file():
        before = np.array(json.loads(FILE.read_text())["vectors"])
        print(f"largest change: {np.abs(vectors - before).max():.3g} voxel")
    kept = {
        "weights_sha256": model.spec["sha256"],
        "command": COMMAND,
        "vectors": np.round(vectors.astype(np.float64), 4).tolist(),
    }
    FILE.write_text(json.dumps(kept, separators=(",", ":")) + "\n")
    print(f"{FILE.name}: {vectors.shape}, up to {np.abs(vectors).max():.2f} voxel")


if __name__ == "__main__":
    main()
