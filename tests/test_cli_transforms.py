"""The verbs that apply and change transforms: files, refusals, and no JAX."""

import importlib
import json
import os
import shutil
import subprocess
import sys
import tracemalloc
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk

from tests import oracles, test_cli
from tests.grids import positions
from unireg_jax import __main__ as cli
from unireg_jax import errors
from unireg_jax.imaging import grids, mapping, nifti, orientation, transforms
from unireg_jax.imaging.mapping import Grid, Mapping
from unireg_jax.verbs import convert

VERBS = (
    "warp",
    "warp-points",
    "invert",
    "compose",
    "convert",
    "check-transform",
    "jacobian",
)
CENTER = np.array([8.0, -160.0, 710.0])


def grid(shape, spacing, codes, angle):
    place = np.eye(4)
    turn = nib.eulerangles.euler2mat(angle, 0.05, -angle / 2)
    place[:3, :3] = turn @ orientation.direction(codes) @ np.diag(spacing)
    place[:3, 3] = CENTER - place[:3, :3] @ ((np.array(shape) - 1) / 2)
    return Grid(shape, place)


FIXED = grid((24, 30, 19), (5.0, 4.0, 6.5), "RAI", 0.1)
MOVING = grid((20, 26, 33), (5.5, 4.8, 4.1), "SPL", -0.08)


def hu(xyz):
    s = xyz - CENTER
    spot = 300 * np.exp(-np.square((s - [15, -10, 20]) / 18).sum(-1))
    radius = np.square(s / [48, 45, 55]).sum(-1)
    return -1000 + 1040 / (1 + np.exp((radius - 1) * 5)) + spot


def shift(xyz):
    s = (xyz - CENTER) / 18
    return 5.0 * np.stack(
        [np.sin(s[..., 1]) + 0.5, np.cos(s[..., 2]), np.sin(s[..., 0])], axis=-1
    )


def matrix():
    out = np.eye(4)
    out[:3, :3] = nib.eulerangles.euler2mat(0.06, -0.04, 0.08) * 1.03
    out[:3, 3] = CENTER - out[:3, :3] @ CENTER + (4.0, -3.0, 2.0)
    return out


def save(path, array, place, **fields):
    """NIfTI by nibabel, whose world is RAS."""
    image = nib.Nifti1Image(array, np.diag([-1.0, -1.0, 1.0, 1.0]) @ place)
    image.header.set_xyzt_units("mm")
    for name, value in fields.items():
        image.header[name] = value
    nib.save(image, path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Scans, labels, points and transforms of one made pair."""
    out = tmp_path_factory.mktemp("pair")
    whole = Mapping((mapping.Field(shift(positions(FIXED)), FIXED.vox2world), matrix()))
    there = mapping.points(whole, positions(FIXED))
    for name, values, g in (
        ("fixed", hu(there), FIXED),
        ("moving", hu(positions(MOVING)), MOVING),
    ):
        save(out / f"{name}.nii.gz", np.rint(values).astype(np.int16), g.vox2world)
        labels = (values > -300).astype(np.uint8) + 2 * (values > 150).astype(np.uint8)
        save(out / f"{name}_seg.nii.gz", labels, g.vox2world)
    disp_mm, vox2world = orientation.reorient(
        shift(positions(FIXED)).astype(np.float32), FIXED.vox2world
    )
    transforms.write_field(out / "w.nii.gz", disp_mm, vox2world)
    transforms.write_composite(out / "c.h5", matrix(), disp_mm, vox2world)
    transforms.write_affine_txt(out / "a.txt", matrix())
    (out / "p.csv").write_text("name,x,y,z\na,8,-160,710\nb,20,-140,700\n")
    broken = disp_mm.copy()
    broken[4, 5, 6] = np.nan
    place = orientation.ras_from_lps(vox2world)
    image = nib.Nifti1Image(broken[:, :, :, None], place)
    image.header["intent_code"] = 1007
    image.header.set_xyzt_units("mm")
    nib.save(image, out / "nan.nii.gz")
    return out


@pytest.fixture
def run(folder, monkeypatch, capsys):
    """Calls a verb within the folder; code, stdout, stderr."""
    monkeypatch.chdir(folder)

    def call(*words):
        code = cli.main([str(word) for word in words])
        return code, *capsys.readouterr()

    return call


def peer(name="c.h5"):
    return sitk.ReadTransform(name)


# --- warp ---------------------------------------------------------------------------


def test_warp_agrees_with_simpleitk_on_the_files(run, tmp_path):
    out = tmp_path / "warped.nii.gz"
    words = ("warp", "-m", "moving.nii.gz", "-f", "fixed.nii.gz", "-o", out)
    code, stdout, stderr = run(*words, "-t", "c.h5")
    assert (code, stdout) == (0, "") and "unireg: done" in stderr
    fixed = sitk.ReadImage("fixed.nii.gz")
    moving = sitk.ReadImage("moving.nii.gz", sitk.sitkFloat64)
    expected = sitk.Resample(moving, fixed, peer(), sitk.sitkLinear, -1000.0)
    found = sitk.ReadImage(str(out))
    # Whole HU are rounded.
    difference = oracles.itk_array(found) - oracles.itk_array(expected)
    assert np.abs(difference).max() < 0.5 + 1e-3
    # The fixed file's geometry, codes and axes, the moving file's type.
    for name in ("srow_x", "srow_y", "srow_z", "qform_code", "sform_code", "dim"):
        theirs = nib.load("fixed.nii.gz").header[name]
        assert nib.load(out).header[name].tobytes() == theirs.tobytes()
    assert nib.load(out).get_data_dtype() == np.int16
    target = nib.load("fixed.nii.gz").get_fdata()
    before = nib.load("moving.nii.gz").get_fdata()
    assert np.ptp(before) > 1000
    # Made as a pair: it is the fixed scan again, but for two interpolations.
    inner = (slice(4, -4),) * 3
    off = np.abs(nib.load(out).get_fdata() - target)[inner]
    assert off.mean() < 15


def test_warp_takes_parts_in_the_order_of_ants(run, tmp_path):
    common = ("warp", "-m", "moving.nii.gz", "-f", "fixed.nii.gz")
    for n, chain in enumerate(
        (("c.h5",), ("w.nii.gz", "a.txt"), ("a.txt", "w.nii.gz"))
    ):
        words = [word for name in chain for word in ("-t", name)]
        assert run(*common, *words, "-o", tmp_path / f"{n}.nii")[0] == 0
    whole, chained, swapped = (
        nib.load(tmp_path / f"{n}.nii").get_fdata() for n in range(3)
    )
    np.testing.assert_allclose(chained, whole, atol=1)  # rounded HU, float32 geometry
    assert np.abs(swapped - whole).max() > 50


@pytest.mark.parametrize("interp", ["label", "nearest"])
def test_warp_of_labels_keeps_ids_and_type(run, tmp_path, interp):
    out = tmp_path / "seg.nii.gz"
    words = ("-m", "moving_seg.nii.gz", "--reference", "fixed.nii.gz", "-t", "c.h5")
    code, stdout, _ = run("warp", *words, "-o", out, "--interp", interp, "--json")
    report = json.loads(stdout)
    assert code == 0 and report["interp"] == interp and report["fill"] == 0
    assert report["out"]["name"] == "seg.nii.gz" and report["dtype"] == "uint8"
    labels = nib.load(out).get_fdata()
    target = nib.load("fixed_seg.nii.gz").get_fdata()
    assert set(np.unique(labels)) == {0, 1, 3}
    assert nib.load(out).get_data_dtype() == np.uint8
    dsc = (
        2
        * ((labels > 0) & (target > 0)).sum()
        / ((labels > 0).sum() + (target > 0).sum())
    )
    assert dsc > 0.95


@pytest.mark.parametrize("fill", [-1, 300])
def test_warp_of_labels_widens_them_to_hold_the_fill(run, tmp_path, fill):
    place = FIXED.vox2world.copy()
    place[0, 3] += 40  # a field of view beyond the moving scan
    save(tmp_path / "f.nii", np.zeros(FIXED.shape, np.int16), place)
    words = ["warp", "-m", "moving_seg.nii.gz", "-f", tmp_path / "f.nii", "-t", "a.txt"]
    words += ["--interp", "label", "-o", tmp_path / "o.nii", f"--fill-value={fill}"]
    assert run(*words)[0] == 0
    assert {0, fill} <= set(np.unique(nib.load(tmp_path / "o.nii").get_fdata()))


@pytest.mark.parametrize(
    ("low", "outside"), [(1, 0), (0.5, 0.5), (-1, -1), (-1000, -1000)]
)
def test_warp_of_a_mask_by_nearest_is_0_beyond_it(run, tmp_path, low, outside):
    """As labels are warped that are measured; an image keeps its own value."""
    mask = np.full(MOVING.shape, low, np.float32 if low % 1 else np.int16)
    mask[5:] += 1
    save(tmp_path / "m.nii", mask, MOVING.vox2world)
    place = FIXED.vox2world.copy()
    place[0, 3] += 40  # a field of view beyond the moving scan
    save(tmp_path / "f.nii", np.zeros(FIXED.shape, np.int16), place)
    words = ["warp", "-m", tmp_path / "m.nii", "-f", tmp_path / "f.nii", "-t", "a.txt"]
    words += ["--interp", "nearest", "-o", tmp_path / "o.nii", "--json"]
    code, stdout, stderr = run(*words)
    assert code == 0, stderr
    assert json.loads(stdout)["fill"] == outside
    out = nib.load(tmp_path / "o.nii").get_fdata()
    assert (out == outside).mean() > 0.05 and (out >= low).any()


@pytest.mark.parametrize(
    ("interp", "fill"), [("label", "0.5"), ("label", "3e9"), ("linear", "1e39")]
)
def test_warp_refuses_a_fill_that_no_voxel_holds(run, tmp_path, interp, fill):
    words = ["-m", "moving_seg.nii.gz", "-f", "fixed.nii.gz", "-t", "c.h5"]
    words += ["--interp", interp, "-o", tmp_path / "o.nii", "--fill-value", fill]
    code, _, stderr = run("warp", *words)
    assert code == errors.USAGE and "--fill-value: a" in stderr


@pytest.mark.parametrize("crop", [0, 8])  # most voxels are 0, and hardly any
def test_warp_refuses_labels_warped_as_an_image_unasked(run, tmp_path, crop):
    middle = slice(crop, -crop or None)
    labels = nib.load("moving_seg.nii.gz").slicer[middle, middle]
    nib.save(labels, tmp_path / "seg.nii.gz")
    out = tmp_path / "s.nii"
    words = ("-m", tmp_path / "seg.nii.gz", "-f", "fixed.nii.gz", "-t", "c.h5", "-o")
    code, _, stderr = run("warp", *words, out)
    assert code == errors.USAGE and "--interp nearest or label" in stderr
    assert "label_value" in stderr and not out.exists()
    code, stdout, _ = run("warp", *words, out, "--interp", "linear", "--json")
    assert code == 0 and json.loads(stdout)["interp"] == "linear"


@pytest.mark.parametrize("axis", range(3))
def test_warp_refuses_labels_that_are_thin_along_an_axis(run, tmp_path, axis):
    """As organs of a voxel or two in plane, which go on from slice to slice."""
    place = np.indices(MOVING.shape)
    others = [place[other] % 4 for other in range(3) if other != axis]
    ids = 1 + (place.sum(axis=0) - place[axis]) // 4 % 7  # thin across, long along
    labels = np.where((others[0] == 0) & (others[1] == 0), ids, 0).astype(np.uint8)
    for other in range(3):
        same = np.diff(labels, axis=other) == 0
        most = np.moveaxis(labels, other, 0)
        some = (most[1:] != 0) | (most[:-1] != 0)
        assert (np.moveaxis(same, other, 0)[some].mean() > 0.5) == (other == axis)
    save(tmp_path / "m.nii", labels, MOVING.vox2world)
    words = ("-m", tmp_path / "m.nii", "-f", "fixed.nii.gz", "-t", "c.h5", "-o")
    code, _, stderr = run("warp", *words, tmp_path / "o.nii")
    assert code == errors.USAGE and "label_value" in stderr


def test_warp_takes_an_image_of_few_values_for_one(run, tmp_path):
    x, y, z = np.ogrid[: MOVING.shape[0], : MOVING.shape[1], : MOVING.shape[2]]
    values = ((x + 2 * y + 3 * z) % 81).astype(np.uint8)  # a window of 0 to 80
    save(tmp_path / "m.nii", values, MOVING.vox2world)
    words = ("-m", tmp_path / "m.nii", "-f", "fixed.nii.gz", "-t", "c.h5", "-o")
    code, _, stderr = run("warp", *words, tmp_path / "o.nii")
    assert code == 0, stderr


@pytest.mark.parametrize(
    ("values", "fields", "fill", "dtype", "outside"),
    [
        (lambda v: v.astype("f8") + 0.25, {}, None, "float64", -1000),
        (lambda v: (v + 1000).clip(0).astype("u1"), {}, None, "uint8", 0),
        (lambda v: (v + 1000).clip(0).astype("u1"), {}, "-5", "int16", -5),
        (lambda v: (v + 1024).astype("u2"), {"scl_inter": -1024}, None, "int16", -1000),
        (lambda v: v.astype("i2"), {}, "0.5", "float32", 0.5),
    ],
)
def test_warp_keeps_the_type_and_fills(
    run, tmp_path, values, fields, fill, dtype, outside
):
    scan = nib.load("moving.nii.gz")
    stored = values(np.asarray(scan.dataobj))
    image = nib.Nifti1Image(stored, scan.affine)
    image.header.set_xyzt_units("mm")
    raw = tmp_path / "m.nii"
    nib.save(image, raw)
    if fields:
        content = bytearray(raw.read_bytes())
        content[112:120] = np.array([1, fields["scl_inter"]], "<f4").tobytes()
        raw.write_bytes(content)
    # A field of view beyond the moving scan.
    place = FIXED.vox2world.copy()
    place[0, 3] += 40
    save(tmp_path / "f.nii", np.zeros(FIXED.shape, np.int16), place)
    words = ["warp", "-m", raw, "-f", tmp_path / "f.nii", "-t", "a.txt"]
    words += ["--fill-value", fill] if fill else []
    code, _, stderr = run(*words, "-o", tmp_path / "o.nii")
    assert code == 0, stderr
    out = nib.load(tmp_path / "o.nii")
    assert out.get_data_dtype() == np.dtype(dtype)
    assert (out.get_fdata() == outside).mean() > 0.05


@pytest.mark.parametrize("ending", ["nrrd", "mha"])
def test_warp_takes_scans_of_itk(run, tmp_path, ending):
    for name in ("fixed", "moving"):
        image = sitk.ReadImage(f"{name}.nii.gz")
        sitk.WriteImage(image, str(tmp_path / f"{name}.{ending}"))
    words = ("warp", "-t", "c.h5", "--json")
    pairs = [("fixed.nii.gz", "moving.nii.gz", tmp_path / "a.nii")]
    names = [tmp_path / f"{name}.{ending}" for name in ("fixed", "moving")]
    pairs.append((*names, tmp_path / "b.nii"))
    for fixed, moving, out in pairs:
        code, stdout, _ = run(*words, "-f", fixed, "-m", moving, "-o", out)
        assert code == 0 and json.loads(stdout)["dtype"] == "int16"
    first, second = (nib.load(out) for *_, out in pairs)
    np.testing.assert_allclose(first.affine, second.affine, atol=1e-4)
    assert np.abs(first.get_fdata() - second.get_fdata()).max() <= 1  # rounded HU


def test_warp_of_a_real_scan_agrees_with_simpleitk(data_root, tmp_path, capsys):
    fixed, moving = (
        str(data_root / "lung_elastix" / f"{name}.nii.gz")
        for name in ("baseline", "followup")
    )
    target = sitk.ReadImage(fixed)
    # A field on every eighth voxel, then a shift of the table.
    place = np.eye(4)
    place[:3, :3] = np.diag(target.GetSpacing()) * 8
    place[:3, 3] = target.GetOrigin()
    coarse = Grid(tuple(n // 8 + 1 for n in target.GetSize()), place)
    bend = 6 * np.sin(positions(coarse) / 40)[..., [1, 2, 0]]
    table = np.eye(4)
    table[:3, 3] = (-2.0, -25.0, 20.0)
    transforms.write_composite(tmp_path / "c.h5", table, bend, place)
    words = ("warp", "-m", moving, "-f", fixed, "-t", str(tmp_path / "c.h5"))
    assert cli.main([*words, "-o", str(tmp_path / "o.nii"), "--quiet"]) == 0
    peer = sitk.ReadTransform(str(tmp_path / "c.h5"))
    source = sitk.ReadImage(moving, sitk.sitkFloat64)
    expected = sitk.Resample(source, target, peer, sitk.sitkLinear, -1000.0)
    found = nib.load(tmp_path / "o.nii").get_fdata()
    off = np.abs(found - oracles.itk_array(expected))
    assert off.max() < 0.5 + 1e-2  # whole HU are rounded; float32 geometry at bone
    assert (found != -1000).mean() > 0.5


# --- points -------------------------------------------------------------------------


def test_warp_points_goes_the_way_that_images_do_not(run, tmp_path):
    words = ("warp-points", "-p", "p.csv", "--space", "lps", "-t", "c.h5")
    code, stdout, _ = run(*words, "-o", tmp_path / "q.csv", "--json")
    rows = (tmp_path / "q.csv").read_text().splitlines()
    assert code == 0 and rows[0] == "name,x,y,z" and rows[1].startswith("a,")
    for row, point in zip(rows[1:], ((8, -160, 710), (20, -140, 700)), strict=True):
        expected = peer().TransformPoint(point)
        moved = np.array([float(cell) for cell in row.split(",")[1:]])
        np.testing.assert_allclose(moved, expected, atol=1e-3)
    report = json.loads(stdout)
    assert report["count"] == 2 and report["beyond"] == 0 and report["max_mm"] > 3


def test_warp_points_in_voxels_of_both_scans(run, tmp_path):
    (tmp_path / "p.csv").write_text("x,y,z\n12,14,9\n")
    words = ("-p", tmp_path / "p.csv", "--space", "voxel", "-t", "c.h5")
    scans = ("-f", "fixed.nii.gz", "-m", "moving.nii.gz")
    assert run("warp-points", *words, *scans, "-o", tmp_path / "q.csv")[0] == 0
    fixed, moving = (sitk.ReadImage(name) for name in scans[1::2])
    point = fixed.TransformContinuousIndexToPhysicalPoint((12.0, 14.0, 9.0))
    expected = moving.TransformPhysicalPointToContinuousIndex(
        peer().TransformPoint(point)
    )
    row = (tmp_path / "q.csv").read_text().splitlines()[1]
    moved = [float(cell) for cell in row.split(",")]
    np.testing.assert_allclose(moved, expected, atol=1e-3)


def test_voxels_may_be_called_ijk(run, tmp_path):
    (tmp_path / "p.csv").write_text("x,y,z\n12,14,9\n")
    words = ("-p", tmp_path / "p.csv", "-t", "c.h5", "-f", "fixed.nii.gz")
    words = ("warp-points", *words, "-m", "moving.nii.gz")
    for name in ("voxel", "ijk"):
        spaces = ("--space", name, "--out-space", name)
        assert run(*words, *spaces, "-o", tmp_path / f"{name}.csv")[0] == 0
    assert (tmp_path / "ijk.csv").read_text() == (tmp_path / "voxel.csv").read_text()


def test_identity_is_the_state_before_registration(run, tmp_path, monkeypatch):
    words = ("warp", "-m", "moving.nii.gz", "-f", "fixed.nii.gz", "--json")
    transforms.write_affine_txt(tmp_path / "eye.txt", np.eye(4))
    for name, out in (("identity", "a.nii"), (tmp_path / "eye.txt", "b.nii")):
        code, stdout, stderr = run(*words, "-t", name, "-o", tmp_path / out)
        assert code == 0, stderr
    first, second = (nib.load(tmp_path / n).get_fdata() for n in ("a.nii", "b.nii"))
    np.testing.assert_array_equal(first, second)
    words = ("compose", "-t", "identity", "-t", "c.h5", "-o", tmp_path / "c.h5")
    assert run(*words, "--json")[0] == 0
    assert len(mapping.read(tmp_path / "c.h5").parts) == 2
    code, _, stderr = run("check-transform", "identity")
    assert code == errors.FAILED and "not_found" in stderr
    # A file of that name is read.
    shutil.copy("a.txt", tmp_path / "identity")
    monkeypatch.chdir(tmp_path)
    found = run("compose", "-t", "identity", "-o", "d.txt")
    assert found[0] == 0, found
    (part,) = mapping.read(tmp_path / "d.txt").parts
    np.testing.assert_allclose(part, matrix(), atol=1e-9)


def test_warp_points_of_the_moving_scan_go_back(run, tmp_path):
    """-f and -m name the scans of the pair, whichever way points go."""
    (tmp_path / "p.csv").write_text("x,y,z\n10,12,15\n")
    back, scans = tmp_path / "back.h5", ("-f", "fixed.nii.gz", "-m", "moving.nii.gz")
    assert run("invert", "-t", "c.h5", "-m", "moving.nii.gz", "-o", back)[0] == 0
    words = ("warp-points", "-p", tmp_path / "p.csv", "--space", "voxel", *scans)
    words += ("--of", "moving", "-o", tmp_path / "q.csv", "--quiet")
    code, _, stderr = run(*words, "-t", back)
    assert (code, stderr) == (0, "")
    fixed, moving = (sitk.ReadImage(name) for name in scans[1::2])
    point = moving.TransformContinuousIndexToPhysicalPoint((10.0, 12.0, 15.0))
    (there,) = mapping.points(mapping.read(back), np.array([point]))
    expected = fixed.TransformPhysicalPointToContinuousIndex(there.tolist())
    row = (tmp_path / "q.csv").read_text().splitlines()[1]
    moved = [float(cell) for cell in row.split(",")]
    np.testing.assert_allclose(moved, expected, atol=1e-3)
    code, _, stderr = run(*words, "-t", "c.h5", "--overwrite")
    assert code == 0 and "scans exchanged?" in stderr
    assert "the fixed scan is that of --moving here" in stderr


def test_warp_points_takes_the_landmarks_of_evaluate(run, tmp_path, capsys):
    """And evaluate takes what it gives: no error is left."""
    table = tmp_path / "landmarks.csv"
    head = "name,fixed_x_mm,fixed_y_mm,fixed_z_mm,moving_x_mm,moving_y_mm,moving_z_mm"
    xyz = np.array([[8.0, -160, 710], [20, -140, 700]])
    there = mapping.points(mapping.read("c.h5"), xyz)
    rows = [",".join(map(repr, map(float, r))) for r in np.hstack([xyz, there])]
    table.write_text("\n".join([head, *(f"p{i},{r}" for i, r in enumerate(rows))]))
    out = tmp_path / "moved.csv"
    code, _, stderr = run("warp-points", "-p", table, "-t", "c.h5", "-o", out)
    assert code == 0, stderr
    np.testing.assert_allclose(
        np.loadtxt(out, delimiter=",", skiprows=1, usecols=(1, 2, 3)), there, atol=1e-5
    )
    (tmp_path / "fixed.csv").write_text(
        "x;y;z\n" + "\n".join(";".join(map(str, point)) for point in xyz)
    )
    more = (f"--fixed-points={tmp_path}/fixed.csv", f"--moving-points={out}")
    code, stdout, _ = run("evaluate", "-t", "c.h5", *more, "--json")
    assert code == 0 and json.loads(stdout)["landmarks"]["tre_mm"] < 1e-5
    code, stdout, _ = run("evaluate", "-t", "c.h5", "--landmarks", table, "--json")
    assert code == 0 and json.loads(stdout)["landmarks"]["tre_mm"] < 1e-9
    code, _, stderr = run("evaluate", "-t", "c.h5", more[0])
    assert code == 2 and "belong together" in stderr


def test_warp_points_warns_beyond_the_field(run, tmp_path):
    (tmp_path / "p.csv").write_text("x,y,z\n8,-160,2000\n8,-160,710\n")
    words = ("-p", tmp_path / "p.csv", "--space", "lps", "-t", "w.nii.gz")
    code, _, stderr = run("warp-points", *words, "-o", tmp_path / "q.csv")
    assert code == 0 and "1 of 2 points lie beyond" in stderr
    assert (tmp_path / "q.csv").read_text().splitlines()[1].endswith("2000.000000")


# --- invert, compose, convert -------------------------------------------------------


def test_invert_leads_moving_points_back(run, tmp_path):
    out, residual = tmp_path / "inv.nii.gz", tmp_path / "res.nii"
    words = ("-t", "c.h5", "-m", "moving.nii.gz", "-o", out, "--residual-out", residual)
    code, stdout, _ = run("invert", *words, "--json")
    report = json.loads(stdout)
    assert code == 0 and report["unsolved_percent"] == 0
    assert report["residual_max_mm"] < 0.01 and report["covered_percent"] > 50
    back = transforms.read_field(out)
    assert nib.load(out).shape == (*MOVING.shape, 1, 3)
    index = np.argwhere(nib.load(residual).get_fdata() >= 0)[::97]
    y = index @ MOVING.vox2world[:3, :3].T + MOVING.vox2world[:3, 3]
    x = mapping.points(mapping.field(*back), y)
    there = [peer().TransformPoint(point.tolist()) for point in x]
    # Voxels of the grid, float32 geometry
    np.testing.assert_allclose(there, y, atol=0.012)
    assert nib.load(residual).get_fdata().min() == -1


def test_invert_holds_few_copies_of_a_field(run, tmp_path, monkeypatch):
    """At 512 x 512 x 300 each has 0.9 GiB."""
    monkeypatch.setattr(grids, "SLAB_POINTS", 2**12)
    g = Grid((80, 72, 60), np.diag([1.5, 1.5, 2.0, 1.0]))
    disp_mm = (3 * np.sin(positions(g) / 30)).astype(np.float32)
    transforms.write_field(tmp_path / "t.nii", disp_mm, g.vox2world)
    save(tmp_path / "m.nii", np.zeros(g.shape, np.int16), g.vox2world)
    words = ("-t", tmp_path / "t.nii", "-m", tmp_path / "m.nii")
    tracemalloc.start()
    try:
        code, _, _ = run("invert", *words, "-o", tmp_path / "i.nii")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert code == 0 and peak < 3.6 * disp_mm.nbytes, peak / disp_mm.nbytes


def test_invert_of_an_affine_needs_no_scan(run, tmp_path):
    assert run("invert", "-t", "a.txt", "-o", tmp_path / "b.txt")[0] == 0
    back = transforms.read_affine(tmp_path / "b.txt")
    np.testing.assert_allclose(back @ matrix(), np.eye(4), atol=1e-9)
    code, _, stderr = run("invert", "-t", "c.h5", "-o", tmp_path / "c.h5")
    assert code == 2 and "--moving" in stderr
    words = ("-t", "a.txt", "-o", tmp_path / "d.txt")
    words += ("--residual-out", tmp_path / "residual.nii")
    code, _, stderr = run("invert", *words)
    assert code == errors.USAGE and "its residual" in stderr
    assert os.listdir(tmp_path) == ["b.txt"]


def test_invert_to_learn2reg_needs_both_scans(run, tmp_path):
    out = tmp_path / "back.npz"
    words = ("invert", "-t", "c.h5", "-m", "moving.nii.gz", "-o", out)
    code, _, stderr = run(*words)
    assert code == errors.USAGE and "--fixed: the scan whose voxels" in stderr
    assert not out.exists()
    assert run(*words, "-f", "fixed.nii.gz")[0] == 0
    fixed, moving = (nifti.read_image(f"{name}.nii.gz") for name in ("fixed", "moving"))
    back = mapping.read(out, fixed=moving, moving=fixed)
    xyz = np.array([[8.0, -160, 710], [20, -140, 700]])
    there = mapping.points(mapping.read("c.h5"), xyz)
    np.testing.assert_allclose(mapping.points(back, there), xyz, atol=0.2)


def test_invert_refuses_a_spelling_before_the_work(run, tmp_path, monkeypatch):
    sheared = MOVING.vox2world @ np.array(
        [[1, 0.1, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]]
    )
    save(tmp_path / "sheared.nii", np.zeros(MOVING.shape, np.int16), sheared)
    monkeypatch.setattr(
        "unireg_jax.verbs.invert.invert", lambda *_, **__: pytest.fail()
    )
    for moving, name, says in (
        ("moving.nii.gz", "inv.txt", "use .nii.gz or .h5"),
        (tmp_path / "sheared.nii", "inv.h5", "perpendicular axes"),
    ):
        words = ("-t", "c.h5", "-m", moving, "-o", tmp_path / name)
        code, _, stderr = run("invert", *words)
        assert code == errors.USAGE and says in stderr and "inverting" not in stderr
    assert os.listdir(tmp_path) == ["sheared.nii"]


def test_invert_of_a_fold_ends_in_8_and_writes_nothing(run, tmp_path):
    disp_mm, vox2world = transforms.read_field("w.nii.gz")
    transforms.write_field(tmp_path / "fold.nii", disp_mm * 6, vox2world)
    words = ("-t", tmp_path / "fold.nii", "-m", "moving.nii.gz")
    code, stdout, stderr = run("invert", *words, "-o", tmp_path / "i.nii")
    assert code == 8 and "folding" in stderr and stdout == ""
    assert os.listdir(tmp_path) == ["fold.nii"]
    words += ("--max-unsolved", "100")
    code, _, stderr = run("invert", *words, "-o", tmp_path / "i.nii")
    assert code == 0 and "warning: folding" in stderr


def test_compose_keeps_parts_or_samples_them(run, tmp_path):
    words = ("compose", "-t", "w.nii.gz", "-t", "a.txt")
    chain = (*words, "-f", "fixed.nii.gz", "-o", tmp_path / "c.h5")
    assert run(*chain, "--json")[0] == 0
    beyond = np.array((10.0, -150.0, 5000.0))  # of the field; the affine acts on
    moved = mapping.points(mapping.read(tmp_path / "c.h5"), beyond)
    np.testing.assert_allclose(moved, matrix()[:3] @ (*beyond, 1), atol=1e-3)
    sampled = tmp_path / "c.nii.gz"
    assert run(*words, "-f", "fixed.nii.gz", "-o", sampled)[0] == 0
    assert nib.load(sampled).shape == (*FIXED.shape, 1, 3)
    point = (10.0, -150.0, 720.0)
    expected = peer().TransformPoint(point)
    found = sitk.ReadTransform(str(tmp_path / "c.h5")).TransformPoint(point)
    np.testing.assert_allclose(found, expected, atol=1e-3)
    flat = mapping.points(mapping.read(sampled), np.array(point))
    np.testing.assert_allclose(flat, expected, atol=1e-3)
    assert (
        run("compose", "-t", "a.txt", "-t", "a.txt", "-o", tmp_path / "a.txt")[0] == 0
    )
    twice = transforms.read_affine(tmp_path / "a.txt")
    np.testing.assert_allclose(twice, matrix() @ matrix(), atol=1e-9)


@pytest.mark.parametrize("verb", ["compose", "convert", "jacobian"])
def test_a_field_that_covers_nothing_of_the_fixed_scan_is_refused(run, tmp_path, verb):
    """It would be sampled as zeros, and applied as a registration."""
    far = FIXED.vox2world.copy()
    far[:3, 3] += 4000.0
    save(tmp_path / "far.nii.gz", np.zeros(FIXED.shape, np.int16), far)
    words = (verb, "-t", "w.nii.gz", "-f", tmp_path / "far.nii.gz")
    words += ("--to", "nifti1007") if verb == "convert" else ()
    code, _, stderr = run(*words, "-o", tmp_path / "out.nii.gz")
    assert code == 4 and "grid_mismatch" in stderr
    assert not (tmp_path / "out.nii.gz").exists()
    # Of several it is not said which.
    code, _, stderr = run(*words, "-t", "a.txt", "-o", tmp_path / "out.nii.gz")
    assert code == 4 and "error: the transforms: grid_mismatch" in stderr


def test_json_of_a_chain_holds_its_warnings(run, folder, tmp_path):
    shutil.copy(folder / "w.nii.gz", tmp_path / "x_1Warp.nii.gz")
    shutil.copy(folder / "a.txt", tmp_path / "x_0GenericAffine.txt")
    chain = [
        word
        for name in ("x_1Warp.nii.gz", "x_0GenericAffine.txt")
        for word in ("-t", tmp_path / name)
    ]
    fixed, moving = ("-f", "fixed.nii.gz"), ("-m", "moving.nii.gz")
    for verb, *more in (
        ("warp", *fixed, *moving, "-o", tmp_path / "w.nii"),
        ("warp-points", "-p", "p.csv", "--space", "lps", "-o", tmp_path / "q.csv"),
        ("convert", *fixed, "--to", "itk", "-o", tmp_path / "c.h5"),
        ("compose", *fixed, "-o", tmp_path / "d.h5"),
        ("invert", *moving, "-o", tmp_path / "i.h5"),
        ("jacobian", *fixed),
    ):
        code, stdout, stderr = run(verb, *chain, *more, "--json")
        assert code == 0, verb
        told = json.loads(stdout)["warnings"]
        assert any("acts once more" in line for line in told), verb
        assert "acts once more" in stderr


def test_points_without_a_place_are_told_when_a_table_is_made(run, tmp_path):
    placed = {"label": "a", "position": [8, -160, 710], "positionStatus": "defined"}
    lost = {"label": "b", "position": [0, 0, 0], "positionStatus": "undefined"}
    markup = {"type": "Fiducial", "coordinateSystem": "LPS"}
    markup["controlPoints"] = [placed, lost]
    (tmp_path / "p.mrk.json").write_text(json.dumps({"markups": [markup]}))
    words = ("warp-points", "-p", tmp_path / "p.mrk.json", "-t", "c.h5", "--json")
    code, stdout, stderr = run(*words, "-o", tmp_path / "q.csv")
    assert code == 0 and "left out" in stderr
    told = json.loads(stdout)
    assert told["count"] == 1 and told["space"] == "lps"
    assert any("no place in" in line and ": b;" in line for line in told["warnings"])
    # Markups keep such a point, in its place of the list.
    code, stdout, _ = run(*words, "-o", tmp_path / "q.mrk.json")
    assert code == 0 and json.loads(stdout)["warnings"] == []
    (made,) = json.loads((tmp_path / "q.mrk.json").read_text())["markups"]
    assert [p["label"] for p in made["controlPoints"]] == ["a", "b"]


@pytest.mark.parametrize(
    ("field", "part", "told"),
    [
        ("x_1Warp.nii.gz", "x_0GenericAffine.txt", True),
        ("x_Composite.h5", "x_0GenericAffine.txt", True),
        ("x_Composite.h5", "x_1Warp.nii.gz", True),
        ("x_Composite.h5", "y_1Warp.nii.gz", False),
        ("x_1Warp.nii.gz", "y_0GenericAffine.txt", False),  # of another case
        ("w.nii.gz", "x_0GenericAffine.txt", False),
        ("x_1Warp.nii.gz", "x_0GenericAffine.tfm", False),
    ],
)
def test_a_part_beside_the_map_that_holds_it_is_told(
    run, folder, tmp_path, field, part, told
):
    for name in (field, part):
        kind = {".gz": "w.nii.gz", ".h5": "c.h5"}.get(Path(name).suffix, "a.txt")
        shutil.copy(folder / kind, tmp_path / name)
    words = ("compose", "-t", tmp_path / field, "-t", tmp_path / part)
    code, _, stderr = run(*words, "-o", tmp_path / "c.h5")
    assert code == 0
    assert (f"{part}: a map of `unireg register` beside it" in stderr) is told


@pytest.mark.parametrize(
    ("to", "name"),
    [
        ("itk", "a.h5"),
        ("itk", "a.hdf5"),
        ("ants", "a.nii.gz"),
        ("nifti1007", "a.nii"),
        ("nifti1006", "a.nii.gz"),
        ("l2r", "disp.nii.gz"),
        ("l2r", "disp.npz"),
        ("slicer", "a.nrrd"),
        ("bids", "from-mov_to-fix_mode-image_xfm.h5"),
    ],
)
def test_convert_spells_the_same_map(run, tmp_path, to, name):
    scans = ("-f", "fixed.nii.gz", "-m", "moving.nii.gz")
    words = ("convert", "-t", "c.h5", "--to", to, *scans, "-o", tmp_path / name)
    code, stdout, _ = run(*words, "--json")
    assert code == 0 and json.loads(stdout)["to"] == to
    fixed, moving = (nifti.read_image(path) for path in scans[1::2])
    found = mapping.read(tmp_path / name, fixed=fixed, moving=moving)
    for point in ((10.0, -150.0, 720.0), (0.0, -170.0, 690.0)):
        expected = peer().TransformPoint(point)
        moved = mapping.points(found, np.array(point))
        np.testing.assert_allclose(moved, expected, atol=2e-3)  # between voxels
    if name.endswith((".h5", ".hdf5")):
        before, after = (mapping.read(p) for p in ("c.h5", tmp_path / name))
        assert len(after.parts) == len(before.parts) == 2


def test_convert_of_learn2reg_needs_the_scans(run, tmp_path):
    scans = ("-f", "fixed.nii.gz", "-m", "moving.nii.gz")
    disp = tmp_path / "disp.npz"
    assert run("convert", "-t", "c.h5", "--to", "l2r", *scans, "-o", disp)[0] == 0
    words = ("convert", "-t", disp, "--to", "itk", "-o", tmp_path / "b.h5")
    code, _, stderr = run(*words)
    assert code == 2 and "name the fixed and the moving scan" in stderr
    code, _, stderr = run(*words, *scans)
    assert code == 0 and "read as a Learn2Reg field, in voxels" in stderr
    other = ("-f", "moving.nii.gz", "-m", "fixed.nii.gz")
    code, _, stderr = run(*words[:-1], tmp_path / "d.h5", *other)
    assert code == 4 and "grid_mismatch" in stderr
    code, _, stderr = run("compose", "-t", disp, "-t", "a.txt", "-o", tmp_path / "c.h5")
    assert code == 2 and "stands alone" in stderr


@pytest.mark.parametrize(
    "call",
    [
        "compose -o {}/o.h5 -t",
        "convert --to itk -o {}/o.h5 -t",
        "jacobian -t",
        "check-transform",
    ],
)
def test_a_learn2reg_field_is_not_read_with_the_fixed_scan_alone(run, tmp_path, call):
    """Its vectors hold the change of grid: from grid to same grid is another map."""
    scans, disp = ("-f", "fixed.nii.gz", "-m", "moving.nii.gz"), tmp_path / "disp.npz"
    assert run("convert", "-t", "c.h5", "--to", "l2r", *scans, "-o", disp)[0] == 0
    words = [word.format(tmp_path) for word in call.split()]
    words = (*words, disp, *scans)
    code, _, stderr = run(*words[:-2])
    assert code == errors.USAGE and "--moving: the scan whose voxels" in stderr
    assert run(*words)[0] == 0


def test_convert_to_learn2reg_warns_without_the_moving_scan(run, tmp_path):
    words = ("-t", "c.h5", "--to", "l2r", "-f", "fixed.nii.gz", "--quiet")
    code, _, stderr = run("convert", *words, "-o", tmp_path / "disp.npz")
    assert code == 0 and stderr.startswith("unireg: warning: no --moving: the field")


@pytest.fixture
def task(folder, tmp_path):
    """A Learn2Reg list of two pairs with results, one of two modalities."""
    (tmp_path / "imagesTr").mkdir()
    pairs = []
    for n, ends in enumerate((("0001_0000", "0001_0001"), ("0002_0001", "0002_0000"))):
        names = [f"Thorax_{end}" for end in ends]
        for name, kind in zip(names, ("fixed", "moving"), strict=True):
            scan = tmp_path / f"imagesTr/{name}.nii.gz"
            shutil.copy(folder / f"{kind}.nii.gz", scan)
        images = [f"./imagesTr/{name}.nii.gz" for name in names]
        pairs.append(dict(zip(("fixed", "moving"), images, strict=True)))
        place = tmp_path / "results" / "__".join(names)
        place.mkdir(parents=True)
        source = ("c.h5", "w.nii.gz")[n]
        ending = ("Composite.h5", "1Warp.nii.gz")[n]
        shutil.copy(folder / source, place / f"{place.name}_{ending}")
    text = json.dumps({"registration_val": pairs})
    (tmp_path / "dataset.json").write_text(text)
    return tmp_path


def fields(task):
    return sorted(path.name for path in (task / "out").glob("disp_*"))


def submit(task, *more):
    listed = ("--manifest", task / "dataset.json", "--transforms", task / "results")
    return ("convert", *listed, "--to", "l2r", "-o", task / "out", *more)


def test_convert_of_a_list_writes_what_convert_of_each_does(run, task):
    assert run(*submit(task))[0] == 0
    names = ["disp_0001_0001.nii.gz", "disp_0002_0001_0002_0000.nii.gz"]
    assert fields(task) == names
    scans = ("-f", "fixed.nii.gz", "-m", "moving.nii.gz")
    for name, source in zip(names, ("c.h5", "w.nii.gz"), strict=True):
        alone = task / name
        words = ("convert", "-t", source, "--to", "l2r", *scans, "-o", alone)
        assert run(*words)[0] == 0
        assert alone.read_bytes() == (task / "out" / name).read_bytes()
        assert nib.load(alone).shape == (*FIXED.shape, 3)


def test_convert_of_a_list_replaces_nothing_unasked(run, task):
    (task / "out").mkdir()
    (task / "out" / "disp_0002_0001_0002_0000.nii.gz").write_bytes(b"mine")
    code, _, stderr = run(*submit(task))
    assert code == errors.USAGE and "pass --overwrite" in stderr
    assert len(fields(task)) == 1 and not (task / "out" / "convert.jsonl").exists()
    assert run(*submit(task, "--overwrite", "--quiet"))[::2] == (0, "")
    assert len(fields(task)) == 2


def test_convert_of_a_list_goes_on_where_it_stopped(run, task):
    assert run(*submit(task))[0] == 0
    first, second = (task / "out" / name for name in fields(task))
    before = first.stat().st_mtime_ns, second.stat().st_mtime_ns
    second.unlink()
    code, stdout, stderr = run(*submit(task, "--json"))
    assert code == 0 and "2 of 2 fields done, 1 of them before" in stderr
    assert json.loads(stdout)["kept"] == 1
    assert first.stat().st_mtime_ns == before[0] and second.is_file()
    # Ended between the field and its digest: the field is whole.
    journal = task / "out" / "convert.jsonl"
    lines = journal.read_text().splitlines(keepends=True)
    assert "sha256" in json.loads(lines[-1])
    journal.write_text("".join(lines[:-1]))
    assert json.loads(run(*submit(task, "--json"))[1])["kept"] == 2
    # Another content, or made of other files: not ours to replace unasked.
    kept = first.read_bytes()
    first.write_bytes(kept[:-1])
    assert "disp_0001_0001.nii.gz exists" in run(*submit(task))[2]
    first.write_bytes(kept)
    assert run(*submit(task))[0] == 0
    (result,) = (task / "results").glob("*/*_Composite.h5")
    mapping.write(result, mapping.affine(matrix()))
    assert run(*submit(task))[0] == errors.USAGE
    told = json.loads(run(*submit(task, "--overwrite", "--json"))[1])
    assert (told["done"], told["kept"]) == (2, 0) and first.read_bytes() != kept


def test_second_convert_into_one_folder_leaves_at_once(run, task, monkeypatch):
    write, tried = convert._write, []

    def look(*pair):
        monkeypatch.setattr(convert, "_write", write)
        journal = (task / "out" / "convert.jsonl").read_bytes()
        code, _, stderr = run(*submit(task))
        assert code == errors.USAGE and "another run is writing" in stderr
        assert (task / "out" / "convert.jsonl").read_bytes() == journal
        tried.append(pair)
        return write(*pair)

    monkeypatch.setattr(convert, "_write", look)
    assert run(*submit(task))[0] == 0
    assert len(tried) == 1 and len(fields(task)) == 2


def test_convert_of_a_list_leaves_no_field_of_before_for_a_pair_that_fails(run, task):
    assert run(*submit(task))[0] == 0
    (broken,) = (task / "results").glob("*/*_1Warp.nii.gz")
    good = broken.read_bytes()
    broken.write_bytes(b"<html>")
    assert run(*submit(task, "--overwrite"))[0] == errors.PARTLY
    assert fields(task) == ["disp_0001_0001.nii.gz"]
    # What lies there after a failure was not made by us.
    name = "disp_0002_0001_0002_0000.nii.gz"
    (task / "out" / name).write_bytes(b"mine")
    assert run(*submit(task))[0] == errors.USAGE
    (task / "out" / name).unlink()
    broken.write_bytes(good)
    assert run(*submit(task))[0] == 0 and name in fields(task)


def test_convert_of_a_list_refuses_a_field_that_is_taken_first(run, task):
    (task / "out").mkdir()
    (task / "out" / "disp_0001_0001.npz").write_bytes(b"mine")
    code, _, stderr = run(*submit(task, "--overwrite"))
    assert code == errors.USAGE and "script takes first" in stderr
    assert fields(task) == ["disp_0001_0001.npz"]


def test_convert_holds_results_against_their_scans(run, task):
    far = np.eye(4)
    far[:3, 3] = 5000
    (result,) = (task / "results").glob("*/*_Composite.h5")
    mapping.write(result, mapping.affine(far))
    (other,) = (task / "results").glob("*/*_1Warp.nii.gz")
    disp_mm, place = transforms.read_field(other)
    place = place.copy()
    place[:3, 3] += (0, 0, 75)  # of another pair, it seems
    transforms.write_field(other, disp_mm, place)
    code, stdout, stderr = run(*submit(task, "--json"))
    found = json.loads(stdout)
    assert code == errors.PARTLY and fields(task) == ["disp_0002_0001_0002_0000.nii.gz"]
    assert found["failed"][0]["reason"] == "no_overlap"
    assert found["warnings"][0].startswith(
        "Thorax_0002_0001__Thorax_0002_0000: grid_mismatch: the field covers"
    )
    assert "warning: Thorax_0002_0001__Thorax_0002_0000: grid_mismatch" in stderr
    alone = ("-f", "fixed.nii.gz", "-m", "moving.nii.gz", "--to", "l2r", "--json")
    code, stdout, _ = run("convert", "-t", other, *alone, "-o", task / "o.nii.gz")
    assert code == 0 and "grid_mismatch" in json.loads(stdout)["warnings"][0]
    code = run("convert", "-t", result, *alone, "-o", task / "p.nii.gz")[0]
    assert code == errors.FAILED and not (task / "p.nii.gz").exists()


def test_convert_of_a_list_goes_on_after_a_pair_that_fails(run, task):
    (broken,) = (task / "results").glob("*/*_1Warp.nii.gz")
    broken.write_bytes(b"<html>")
    code, stdout, stderr = run(*submit(task, "--json", "--quiet"))
    assert code == errors.PARTLY and stderr.count("\n") == 1
    assert "Thorax_0002_0001__Thorax_0002_0000: failed: " in stderr
    found = json.loads(stdout)
    assert found["done"] == 1 and len(found["failed"]) == 1
    assert fields(task) == ["disp_0001_0001.nii.gz"]


@pytest.mark.parametrize(
    "fault, reason", [(MemoryError(), "out_of_memory"), (TypeError("x"), "internal")]
)
def test_convert_of_a_list_goes_on_after_a_fault_of_ours(
    run, task, monkeypatch, fault, reason
):
    write = convert._write

    def break_at(target, case, path):
        if path.endswith("_1Warp.nii.gz"):
            raise fault
        return write(target, case, path)

    monkeypatch.setattr(convert, "_write", break_at)
    code, stdout, stderr = run(*submit(task, "--json", "--quiet"))
    found = json.loads(stdout)
    assert code == errors.PARTLY and stderr.count("\n") == 1
    assert (found["done"], found["failed"][0]["reason"]) == (1, reason)
    assert fields(task) == ["disp_0001_0001.nii.gz"]
    assert not list(task.glob("**/unireg-error-*.log"))


@pytest.fixture
def alike(task):
    """The second pair of `task`, of one modality: its field has two names."""
    (old,) = (task / "results").glob("*/*_1Warp.nii.gz")
    names = ["Abdomen_0002_0000", "Abdomen_0003_0000"]
    for name, end in zip(names, ("0002_0001", "0002_0000"), strict=True):
        scans = task / "imagesTr"
        (scans / f"Thorax_{end}.nii.gz").rename(scans / f"{name}.nii.gz")
    place = old.parent.with_name("__".join(names))
    old.parent.rename(place)
    (place / old.name).rename(place / f"{place.name}_1Warp.nii.gz")
    images = [f"./imagesTr/{name}.nii.gz" for name in names]
    pair = dict(zip(("fixed", "moving"), images, strict=True))
    (task / "dataset.json").write_text(json.dumps({"registration_val": [pair]}))
    return task


BOTH = ["disp_0002_0000_0003_0000.nii.gz", "disp_0002_0003.nii.gz"]


@pytest.mark.parametrize("links", [True, False])
def test_convert_of_a_list_writes_both_names_for_one_modality(
    run, alike, monkeypatch, links
):
    if not links:

        def refuse(*_):
            raise OSError("no links here")

        monkeypatch.setattr(os, "link", refuse)
    code, _, stderr = run(*submit(alike))
    assert code == 0 and "1 of 1 fields done" in stderr
    assert fields(alike) == BOTH
    long, short = (alike / "out" / name for name in BOTH)
    assert long.read_bytes() == short.read_bytes() and long.samefile(short) == links
    assert not list((alike / "out").glob("*.tmp"))
    # One that is missing is added; one with other bytes is not ours to replace unasked.
    short.unlink()
    assert json.loads(run(*submit(alike, "--json"))[1])["kept"] == 1
    assert fields(alike) == BOTH and long.read_bytes() == short.read_bytes()
    short.unlink()
    short.write_bytes(b"mine")
    code, _, stderr = run(*submit(alike))
    assert code == errors.USAGE and f"{BOTH[1]} exists; pass --overwrite" in stderr
    assert short.read_bytes() == b"mine"
    assert run(*submit(alike, "--overwrite"))[0] == 0
    assert long.read_bytes() == short.read_bytes()
    # None of them stands for a pair that fails.
    (result,) = (alike / "results").glob("*/*_1Warp.nii.gz")
    result.write_bytes(b"<html>")
    assert run(*submit(alike, "--overwrite"))[0] == errors.FAILED
    assert fields(alike) == []


def test_convert_of_a_list_refuses_a_second_name_that_is_taken(run, alike):
    (alike / "out").mkdir()
    (alike / "out" / "disp_0002_0003.npz").write_bytes(b"mine")
    code, _, stderr = run(*submit(alike, "--overwrite"))
    assert code == errors.USAGE and "script takes first" in stderr
    (alike / "out" / "disp_0002_0003.npz").unlink()
    pairs = [
        {
            "id": str(m),
            "fixed": f"A_0002_{m:04d}.nii.gz",
            "moving": f"A_0003_{m:04d}.nii",
        }
        for m in (0, 1)
    ]
    (alike / "dataset.json").write_text(json.dumps(pairs))
    code, _, stderr = run(*submit(alike))
    assert code == errors.USAGE and "0 and 1 for disp_0002_0003.nii.gz" in stderr
    assert fields(alike) == []


def test_convert_of_a_list_refuses_what_it_cannot_name(run, task):
    path = task / "dataset.json"
    pair = {"fixed": "a.nii.gz", "moving": "b.nii.gz"}
    path.write_text(json.dumps({"registration_val": [pair]}))
    code, _, stderr = run(*submit(task))
    assert code == errors.USAGE and "expected scans called as TASK_0001" in stderr
    scans = [f"{name}_0001_0000.nii.gz" for name in "AB"]
    pairs = [{"id": s[0], "fixed": s, "moving": s} for s in scans]
    path.write_text(json.dumps(pairs))
    code, _, stderr = run(*submit(task))
    assert code == errors.USAGE and "A and B for disp_0001_0000" in stderr
    assert not (task / "out").exists()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--manifest l.csv --to l2r", "--manifest needs --transforms DIR"),
        ("--manifest l.csv --transforms . --to itk", "--to l2r expected"),
        ("--manifest l.csv --transforms . --to l2r -f fixed.nii.gz", "--fixed and"),
        ("-t c.h5 --transforms . --to itk", "belong to --manifest"),
        ("--manifest l.csv --transforms gone --to l2r", "a folder of results"),
    ],
)
def test_convert_refuses_options_of_the_other_kind(run, tmp_path, words, says):
    code, _, stderr = run("convert", *words.split(), "-o", tmp_path / "o.h5")
    assert code == errors.USAGE and says in stderr
    assert not os.listdir(tmp_path)


# --- check-transform, jacobian ------------------------------------------------------


def test_check_transform_describes_parts(run):
    code, stdout, stderr = run("check-transform", "c.h5", "--json")
    found = json.loads(stdout)
    assert (code, stderr, found["verdict"]) == (0, "", "ok")
    field, affine = found["parts"]
    lengths = np.linalg.norm(transforms.read_field("w.nii.gz")[0], axis=-1)
    assert field["max_mm"] == pytest.approx(lengths.max(), rel=1e-5)
    assert field["fold_percent_whole"] == 0 and field["axes"] == "LPS"
    np.testing.assert_allclose(affine["matrix"], matrix(), atol=1e-9)
    text = run("check-transform", "c.h5")[1]
    assert "part 2       affine" in text and "verdict      ok" in text


def test_check_transform_ends_in_8_for_nan(run):
    code, stdout, stderr = run("check-transform", "nan.nii.gz", "--json")
    assert code == 8 and "field_nonfinite" in stderr
    assert json.loads(stdout)["verdict"] == "bad"


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (lambda d, p: d * (-1, -1, 1), "mirrored in x and y (RAS for LPS)"),
        (lambda d, p: -d, "turned round (moving to fixed)"),
        (lambda d, p: d @ np.linalg.inv(p[:3, :3]).T, "in voxels"),
    ],
)
def test_check_transform_finds_how_a_field_is_meant(run, tmp_path, change, name):
    # The pair of w alone.
    disp_mm, vox2world = transforms.read_field("w.nii.gz")
    target = mapping.points(mapping.read("w.nii.gz"), positions(FIXED))
    save(tmp_path / "f.nii", np.rint(hu(target)).astype(np.int16), FIXED.vox2world)
    words = ("-f", tmp_path / "f.nii", "-m", "moving.nii.gz")
    assert run("check-transform", "w.nii.gz", *words)[1].count("verdict      ok") == 1
    meant = change(disp_mm, vox2world).astype(np.float32)
    transforms.write_field(tmp_path / "x.nii", meant, vox2world)
    code, stdout, _ = run("check-transform", tmp_path / "x.nii", *words, "--json")
    found = json.loads(stdout)
    assert code == 0 and found["verdict"] == "warn"
    assert any(f"'{name}'" in line for line in found["findings"]), found["findings"]
    scores = found["similarity"]
    assert max(scores, key=scores.get) == name and found["fixed_grid"] == "the same"


def test_check_transform_warns_of_scans_of_another_pair(run, tmp_path):
    away = np.eye(4)
    away[0, 3] = 900
    transforms.write_affine_txt(tmp_path / "away.txt", away)
    words = ("-f", "fixed.nii.gz", "-m", "moving.nii.gz", "--json")
    code, stdout, _ = run("check-transform", tmp_path / "away.txt", *words)
    found = json.loads(stdout)
    assert code == 0 and found["verdict"] == "warn"
    assert found["similarity"]["as written"] is None
    assert any(line.startswith("no_overlap") for line in found["findings"])


def test_exchanged_scans_are_told(run, tmp_path):
    """The field lies on the grid of the scan that is called moving."""
    words = ("-f", "moving.nii.gz", "-m", "fixed.nii.gz", "--json")
    code, stdout, _ = run("check-transform", "c.h5", *words)
    findings = json.loads(stdout)["findings"]
    assert code == 0 and any("scans exchanged?" in line for line in findings), findings
    assert any("unireg invert" in line for line in findings)
    out = tmp_path / "o.nii.gz"
    code, stdout, stderr = run("warp", *words, "-t", "c.h5", "-o", out)
    assert code == 0 and out.exists() and "warning: grid_mismatch: scans exch" in stderr
    assert any("scans exchanged?" in line for line in json.loads(stdout)["warnings"])
    for verb, more, name in (
        ("warp-points", ("-p", "p.csv", "--space", "lps"), "q.csv"),
        ("invert", (), "i.h5"),
    ):
        call = (*words, *more, "-t", "c.h5", "-o", tmp_path / name)
        code, stdout, stderr = run(verb, *call)
        assert code == 0 and "scans exchanged?" in stderr, verb
        assert "scans exchanged?" in json.loads(stdout)["warnings"][0]


def test_a_reference_of_another_resolution_is_no_other_scan(run, tmp_path):
    """The field lies on the moving scan's grid too, as where a pair shares one."""
    words = ("-m", "fixed.nii.gz", "-t", "w.nii.gz", "--interp", "nearest")
    half = Grid(tuple(n // 2 for n in FIXED.shape), FIXED.vox2world.copy())
    half.vox2world[:3, :3] *= 2
    half.vox2world[:3, 3] += FIXED.vox2world[:3, :3] @ [0.5, 0.5, 0.5]
    save(tmp_path / "half.nii", np.zeros(half.shape, np.int16), half.vox2world)
    call = (*words, "-f", tmp_path / "half.nii", "-o", tmp_path / "o.nii")
    code, _, stderr = run("warp", *call)
    assert code == 0 and "grid_mismatch" not in stderr


def test_a_transform_of_this_pair_is_not_warned_of(run, tmp_path):
    for name in ("w.nii.gz", "c.h5"):
        words = ("-f", "fixed.nii.gz", "-m", "moving.nii.gz", "-t", name, "--json")
        code, stdout, stderr = run("warp", *words, "-o", tmp_path / f"{name}.nii.gz")
        assert code == 0 and "warning" not in stderr
        assert json.loads(stdout)["warnings"] == []


@pytest.mark.parametrize(
    ("away_mm", "code", "words"),
    [
        (70.0, 0, "the field covers"),
        (900.0, 4, "got one that covers none of its voxels"),
    ],
)
def test_warp_tells_of_a_field_of_another_pair(run, tmp_path, away_mm, code, words):
    disp_mm, vox2world = transforms.read_field("w.nii.gz")
    vox2world[0, 3] += away_mm
    transforms.write_field(tmp_path / "x.nii", disp_mm, vox2world)
    call = ("-f", "fixed.nii.gz", "-m", "moving.nii.gz", "-t", tmp_path / "x.nii")
    for verb, more, name in (
        ("warp", (), "o.nii.gz"),
        ("warp-points", ("-p", "p.csv", "--space", "lps"), "q.csv"),
        ("invert", (), "i.h5"),
    ):
        got, _, stderr = run(verb, *call, *more, "-o", tmp_path / name)
        assert got == code and "grid_mismatch" in stderr and words in stderr, verb
        assert (tmp_path / name).exists() == (code == 0)


def test_inverse_of_an_affine_as_a_field_needs_the_scan_it_leads_to(run, tmp_path):
    words = ("invert", "-t", "a.txt", "-f", "fixed.nii.gz", "-o", tmp_path / "b.nii.gz")
    code, _, stderr = run(*words)
    assert code == errors.USAGE and "--moving: the scan that the transform" in stderr
    code, _, _ = run(*words, "-m", "moving.nii.gz")
    assert code == 0
    back = mapping.read(tmp_path / "b.nii.gz")
    there = mapping.points(mapping.read("a.txt"), np.array([[0.0, -160, 700]]))
    np.testing.assert_allclose(mapping.points(back, there), [[0, -160, 700]], atol=1e-3)
    code, _, _ = run("invert", "-t", "a.txt", "-o", tmp_path / "b.txt")
    assert code == 0  # which has no grid


def test_warp_tells_what_readers_do(run, folder, tmp_path):
    odd = nib.load(folder / "fixed.nii.gz")
    place = odd.affine.copy()
    place[:3, 3] += 15
    odd.set_qform(place, 1)
    nib.save(odd, tmp_path / "odd.nii.gz")
    words = ("-f", tmp_path / "odd.nii.gz", "-m", "moving.nii.gz", "-t", "c.h5")
    code, stdout, stderr = run("warp", *words, "-o", tmp_path / "o.nii.gz", "--json")
    told = [line for line in json.loads(stdout)["warnings"] if "sform" in line]
    assert code == 0 and len(told) == 1 and told[0].startswith("fixed: ")
    assert told[0] in stderr


def test_warp_tells_when_scans_agree_better_without(run, tmp_path):
    """As the map of another pair in the same frame does; grids cannot show it."""
    there = matrix()
    there[:3, 3] += (0, 40, 0)
    transforms.write_affine_txt(tmp_path / "other.txt", there)
    words = ("-f", "fixed.nii.gz", "-m", "moving.nii.gz", "-t", tmp_path / "other.txt")
    code, _, stderr = run("warp", *words, "-o", tmp_path / "o.nii.gz")
    assert code == 0 and "warning: similarity: the scans agree better" in stderr
    # Without --json nothing else would tell.
    code, _, stderr = run("warp", *words, "-o", tmp_path / "q.nii.gz", "--quiet")
    (line,) = stderr.splitlines()
    assert code == 0 and line.startswith("unireg: warning: similarity: the scans")


def test_check_transform_warns_of_folds_and_length(run, tmp_path):
    disp_mm, vox2world = transforms.read_field("w.nii.gz")
    for name, factor, word in (
        ("fold.nii", 6.0, "folding: "),
        ("far.nii", 60.0, "longer than 300 mm"),
        ("unit.nii", 0.02, "normalised coordinates"),
        ("still.nii", 0.0, "zero everywhere"),
    ):
        transforms.write_field(tmp_path / name, disp_mm * factor, vox2world)
        code, stdout, _ = run("check-transform", tmp_path / name)
        assert code == 0 and word in stdout and "verdict      warn" in stdout, name


def test_jacobian_never_replaces_an_input(run, tmp_path):
    scan = tmp_path / "moving.nii.gz"
    scan.write_bytes(Path("moving.nii.gz").read_bytes())
    words = ("-t", "c.h5", "-m", scan, "-o", scan, "--overwrite")
    code, _, _ = run("jacobian", *words)
    assert code == errors.USAGE
    assert scan.read_bytes() == Path("moving.nii.gz").read_bytes()


def test_jacobian_writes_a_map_and_prints_statistics(run, tmp_path):
    out = tmp_path / "j.nii.gz"
    code, stdout, _ = run("jacobian", "-t", "c.h5", "-f", "fixed.nii.gz", "-o", out)
    assert code == 0 and f"{'fold_percent_whole'.ljust(19)} 0\n" in stdout
    detj = nib.load(out).get_fdata()
    assert detj.shape == FIXED.shape and nib.load(out).get_data_dtype() == np.float32
    code, stdout, _ = run(
        *("jacobian", "-t", "c.h5", "-f", "fixed.nii.gz", "--json"),
        *("-o", tmp_path / "l.nii", "--log", "--mask", "fixed_seg.nii.gz"),
    )
    stats = json.loads(stdout)
    mask = nib.load("fixed_seg.nii.gz").get_fdata() > 0
    mask[[0, -1]] = mask[:, [0, -1]] = mask[:, :, [0, -1]] = False
    assert stats["voxels"] >= mask.sum() > 0
    assert stats["mean"] == pytest.approx(detj[mask].mean(), rel=1e-2)
    logs = nib.load(tmp_path / "l.nii").get_fdata()
    np.testing.assert_allclose(logs, np.log(detj), atol=1e-6)
    code, _, stderr = run("jacobian", "-t", "a.txt")
    assert code == 2 and "--fixed" in stderr


def test_jacobian_of_one_slice_is_refused(run, tmp_path):
    disp_mm, vox2world = transforms.read_field("w.nii.gz")
    mapping.write(tmp_path / "slice.h5", mapping.field(disp_mm[:, :, :1], vox2world))
    code, _, stderr = run("jacobian", "-t", tmp_path / "slice.h5")
    assert code == errors.USAGE and "along each axis expected, got 24x30x1" in stderr


# --- refusals common to all ---------------------------------------------------------

CALLS = {
    "warp": ("-m", "moving.nii.gz", "-f", "fixed.nii.gz", "-t", "c.h5"),
    "warp-points": ("-p", "p.csv", "--space", "lps", "-t", "c.h5"),
    "invert": ("-m", "moving.nii.gz", "-t", "c.h5"),
    "compose": ("-t", "c.h5", "-f", "fixed.nii.gz"),
    "convert": ("-t", "c.h5", "--to", "ants"),
    "jacobian": (
        "-t",
        "c.h5",
    ),
}
ENDING = {"warp-points": ".csv"}


@pytest.mark.parametrize("verb", CALLS)
def test_output_is_refused_before_any_work(run, tmp_path, verb):
    out = tmp_path / f"o{ENDING.get(verb, '.nii.gz')}"
    words = (verb, *CALLS[verb])
    out.write_text("mine")
    code, stdout, stderr = run(*words, "-o", out)
    assert code == 2 and "--overwrite" in stderr and stdout == ""
    assert out.read_text() == "mine" and len(stderr.splitlines()) == 1
    code, _, stderr = run(*words, "-o", tmp_path / "o.xyz")
    assert code == 2 and "name_mismatch" in stderr
    code, _, stderr = run(*words, "-o", tmp_path / "none" / out.name)
    assert code == 6 and "storage" in stderr
    assert not (tmp_path / "none").exists()
    (tmp_path / f"d{out.name}").mkdir()
    code, _, stderr = run(*words, "--overwrite", "-o", tmp_path / f"d{out.name}")
    assert code == 2 and "is a folder" in stderr
    code, _, stderr = run(*words, "--overwrite", "--quiet", "-o", out)
    assert (code, stderr) == (0, "")
    assert out.read_bytes() != b"mine"
    assert sorted(os.listdir(tmp_path)) == sorted([out.name, f"d{out.name}"])


def test_an_input_is_never_replaced(run, folder):
    before = (folder / "w.nii.gz").read_bytes()
    words = ("compose", "-t", "w.nii.gz", "-o", "./w.nii.gz", "--overwrite")
    code, _, stderr = run(*words)
    assert code == 2 and "is another file of this command" in stderr
    assert (folder / "w.nii.gz").read_bytes() == before
    words = ("invert", *CALLS["invert"], "-o", "x.nii", "--residual-out", "./x.nii")
    code, _, stderr = run(*words)
    assert code == 2 and "is another file of this command" in stderr
    assert not (folder / "x.nii").exists()


def test_a_full_disk_leaves_no_short_file(folder, tmp_path):
    calls = [(v, *CALLS[v], "-o") for v in ("warp", "invert", "compose", "convert")]
    code = f"""
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
from unireg_jax import __main__ as cli
for words in {calls!r}:
    code = cli.main([*words, sys.argv[1] + "/o.nii.gz"])
    assert code == 6, (words, code)
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, tmp_path],
        cwd=folder,
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_fault_of_ours_makes_no_folder_of_the_file(run, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("odd")

    monkeypatch.setattr(mapping, "resample", fail)
    monkeypatch.setattr(cli.tempfile, "gettempdir", lambda: str(tmp_path / "logs"))
    code, _, stderr = run("warp", *CALLS["warp"], "-o", tmp_path / "o.nii.gz")
    assert code == 1 and "internal" in stderr
    assert os.listdir(tmp_path) == ["logs"]

    def nowhere():
        raise FileNotFoundError("no usable temporary directory")

    monkeypatch.setattr(cli.tempfile, "gettempdir", nowhere)
    code, _, stderr = run("warp", *CALLS["warp"], "-o", tmp_path / "o.nii.gz")
    assert code == 1 and "no log could be written" in stderr


@pytest.mark.parametrize("verb", cli.VERBS)
def test_a_file_to_write_is_never_called_out(verb):
    # The trace of a fault of ours goes into the folder `out`, which it makes.
    module = importlib.import_module(f"unireg_jax.verbs.{verb.replace('-', '_')}")
    parser = cli.argparse.ArgumentParser()
    module.add_arguments(parser)
    for action in parser._actions:
        if action.dest == "out":
            assert action.metavar == "DIR", verb


@pytest.mark.parametrize(
    "name", ["two words.nii.gz", "{x}%s$(y).nii", "d.o.t.s.nii.gz"]
)
def test_odd_names_are_only_names(run, tmp_path, name):
    out = tmp_path / name
    assert run("warp", *CALLS["warp"], "-o", out)[0] == 0
    assert os.listdir(tmp_path) == [name]


def test_inverse_and_empty_results_name_the_remedy(run, tmp_path):
    code, _, stderr = run("warp", *CALLS["warp"], "-o", tmp_path / "o.nii", "--inverse")
    assert code == 2 and "unireg invert" in stderr
    away = np.eye(4)
    away[0, 3] = 900
    transforms.write_affine_txt(tmp_path / "away.txt", away)
    words = ("-m", "moving.nii.gz", "-f", "fixed.nii.gz", "-t", tmp_path / "away.txt")
    code, _, stderr = run("warp", *words, "-o", tmp_path / "o.nii")
    assert code == 4 and "no_overlap" in stderr
    assert os.listdir(tmp_path) == ["away.txt"]


def test_warp_of_an_organ_beyond_the_fixed_scan_is_background(run, tmp_path):
    """The map leads inside: nothing of the organ there is a result, not a fault."""
    labels = nifti.read_labels("moving_seg.nii.gz")
    corner = np.zeros(labels.data.shape, np.uint8)
    corner[0, 0, 0] = 1
    nifti.write_like(tmp_path / "corner.nii.gz", corner, labels)
    shift = np.eye(4)
    shift[:3, 3] = 2 * labels.vox2world[:3, :3] @ (1, 1, 1)
    transforms.write_affine_txt(tmp_path / "shift.txt", shift)
    words = ("-m", tmp_path / "corner.nii.gz", "-f", "moving.nii.gz")
    words += ("-t", tmp_path / "shift.txt", "--interp", "label")
    code, _, _ = run("warp", *words, "-o", tmp_path / "o.nii.gz")
    assert code == 0 and not nifti.read_labels(tmp_path / "o.nii.gz").data.any()


@pytest.mark.parametrize("verb", VERBS)
def test_help_ends_with_an_example(verb, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main([verb, "--help"])
    text = capsys.readouterr().out
    assert caught.value.code == 0
    assert f"example: unireg {verb} " in " ".join(text.split())


@pytest.mark.parametrize("verb", VERBS)
def test_examples_of_help_are_accepted(verb, capsys):
    module = importlib.import_module(f"unireg_jax.verbs.{verb.replace('-', '_')}")
    parser = cli.argparse.ArgumentParser()
    module.add_arguments(parser)
    words = parser.epilog.removeprefix("example: unireg ").split()
    assert words[0] == verb
    parser.parse_args(words[1:])


def test_verbs_import_no_jax(folder, tmp_path):
    calls = [(verb, *CALLS[verb]) for verb in CALLS]
    code = f"""
import sys
from unireg_jax import __main__ as cli
for n, words in enumerate({calls!r}):
    ending = ".csv" if words[0] == "warp-points" else ".nii.gz"
    assert cli.main([*words, "--quiet", "-o", sys.argv[1] + f"/{{n}}" + ending]) == 0
assert cli.main(["check-transform", "c.h5"]) == 0
loaded = [m for m in ("jax", "flax", "SimpleITK", "matplotlib") if m in sys.modules]
assert not loaded, loaded
"""
    subprocess.run(
        [sys.executable, "-W", "error", "-c", code, tmp_path],
        cwd=folder,
        check=True,
        stdout=subprocess.DEVNULL,
    )


# --- register, however scans are stored ---------------------------------------------

STORED = {  # axis order, type, byte order, intercept
    "LPS": ("i2", "<", 0),
    "RAI": ("f4", ">", 0),
    "SLA": ("u2", ">", -1024),
    "PIR": ("f8", "<", 0),
}


def store(path, data, vox2world, codes):
    """NIfTI-1 bytes of a scan in one of the ways of STORED."""
    kind, order, inter = STORED[codes]
    data, vox2world = orientation.reorient(data, vox2world, codes)
    header = nib.Nifti1Header(endianness=order)
    header.set_data_shape(data.shape)
    header.set_data_dtype(np.dtype(order + kind))
    header.set_sform(orientation.ras_from_lps(vox2world), 1)
    header.set_xyzt_units("mm")
    header["scl_slope"], header["scl_inter"] = 1, inter
    header["pixdim"][1:4] = orientation.spacing_mm(vox2world)
    header["vox_offset"], header["magic"] = 352, b"n+1"
    raw = (data.astype(np.int64) - inter).astype(order + kind).tobytes(order="F")
    path.write_bytes(header.binaryblock + b"\0\0\0\0" + raw)
    return str(path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("affine", "turned", "tolerance_mm"),
    [
        ("none", False, 1e-4),
        ("com", False, 1e-4),
        # Files hold geometry in float32: a grid off by 1e-4 mm, read by a steep map.
        ("none", True, 5e-4),
    ],
)
def test_register_gives_one_map_however_scans_are_stored(
    tmp_path, affine, turned, tolerance_mm
):
    network = test_cli.save_network(tmp_path / "tiny.safetensors")
    shape, spacing, axes, angle = test_cli.GRIDS["oblique"]
    places = [
        test_cli.vox2world(shape, spacing, axes, angle * turned),
        test_cli.vox2world((36, 28, 41), (8.5, 9.5, 7.5), "LPS", -5.0 * turned),
    ]
    scans = [
        test_cli.body(size, place, shift=shift)[0]
        for size, place, shift in zip(
            (shape, (36, 28, 41)), places, ((0, 0, 0), (12, 5, -9)), strict=True
        )
    ]
    index = np.random.default_rng(0).uniform(0.1, np.array(shape) - 1.1, (500, 3))
    xyz = index @ places[0][:3, :3].T + places[0][:3, 3]
    maps = []
    for codes, other in zip(STORED, list(STORED)[::-1], strict=True):
        paths = [
            store(tmp_path / f"{name}_{codes}.nii", data, place, way)
            for name, data, place, way in zip(
                ("fixed", "moving"), scans, places, (codes, other), strict=True
            )
        ]
        words = ("register", "-f", paths[0], "-m", paths[1], "-o", tmp_path / "out")
        words += ("--task", "liver", "--affine", affine, "--weights", network)
        words += ("--io-iterations", 0)
        assert cli.main([*map(str, words), "--case", codes, "--quiet"]) == 0
        case = tmp_path / "out" / codes / codes
        maps.append(mapping.points(mapping.read(f"{case}_1Warp.nii.gz"), xyz))
        peer_image = sitk.ReadImage(f"{case}_1Warp.nii.gz", sitk.sitkVectorFloat64)
        by_itk = sitk.DisplacementFieldTransform(peer_image)
        found = [by_itk.TransformPoint(point.tolist()) for point in xyz]
        np.testing.assert_allclose(maps[-1], found, rtol=0, atol=1e-3)
    assert np.abs(maps[0] - xyz).max() > 2
    for other in maps[1:]:
        np.testing.assert_allclose(other, maps[0], rtol=0, atol=tolerance_mm)
