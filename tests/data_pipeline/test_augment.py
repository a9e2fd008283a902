"""Augmentation: places, matrices and names stay right; the stream stays determined."""

import itertools
import json

import numpy as np
import pytest
from scipy import ndimage
from scipy.spatial.transform import Rotation

from data_pipeline import augment, loader, store
from unireg_jax.errors import USAGE, UserError
from unireg_jax.tasks import OUTSIDE_HU, TASKS, PairBatch, PairType

SHAPE = (40, 36, 30)
VOLUME_MM = np.array((4.0, 5.0, 6.0))
SLOPE = np.array((10.0, -7.0, 23.0))  # HU per voxel: HU tells the place
NAMES = ("LeftParotid", "spine", "RightParotid", "left kidney", "kidney_right", "heart")
MIRRORED = (0, 3, 2, 1, 5, 4, 6)
AFFINE = augment.AugmentSpec(rotate_deg=10.0, scale=0.1, shift_mm=15.0)
ELASTIC = augment.AugmentSpec(elastic_mm=16.0)
CONTRAST = augment.AugmentSpec(gain=0.1, shift_hu=20.0, noise_hu=5.0)
ALL = augment.AugmentSpec(0.5, 10.0, 0.1, 15.0, 8.0, 40.0, 0.3, 0.1, 20.0, 5.0)


def grid(shape=SHAPE):
    return np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), axis=-1)


def ramp(offset=0):
    """HU of a place; beyond the scan at one end of x and, obliquely, at another."""
    hu = (grid() @ SLOPE + offset).astype(np.int16)
    hu[:3] = OUTSIDE_HU
    hu[grid().sum(axis=-1) > 90] = OUTSIDE_HU
    return hu


def striped():
    """Labels that tell the place, too: 1 to 6 along x."""
    return np.broadcast_to((1 + grid()[..., 0] * 6 // SHAPE[0]), SHAPE).astype(np.uint8)


def example():
    align = np.array(
        [[0.9, 0.1, 0.0, 3], [-0.1, 1.1, 0.2, -2], [0.0, 0.1, 1, 4], [0, 0, 0, 1]]
    )
    return PairBatch(
        fixed=ramp()[..., None],
        moving=ramp(100)[..., None],
        fixed_labels=striped(),
        moving_labels=striped()[:, ::-1],
        fixed_more=(striped()[None] + 1) % 7,
        moving_more=(striped()[None, :, ::-1] + 1) % 7,
        align=align.astype(np.float32),
        region=np.int32(0),
        pair_type=np.int32(0),
        pair=np.int32(5),
    )


def apply(matrix, points):
    return points @ matrix[:3, :3].T + matrix[:3, 3]


def in_mm(matrix):
    """The linear part of a map of voxels, in mm."""
    return matrix[:3, :3] * VOLUME_MM[:, None] / VOLUME_MM


def equal(a, b):
    for one, other in zip(a, b, strict=True):
        np.testing.assert_array_equal(one, other, strict=True)


def test_flip_keeps_every_points_partner():
    """A fixed voxel and its partner show after the flip what they showed before."""
    pair = example()
    flipped = augment.flip(pair, augment.mirror_ids("abdomen", NAMES))
    points = grid().reshape(-1, 3)
    mirrored = points.copy()
    mirrored[:, 0] = SHAPE[0] - 1 - points[:, 0]
    before, after = tuple(points.T), tuple(mirrored.T)
    np.testing.assert_array_equal(flipped.fixed[after], pair.fixed[before])
    partner = apply(pair.align.astype(float), points)
    moved = apply(flipped.align.astype(float), mirrored)
    moved[:, 0] = SHAPE[0] - 1 - moved[:, 0]
    np.testing.assert_allclose(moved, partner, atol=1e-4)  # align is float32
    # The same by HU: the ramp at the partner, read from the flipped volume.
    inside = ((partner > 4) & (partner < np.array(SHAPE) - 6)).all(axis=1)
    inside &= partner.sum(axis=1) < 86
    place = np.rint(apply(flipped.align.astype(float), mirrored[inside])).astype(int)
    seen = flipped.moving[tuple(place.T)][:, 0]
    expected = partner[inside] @ SLOPE + 100
    assert inside.sum() > 5000
    assert np.abs(seen - expected).max() <= 0.5 * np.abs(SLOPE).sum() + 1


def test_flip_swaps_left_and_right_with_the_image():
    pair = example()
    mirror = augment.mirror_ids("abdomen", NAMES)
    assert mirror[:7].tolist() == list(MIRRORED) and (mirror[7:] == range(7, 256)).all()
    flipped = augment.flip(pair, mirror)
    for name in ("fixed", "moving"):
        before = getattr(pair, f"{name}_labels")
        after = getattr(flipped, f"{name}_labels")
        assert after.dtype == np.uint8
        np.testing.assert_array_equal(np.array(MIRRORED)[before], after[::-1])


def test_flip_twice_is_identity():
    pair = example()
    mirror = augment.mirror_ids("abdomen", NAMES)
    equal(augment.flip(augment.flip(pair, mirror), mirror), pair)


@pytest.mark.parametrize(
    ("names", "match"),
    [
        (("liver", "lung_left"), "one partner of 'lung_left' .* 0 found"),
        (("Lens_R", "LeftLens", "lens left"), "one partner of 'Lens_R' .* 2 found"),
    ],
)
def test_flip_refuses_an_organ_without_its_partner(names, match):
    with pytest.raises(UserError, match=f"chest: {match}") as caught:
        augment.make_augment(augment.AugmentSpec(flip=0.1), {"chest": names}, VOLUME_MM)
    assert caught.value.exit_code == USAGE
    assert "\n" not in str(caught.value)
    augment.make_augment(AFFINE, {"chest": names}, VOLUME_MM)  # no flips, no question


@pytest.mark.parametrize("spec", [AFFINE, ELASTIC, AFFINE._replace(elastic_mm=16.0)])
def test_moving_shows_the_place_that_its_map_says(spec):
    for seed in range(4):
        affine = augment.draw_affine(
            spec, SHAPE, VOLUME_MM, np.random.default_rng(seed)
        )
        rng = np.random.default_rng(seed + 100)
        disp = augment.draw_elastic(spec, SHAPE, VOLUME_MM, rng)
        hu, labels = augment.deform(ramp(), striped(), affine, disp)
        assert (hu.dtype, labels.dtype) == (np.int16, np.uint8)
        place = apply(affine, grid().astype(float))
        if disp is not None:
            place += np.moveaxis(disp, 0, -1)
        last, total = np.array(SHAPE) - 1, place.sum(axis=-1)
        shown = hu != OUTSIDE_HU
        assert shown.sum() > 10_000
        # A ramp is interpolated exactly, up to the scan's own border.
        np.testing.assert_allclose(hu[shown], place[shown] @ SLOPE, atol=0.7)
        scan = ((place >= (3, 0, 0)) & (place <= last)).all(axis=-1)
        beyond = ((place < (2.99, -0.01, -0.01)) | (place > last + 0.01)).any(axis=-1)
        assert shown[scan & (total < 90 - 3)].all()
        assert not shown[beyond | (total > 90.01)].any()
        # Labels stay with the image.
        x = np.rint(place[..., 0])
        sure = shown & (np.abs(place[..., 0] - x) < 0.49)
        expected = 1 + x[sure].astype(int) * 6 // SHAPE[0]
        np.testing.assert_array_equal(labels[sure], expected)
        assert not labels[np.abs(place[..., 0] - 19.5) > 20.01].any()


def test_moving_at_rest_is_identity():
    pair = example()
    rest = np.zeros((3, *SHAPE), np.float32)
    for disp in (None, rest):
        hu, labels = augment.deform(ramp(), striped(), np.eye(4), disp)
        np.testing.assert_array_equal(hu, ramp())
        np.testing.assert_array_equal(labels, striped())
    still = augment.make_augment(augment.AugmentSpec(), {}, VOLUME_MM)
    equal(still(pair, "chest", np.random.default_rng(0)), pair)


def test_moving_integer_shift_is_exact():
    rng = np.random.default_rng(0)
    hu = rng.integers(-1000, 1000, SHAPE, np.int16)
    hu[rng.random(SHAPE) < 0.1] = OUTSIDE_HU
    labels = rng.integers(0, 9, SHAPE, np.uint8)
    matrix = np.eye(4)
    matrix[:3, 3] = (2, -1, 3)
    moved, names = augment.deform(hu, labels, matrix)
    np.testing.assert_array_equal(moved[:-2, 1:, :-3], hu[2:, :-1, 3:])
    np.testing.assert_array_equal(names[:-2, 1:, :-3], labels[2:, :-1, 3:])
    assert (moved[-2:] == OUTSIDE_HU).all() and not names[-2:].any()


def scipy_deform(hu, labels, affine, disp):
    """As `deform`, by SciPy in float64 and one whole volume at a time."""
    coords = np.moveaxis(
        apply(affine, np.argwhere(np.ones(hu.shape)).astype(float)), 1, 0
    )
    coords = coords.reshape(3, *hu.shape) + disp
    limit = np.array(hu.shape)[:, None, None, None] - 1
    valid = ((coords >= -1e-4) & (coords <= limit + 1e-4)).all(axis=0)
    there = ((coords >= -0.5) & (coords <= limit + 0.5)).all(axis=0)
    coords = np.clip(coords, 0, limit)
    outside = hu == OUTSIDE_HU
    air = np.where(outside, -1024.0, hu)
    options = {"order": 1, "prefilter": False, "mode": "nearest"}
    valid &= ndimage.map_coordinates(outside.astype(float), coords, **options) < 1e-4
    moved = ndimage.map_coordinates(air, coords, **options)
    names = ndimage.map_coordinates(labels, coords, order=0, mode="nearest")
    return np.where(valid, moved, OUTSIDE_HU), names * there


@pytest.mark.parametrize("shape", [(21, 18, 15), (1, 18, 15), (21, 18, 1)])
def test_deform_equals_scipy(shape):
    rng = np.random.default_rng(0)
    hu = rng.integers(-1000, 3000, shape, np.int16)
    hu[rng.random(shape) < 0.02] = OUTSIDE_HU
    hu[: shape[0] // 4] = OUTSIDE_HU
    labels = rng.integers(0, 9, (2, *shape), np.uint8)
    disp = rng.uniform(-3, 3, (3, *shape)).astype(np.float32)
    disp[np.array(shape) == 1] = 0
    matrix = np.eye(4)
    if min(shape) > 1:
        matrix = augment.draw_affine(AFFINE, shape, VOLUME_MM, rng)
    moved, names = augment.deform(hu, labels, matrix, disp)
    for layer, found in zip(labels, names, strict=True):
        expected, ids = scipy_deform(hu, layer, matrix, disp)
        np.testing.assert_array_equal(found, ids)
    seen = expected != OUTSIDE_HU
    assert 0.2 < seen.mean() < 0.95
    np.testing.assert_array_equal(moved != OUTSIDE_HU, seen)
    np.testing.assert_allclose(moved[seen], expected[seen], atol=0.51)


def test_noise_is_normal():
    hu = np.zeros((40, 50, 60), np.int16)
    spec = augment.AugmentSpec(noise_hu=300.0)
    out = augment.change_contrast(hu, spec, np.random.default_rng(1)).astype(float)
    z = (out - out.mean()) / out.std()
    np.testing.assert_allclose([(z**3).mean(), (z**4).mean()], [0, 3], atol=0.05)
    assert 4 < np.abs(z).max() < 4.4
    share = [(np.abs(z) < k).mean() for k in (1, 2, 3)]
    np.testing.assert_allclose(share, [0.6827, 0.9545, 0.9973], atol=0.003)
    # Neighbours know nothing of each other.
    assert np.abs(np.mean(z[1:] * z[:-1])) < 0.01


def affines(spec):
    """Maps of 60 seeds, more than enough to come near every bound."""
    for seed in range(60):
        rng = np.random.default_rng(seed)
        yield augment.draw_affine(spec, SHAPE, VOLUME_MM, rng)


def fills(found, low, high, slack=1e-9):
    """Asserts that numbers [N, ...] stay within their bounds, and use all of it."""
    margin = 0.08 * (high - low)
    least, most = np.min(found, axis=0), np.max(found, axis=0)
    assert (low - slack <= least).all() and (least < low + margin).all(), least
    assert (high - margin < most).all() and (most <= high + slack).all(), most


def test_affine_keeps_its_bounds_in_mm():
    """Rotation alone keeps mm distances; the centre moves by the shift alone."""
    spec = augment.AugmentSpec(rotate_deg=10.0, shift_mm=7.0)
    turns, shifts = [], []
    for matrix in affines(spec):
        turn = in_mm(matrix)
        np.testing.assert_allclose(turn @ turn.T, np.eye(3), atol=1e-12)
        assert np.linalg.det(turn) > 0
        turns.append(Rotation.from_matrix(turn).as_euler("xyz", degrees=True))
        center = (np.array(SHAPE) - 1) / 2
        shifts.append((apply(matrix, center) - center) * VOLUME_MM)
    fills(turns, -10.0, 10.0)
    fills(shifts, -7.0, 7.0)


def test_affine_stretches_each_axis_by_itself():
    linear = np.array([in_mm(m) for m in affines(augment.AugmentSpec(scale=0.2))])
    np.testing.assert_array_equal(linear, linear * np.eye(3))
    sizes = np.diagonal(linear, axis1=1, axis2=2)
    fills(sizes, 0.8, 1.2)
    assert np.ptp(sizes, axis=1).max() > 0.1


def test_elastic_keeps_its_bound_and_never_folds():
    spec = augment.AugmentSpec(elastic_mm=16.0, elastic_spacing_mm=40.0)
    greatest = 0.0
    for seed in range(10):
        rng = np.random.default_rng(seed)
        disp = augment.draw_elastic(spec, SHAPE, VOLUME_MM, rng)
        assert disp.shape == (3, *SHAPE) and disp.dtype == np.float32
        size = np.abs(disp * VOLUME_MM[:, None, None, None]).max()
        assert size <= 16.0
        greatest = max(greatest, size)
        jac = np.stack([np.stack(np.gradient(part)) for part in disp])
        jac = np.moveaxis(jac, (0, 1), (-2, -1)) + np.eye(3)
        assert np.linalg.det(jac).min() > 0
    assert greatest > 8.0


def test_contrast_changes_within_its_bounds():
    rng = np.random.default_rng(0)
    hu = ramp()
    spec = CONTRAST._replace(noise_hu=0.0)
    out = augment.change_contrast(hu, spec, rng)
    assert out.dtype == np.int16
    np.testing.assert_array_equal(out == OUTSIDE_HU, hu == OUTSIDE_HU)
    seen = hu != OUTSIDE_HU
    change = out[seen].astype(float) - hu[seen]
    assert 1 < np.abs(change).max()
    assert (np.abs(change) <= 0.1 * np.abs(hu[seen]) + 20 + 1).all()
    noisy = augment.change_contrast(hu, augment.AugmentSpec(noise_hu=9.0), rng)
    assert 0.1 < np.std(noisy[seen].astype(float) - hu[seen]) < 10
    low = augment.change_contrast(np.full((9, 9), -1020, np.int16), CONTRAST, rng)
    assert low.min() >= -1024


def test_contrast_has_the_size_of_every_option():
    """out = gain hu + shift, about 0 HU."""
    hu = ramp()
    seen = hu != OUTSIDE_HU
    lines, noise = [], []
    for seed in range(60):
        rng = np.random.default_rng(seed)
        out = augment.change_contrast(hu, CONTRAST._replace(noise_hu=0.0), rng)
        lines.append(np.polyfit(hu[seen], out[seen], 1))
        spec = augment.AugmentSpec(noise_hu=30.0)
        noise.append(augment.change_contrast(np.zeros_like(hu), spec, rng).std())
    gain, shift = np.transpose(lines)
    fills(gain, 0.9, 1.1, slack=1e-3)  # whole HU
    fills(shift, -20.0, 20.0, slack=0.5)
    fills(noise, 0.0, 30.0, slack=0.5)


def test_cut_ends_a_scan_and_keeps_the_rest():
    hu = np.full((4, 5, 30, 1), 40, np.int16)
    hu[:, :, :6] = OUTSIDE_HU
    ends = set()
    for seed in range(40):
        out = augment.cut(hu, augment.AugmentSpec(cut=0.5), np.random.default_rng(seed))
        kept = np.flatnonzero((out != OUTSIDE_HU).any(axis=(0, 1, 3)))
        assert len(kept) >= 12 and (np.diff(kept) == 1).all()
        np.testing.assert_array_equal(out[:, :, kept], hu[:, :, kept])
        assert kept[0] == 6 or kept[-1] == 29
        ends.add((kept[0] > 6, kept[-1] < 29))
    assert ends >= {(True, False), (False, True)}
    assert (hu[:, :, 6:] == 40).all()


def test_cut_leaves_labels_whole():
    pair = example()
    change = augment.make_augment(augment.AugmentSpec(cut=0.9), {}, VOLUME_MM)
    out = change(pair, "chest", np.random.default_rng(1))
    assert (out.fixed != pair.fixed).any() and (out.moving != pair.moving).any()
    equal(out._replace(fixed=0, moving=0), pair._replace(fixed=0, moving=0))


def test_augment_leaves_its_input_and_moves_only_moving():
    pair = example()
    kept = PairBatch(*(np.array(part) for part in pair))
    change = augment.make_augment(AFFINE, {}, VOLUME_MM)
    out = change(pair, "chest", np.random.default_rng(0))
    equal(pair, kept)
    assert (out.moving != pair.moving).any()
    equal(
        out._replace(moving=0, moving_labels=0, moving_more=0),
        pair._replace(moving=0, moving_labels=0, moving_more=0),
    )


def test_one_patient_is_moved_alike_and_keeps_the_motion():
    """A changed fixed voxel and its partner show what they showed at their places."""
    pair = example()._replace(pair_type=np.int32(PairType.INTRA))
    spec = ALL._replace(flip=0.0, gain=0.0, shift_hu=0.0, noise_hu=0.0)
    out = augment.make_augment(spec, {}, VOLUME_MM)(
        pair, "liver", np.random.default_rng(0)
    )
    np.testing.assert_array_equal(out.align, pair.align)
    rng = np.random.default_rng(0)
    affine = augment.draw_affine(spec, SHAPE, VOLUME_MM, rng)
    disp = augment.draw_elastic(spec, SHAPE, VOLUME_MM, rng)
    align = pair.align.astype(float)
    points = grid().reshape(-1, 3).astype(float)
    partner = apply(align, points)
    shift = [ndimage.map_coordinates(part, partner.T, order=1) for part in disp]
    place = apply(affine, partner) + np.stack(shift, axis=1)  # of the moving volume
    own = apply(np.linalg.inv(align), place)  # of the fixed one
    last = np.array(SHAPE) - 1
    for spot, volume, offset in ((own, out.fixed, 0), (place, out.moving, 100)):
        at = points if volume is out.fixed else partner
        inside = ((at > 1) & (at < last - 1) & (spot > 4) & (spot < last - 1)).all(1)
        inside &= (partner > 1).all(1) & (partner < last - 1).all(1)
        inside &= spot.sum(axis=1) < 86
        assert inside.sum() > 4000
        image = np.where(volume == OUTSIDE_HU, np.nan, volume.astype(float))[..., 0]
        seen = ndimage.map_coordinates(image, at[inside].T, order=1)
        error = np.abs(seen - (spot[inside] @ SLOPE + offset))
        assert np.isfinite(seen).mean() > 0.95
        assert np.nanpercentile(error, 99) < 3


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("flip", 1.5),
        ("scale", 0.9),
        ("gain", 1.0),
        ("cut", 1.0),
        ("noise_hu", -1.0),
        ("rotate_deg", float("nan")),
        ("elastic_mm", 17.0),
        ("elastic_spacing_mm", 0.0),
    ],
)
def test_numbers_that_cannot_be_are_refused(field, value):
    spec = augment.AugmentSpec()._replace(**{field: value})
    with pytest.raises(UserError, match=f"augment.{field}: .* expected, got") as caught:
        augment.make_augment(spec, {}, VOLUME_MM)
    assert caught.value.exit_code == USAGE


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    root = tmp_path_factory.mktemp("prepared")
    rng = np.random.default_rng(0)
    shape, volumes = (12, 10, 8), []
    for task, subject in itertools.product(("chest", "abdomen"), range(3)):
        name = f"{task}{subject}"
        hu = rng.integers(-1000, 1000, shape, np.int16)
        labels = rng.integers(0, 7, shape, np.uint8)
        place = {"task": task, "subject": name, "split": "train"}
        place["vox2world"] = np.diag([*VOLUME_MM, 1.0]).tolist()
        volumes.append(
            {"id": name, **place, **store.write_volume(root, name, hu, labels)}
        )
    tasks = {task: {"labels": list(NAMES)} for task in TASKS}
    tasks["lung"] = {"labels": ["lung_left"]}  # not drawn: not asked about
    spec = {"shape": list(shape), "spacing_mm": VOLUME_MM.tolist()}
    index = {"version": 1, "spec": spec, "tasks": tasks, "volumes": volumes}
    store.write_index(root, index)
    return loader.Dataset(root)


def take(dataset, count=6, state=None, **options):
    options = {"batch_size": 2, "seed": 3, "augment": ALL, **options}
    iterator = loader.make_iterator(dataset, "train", **options)
    if state:
        iterator.set_state(state)
    try:
        return [next(iterator) for _ in range(count)]
    finally:
        iterator.close()


def same(batches, others):
    for one, other in zip(batches, others, strict=True):
        equal(one, other)


def test_off_is_the_plain_stream(dataset):
    plain = take(dataset, augment=None)
    same(plain, take(dataset, augment=augment.AugmentSpec()))
    same(plain, take(dataset, augment=augment.AugmentSpec(elastic_spacing_mm=7.0)))
    pairs = dataset.pairs("train")
    for batch in plain:
        for i, number in enumerate(batch.pair):
            pair = dataset.example(pairs[number], number)
            equal([part[i] for part in batch], [np.asarray(part) for part in pair])
    changed = take(dataset)
    assert [b.pair.tolist() for b in changed] == [b.pair.tolist() for b in plain]
    assert [b.fixed.dtype for b in changed] == [np.int16] * len(changed)
    assert all(
        (a.moving != b.moving).any() for a, b in zip(changed, plain, strict=True)
    )


def test_changes_do_not_depend_on_threads(dataset):
    first = take(dataset, num_threads=0)
    same(first, take(dataset, num_threads=1))
    same(first, take(dataset, num_threads=7))
    other = take(dataset, seed=4)
    assert any((a.fixed != b.fixed).any() for a, b in zip(first, other, strict=True))


def test_a_pair_changes_differently_each_time(dataset):
    batches = take(dataset, 30, batch_size=1)
    seen: dict[int, set] = {}
    for batch in batches:
        seen.setdefault(int(batch.pair[0]), set()).add(batch.moving.tobytes())
    assert all(len(found) >= 2 for found in seen.values())
    assert sum(map(len, seen.values())) == 30


def test_resume_equals_uninterrupted(dataset):
    whole = take(dataset, 7)
    begun = loader.make_iterator(dataset, "train", batch_size=2, seed=3, augment=ALL)
    for _ in range(3):
        next(begun)
    state = json.loads(json.dumps(begun.get_state()))
    same(take(dataset, 4, state), whole[3:])
    same(take(dataset, 4, {"next_index": 3}, num_threads=0), whole[3:])


def test_shards_together_are_the_whole_stream(dataset):
    whole = take(dataset, 4, batch_size=2)
    parts = [take(dataset, 4, batch_size=1, shard=(i, 2)) for i in range(2)]
    for batch, *shards in zip(whole, *parts, strict=True):
        both = [np.concatenate(part) for part in zip(*shards, strict=True)]
        equal(batch, both)


def test_resume_with_another_augmentation_is_refused(dataset):
    options = {"batch_size": 2, "seed": 3}
    state = loader.make_iterator(dataset, "train", **options).get_state()
    changed = loader.make_iterator(dataset, "train", augment=ALL, **options)
    with pytest.raises(UserError, match="augment None then, .*'flip': 0.5"):
        changed.set_state(state)
    # A state of a release without augmentation goes on without.
    del state["augment"]
    loader.make_iterator(dataset, "train", **options).set_state(state)
