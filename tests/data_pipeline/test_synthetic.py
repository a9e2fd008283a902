"""Phantoms: the same bits every time, CT-like values, an exact known field."""

import subprocess
import sys

import numpy as np
import pytest
from scipy import ndimage

from data_pipeline import fields, store, synthetic
from unireg_jax.tasks import TASKS, PairType

# Never cubic: a swapped axis must fail.
SMALL = dict(shape=(48, 38, 40), spacing_mm=(8.0, 7.0, 8.0))


def _dice(a, b):
    return 2 * (a & b).sum() / max(1, a.sum() + b.sum())


def _warp(volume, disp, order):
    coords = np.moveaxis(disp, -1, 0) + np.indices(disp.shape[:3])
    return ndimage.map_coordinates(volume, coords, order=order, mode="nearest")


@pytest.mark.parametrize("task", TASKS)
def test_phantom_is_a_plausible_ct_with_all_labels(task):
    made = synthetic.phantom(task, shape=(78, 56, 64), spacing_mm=5.0, seed=3)
    assert made.hu.shape == made.labels.shape == (78, 56, 64)
    assert (made.hu.dtype, made.labels.dtype) == (np.int16, np.uint8)
    assert set(np.unique(made.labels)) == set(range(len(made.label_names) + 1))
    assert list(made.label_names) == sorted(made.label_names)
    # Air in front of the patient, soft tissue and fat in plenty, some bone.
    assert made.hu[:, 0].max() < -900
    soft = np.mean((made.hu > 0) & (made.hu < 200))
    assert 0.05 < soft < 0.6
    assert np.mean((made.hu > -130) & (made.hu < -70)) > 0.01
    assert 0.001 < np.mean(made.hu > 400) < 0.1


@pytest.mark.parametrize("task", ("headneck", "lung"))
def test_phantom_depends_on_its_arguments_alone(task):
    first, again, other = (
        synthetic.phantom(task, **SMALL, seed=seed) for seed in (5, 5, 6)
    )
    np.testing.assert_array_equal(first.hu, again.hu)
    np.testing.assert_array_equal(first.labels, again.labels)
    assert np.mean(first.labels != other.labels) > 0.005


def test_phantom_of_larger_grid_holds_the_smaller():
    large = synthetic.phantom("abdomen", shape=(30, 26, 24), spacing_mm=8.0).labels
    small = synthetic.phantom("abdomen", shape=(22, 20, 16), spacing_mm=8.0).labels
    np.testing.assert_array_equal(large[4:-4, 3:-3, 4:-4], small)


def test_phantom_grid_is_centred_and_axis_aligned():
    made = synthetic.phantom("chest", **SMALL)
    middle = made.vox2world @ [(48 - 1) / 2, (38 - 1) / 2, (40 - 1) / 2, 1]
    np.testing.assert_allclose(middle, [0, 0, 0, 1], atol=1e-9)  # float64 rounding
    np.testing.assert_array_equal(np.diag(made.vox2world), [8, 7, 8, 1])


def test_phantom_lies_in_lps():
    """Liver on the patient's right (x < 0), spine at the back, lungs above liver."""
    made = synthetic.phantom("abdomen", shape=(78, 56, 64), spacing_mm=5.0)

    def center(name):
        where = np.argwhere(made.labels == made.label_names.index(name) + 1)
        return (made.vox2world[:3, :3] @ where.mean(0)) + made.vox2world[:3, 3]

    assert center("liver")[0] < -20 < 20 < center("spleen")[0]
    assert center("left_kidney")[0] > 20 and center("right_kidney")[0] < -20
    assert center("stomach")[1] < center("left_kidney")[1]
    assert center("liver")[2] > center("right_kidney")[2]


@pytest.mark.parametrize("task", ("liver", "lung"))
def test_pair_field_maps_moving_labels_onto_fixed(task):
    made = synthetic.pair(task, shape=(78, 56, 64), spacing_mm=(5, 5, 5.5), seed=1)
    warped = _warp(made.moving.labels, made.disp, order=0)
    moved = 0
    for i, name in enumerate(made.fixed.label_names, 1):
        fixed = made.fixed.labels == i
        before = _dice(fixed, made.moving.labels == i)
        after = _dice(fixed, warped == i)
        # Nearest neighbour costs a rim of half a voxel: thin organs lose more.
        assert after > before - 0.01, name
        assert after > (0.95 if fixed.sum() > 2500 else 0.7) or before > 0.9, name
        moved += fixed.sum() > 2500 and before < 0.91
    assert moved >= 2


@pytest.mark.parametrize("task", ("liver", "lung"))
def test_pair_field_maps_moving_intensities_onto_fixed(task):
    """Edges of bone and skin have the same HU in both scans."""
    made = synthetic.pair(task, **SMALL, seed=2)
    warped = _warp(made.moving.hu.astype(np.float32), made.disp, order=1)
    before = np.corrcoef(made.fixed.hu.ravel(), made.moving.hu.ravel())[0, 1]
    after = np.corrcoef(made.fixed.hu.ravel(), warped.ravel())[0, 1]
    assert after > before
    assert after > 0.98


@pytest.mark.parametrize(("task", "low", "high"), [("liver", 6, 18), ("lung", 14, 40)])
def test_known_disp_is_smooth_and_breathes(task, low, high):
    disp = synthetic.known_disp(task, **SMALL, seed=4)
    assert disp.shape == (48, 38, 40, 3) and disp.dtype == np.float32
    reach = np.abs(disp * SMALL["spacing_mm"]).max(axis=(0, 1, 2))
    assert low < reach[2] < high  # mm, head to feet
    assert reach[2] > 2 * reach[0]
    # Breathing out (fixed) lifts the diaphragm: the tissue lies lower in moving.
    assert disp[24, 19, 14, 2] < 0
    jac = np.stack([np.gradient(disp[..., c], axis=(0, 1, 2)) for c in range(3)])
    jac = np.moveaxis(jac, (0, 1), (-2, -1)) + np.eye(3)
    assert np.linalg.det(jac).min() > 0.4


def test_pair_of_inter_patient_task_is_two_subjects():
    made = synthetic.pair("headneck", **SMALL, seed=1)
    assert made.disp is None
    assert TASKS["headneck"].pair_type == PairType.INTER
    assert np.mean(made.fixed.hu[made.fixed.labels > 0]) > -500
    assert np.mean(made.fixed.labels != made.moving.labels) > 0.001


@pytest.fixture(scope="module", params=TASKS)
def deformed(request):
    """A deformed pair of each task at 2 mm, and where its field stays on the grid."""
    grid = dict(shape=(60, 52, 56), spacing_mm=(2.0, 2.2, 2.1), seed=1)
    made = synthetic.deformed_pair(request.param, **grid)
    coords = np.indices(made.disp.shape[:3]) + np.moveaxis(made.disp, -1, 0)
    last = np.array(made.disp.shape[:3]).reshape(3, 1, 1, 1) - 1
    return request.param, made, np.all((coords >= 0) & (coords <= last), axis=0)


def test_deformed_pair_moving_is_the_phantom_and_fixed_another_scan(deformed):
    task, made, _ = deformed
    expected = synthetic.phantom(
        task, shape=(60, 52, 56), spacing_mm=(2.0, 2.2, 2.1), seed=1
    )
    for one, other, fixed in zip(made.moving, expected, made.fixed, strict=True):
        np.testing.assert_array_equal(one, other)
        assert np.asarray(fixed).dtype == np.asarray(one).dtype
    np.testing.assert_array_equal(made.fixed.vox2world, made.moving.vox2world)
    assert made.disp.shape == (60, 52, 56, 3) and made.disp.dtype == np.float32
    # Noise of its own: far from what moved, air differs too.
    air = (made.fixed.hu < -900) & (made.moving.hu < -900)
    assert np.mean((made.fixed.hu != made.moving.hu)[air]) > 0.8


def test_deformed_pair_field_maps_moving_labels_onto_fixed(deformed):
    _, made, kept = deformed
    warped = _warp(made.moving.labels, made.disp, order=0)
    moved = 0
    for i, name in enumerate(made.fixed.label_names, 1):
        fixed = (made.fixed.labels == i) & kept
        if fixed.sum() < 300:
            continue
        before = _dice(fixed, (made.moving.labels == i) & kept)
        after = _dice(fixed, (warped == i) & kept)
        # Nearest neighbour costs a rim of half a voxel: small organs lose more.
        assert after > max(before, 0.9 if fixed.sum() > 2000 else 0.8), name
        moved += before < 0.85
    assert moved >= 3


def test_deformed_pair_field_maps_moving_intensities_onto_fixed(deformed):
    """The known field is the best: a third of a voxel beside it, errors grow by 10 %.

    What is left is noise (9 HU in each scan) and linear sampling of edges.
    """
    _, made, kept = deformed
    kept = kept & (made.fixed.hu > -500)  # the body
    moving = made.moving.hu.astype(np.float32)

    def error(disp):
        return np.abs(made.fixed.hu - _warp(moving, disp, order=1))[kept].mean()

    exact = error(made.disp)
    assert exact < 0.4 * error(np.zeros_like(made.disp))
    for shift in np.concatenate([np.eye(3), -np.eye(3)]).astype(np.float32) / 3:
        assert error(made.disp + shift) > 1.1 * exact


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("task", ("headneck", "abdomen"))
def test_deformed_pair_field_obeys_its_bound(task, seed):
    """Singular values within [0.5, 1.5], hence no fold; and not idle either."""
    spacing = np.array((12.0, 14.0, 13.0))
    grid = dict(shape=(18, 15, 16), spacing_mm=tuple(spacing), seed=seed)
    disp_mm = synthetic.deformed_pair(task, **grid).disp * spacing
    assert 2 < np.linalg.norm(disp_mm, axis=-1).mean() < 12
    slopes = [
        (np.roll(disp_mm, -1, j) - np.roll(disp_mm, 1, j)) / (2 * spacing[j])
        for j in range(3)
    ]
    jac = np.stack(slopes, -1)[1:-1, 1:-1, 1:-1] + np.eye(3)
    values = np.linalg.svd(jac, compute_uv=False)
    assert 0.5 < values.min() < 0.9 and 1.1 < values.max() < 1.5
    assert np.linalg.det(jac).min() > 0.125


def test_deformed_pair_depends_on_its_arguments_alone():
    first, again, other = (
        synthetic.deformed_pair("chest", **SMALL, seed=seed) for seed in (5, 5, 6)
    )
    np.testing.assert_array_equal(first.disp, again.disp)
    np.testing.assert_array_equal(first.fixed.hu, again.fixed.hu)
    assert np.abs(first.disp - other.disp).max() > 0.3


@pytest.mark.parametrize(
    ("make", "task"),
    [
        (synthetic.pair, "liver"),
        (synthetic.pair, "lung"),
        (synthetic.deformed_pair, "headneck"),
        (synthetic.deformed_pair, "chest"),
    ],
)
def test_fields_of_a_pair_undo_each_other(make, task):
    made = make(task, **SMALL, seed=3, both_ways=True)
    spacing = SMALL["spacing_mm"]
    assert np.linalg.norm(made.disp * spacing, axis=-1).mean() > 1
    for a, b in ((made.disp, made.disp_mf), (made.disp_mf, made.disp)):
        missed = fields.residual_mm(a, b, spacing)
        # The fields are exact; sampling one of them linearly at 8 mm is not.
        assert np.nanmax(missed) < 0.3 and np.nanmean(missed) < 0.05
        assert fields.determinant(a).min() > 0.1
    assert make(task, **SMALL, seed=3).disp_mf is None


def test_liver_has_a_scan_without_contrast():
    pre = synthetic.phantom("liver", **SMALL, seed=7, variant="pre")
    art = synthetic.phantom("liver", **SMALL, seed=7, variant="art")
    np.testing.assert_array_equal(pre.labels, art.labels)
    aorta = ndimage.binary_erosion(pre.labels == pre.label_names.index("aorta") + 1)
    assert pre.hu[aorta].mean() < 60 < 200 < art.hu[aorta].mean()


def test_deformed_pair_rejects_bad_arguments():
    with pytest.raises(ValueError, match="task must be one of"):
        synthetic.deformed_pair("heart")
    with pytest.raises(ValueError, match="shape must be three"):
        synthetic.deformed_pair("chest", shape=(8, 8))


def test_liver_phases_enhance_as_contrast_does():
    art, pvp = (
        synthetic.phantom("liver", **SMALL, seed=7, variant=v) for v in ("art", "pvp")
    )

    def mean(made, name):
        organ = made.labels == made.label_names.index(name) + 1
        return made.hu[ndimage.binary_erosion(organ)].mean()

    assert mean(art, "aorta") > mean(pvp, "aorta") + 50
    assert mean(pvp, "liver") > mean(art, "liver") + 20


def test_lung_is_denser_after_breathing_out():
    made = synthetic.pair("lung", **SMALL, seed=0)
    lung = [ndimage.binary_erosion(np.isin(s.labels, (5, 6))) for s in made[:2]]
    assert made.fixed.label_names[4:6] == ("lung_left", "lung_right")
    fixed, moving = (s.hu[m].mean() for s, m in zip(made[:2], lung, strict=True))
    assert -880 < moving < fixed - 40 < -700


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (dict(task="heart"), "task must be one of"),
        (dict(task="chest", variant="art"), "variant must be one of"),
        (dict(task="chest", shape=(8, 8)), "shape must be three"),
        (dict(task="chest", spacing_mm=(1, 0, 1)), "spacing_mm must be positive"),
    ],
)
def test_phantom_rejects_bad_arguments(options, match):
    with pytest.raises(ValueError, match=match):
        synthetic.phantom(**options)


def test_known_disp_rejects_tasks_without_motion():
    with pytest.raises(ValueError, match="it has no motion"):
        synthetic.known_disp("chest")


def test_write_dataset_is_a_prepared_folder(tmp_path):
    root = synthetic.write_dataset(
        tmp_path / "new" / "data",
        shape=(20, 18, 16),
        spacing_mm=(18, 17, 19),
        subjects_per_task=6,
        tasks=("chest",),
    )
    index = store.read_index(root)
    assert index["spec"]["shape"] == [20, 18, 16]
    assert index["tasks"]["chest"]["labels"] == list(synthetic.CHEST_LABELS)
    assert len(index["volumes"]) == 6
    splits = {v["subject"]: v["split"] for v in index["volumes"]}
    assert sorted(splits.values()) == 2 * ["test"] + 2 * ["train"] + 2 * ["val"]
    for entry in index["volumes"]:
        hu = store.read_array(root, entry, "image")
        assert hu.shape == (20, 18, 16) and hu.dtype == np.int16
        assert store.read_array(root, entry, "labels").any()


def test_command_writes_and_refuses(tmp_path, capsys):
    options = ["--shape", "12,10,8", "--spacing", "30,30,35", "--subjects", "1"]
    out = str(tmp_path / "data")
    assert synthetic.main(["--out", out, "--tasks", "lung", *options]) == 0
    assert capsys.readouterr().out.strip() == out
    assert len(store.read_index(out)["volumes"]) == 2
    with pytest.raises(SystemExit) as stop:
        synthetic.main(["--out", out, "--tasks", "lungs", *options])
    assert stop.value.code == 2
    with pytest.raises(SystemExit) as stop:
        synthetic.main(["--out", out, "--shape", "1"])
    assert stop.value.code == 2
    assert synthetic.main(["--out", f"{out}/index.json", "--nifti", *options]) == 2


def test_import_pulls_in_no_jax():
    code = (
        "import sys, data_pipeline.synthetic, data_pipeline.prepare, "
        "data_pipeline.pairs; sys.exit('jax' in sys.modules or 'grain' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
