"""Lists of pairs: every fault is found before any scan is opened, all in one go."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest

from unireg_jax import manifest
from unireg_jax.errors import NOTHING, USAGE, UserError
from unireg_jax.imaging import itk_files, points

GOOD = [
    dict(
        id="a",
        fixed="s/1.nii.gz",
        moving="s/2.nii.gz",
        task="abdomen",
        fixed_label="l/1.nii.gz",
        moving_label="l/2.nii.gz",
        fixed_subject="p1",
    ),
    dict(id="L.2-x", fixed="s/1.nii.gz", moving="s/3.nii.gz", type="intra"),
]


def write_csv(folder, rows):
    columns = list(dict.fromkeys(c for row in rows for c in row))
    with open(folder / "p.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    return folder / "p.csv"


def write_json(folder, value):
    (folder / "p.json").write_text(json.dumps(value))
    return folder / "p.json"


def refusal(path, **options):
    with pytest.raises(UserError) as caught:
        manifest.read_cases(path, **options)
    return caught.value


def test_csv_and_json_give_the_same_cases(tmp_path):
    cases = manifest.read_cases(write_csv(tmp_path, GOOD))
    assert cases == manifest.read_cases(write_json(tmp_path, GOOD))
    assert cases == manifest.read_cases(write_json(tmp_path, {"pairs": GOOD}))
    first, second = cases
    home = tmp_path.resolve()
    assert first.fixed == str(home / "s" / "1.nii.gz")
    assert first.moving_label == str(home / "l" / "2.nii.gz")
    assert (first.task, first.type, first.fixed_subject) == ("abdomen", None, "p1")
    assert (second.task, second.type, second.fixed_label) == (None, "intra", None)


def test_cases_without_ids_are_called_by_their_scans(tmp_path):
    rows = [{"fixed": "s/A.1.nii.gz", "moving": "t/B.nii"}]
    (case,) = manifest.read_cases(write_csv(tmp_path, rows))
    assert case.id == "A.1__B"
    rows = [{"fixed": "s/A 1.nii.gz", "moving": "t/B.nii"}]
    error = refusal(write_csv(tmp_path, rows))
    assert error.reason == "id_invalid" and "add a column id" in str(error)
    # Same names in other folders: not told apart, and said so.
    rows = [{"fixed": f"{d}/A.nii.gz", "moving": f"{d}/B.nii.gz"} for d in "st"]
    assert refusal(write_csv(tmp_path, rows)).reason == "id_duplicate"


def test_a_folder_that_is_declared_is_no_escape(tmp_path):
    """As that of a DICOM series may be."""
    series = tmp_path / "series"
    series.mkdir()
    (tmp_path / "lists").mkdir()
    path = write_csv(tmp_path / "lists", [{"fixed": str(series), "moving": "../b"}])
    (case,) = manifest.read_cases(path, roots=[series, tmp_path])
    assert case.fixed == str(series)
    row = {"fixed": str(series), "moving": str(series)}
    path = write_csv(tmp_path / "lists", [GOOD[0] | row])
    assert manifest.read_cases(path, roots=[series])
    assert refusal(path).reason == "path_escape"


def test_blank_lines_before_the_columns(tmp_path):
    path = write_csv(tmp_path, GOOD[:1])
    path.write_text("\n \n" + path.read_text())
    assert [case.id for case in manifest.read_cases(path)] == [GOOD[0]["id"]]


@pytest.mark.parametrize(
    ("change", "reason", "says"),
    [
        (dict(task="abdomne"), "task_unknown", "did you mean 'abdomen'?"),
        (dict(task="99"), "task_unknown", "known: headneck, chest"),
        (dict(type="inters"), "task_unknown", "did you mean 'inter'?"),
        (dict(id=""), "id_invalid", "id: is empty"),
        (dict(id=".."), "id_invalid", "must not begin with a dot"),
        (dict(id="a/b"), "id_invalid", "only letters, digits"),
        (dict(id="a" * 300), "id_invalid", "longer than 120 bytes"),
        (dict(fixed=" "), "schema", "fixed: is empty"),
        (dict(moving="../a.nii.gz"), "path_escape", "--data-root"),
        (dict(moving="/etc/hosts"), "path_escape", "--data-root"),
        (dict(moving="~/a.nii.gz"), "path_escape", "a plain path expected"),
        (dict(moving="$HOME/a.nii"), "path_escape", "a plain path expected"),
        (dict(moving="https://x/a.nii"), "path_escape", "a plain path expected"),
        (dict(fixed_mask="../m.nii.gz"), "path_escape", "fixed_mask"),
        (dict(moving_label=""), "schema", "fixed_label without moving_label"),
        (dict(moving_points="p.csv"), "schema", "moving_points without fixed_points"),
        (dict(points_frame="voxel"), "schema", "known: lps_mm, voxel_from_0"),
        (dict(fixde="x.nii.gz"), "schema", "did you mean 'fixed'?"),
    ],
)
def test_one_bad_field_is_named(tmp_path, change, reason, says):
    row = GOOD[0] | change
    for path in (write_csv(tmp_path, [row]), write_json(tmp_path, [row])):
        error = refusal(path)
        assert error.exit_code == USAGE and error.reason == reason
        assert says in str(error)


def test_labels_may_be_called_segmentations(tmp_path):
    row = {"fixed": "1.nii", "moving": "2.nii"}
    row |= {"fixed_segmentation": "f.nii", "moving_segmentation": "m.nii"}
    for write in (write_csv, write_json):
        (case,) = manifest.read_cases(write(tmp_path, [row]))
        assert case.fixed_label == str(tmp_path.resolve() / "f.nii")
        assert case.moving_label == str(tmp_path.resolve() / "m.nii")
        both = refusal(write(tmp_path, [row | {"fixed_label": "g.nii"}]))
        assert both.exit_code == USAGE
        assert "fixed_segmentation, fixed_label" in str(both)
        assert "moving" not in str(both)
    (tmp_path / "p.csv").write_text(",".join(row) + "\n")
    assert refusal(tmp_path / "p.csv").exit_code == NOTHING


@pytest.mark.parametrize("task", [99, -1, 1.5, True, ["liver"], 1e40])
def test_json_task_that_is_no_text_is_refused(tmp_path, task):
    error = refusal(write_json(tmp_path, [GOOD[0] | {"task": task}]))
    assert error.reason == "task_unknown" and "text expected" in str(error)


def test_all_faults_are_listed_at_once(tmp_path):
    rows = [
        dict(id="a", fixed="1.nii", moving="2.nii", taks="liver"),
        dict(id="A", fixed="1.nii", moving="../2.nii", taks="liver"),
        dict(id="b", fixed="1.nii", moving="2.nii", type="both", taks="liver"),
    ]
    error = refusal(write_json(tmp_path, rows))
    text = str(error)
    assert text.splitlines()[0] == "p.json: 4 faults:"
    for says in (
        "entry 1: unknown column 'taks'; did you mean 'task'?",
        "entry 2: moving '../2.nii': leads outside",
        "entry 3: type 'both'; known: inter, intra",
        "entry 2: id 'A' only differs in form from 'a' at entry 1",
    ):
        assert says in text


def test_missing_columns_and_empty_lists(tmp_path):
    (tmp_path / "p.csv").write_text("id,fixed,task\n")
    assert "column 'moving' is missing" in str(refusal(tmp_path / "p.csv"))
    (tmp_path / "p.csv").write_text("id,fixed,moving\n")
    assert refusal(tmp_path / "p.csv").exit_code == NOTHING
    assert refusal(write_json(tmp_path, [])).exit_code == NOTHING
    (tmp_path / "p.csv").write_text("")
    assert refusal(tmp_path / "p.csv").exit_code == USAGE


def test_absent_file_is_left_to_its_turn_unless_strict(tmp_path):
    path = write_csv(tmp_path, GOOD)
    assert len(manifest.read_cases(path)) == 2
    error = refusal(path, strict=True)
    assert error.reason == "not_found" and "6 faults" in str(error)


def test_other_folders_must_be_declared(tmp_path):
    home, other = tmp_path / "home", tmp_path / "other"
    home.mkdir(), other.mkdir()
    (home / "link.nii").symlink_to(other / "a.nii")
    path = write_csv(
        home, [{"id": "a", "fixed": "link.nii", "moving": str(other / "b.nii")}]
    )
    assert "2 faults" in str(refusal(path))
    (case,) = manifest.read_cases(path, roots=[other])
    assert case.fixed == str(home.resolve() / "link.nii")
    assert case.moving == str(other.resolve() / "b.nii")


def test_links_are_called_as_the_list_calls_them(tmp_path):
    """Of its target the name tells nothing, as a store's, or too much: who it is."""
    images, store = tmp_path / "imagesTr", tmp_path / "DOE_JANE"
    images.mkdir(), (store / "series").mkdir(parents=True)
    names = [f"LungCT_0001_000{m}.nii.gz" for m in (0, 1)]
    for name in names:
        (store / f"pat1_{name[-8]}").write_bytes(b"x")
        (images / name).symlink_to(store / f"pat1_{name[-8]}")
    fixed, moving = (f"./imagesTr/{name}" for name in names)
    listed = {"registration_val": [{"fixed": fixed, "moving": moving}]}
    path = write_json(tmp_path, listed)
    (case,) = manifest.read_cases(path, strict=True)
    assert [Path(p).name for p in (case.fixed, case.moving)] == names
    assert manifest.learn2reg_fields(case)[0] == "disp_0001_0001"
    # A slash at the end leads on to the target.
    (tmp_path / "sub02").symlink_to(store / "series")
    rows = [dict(id="a", fixed="sub02/", moving="sub02")]
    (case,) = manifest.read_cases(write_json(tmp_path, rows), strict=True)
    assert {case.fixed, case.moving} == {str(tmp_path.resolve() / "sub02")}


def test_link_to_a_header_leads_where_its_voxels_are(tmp_path):
    assert manifest.VOXELS == itk_files._DATA_ENDINGS
    (tmp_path / "store").mkdir()
    for name in ("s.mhd", "s.raw", "aa11"):
        (tmp_path / "store" / name).write_bytes(b"x")
    (tmp_path / "a.mhd").symlink_to(tmp_path / "store" / "s.mhd")
    (tmp_path / "b.mhd").symlink_to(tmp_path / "store" / "s.mhd")
    (tmp_path / "b.raw").symlink_to(tmp_path / "store" / "s.raw")
    (tmp_path / "c.mhd").symlink_to(tmp_path / "store" / "aa11")
    rows = [dict(id="1", fixed="a.mhd", moving="b.mhd", moving_mask="c.mhd")]
    (case,) = manifest.read_cases(write_json(tmp_path, rows), strict=True)
    found = (case.fixed, case.moving, case.moving_mask)
    assert [Path(p).name for p in found] == ["s.mhd", "b.mhd", "c.mhd"]


def test_learn2reg_pairs_are_read_with_what_lies_beside(tmp_path):
    names = [f"AbdomenCTCT_000{i}_0000.nii.gz" for i in (1, 2, 3)]
    for folder in ("imagesTr", "labelsTr", "masksTr"):
        (tmp_path / folder).mkdir()
        for name in names[: 3 if folder != "masksTr" else 1]:
            (tmp_path / folder / name).write_bytes(b"x")
    image = [f"./imagesTr/{name}" for name in names]
    data = {
        "name": "AbdomenCTCT",
        "training_paired_images": [{"fixed": image[1], "moving": image[2]}],
        "registration_val": [
            {"fixed": image[0], "moving": image[1]},
            {"fixed": image[0], "moving": image[2]},
        ],
    }
    cases = manifest.read_cases(write_json(tmp_path, data), strict=True)
    first = names[0].removesuffix(".nii.gz")
    assert [case.id for case in cases] == [
        f"{first}__AbdomenCTCT_0002_0000",
        f"{first}__AbdomenCTCT_0003_0000",
    ]
    home = tmp_path.resolve()
    assert cases[0].moving_label == str(home / "labelsTr" / names[1])
    # That of the moving scan is not looked at.
    assert cases[0].fixed_mask == str(home / "masksTr" / names[0])
    assert cases[0].moving_mask is None
    assert cases[0].fixed_subject == "AbdomenCTCT_0001"
    data.pop("registration_val")
    (case,) = manifest.read_cases(write_json(tmp_path, data))
    assert case.fixed.endswith(names[1])
    data["training_paired_images"] = [{"fixed": image[0]}]
    assert "fixed" in str(refusal(write_json(tmp_path, data)))


@pytest.mark.parametrize(
    ("modalities", "tables", "found", "field"),
    [
        ((0, 1), ("landmarksTr", "keypointsTr"), "landmarksTr", "disp_0007_0007"),
        ((0, 1), ("keypointsTr",), "keypointsTr", "disp_0007_0007"),
        ((1, 0), ("keypoints01Tr",), "keypoints01Tr", "disp_0007_0001_0007_0000"),
        ((2, 0), ("keypoints02Tr",), "keypoints02Tr", "disp_0007_0002_0007_0000"),
        ((2, 0), ("keypointsTr",), None, "disp_0007_0002_0007_0000"),
        # CuRIOUS
        ((0, 2), ("landmarksTr",), "landmarksTr", "disp_0007_0000_0007_0002"),
    ],
)
def test_learn2reg_points_lie_where_the_challenge_has_them(
    tmp_path, modalities, tables, found, field
):
    names = [f"ThoraxCBCT_0007_{m:04d}" for m in modalities]
    for folder in tables:
        (tmp_path / folder).mkdir()
        for name in names:
            (tmp_path / folder / f"{name}.csv").write_text("1,2,3\n")
    images = [f"./imagesTr/{name}.nii.gz" for name in names]
    pair = dict(zip(("fixed", "moving"), images, strict=True))
    path = write_json(tmp_path, {"registration_val": [pair]})
    (case,) = manifest.read_cases(path)
    assert manifest.learn2reg_fields(case)[0] == field
    home = tmp_path.resolve()
    expected = [found and str(home / found / f"{name}.csv") for name in names]
    assert [case.fixed_points, case.moving_points] == expected
    assert case.points_frame == (found and "voxel_from_0")
    (tmp_path / tables[0] / f"{names[1]}.csv").unlink()  # one table alone says nothing
    (case,) = manifest.read_cases(path)
    left = str(home / tables[1] / f"{names[0]}.csv") if tables[1:] else None
    assert case.fixed_points == left


@pytest.mark.parametrize(
    ("kinds", "expected"),
    [
        (("lk", "lk", ""), ("landmarksTr", "landmarksTr", None)),
        (("lk", "l", "l"), ("landmarksTr",) * 3),
        (("lk", "k", "lk"), ("keypointsTr",) * 3),
        (("k", "", "lk"), ("keypointsTr", None, "keypointsTr")),
        (("l", "k", "lk"), "no landmarks for T_0002_0000 and no keypoints for T_0001"),
    ],
)
def test_learn2reg_list_has_points_of_one_kind(tmp_path, kinds, expected):
    """Else its mean would be the score of neither."""
    pairs = []
    for n, found in enumerate(kinds, start=1):
        names = [f"T_{n:04d}_{m:04d}" for m in (0, 1)]
        images = [f"imagesTr/{name}.nii" for name in names]  # x.csv beside x.nii, too
        pairs.append(dict(zip(("fixed", "moving"), images, strict=True)))
        for letter, folder in (("l", "landmarksTr"), ("k", "keypointsTr")):
            (tmp_path / folder).mkdir(exist_ok=True)
            for name in names if letter in found else ():
                (tmp_path / folder / f"{name}.csv").write_text("1,2,3\n")
    path = write_json(tmp_path, {"registration_val": pairs})
    if isinstance(expected, str):
        error = refusal(path)
        assert error.exit_code == USAGE and expected in str(error)
        return
    tables = [case.moving_points for case in manifest.read_cases(path)]
    assert [table and Path(table).parent.name for table in tables] == list(expected)


def test_learn2reg_names_of_fields():
    case = manifest.Case("a", "x/A_0001_0000.nii.gz", "y/A_0002_0000.nii.gz")
    names = ["disp_0001_0000_0002_0000", "disp_0001_0002"]
    assert manifest.learn2reg_fields(case) == names
    assert manifest.learn2reg_submission(case) == names
    for ends in (("0000", "0001"), ("0001", "0000")):
        moving = f"y/A_0002_{ends[1]}.nii.gz"
        other = case._replace(fixed=f"x/A_0001_{ends[0]}.nii.gz", moving=moving)
        first = manifest.learn2reg_fields(other)[:1]
        assert manifest.learn2reg_submission(other) == first
    strange = case._replace(moving="b.nii.gz")
    assert manifest.learn2reg_fields(strange) == []
    assert manifest.learn2reg_submission(strange) == []


def test_frames_are_those_of_points():
    assert manifest.FRAMES == points.FRAMES


def test_reading_a_list_imports_no_jax():
    code = "import sys, unireg_jax.manifest; assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
