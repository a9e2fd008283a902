"""Passes of the network: how their fields are composed, and both ways averaged."""

import jax.numpy as jnp
import numpy as np
import pytest

from unireg_jax.ops import warp
from unireg_jax.registration import prediction
from unireg_jax.tasks import OUTSIDE_HU
from unireg_jax.verbs import results

SHAPE = (20, 16, 24)


def waves(scale):
    """A smooth field, [1, X, Y, Z, 3], that is zero on the outer faces."""
    x, y, z = np.meshgrid(*(np.linspace(0, np.pi, n) for n in SHAPE), indexing="ij")
    bump = np.sin(x) * np.sin(y) * np.sin(z)
    field = np.stack([bump, -0.7 * bump * np.cos(z), 0.5 * bump * np.cos(x)], -1)
    return (scale * field[None]).astype(np.float32)


def test_prewarp_reads_hu_and_keeps_the_marker():
    rng = np.random.default_rng(0)
    hu = rng.integers(-1000, 500, (6, 7, 8)).astype(np.int16)
    hu[5] = OUTSIDE_HU
    disp = np.zeros((1, 6, 7, 8, 3), np.float32)
    disp[..., 0], disp[..., 2] = 1.0, -2.0
    moved = prediction.prewarp(hu, disp)
    np.testing.assert_array_equal(moved[:4, :, 2:], hu[1:5, :, :-2])
    assert (moved[4:] == OUTSIDE_HU).all() and (moved[:, :, :2] == OUTSIDE_HU).all()


def test_prewarp_keeps_the_outer_slices_of_a_scan_that_hardly_moves():
    hu = np.arange(6 * 7 * 8, dtype=np.int16).reshape(6, 7, 8)
    disp = np.full((1, 6, 7, 8, 3), 0.4, np.float32)
    near, far = (prediction.prewarp(hu, k * disp) for k in (1.0, 1.5))
    assert (near[-1, -1, -1], far[-1, -1, -1]) == (hu[-1, -1, -1], OUTSIDE_HU)
    assert (near != OUTSIDE_HU).all() and (far == OUTSIDE_HU).sum() == 6 * 7 * 8 - 210


def test_mean_of_a_field_and_its_own_inverse_is_the_field():
    field = jnp.asarray(waves(2.0))
    back = warp.invert(field)
    # 2 voxels on a grid of 16: what linear interpolation leaves of the inverse.
    np.testing.assert_allclose(prediction.mean_of_ways(field, back), field, atol=0.03)


def test_mean_of_ways_of_one_answer_to_both_leaves_equal_scans_where_they_are():
    # f(a, a) is one field, whichever way round: u + u^-1 is of second order.
    field = jnp.asarray(waves(0.5))
    mean = np.asarray(prediction.mean_of_ways(field, field))
    assert np.abs(field).max() > 0.45
    assert np.abs(mean).max() < 0.05


@pytest.mark.parametrize("start", [None, waves(1.0)])
def test_every_pass_sees_the_scan_as_warped_so_far(start):
    rng = np.random.default_rng(1)
    hu = rng.integers(-1000, 500, SHAPE).astype(np.int16)
    answers = [waves(1.5), waves(-0.8)[..., ::-1], waves(0.4)]
    seen = []

    def one_pass(number, moving_hu):
        assert number == len(seen) + 1
        seen.append(moving_hu)
        return answers[len(seen) - 1]

    total = prediction.in_passes(hu, one_pass, passes=3, start=start)
    so_far = np.zeros_like(answers[0]) if start is None else start
    for image, answer in zip(seen, answers, strict=True):
        np.testing.assert_array_equal(image, prediction.prewarp(hu, so_far))
        # total(x) = u(x) + so_far(x + u(x)), by interpolation of its own.
        so_far = answer + np.asarray(warp.warp(jnp.asarray(so_far), answer))
    np.testing.assert_allclose(total, so_far, atol=1e-5)
    swapped = answers[1] + answers[0]
    assert (
        np.abs(np.asarray(warp.compose(answers[1], answers[0])) - swapped).max() > 0.1
    )


def test_one_pass_is_the_answer_itself():
    hu = np.zeros(SHAPE, np.int16)
    answer = waves(1.5)
    total = prediction.in_passes(hu, lambda number, moving: answer, passes=1)
    np.testing.assert_array_equal(total, answer)


@pytest.mark.parametrize("passes", [0, -1, 1.5, prediction.MOST_PASSES + 1])
def test_number_of_passes_is_checked(passes):
    with pytest.raises(ValueError, match=f"passes must be 1 to .* got {passes}"):
        prediction.check(passes)


@pytest.mark.parametrize("passes", [2, np.int64(2)])
def test_number_of_passes_may_be_numpys(passes):
    checked = prediction.check(passes)
    assert checked == 2 and type(checked) is int  # a record in JSON takes no other


def test_choices_of_the_command_are_those_of_the_library():
    asked = (prediction.PASSES, prediction.MOST_PASSES, prediction.SYMMETRIC)
    assert (results.PASSES, results.MOST_PASSES, results.SYMMETRIC) == asked
