"""The check of a data set: one spoilt thing at a time, each found by its name."""

import gzip
import json
import shutil

import numpy as np
import pytest

from data_pipeline import anatomy, check, examine, findings, preview, synthetic
from data_pipeline.datasets import manifest
from unireg_jax.errors import (
    FAILED,
    NOTHING,
    PARTLY,
    PREEMPTED,
    STORAGE,
    USAGE,
    UserError,
)
from unireg_jax.imaging import nifti, orientation

SHAPE, SPACING = (64, 52, 48), (6.0, 6.0, 5.5)
TURN = np.diag([-1.0, -1.0, 1.0, 1.0])
SHIFT = np.zeros((4, 4))
SHIFT[0, 3] = 3.0  # mm


@pytest.fixture(scope="module")
def phantoms():
    """Three abdomens: (hu, labels, names, vox2world)."""
    return [
        synthetic.phantom("abdomen", shape=SHAPE, spacing_mm=SPACING, seed=seed)
        for seed in range(3)
    ]


@pytest.fixture(scope="module")
def clean(phantoms, tmp_path_factory):
    """A folder without a fault: two patients train, one of each is held back twice."""
    folder = tmp_path_factory.mktemp("clean")
    rows = []
    for i, scan in enumerate(phantoms):
        _write(folder, f"a{i}", scan.hu, scan.labels, scan.vox2world)
        rows.append(_row(f"a{i}", "val" if i == 2 else "train"))
    # A fourth, so that `val` has a pair: the third, turned by half a voxel of noise.
    noisy = phantoms[2].hu + np.arange(SHAPE[0], dtype=np.int16)[:, None, None] % 3
    _write(folder, "a3", noisy, phantoms[2].labels, phantoms[2].vox2world)
    rows.append(_row("a3", "val"))
    names = {str(i + 1): name for i, name in enumerate(phantoms[0].label_names)}
    (folder / "map.json").write_text(json.dumps(names))
    (folder / "m.json").write_text(json.dumps(rows))
    return folder


@pytest.fixture
def folder(clean, tmp_path):
    """A copy to be spoilt."""
    return shutil.copytree(clean, tmp_path / "data")


def _row(name, split="train", **change):
    return {
        "id": name,
        "image": f"{name}.nii.gz",
        "label": f"{name}_label.nii.gz",
        "label_map": "map.json",
        "task": "abdomen",
        "subject": f"p{name}",
        "split": split,
        **change,
    }


def _write(folder, name, hu=None, labels=None, vox2world=None):
    for array, end in ((hu, ""), (labels, "_label")):
        if array is not None:
            path = folder / f"{name}{end}.nii.gz"
            nifti.write_volume(path, array, vox2world)


def _check(folder, *, roots=(), **options):
    listed = manifest.examine(folder / "m.json", roots=roots)
    return check.check_collection(*listed, **options)


def _found(report, name):
    return [f for f in report["findings"] if f.id == name and f.level != "note"]


def _rows(folder, change):
    rows = json.loads((folder / "m.json").read_text())
    (folder / "m.json").write_text(json.dumps(change(rows) or rows))


def test_clean_set_has_no_finding_but_its_size(clean, capsys):
    report = _check(clean)
    assert [f.level for f in report["findings"]] == ["note"]
    assert report["findings"][0].id == "abdomen/train"
    assert check.exit_code(report) == 0
    train, val, test = report["counts"]
    assert (train["scans"], train["subjects"], train["pairs"]) == (2, 2, 2)
    assert (val["pairs"], val["labelled"], test["scans"]) == (2, 2, 0)
    facts = report["scans"][0]["image"]
    assert (facts["shape"], facts["spacing_mm"]) == (list(SHAPE), list(SPACING))
    assert facts["stored_axes"] == "LPS" and facts["oblique_deg"] == 0
    assert check.main(["--manifest", str(clean / "m.json"), "--workers", "1"]) == 0
    assert "4 scans: 0 errors, 0 warnings, 1 notes" in capsys.readouterr().out


# --- intensities ---


def _wide(hu):
    return hu.astype(np.float32)


@pytest.mark.parametrize(
    ("change", "level", "reason", "says"),
    [
        (lambda hu: hu + 1024, "error", "hu_range", "offset is not subtracted"),
        (lambda hu: -hu, "error", "hu_range", "the sign is turned"),
        (lambda hu: _wide(hu + 1000) / 5000, "error", "hu_range", "values scaled to"),
        (
            lambda hu: (np.clip(_wide(hu) + 160, 0, 400) / 400 * 255).astype("u1"),
            "error",
            "hu_range",
            "an 8-bit picture",
        ),
        (lambda hu: np.maximum(hu, 0), "error", "hu_range", "cut off at 0"),
        (
            lambda hu: np.maximum(hu + 1000, 0) // 2,
            "error",
            "hu_range",
            "no value below 0, as in MR",
        ),
        (lambda hu: (hu > 0).astype("u1") * 7, "error", "hu_range", "a label map"),
        (lambda hu: hu * 0 - 1000, "error", "constant", "-1000 everywhere"),
        (lambda hu: np.clip(hu, -160, 240), "warning", "hu_range", "hardly any air"),
        (lambda hu: np.clip(hu, -700, 3000), "warning", "hu_range", "nothing below"),
        (lambda hu: np.clip(hu, -1000, 250), "warning", "hu_range", "nothing above"),
        (
            lambda hu: np.where(hu < -900, hu - 100, hu),
            "warning",
            "hu_range",
            "check the intercept",
        ),
    ],
)
def test_intensities_that_are_not_hu_are_named(
    phantoms, folder, change, level, reason, says
):
    hu, world = phantoms[0].hu.astype(np.int16), phantoms[0].vox2world
    _write(folder, "a0", change(hu), None, world)
    (finding,) = _found(_check(folder), "a0")
    assert (finding.level, finding.reason) == (level, reason)
    assert says in f"{finding.got}; {finding.remedy}"


def test_padding_and_metal_are_true_hu(phantoms, folder):
    hu = phantoms[0].hu.copy()
    hu[:3], hu[30, 30, 30] = -3024, 30000
    _write(folder, "a0", hu, None, phantoms[0].vox2world)
    assert _found(_check(folder), "a0") == []


# --- geometry ---


@pytest.mark.parametrize(
    ("cut", "scale", "reason", "says"),
    [
        (np.s_[:, :, :20], 1, "fov", "384 x 312 x 110 mm; leave the scan out"),
        (np.s_[:, :, ::4], 1, "spacing", "6 x 6 x 22 mm"),
        (np.s_[:], 0.02, "spacing", "0.12 x 0.12 x 0.11 mm"),
    ],
)
def test_geometry_that_cannot_serve_is_named(
    phantoms, folder, cut, scale, reason, says
):
    hu, labels = phantoms[0].hu[cut], phantoms[0].labels[cut]
    world = phantoms[0].vox2world.copy()
    world[2, 2] *= SHAPE[2] / hu.shape[2] if hu.shape[2] == 12 else 1
    world[:3] *= scale
    if scale < 1:
        hu, labels = np.tile(hu, (2, 2, 2)), np.tile(labels, (2, 2, 2))
    _write(folder, "a0", hu, labels, world)
    lines = findings.table(_found(_check(folder), "a0"))
    assert any(reason in line and says in line for line in lines), lines


def test_turned_axes_are_named(phantoms, folder):
    turn = np.eye(4)
    turn[:2, :2] = [[0.8, -0.6], [0.6, 0.8]]
    world = turn @ phantoms[0].vox2world
    _write(folder, "a0", phantoms[0].hu, phantoms[0].labels, world)
    (finding,) = _found(_check(folder), "a0")
    assert finding.reason == "orientation_conflict" and "36.9 degrees" in finding.got


def test_spacing_far_from_the_task_is_named(phantoms, folder):
    for i in (1, 2, 3):
        scan = phantoms[min(i, 2)]
        fine = scan.vox2world @ np.diag([0.25, 0.25, 1, 1])
        hu, labels = (
            np.repeat(np.repeat(a, 4, 0), 4, 1) for a in (scan.hu, scan.labels)
        )
        hu[0, 0, 0] += i  # not the values of another scan
        _write(folder, f"a{i}", hu, labels, fine)
    report = _check(folder)
    assert [_found(report, f"a{i}") for i in (1, 2, 3)] == [[], [], []]
    (finding,) = _found(report, "a0")
    assert finding.reason == "spacing" and finding.got == "6 x 6 x 5.5 mm"
    assert "median, 1.5 x 1.5 x 5.5 mm" in finding.expected


def test_header_warnings_reach_the_report(folder):
    path = folder / "a0.nii.gz"
    content = bytearray(gzip.decompress(path.read_bytes()))
    path.write_bytes(gzip.compress(bytes(content) + b"more"))
    (finding,) = _found(_check(folder), "a0")
    assert (finding.level, finding.reason) == ("warning", "trailing_data")


# --- labels ---


@pytest.mark.parametrize(
    ("change", "level", "reason", "says"),
    [
        (lambda x, w: (x * 0, w), "warning", "label_set", "no voxel of any"),
        (lambda x, w: (x * 0 + 99, w), "warning", "label_set", "ids there: 99"),
        (
            lambda x, w: (np.where(x == 3, 77, x), w),
            "warning",
            "label_unknown",
            "1 other: 77",
        ),
        (lambda x, w: (x[1:], w), "error", "grid_mismatch", "(63, 52, 48)"),
        (lambda x, w: (x, w + SHIFT), "error", "grid_mismatch", "3 mm"),
        (lambda x, w: (x * 0.5, w), "error", "label_value", "fractions"),
        (lambda x, w: (np.roll(x, 26, 1), w), "error", "grid_mismatch", "in air"),
    ],
)
def test_labels_that_do_not_fit_are_named(
    phantoms, folder, change, level, reason, says
):
    labels, world = change(phantoms[0].labels, phantoms[0].vox2world)
    _write(folder, "a0", None, labels, world)
    found = [f for f in _found(_check(folder), "a0") if f.reason == reason]
    assert len(found) == 1 and found[0].level == level
    assert says in found[0].got


def test_one_organ_drawn_beyond_the_body_is_named(phantoms, folder):
    scan = phantoms[0]
    number = scan.label_names.index("spleen") + 1
    labels = np.where(scan.labels == number, 0, scan.labels)
    labels[:6, :6, 10:20] = number  # a corner of air
    _write(folder, "a0", None, labels, scan.vox2world)
    found = [f for f in _found(_check(folder), "a0") if f.reason == "grid_mismatch"]
    assert [f.level for f in found] == ["warning"]
    assert found[0].got == "100 % of spleen in air"


def test_labels_whose_header_took_ras_for_lps_are_mirrored(phantoms, folder):
    moved = phantoms[0].vox2world.copy()
    moved[:3, 3] += 40  # a grid around the origin would be its own mirror image
    _write(folder, "a0", phantoms[0].hu, None, moved)
    _write(folder, "a0", None, phantoms[0].labels, TURN @ moved)
    (finding,) = _found(_check(folder), "a0")
    assert finding.reason == "mirrored" and "along x and y" in finding.got


def test_label_on_another_storage_order_is_fine(phantoms, folder):
    scan = phantoms[0]
    labels, world = orientation.reorient(scan.labels, scan.vox2world, "SAR")
    _write(folder, "a0", None, labels, world)
    assert _found(_check(folder), "a0") == []


def test_absent_structures_of_one_scan_and_of_all(phantoms, folder):
    for i in range(4):
        scan = phantoms[min(i, 2)]
        labels = np.where(scan.labels == 1, 0, scan.labels)
        labels[labels == 2] = 2 if i == 1 else 0
        _write(folder, f"a{i}", None, labels, scan.vox2world)
    report = _check(folder)
    first, second = phantoms[0].label_names[:2]
    assert f"none of {first}, {second}" in _found(report, "a0")[0].got
    (finding,) = _found(report, "abdomen")
    assert finding.got == f"no voxel anywhere of {first}"
    notes = [f for f in report["findings"] if f.id == "abdomen" and f.level == "note"]
    assert notes[0].got == f"in one scan only: {second}"


def test_two_spellings_of_one_structure_are_named(phantoms, folder):
    names = {str(i + 1): name for i, name in enumerate(phantoms[0].label_names)}
    position = phantoms[0].label_names.index("left_kidney") + 1
    names[str(position)] = "Kidney_L"
    (folder / "other.json").write_text(json.dumps(names))
    _rows(folder, lambda rows: rows[1].update(label_map="other.json"))
    (finding,) = _found(_check(folder), "abdomen")
    assert finding.got in ("Kidney_L and left_kidney", "left_kidney and Kidney_L")


def test_masks_are_looked_at_like_a_label_map(phantoms, folder):
    scan = phantoms[0]
    masks = {}
    for number, name in enumerate(scan.label_names, 1):
        mask = (scan.labels == number).astype(np.uint8)
        mask = mask[::-1] if name.endswith("kidney") else mask
        nifti.write_volume(folder / f"{name}.nii.gz", mask, scan.vox2world)
        masks[name] = [f"{name}.nii.gz"]
    masks["liver"].append("half.nii.gz")
    half = np.zeros(SHAPE, np.uint8)
    nifti.write_volume(folder / "half.nii.gz", half[1:], scan.vox2world)
    _rows(folder, lambda rows: rows[0].update(label="", label_map="", masks=masks))
    report = _check(folder)
    (finding,) = _found(report, "a0")
    assert (finding.reason, finding.what) == ("grid_mismatch", "mask of liver")
    nifti.write_volume(folder / "half.nii.gz", half, scan.vox2world)
    report = _check(folder)
    (finding,) = [f for f in _found(report, "a0") if f.level == "error"]
    assert finding.reason == "mirrored" and "right_kidney" in finding.got
    sizes = report["scans"][0]["labels"]["voxels"]
    assert sizes["liver"] == (scan.labels == scan.label_names.index("liver") + 1).sum()


def test_mask_and_label_map_are_one_structure(phantoms, folder):
    scan = phantoms[0]
    number = scan.label_names.index("liver") + 1
    liver = scan.labels == number
    drawn = liver & (
        np.arange(SHAPE[0])[:, None, None] < np.argwhere(liver)[:, 0].mean()
    )
    _write(folder, "a0", None, np.where(drawn, 0, scan.labels), scan.vox2world)
    nifti.write_volume(folder / "l.nii.gz", drawn.astype(np.uint8), scan.vox2world)
    _rows(folder, lambda rows: rows[0].update(masks={"liver": "l.nii.gz"}))
    report = _check(folder)
    assert report["scans"][0]["labels"]["voxels"]["liver"] == liver.sum()
    assert _found(report, "a0") == []


def test_landmarks_and_roi_are_looked_at(phantoms, folder):
    (folder / "p.csv").write_text("x,y,z\n0,0,0\n999,0,0\n")
    (folder / "q.csv").write_text("x,y,z\n0,zero,0\n")
    _write(folder, "roi", phantoms[1].labels[1:], None, phantoms[1].vox2world)

    def change(rows):
        rows[0]["points"] = "p.csv"
        rows[1].update(points="q.csv", roi="roi.nii.gz")

    _rows(folder, change)
    report = _check(folder)
    (outside,) = _found(report, "a0")
    assert (outside.what, outside.got) == ("landmarks", "1 of 2 outside")
    found = {f.what: f.reason for f in _found(report, "a1")}
    assert found["roi"] == "grid_mismatch" and "landmarks" in found


def test_listed_pairs_are_counted_and_checked(folder):
    rows = json.loads((folder / "m.json").read_text())
    (folder / "m.json").write_text(
        json.dumps({"volumes": rows, "pairs": [["a0", "a1"]]})
    )
    train, val, _ = _check(folder)["counts"]
    assert (train["pairs"], val["pairs"]) == (1, 2)
    (folder / "m.json").write_text(
        json.dumps({"volumes": rows, "pairs": [["a0", "a9"], ["a0", "a2"]]})
    )
    report = _check(folder)
    assert len([f for f in report["findings"] if f.id == "manifest"]) == 2
    assert check.exit_code(report) == USAGE


# --- left and right, head and feet ---


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("LeftParotid", ("left", ("parotid",))),
        ("Parotid_R", ("right", ("parotid",))),
        ("L-Hippocampus", ("left", ("hippocampus",))),
        ("adrenal_gland_right", ("right", ("adrenal", "gland"))),
        ("rib_left_7", ("left", ("7", "rib"))),
        ("vertebrae_L1", (None, ("l1", "vertebrae"))),
        ("left", (None, ("left",))),
        ("left_right_shunt", (None, ("left", "right", "shunt"))),
        ("liver", (None, ("liver",))),
    ],
)
def test_side_of_a_name(name, expected):
    assert anatomy.side(name) == expected


def test_mirrored_scan_is_told_from_exchanged_names(phantoms, folder):
    scan = phantoms[0]
    _write(folder, "a0", scan.hu[::-1], scan.labels[::-1], scan.vox2world)
    names = {str(i + 1): name for i, name in enumerate(scan.label_names)}
    swap = {"left": "right", "right": "left"}
    swapped = {
        key: "_".join(swap.get(word, word) for word in name.split("_"))
        for key, name in names.items()
    }
    (folder / "swapped.json").write_text(json.dumps(swapped))
    _rows(folder, lambda rows: rows[1].update(label_map="swapped.json"))
    report = _check(folder)
    (mirrored,), (exchanged,) = _found(report, "a0"), _found(report, "a1")
    assert mirrored.reason == exchanged.reason == "mirrored"
    assert mirrored.level == exchanged.level == "error"
    assert "to the right of right_kidney" in mirrored.got + exchanged.got
    assert mirrored.remedy.startswith("image and labels are mirrored")
    assert exchanged.remedy.startswith("the scan is right: exchange left and right")
    assert check.exit_code(report) == PARTLY


def test_one_exchanged_pair_is_told_from_all():
    places = {
        "kidney_left": 60,
        "kidney_right": -60,
        "lung_left": -70,
        "lung_right": 70,
    }
    centers = {name: np.array([x, 0.0, 0.0]) for name, x in places.items()}
    (finding,) = anatomy.check_places("s", centers)
    assert "lung_left 140 mm to the right of lung_right (1 of 2 pairs)" in finding.got
    assert finding.remedy.startswith("exchange the two names")
    # A gall bladder is no bladder, which would lie below the kidneys.
    centers = {"gall_bladder": np.array([30.0, 0, 50]), "kidney": np.zeros(3)}
    assert not anatomy.check_places("s", centers)
    centers = {"liver": np.array([50.0, 0, 0]), "spleen": np.array([-70.0, 0, 0])}
    (finding,) = anatomy.check_places("s", centers)
    assert finding.level == "warning" and "situs inversus" in finding.remedy


@pytest.mark.parametrize(
    ("names", "axis", "says"),
    [
        (
            ("heart", "kidney_left"),
            2,
            "head and feet: expected heart above kidney_left",
        ),
        (("liver", "spinal_cord"), 1, "front and back: expected liver in front of"),
    ],
)
def test_turned_scan_is_found_by_the_order_of_its_organs(names, axis, says):
    centers = {name: np.zeros(3) for name in names}
    step = -1 if axis == 2 else 1
    centers[names[1]][axis] = 80.0 * step
    assert anatomy.check_places("s", centers) == []
    centers[names[1]][axis] = -80.0 * step
    (finding,) = anatomy.check_places("s", centers)
    assert finding.reason == "orientation_conflict"
    assert says in findings.table([finding])[0]


# --- the collection ---


def test_one_picture_twice_is_found_whatever_its_header(phantoms, folder):
    shutil.copy(folder / "a0.nii.gz", folder / "copy.nii.gz")
    scan = phantoms[0]
    data, world = orientation.reorient(scan.hu, scan.vox2world, "AIR")
    world[:3, 3] += 7
    nifti.write_volume(folder / "turned.nii.gz", data, world)
    bare = dict(label="", label_map="")
    _rows(
        folder,
        lambda rows: (
            rows
            + [
                _row("same", image="a0.nii.gz", subject="pa0", **bare),
                _row("chest", image="a0.nii.gz", subject="pa0", task="chest", **bare),
                _row("copy", **bare),
                _row("turned", "val", **bare),
            ]
        ),
    )
    report = _check(folder)
    found = {f.id: f for f in report["findings"] if f.reason == "id_duplicate"}
    assert {name: f.level for name, f in found.items()} == {
        "copy": "error",
        "turned": "error",
        "same": "warning",
        "chest": "note",
    }
    assert "the same file as a0, under two subjects" in found["copy"].got
    assert "the same voxels, another file as a0, which is in split train" in (
        found["turned"].got
    )
    assert check.exit_code(report) == PARTLY


def test_one_picture_without_digests_is_not_called_one_file():
    scan = {"id": "a", "task": "lung", "subject": "s", "split": "train"}
    scan |= {"voxels": "v", "sha256": {}}
    (finding,) = check._duplicates([scan, scan | {"id": "b"}])
    assert finding.got == "the same voxels, another file as a"


def test_a_picture_three_times_is_told_of_by_its_worst_likeness():
    scan = {"id": "a", "task": "chest", "subject": "s", "split": "train"}
    scan |= {"voxels": "v", "sha256": {}}
    more = [scan | {"id": name, "task": "abdomen"} for name in "bc"]
    found = check._duplicates([scan, *more])
    assert [(f.id, f.level) for f in found] == [("b", "note"), ("c", "warning")]
    assert found[1].got.endswith("as b")


def test_missing_labels_are_told_of_the_labels(folder):
    (folder / "a0_label.nii.gz").unlink()
    report = _check(folder)
    (finding,) = _found(report, "a0")
    assert (finding.what, finding.reason) == ("labels", "not_found")
    assert report["scans"][0]["sha256"].keys() == {"image"}


def test_value_digest_is_blind_to_axes_alone(phantoms):
    hu = phantoms[0].hu
    digest = examine.value_digest(hu)
    assert digest == examine.value_digest(hu[::-1].transpose(2, 0, 1))
    changed = hu.copy()
    changed[0, 0, 0] += 1
    assert digest != examine.value_digest(changed)
    real = hu.astype(np.float32) + 0.25
    assert examine.value_digest(real) == examine.value_digest(real.T)
    assert examine.value_digest(hu * 0) is None


@pytest.mark.parametrize("dtype", (np.float32, np.float64))
def test_value_digest_is_blind_to_the_type_of_whole_numbers(phantoms, dtype):
    hu = phantoms[0].hu
    assert examine.value_digest(hu.astype(dtype)) == examine.value_digest(hu)
    beyond = hu.astype(dtype)
    beyond[0, 0, 0] = 1 << 15
    assert examine.value_digest(beyond) != examine.value_digest(hu)


def test_manifest_faults_and_scan_faults_come_in_one_report(folder, capsys):
    def change(rows):
        rows[1]["subject"] = "pa2"  # in train and val
        rows.append(dict(rows[0]))
        rows.append(_row("b", task="knee"))

    _rows(folder, change)
    (folder / "a0.nii.gz").write_bytes(b"<html>")
    report = _check(folder)
    reasons = {(f.id, f.reason) for f in report["findings"] if f.level == "error"}
    assert {
        ("manifest", "id_duplicate"),
        ("manifest", "task_unknown"),
        ("manifest", "schema"),
        ("a0", "not_nifti"),
    } <= reasons
    assert len(report["scans"]) == 5
    assert check.exit_code(report) == USAGE
    assert check.main(["--manifest", str(folder / "m.json"), "--workers=1"]) == USAGE
    assert "entry 6: expected entries" in capsys.readouterr().out


def test_exit_codes(folder, capsys):
    path = ["--manifest", str(folder / "m.json"), "--workers", "1"]
    (folder / "a0.nii.gz").unlink()
    assert check.main([*path, "--task", "abdomen"]) == PARTLY
    for i in (1, 2, 3):
        (folder / f"a{i}.nii.gz").write_bytes(b"")
    assert check.main(path) == FAILED
    out = capsys.readouterr().out
    lines = [line.split()[:3] for line in out.splitlines()]
    assert ["error", "a0", "not_found"] in lines and ["error", "a3", "empty"] in lines
    assert check.main([*path, "--task", "lung"]) == NOTHING
    assert "no scan of lung" in capsys.readouterr().err
    assert check.main([*path, "--json", str(folder / "no" / "r.json")]) == STORAGE
    assert check.main(["--manifest", str(folder / "none.json")]) == USAGE
    _rows(folder, lambda rows: [])
    (folder / "m.json").write_text("[]")
    assert check.main(path) == NOTHING


def test_raw_does_not_go_with_a_manifest(folder, capsys):
    options = ["--manifest", str(folder / "m.json"), "--workers", "1"]
    assert check.main([*options, "--raw", str(folder)]) == USAGE
    assert "error: schema: --raw goes with --dataset" in capsys.readouterr().err


def test_interrupt_is_one_line(folder, monkeypatch, capsys):
    def stop(record):
        raise KeyboardInterrupt

    monkeypatch.setattr(check, "examine", stop)
    path = ["--manifest", str(folder / "m.json"), "--workers", "1"]
    assert check.main(path) == PREEMPTED
    assert capsys.readouterr().err.startswith("interrupted")


@pytest.mark.parametrize(
    ("error", "reason"), [(MemoryError(), "out_of_memory"), (KeyError("x"), "internal")]
)
def test_what_escapes_costs_one_scan(folder, monkeypatch, error, reason):
    plain = check.examine

    def fail(record):
        if record.id == "a1":
            raise error
        return plain(record)

    monkeypatch.setattr(check, "examine", fail)
    report = _check(folder)
    (finding,) = _found(report, "a1")
    assert finding.reason == reason
    assert len(report["scans"]) == 4 and check.exit_code(report) == PARTLY


def test_few_scans_and_no_pairs_are_told(folder):
    _rows(folder, lambda rows: [r for r in rows if r["id"] not in ("a1", "a3")])
    report = _check(folder)
    told = {f.id: f.level for f in report["findings"] if f.reason == "empty"}
    assert told == {"abdomen/train": "error", "abdomen/val": "warning"}
    assert check.exit_code(report) == USAGE


def test_scans_of_one_patient_apart_are_told(phantoms, folder):
    far = phantoms[1].vox2world.copy()
    far[2, 3] += 400
    _write(folder, "a1", phantoms[1].hu, phantoms[1].labels, far)

    def change(rows):
        for row in rows[:2]:
            row.update(task="liver", subject="p")
        return rows[:2]

    _rows(folder, change)
    (finding,) = _found(_check(folder), "a1")
    assert finding.reason == "no_overlap" and finding.got == "0 % along z"


def test_workers_give_the_same_report(folder):
    one, two = (check.to_json(_check(folder, workers=n)) for n in (1, 2))
    assert one == two


def test_reports_are_strict_and_name_no_folder(folder, capsys):
    (folder / "a0.nii.gz").write_bytes(b"hello")
    _write(folder, "a1", None, np.ones((5, 6, 7), np.uint8), np.diag([60, 60, 60, 1.0]))
    names = json.loads((folder / "map.json").read_text())
    names["200"] = "<img src=x>|*y*"
    (folder / "map.json").write_text(json.dumps(names))
    json_path, md_path = folder / "r.json", folder / "r.md"
    arguments = ["--manifest", str(folder / "m.json"), "--workers", "1"]
    arguments += ["--json", str(json_path), "--markdown", str(md_path)]
    assert check.main(arguments) == PARTLY

    def no_constant(word):
        raise AssertionError(word)

    report = json.loads(json_path.read_text(), parse_constant=no_constant)
    assert [s["id"] for s in report["scans"]] == ["a0", "a1", "a2", "a3"]
    assert report["findings"][0]["level"] == "error"
    text = md_path.read_text()
    for content in (json_path.read_text(), text, capsys.readouterr().out):
        assert str(folder) not in content and str(folder.parent) not in content
    assert "<img" not in text and "&lt;img src=x>\\|*y*" in text
    assert "shape (64, 52, 48) on LPS axes" in text


def test_table_is_one_printable_line_each():
    odd = findings.Finding("error", "a\nb", "schema", "x\x1b[2J", "e", "g", "")
    (line,) = findings.table([odd])
    assert line.isprintable() and "a\\nb" in line


def test_refusals_are_taken_apart():
    text = "/d/x.nii: truncated: expected 5 bytes, got 3, 4; or 5; copy it again"
    error = UserError("truncated", text)
    finding = findings.from_error("a", "image", error, "/d/x.nii")
    assert finding[4:] == ("5 bytes", "3, 4; or 5", "copy it again")
    odd = findings.from_error("a", "image", UserError("storage", "full"), "/d/x.nii")
    assert (odd.got, odd.remedy) == ("full", "")


# --- real scans ---


def test_real_mirrored_labels_are_found(data_root, tmp_path):
    folder = data_root / "abdomen_btcv_labels"
    if not folder.is_dir():
        pytest.skip("no abdomen labels among the real scans")
    row = _row(
        "btcv",
        image=str(folder / "labels" / "AbdomenCTCT_0001_0000.nii.gz"),
        label=str(folder / "labels" / "AbdomenCTCT_0001_0000.nii.gz"),
        label_map=str(folder / "labels.json"),
    )
    (tmp_path / "m.json").write_text(json.dumps([row]))
    report = _check(tmp_path, roots=[data_root])
    found = {f.reason: f for f in _found(report, "btcv")}
    assert "a label map" in found["hu_range"].got
    assert "the liver on the left" in found["mirrored"].got


def test_real_scans_of_training_have_no_error(data_root, tmp_path):
    folder = data_root / "headneck_openkbp"
    if not folder.is_dir():
        pytest.skip("no head-neck scans among the real scans")
    rows = []
    for path in sorted((folder / "images").glob("*.nii.gz"))[:3]:
        rows.append(
            _row(
                path.name[:9],
                image=str(path),
                label=str(folder / "labels" / path.name),
                label_map=str(folder / "labels.json"),
                task="headneck",
            )
        )
    (tmp_path / "m.json").write_text(json.dumps(rows))
    report = _check(tmp_path, roots=[data_root])
    assert check.exit_code(report) == 0
    assert all(not scan["findings"] for scan in report["scans"])


# --- public layouts ---


def test_folder_of_a_public_layout_is_checked_and_drawn(phantoms, tmp_path, capsys):
    raw = tmp_path / "Dataset001_X"
    for folder in ("imagesTr", "labelsTr"):
        (raw / folder).mkdir(parents=True)
    for i, scan in enumerate(phantoms):
        hu = scan.hu + 1024 if i == 1 else scan.hu
        place = scan.vox2world
        nifti.write_volume(raw / f"imagesTr/x_{i:03}_0000.nii.gz", hu, place)
        nifti.write_volume(raw / f"labelsTr/x_{i:03}.nii.gz", scan.labels, place)
    labels = {name: i for i, name in enumerate(("background", *scan.label_names))}
    description = {"channel_names": {"0": "CT"}, "labels": labels, "numTraining": 3}
    description["file_ending"] = ".nii.gz"
    (raw / "dataset.json").write_text(json.dumps(description))
    options = ["--dataset", "nnunet", "--raw", str(raw), "--workers", "1"]
    assert check.main(options) == USAGE
    assert "needs --task" in capsys.readouterr().err
    options += ["--task", "abdomen"]
    assert check.main(options) == PARTLY
    out = capsys.readouterr().out
    assert "offset is not subtracted" in out and "3 scans: 1 errors" in out
    assert preview.main([*options, "--out", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "abdomen.png").is_file()
