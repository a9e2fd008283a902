"""Views for the embedding: geometry, determinism, resume."""

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from data_pipeline import loader, synthetic, views
from unireg_jax.errors import UserError
from unireg_jax.tasks import OUTSIDE_HU

SPEC = views.ViewSpec(shape=(16, 32, 16), spacing_mm=6.0)
VOLUME_MM = (4.0, 5.0, 6.0)


def ramp(shape=(40, 36, 30)):
    """HU that tells the place: x + 3 y - 2 z in mm; a border outside the scan."""
    x, y, z = np.meshgrid(
        *(np.arange(n) * s for n, s in zip(shape, VOLUME_MM, strict=True)),
        indexing="ij",
    )
    hu = np.rint(x + 3 * y - 2 * z).astype(np.int16)
    hu[:2] = OUTSIDE_HU
    body = np.zeros(shape, bool)
    body[4:30, 5:30, 3:28] = True
    return hu, body


def drawn(spec, seed=0):
    hu, body = ramp()
    rng = np.random.default_rng(seed)
    return views.draw(hu, body, spec=spec, volume_mm=VOLUME_MM, position=7, rng=rng)


@pytest.mark.parametrize("degrees", [0.0, 20.0])
def test_views_show_the_place_that_their_matrix_says(degrees):
    for seed in range(5):
        batch = drawn(SPEC._replace(rotate_deg=degrees), seed)
        index = np.stack(
            np.meshgrid(*map(np.arange, SPEC.shape), indexing="ij"), axis=-1
        )
        for view in range(2):
            matrix = batch.vox2mm[view]
            mm = index @ matrix[:3, :3].T + matrix[:3, 3]
            shown = batch.hu[view, ..., 0]
            last = (np.array(ramp()[0].shape) - 1) * VOLUME_MM
            inner = ((mm > 16) & (mm < last)).all(axis=-1)
            assert inner.sum() > 200
            expected = mm @ np.array([1.0, 3.0, -2.0])
            # Rounded twice, and interpolated beside the scan's own border never.
            np.testing.assert_allclose(shown[inner], expected[inner], atol=1.5)
            assert (shown[(mm < -4).any(axis=-1)] == OUTSIDE_HU).all()


def test_views_have_their_scale_and_share_a_point():
    edges = []
    for seed in range(40):
        batch = drawn(SPEC._replace(apart=0.0, rotate_deg=15.0), seed)
        linear = batch.vox2mm[:, :3, :3]
        size = np.linalg.norm(linear, axis=1)
        np.testing.assert_allclose(size, size[:, :1].repeat(3, axis=1), rtol=1e-5)
        edges += list(size[:, 0] / SPEC.spacing_mm)
        # Some voxel of the first view lies inside the second.
        index = np.stack(np.meshgrid(*map(np.arange, SPEC.shape), indexing="ij"), -1)
        mm = index.reshape(-1, 3) @ linear[0].T + batch.vox2mm[0, :3, 3]
        there = np.linalg.solve(linear[1], (mm - batch.vox2mm[1, :3, 3]).T).T
        assert ((there >= 0) & (there <= np.array(SPEC.shape) - 1)).all(-1).any()
    assert 0.8 <= min(edges) < 0.85 and 1.15 < max(edges) <= 1.2


def test_contrast_changes_within_its_bounds():
    plain = drawn(SPEC)
    other = drawn(SPEC._replace(gain=0.1, shift_hu=20.0, noise_hu=0.0))
    same = plain.hu[0] != OUTSIDE_HU
    hu = plain.hu[0][same].astype(float)
    change = other.hu[0][same] - hu
    assert np.abs(change).max() > 5
    assert (np.abs(change) <= 0.1 * np.abs(hu) + 20 + 1).all()


def test_views_turn_as_far_as_asked():
    """About each axis: a view with another turn than asked would show its place too."""
    turns = []
    for seed in range(40):
        matrices = drawn(SPEC._replace(rotate_deg=10.0), seed).vox2mm
        for linear in matrices[:, :3, :3]:
            turn = Rotation.from_matrix(linear / np.linalg.norm(linear[:, 0]))
            turns.append(np.abs(turn.as_euler("XYZ", degrees=True)))
    most = np.max(turns, axis=0)
    assert (9.0 < most).all() and (most <= 10 + 1e-3).all()  # float32


def test_contrast_has_the_size_of_every_option():
    """view = gain hu + shift, about 0 HU, and noise."""
    lines, noise = [], []
    for seed in range(40):
        plain, changed, noisy = (
            drawn(SPEC._replace(**options), seed).hu[0].astype(float)
            for options in ({}, {"gain": 0.1, "shift_hu": 20.0}, {"noise_hu": 30.0})
        )
        seen = plain != OUTSIDE_HU
        lines.append(np.polyfit(plain[seen], changed[seen], 1))
        noise.append((noisy - plain)[seen].std())
    gain, shift = np.transpose(lines)
    # Whole HU; of 40 draws some come near every bound.
    assert 0.9 - 1e-3 < gain.min() < 0.92 and 1.08 < gain.max() < 1.1 + 1e-3
    assert -20.5 < shift.min() < -17 and 17 < shift.max() < 20.5
    assert noise[0] != noise[1] and 27 < max(noise) < 30.5


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    root = tmp_path_factory.mktemp("phantoms")
    synthetic.write_dataset(
        root,
        shape=(32, 32, 32),
        spacing_mm=12.0,
        subjects_per_task=4,
        seed=0,
        tasks=["chest", "liver"],
    )
    return loader.Dataset(root)


def stream(dataset, **changes):
    arguments = {"batch_size": 2, "seed": 3, "spec": SPEC, **changes}
    return views.make_view_iterator(dataset, "train", **arguments)


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


def equal(a, b):
    for x, y in zip(a, b, strict=True):
        for one, other in zip(x, y, strict=True):
            np.testing.assert_array_equal(one, other)


def test_stream_is_a_function_of_seed_and_step(dataset):
    first = take(stream(dataset), 4)
    assert first[0].hu.shape == (2, 2, *SPEC.shape, 1)
    assert first[0].hu.dtype == np.int16 and first[0].body.dtype == bool
    equal(first, take(stream(dataset, num_threads=0), 4))
    other = take(stream(dataset, seed=4), 4)
    assert any((a.hu != b.hu).any() for a, b in zip(first, other, strict=True))


def test_stream_resumes_where_it_stopped(dataset):
    whole = take(stream(dataset), 5)
    begun = stream(dataset)
    take(begun, 2)
    resumed = stream(dataset)
    resumed.set_state(begun.get_state())
    equal(take(resumed, 3), whole[2:])


def test_stream_follows_the_weights(dataset):
    batches = take(stream(dataset, weights={"chest": 3.0, "liver": 1.0}), 16)
    entries = dataset.index["volumes"]
    tasks = [entries[v]["task"] for b in batches for v in b.volume]
    assert tasks.count("chest") == 24 and tasks.count("liver") == 8


def test_stream_refuses_a_split_without_such_volumes(dataset):
    with pytest.raises(UserError, match="volumes of lung expected"):
        stream(dataset, weights={"lung": 1.0})
