"""The arithmetic of the ablations: intervals, landmark errors, tables."""

import itertools

import numpy as np
import pytest

from experiments import ablations, mr_results
from unireg_jax.imaging.grids import Grid
from unireg_jax.imaging.nifti import Volume
from unireg_jax.imaging.points import PointPairs
from unireg_jax.registration.sweeps import Sweep

PAIRS = [{"patients": pair} for pair in itertools.permutations("abcd", 2)]


def test_interval_is_that_of_draws_of_patients():
    assert ablations.interval(PAIRS, np.full(12, 5.0)) == pytest.approx((5, 5))
    # Pairs with patient a are worse: draws without a, and with much of a, differ.
    worse = np.array(["a" in pair["patients"] for pair in PAIRS], float)
    low, high = ablations.interval(PAIRS, worse)
    assert low == 0 and high == 1
    three = [{"patients": pair} for pair in itertools.permutations("abc", 2)]
    assert np.isnan(ablations.interval(three, np.ones(6))).all()


def test_landmark_errors_follow_displacement_then_alignment():
    place = np.diag([4.0, 5.0, 6.0, 1.0])
    place[:3, 3] = (-10, 3, 7)
    matrix = np.array(
        [[0, -1, 0, 3.0], [1, 0, 0, -2.0], [0, 0, 1.1, 5.0], [0, 0, 0, 1]]
    )
    shift = np.array([2.0, -3.0, 1.5])
    found = Sweep([], {}, Grid((8, 7, 6), place), matrix, None, {}, ())
    fixed = place[:3, 3] + np.array([[5.0, 9.0, 11.0], [13.0, 8.0, 20.0]])
    moving = (fixed + shift) @ matrix[:3, :3].T + matrix[:3, 3]
    moving[1, 0] += 2.5
    field = np.broadcast_to(shift, (8, 7, 6, 3))
    pairs = PointPairs(["1", "2"], fixed, moving)
    got = ablations._landmark_errors(field, found, pairs)
    np.testing.assert_allclose(got, [0, 2.5], atol=1e-4)


def test_table_compares_with_the_right_condition():
    rows = []
    for n, pair in enumerate(PAIRS):
        for region, kind, score in (
            (None, None, 40.0),
            ("headneck", "inter", 50.0 + n),
            ("chest", "inter", 49.0 + n),
        ):
            rows.append(
                {"group": "headneck", "region": region, "type": kind, "dsc": 0.5}
                | {"patients": pair["patients"], "score": score, "shift_mm": 1.0}
                | {"fold_percent_network": 0.25, "sdlogj_network": 0.5}
            )
    text = ablations.table_of_conditions(rows, "headneck").splitlines()
    assert text[2].startswith("| pre-alignment alone | 40.00 (40.00 … 40.00) | -15.50")
    assert text[3].startswith("| **headneck, inter** (right) | 55.50")
    assert "| -1.00 (-1.00 … -1.00) | < 0.001 | 1.00 | 0.25 | 0.50 |" in text[4]


def test_mr_is_stretched_to_air_and_tissue():
    data = np.linspace(0, 200, 1001).reshape(7, 11, 13).astype(np.float32)
    hu = mr_results.stretched(Volume(data, np.eye(4), warnings=("hu_range: x",)))
    assert hu.data.dtype == np.int16 and hu.warnings == ()
    assert hu.data.min() == -1000 and 195 < hu.data.max() < 210
