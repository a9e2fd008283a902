"""Adapters, each on a miniature of the real layout with its odd extras."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from data_pipeline import check, loader, prepare, store
from data_pipeline.datasets import (
    DATASETS,
    abdomen,
    dirlab4dct,
    folders,
    manifest,
    segrap2023,
)
from unireg_jax.errors import NOTHING, USAGE, UserError
from unireg_jax.imaging import nifti, points

SHAPE = (24, 19, 17)
VOX2WORLD = np.diag([8.0, 9.0, 10.0, 1.0])
GRID = ["--shape", "24,19,17", "--spacing", "8,9,10"]


def _body():
    hu = np.full(SHAPE, -1000, np.int16)
    hu[3:-3, 3:-3, 3:-3] = 40
    return hu


def _write(path, array=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    nifti.write_volume(path, _body() if array is None else array, VOX2WORLD)


def _ids(*ids):
    """A label map with a block of four voxels or more for every id."""
    labels = np.zeros(SHAPE, np.uint8)
    for n, i in enumerate(ids):
        labels[5 + n % 12, 4 + n // 12 * 2 : 6 + n // 12 * 2, 5:9] = i
    return labels


def _mask(*ids):
    return (
        (_ids(*range(1, 61)) == np.array(ids)[:, None, None, None])
        .any(axis=0)
        .astype(np.uint8)
    )


def _splits(found):
    """split -> ids; and no subject is in two of them."""
    subjects = {}
    for record in found.records:
        assert subjects.setdefault(record.subject, record.split) == record.split
    return {
        split: [r.id for r in found.records if r.split == split]
        for split in ("train", "val", "test")
    }


def _prepare(name, raw, out, *more):
    """Runs the command and opens what it made."""
    argv = ["--dataset", name, "--raw", str(raw), "--out", str(out), *GRID, *more]
    assert prepare.main(argv) == 0
    return loader.Dataset(out)


def _layers(dataset, position):
    entry = dataset.index["volumes"][position]
    layers = [store.read_array(dataset.root, entry, "labels")]
    if "overlaps" in entry:
        layers += list(store.read_array(dataset.root, entry, "overlaps"))
    return np.stack(layers)


def _refusal(name, folder):
    with pytest.raises(UserError) as caught:
        DATASETS[name](folder)
    assert caught.value.exit_code == USAGE and "\n" not in str(caught.value)
    return str(caught.value)


# --- one miniature per dataset ---


def _segrap(root, *, maps=True, masks=True, cases=4):
    training = root / "SegRap2023_Training_Set_120cases"
    for n in range(cases):
        case = training / f"segrap_{n:04d}"
        for name in ("image", "image_contrast"):
            _write(case / f"{name}.nii.gz")
        for name in ("GTVp", "GTVnd"):
            _write(case / f"{name}.nii.gz", _mask(60))
        if masks:
            for organ in ("Brain", "BrainStem", "Hippocampus_L", "TemporalLobe_L"):
                ids = segrap2023.ORGANS[organ]
                _write(case / f"{organ}.nii.gz", _mask(*ids) * 255)
        if maps:
            folder = root / f"{training.name}_OneHot_Labels" / "Task001"
            _write(folder / f"{case.name}.nii.gz", _ids(*range(1, 55)))
            _write(
                root / f"{training.name}_OneHot_Labels/Task002" / f"{case.name}.nii.gz",
                _ids(1, 2),
            )
    (training / ".DS_Store").write_bytes(b"x")
    (training / "segrap_0000" / "._image.nii.gz").write_bytes(b"x")
    (root / "__MACOSX").mkdir(parents=True, exist_ok=True)


def _l2r_json(root, name, **fields):
    value = {
        "name": name,
        "release": "1.1",
        "pairings": "unpaired",
        "provided_data": {"0": ["image", "label"]},
        "registration_direction": {"fixed": 0, "moving": 0},
        "modality": {"0": "CT"},
        "tensorImageShape": {"0": list(SHAPE)},
        **fields,
    }
    (root / f"{name}_dataset.json").write_text(json.dumps(value))


def _l2r_abdomen(root, *, label=None, count=6):
    training = []
    for n in range(1, count + 1):
        scan = f"AbdomenCTCT_{n:04d}_0000.nii.gz"
        labels = _ids(*range(1, 14)) if label is None else label(n)
        _write(root / "imagesTr" / scan)
        _write(root / "labelsTr" / scan, labels)
        training.append({"image": f"./imagesTr/{scan}", "label": f"./labelsTr/{scan}"})
    _write(root / "imagesTs" / "AbdomenCTCT_0040_0000.nii.gz")
    val = [f"./imagesTr/AbdomenCTCT_{n:04d}_0000.nii.gz" for n in (count - 1, count)]
    _l2r_json(
        root,
        "AbdomenCTCT",
        training=training,
        test=[
            {"image": "./imagesTs/AbdomenCTCT_0040_0000.nii.gz"},
            {"image": "./imagesTs/AbdomenCTCT_0041_0000.nii.gz"},
        ],
        registration_val=[{"fixed": val[0], "moving": val[1]}],
    )
    (root / "imagesTr" / "._AbdomenCTCT_0001_0000.nii.gz").write_bytes(b"x")


def _l2r_lung(root):
    training, pairs = [], []
    for n in range(1, 5):
        names = [f"LungCT_{n:04d}_{phase:04d}" for phase in (0, 1)]
        for phase, name in enumerate(names):
            _write(root / "imagesTr" / f"{name}.nii.gz")
            _write(root / "masksTr" / f"{name}.nii.gz", _mask(*range(1, 40)))
            (root / "keypointsTr").mkdir(exist_ok=True)
            text = f"5,6,{7 + phase}\n10.5,9,8\n"
            (root / "keypointsTr" / f"{name}.csv").write_text(text)
            training.append(
                {
                    "image": f"./imagesTr/{name}.nii.gz",
                    "mask": f"./masksTr/{name}.nii.gz",
                    "keypoints": f"./keypointsTr/{name}.nii.gz",
                }
            )
        pairs.append(
            {
                k: f"./imagesTr/{v}.nii.gz"
                for k, v in zip(("fixed", "moving"), names, strict=True)
            }
        )
    (root / "landmarksTr").mkdir()
    for phase in (0, 1):
        path = root / "landmarksTr" / f"LungCT_0001_{phase:04d}.csv"
        path.write_text(f"3,4,{5 + phase}\n")
    _l2r_json(
        root,
        "LungCT",
        pairings="paired",
        training=training,
        test=[],
        training_paired_images=pairs,
        registration_val=pairs[:1],
    )


def _btcv(root, *, pairs=True):
    for n in (1, 2, 3, 10, 21, 40):
        _write(root / "Training/img" / f"img{n:04d}.nii.gz")
        _write(root / "Training/label" / f"label{n:04d}.nii.gz", _ids(*range(1, 14)))
    _write(root / "Testing/img/img0061.nii.gz")
    if pairs:
        (root / "pairs_val.csv").write_text("fixed,moving\n21,40\n40,21\n")
    (root / "Training/img/.hidden.nii.gz").write_bytes(b"x")


def _dirlab(root):
    layouts = {
        1: ("Case1Pack", "Images/case1_{}_s.img", "ExtremePhases/Case1_300_{}_xyz.txt"),
        8: (
            "Case8Deploy",
            "Images/case8_{}-ssm.img",
            "extremePhases/case8_dirLab300_{}_xyz.txt",
        ),
    }
    for _case, (pack, image, table) in layouts.items():
        for phase in ("T00", "T10", "T50"):
            path = root / pack / image.format(phase)
            path.parent.mkdir(parents=True, exist_ok=True)
            (_body() + 1024).astype("<i2").ravel(order="F").tofile(path)
            path = root / pack / table.format(phase)
            path.parent.mkdir(parents=True, exist_ok=True)
            if phase != "T10":
                path.write_text(f"5\t6\t7\r\n 9\t9\t{8 if phase == 'T00' else 7}\r\n")
    (root / "Case1Pack" / "Images" / "._case1_T00_s.img").write_bytes(b"x")
    (root / "Case99Pack").mkdir()


def _totalseg(root, *, meta=True, cases=5):
    kinds = (
        "ct thorax-abdomen-pelvis",
        "ct thorax",
        "ct abdomen-pelvis",
        "ct angiography head",
        "ct polytrauma",
    )
    lines = ["image_id;age;gender;institute;study_type;split;pathology"]
    for n in range(cases):
        case = root / f"s{n:04d}"
        _write(case / "ct.nii.gz")
        abdominal = "abdomen" in kinds[n % 5] or n % 5 == 4
        for organ, there in (
            ("liver", abdominal),
            ("spleen", abdominal),
            ("kidney_left", abdominal),
            ("heart", not abdominal),
            ("lung_upper_lobe_left", not abdominal),
            ("lung_lower_lobe_right", not abdominal),
        ):
            ids = (len(organ),) if there else ()
            _write(case / "segmentations" / f"{organ}.nii.gz", _ids(*ids) > 0)
        split = ("train", "train", "val", "train", "test")[n % 5]
        lines.append(f"s{n:04d};50;m;A;{kinds[n % 5]};{split};tumor")
    if meta:
        (root / "meta.csv").write_bytes("\r\n".join(lines).encode("utf-8-sig"))


def _amos(root):
    for folder, ids in (("Tr", (1, 4, 507)), ("Va", (8, 9, 510)), ("Ts", (2,))):
        for n in ids:
            _write(root / f"images{folder}" / f"amos_{n:04d}.nii.gz")
            if folder != "Ts":
                path = root / f"labels{folder}" / f"amos_{n:04d}.nii.gz"
                _write(path, _ids(*range(1, 16)))
    (root / "dataset.json").write_text("{}")
    (root / "imagesTr" / "._amos_0001.nii.gz").write_bytes(b"x")


def _flare(root):
    training = root / "Training/FLARE22_LabeledCase50"
    for n in range(1, 9):
        _write(training / "images" / f"FLARE22_Tr_{n:04d}_0000.nii.gz")
        _write(training / "labels" / f"FLARE22_Tr_{n:04d}.nii.gz", _ids(*range(1, 14)))
    _write(root / "Validation/images/FLARETs_0001_0000.nii.gz")
    (training / "images.zip").write_bytes(b"PK")


def _nnunet(root, *, labels=None, version=2):
    for n in range(1, 7):
        _write(root / "imagesTr" / f"case_{n:03d}_0000.nii.gz")
        _write(root / "labelsTr" / f"case_{n:03d}.nii.gz", _ids(1, 2, 3))
    _write(root / "imagesTs" / "case_101_0000.nii.gz")
    value = {
        "channel_names": {"0": "CT"},
        "labels": labels
        or {"background": 0, "liver": [1, 2, 3], "tumour": [2, 3], "core": 3},
        "numTraining": 6,
        "file_ending": ".nii.gz",
    }
    if version == 1:
        value["modality"] = value.pop("channel_names")
        value["labels"] = {"0": "background", "1": "liver", "2": "tumour"}
    (root / "dataset.json").write_text(json.dumps(value))


# --- what each gives ---


@pytest.mark.parametrize("variant", ["maps", "masks"])
def test_segrap_organs_overlap_alike_from_maps_and_masks(tmp_path, variant):
    _segrap(tmp_path / "raw", maps=variant == "maps")
    dataset = _prepare("segrap2023", tmp_path / "raw", tmp_path / "out")
    names = dataset.label_names("headneck")
    assert len(names) == (45 if variant == "maps" else 4)
    layers = _layers(dataset, 0)
    for organ in ("Brain", "BrainStem", "Hippocampus_L", "TemporalLobe_L"):
        found = (layers == names.index(organ) + 1).any(axis=0)
        np.testing.assert_array_equal(found, _mask(*segrap2023.ORGANS[organ]) > 0)
    # What is trained on is the small organ, not the brain around it.
    stem, hippocampus = (
        names.index(organ) + 1 for organ in ("BrainStem", "Hippocampus_L")
    )
    np.testing.assert_array_equal(layers[0] == stem, _mask(2) > 0)
    np.testing.assert_array_equal(layers[0] == hippocampus, _mask(6, 8) > 0)
    assert len(dataset.pairs("train")) == 2 and len(dataset.pairs("val")) == 2
    assert {v["task"] for v in dataset.index["volumes"]} == {"headneck"}


def test_segrap_all_45_organs_are_unions_of_54_classes(tmp_path):
    _segrap(tmp_path / "raw", masks=False, cases=2)
    dataset = _prepare("segrap2023", tmp_path / "raw", tmp_path / "out")
    names, layers = dataset.label_names("headneck"), _layers(dataset, 1)
    assert sorted(names) == sorted(segrap2023.ORGANS) and len(names) == 45
    used = {i for ids in segrap2023.ORGANS.values() for i in ids}
    assert used == set(range(1, 55))
    for organ, ids in segrap2023.ORGANS.items():
        found = (layers == names.index(organ) + 1).any(axis=0)
        np.testing.assert_array_equal(found, _mask(*ids) > 0, err_msg=organ)
    # Every organ keeps voxels of its own in what is trained on.
    trained = {names[i - 1] for i in np.unique(layers[0]) if i}
    assert set(names) - trained == set()


def test_segrap_corrected_maps_and_the_case_folder_itself(tmp_path):
    _segrap(tmp_path / "raw", masks=False, cases=2)
    update = tmp_path / "raw" / "SegRap2023_Training_Set_120cases_Update_Labels"
    _write(update / "Task001" / "segrap_0001.nii.gz", _ids(2))
    found = DATASETS["segrap2023"](tmp_path / "raw/SegRap2023_Training_Set_120cases")
    assert "OneHot" in found.records[0].labels
    assert "Update" in found.records[1].labels
    shutil.rmtree(update)
    shutil.rmtree(tmp_path / "raw/SegRap2023_Training_Set_120cases_OneHot_Labels")
    found = DATASETS["segrap2023"](tmp_path / "raw")
    assert found.notes == ("2 cases have no labels, such as segrap_0000",)


def test_learn2reg_abdomen_keeps_its_validation_pairs(tmp_path):
    _l2r_abdomen(tmp_path / "raw")
    found = DATASETS["learn2reg"](tmp_path / "raw")
    assert _splits(found) == {
        "train": [f"AbdomenCTCT_{n:04d}_0000" for n in range(1, 5)],
        "val": ["AbdomenCTCT_0005_0000", "AbdomenCTCT_0006_0000"],
        "test": ["AbdomenCTCT_0040_0000"],
    }
    assert found.pairs == (("AbdomenCTCT_0005_0000", "AbdomenCTCT_0006_0000"),)
    assert found.notes == ("1 test scans are not here, such as AbdomenCTCT_0041_0000",)
    assert found.records[-1].labels is None
    dataset = _prepare("learn2reg", tmp_path / "raw", tmp_path / "out")
    assert len(dataset.pairs("train")) == 12 and len(dataset.pairs("val")) == 1
    names = dict(abdomen.BTCV)
    assert set(dataset.label_names("abdomen")) == set(names.values())
    hu, labels, _ = dataset.volume(0)
    np.testing.assert_array_equal(
        labels == dataset.label_names("abdomen").index("liver") + 1,
        _ids(*range(1, 14)) == 6,
    )


def test_learn2reg_lung_pairs_masks_and_points(tmp_path):
    _l2r_lung(tmp_path / "raw")
    found = DATASETS["learn2reg"](tmp_path / "raw")
    assert [r.split for r in found.records[:3]] == ["val", "val", "train"]
    assert found.pairs[0] == ("LungCT_0002_0000", "LungCT_0002_0001")
    assert found.pairs[-1] == ("LungCT_0001_0000", "LungCT_0001_0001")
    assert "landmarksTr" in found.records[0].points
    assert "keypointsTr" in found.records[2].points
    dataset = _prepare("learn2reg", tmp_path / "raw", tmp_path / "out")
    assert len(dataset.pairs("train")) == 3  # fixed and moving as listed, not both ways
    assert len(dataset.pairs("val")) == 1
    assert dataset.label_names("lung") == ("lungs",)
    _, labels, _ = dataset.volume(0)
    np.testing.assert_array_equal(labels, _mask(*range(1, 40)))
    roi = store.read_array(dataset.root, dataset.index["volumes"][0], "roi")
    np.testing.assert_array_equal(roi, labels)
    table = tmp_path / "out/points/LungCT_0002_0000__LungCT_0002_0001.csv"
    fixed = points.read_points(table).fixed
    # Written as RAS by the test's writer or not, a voxel's place is the affine's.
    np.testing.assert_allclose(fixed, [[40, 54, 70], [84, 81, 80]])
    landmarks = tmp_path / "out/points/LungCT_0001_0000__LungCT_0001_0001.csv"
    np.testing.assert_allclose(points.read_points(landmarks).moving, [[24, 36, 60]])


def test_learn2reg_points_are_those_of_the_pair(tmp_path):
    """ThoraxCBCT: 0000 has other key points in each pair, a scan one table only."""
    names = [f"ThoraxCBCT_0001_000{m}" for m in (0, 1, 2)]
    for name in names:
        _write(tmp_path / "imagesTr" / f"{name}.nii.gz")
    for kind, pair in (("keypoints01Tr", (0, 1)), ("keypoints02Tr", (0, 2))):
        (tmp_path / kind).mkdir()
        for m in pair:
            (tmp_path / kind / f"{names[m]}.csv").write_text("5,6,7\n")
    images = [f"./imagesTr/{name}.nii.gz" for name in names]
    pairs = [{"fixed": images[m], "moving": images[0]} for m in (1, 2)]
    training = [{"image": image} for image in images]
    _l2r_json(tmp_path, "ThoraxCBCT", training=training, training_paired_images=pairs)
    found = DATASETS["learn2reg"](tmp_path)
    tables = [record.points and Path(record.points) for record in found.records]
    assert tables == [
        *(tmp_path / "keypoints01Tr" / f"{name}.csv" for name in names[:2]),
        None,
    ]
    assert found.notes[0].startswith("1 pairs are without points")


def test_learn2reg_refuses_what_is_not_ct(tmp_path):
    _l2r_json(tmp_path, "OASIS", training=[])
    assert "expected one of AbdomenCTCT, LungCT" in _refusal("learn2reg", tmp_path)
    (tmp_path / "OASIS_dataset.json").unlink()
    (tmp_path / "NLST_dataset.json").write_text('{"training": [{"img": 1}]}')
    assert 'expected training: {"image": …}' in _refusal("learn2reg", tmp_path)
    (tmp_path / "NLST_dataset.json").write_text('{"training": [')
    assert "not valid JSON" in _refusal("learn2reg", tmp_path)


def test_descriptions_in_another_encoding_are_refused(tmp_path):
    latin = '"reference": "Universität"'.encode("cp1252")
    _btcv(tmp_path / "btcv", pairs=True)
    (table,) = (tmp_path / "btcv").rglob("pairs_val.csv")
    table.write_bytes(b"fixed,moving,\xe4\n1,2,3\n")
    assert "pairs_val.csv: UTF-8 text expected" in _refusal(
        "l2r2020_abdomen", tmp_path / "btcv"
    )
    _nnunet(tmp_path / "nnunet")
    (tmp_path / "nnunet" / "dataset.json").write_bytes(b"{%s}" % latin)
    assert "dataset.json: UTF-8 text expected" in _refusal(
        "nnunet", tmp_path / "nnunet"
    )


@pytest.mark.parametrize("pairs", [True, False])
def test_btcv_of_learn2reg_2020(tmp_path, pairs):
    _btcv(tmp_path / "raw", pairs=pairs)
    dataset = _prepare("l2r2020_abdomen", tmp_path / "raw", tmp_path / "out")
    found = DATASETS["l2r2020_abdomen"](tmp_path / "raw")
    splits = _splits(found)
    assert splits["test"] == ["btcv_0061"]
    assert len(splits["val"]) == 2 and len(splits["train"]) == 4
    assert len(dataset.pairs("train")) == 12 and len(dataset.pairs("val")) == 2
    if pairs:
        assert splits["val"] == ["btcv_0021", "btcv_0040"]
    inside = DATASETS["l2r2020_abdomen"](tmp_path / "raw" / "Training")
    assert len(inside.records) == 6


def test_dirlab_raw_files_and_landmarks(tmp_path, monkeypatch):
    small = {n: (SHAPE[0], 8.0, SHAPE[2]) for n in (1, 8)}
    monkeypatch.setattr(dirlab4dct, "CASES", small)
    monkeypatch.setattr(
        dirlab4dct,
        "RawGrid",
        lambda shape, spacing, *more: dirlab4dct_grid(SHAPE, (8.0, 9.0, 10.0), *more),
    )
    _dirlab(tmp_path / "raw")
    dataset = _prepare("dirlab4dct", tmp_path / "raw", tmp_path / "out")
    assert [v["id"] for v in dataset.index["volumes"]] == [
        "dirlab_case01_T00",
        "dirlab_case01_T50",
        "dirlab_case08_T00",
        "dirlab_case08_T50",
    ]
    pairs = dataset.pairs("test")
    assert [(p.fixed, p.moving) for p in pairs] == [(0, 1), (2, 3)]
    # Stored from the head to the feet.
    np.testing.assert_array_equal(dataset.volume(0)[0], _body()[..., ::-1])
    table = tmp_path / "out/points/dirlab_case08_T00__dirlab_case08_T50.csv"
    found = points.read_points(table)
    np.testing.assert_allclose(found.fixed, [[32, 45, -60], [64, 72, -70]])
    np.testing.assert_allclose(found.moving, [[32, 45, -60], [64, 72, -60]])


def dirlab4dct_grid(*published):
    from unireg_jax.imaging.raw import RawGrid

    return RawGrid(*published)


def test_dirlab_published_sizes(tmp_path):
    _dirlab(tmp_path)
    (first, *_), _, _ = DATASETS["dirlab4dct"](tmp_path)
    assert first.grid == ((256, 256, 94), (0.97, 0.97, 2.5), -1024, "LPI")
    os.unlink(tmp_path / "Case8Deploy/Images/case8_T50-ssm.img")
    found = DATASETS["dirlab4dct"](tmp_path)
    assert found.notes == ("case 8: no T00 and T50 image in Case8Deploy; left out",)


def test_hcc_tace_phases_within_a_study(tmp_path):
    pytest.importorskip("pydicom")
    from tests import dicom_files

    spacing = dict(spacing_mm=(8.0, 9.0, 10.0))
    for n in (1, 2, 7):
        patient = tmp_path / "raw" / f"HCC_{n:03d}"
        study = patient / "12-27-1997-NA-AP LIVER-05830"
        for series, number, acquisitions in (("pre", 2, (1,)), ("late", 4, (2, 3))):
            for k, acquisition in enumerate(acquisitions):
                dicom_files.write_series(
                    study / f"{number}.000000-{series}-7",
                    _body(),
                    series=f"1.{n}.{number}",
                    study=f"1.{n}",
                    number=number,
                    acquisition=acquisition,
                    description=f"{series} LIVER",
                    first_instance=1 + k * SHAPE[2],
                    **spacing,
                )
        dicom_files.write_series(
            study / "300.000000-Segmentation-1",
            _body()[..., :1],
            series=f"1.{n}.300",
            edit=lambda item, k: setattr(item, "Modality", "SEG"),
        )
        later = patient / "02-02-1998-NA-AP LIVER-1"
        dicom_files.write_series(
            later / "2.000000-x", _body(), series=f"2.{n}.2", study=f"2.{n}", **spacing
        )
    (tmp_path / "raw" / "metadata.csv").write_text("x")
    dataset = _prepare("hcc_tace", tmp_path / "raw", tmp_path / "out")
    found = DATASETS["hcc_tace"](tmp_path / "raw")
    assert len(found.records) == 9 and len(found.pairs) == 18
    assert [r.id for r in found.records[:3]] == [
        "HCC_001_19971227_s2p0",
        "HCC_001_19971227_s4p1",
        "HCC_001_19971227_s4p2",
    ]
    assert found.records[1].group == "late LIVER"
    assert found.notes[0].startswith("3 scans are alone in their study")
    assert len(dataset.pairs("train")) == 18
    np.testing.assert_array_equal(dataset.volume(2)[0], _body())


def test_totalsegmentator_by_its_table(tmp_path):
    _totalseg(tmp_path / "raw")
    found = DATASETS["totalsegmentator"](tmp_path / "raw")
    assert _splits(found) == {
        "train": ["s0000_chest", "s0000_abdomen", "s0001_chest"],
        "val": ["s0002_abdomen"],
        "test": ["s0004_chest", "s0004_abdomen"],
    }
    assert found.notes == ("1 scans of other regions are left out, such as s0003",)
    dataset = _prepare("totalsegmentator", tmp_path / "raw", tmp_path / "out")
    assert len(dataset.pairs("train")) == 2
    names = dataset.label_names("abdomen")
    assert names == (
        "heart",
        "kidney_left",
        "liver",
        "lung_lower_lobe_right",
        "lung_upper_lobe_left",
        "spleen",
    )
    _, labels, _ = dataset.volume(1)
    # Three masks of six lie on one place each; the first name wins, none is lost.
    assert set(np.unique(_layers(dataset, 1))) >= {0, names.index("kidney_left") + 1}


def test_totalsegmentator_without_a_table_looks_at_the_masks(tmp_path):
    _totalseg(tmp_path, meta=False)
    found = DATASETS["totalsegmentator"](tmp_path)
    assert [r.id for r in found.records] == [
        "s0000_abdomen",
        "s0001_chest",
        "s0002_abdomen",
        "s0003_chest",
        "s0004_abdomen",
    ]
    assert len(_splits(found)["val"]) == 2


def test_amos_takes_ct_only(tmp_path):
    _amos(tmp_path / "raw")
    found = DATASETS["amos"](tmp_path / "raw")
    assert _splits(found) == {
        "train": ["amos_0001", "amos_0004"],
        "val": ["amos_0008", "amos_0009"],
        "test": ["amos_0002"],
    }
    assert found.notes == ("2 MR scans are left out",)
    dataset = _prepare("amos", tmp_path / "raw", tmp_path / "out")
    assert set(dataset.label_names("abdomen")) == set(dict(abdomen.AMOS).values())
    shutil.rmtree(tmp_path / "raw/imagesVa")
    shutil.rmtree(tmp_path / "raw/imagesTs")
    assert _splits(DATASETS["amos"](tmp_path / "raw"))["val"] == []  # two CT are left


def test_flare(tmp_path):
    _flare(tmp_path / "raw")
    dataset = _prepare("flare", tmp_path / "raw", tmp_path / "out")
    found = DATASETS["flare"](tmp_path / "raw")
    splits = _splits(found)
    assert [len(splits[s]) for s in ("train", "val", "test")] == [4, 2, 3]
    assert "FLARETs_0001" in splits["test"]
    names = dataset.label_names("abdomen")
    _, labels, _ = dataset.volume(0)
    np.testing.assert_array_equal(
        labels == names.index("kidney_left") + 1, _ids(*range(1, 14)) == 13
    )


def test_nnunet_regions_and_task(tmp_path, capsys):
    _nnunet(tmp_path / "raw")
    argv = ["--dataset", "nnunet", "--raw", str(tmp_path / "raw")]
    assert prepare.main([*argv, "--out", str(tmp_path / "out")]) == USAGE
    assert "needs --task, one of headneck" in capsys.readouterr().err
    more = ["--out", str(tmp_path / "out"), "--task", "liver"]
    assert prepare.main([*argv, *more]) == USAGE
    assert "write a manifest with subjects" in capsys.readouterr().err
    raw = tmp_path / "raw"
    dataset = _prepare("nnunet", raw, tmp_path / "out", "--task", "abdomen")
    names = dataset.label_names("abdomen")
    assert names == ("core", "liver", "tumour")
    layers = _layers(dataset, 0)
    raw_ids = _ids(1, 2, 3)
    for name, ids in (("liver", (1, 2, 3)), ("tumour", (2, 3)), ("core", (3,))):
        found = (layers == names.index(name) + 1).any(axis=0)
        np.testing.assert_array_equal(found, np.isin(raw_ids, ids))
    np.testing.assert_array_equal(layers[0] == 1, raw_ids == 3)  # the smallest wins


def test_nnunet_version_1_folds_and_channels(tmp_path):
    _nnunet(tmp_path, version=1)
    fold = {"train": ["case_001", "case_002"], "val": ["case_005", "case_006"]}
    (tmp_path / "splits_final.json").write_text(json.dumps([fold, fold]))
    found = DATASETS["nnunet"](tmp_path)
    assert found.records[0].label_map == ((1, "liver"), (2, "tumour"))
    assert _splits(found)["val"] == ["case_005", "case_006"]
    value = json.loads((tmp_path / "dataset.json").read_text())
    value["modality"] = {"0": "CT", "1": "PET"}
    (tmp_path / "dataset.json").write_text(json.dumps(value))
    assert "expected the one channel CT, got CT, PET" in _refusal("nnunet", tmp_path)
    value["modality"], value["labels"] = {"0": "CT"}, ["liver"]
    (tmp_path / "dataset.json").write_text(json.dumps(value))
    assert 'expected labels {"liver": 1}' in _refusal("nnunet", tmp_path)


@pytest.mark.parametrize("ending", [".mha", ".nrrd"])
def test_nnunet_files_of_itk_give_the_arrays_of_nifti(tmp_path, capsys, ending):
    sitk = pytest.importorskip("SimpleITK")
    _nnunet(tmp_path / "raw")
    argv = ["--dataset", "nnunet", "--raw", str(tmp_path / "raw"), "--task", "abdomen"]
    checked = check.main([*argv, "--workers", "1"]), capsys.readouterr().out
    plain = _prepare("nnunet", tmp_path / "raw", tmp_path / "a", "--task", "abdomen")
    for path in (tmp_path / "raw").glob("*T?/*.nii.gz"):
        target = path.with_name(path.name.replace(".nii.gz", ending))
        image = sitk.ReadImage(path)
        for key in image.GetMetaDataKeys():
            image.EraseMetaData(key)
        sitk.WriteImage(image, target)
        path.unlink()
    description = tmp_path / "raw" / "dataset.json"
    told = _refusal("nnunet", tmp_path / "raw")
    assert f"got case_001_0000{ending}; set file_ending" in told
    text = description.read_text()
    description.write_text(text.replace('".nii.gz"', f'"{ending}"'))
    capsys.readouterr()
    code = check.main([*argv, "--workers", "1"])
    out = capsys.readouterr().out.replace(ending, ".nii.gz")
    assert (code, out) == checked and "7 scans" in out
    found = _prepare("nnunet", tmp_path / "raw", tmp_path / "b", "--task", "abdomen")
    ids = [volume["id"] for volume in found.index["volumes"]]
    assert ids == [volume["id"] for volume in plain.index["volumes"]]
    assert len(ids) == 7
    for n, (entry, other) in enumerate(
        zip(found.index["volumes"], plain.index["volumes"], strict=True)
    ):
        images = (
            store.read_array(d.root, e, "image")
            for d, e in ((found, entry), (plain, other))
        )
        np.testing.assert_array_equal(*images)
        assert bool(entry["labels"]) == bool(other["labels"])
        if entry["labels"]:
            np.testing.assert_array_equal(_layers(found, n), _layers(plain, n))


def test_nnunet_refuses_files_that_cannot_be_read(tmp_path, monkeypatch):
    _nnunet(tmp_path)
    value = json.loads((tmp_path / "dataset.json").read_text())
    (tmp_path / "dataset.json").write_text(json.dumps(value | {"file_ending": ".png"}))
    told = _refusal("nnunet", tmp_path)
    assert "expected file_ending .nii.gz, .nii, .nrrd, .mha, got .png; convert" in told
    for path in tmp_path.glob("imagesT?/*.nii.gz"):
        path.rename(path.with_name(path.name.replace(".nii.gz", ".mha")))
    (tmp_path / "dataset.json").write_text(json.dumps(value | {"file_ending": ".mha"}))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install unireg-jax[itk]" in _refusal("nnunet", tmp_path)


# --- the wrong folder ---

MINIATURES = {
    "segrap2023": _segrap,
    "learn2reg": _l2r_abdomen,
    "l2r2020_abdomen": _btcv,
    "dirlab4dct": _dirlab,
    "totalsegmentator": _totalseg,
    "amos": _amos,
    "flare": _flare,
    "nnunet": _nnunet,
}


@pytest.mark.parametrize("name", DATASETS)
def test_an_empty_absent_or_strange_folder_is_one_line(tmp_path, name):
    assert "found nothing there" in _refusal(name, tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    told = _refusal(name, tmp_path / "empty")
    assert "expected" in told and "found an empty folder; pass the folder" in told
    (tmp_path / "file.zip").write_bytes(b"PK")
    assert "found a file; unpack it first" in _refusal(name, tmp_path / "file.zip")
    (tmp_path / "empty" / "notes.txt").write_text("x")
    assert "found notes.txt, …" in _refusal(name, tmp_path / "empty")


@pytest.mark.parametrize("name", MINIATURES)
def test_a_folder_one_level_too_high_is_told_which_to_pass(tmp_path, name):
    root = tmp_path / "downloads" / name
    root.mkdir(parents=True)
    MINIATURES[name](root)
    for above in (tmp_path, tmp_path / "downloads"):
        assert f"pass --raw {root}" in _refusal(name, above)
    DATASETS[name](root)


@pytest.mark.parametrize("name", MINIATURES)
def test_a_folder_too_deep_is_told_which_to_pass(tmp_path, name):
    root = tmp_path
    MINIATURES[name](root)
    inside = next(p for p in sorted(tmp_path.iterdir()) if p.is_dir())
    if name in ("segrap2023", "l2r2020_abdomen"):
        inside = next(p for p in sorted(inside.iterdir()) if p.is_dir())
    if name == "flare":
        inside, root = inside / "FLARE22_LabeledCase50/images", inside
        root /= "FLARE22_LabeledCase50"
    assert f"found it above; pass --raw {root}" in _refusal(name, inside)


def test_the_command_says_what_goes_with_what(tmp_path, capsys):
    _amos(tmp_path / "raw")
    raw = ["--raw", str(tmp_path / "raw")]
    out = ["--out", str(tmp_path / "out")]
    for argv, says in (
        (["--dataset", "amos", *out], "needs --raw"),
        (["--dataset", "amos", *raw, *out, "--task", "chest"], "has its own task"),
        (["--dataset", "amos", *raw, *out, "--data-root", "x"], "--data-root goes"),
        (["--manifest", "m.csv", *raw, *out], "--raw goes with --dataset"),
        (["--manifest", "m.csv", *out, "--task", "lung"], "--task goes with --dataset"),
    ):
        assert prepare.main(argv) == USAGE
        assert says in capsys.readouterr().err
    with pytest.raises(SystemExit):
        prepare.main(["--dataset", "amoss", *raw, *out])
    assert not (tmp_path / "out").exists()


def test_strict_lists_files_that_are_not_there(tmp_path):
    _l2r_abdomen(tmp_path)
    found = DATASETS["learn2reg"](tmp_path)
    manifest.check(found, "raw", strict=True)
    os.unlink(tmp_path / "labelsTr" / "AbdomenCTCT_0002_0000.nii.gz")
    manifest.check(found, "raw")
    with pytest.raises(UserError, match="AbdomenCTCT_0002_0000: .* no such file"):
        manifest.check(found, "raw", strict=True)
    with pytest.raises(UserError, match="no scan that can be used") as caught:
        manifest.check(manifest.Collection([]), "raw")
    assert caught.value.exit_code == NOTHING


def test_split_subjects_is_stable_and_keeps_pairs_possible():
    names = [f"p{n}" for n in range(40)]
    splits = folders.split_subjects(names)
    assert splits == folders.split_subjects(reversed(names + names))
    counts = [list(splits.values()).count(s) for s in ("train", "val", "test")]
    assert counts == [32, 4, 4]
    for n, expected in ((1, (1, 0, 0)), (5, (3, 2, 0)), (8, (4, 2, 2))):
        found = list(folders.split_subjects(names[:n]).values())
        assert tuple(found.count(s) for s in ("train", "val", "test")) == expected


# --- real scans ---


def test_real_btcv_labels_as_learn2reg_and_as_btcv(tmp_path, data_root):
    """Label maps drawn by hand, under both names, with images painted from them."""
    source = data_root / "abdomen_btcv_labels" / "labels"
    if not source.is_dir():
        pytest.skip("no abdomen_btcv_labels")
    for path in sorted(source.iterdir())[:4]:
        labels = nifti.read_labels(path)
        number = path.name.split("_")[1]
        hu = np.where(labels.data > 0, 60, -50).astype(np.int16)
        for folder in ("l2r/imagesTr", "l2r/labelsTr", "btcv/Training/img"):
            (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        (tmp_path / "btcv/Training/label").mkdir(exist_ok=True)
        nifti.write_like(tmp_path / "l2r/imagesTr" / path.name, hu, labels)
        image = tmp_path / "l2r/imagesTr" / path.name
        os.link(image, tmp_path / f"btcv/Training/img/img{number}.nii.gz")
        shutil.copy(path, tmp_path / "l2r/labelsTr" / path.name)
        shutil.copy(path, tmp_path / f"btcv/Training/label/label{number}.nii.gz")
    items = [
        {"image": f"./imagesTr/{p.name}", "label": f"./labelsTr/{p.name}"}
        for p in sorted((tmp_path / "l2r/labelsTr").iterdir())
    ]
    pair = dict(zip(("fixed", "moving"), (i["image"] for i in items[2:]), strict=True))
    _l2r_json(tmp_path / "l2r", "AbdomenCTCT", training=items, registration_val=[pair])
    grid = ["--shape", "48,40,48", "--spacing", "8"]
    made = {}
    for name, folder in (("learn2reg", "l2r"), ("l2r2020_abdomen", "btcv")):
        out = tmp_path / name
        argv = ["--dataset", name, "--raw", str(tmp_path / folder), "--out", str(out)]
        assert prepare.main([*argv, *grid]) == 0
        made[name] = loader.Dataset(out)
    for position in range(4):
        one, other = (dataset.volume(position) for dataset in made.values())
        np.testing.assert_array_equal(one[0], other[0])
        np.testing.assert_array_equal(one[1], other[1])
    names = made["learn2reg"].label_names("abdomen")
    _, labels, _ = made["learn2reg"].volume(0)
    centre = {
        n: np.argwhere(labels == names.index(n) + 1).mean(axis=0)
        for n in ("liver", "kidney_right", "kidney_left", "adrenal_gland_right")
    }
    # The right adrenal gland lies on the side of the right kidney and the liver.
    assert np.linalg.norm(centre["adrenal_gland_right"] - centre["kidney_right"]) < (
        np.linalg.norm(centre["adrenal_gland_right"] - centre["kidney_left"])
    )


def test_real_totalsegmentator_scan_as_masks(tmp_path, data_root):
    """A real map, taken apart into masks and joined again by the adapter."""
    source = data_root / "abdomen_totalseg_example"
    if not source.is_dir():
        pytest.skip("no abdomen_totalseg_example")
    raw = tmp_path / "raw"
    labels = nifti.read_labels(source / "labels_totalseg.nii.gz")
    table = json.loads((source / "labels.json").read_text())
    present = {int(i): n for i, n in table.items() if (labels.data == int(i)).any()}
    for case in ("s0000", "s0001"):
        (raw / case / "segmentations").mkdir(parents=True)
        shutil.copy(source / "ct.nii.gz", raw / case / "ct.nii.gz")
        for i, name in present.items():
            path = raw / case / "segmentations" / f"{name}.nii.gz"
            nifti.write_like(path, (labels.data == i).astype(np.uint8), labels)
    argv = ["--dataset", "totalsegmentator", "--raw", str(raw), "--out"]
    grid = ["--shape", "48,48,48", "--spacing", "8"]
    assert prepare.main([*argv, str(tmp_path / "out"), *grid]) == 0
    dataset = loader.Dataset(tmp_path / "out")
    assert {v["task"] for v in dataset.index["volumes"]} == {"abdomen"}
    row = dict(id="a", image=str(source / "ct.nii.gz"), task="abdomen", subject="a")
    row |= dict(split="train", label=str(source / "labels_totalseg.nii.gz"))
    (tmp_path / "map.json").write_text(json.dumps(present))
    (tmp_path / "m.json").write_text(json.dumps([{**row, "label_map": "map.json"}]))
    argv = ["--manifest", str(tmp_path / "m.json"), "--data-root", str(data_root)]
    assert prepare.main([*argv, "--out", str(tmp_path / "plain"), *grid]) == 0
    plain = loader.Dataset(tmp_path / "plain")
    assert plain.label_names("abdomen") == dataset.label_names("abdomen")
    np.testing.assert_array_equal(plain.volume(0)[1], dataset.volume(0)[1])
    assert "overlaps" not in dataset.index["volumes"][0]


def test_real_phases_of_a_liver_as_dicom(tmp_path, data_root):
    """The HCC-TACE scan at hand, back in the collection's own form."""
    pytest.importorskip("pydicom")
    from tests import dicom_files

    source = data_root / "liver_multiphase" / "liver_hcc007_t1"
    if not source.is_dir():
        pytest.skip("no liver_multiphase")
    study = tmp_path / "raw" / "HCC_007" / "12-27-1997-NA-AP LIVER-05830"
    scans, first = {}, 1
    for phase, number, acquisition in (("pre", 2, 1), ("art", 4, 2), ("pvp", 4, 3)):
        volume = scans[phase] = nifti.read_image(source / f"{phase}.nii.gz")
        dicom_files.write_series(
            study / f"{number}.000000-x-1",
            volume.data,
            spacing_mm=volume.spacing_mm,
            first_mm=volume.vox2world[:3, 3],
            series=f"1.{number}",
            number=number,
            acquisition=acquisition,
            first_instance=first if number == 4 else 1,
        )
        first += volume.data.shape[2] if number == 4 else 0
    argv = ["--dataset", "hcc_tace", "--raw", str(tmp_path / "raw"), "--out"]
    grid = ["--shape", "48,40,32", "--spacing", "8"]
    assert prepare.main([*argv, str(tmp_path / "out"), *grid]) == 0
    dataset = loader.Dataset(tmp_path / "out")
    assert len(dataset.pairs("train")) == 6
    rows = [
        dict(id=n, image=str(source / f"{n}.nii.gz"), task="liver", subject="p")
        | {"split": "train"}
        for n in scans
    ]
    (tmp_path / "m.json").write_text(json.dumps(rows))
    argv = ["--manifest", str(tmp_path / "m.json"), "--data-root", str(data_root)]
    assert prepare.main([*argv, "--out", str(tmp_path / "nii"), *grid]) == 0
    plain = loader.Dataset(tmp_path / "nii")
    for position in range(3):
        one, other = (d.volume(position)[0].astype(int) for d in (dataset, plain))
        # Affines are float32 there and decimal text here: the last digit may differ.
        assert np.abs(one - other).max() <= 1


def test_real_lung_landmarks_reach_the_prepared_pair(tmp_path, data_root):
    source = data_root / "lung_elastix"
    if not source.is_dir():
        pytest.skip("no lung_elastix")
    expected = points.read_points(source / "landmarks.csv")
    rows = []
    for scan, table in (("baseline", expected.fixed), ("followup", expected.moving)):
        path = tmp_path / f"{scan}.csv"
        np.savetxt(path, table, delimiter=",", header="x_mm,y_mm,z_mm", comments="")
        rows.append(
            dict(id=scan, image=str(source / f"{scan}.nii.gz"), task="lung")
            | dict(subject="elastix", split="val", points=path.name)
            | dict(masks={"lungs": str(source / f"{scan}_lungmask.nii.gz")})
        )
    value = {"volumes": rows, "pairs": [["baseline", "followup"]]}
    (tmp_path / "m.json").write_text(json.dumps(value))
    argv = ["--manifest", str(tmp_path / "m.json"), "--data-root", str(data_root)]
    grid = ["--shape", "32,48,48", "--spacing", "8"]
    assert prepare.main([*argv, "--out", str(tmp_path / "out"), *grid]) == 0
    found = points.read_points(tmp_path / "out/points/baseline__followup.csv")
    np.testing.assert_allclose(found.fixed, expected.fixed)
    np.testing.assert_allclose(found.moving, expected.moving)
    dataset = loader.Dataset(tmp_path / "out")
    assert len(dataset.pairs("val")) == 1
    assert dataset.label_names("lung") == ("lungs",) and dataset.volume(0)[1].any()


# --- docs/datasets.md ---

DOCS = Path(__file__).resolve().parents[2] / "docs" / "datasets.md"


def _commands():
    lines = [line.strip() for line in DOCS.read_text().splitlines()]
    return [line.split() for line in lines if line.startswith("python -m ")]


def test_every_command_of_the_docs_is_one_that_is_taken():
    taken = set()
    for words in _commands():
        if words[2] == "data_pipeline.prepare":
            options = prepare._parser().parse_args(words[3:])
            taken.add(options.dataset or "manifest")
            assert (options.task is not None) == (options.dataset == "nnunet")
        else:
            assert (DOCS.parents[1] / f"{words[2].replace('.', '/')}.py").is_file()
    assert taken == {*DATASETS, "manifest"}
    headings = {line[3:] for line in DOCS.read_text().splitlines() if line[:3] == "## "}
    assert headings == {*DATASETS, "Scans of your own"}


def test_manifest_of_the_docs_is_read(tmp_path):
    text = DOCS.read_text().split("```json\n")[1].split("```")[0]
    (tmp_path / "m.json").write_text(text)
    found = manifest.collect(tmp_path / "m.json")
    assert found.pairs == (("p1_pvp", "p1_art"),)
    assert [name for name, _ in found.records[0].masks] == ["liver", "tumour", "tumour"]
