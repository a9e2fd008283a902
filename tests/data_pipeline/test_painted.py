"""Painted CT: HU of every organ, the body around, contrast, the same bits again."""

import json

import numpy as np
import pytest
from scipy import ndimage

from data_pipeline import organs, painted, synthetic
from unireg_jax.imaging import nifti

# Never cubic: a swapped axis must fail.
SHAPE, SPACING = (66, 48, 54), (5.5, 5.5, 5.0)


@pytest.fixture(scope="module")
def abdomen():
    """The organs of a phantom, without its picture."""
    made = synthetic.phantom("abdomen", shape=SHAPE, spacing_mm=SPACING, seed=3)
    return made.labels, dict(enumerate(made.label_names, 1))


def _inside(labels, names, name):
    number = {n: i for i, n in names.items()}[name]
    return ndimage.binary_erosion(labels == number)


@pytest.mark.parametrize("phase", painted.PHASES)
def test_paint_gives_organs_their_hu(abdomen, phase):
    labels, names = abdomen
    hu = painted.paint(labels, names, spacing_mm=SPACING, seed=1, phase=phase)
    assert hu.shape == labels.shape and hu.dtype == np.int16
    expected = {
        "liver": {"pre": (35, 75), "art": (45, 95), "pvp": (70, 145)},
        "spleen": {"pre": (30, 65), "art": (90, 175), "pvp": (85, 155)},
        "left_kidney": {"pre": (5, 65), "art": (90, 240), "pvp": (120, 250)},
        "aorta": {"pre": (10, 75), "art": (190, 370), "pvp": (90, 210)},
    }
    for name, ranges in expected.items():
        low, high = ranges[phase]
        assert low < np.median(hu[_inside(labels, names, name)]) < high, name
    # Air around, fat and bone that the map does not label.
    assert np.median(hu[:, 0]) < -950
    rest = hu[labels == 0]
    assert np.mean((rest > -140) & (rest < -60)) > 0.05
    assert np.mean(rest > 250) > 0.005
    # No organ lies in air: the body holds them all.
    solid = np.isin(labels, [i for i, n in names.items() if n != "stomach"])
    assert np.mean(hu[solid] < -400) < 0.02


def test_paint_edges_lie_where_the_labels_are(abdomen):
    labels, names = abdomen
    hu = painted.paint(labels, names, spacing_mm=SPACING, seed=2, phase="art")
    aorta = labels == {n: i for i, n in names.items()}["aorta"]
    shell = ndimage.binary_dilation(aorta, iterations=2) & (labels == 0)
    assert hu[aorta].mean() > hu[shell & (hu < 300)].mean() + 100


def test_paint_depends_on_its_arguments_alone(abdomen):
    labels, names = abdomen
    first, again, other, scan = (
        painted.paint(labels, names, spacing_mm=SPACING, phase="pvp", **options)
        for options in (dict(seed=5), dict(seed=5), dict(seed=6), dict(seed=5, scan=1))
    )
    np.testing.assert_array_equal(first, again)
    liver = _inside(labels, names, "liver")
    assert np.mean(first[liver] != other[liver]) > 0.9
    # Another scan of the same patient differs by noise alone.
    assert np.abs(first.astype(int) - scan).mean() < 20
    assert 0 < np.abs(first.astype(int) - scan).max() < 200


def test_paint_draws_the_phase_from_the_seed(abdomen):
    labels, names = abdomen
    aorta = _inside(labels, names, "aorta")
    means = [
        painted.paint(labels, names, spacing_mm=SPACING, seed=s)[aorta].mean()
        for s in range(5)
    ]
    assert max(means) - min(means) > 60


def test_paint_of_a_head_holds_its_organs():
    made = synthetic.phantom(
        "headneck", shape=(50, 56, 54), spacing_mm=(4.5, 4.5, 5), seed=2
    )
    names = dict(enumerate(made.label_names, 1))
    hu = painted.paint(made.labels, names, spacing_mm=(4.5, 4.5, 5), seed=0)
    for name, low, high in (
        ("Brainstem", 20, 50),
        ("LeftParotid", -60, 45),
        ("Mandible", 250, 1200),
    ):
        organ = made.labels == made.label_names.index(name) + 1
        assert low < np.median(hu[organ]) < high, name
    assert np.median(hu[:, 0]) < -950 and np.mean(hu > 400) > 0.005


def test_paint_follows_a_mirrored_map(abdomen):
    """The body is mirrored with it: the liver's side keeps its ribs and lung."""
    labels, names = abdomen
    hu = painted.paint(labels[::-1], names, spacing_mm=SPACING, seed=1, phase="pvp")
    liver = _inside(labels, names, "liver")[::-1]
    assert 70 < np.median(hu[liver]) < 145


def test_paint_gives_unknown_names_soft_tissue_of_their_own():
    labels = np.zeros((40, 30, 34), np.uint16)
    labels[10:18, 10:20, 10:20] = 300
    labels[22:30, 10:20, 12:22] = 7
    values = []
    for seed in range(4):
        hu = painted.paint(labels, {300: "xyzzy"}, spacing_mm=(7, 8, 9), seed=seed)
        values += [np.median(hu[labels == i]) for i in (7, 300)]
    assert min(values) > 0 and max(values) < 130 and np.ptp(values) > 20


def test_paint_adds_ribs_to_a_map_with_a_spine_alone():
    made = synthetic.phantom("chest", shape=SHAPE, spacing_mm=SPACING, seed=1)
    names = dict(enumerate(made.label_names, 1))
    hu = painted.paint(made.labels, names, spacing_mm=SPACING, seed=0, phase="pre")
    bone = (hu > 250) & (made.labels == 0)
    # Left, right and in front of the organs, not only about the spine.
    assert bone[:20].sum() > 50 and bone[-20:].sum() > 50
    for name, low, high in (("lung_left", -900, -750), ("heart", 20, 70)):
        organ = made.labels == made.label_names.index(name) + 1
        assert low < np.median(hu[organ]) < high, name


def test_paint_keeps_to_a_body_that_the_map_has():
    labels = np.zeros((44, 36, 30), np.uint8)
    labels[8:36, 8:30] = 1
    labels[14:20, 14:22, 8:20] = 2
    names = {1: "body", 2: "liver"}
    hu = painted.paint(labels, names, spacing_mm=(8, 7, 9), seed=0, phase="pre")
    assert np.median(hu[labels == 0]) < -950
    assert np.mean(hu[labels == 1] > -300) > 0.6


@pytest.mark.parametrize(
    ("name", "detail", "hu"),
    [
        ("LeftParotid", "plain", -8.0),
        ("rib_left_7", "bone", 260.0),
        ("vertebrae_L3", "bone", 260.0),
        ("portal_vein_and_splenic_vein", "plain", "portal"),
        ("lung_upper_lobe_left", "lung", -840.0),
        ("kidney_cyst_left", "plain", 8.0),
        ("urinary_bladder", "plain", 6.0),
        ("SpinalCord", "plain", 38.0),
    ],
)
def test_tissue_reads_the_usual_spellings(name, detail, hu):
    found = organs.tissue(name)
    assert (found.detail, found.hu) == (detail, hu)
    assert organs.tissue("xyzzy") is None


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (dict(labels=np.ones((4, 5, 6), np.int64)), "labels must be"),
        (dict(labels=np.ones((4, 5), np.uint8)), "labels must be"),
        (dict(labels=np.ones((1, 5, 6), np.uint8)), "labels must be"),
        (dict(labels=np.zeros((4, 5, 6), np.uint8)), "must hold a structure"),
        (dict(spacing_mm=(1, 0, 1)), "spacing_mm must be"),
        (dict(phase="late"), "phase must be one of"),
    ],
)
def test_paint_rejects_bad_arguments(change, match):
    arguments = dict(
        labels=np.ones((4, 5, 6), np.uint8), names={}, spacing_mm=(3, 3, 4), seed=0
    )
    with pytest.raises(ValueError, match=match):
        painted.paint(**arguments | change)


def test_paint_of_a_real_map(data_root):
    folder = data_root / "abdomen_btcv_labels"
    if not folder.is_dir():
        pytest.skip("no BTCV label maps here")
    names = {
        int(k): v for k, v in json.loads((folder / "labels.json").read_text()).items()
    }
    path = sorted((folder / "labels").glob("*.nii.gz"))[0]
    volume = nifti.read_labels(path)
    labels = np.ascontiguousarray(volume.data[::3, ::3, 90::3])
    spacing = tuple(3 * s for s in volume.spacing_mm)
    hu = painted.paint(labels, names, spacing_mm=spacing, seed=1, phase="pvp")
    assert 60 < np.median(hu[_inside(labels, names, "liver")]) < 150
    assert 85 < np.median(hu[_inside(labels, names, "spleen")]) < 155
    assert np.median(hu[:, 0]) < -900
    # The lungs lie above the liver, where the map labels nothing.
    top = hu[:, :, -8:]
    assert np.mean((top > -950) & (top < -650)) > 0.1
