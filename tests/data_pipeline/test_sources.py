"""Overlapping structures, listed pairs and landmarks: from manifest to store."""

import errno
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from data_pipeline import check, loader, prepare, sources, store
from data_pipeline.datasets import manifest
from unireg_jax.errors import UserError
from unireg_jax.imaging import nifti, points
from unireg_jax.imaging.preprocess import PreprocessSpec

SHAPE = (24, 19, 17)
SPACING = np.diag([8.0, 9.0, 10.0, 1.0])
SPEC = PreprocessSpec(shape=(24, 19, 17), spacing_mm=(8.0, 9.0, 10.0))


def test_a_structure_named_twice_is_in_one_layer():
    """By a label map and by a mask: DSC would count it twice."""
    layers = [np.array([1, 1, 1, 0], np.uint8), np.array([2, 0, 0, 0], np.uint8)]
    sources._add(layers, np.array([True, True, True, True]), 1)
    np.testing.assert_array_equal(layers, [[1, 1, 1, 1], [2, 0, 0, 0]])


def _body():
    """A body that fills the middle, so that the network grid is the scan's own."""
    hu = np.full(SHAPE, -1000, np.int16)
    hu[3:-3, 3:-3, 3:-3] = 40
    return hu


def _write(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    nifti.write_volume(path, array, SPACING)
    return path.name


def _box(low, high):
    mask = np.zeros(SHAPE, np.uint8)
    mask[low:high, 5:12, 5:12] = 1
    return mask


def _row(name, subject, task="liver", **more):
    return dict(
        id=name,
        image=f"{name}.nii.gz",
        task=task,
        subject=subject,
        split="train",
        **more,
    )


def _manifest(folder, rows, pairs=None):
    value = {"volumes": rows} if pairs is None else {"volumes": rows, "pairs": pairs}
    (folder / "m.json").write_text(json.dumps(value))
    return folder / "m.json"


@pytest.fixture
def scans(tmp_path):
    """Three scans of one patient with a landmark table and masks each."""
    for n, name in enumerate("abc"):
        _write(tmp_path / f"{name}.nii.gz", _body())
        lines = f"x_mm,y_mm,z_mm\n{50 + n},60,70\n80,90,{100 + n}\n"
        (tmp_path / f"{name}.csv").write_text(lines)
    _write(tmp_path / "left.nii.gz", _box(5, 10))
    _write(tmp_path / "right.nii.gz", _box(8, 14) * 255)
    _write(tmp_path / "whole.nii.gz", _box(4, 16))
    return tmp_path


def _layers(root, entry):
    layers = [store.read_array(root, entry, "labels")]
    if "overlaps" in entry:
        layers += list(store.read_array(root, entry, "overlaps"))
    return np.stack(layers)


def test_masks_overlap_without_loss(scans, tmp_path):
    masks = {"part": ["left.nii.gz", "right.nii.gz"], "whole": "whole.nii.gz"}
    path = _manifest(scans, [_row("a", "p", masks=masks, roi="left.nii.gz")])
    index = prepare.prepare(manifest.collect(path).records, tmp_path / "out", SPEC)
    (entry,) = index["volumes"]
    assert index["tasks"]["liver"]["labels"] == ["part", "whole"]
    layers = _layers(tmp_path / "out", entry)
    assert layers.shape[0] == 2
    part, whole = (_box(5, 14) > 0), (_box(4, 16) > 0)
    np.testing.assert_array_equal((layers == 1).any(axis=0), part)
    np.testing.assert_array_equal((layers == 2).any(axis=0), whole)
    np.testing.assert_array_equal(layers[0] == 1, part)  # listed first wins
    roi = store.read_array(tmp_path / "out", entry, "roi")
    np.testing.assert_array_equal(roi, _box(5, 10))
    _, labels, _ = loader.Dataset(tmp_path / "out").volume(0)
    np.testing.assert_array_equal(labels, layers[0])


def test_digest_of_a_header_is_of_its_voxels_too(tmp_path):
    sitk = pytest.importorskip("SimpleITK")
    path = str(tmp_path / "a.mhd")
    sitk.WriteImage(sitk.GetImageFromArray(np.ascontiguousarray(_body().T)), path)
    record = manifest.Record("a", path, None, None, "liver", "p", "train")
    np.testing.assert_array_equal(sources.read_scan(record).data, _body())
    before = sources.digests(record)["image"]
    content = bytearray((tmp_path / "a.raw").read_bytes())
    content[0] ^= 1
    (tmp_path / "a.raw").write_bytes(content)
    assert sources.digests(record)["image"] != before


def test_label_map_puts_an_id_into_several_structures(scans, tmp_path):
    raw_ids = _box(5, 10) * 3 + _box(10, 14) * 7
    _write(scans / "l.nii.gz", raw_ids)
    (scans / "map.json").write_text('{"3": ["inner", "outer"], "7": "outer"}')
    row = _row("a", "p", label="l.nii.gz", label_map="map.json")
    records = manifest.collect(_manifest(scans, [row])).records
    assert records[0].label_map == ((3, "inner"), (3, "outer"), (7, "outer"))
    index = prepare.prepare(records, tmp_path / "out", SPEC)
    layers = _layers(tmp_path / "out", index["volumes"][0])
    np.testing.assert_array_equal((layers == 1).any(axis=0), raw_ids == 3)
    np.testing.assert_array_equal((layers == 2).any(axis=0), raw_ids > 0)


def test_masks_come_after_the_label_map(scans):
    _write(scans / "l.nii.gz", _box(5, 10))
    (scans / "map.json").write_text('{"1": "z"}')
    row = _row("a", "p", label="l.nii.gz", label_map="map.json")
    row["masks"] = {"a": "whole.nii.gz"}
    (record,) = manifest.collect(_manifest(scans, [row])).records
    layers, _ = sources.read_layers(record, sources.read_scan(record), ("a", "z"))
    np.testing.assert_array_equal(layers[0] == 2, _box(5, 10) > 0)
    np.testing.assert_array_equal((layers == 1).any(axis=0), _box(4, 16) > 0)


def test_changed_mask_is_made_again(scans, tmp_path):
    rows = [_row("a", "p", masks={"part": "left.nii.gz"}, points="a.csv")]
    path, out = _manifest(scans, rows), tmp_path / "out"

    def run():
        told = []
        prepare.prepare(manifest.collect(path).records, out, SPEC, report=told.append)
        return told[0]["status"]

    assert [run(), run()] == ["done", "skipped"]
    _write(scans / "left.nii.gz", _box(5, 9))
    assert [run(), run()] == ["done", "skipped"]
    (scans / "a.csv").write_text("1,2,3\n")
    assert [run(), run()] == ["done", "skipped"]
    (out / "volumes" / "a.points.npy").unlink()
    assert run() == "done"


def test_mask_on_another_grid_is_refused(scans, tmp_path):
    nifti.write_volume(scans / "left.nii.gz", _box(5, 9), np.diag([8.0, 9, 11, 1]))
    path = _manifest(scans, [_row("a", "p", masks={"part": "left.nii.gz"})])
    index = prepare.prepare(manifest.collect(path).records, tmp_path / "out", SPEC)
    assert [f["reason"] for f in index["failed"]] == ["grid_mismatch"]


def test_listed_pairs_are_the_only_ones_of_their_split(scans, tmp_path):
    rows = [_row(name, "p", points=f"{name}.csv") for name in "abc"]
    path = _manifest(scans, rows, [["c", "a"], ["a", "b"]])
    found = manifest.collect(path)
    index = prepare.prepare(found.records, tmp_path / "out", SPEC, pairs=found.pairs)
    assert index["pairs"] == {"liver": {"train": [["c", "a"], ["a", "b"]]}}
    dataset = loader.Dataset(tmp_path / "out")
    assert [(p.fixed, p.moving) for p in dataset.pairs("train")] == [(2, 0), (0, 1)]
    assert dataset.pairs("val") == []
    all_pairs = prepare.prepare(found.records, tmp_path / "all", SPEC)
    assert "pairs" not in all_pairs
    everything = loader.Dataset(tmp_path / "all")
    assert len(everything.pairs("train")) == 6
    assert everything.digest != dataset.digest


def test_a_listed_pair_of_a_failed_scan_brings_no_other(scans, tmp_path):
    (scans / "b.nii.gz").write_bytes(b"torn")
    path = _manifest(scans, [_row(name, "p") for name in "abc"], [["a", "b"]])
    found = manifest.collect(path)
    prepare.prepare(found.records, tmp_path / "out", SPEC, pairs=found.pairs)
    assert loader.Dataset(tmp_path / "out").pairs("train") == []


def test_landmarks_of_a_pair_can_be_evaluated(scans, tmp_path):
    rows = [_row(name, "p", points=f"{name}.csv") for name in "abc"]
    path = _manifest(scans, rows, [["a", "b"]])
    found = manifest.collect(path)
    out = tmp_path / "out"
    prepare.prepare(found.records, out, SPEC, pairs=found.pairs)
    table = points.read_points(out / "points" / "a__b.csv")
    np.testing.assert_array_equal(table.fixed, [[50, 60, 70], [80, 90, 100]])
    np.testing.assert_array_equal(table.moving, [[51, 60, 70], [80, 90, 101]])
    assert [p.name for p in (out / "points").iterdir()] == ["a__b.csv"]


def test_landmarks_of_an_earlier_run_go(scans, tmp_path):
    out = tmp_path / "out"
    rows = [_row(name, "p", points=f"{name}.csv") for name in "ab"]
    bare = [_row(name, "p") for name in "ab"]
    for listed, pair, expected in (
        (rows, ["a", "b"], {"a__b.csv", "own.csv"}),
        (rows, ["b", "a"], {"b__a.csv", "own.csv"}),
        (bare, ["b", "a"], {"own.csv"}),
    ):
        found = manifest.collect(_manifest(scans, listed, [pair]))
        store.make_folders(out, "points")
        (out / "points" / "own.csv").write_text("of the user")
        prepare.prepare(found.records, out, SPEC, pairs=found.pairs)
        assert {p.name for p in (out / "points").iterdir()} == expected


def test_landmarks_that_do_not_correspond_warn(scans, tmp_path):
    (scans / "b.csv").write_text("1,2,3\n")
    rows = [_row(name, "p", points=f"{name}.csv") for name in "ab"]
    path = _manifest(scans, rows, [["a", "b"]])
    found = manifest.collect(path)
    index = prepare.prepare(found.records, tmp_path / "out", SPEC, pairs=found.pairs)
    assert index["warnings"] == ["points: 2 and 1 points of a and b do not correspond"]


def test_landmarks_of_two_pairs_are_not_one_file(scans, tmp_path):
    """Which ids with underscores can make of them; a table tells no ids."""
    ids = ("a", "b__c", "a__b", "c")
    for name in set(ids) - {"a", "c"}:
        shutil.copy(scans / "a.nii.gz", scans / f"{name}.nii.gz")
        shutil.copy(scans / "a.csv", scans / f"{name}.csv")
    rows = [_row(name, "p", points=f"{name}.csv") for name in ids]
    found = manifest.collect(_manifest(scans, rows, [["a", "b__c"], ["a__b", "c"]]))
    index = prepare.prepare(found.records, tmp_path / "out", SPEC, pairs=found.pairs)
    (line,) = index["warnings"]
    assert line == "points: a__b__c.csv is of another pair already: rename an id"


def test_index_of_the_first_version_is_read(scans, tmp_path):
    path = _manifest(scans, [_row(name, "p") for name in "abc"])
    index = prepare.prepare(manifest.collect(path).records, tmp_path / "out", SPEC)
    digest = store.index_digest(index)
    store.write_index(tmp_path / "out", {**index, "version": 1})
    old = loader.Dataset(tmp_path / "out")
    assert len(old.pairs("train")) == 6
    assert store.index_digest(old.index) == digest  # runs go on


@pytest.mark.parametrize(
    ("pairs", "says"),
    [
        ("ab", "pairs: a list expected"),
        ([["a"]], 'pair 1: \\["fixed id", "moving id"\\] expected'),
        ([["a", "x"]], "no scan has the id 'x'"),
        ([["a", "a"]], "liver takes two scans of one subject"),
        ([["a", "c"]], "liver takes two scans of one subject"),
        ([["a", "d"]], "got liver/train and abdomen/train"),
        ([["a", "b"], ["a", "b"]], "1 listed twice"),
    ],
)
def test_bad_pairs_are_refused(scans, pairs, says):
    _write(scans / "d.nii.gz", _body())
    rows = [_row("a", "p"), _row("b", "p"), _row("c", "q"), _row("d", "p", "abdomen")]
    with pytest.raises(UserError, match=says):
        manifest.collect(_manifest(scans, rows, pairs))


@pytest.mark.parametrize(
    "masks", ["left.nii.gz", ["left.nii.gz"], {"": "left.nii.gz"}, {"a": []}, {"a": 1}]
)
def test_bad_masks_are_refused(scans, masks):
    with pytest.raises(UserError, match='masks: {"name": "file" or .* expected'):
        manifest.collect(_manifest(scans, [_row("a", "p", masks=masks)]))


def test_a_mask_outside_the_declared_folders_is_refused(scans):
    masks = {"a": "../secret.nii.gz"}
    with pytest.raises(UserError, match="leads outside"):
        manifest.collect(_manifest(scans, [_row("a", "p", masks=masks)]))


def test_a_folder_of_dicom_is_an_image(scans, tmp_path):
    pytest.importorskip("pydicom")
    from tests import dicom_files

    folder = scans / "series"
    dicom_files.write_series(folder, _body(), spacing_mm=(8.0, 9.0, 10.0))
    path = _manifest(scans, [dict(_row("a", "p"), image="series"), _row("b", "p")])
    out = tmp_path / "out"
    index = prepare.prepare(manifest.collect(path).records, out, SPEC)
    a, b = (store.read_array(out, v, "image") for v in index["volumes"])
    np.testing.assert_array_equal(a, b)
    told = []
    prepare.prepare(manifest.collect(path).records, out, SPEC, report=told.append)
    assert [t["status"] for t in told] == ["skipped", "skipped"]
    next(folder.glob("*004.dcm")).unlink()
    index = prepare.prepare(manifest.collect(path).records, out, SPEC)
    assert [f["reason"] for f in index["failed"]] == ["slices"]


def test_damaged_slices_fail_their_scan_alone(scans, tmp_path):
    pytest.importorskip("pydicom")
    from tests import dicom_files

    faults = {"number": "scaling", "cut": "truncated", "empty": "empty"}
    for name in faults:
        paths = dicom_files.write_series(
            scans / name, _body(), spacing_mm=(8.0, 9.0, 10.0)
        )
        if name == "number":
            dicom_files.respell(paths[2], "RescaleSlope", "abc")
        else:
            content = paths[-1].read_bytes()
            paths[-1].write_bytes(content[:300] if name == "cut" else b"")
    rows = [dict(_row(name, "p"), image=name) for name in faults]
    path = _manifest(scans, [*rows, _row("a", "p")])
    index = prepare.prepare(manifest.collect(path).records, tmp_path / "out", SPEC)
    assert {f["id"]: f["reason"] for f in index["failed"]} == faults
    assert [v["id"] for v in index["volumes"]] == ["a"]
    report = check.check_collection(*manifest.examine(path), workers=1)
    found = {f.id: f.reason for f in report["findings"] if f.id in faults}
    assert found == faults


@pytest.mark.parametrize(
    ("code", "reason"), [(errno.EACCES, "permission"), (errno.EIO, "storage")]
)
def test_a_folder_of_slices_that_cannot_be_listed_is_told(
    scans, tmp_path, monkeypatch, code, reason
):
    (scans / "series").mkdir()
    rows = [dict(_row("a", "p"), image="series"), _row("b", "p")]
    records = manifest.collect(_manifest(scans, rows)).records
    plain = Path.iterdir

    def refuse(folder):
        if folder.name == "series":
            raise OSError(code, os.strerror(code))
        return plain(folder)

    monkeypatch.setattr(Path, "iterdir", refuse)
    index = prepare.prepare(records, tmp_path / "out", SPEC)
    assert [f["reason"] for f in index["failed"]] == [reason]
    assert "series: " in index["failed"][0]["message"]
    assert [v["id"] for v in index["volumes"]] == ["b"]
