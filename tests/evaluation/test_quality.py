"""Judgement without ground truth: exact numbers, seeded faults, limits."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage

from unireg_jax.evaluation import quality
from unireg_jax.imaging.nifti import Volume
from unireg_jax.registration.refine import Plan
from unireg_jax.verbs import judging

SHAPE, SPACING = (50, 40, 44), (5.3, 6.5, 6.0)
BOUNDS = [(name, kind) for name in quality.CHECKS for kind in quality.KINDS]


def place(*, center=(12.0, -40.0, 300.0), spacing=SPACING, shape=SHAPE):
    out = np.diag([*spacing, 1.0])
    out[:3, 3] = center - out[:3, :3] @ (np.array(shape) - 1) / 2
    return out


def torso(*, turned=None, shift=(0.0, 0.0, 0.0)):
    """A body without symmetry: lungs of two sizes, a liver, vessels, int16 HU."""
    index = np.meshgrid(*(np.arange(n) for n in SHAPE), indexing="ij")
    x = np.stack(index, -1) * SPACING
    x = x - (np.array(SHAPE) - 1) / 2 * SPACING - shift
    hu = np.full(SHAPE, -1000.0)

    def fill(center, radii, value):
        hu[np.square((x - center) / radii).sum(-1) < 1] = value

    fill((0, 0, 0), (105, 80, 150), 20)
    fill((-48, -5, 60), (38, 52, 60), -800)
    fill((50, 8, 75), (32, 44, 46), -780)
    fill((20, -30, 40), (34, 28, 30), 110)
    fill((-45, -10, -50), (50, 42, 38), 180)
    fill((60, 25, -45), (22, 20, 30), 240)
    fill((5, 45, 0), (14, 14, 150), 600)
    wave = np.sin(x[..., 0] / 9) * np.sin(x[..., 1] / 11) * np.sin(x[..., 2] / 10)
    hu[hu > -900] += 60 * wave[hu > -900]
    hu = np.rint(hu).astype(np.int16)
    return hu if turned is None else np.ascontiguousarray(np.flip(hu, turned))


def scan(data=None, vox2world=None):
    data = torso() if data is None else data
    return Volume(data, place() if vox2world is None else vox2world)


def still(shape=SHAPE):
    return np.zeros((*shape, 3), np.float32)


def moved(offset):
    out = np.eye(4)
    out[:3, 3] = offset
    return out


@pytest.fixture(scope="module")
def same():
    return quality.measure(scan(), scan(), still(), np.eye(4))


def test_measure_identity_is_perfect(same):
    assert same["coverage"] == 1
    assert same["local_ncc"] == pytest.approx(1, abs=1e-3)  # float32 windows
    assert same["fold_percent_body"] == same["max_mm"] == same["p99_mm"] == 0
    assert same["sdlogj_body"] == pytest.approx(0, abs=1e-6)
    assert same["constant"] == 0
    assert not quality.judge(same, "intra")
    assert quality.badness(same, "intra") < 1


def test_measure_takes_the_pre_alignment_off():
    """A header 60 mm off, put right by the affine: nothing is left to displace."""
    far = scan(vox2world=moved((60, -35, 40)) @ place())
    disp = np.broadcast_to(np.float32([60, -35, 40]), (*SHAPE, 3))
    found = quality.measure(scan(), far, disp, moved((60, -35, 40)))
    assert found["max_mm"] == pytest.approx(0, abs=1e-3)  # float32 at 60 mm
    assert found["coverage"] == 1
    assert found["local_ncc"] == pytest.approx(found["local_ncc_affine"], abs=1e-3)
    assert found["local_ncc_before"] < 0.3 < found["local_ncc"]


def test_coverage_is_the_share_that_falls_into_the_moving_scan():
    mask = np.ones(SHAPE, bool)
    disp = still()
    disp[..., 2] = SHAPE[2] * SPACING[2] / 4
    found = quality.measure(scan(), scan(), disp, np.eye(4), mask=mask)
    # The judging grid has 44 voxels along z: whole slices leave.
    assert found["coverage"] == pytest.approx(0.75, abs=1 / 44)


def test_measure_folds_and_spread_of_a_known_map():
    """x + disp = -0.5 x along x: the determinant is -0.5 everywhere."""
    disp = still()
    x = np.arange(SHAPE[0]) * SPACING[0]
    disp[..., 0] = (-1.5 * (x - x.mean()))[:, None, None]
    found = quality.measure(scan(), scan(), disp, np.eye(4))
    assert found["fold_percent_body"] == 100
    names = [f.name for f in quality.judge(found, "inter")]
    assert "fold_percent_body" in names and "p99_mm" in names


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_turned_axis_is_found(axis):
    found = quality.measure(scan(), scan(torso(turned=axis)), still(), np.eye(4))
    assert found["mirror_axis"] == axis
    lines = {f.reason: f.line for f in quality.judge(found, "inter")}
    side = ("left and right", "front and back", "head and feet")[axis]
    assert side in lines["mirrored"]


def test_turned_axis_is_found_beside_a_tilted_start():
    """The mirror settles anew: 6 degrees and 10 mm that suit the turned scan alone."""
    angle = np.deg2rad(6)
    tilt = moved((10, 4, -6))
    tilt[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    center = moved((12.0, -40.0, 300.0))
    tilt = center @ tilt @ np.linalg.inv(center)
    world = np.stack(np.meshgrid(*map(np.arange, SHAPE), indexing="ij"), -1)
    world = world @ place()[:3, :3].T + place()[:3, 3]
    disp = (world @ (tilt[:3, :3] - np.eye(3)).T + tilt[:3, 3]).astype(np.float32)
    found = quality.measure(scan(), scan(torso(turned=0)), disp, tilt)
    assert found["mirror_axis"] == 0
    assert found["mirror_gain"] > 0.03
    assert found["mirror_sure"] > quality.CHECKS["mirror_sure"].inter


def test_mirror_image_that_fits_better_by_chance_is_not_called_mirrored():
    """A body that is its own mirror image, with noise of its own on each scan."""
    rng = np.random.default_rng(2)
    hu = (torso().astype(float) + torso(turned=0)) / 2
    pair = []
    for _ in range(2):
        noise = ndimage.gaussian_filter(rng.normal(size=SHAPE), 1.5)
        pair.append(scan((hu + 120 * noise / noise.std()).astype(np.int16)))
    found = quality.measure(*pair, still(), np.eye(4))
    assert found["mirror_gain"] > 0.03 and found["mirror_axis"] == 0
    assert "mirrored" not in {f.reason for f in quality.judge(found, "inter")}
    # The other way round the gain has the other sign, and the same error.
    pair[1] = scan(np.ascontiguousarray(pair[1].data[::-1]))
    turned = quality.measure(*pair, still(), np.eye(4))
    assert turned["mirror_gain"] == pytest.approx(-found["mirror_gain"], rel=0.01)
    assert turned["mirror_sure"] == pytest.approx(-found["mirror_sure"], rel=0.01)


def test_standard_error_takes_a_block_as_one_observation():
    """Blocks of 9 voxels that are each of one value: the error of their mean."""
    rng = np.random.default_rng(0)
    values = rng.normal(size=(4, 3, 2))
    wide = np.kron(values, np.ones((9, 9, 9)))
    mask = np.ones(wide.shape, bool)
    mean, error = quality._blockwise(wide, mask)
    assert mean == pytest.approx(values.mean())
    assert error == pytest.approx(values.std(ddof=1) / np.sqrt(values.size))
    assert math.isnan(quality._blockwise(wide[:9], mask[:9])[1])


@pytest.mark.parametrize("which", ["fixed", "moving"])
@pytest.mark.parametrize("fine", [False, True])
def test_constant_scan_is_found(which, fine):
    flat = scan(np.full(SHAPE, 40, np.int16))
    if fine and which == "moving":  # smoothed for the judging grid: 40.000004
        flat = scan(np.full((90, 95, 85), 40, np.int16), np.diag([2.1, 2.3, 1.9, 1.0]))
    pair = (flat, scan()) if which == "fixed" else (scan(), flat)
    found = quality.measure(*pair, still(), np.eye(4))
    assert [f.reason for f in quality.judge(found, "intra")] == ["constant"]
    assert quality.badness(found, "intra") == math.inf


def test_scans_apart_are_found():
    far = scan(vox2world=moved((5000, 0, 0)) @ place())
    found = quality.measure(scan(), far, still(), np.eye(4))
    assert found["coverage"] == 0
    reasons = [f.reason for f in quality.judge(found, "inter")]
    assert "no_overlap" in reasons and "similarity" in reasons


def test_scan_without_air_is_judged_by_its_own_range():
    data = np.clip(torso(), 0, 255).astype(np.uint8)  # an MR has no HU
    found = quality.measure(scan(data), scan(data), still(), np.eye(4))
    assert found["local_ncc"] == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("slices", [1, 2, 4])
def test_thin_slabs_are_judged(slices):
    part = scan(torso()[:, :, 18 : 18 + slices], np.diag([5.3, 6.5, 1.0, 1.0]))
    found = quality.measure(part, part, still(part.data.shape), np.eye(4))
    assert found["local_ncc"] == pytest.approx(1, abs=1e-3)
    assert math.isnan(found["mirror_gain"]) == (slices == 1)
    assert math.isnan(found["fold_percent_body"]) == (slices < 3)


def test_a_thin_mask_is_judged_by_what_it_meets():
    mask = np.zeros(SHAPE, bool)
    mask[:, :, SHAPE[2] // 2] = True
    fine = place(spacing=(*SPACING[:2], 1.0))  # a sheet of 1 mm
    found = quality.measure(
        scan(vox2world=fine), scan(vox2world=fine), still(), np.eye(4), mask=mask
    )
    assert found["constant"] == 0
    assert found["local_ncc"] == pytest.approx(1, abs=1e-2)


def test_gain_of_overlap_is_of_labels_that_both_maps_bring_into_view():
    rows = {
        "1": {"dsc": 0.9, "dsc_affine": 0.8},
        "2": {"dsc": 0.7, "dsc_affine": 0.7},
        "9": {"dsc": 0.0, "dsc_affine": None},  # in the moving scan alone
    }
    scores = {"labels": rows, "mean": {"dsc": 0.53, "dsc_affine": 0.75}}
    found = judging.assess(scan(), scan(), still(), np.eye(4), scores=scores)
    assert found["dsc_gain"] == pytest.approx(0.05)


def test_inverse_consistency_is_the_gap():
    there, back = still(), still()
    there += np.float32([6, -3, 2])
    back += np.float32([-6, 3 + 4, -2 + 3])
    found = quality.inverse_consistency(scan(), there, scan(), back)
    assert found["inverse_mm"] == pytest.approx(5, abs=1e-4)
    assert found["inverse_p95_mm"] == pytest.approx(5, abs=1e-4)


def test_inverse_consistency_of_scans_apart_is_undefined():
    far = scan(vox2world=moved((5000, 0, 0)) @ place())
    found = quality.inverse_consistency(scan(), still(), far, still())
    assert math.isnan(found["inverse_mm"])


def test_volume_change_is_the_determinant():
    disp = still()
    x = np.stack(np.meshgrid(*map(np.arange, SHAPE), indexing="ij"), -1) * SPACING
    disp[:] = x * [0.2, -0.1, 0.5]
    labels = np.zeros(SHAPE, np.uint8)
    labels[10:30, 10:30, 10:30], labels[0, 0, 0] = 3, 9
    found = quality.volume_changes(disp, place(), labels)
    assert found[3] == pytest.approx(1.2 * 0.9 * 1.5, rel=1e-4)
    assert math.isnan(found[9])  # on the border: no neighbours
    assert quality.volume_factor(found) == pytest.approx(1.62, rel=1e-4)
    assert quality.volume_factor({1: 0.25, 2: 2.0}) == 4
    assert quality.volume_factor({1: -0.1}) == math.inf


def test_label_turned_over_is_found_in_a_record_on_disk():
    """x -> -x/2 within one label: -0.5 of its volume, whatever the rest does."""
    labels = np.zeros(SHAPE, np.uint8)
    labels[20:30, 10:30, 10:30] = 4
    disp = still()
    x = np.arange(SHAPE[0]) * SPACING[0]
    disp[..., 0] = (-1.5 * (x - x.mean()))[:, None, None]
    found = judging.assess(scan(), scan(), disp, np.eye(4), fixed_labels=labels)
    found = json.loads(json.dumps({"quality": found}, allow_nan=False))
    assert found["quality"]["volume_change"] == {"4": pytest.approx(-0.5, rel=1e-4)}
    findings = {f.reason: f.line for f in judging.findings(found)}
    assert "volume_factor of 4 or less expected" in findings["volume_change"]


@pytest.mark.parametrize(("name", "kind"), BOUNDS)
def test_judge_keeps_each_limit(name, kind, same):
    check = quality.CHECKS[name]
    limit = quality.limit_of(check, kind)
    worse = -1e-6 if check.least else 1e-6
    assert not quality.judge(same | {name: limit}, kind)
    found = quality.judge(same | {name: limit + worse}, kind)
    assert [(f.name, f.reason) for f in found] == [(name, check.reason)]
    assert found[0].line.startswith(f"{check.reason}: ")


@pytest.mark.parametrize(("name", "kind"), BOUNDS)
def test_badness_passes_one_where_judge_finds(name, kind, same):
    check = quality.CHECKS[name]
    limit = quality.limit_of(check, kind)
    step = 0.05 * max(abs(limit), 0.1) * (-1 if check.least else 1)
    assert quality.badness(same | {name: limit - step}, kind) <= 1
    assert quality.badness(same | {name: limit + step}, kind) > 1


def test_unknown_numbers_are_no_findings(same):
    unknown = dict.fromkeys(quality.CHECKS) | {"local_ncc": same["local_ncc"]}
    assert not quality.judge(unknown, "inter")
    assert [f.name for f in quality.judge({"local_ncc": None}, "inter")] == [
        "local_ncc"
    ]


def test_limits_of_refined_pairs_are_for_the_default_and_more():
    assert {k: getattr(Plan(), k) for k in quality._REFINED} == quality._REFINED
    settings = {"pair_type": "intra", "refine": Plan()._asdict()}
    assert quality.kind_of(settings) == "intra refined"
    assert quality.kind_of({**settings, "pair_type": "inter"}) == "inter refined"
    changed = [{"features": "mind"}, {"iterations": 5}, {"smoothness": 0.0}]
    for change in changed:
        plan = Plan()._replace(**change)._asdict()
        assert quality.kind_of(settings | {"refine": plan}) == "intra"
    damaged = [None, 3, {}, {"features": "image", "iterations": "x"}]
    assert {quality.kind_of({"refine": d}) for d in damaged} == {"inter"}


def test_limits_are_stricter_within_a_patient():
    for check in quality.CHECKS.values():
        for refined in ("", " refined"):
            inter, intra = (
                quality.limit_of(check, kind + refined) for kind in ("inter", "intra")
            )
            gap = intra - inter
            assert gap >= 0 if check.least else gap <= 0


def test_every_number_limit_and_reason_is_in_the_docs():
    docs = Path(__file__).resolve().parents[2] / "docs"
    errors = (docs / "errors.md").read_text()
    told = (docs / "quality.md").read_text()
    lines = told.partition("## The numbers")[2].partition("\n## ")[0].splitlines()
    for name, check in quality.CHECKS.items():
        (row,) = (r for r in lines if r.startswith("| `") and f"`{name}`" in r[:60])
        assert f"`{check.reason}`" in row and f"`{check.reason}`" in errors
        for kind in quality.KINDS:
            limit = quality.limit_of(check, kind)
            assert f"{limit:g}" in row, (name, limit)


def test_measure_refuses_other_grids():
    with pytest.raises(ValueError, match="disp_mm must be"):
        quality.measure(scan(), scan(), still((4, 5, 6)), np.eye(4))
    with pytest.raises(ValueError, match="mask must be"):
        mask = np.ones((4, 5, 6), bool)
        quality.measure(scan(), scan(), still(), np.eye(4), mask=mask)


def test_length_is_that_before_the_pre_alignment():
    """y = A (x + u): u is 4 mm in a tenth of the scan, 1 mm elsewhere."""
    grow = np.diag([1.25, 0.8, 1.0, 1.0])
    x = np.stack(np.meshgrid(*map(np.arange, SHAPE), indexing="ij"), -1)
    x = x @ place()[:3, :3].T + place()[:3, 3]
    u = np.zeros((*SHAPE, 3))
    u[..., 0] = 1.0
    u[:, :, -4:, 0] = 4.0
    disp = ((x + u) @ grow[:3, :3].T - x).astype(np.float32)
    found = quality.measure(scan(), scan(), disp, grow, mask=np.ones(SHAPE, bool))
    assert found["max_mm"] == pytest.approx(4, abs=0.01)
    assert found["p99_mm"] == pytest.approx(4, abs=0.01)
