"""Pairs and lists of pairs from files: `unireg evaluate` and its functions."""

import csv
import importlib.util
import json
import os
import shutil
import subprocess
import sys

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from scipy import ndimage

from unireg_jax import __main__ as cli
from unireg_jax import errors
from unireg_jax.errors import UserError
from unireg_jax.evaluation import cases, learn2reg, metrics
from unireg_jax.evaluation.cases import Case, Files
from unireg_jax.imaging import mapping, nifti, transforms
from unireg_jax.imaging.nifti import Volume
from unireg_jax.imaging.points import PointPairs
from unireg_jax.verbs import evaluate as verb

SHAPE = (14, 12, 11)
SPACING = np.array([2.0, 3.0, 4.0])
PLACE = np.diag([*SPACING, 1.0])
PLACE[:3, 3] = [-20, 30, 100]
LIMITS = ((4, 8), (3, 7), (3, 8))


def write_labels(path, array, place=PLACE):
    image = nib.Nifti1Image(array, np.diag([-1.0, -1, 1, 1]) @ place)
    image.header.set_xyzt_units("mm")
    nib.save(image, path)
    return path


def box(shift=(0, 0, 0), label=1):
    labels = np.zeros(SHAPE, np.uint8)
    labels[
        tuple(slice(a + s, b + s) for (a, b), s in zip(LIMITS, shift, strict=True))
    ] = label
    return labels


def write_field(path, shift):
    disp_mm = np.zeros((*SHAPE, 3), np.float32)
    disp_mm[:] = np.array(shift) * SPACING
    transforms.write_field(path, disp_mm, PLACE)
    return path


@pytest.fixture
def folder(tmp_path):
    """Three good cases that err by 0, 1 and 2 voxels, and two that cannot be judged."""
    rows = ["id,transform,fixed_label,moving_label,landmarks"]
    write_labels(tmp_path / "fixed.nii.gz", box())
    write_labels(tmp_path / "moving.nii.gz", box((2, 0, 0)))
    for n in range(3):
        write_field(tmp_path / f"u{n}.nii.gz", (2 - n, 0, 0))
        rows.append(f"case{n},u{n}.nii.gz,fixed.nii.gz,moving.nii.gz,points.csv")
    (tmp_path / "points.csv").write_text(
        "fixed_x_mm,fixed_y_mm,fixed_z_mm,moving_x_mm,moving_y_mm,moving_z_mm\n"
        "-10,40,110,-6,40,110\n-8,43,114,-4,43,114\n"
    )
    (tmp_path / "junk.nii.gz").write_bytes(b"<html>")
    rows.append("bad,u0.nii.gz,junk.nii.gz,moving.nii.gz,")
    rows.append("gone,absent.nii.gz,fixed.nii.gz,moving.nii.gz,")
    (tmp_path / "cases.csv").write_text("\n".join(rows) + "\n")
    return tmp_path


def evaluate(capsys, *arguments, code=0):
    """stdout and the lines of stderr."""
    try:
        got = cli.main(["evaluate", *map(str, arguments)])
    except SystemExit as stop:
        got = stop.code
    captured = capsys.readouterr()
    assert got == code, captured.err
    return captured.out, captured.err.splitlines()


def rows_of(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def strict(text):
    def refuse(word):
        raise AssertionError(word)

    return json.loads(text, parse_constant=refuse)


# --- one pair -----------------------------------------------------------------------


def test_score_files_equals_the_command(folder, capsys):
    files = Files(
        folder / "u1.nii.gz",
        fixed_label=folder / "fixed.nii.gz",
        moving_label=folder / "moving.nii.gz",
        landmarks=folder / "points.csv",
    )
    report = cases.score_files(files)
    names = ("fixed_label", "moving_label", "landmarks")
    more = [f"--{n.replace('_', '-')}={getattr(files, n)}" for n in names]
    out, err = evaluate(capsys, "-t", files.transform, *more, "--json")
    found = strict(out)
    assert {name: found[name] for name in report} == report
    assert err == []
    # One voxel of 2 mm short: 12 of 16 columns' voxels meet.
    assert report["labels"]["1"]["dsc"] == 0.75
    assert report["labels"]["1"]["hd95_mm"] == 2.0
    assert report["labels"]["1"]["nsd"] == 1.0
    assert report["landmarks"]["tre_mm"] == pytest.approx(2, abs=1e-5)
    assert report["n"]["dsc"] == 1 and report["undefined"] == {}
    named = {n.removesuffix("_before") for n in (*report["mean"], *report["field"])}
    assert named <= set(found["definitions"])


@pytest.mark.parametrize("ending", [".nrrd", ".mha"])
def test_evaluate_reads_labels_of_itk(folder, capsys, monkeypatch, ending):
    words = ["-t", folder / "u1.nii.gz", "--json"]
    expected = None
    for end in (".nii.gz", ending):
        names = [folder / f"{name}{end}" for name in ("fixed", "moving")]
        if end != ".nii.gz":
            for name in names:
                image = sitk.ReadImage(str(name).replace(end, ".nii.gz"))
                sitk.WriteImage(image, str(name))
        labels = (f"--fixed-label={names[0]}", f"--moving-label={names[1]}")
        out, _ = evaluate(capsys, *words, *labels, f"--fixed-mask={names[0]}")
        expected = expected or strict(out)
        assert strict(out) == expected
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda n: None if n == "SimpleITK" else find(n)
    )
    _, err = evaluate(capsys, *words, *labels, code=errors.USAGE)
    assert len(err) == 1 and "unireg-jax[itk]" in err[0]


def test_score_reports_why_a_number_is_null():
    labels = Volume(box(), PLACE)
    small = mapping.field(np.zeros((2, 9, 9, 3), np.float32), PLACE)
    report = cases.score(
        small, fixed_labels=labels, moving_labels=Volume(box(label=2), PLACE)
    )
    assert report["field"]["sdlogj"] is None
    assert "fewer than 3" in report["undefined"]["sdlogj"]
    assert "fewer than 5" in report["undefined"]["sdlogj_l2r"]
    assert report["undefined"]["hd95_mm"] == {
        "1": "absent in warped",
        "2": "absent in fixed",
    }
    assert report["warnings"][0].startswith("grid_mismatch: the field covers")
    assert report["warnings"][1:3] == [
        "label_set: only the fixed labels have 1",
        "label_set: only the moving labels have 2",
    ]
    strict(json.dumps(report, allow_nan=False))


def test_score_judges_an_affine_on_the_labels_grid():
    grow = np.diag([1.1, 1.0, 1.0, 1.0])
    labels = Volume(box(), PLACE)
    report = cases.score(
        mapping.affine(grow), fixed_labels=labels, moving_labels=labels
    )
    assert report["field"]["sdlogj_whole"] == pytest.approx(0, abs=1e-4)
    with pytest.raises(UserError, match="no field acts first"):
        cases.score(mapping.affine(grow))


def test_score_of_an_affine_and_landmarks_needs_no_grid():
    points = np.array([[1.0, 2, 3], [40, 50, 60]])
    shift = np.eye(4)
    shift[:3, 3] = [3, 0, 4]
    pairs = PointPairs(["a", "b"], points, points)
    report = cases.score(mapping.affine(shift), pairs=pairs)
    assert report["landmarks"]["tre_mm"] == 5.0 and report["field"] == {}
    assert "further apart" in report["warnings"][0]  # as they are
    assert "no grid" in report["warnings"][1]
    assert cases.metric_row(report)["tre_mm_before"] == 0.0


def test_score_tells_of_landmarks_beyond_the_field():
    field = mapping.field(np.zeros((*SHAPE, 3), np.float32), PLACE)
    inside, outside = [0.0, 40, 120], [0.0, -40, 120]
    pairs = PointPairs(["a", "b"], np.array([inside, outside]), np.zeros((2, 3)))
    report = cases.score(field, pairs=pairs)
    assert report["warnings"] == [
        "fov: 1 of 2 fixed landmarks lie beyond the field, which is zero there; are "
        "they in LPS mm?"
    ]


def test_the_end_of_a_later_field_is_no_fold():
    """There a chain jumps; `jacobian`, too, leaves it out."""
    shift = np.eye(4)
    shift[:3, 3] = [-8.0, 0, 0]
    disp_mm = np.full((*SHAPE, 3), [9.0, 0, 0], np.float32)
    inner = mapping.field(disp_mm, PLACE)
    labels = Volume(box(), PLACE)
    chain = mapping.compose([mapping.affine(shift), inner])
    report = cases.score(chain, fixed_labels=labels, moving_labels=labels)
    field = report["field"]
    assert field["sdlogj_whole"] == pytest.approx(0, abs=1e-5)
    assert field["fold_percent_whole"] == field["nd_percent_whole"] == 0
    assert any("where a field of the chain ends" in line for line in report["warnings"])
    # A field that acts first ends where its grid does.
    chain = mapping.compose([inner, mapping.affine(shift)])
    report = cases.score(chain, fixed_labels=labels, moving_labels=labels)
    assert not any("chain" in line for line in report["warnings"])


def test_evaluate_tells_what_readers_do(tmp_path):
    for name in ("fixed", "moving"):
        write_labels(tmp_path / f"{name}.nii.gz", box())
    image = nib.load(tmp_path / "fixed.nii.gz")
    turned = image.affine.copy()
    turned[:3, 3] += 15
    image.set_qform(turned, 1)
    image.set_sform(image.affine, 1)
    nib.save(image, tmp_path / "odd.nii.gz")
    write_field(tmp_path / "u.nii.gz", (0, 0, 0))
    files = Files(
        tmp_path / "u.nii.gz",
        fixed_label=tmp_path / "odd.nii.gz",
        moving_label=tmp_path / "moving.nii.gz",
    )
    (line,) = cases.score_files(files)["warnings"]
    assert line.startswith("fixed_label: ") and "sform" in line


def test_mask_of_another_grid_counts_for_learn2reg(monkeypatch):
    """On the labels' grid, where the challenge's scores are taken."""
    rng = np.random.default_rng(0)
    disp_mm = rng.normal(0, 1, (*SHAPE, 3)).astype(np.float32)
    disp_mm[:7] = 0
    field = mapping.field(disp_mm, PLACE)
    still = np.zeros(SHAPE, np.uint8)
    still[:5] = 1
    half = PLACE.copy()
    half[:3, :3] /= 2
    fine = np.repeat(np.repeat(np.repeat(box(), 2, 0), 2, 1), 2, 2)
    labels = Volume(fine, half)
    monkeypatch.setattr(learn2reg, "check_installed", lambda: None)
    monkeypatch.setattr(learn2reg, "_hd95", lambda *masks: 0.0)
    given = dict(fixed_labels=labels, moving_labels=labels, l2r=True)
    report = cases.score(field, mask=Volume(still, PLACE), **given)
    assert report["learn2reg"]["mean"]["sdlogj_l2r"] == pytest.approx(0, abs=1e-6)
    assert any("mask of Learn2Reg's scores" in line for line in report["warnings"])
    report = cases.score(field, **given)
    assert report["learn2reg"]["mean"]["sdlogj_l2r"] > 0.05


def test_evaluate_tells_of_a_transform_of_another_pair(folder, capsys):
    words = (f"--fixed-label={folder}/fixed.nii.gz", "-t", folder / "u.nii.gz")
    words += (f"--moving-label={folder}/moving.nii.gz", "--json")
    write_field(folder / "u.nii.gz", (-2, 0, 0))
    out, err = evaluate(capsys, *words)
    (line,) = strict(out)["warnings"]
    assert line.startswith("similarity: the labels overlap less") and line in err[0]
    rows = (
        "id,transform,fixed_label,moving_label\na,u.nii.gz,fixed.nii.gz,moving.nii.gz"
    )
    (folder / "one.csv").write_text(rows)
    listed = ("--manifest", folder / "one.csv", "-o", folder / "out")
    _, err = evaluate(capsys, *listed)
    assert err[0].endswith("; warnings: similarity")
    place = PLACE.copy()
    place[0, 3] += 900
    zero = np.zeros((*SHAPE, 3), np.float32)
    transforms.write_field(folder / "u.nii.gz", zero, place)
    _, err = evaluate(capsys, *words, code=errors.FAILED)
    assert "grid_mismatch" in err[0] and "covers none" in err[0]


def test_labels_that_come_into_view_are_no_loss():
    """Organs that the fixed map lacks count 0 once the transform shows them."""
    fixed = np.zeros(SHAPE, np.uint8)
    moving = np.zeros((SHAPE[0] + 2, *SHAPE[1:]), np.uint8)
    fixed[2:6, 2:6, 2:6] = moving[4:8, 2:6, 2:6] = 1
    moving[-2:, 0, 0], moving[-1:, 1, 0] = 2, 3
    volumes = {
        "fixed_labels": Volume(fixed, PLACE),
        "moving_labels": Volume(moving, PLACE),
    }
    step = PLACE[:3, :3] @ (2, 0, 0)
    disp_mm = np.broadcast_to(step.astype(np.float32), (*SHAPE, 3))
    report = cases.score(mapping.field(disp_mm, PLACE), **volumes, surface=False)
    rows = {int(label): row for label, row in report["labels"].items()}
    assert rows[1]["dsc"] == 1.0 and rows[1]["dsc_before"] == 0.5
    assert rows[2]["dsc"] == 0.0 and rows[2]["dsc_before"] is None
    assert metrics.shared_means(rows, ("dsc_before", "dsc")) == [0.5, 1.0]
    assert not any("overlap less" in line for line in report["warnings"])
    assert metrics.shared_means({1: {"dsc": None}}, ("dsc",)) is None


def test_score_tells_of_exchanged_scans():
    """By the grids, and by landmarks, which have none."""
    aside = PLACE.copy()
    aside[:3, 3] += (5.0, 0, 0)
    disp_mm = np.full((*SHAPE, 3), (4.0, 0, 0), np.float32)
    field = mapping.field(disp_mm, PLACE)
    labels = {
        "fixed_labels": Volume(box(), aside),
        "moving_labels": Volume(box(), PLACE),
    }
    report = cases.score(field, **labels, surface=False)
    assert any("scans exchanged?" in line for line in report["warnings"])
    fixed = np.array([[0.0, 40, 120], [3.0, 44, 118]])
    pairs = PointPairs(["a", "b"], fixed, fixed + (4.0, 0, 0))
    assert cases.score(field, pairs=pairs)["warnings"] == []
    turned = pairs._replace(fixed=pairs.moving, moving=fixed)
    lines = cases.score(field, pairs=turned)["warnings"]
    assert any("exchanged? The other way round it is 0 mm" in line for line in lines)


def test_score_brings_the_foreground_onto_the_field():
    """Folds where the labels are, found on a field of another grid."""
    place = np.diag([4.0, 3.0, 4.0, 1.0])
    place[:3, 3] = PLACE[:3, 3]
    disp_mm = np.zeros((8, 12, 11, 3), np.float32)
    # x -> -x up to plane 5, which is beyond the labels, and shifted from there on.
    disp_mm[..., 0] = -8.0 * np.minimum(np.arange(8), 5)[:, None, None]
    labels = Volume(box(), PLACE)
    report = cases.score(
        mapping.field(disp_mm, place), fixed_labels=labels, moving_labels=labels
    )
    assert report["field"]["fold_percent"] == report["field"]["ndv_percent"] == 100
    assert report["field"]["fold_percent_whole"] < 90
    assert any("grid_mismatch" in line for line in report["warnings"])


def test_score_of_a_field_behind_an_affine_is_on_the_grid_of_the_labels():
    """As the inverse of ANTs: the field lies where the affine leads, far from here."""
    far = np.eye(4)
    far[:3, 3] = 300, -200, 100
    back = mapping.field(np.full((*SHAPE, 3), -far[:3, 3], np.float32), far @ PLACE)
    chain = mapping.Mapping((far, *back.parts))
    labels = Volume(box(), PLACE)
    report = cases.score(chain, fixed_labels=labels, moving_labels=labels, mask=labels)
    assert report["mean"]["dsc"] == 1.0
    assert report["field"]["fold_percent"] == 0 and report["warnings"] == []
    with pytest.raises(UserError, match="no field acts first"):
        cases.score(chain)


def test_evaluate_without_a_label_is_done_and_undefined(folder, capsys):
    for name in ("fixed", "moving"):
        write_labels(folder / f"{name}.nii.gz", 0 * box())
    rows = (folder / "cases.csv").read_text().splitlines()[:3]
    (folder / "cases.csv").write_text("\n".join(rows) + "\n")
    words = ("--manifest", folder / "cases.csv", "--out", folder / "scores", "--json")
    found = strict(evaluate(capsys, *words)[0])
    assert found["cases"]["done"] == 2 and found["metrics"]["dsc"]["undefined"] == 2


def test_score_rejects_one_label_map():
    with pytest.raises(ValueError, match="belong together"):
        cases.score(mapping.Mapping(()), fixed_labels=Volume(box(), PLACE))


def test_evaluate_as_the_challenge(folder, capsys):
    pytest.importorskip("surface_distance")
    labels = [f"--{n}-label={folder / n}.nii.gz" for n in ("fixed", "moving")]
    arguments = ["-t", folder / "u1.nii.gz", *labels, "--l2r-compat"]
    out, _ = evaluate(
        capsys, *arguments, "--landmarks", folder / "points.csv", "--json"
    )
    found = strict(out)
    mean = found["learn2reg"]["mean"]
    assert mean["dsc_l2r"] == 0.75
    assert mean["hd95_voxel_l2r"] == 1.0  # voxels, not the 2 mm of hd95_mm
    assert mean["tre_mm_l2r"] == pytest.approx(2, abs=1e-4)
    assert mean["folds_l2r"] == 0
    assert set(mean) <= set(found["definitions"])
    out, _ = evaluate(capsys, *arguments)
    assert "hd95_voxel_l2r" in out


def test_evaluate_as_the_challenge_names_the_extra(folder, capsys, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec",
        lambda name: None if name == "surface_distance" else find(name),
    )
    arguments = ["--manifest", folder / "cases.csv", "--out", folder / "scores"]
    _, err = evaluate(capsys, *arguments, "--l2r-compat", code=errors.USAGE)
    assert "unireg-jax[eval]" in err[0] and not (folder / "scores").exists()
    # Without labels nothing of it is needed.
    evaluate(capsys, "-t", folder / "u0.nii.gz", "--l2r-compat")


def test_evaluate_reads_a_learn2reg_field(folder, capsys):
    disp_mm = np.zeros((*SHAPE, 3), np.float32)
    disp_mm[..., 0] = 4.0
    transforms.write_l2r(folder / "disp.npz", disp_mm, PLACE)
    labels = [f"--{n}-label={folder / n}.nii.gz" for n in ("fixed", "moving")]
    out, _ = evaluate(capsys, "-t", folder / "disp.npz", *labels, "--json")
    assert strict(out)["mean"]["dsc"] == 1.0
    _, err = evaluate(capsys, "-t", folder / "disp.npz", code=errors.USAGE)
    assert "fixed scan" in err[0]
    mask = ("--fixed-mask", folder / "fixed.nii.gz")
    _, err = evaluate(capsys, "-t", folder / "disp.npz", *mask, code=errors.USAGE)
    assert "label maps of both scans" in err[0]


# --- lists --------------------------------------------------------------------------


def test_evaluate_list_fails_the_bad_and_goes_on(folder, capsys):
    out = folder / "scores"
    text, err = evaluate(
        capsys,
        *("--manifest", folder / "cases.csv", "--out", out),
        code=errors.PARTLY,
    )
    assert "dsc" in text and len(err) == 6
    assert sorted(os.listdir(out)) == [
        *(".unireg-reports.lock", "cases.csv", "labels.csv"),
        *("reports.jsonl", "summary.json", "summary.tex"),
    ]
    rows = {row["id"]: row for row in rows_of(out / "cases.csv")}
    assert [row["status"] for row in rows.values()] == ["ok"] * 3 + ["failed"] * 2
    assert rows["gone"]["reason"] == "not_found"
    assert "HTML" in rows["bad"]["message"] and rows["bad"]["dsc"] == ""
    assert [float(rows[f"case{n}"]["dsc"]) for n in range(3)] == [1.0, 0.75, 0.5]
    labels = rows_of(out / "labels.csv")
    assert [(row["id"], row["label"]) for row in labels] == [
        (f"case{n}", "1") for n in range(3)
    ]
    summary = strict((out / "summary.json").read_text())
    assert summary["cases"] == {"total": 5, "done": 3, "failed": 2}
    dsc = summary["metrics"]["dsc"]
    assert (dsc["mean"], dsc["median"], dsc["worst30"]) == (0.75, 0.75, 0.5)
    assert dsc["std"] == 0.25 and dsc["n"] == 3 and dsc["better"] == "higher"
    assert summary["labels"]["1"]["dsc"] == dsc
    assert [entry["id"] for entry in summary["failed"]] == ["bad", "gone"]
    latex = (out / "summary.tex").read_text()
    assert r"dsc & $0.750 \pm 0.250$ & $0.750$ & $0.500$ & 3 & 0" in latex
    assert r"$0.750 \pm 0.250$ (3)" in latex and r"tre\_mm" in latex


@pytest.mark.parametrize(
    "fault, reason, says",
    [
        (MemoryError("x"), "out_of_memory", "more is needed than there is"),
        (KeyError("Doe"), "internal", "internal: KeyError, a fault of this program"),
    ],
)
def test_evaluate_list_goes_on_after_a_fault_of_ours(
    folder, capsys, monkeypatch, fault, reason, says
):
    read = mapping.read

    def break_at(path, **scans):
        if str(path).endswith("u1.nii.gz"):
            raise fault
        return read(path, **scans)

    monkeypatch.setattr(mapping, "read", break_at)
    out = folder / "scores"
    words = ("--manifest", folder / "cases.csv", "--out", out)
    _, err = evaluate(capsys, *words, code=errors.PARTLY)
    rows = {row["id"]: row for row in rows_of(out / "cases.csv")}
    assert [row["status"] for row in rows.values()] == [
        *("ok", "failed", "ok", "failed", "failed")
    ]
    assert rows["case1"]["reason"] == reason and says in rows["case1"]["message"]
    assert not any("Doe" in line for line in err)
    assert not list(folder.glob("**/unireg-error-*.log"))


def test_evaluate_list_paths_do_not_leave_the_machine(folder, capsys):
    """Results travel: no absolute path in them, not even in messages of failures."""
    out = folder / "scores"
    arguments = ["--manifest", folder / "cases.csv", "--out", out, "--quiet"]
    _, err = evaluate(capsys, *arguments, code=errors.PARTLY)
    assert err == []
    for path in out.iterdir():
        assert str(folder) not in path.read_text(), path
    assert '"absent.nii.gz: not_found' in (out / "cases.csv").read_text()


def test_evaluate_list_overwrites_only_when_asked(folder, capsys):
    out = folder / "scores"
    out.mkdir()
    (out / "labels.csv").write_text("mine")
    arguments = ["--manifest", folder / "cases.csv", "--out", out, "--quiet"]
    _, err = evaluate(capsys, *arguments, code=errors.USAGE)
    assert "--overwrite" in err[0] and os.listdir(out) == ["labels.csv"]
    evaluate(capsys, *arguments, "--overwrite", code=errors.PARTLY)
    assert (out / "labels.csv").read_text() != "mine"


@pytest.mark.parametrize("more", [[], ["--overwrite"]])
def test_evaluate_never_replaces_its_list(more, folder, capsys):
    before, there = (folder / "cases.csv").read_bytes(), set(os.listdir(folder))
    arguments = ["--manifest", folder / "cases.csv", "--out", folder, *more]
    _, err = evaluate(capsys, *arguments, code=errors.USAGE)
    assert len(err) == 1 and "got cases.csv of --out" in err[0]
    assert (folder / "cases.csv").read_bytes() == before
    assert set(os.listdir(folder)) == there


def test_evaluate_never_replaces_a_table_that_it_compares(tmp_path, capsys):
    table = write_table(tmp_path / "comparison.csv", [0.1, 0.2])
    before = table.read_bytes()
    for words in ([f"a={table}", f"b={table}"], [table, "--columns", "dsc", "x"]):
        arguments = ["--compare", *words, "--out", tmp_path, "--overwrite"]
        _, err = evaluate(capsys, *arguments, code=errors.USAGE)
        assert "got comparison.csv of --out" in err[0]
    assert table.read_bytes() == before


@pytest.mark.parametrize(
    ("text", "code", "match"),
    [
        ("id,transform\n", errors.NOTHING, "lists no case"),
        ("id,transform\na,absent.nii.gz\n", errors.FAILED, "0 of 1 cases done"),
        ("id,fixed_label\na,b\n", errors.USAGE, "'transform' is missing"),
        ("id,transfrom\na,b\n", errors.USAGE, "did you mean 'transform'"),
        ("id,transform\n../a,b\n", errors.USAGE, "id_invalid"),
        ("id,transform\na,b\nA,b\n", errors.USAGE, "id_duplicate"),
        ("id,transform\na,../../b\n", errors.USAGE, "path_escape"),
        ("id,transform\na,\n", errors.USAGE, "is empty"),
    ],
)
def test_evaluate_list_of_nothing_good(text, code, match, tmp_path, capsys):
    home = tmp_path / "deep"
    home.mkdir()
    (home / "cases.csv").write_text(text)
    arguments = ["--manifest", home / "cases.csv", "--out", tmp_path / "out"]
    _, err = evaluate(capsys, *arguments, code=code)
    assert match in " ".join(err)
    assert (tmp_path / "out").exists() == (code == errors.FAILED)


def test_evaluate_json_list_with_one_table_of_points_per_scan(folder, capsys):
    for name, x in (("a", -10), ("b", -6)):
        (folder / f"{name}.txt").write_text(f"x_mm y_mm z_mm\n{x} 40 110\n")
    row = {"id": "a", "transform": "u0.nii.gz"}
    row |= {"fixed_points": "a.txt", "moving_points": "b.txt"}
    (folder / "cases.json").write_text(json.dumps([row]))
    arguments = ["--manifest", folder / "cases.json", "--out", folder / "out", "--json"]
    out, _ = evaluate(capsys, *arguments)
    found = strict(out)
    assert found["metrics"]["tre_mm"]["mean"] == pytest.approx(0, abs=1e-5)
    assert found["metrics"]["tre_mm_std"]["undefined"] == 1
    assert found == strict((folder / "out" / "summary.json").read_text())


def test_evaluate_finds_results_of_a_batch(folder, capsys):
    scans = "fixed.nii.gz,moving.nii.gz"
    (folder / "pairs.csv").write_text(
        f"id,fixed,moving,fixed_label,moving_label\na,{scans},{scans}\nb,{scans},{scans}"
        f"\nc,{scans},{scans}\nd,{scans},,moving.nii.gz\n"
    )
    results = folder / "results"
    (results / "a").mkdir(parents=True)
    os.rename(folder / "u0.nii.gz", results / "a" / "a_1Warp.nii.gz")
    shutil.copy(folder / "u1.nii.gz", results / "d.nii.gz")
    os.rename(folder / "u1.nii.gz", results / "b.nii.gz")
    arguments = ["--manifest", folder / "pairs.csv", "--transforms", results]
    evaluate(capsys, *arguments, "-o", folder / "out", code=errors.PARTLY)
    rows = rows_of(folder / "out" / "cases.csv")
    # Of the last one the list names labels that were to be warped.
    assert [row["dsc"] for row in rows] == ["1.0", "0.75", "", ""]
    assert [row["status"] for row in rows][2:] == ["failed", "ok"]
    assert "c_1Warp.nii.gz" in rows[2]["message"]
    # ANTs' field of that name lacks the affine, which lies beside it.
    (results / "a" / "a_0GenericAffine.mat").write_bytes(b"")
    words = (*arguments, "-o", folder / "ants")
    _, err = evaluate(capsys, *words, code=errors.USAGE)
    assert "unireg compose -t a_1Warp.nii.gz -t a_0GenericAffine.mat" in err[0]


def test_evaluate_finds_a_learn2reg_submission(folder, capsys):
    pytest.importorskip("surface_distance")
    pairs = []
    for n in (1, 2):
        name = f"imagesTr/T_000{n}_0000.nii.gz"
        pairs.append(name)
        for place in ("imagesTr", "labelsTr"):
            (folder / place).mkdir(exist_ok=True)
            shift = (2 * (n - 1), 0, 0)
            write_labels(folder / place / name.split("/")[1], box(shift))
    data = {"registration_val": [{"fixed": pairs[0], "moving": pairs[1]}]}
    (folder / "dataset.json").write_text(json.dumps(data))
    (folder / "submission").mkdir()
    disp_mm = np.zeros((*SHAPE, 3), np.float32)
    disp_mm[..., 0] = 4.0
    path = folder / "submission" / "disp_0001_0000_0002_0000.nii.gz"
    transforms.write_l2r(path, disp_mm, PLACE)
    arguments = ["--manifest", folder / "dataset.json", "--json", "--l2r-compat"]
    arguments += ["--transforms", folder / "submission", "-o", folder / "out"]
    found = strict(evaluate(capsys, *arguments)[0])
    assert found["metrics"]["dsc_l2r"]["mean"] == 1.0
    assert found["metrics"]["dsc_l2r"]["quantile_l2r"] == 1.0
    # Under both of its names, as `convert` writes it, the pair counts once.
    os.link(path, path.with_name("disp_0001_0002.nii.gz"))
    assert strict(evaluate(capsys, *arguments, "--overwrite")[0]) == found
    assert len(rows_of(folder / "out" / "cases.csv")) == 1


def challenge_tre(folder, fixed, moving, points, disp):
    """Mean of `compute_tre` of MDL-UzL/L2R's evaluation/utils.py, mm."""
    field = nib.load(folder / disp).get_fdata()
    spacing_mov = nib.load(folder / f"imagesTr/{moving}.nii.gz").header.get_zooms()[:3]
    fix, mov = (
        np.loadtxt(folder / points / f"{name}.csv", delimiter=",")
        for name in (fixed, moving)
    )
    shift = [ndimage.map_coordinates(field[..., i], fix.T) for i in range(3)]
    gap = fix + np.stack(shift, axis=-1) - mov
    return np.linalg.norm(gap * spacing_mov, axis=1).mean()


@pytest.fixture
def lungs(tmp_path):
    """A task judged by points: scans on two grids, the axes of one those of no other.

    Pair 0001 has landmarks and key points, 0002 key points alone.
    """
    rng = np.random.default_rng(5)
    shapes = SHAPE, (16, 15, 17)
    places = np.diag([1.9, -1.3, 1.8, 1.0]), np.eye(4)
    places[1][:3, :3] = [[0, 1.7, 0], [0, 0, -1.0], [-1.3, 0, 0]]
    places[0][:3, 3], places[1][:3, 3] = (-51.2, 140.7, 126.7), (-52, 141, 146)
    for name in ("imagesTr", "landmarksTr", "keypointsTr", "masksTr", "disps"):
        (tmp_path / name).mkdir()
    grid = np.stack(np.meshgrid(*map(np.arange, SHAPE), indexing="ij"), axis=-1)
    pairs = []
    for n in (1, 2):
        names = [f"LungCT_{n:04d}_{m:04d}" for m in (0, 1)]
        for name, shape, place in zip(names, shapes, places, strict=True):
            image = nib.Nifti1Image(rng.integers(-900, 90, shape, np.int16), place)
            image.header.set_xyzt_units("mm")
            nib.save(image, tmp_path / f"imagesTr/{name}.nii.gz")
        # At voxels, where a spline is exact along whichever axes: near the border it
        # bends the straight line that takes one scan's indices to the other's.
        fixed = rng.integers(3, 8, (7, 3))
        # On the outermost ones: the field holds there, too.
        fixed[[0, 1, 2], [0, 1, 2]] = 0
        fixed[[3, 4, 5], [0, 1, 2]] = np.array(SHAPE) - 1
        move = np.diag([1 + 0.01 * n, 0.99, 1, 1])
        move[:3, 3] = (n, 0.5, -1.5)
        there = np.linalg.inv(places[1]) @ move @ places[0]
        for kind in ("landmarksTr", "keypointsTr")[n - 1 :]:
            moved = nib.affines.apply_affine(there, fixed) + rng.normal(0, 1, (7, 3))
            for name, table in zip(names, (fixed, moved), strict=True):
                path = tmp_path / kind / f"{name}.csv"
                np.savetxt(path, table, fmt="%.6f", delimiter=",")
        disp = nib.affines.apply_affine(there, grid) - grid
        image = nib.Nifti1Image(disp.astype(np.float32), places[0])
        nib.save(image, tmp_path / f"disps/disp_{n:04d}_{n:04d}.nii.gz")
        paths = [f"./imagesTr/{name}.nii.gz" for name in names]
        pairs.append(dict(zip(("fixed", "moving"), paths, strict=True)))
    inside = nib.Nifti1Image(np.ones(SHAPE, np.uint8), places[0])
    nib.save(inside, tmp_path / "masksTr/LungCT_0001_0000.nii.gz")
    text = json.dumps({"name": "LungCT", "registration_val": pairs})
    (tmp_path / "LungCT_dataset.json").write_text(text)
    return tmp_path


def test_evaluate_judges_a_task_of_key_points_as_the_challenge(lungs, capsys):
    arguments = ["--manifest", lungs / "LungCT_dataset.json", "--l2r-compat"]
    arguments += ["--transforms", lungs / "disps", "-o", lungs / "scores", "--json"]
    out, err = evaluate(capsys, *arguments)
    assert not [line for line in err if "warnings" in line]
    rows = rows_of(lungs / "scores" / "cases.csv")
    expected = []
    for n, row in enumerate(rows, start=1):
        names = [f"LungCT_{n:04d}_{m:04d}" for m in (0, 1)]
        disp = f"disps/disp_{n:04d}_{n:04d}.nii.gz"
        # One kind for all of them: landmarks of one pair do not mix into the mean.
        expected.append(challenge_tre(lungs, *names, "keypointsTr", disp))
        assert row["status"] == "ok" and row["points"] == "7"
        # float32 mm in between
        assert float(row["tre_mm_l2r"]) == pytest.approx(expected[-1], abs=1e-4)
        # Ours is through the world: the same where the field is linear.
        assert float(row["tre_mm"]) == pytest.approx(expected[-1], abs=1e-4)
    found = strict(out)["metrics"]["tre_mm_l2r"]
    assert found["mean"] == pytest.approx(np.mean(expected), abs=1e-4)
    quantile = np.quantile(expected, 0.7)
    assert found["quantile_l2r"] == pytest.approx(quantile, abs=1e-4)


def test_evaluate_of_points_in_voxels_needs_both_scans(lungs, capsys):
    cells = [f"LungCT_0001_000{m}" for m in (0, 1)]
    cells = [f"imagesTr/{c}.nii.gz" for c in cells] + [
        f"keypointsTr/{c}.csv" for c in cells
    ]
    header = "fixed,moving,fixed_points,moving_points,points_frame,id,transform\n"
    row = ",".join([*cells, "voxel_from_0", "a", "disps/disp_0001_0001.nii.gz\n"])
    path = lungs / "cases.csv"
    path.write_text(header + row)
    out, _ = evaluate(capsys, "--manifest", path, "-o", lungs / "one", "--json")
    names = ("LungCT_0001_0000", "LungCT_0001_0001", "keypointsTr")
    expected = challenge_tre(lungs, *names, "disps/disp_0001_0001.nii.gz")
    mean = strict(out)["metrics"]["tre_mm"]["mean"]
    assert mean == pytest.approx(expected, abs=1e-4)
    # Other numbers of the same files are judged again.
    path.write_text(header + row.replace("from_0", "from_1"))
    out, err = evaluate(capsys, "--manifest", path, "-o", lungs / "one", "--json")
    assert "judged before" not in err[0]
    assert strict(out)["metrics"]["tre_mm"]["mean"] != pytest.approx(mean, abs=1e-2)
    path.write_text(header + row.replace("from_0", "from_2"))
    words = ("--manifest", path, "-o", lungs / "two")
    _, err = evaluate(capsys, *words, code=errors.USAGE)
    assert "did you mean 'voxel_from_" in " ".join(err)
    os.remove(lungs / "imagesTr/LungCT_0001_0001.nii.gz")
    path.write_text(header + row)
    _, err = evaluate(capsys, *words, code=errors.FAILED)
    assert "LungCT_0001_0001.nii.gz: not_found" in err[0]


def test_evaluate_of_one_transform_reads_points_in_voxels(lungs, capsys):
    names = ["LungCT_0001_0000", "LungCT_0001_0001"]
    field = "disps/disp_0001_0001.nii.gz"
    expected = challenge_tre(lungs, *names, "keypointsTr", field)
    scans, tables = (
        [lungs / folder / f"{name}{ending}" for name in names]
        for folder, ending in (("imagesTr", ".nii.gz"), ("keypointsTr", ".csv"))
    )
    words = ["-t", lungs / field, "--json"]
    words += ["--fixed-points", tables[0], "--moving-points", tables[1]]
    both = ["-f", scans[0], "-m", scans[1]]
    out, _ = evaluate(capsys, *words, *both, "--points-frame", "voxel_from_0")
    tre = strict(out)["landmarks"]["tre_mm"]
    assert tre == pytest.approx(expected, abs=1e-4)
    _, err = evaluate(capsys, *words, *both, code=errors.USAGE)
    assert "--points-frame" in err[0] and tables[0].name in err[0]
    words[1] = "identity"
    _, err = evaluate(
        capsys, *words, "--points-frame", "voxel_from_0", code=errors.USAGE
    )
    assert "name the scan" in err[0]
    # In a list the case fails, and the column is named.
    cells = ",".join(f"keypointsTr/{name}.csv" for name in names)
    text = f"id,transform,fixed_points,moving_points\na,identity,{cells}\n"
    (lungs / "cases.csv").write_text(text)
    out = lungs / "scores"
    words = ("--manifest", lungs / "cases.csv", "-o", out)
    _, err = evaluate(capsys, *words, code=errors.FAILED)
    assert "in a list by the column points_frame" in err[0]


def test_evaluate_of_the_identity_is_the_state_before(folder, capsys):
    words = ["--landmarks", folder / "points.csv", "--json"]
    words += ["--fixed-label", folder / "fixed.nii.gz"]
    words += ["--moving-label", folder / "moving.nii.gz"]
    out, _ = evaluate(capsys, "-t", "identity", *words)
    found = strict(out)
    out, _ = evaluate(capsys, "-t", folder / "u0.nii.gz", *words)
    assert found["mean"]["dsc"] == strict(out)["mean"]["dsc_before"] == 0.5
    assert found["landmarks"]["tre_mm"] == pytest.approx(4)
    assert found["field"]["fold_percent"] == 0
    labels = "fixed.nii.gz,moving.nii.gz"
    path = folder / "cases.csv"
    header = "id,transform,fixed_segmentation,moving_segmentation\n"
    path.write_text(f"{header}a,identity,{labels}\nb,u0.nii.gz,{labels}\n")
    evaluate(capsys, "--manifest", path, "-o", folder / "out")
    rows = rows_of(folder / "out" / "cases.csv")
    assert [float(row["dsc"]) for row in rows] == [0.5, 1.0]
    # Another transform of the same case is judged, not taken for it.
    path.write_text(f"{header}a,absent.nii.gz,{labels}\n")
    _, err = evaluate(
        capsys, "--manifest", path, "-o", folder / "out", code=errors.FAILED
    )
    assert "not_found" in err[0]


def turned_labels(lungs, turn=((2, -1), (0, 1), (1, -1))):
    """Labels of pair 0001 on other axes than its scans: an index is another place."""
    (lungs / "labelsTr").mkdir()
    for m in (0, 1):
        scan = nib.load(lungs / f"imagesTr/LungCT_0001_000{m}.nii.gz")
        labels = nib.Nifti1Image((scan.get_fdata() > 0).astype(np.uint8), scan.affine)
        turned = labels.as_reoriented(turn)
        nib.save(turned, lungs / f"labelsTr/LungCT_0001_000{m}.nii.gz")


def test_evaluate_reads_points_in_voxels_of_the_scans_not_of_labels(lungs, capsys):
    turned_labels(lungs)
    words = ["--manifest", lungs / "LungCT_dataset.json", "-o", lungs / "scores"]
    evaluate(capsys, *words, "--transforms", lungs / "disps", "--no-surface")
    row = rows_of(lungs / "scores" / "cases.csv")[0]
    names = ("LungCT_0001_0000", "LungCT_0001_0001", "keypointsTr")
    expected = challenge_tre(lungs, *names, "disps/disp_0001_0001.nii.gz")
    assert float(row["tre_mm"]) == pytest.approx(expected, abs=1e-4)
    assert row["dsc"]
    given = Files(
        lungs / "disps/disp_0001_0001.nii.gz",
        *(lungs / f"labelsTr/LungCT_0001_000{m}.nii.gz" for m in (0, 1)),
        fixed_points=lungs / "keypointsTr/LungCT_0001_0000.csv",
        moving_points=lungs / "keypointsTr/LungCT_0001_0001.csv",
        points_frame="voxel_from_0",
    )
    with pytest.raises(UserError, match="the scan that the voxels are of"):
        cases.score_files(given)
    with pytest.raises(UserError, match="points of both scans belong together"):
        cases.score_files(given._replace(moving_points=None))


@pytest.mark.parametrize(
    "turn", [((2, -1), (0, 1), (1, -1)), ((0, -1), (1, 1), (2, 1))]
)
def test_evaluate_reads_a_field_in_voxels_of_the_scans_not_of_labels(
    turn, lungs, capsys
):
    turned_labels(lungs, turn)
    words = ["--transforms", lungs / "disps", "--no-surface"]

    def scores(name, *more):
        evaluate(capsys, "--manifest", lungs / name, "-o", lungs / "scores", *more)
        row = rows_of(lungs / "scores" / "cases.csv")[0]
        return [float(row[key]) for key in ("dsc", "sdlogj")]

    expected = scores("LungCT_dataset.json", *words)  # of points that need the scans
    for folder in ("landmarksTr", "keypointsTr"):
        shutil.rmtree(lungs / folder)
    assert scores("LungCT_dataset.json", *words) == expected
    places = ("imagesTr", "labelsTr")
    cells = [f"{place}/LungCT_0001_000{m}.nii.gz" for place in places for m in (0, 1)]
    cells.append("masksTr/LungCT_0001_0000.nii.gz")
    header = "id,transform,fixed,moving,fixed_label,moving_label,fixed_mask"
    row = ",".join(["a", "disps/disp_0001_0001.nii.gz", *cells])
    (lungs / "a.csv").write_text(f"{header}\n{row}\n")
    assert scores("a.csv", "--overwrite", "--no-surface") == expected


def test_evaluate_opens_scans_only_where_their_voxels_count(folder, lungs, capsys):
    """Lists of before, whose scans may be anywhere or nowhere, are judged as before."""
    rows = ["id,transform,fixed,moving,fixed_label,moving_label,landmarks"]
    scans = "../../f.nii.gz,gone.nii.gz"
    labels = "fixed.nii.gz,moving.nii.gz"
    disp_mm = np.zeros((*SHAPE, 3), np.float32)
    disp_mm[..., 0] = 4.0
    transforms.write_l2r(folder / "disp.npz", disp_mm, PLACE)
    rows += [f"a,u0.nii.gz,{scans},,,points.csv", f"b,u0.nii.gz,{scans},{labels},"]
    rows += [f"c,disp.npz,{scans},{labels},points.csv"]
    (folder / "cases.csv").write_text("\n".join(rows) + "\n")
    words = ("--manifest", folder / "cases.csv", "-o", folder / "scores")
    _, err = evaluate(capsys, *words)
    (line,) = (line for line in err if "axes of the labels" in line)
    assert "1 cases (c first)" in line
    for line in (folder / "scores" / "reports.jsonl").read_text().splitlines():
        assert not {"fixed", "moving"} & set(json.loads(line)["key"]["inputs"])
    # A field in voxels, without labels: there they are checked, and opened.
    (folder / "cases.csv").write_text(f"{rows[0]}\nd,disp.npz,{scans},,,points.csv\n")
    _, err = evaluate(capsys, *words, code=errors.USAGE)
    assert "path_escape" in err[0] or "leads outside" in " ".join(err)
    cells = ",".join(f"imagesTr/LungCT_0001_000{m}.nii.gz" for m in (0, 1))
    field = "disps/disp_0001_0001.nii.gz"
    (lungs / "e.csv").write_text(f"id,transform,fixed,moving\ne,{field},{cells}\n")
    evaluate(capsys, "--manifest", lungs / "e.csv", "-o", lungs / "e")


def test_evaluate_tells_all_faults_of_points_before_any_case(folder, capsys):
    cells = ("landmarks", "fixed_points", "moving_points", "points_frame")
    wrong = [
        ("l.csv", "", "", "voxel_from_0"),
        ("l.csv", "f.csv", "m.csv", ""),
        ("", "f.csv", "", ""),
        ("", "f.csv", "m.csv", "voxel_from_1"),
    ]
    lines = [f"{n},u0.nii.gz,{','.join(row)}" for n, row in enumerate(wrong)]
    text = "\n".join([f"id,transform,{','.join(cells)}", *lines])
    (folder / "wrong.csv").write_text(text + "\n")
    words = ("--manifest", folder / "wrong.csv", "-o", folder / "scores")
    _, err = evaluate(capsys, *words, code=errors.USAGE)
    told = " ".join(err)
    assert "4 faults" in told and not (folder / "scores").exists()
    assert told.count("landmarks are in LPS mm and stand alone") == 2
    assert "line 4: fixed_points and moving_points belong together" in told
    assert "line 5: points_frame 'voxel_from_1' needs the scans" in told


def test_evaluate_judges_again_what_another_algorithm_judged(folder, capsys):
    rows = ("id,transform,landmarks", "a,u0.nii.gz,points.csv", "b,u0.nii.gz,")
    (folder / "cases.csv").write_text("\n".join(rows) + "\n")
    words = ["--manifest", folder / "cases.csv", "-o", folder / "scores"]
    evaluate(capsys, *words, "--l2r-compat")
    path = folder / "scores" / "reports.jsonl"
    assert path.read_text().count('"tre_l2r": 2') == 1
    path.write_text(path.read_text().replace(', "tre_l2r": 2', ""))  # as of before
    _, err = evaluate(capsys, *words, "--l2r-compat")
    assert ["judged before" in line for line in err[:2]] == [False, True]
    evaluate(capsys, *words)
    assert "tre_l2r" not in path.read_text().splitlines()[-2]


def test_submission_from_results_is_what_the_challenge_reads(lungs, capsys):
    """`convert` over a list; the challenge's script gives `evaluate`'s numbers."""
    names = [f"LungCT_0002_000{m}" for m in (0, 1)]
    fixed, moving = (
        nifti.read_image(lungs / f"imagesTr/{name}.nii.gz") for name in names
    )
    shift = np.diag([1.02, 0.97, 1.0, 1.0])
    shift[:3, 3] = (1, -2, 3)
    disp_mm = np.random.default_rng(3).normal(0, 1, (*fixed.data.shape, 3))
    whole = mapping.compose(
        [mapping.field(disp_mm, fixed.vox2world), mapping.affine(shift)]
    )
    result = lungs / "results" / "__".join(names)
    result.mkdir(parents=True)
    mapping.write(result / f"{result.name}_Composite.h5", whole)
    listed = ["--manifest", str(lungs / "LungCT_dataset.json")]
    listed += ["--transforms", str(lungs / "results")]
    words = ["convert", *listed, "--to", "l2r", "-o", str(lungs / "sub"), "--json"]
    assert cli.main(words) == errors.PARTLY  # the other pair has no result
    stdout, stderr = capsys.readouterr()
    assert strict(stdout)["failed"] == [
        {"id": "LungCT_0001_0000__LungCT_0001_0001", "reason": "not_found"}
    ]
    assert "1 of 2 fields done" in stderr
    names_there = {".unireg-convert.lock", "convert.jsonl", "disp_0002_0002.nii.gz"}
    assert set(os.listdir(lungs / "sub")) == names_there
    image = nib.load(lungs / "sub" / "disp_0002_0002.nii.gz")
    assert image.shape == (*SHAPE, 3) and image.get_data_dtype() == np.float32
    scores = [*listed, "--l2r-compat", "-o", lungs / "scores"]
    evaluate(capsys, *scores, code=errors.PARTLY)
    row = rows_of(lungs / "scores" / "cases.csv")[1]
    expected = challenge_tre(lungs, *names, "keypointsTr", "sub/disp_0002_0002.nii.gz")
    assert float(row["tre_mm_l2r"]) == pytest.approx(expected, abs=1e-4)


def test_evaluate_list_goes_on_where_it_stopped(folder, capsys, monkeypatch):
    arguments = ["--manifest", folder / "cases.csv", "-o", folder / "scores"]
    judge = cases.score_case

    def stop_at(name, files, **settings):
        if name == "case2":
            raise KeyboardInterrupt
        return judge(name, files, **settings)

    monkeypatch.setattr(cases, "score_case", stop_at)
    evaluate(capsys, *arguments, code=130)
    there = {".unireg-reports.lock", "reports.jsonl"}
    assert set(os.listdir(folder / "scores")) == there
    judged = []

    def note(name, files, **settings):
        judged.append(name)
        return judge(name, files, **settings)

    monkeypatch.setattr(cases, "score_case", note)
    _, err = evaluate(capsys, *arguments, code=errors.PARTLY)
    assert judged == ["case2", "bad", "gone"]
    assert "judged before" in err[0] and "judged before" not in err[2]
    before = (folder / "scores" / "cases.csv").read_text()
    # Other files and other settings: all that they touch is judged again.
    os.replace(folder / "u0.nii.gz", folder / "absent.nii.gz")
    write_field(folder / "u0.nii.gz", (1, 0, 0))
    judged.clear()
    evaluate(capsys, *arguments, code=errors.PARTLY)
    assert judged == ["case0", "bad", "gone"]
    assert (folder / "scores" / "cases.csv").read_text() != before
    judged.clear()
    evaluate(capsys, *arguments, "--tolerance-mm", "1", code=errors.PARTLY)
    evaluate(capsys, *arguments, "--overwrite", code=errors.PARTLY)
    assert judged == ["case0", "case1", "case2", "bad", "gone"] * 2
    monkeypatch.undo()
    fresh = folder / "fresh"
    evaluate(capsys, *arguments[:2], "-o", fresh, code=errors.PARTLY)
    text = (folder / "scores" / "cases.csv").read_text()
    assert text == (fresh / "cases.csv").read_text()


def test_second_evaluation_into_one_folder_leaves_at_once(folder, capsys, monkeypatch):
    """The first one holds it until its tables are there."""
    arguments = ["--manifest", folder / "cases.csv", "-o", folder / "scores"]
    write, tried = verb._write, []

    def look(out, texts):
        monkeypatch.setattr(verb, "_write", write)
        journal = (out / "reports.jsonl").read_bytes()
        _, err = evaluate(capsys, *arguments, "--quiet", code=errors.USAGE)
        assert len(err) == 1 and "another run is writing" in err[0]
        assert (out / "reports.jsonl").read_bytes() == journal
        tried.append(out)
        write(out, texts)

    monkeypatch.setattr(verb, "_write", look)
    evaluate(capsys, *arguments, "--quiet", code=errors.PARTLY)
    assert tried == [folder / "scores"]


def test_score_cases_says_which_are_done(folder):
    listed = {"a": Files(folder / "u0.nii.gz"), "b": Files(folder / "absent.nii.gz")}
    done = list(cases.score_cases(listed))
    assert [case.id for case in done] == ["a", "b"]
    assert done[0].report is not None and done[1].exit_code == errors.FAILED
    assert cases.label_rows(Case("x", None)) == []


# --- methods ------------------------------------------------------------------------


def write_table(path, values, column="dsc"):
    lines = [f"{path.stem}{i},{v}" for i, v in enumerate(values)]
    text = "\n".join([f"id,{column}", *lines]).replace(path.stem, "p")
    path.write_text(text + "\n")
    return path


def test_evaluate_compares_tables(tmp_path, capsys):
    better = np.linspace(0.8, 0.9, 8)
    a = write_table(tmp_path / "a.csv", better)
    b = write_table(tmp_path / "b.csv", better - 0.05)
    arguments = ["--compare", f"a={a}", f"b={b}", "-o", tmp_path / "out", "--json"]
    out, _ = evaluate(capsys, *arguments)
    found = strict(out)
    ((test,),) = [c["tests"] for c in found["comparisons"]]
    assert test["p_holm"] == pytest.approx(2 / 2**8) and test["significant"]
    names = ["comparison.csv", "comparison.json", "comparison.tex"]
    assert sorted(os.listdir(tmp_path / "out")) == names
    assert "^{*}" in (tmp_path / "out" / names[2]).read_text()
    (row,) = rows_of(tmp_path / "out" / names[0])
    assert row["a"] == "a" and row["significant"] == "true" and row["n"] == "8"
    text, _ = evaluate(capsys, *arguments[:3])
    assert text.splitlines()[1].endswith("*")


def test_evaluate_compares_folders_of_results(folder, capsys):
    for name in ("one", "two"):
        arguments = ["--manifest", folder / "cases.csv", "-o", folder / name, "--quiet"]
        evaluate(capsys, *arguments, code=errors.PARTLY)
    words = [f"{name}={folder / name}" for name in ("one", "two")]
    found = strict(evaluate(capsys, "--compare", *words, "--json")[0])
    by_metric = {c["metric"]: c["tests"][0] for c in found["comparisons"]}
    assert by_metric["dsc"]["n"] == 0 and by_metric["dsc"]["zero"] == 3
    # The failed cases.
    assert by_metric["dsc"]["undefined"] == 2 and by_metric["dsc"]["p"] is None
    words = [f"{name}={folder / name / 'labels.csv'}" for name in ("one", "two")]
    found = strict(evaluate(capsys, "--compare", *words, "--json")[0])
    assert found["comparisons"][0]["tests"][0]["label"] == "1"


def test_evaluate_compares_columns(tmp_path, capsys):
    path = tmp_path / "all.csv"
    path.write_text("id,a,b,c\n1,1,2,x\n2,2,4,x\n3,3,6,x\n")
    arguments = ["--compare", path, "--columns", "a", "b", "--metric", "tre_mm"]
    found = strict(evaluate(capsys, *arguments, "--json")[0])["comparisons"][0]
    assert found["metric"] == "tre_mm" and found["better"] == "lower"
    assert found["tests"][0]["p"] == 0.25 and found["tests"][0]["effect"] == -1
    _, err = evaluate(
        capsys, "--compare", path, "--columns", "a", "c", code=errors.USAGE
    )
    assert "no column of scores 'c'" in err[0]


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["--compare", "a=a.csv"], "two or more"),
        (["--compare", "a.csv", "b=a.csv"], "NAME=FILE"),
        (["--compare", "a=a.csv", "a=a.csv"], "every NAME once"),
        (["--compare", "a=a.csv", "b=absent.csv"], "not_found"),
        (["--compare", "a=a.csv", "b=a.csv", "--metric", "dcs"], "did you mean 'dsc'"),
        (["--compare", "a=a.csv", "b=a.csv", "--columns", "dsc", "x"], "one table"),
        (["--compare", "a=a.csv", "b=a.csv", "--fixed-mask", "m"], "belongs to"),
        (["--manifest", "a.csv"], "needs --out"),
        (["--manifest", "a.csv", "-o", "o", "--transforms", "absent"], "a folder of"),
        (["--manifest", "a.csv", "-o", "o", "--metric", "dsc"], "belongs to --compare"),
        (["-t", "u.nii.gz", "-o", "o"], "--out belongs to"),
        (["-t", "u.nii.gz", "-t", "a.txt"], "compose -t u.nii.gz -t a.txt"),
        (["-t", "u.nii.gz", "--fixed-label", "f.nii.gz"], "belong together"),
        (["-t", "u.nii.gz", "-f", "f.nii.gz"], "--fixed and --moving belong together"),
        (["-t", "u.nii.gz", "--points-frame", "lps_mm"], "that of --fixed-points"),
        (["--compare", "a=a.csv", "-f", "f", "-m", "m"], "belongs to --transform"),
        (["-t", "u.nii.gz", "--tolerance-mm", "-1"], "at least 0"),
        ([], "one of the arguments"),
    ],
)
def test_evaluate_mistake_is_one_line(arguments, match, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_table(tmp_path / "a.csv", [0.1, 0.2])
    code = errors.FAILED if match == "not_found" else errors.USAGE
    out, err = evaluate(capsys, *arguments, code=code)
    assert out == "" and len(err) == 1 and match in err[0]
    assert sorted(os.listdir(tmp_path)) == ["a.csv"]


def test_evaluate_needs_no_jax(folder):
    code = (
        "import sys\nfrom unireg_jax.__main__ import main\n"
        "import unireg_jax.evaluation.cases\n"
        f"code = main(['evaluate', '-t', {str(folder / 'u0.nii.gz')!r}])\n"
        "assert code == 0 and 'jax' not in sys.modules and 'torch' not in sys.modules\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert "sdlogj_whole" in run.stdout


def test_metrics_of_volumes_need_no_file():
    fixed, moving = Volume(box(), PLACE), Volume(box((2, 0, 0)), PLACE)
    disp_mm = np.zeros((*SHAPE, 3), np.float32)
    disp_mm[..., 0] = 4.0
    warped = metrics.warp_labels(disp_mm, PLACE, moving, fixed)
    np.testing.assert_array_equal(warped, fixed.data)
