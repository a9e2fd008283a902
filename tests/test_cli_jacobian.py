"""`unireg jacobian`: its statistics are those of the map that it writes."""

import json

import nibabel as nib
import numpy as np
import pytest

from tests.test_cli import write
from unireg_jax import __main__ as cli
from unireg_jax.imaging import mapping

PLACE = np.diag([2.0, 3.0, 4.0, 1.0])  # LPS mm


def measure(capsys, transform, fixed, *more):
    """The statistics that the command prints."""
    words = ("jacobian", "-t", transform, "-f", fixed, "--json", *more)
    assert cli.main([str(word) for word in words]) == 0
    return json.loads(capsys.readouterr().out)


def stretched(shape):
    """A map in mm whose slope along the first axis falls from 1.3 to -0.5."""
    slope = np.linspace(0.3, -1.5, shape[0])
    along = np.concatenate([[0], np.cumsum(slope[:-1])]) * PLACE[0, 0]
    disp = np.zeros((*shape, 3), np.float32)
    disp[..., 0] = along[:, None, None]
    return disp


@pytest.mark.parametrize("masked", [False, True])
def test_jacobian_prints_what_is_in_its_map(tmp_path, capsys, masked):
    shape = (40, 7, 6)
    transform, out = tmp_path / "t.h5", tmp_path / "j.nii"
    mapping.write(transform, mapping.field(stretched(shape), PLACE))
    fixed = write(tmp_path / "f.nii", np.zeros(shape, np.int16), PLACE)
    mask = np.zeros(shape, np.uint8)
    mask[4:36, 1:5, 2:] = 1
    more = ("--mask", write(tmp_path / "mask.nii", mask, PLACE)) if masked else ()
    found = measure(capsys, transform, fixed, "-o", out, *more)
    detj = nib.load(out).get_fdata()
    detj = detj[mask > 0] if masked else detj
    ending = "" if masked else "_whole"
    expected = {
        "voxels": detj.size,
        "mean": detj.mean(),
        "min": detj.min(),
        "p1": np.percentile(detj, 1),
        "p99": np.percentile(detj, 99),
        "max": detj.max(),
        f"sdlogj{ending}": np.log(np.maximum(detj, 1e-9)).std(),
        f"fold_percent{ending}": 100 * (detj <= 0).mean(),
        "beyond_percent": 0.0,
    }
    for name, value in expected.items():
        # The map is float32.
        assert found[name] == pytest.approx(value, rel=1e-5, abs=1e-9), name
    assert found["min"] <= found["p1"] < 0 < found["p99"] <= found["max"]
    assert 5 < found[f"fold_percent{ending}"] < 40


def test_jacobian_leaves_out_where_the_field_ends(tmp_path, capsys):
    """Beyond it nothing moves: the jump at its rim is no fold of the transform."""
    far = np.zeros((10, 12, 11, 3), np.float32)
    far[..., 0] = 30.0  # mm
    mapping.write(tmp_path / "t.h5", mapping.field(far, PLACE))
    fixed = write(tmp_path / "f.nii", np.zeros((20, 12, 11), np.int16), PLACE)
    found = measure(capsys, tmp_path / "t.h5", fixed)
    # Of 20 slices 10 are beyond, and one beside them looks there.
    assert found["voxels"] == 9 * 12 * 11
    assert found["beyond_percent"] == pytest.approx(100 * 11 / 20)
    assert found["min"] == pytest.approx(1) == found["max"]
    assert found["fold_percent_whole"] == 0
