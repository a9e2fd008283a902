"""The commands: files that other tools read, exit codes, and one line per mistake."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk

from data_pipeline import synthetic
from tests.grids import positions
from unireg_jax import __main__ as cli
from unireg_jax import errors
from unireg_jax.imaging import inverse, mapping, transforms
from unireg_jax.imaging.preprocess import PreprocessSpec
from unireg_jax.models.conditioning import dynamic
from unireg_jax.models.unireg import UniReg
from unireg_jax.registration import matcher, pipeline, weights
from unireg_jax.registration.compiled import compile_register
from unireg_jax.registration.network import initializer, load_model
from unireg_jax.verbs import files, outputs, register, results

REPO = Path(__file__).resolve().parents[1]
SPEC = PreprocessSpec(shape=(48, 32, 48), spacing_mm=(8.0, 9.0, 8.0))
ARCHITECTURE = {
    "encoder": [4, 4, 4, 4],
    "decoder": [4, 4, 4, 4],
    "remaining": [8],
    "field_level": 1,
    "conv_impl": "direct",
}
# (shape, spacing, axis codes of the file in LPS terms, rotation about z in degrees)
GRIDS = {
    "straight": ((33, 40, 29), (8.0, 7.0, 10.0), "LPS", 0.0),
    "flipped": ((40, 33, 30), (7.0, 8.0, 9.5), "RAS", 0.0),
    "oblique": ((33, 40, 29), (8.0, 7.0, 10.0), "LPS", 9.0),
    "permuted": ((30, 36, 40), (10.0, 8.0, 7.0), "SLA", -7.0),
}


# --- making files -------------------------------------------------------------------


def vox2world(shape, spacing, codes, angle_deg, center=(10.0, -220.0, 900.0)):
    """[4, 4] LPS of a grid whose middle lies at `center`."""
    angle = np.deg2rad(angle_deg)
    turn = np.eye(3)
    turn[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    axes = np.zeros((3, 3))
    for column, code in enumerate(codes):
        axes["LRPASI".find(code) // 2, column] = 1.0 if code in "LPS" else -1.0
    out = np.eye(4)
    out[:3, :3] = turn @ axes @ np.diag(spacing)
    out[:3, 3] = center - out[:3, :3] @ (np.array(shape) - 1) / 2
    return out


def body(shape, place, *, shift=(0.0, 0.0, 0.0)):
    """A smooth ellipsoid with a bright spot, int16 HU, and two labels, uint8."""
    axes = np.meshgrid(*(np.arange(n) for n in shape), indexing="ij")
    x = np.stack(axes, axis=-1) @ place[:3, :3].T + place[:3, 3]
    x = x - np.array([10.0, -220.0, 900.0]) - shift
    radius = np.square(x / [110, 90, 130]).sum(-1)
    spot = np.exp(-np.square((x - [40, -20, 50]) / 45).sum(-1))
    hu = -1000 + 1040 / (1 + np.exp((radius - 1) * 6)) + 250 * spot
    labels = np.where(spot > 0.5, 1, (radius < 0.6) * 3)
    return np.rint(hu).astype(np.int16), labels.astype(np.uint8)


def write(path, array, place):
    """Writes NIfTI through nibabel, whose world is RAS."""
    image = nib.Nifti1Image(array, np.diag([-1.0, -1.0, 1.0, 1.0]) @ place)
    image.header.set_xyzt_units("mm")
    nib.save(image, path)
    return str(path)


def write_pair(folder, grid="straight", *, shift=(12.0, 5.0, -9.0)):
    """Fixed and moving scans and labels of different grids; their paths."""
    shape, spacing, codes, angle = GRIDS[grid]
    fixed = vox2world(shape, spacing, codes, angle)
    moving = vox2world((36, 28, 41), (8.5, 9.5, 7.5), "ASR", -5.0)
    paths = {}
    for name, size, place, offset in (
        ("fixed", shape, fixed, (0.0, 0.0, 0.0)),
        ("moving", (36, 28, 41), moving, shift),
    ):
        hu, labels = body(size, place, shift=offset)
        paths[name] = write(folder / f"{name}.nii.gz", hu, place)
        paths[f"{name}_label"] = write(folder / f"{name}_seg.nii.gz", labels, place)
    return paths


def save_network(path, *, scale=3e3, bias=0.0, features="none"):
    """A small random network; `scale` makes its field some millimetres."""
    fields = {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in ARCHITECTURE.items()
    }
    params = jax.jit(initializer(UniReg(**fields)))(jax.random.key(0))
    controller = params["head"]["controller"]
    last = slice(dynamic.NUM_WEIGHTS - 3 * dynamic.HIDDEN, dynamic.NUM_WEIGHTS)
    head = controller["bias"].at[last].multiply(scale).at[-3:].set(bias)
    controller["bias"] = jnp.asarray(head)
    # As initialised it is 0, and the condition has no say.
    noise = jax.random.normal(jax.random.key(1), controller["kernel"].shape)
    controller["kernel"] = 5e-7 * scale * noise
    spec = {
        "architecture": ARCHITECTURE,
        "features": features,
        "preprocess": SPEC.to_json(),
    }
    weights.save_weights(path, params, spec)
    return str(path)


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    return save_network(tmp_path_factory.mktemp("weights") / "tiny.safetensors")


@pytest.fixture
def scans(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    return write_pair(folder)


def command(paths, out, network, *more):
    return [
        "register",
        *("--fixed", paths["fixed"], "--moving", paths["moving"]),
        *("--out", str(out), "--task", "lung", "--weights", network),
        *("--io-iterations", "0"),  # a compilation less
        *more,
    ]


def refused(capsys, arguments, code):
    """Runs a command that must fail in one line; returns that line."""
    try:
        got = cli.main(arguments)
    except SystemExit as stop:
        got = stop.code
    captured = capsys.readouterr()
    lines = [
        n for n in captured.err.splitlines() if not n.startswith("unireg: reading")
    ]
    assert captured.out == ""
    assert len(lines) == 1, captured.err
    assert lines[0].startswith("unireg: error: ")
    assert got == code, lines[0]
    return lines[0]


# --- register -----------------------------------------------------------------------


@pytest.mark.parametrize("grid", sorted(GRIDS))
def test_register_files_mean_the_same_to_simpleitk(grid, tmp_path, network, capsys):
    paths = write_pair(tmp_path, grid)
    out = tmp_path / "out"
    # A pre-alignment other than the identity, so that its order matters.
    affine = ("--affine", "com")
    assert cli.main(command(paths, out, network, *affine, "--json")) == 0
    record = json.loads(capsys.readouterr().out)
    case = out / "fixed__moving"
    name = "fixed__moving_"
    fixed = sitk.ReadImage(paths["fixed"], sitk.sitkFloat32)
    moving = sitk.ReadImage(paths["moving"], sitk.sitkFloat32)
    warped = nib.load(case / f"{name}warped.nii.gz")
    source = nib.load(paths["fixed"])
    # The fixed file's own grid, bit for bit.
    np.testing.assert_array_equal(warped.affine, source.affine)
    assert warped.shape == source.shape
    assert warped.get_data_dtype() == np.int16
    ours = sitk.ReadImage(str(case / f"{name}warped.nii.gz"), sitk.sitkFloat32)
    ours = sitk.GetArrayFromImage(ours)
    assert record["qc"]["max_mm_network"] > 1.0

    composite = sitk.ReadTransform(str(case / f"{name}Composite.h5"))
    field = sitk.ReadImage(str(case / f"{name}1Warp.nii.gz"), sitk.sitkVectorFloat64)
    single = sitk.DisplacementFieldTransform(field)
    for transform in (composite, single):
        theirs = sitk.Resample(moving, fixed, transform, sitk.sitkLinear, -1000.0)
        theirs = sitk.GetArrayFromImage(theirs)
        gap = np.abs(theirs - ours)
        # Whole HU in the file; the outer half voxel of the moving scan is ITK's too.
        assert gap.mean() < 0.5
        assert (gap > 2.0).mean() < 0.01
    affine_alone = sitk.ReadTransform(str(case / f"{name}0GenericAffine.txt"))
    expected = np.array(record["affine"]) @ [10.0, -200.0, 850.0, 1.0]
    got = affine_alone.TransformPoint((10.0, -200.0, 850.0))
    np.testing.assert_allclose(got, expected[:3], atol=1e-6)


def test_register_by_features_finds_a_turned_part_of_a_phantom(tmp_path, capsys):
    network = save_network(tmp_path / "mind.safetensors", scale=1.0, features="mind")
    truth = vox2world((1, 1, 1), (1.0, 1.0, 1.0), "LPS", 6.0)
    paths, organs = {}, None
    for name, shape, matrix in (
        ("fixed", (60, 44, 56), np.eye(4)),
        ("moving", (56, 48, 60), truth),
    ):
        scan = synthetic.phantom("headneck", shape=shape, spacing_mm=6.0, seed=3)
        place = matrix @ scan.vox2world
        if name == "moving":  # its upper part: the centroids are no help
            scan = scan._replace(hu=scan.hu[:, :, 18:])
            place = place @ vox2world((1, 1, 1), (1, 1, 1), "LPS", 0.0, (0, 0, 18))
        paths[name] = write(tmp_path / f"{name}.nii.gz", scan.hu, place)
        if organs is None:
            organs = np.argwhere(scan.labels > 0) @ place[:3, :3].T + place[:3, 3]
    gaps = {}
    for kind in ("features", "com"):
        arguments = command(paths, tmp_path / kind, network, "--affine", kind, "--json")
        assert cli.main(arguments) == 0
        record = json.loads(capsys.readouterr().out)
        assert record["settings"]["affine_used"] == kind
        wrong = np.array(record["affine"]) - truth
        gap = organs @ wrong[:3, :3].T + wrong[:3, 3]
        gaps[kind] = np.linalg.norm(gap, axis=1).mean()
    assert gaps["features"] < 0.5 * gaps["com"], gaps


def test_register_record_says_that_features_did_not_match(
    tmp_path, capsys, monkeypatch
):
    # The network's own patches of air: all alike. An embedding sees the borders.
    monkeypatch.setattr(matcher, "load_matcher", lambda own: own)
    network = save_network(tmp_path / "none.safetensors")
    air = np.full((30, 28, 36), -1000, np.int16)
    place = vox2world(air.shape, (8.0, 8.0, 8.0), "LPS", 0.0)
    path = write(tmp_path / "air.nii.gz", air, place)
    paths = {"fixed": path, "moving": path}
    arguments = command(paths, tmp_path / "out", network, "--affine", "features")
    assert cli.main([*arguments, "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["status"] == "warn"
    assert any(w.startswith("pre-alignment: features:") for w in record["warnings"])


def test_register_record_is_complete_and_names_no_folder(
    scans, tmp_path, network, capsys
):
    out = tmp_path / "out"
    labels = ("--fixed_label", scans["fixed_label"], "--moving-label")
    arguments = command(scans, out, network, *labels, scans["moving_label"])
    assert cli.main(arguments) == 0
    captured = capsys.readouterr()
    assert captured.out == ""
    assert all(line.startswith("unireg: ") for line in captured.err.splitlines())
    case = out / "fixed__moving"
    names = {f"fixed__moving_{ending}" for ending in outputs.OUTPUTS}
    names.remove("fixed__moving_1InverseWarp.nii.gz")  # if asked for
    assert set(os.listdir(case)) == names
    assert os.listdir(out) == ["fixed__moving"]
    text = (case / "fixed__moving_run.json").read_text()
    assert str(tmp_path) not in text and "NaN" not in text
    record = json.loads(text)
    # A random network makes it worse, and the record says so.
    assert record["status"] == "warn"
    (warning,) = record["warnings"]
    assert (
        "similarity: local_ncc_gain" in warning
        and f"warning: {warning}" in captured.err
    )
    assert record["settings"]["affine_used"] == "none"
    assert set(record["outputs"]) == names - {"fixed__moving_run.json"}
    for name, entry in record["outputs"].items():
        assert entry == outputs.digest(case / name)
    assert record["inputs"]["moving"]["axes"] == "ASR"
    assert record["weights"]["sha256"]
    assert set(record["qc"]) == {
        *(
            "finite",
            "max_mm_network",
            "p99_mm_network",
            "fold_percent_network",
            "sdlogj_network",
        ),
        *("ncc_before", "ncc_after"),
    }
    scores = record["scores"]
    assert set(scores["labels"]) == {"1", "3"}
    assert 0 < scores["mean"]["dsc"] < 1
    # Without pre-alignment it changes nothing.
    assert scores["mean"]["dsc_affine"] == scores["mean"]["dsc_before"]


def test_printed_overlaps_are_of_the_same_labels():
    """One that comes into view would lower what follows."""
    labels = {1: {"dsc_before": 0.5, "dsc": 0.8}, 2: {"dsc_before": None, "dsc": 0.2}}
    record = {
        "qc": {"ncc_before": 0.1, "ncc_after": 0.2, "max_mm_network": 3.0},
        "quality": {"fold_percent_body": 0.0},
        "scores": {"labels": labels, "mean": {"dsc_before": 0.5, "dsc": 0.5}},
        "warnings": [],
        "timings": {"total": 1.0},
    }
    lines = []
    register._summarize(lines.append, record, Path("out"))
    assert lines[0].endswith("mean DSC 0.5 -> 0.8")


def test_register_same_scan_stays_where_it_is(scans, tmp_path, capsys):
    calm = save_network(tmp_path / "calm.safetensors", scale=1.0)
    scans = {**scans, "moving": scans["fixed"]}
    arguments = command(scans, tmp_path / "out", calm, "--quiet", "--case", "self")
    assert cli.main(arguments) == 0
    assert capsys.readouterr().err == ""
    warped = nib.load(tmp_path / "out" / "self" / "self_warped.nii.gz").get_fdata()
    gap = np.abs(warped - nib.load(scans["fixed"]).get_fdata())
    assert gap.max() <= 2.0  # a hundredth of a voxel in a smooth image
    disp_mm, _ = transforms.read_field(tmp_path / "out" / "self" / "self_1Warp.nii.gz")
    assert np.abs(disp_mm).max() < 0.5
    record = json.loads((tmp_path / "out" / "self" / "self_run.json").read_text())
    assert record["status"] == "ok" and record["warnings"] == []


_ASKED_FOR = ("warped_label.nii.gz", "1InverseWarp.nii.gz")


def test_register_overwrites_only_when_asked(scans, tmp_path, network, capsys):
    out = tmp_path / "out"
    case = out / "fixed__moving"
    case.mkdir(parents=True)
    (case / "notes.txt").write_text("mine")
    (case / "fixed__moving_warped_label.nii.gz").write_text("of an earlier run")
    line = refused(capsys, command(scans, out, network), errors.USAGE)
    assert "--overwrite" in line
    assert sorted(os.listdir(case)) == [
        "fixed__moving_warped_label.nii.gz",
        "notes.txt",
    ]
    assert cli.main(command(scans, out, network, "--overwrite", "--quiet")) == 0
    assert (case / "notes.txt").read_text() == "mine"
    # No stale result under a final name, and nothing temporary left.
    assert set(os.listdir(case)) == {
        "notes.txt",
        *(f"fixed__moving_{n}" for n in outputs.OUTPUTS if n not in _ASKED_FOR),
    }
    assert os.listdir(out) == ["fixed__moving"]


def test_register_writes_the_way_back(scans, tmp_path, network, capsys):
    init = np.diag([1.02, 0.98, 1.0, 1.0])
    init[:3, 3] = (10.0, 0.0, -8.0)
    sitk.WriteTransform(
        sitk.AffineTransform(init[:3, :3].ravel().tolist(), init[:3, 3].tolist()),
        str(tmp_path / "init.h5"),
    )
    more = ("--init", str(tmp_path / "init.h5"), "--write-inverse", "--json")
    assert cli.main(command(scans, tmp_path / "out", network, *more)) == 0
    record = json.loads(capsys.readouterr().out)
    np.testing.assert_allclose(record["affine"], init, atol=1e-9)
    assert record["settings"]["affine_used"] == "given"
    case = tmp_path / "out" / "fixed__moving" / "fixed__moving"
    assert f"{case.name}_1InverseWarp.nii.gz" in record["outputs"]
    assert record["inverse"]["covered_percent"] > 30
    assert record["inverse"]["residual_p95_mm"] < 0.01
    there = mapping.read(f"{case}_1Warp.nii.gz")
    back = mapping.read(f"{case}_1InverseWarp.nii.gz")
    y = positions(back.fields[0].grid).reshape(-1, 3)
    x = mapping.points(back, y)
    inside = mapping.within(there, x)
    gaps = np.linalg.norm(mapping.points(there, x) - y, axis=-1)[inside]
    # Through 1Warp, between whose voxels its own map is read: not to the last digit.
    assert inside.sum() > 1000 and np.percentile(gaps, 99) < 0.1
    # It is what `invert` makes of the other file; what that warns of is in the record.
    words = ["-t", f"{case}_Composite.h5", "-m", scans["moving"], "--quiet"]
    words += ["-o", str(tmp_path / "i.nii.gz"), "--max-unsolved", "100"]
    assert cli.main(["invert", *words]) == 0
    (same,), (ours,) = mapping.read(tmp_path / "i.nii.gz").fields, back.fields
    np.testing.assert_allclose(ours.disp_mm, same.disp_mm, atol=1e-3)
    assert {*inverse.doubts(record["inverse"])} <= {*record["warnings"]}


def test_register_takes_one_start(scans, tmp_path, network, capsys):
    transforms.write_affine_txt(tmp_path / "a.txt", np.eye(4))
    more = ("--init", str(tmp_path / "a.txt"), "--affine", "rigid")
    line = refused(
        capsys, command(scans, tmp_path / "out", network, *more), errors.USAGE
    )
    assert "--init and --affine rigid: one pre-alignment expected" in line


@pytest.fixture
def earlier(tmp_path):
    """Results of before in out/fixed__moving, and a file of the user's beside them."""
    case = tmp_path / "out" / "fixed__moving"
    case.mkdir(parents=True)
    (case / "notes.txt").write_text("mine")
    for ending in outputs.OUTPUTS:
        (case / f"{case.name}_{ending}").write_text(f"earlier {ending}")
    return case


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(
    ("fault", "code"),
    [
        (KeyboardInterrupt, 130),
        (RuntimeError, 1),
        (MemoryError, errors.LIMIT),
        (lambda: OSError(28, "No space left on device"), errors.STORAGE),
        (lambda: errors.bad_file("f", "spacing", "a", "b", "c"), errors.FAILED),
    ],
)
def test_register_that_fails_keeps_earlier_results_and_says_so(
    fault, code, earlier, scans, network, capsys, monkeypatch
):
    def fail(*args, **kwargs):
        error = fault()
        error.add_note("a library's own")
        raise error

    monkeypatch.setattr(pipeline, "register", fail)
    before = contents(earlier)
    arguments = command(scans, earlier.parent, network, "--overwrite", "--quiet")
    line = refused(capsys, arguments, code)
    assert line.endswith(f"; earlier results stay in {earlier}")
    assert "library" not in line
    assert contents(earlier) == before
    # What has no record is no whole result.
    (earlier / f"{earlier.name}_run.json").unlink()
    assert "earlier" not in refused(capsys, arguments, code)


def test_a_run_killed_once_all_is_replaced_leaves_no_only_copy(earlier, monkeypatch):
    class Killed(BaseException):
        pass

    def die(*args, **kwargs):
        raise Killed

    with pytest.raises(Killed):
        with outputs.case_folder(earlier.parent, earlier.name, True) as temp:
            for ending in outputs.OUTPUTS:
                (temp / f"{earlier.name}_{ending}").write_text("new")
            monkeypatch.setattr(outputs.shutil, "rmtree", die)
    monkeypatch.undo()
    assert temp.is_dir() and not outputs._left(temp)
    after = contents(earlier)
    assert after.pop("notes.txt") == b"mine" and set(after.values()) == {b"new"}


def test_replacing_results_is_done_or_undone(earlier, monkeypatch):
    """Whichever call of the file system fails; the new ones have another file more."""
    (earlier / f"{earlier.name}_warped_label.nii.gz").unlink()
    before, real = contents(earlier), os.replace
    left = [0]

    def replace(source, target, **kwargs):
        left[0] -= 1
        if left[0] == 0:
            raise OSError(5, "Input/output error")
        return real(source, target, **kwargs)

    monkeypatch.setattr(os, "replace", replace)
    for failing in range(1, 99):
        try:
            with outputs.case_folder(earlier.parent, earlier.name, True) as temp:
                for ending in outputs.OUTPUTS:
                    (temp / f"{earlier.name}_{ending}").write_text("new")
                left[0] = failing
        except errors.UserError as error:
            assert error.exit_code == errors.STORAGE
            assert error.__notes__ == [f"earlier results stay in {earlier}"]
            assert contents(earlier) == before
        else:
            break
    assert failing == 1 + 6 + 7  # the earlier ones away, the new ones in
    after = contents(earlier)
    assert after.pop("notes.txt") == b"mine" and set(after.values()) == {b"new"}
    assert len(after) == len(outputs.OUTPUTS)
    assert os.listdir(earlier.parent) == [earlier.name]


def test_new_results_are_not_called_earlier_ones(earlier, monkeypatch):
    """The disk fails once they are in place."""
    real = outputs.sync

    def sync(path):
        if path == earlier.parent:
            raise OSError(5, "Input/output error")
        real(path)

    monkeypatch.setattr(outputs, "sync", sync)
    with pytest.raises(errors.UserError) as caught:
        with outputs.case_folder(earlier.parent, earlier.name, True) as temp:
            for ending in outputs.OUTPUTS:
                (temp / f"{earlier.name}_{ending}").write_text("new")
    assert not getattr(caught.value, "__notes__", [])
    assert (earlier / f"{earlier.name}_run.json").read_text() == "new"
    assert os.listdir(earlier.parent) == [earlier.name]


def test_results_that_cannot_be_put_back_are_not_deleted(earlier, monkeypatch):
    before, real, calls = contents(earlier), os.replace, []

    def replace(source, target, **kwargs):
        calls.append(source)
        if len(calls) > 3:
            raise OSError(5, "Input/output error")
        return real(source, target, **kwargs)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(errors.UserError) as caught:
        with outputs.case_folder(earlier.parent, earlier.name, True):
            pass
    (note,) = caught.value.__notes__
    left = Path(note.removeprefix("some earlier results are left in "))
    assert {**contents(earlier), **contents(left)} == before


# --- mistakes -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "code", "match"),
    [
        (["--task", "knee"], errors.USAGE, "invalid choice: 'knee'"),
        (["--type", "both"], errors.USAGE, "invalid choice"),
        (["--affine", "warp"], errors.USAGE, "invalid choice"),
        (["--unknown"], errors.USAGE, "unrecognized arguments"),
        (["--afine", "rigid"], errors.USAGE, "did you mean --affine"),
        (["--case", "a/b"], errors.USAGE, "id_invalid"),
        (["--case", ""], errors.USAGE, "id_invalid"),
        (["--case", "x" * 300], errors.USAGE, "id_invalid"),
        (["--case", "batch.csv"], errors.USAGE, "id_invalid"),
        (["--case", "failed-0-of-2.csv"], errors.USAGE, "id_invalid"),
        (["--case", "index.html"], errors.USAGE, "id_invalid"),
        (["--fixed", "absent.nii.gz"], errors.FAILED, "not_found"),
        (["--fixed", "."], errors.FAILED, "not_dicom"),
        (["--moving", __file__], errors.FAILED, "not_nifti|name_mismatch"),
        (["--weights", "absent.safetensors"], errors.CHECKPOINT, "--weights"),
        (["--fixed-label", "one.nii.gz"], errors.USAGE, "belong together"),
        (["--fixed-label", "", "--moving-label", "one.nii.gz"], errors.USAGE, "belong"),
    ],
)
def test_register_mistake_is_one_line_and_leaves_nothing(
    change, code, match, scans, tmp_path, network, capsys
):
    out = tmp_path / "out"
    line = refused(capsys, command(scans, out, network, *change), code)
    assert any(part in line for part in match.split("|")), line
    assert not out.exists()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--inverse"], "--write-inverse of register and batch"),
        (["--overwr"], "did you mean --overwrite?"),
        (["--io-iteration", "3"], "did you mean --io-iterations?"),
        (["--fixed-segmentations", "a"], "did you mean --fixed-segmentation?"),
        (["--moving-mask", "m.nii"], None),
        (["--seed", "1"], None),
        (["--threads", "2"], None),
    ],
)
def test_option_is_named_whole_and_no_other_is_suggested(words, says, capsys):
    """--inverse is no beginning of --inverse-consistency, --seed no --case."""
    for verb in (
        ["register", "-f", "a", "-m", "b", "--task", "lung"],
        ["batch", "a.csv"],
    ):
        if verb[0] == "batch" and "segmentation" in words[0]:
            continue
        line = refused(capsys, [*verb, "-o", "o", *words], errors.USAGE)
        assert f"unrecognized arguments: {words[0]}" in line
        assert says in line if says else "did you mean" not in line


def test_labels_may_be_called_segmentations():
    scans = ["-f", "a", "-m", "b"]
    both = ["--fixed-segmentation", "f", "--moving-segmentation", "m"]
    for words in (
        ["register", *scans, "-o", "o", "--task", "lung", *both],
        ["sweep", *scans, *both],
        ["evaluate", "-t", "t", *both],
        ["report", "out", "--fixed-segmentation", "f"],
    ):
        args = cli._parse(words)
        assert args.fixed_label == "f" and getattr(args, "moving_label", "m") == "m"


def test_register_needs_its_arguments(capsys):
    assert "--fixed" in refused(capsys, ["register"], errors.USAGE)
    assert "VERB" in refused(capsys, [], errors.USAGE)


def spoil(path, **change):
    """Rewrites a scan with other voxels or geometry."""
    image = nib.load(path)
    array = np.asanyarray(image.dataobj).astype(np.float32)
    affine = image.affine
    if "voxel" in change:
        array[3, 4, 5] = change["voxel"]
    if "shift" in change:
        affine = affine.copy()
        affine[:3, 3] += change["shift"]
    nib.save(nib.Nifti1Image(array, affine), path)


def test_register_refuses_bad_scans(scans, tmp_path, network, capsys):
    out = tmp_path / "out"
    spoil(scans["moving"], voxel=np.nan)
    line = refused(capsys, command(scans, out, network), errors.FAILED)
    assert "nonfinite" in line and "moving.nii.gz" in line
    Path(scans["moving"]).write_bytes(Path(scans["fixed"]).read_bytes()[:5000])
    assert "truncated" in refused(capsys, command(scans, out, network), errors.FAILED)
    Path(scans["moving"]).write_bytes(b"")
    assert "empty" in refused(capsys, command(scans, out, network), errors.FAILED)
    assert not out.exists()


def test_register_refuses_labels_of_another_grid(scans, tmp_path, network, capsys):
    spoil(scans["fixed_label"], shift=3.0)
    labels = ("--fixed-label", scans["fixed_label"], "--moving-label")
    arguments = command(scans, tmp_path / "out", network, *labels)
    line = refused(capsys, [*arguments, scans["moving_label"]], errors.FAILED)
    assert "grid_mismatch" in line
    assert not (tmp_path / "out").exists()


def test_register_without_weights_names_two_remedies(
    scans, tmp_path, capsys, monkeypatch
):
    monkeypatch.setenv(weights.VARIABLE, str(tmp_path / "none.safetensors"))
    arguments = command(scans, tmp_path / "out", "")
    arguments = arguments[: arguments.index("--weights")]
    line = refused(capsys, arguments, errors.CHECKPOINT)
    assert "--weights" in line and "experiments.train" in line
    assert not (tmp_path / "out").exists()


def test_register_refuses_a_file_as_folder(scans, tmp_path, network, capsys):
    (tmp_path / "out").write_text("a file")
    line = refused(capsys, command(scans, tmp_path / "out", network), errors.USAGE)
    assert "a folder expected" in line
    below = tmp_path / "out" / "deeper"
    refused(capsys, command(scans, below, network), errors.STORAGE)


@pytest.mark.parametrize("name", ["o" * 300, f"{'o' * 300}/deeper"])
def test_out_that_cannot_be_reached_is_told_as_storage(
    name, scans, tmp_path, network, capsys
):
    arguments = command(scans, tmp_path / name, network)
    assert "cannot be written" in refused(capsys, arguments, errors.STORAGE)
    with pytest.raises(errors.UserError, match="cannot be written") as error:
        outputs.make_out(tmp_path / name)
    assert error.value.exit_code == errors.STORAGE
    with pytest.raises(errors.UserError, match="a folder expected"):
        weights.check_target(tmp_path / name / "w.tflite", ".tflite", overwrite=True)
    with pytest.raises(errors.UserError, match="not_found"):
        files.check_results(str(tmp_path / name))


def test_register_refuses_a_field_beyond_reason(scans, tmp_path, capsys):
    wild = save_network(tmp_path / "wild.safetensors", bias=1e3)
    arguments = command(scans, tmp_path / "out", wild, "--quiet")
    assert "field_range" in refused(capsys, arguments, errors.NUMERICAL)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("ending", ["1Warp.nii.gz", "Composite.h5", "run.json"])
def test_register_full_disk_leaves_nothing(
    ending, scans, tmp_path, network, capsys, monkeypatch
):
    real = os.replace

    def replace(source, target, **kwargs):
        if str(target).endswith(ending):
            raise OSError(28, "No space left on device")
        return real(source, target, **kwargs)

    def rename(source, target, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", replace)
    if ending == "run.json":
        monkeypatch.setattr(os, "rename", rename)
    arguments = command(scans, tmp_path / "out", network, "--quiet")
    line = refused(capsys, arguments, errors.STORAGE)
    assert "No space left" in line
    assert not (tmp_path / "out").exists()


def test_internal_error_keeps_its_trace_in_a_log(
    scans, tmp_path, network, capsys, monkeypatch
):
    def fail(*args, **kwargs):
        raise RuntimeError("odd\nthing")

    monkeypatch.setattr(pipeline, "register", fail)
    out = tmp_path / "out"
    line = refused(capsys, command(scans, out, network, "--quiet"), 1)
    assert "internal" in line and "odd" not in line
    (log,) = os.listdir(out)
    assert "odd" in (out / log).read_text() and log.endswith(".log")
    code = cli.main(command(scans, out, network, "--quiet", "--debug"))
    assert code == 1 and "Traceback" in capsys.readouterr().err


def test_interrupt_leaves_nothing(scans, tmp_path, network, capsys, monkeypatch):
    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "register", stop)
    arguments = command(scans, tmp_path / "out", network, "--quiet")
    assert "interrupted" in refused(capsys, arguments, 130)
    assert not (tmp_path / "out").exists()


# --- evaluate -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def registered(tmp_path_factory, network):
    """A registered pair: paths of its scans and its case folder."""
    folder = tmp_path_factory.mktemp("registered")
    paths = write_pair(folder, "oblique")
    arguments = command(paths, folder / "out", network, "--quiet", "--case", "a")
    assert cli.main([*arguments, "--affine", "com"]) == 0
    return paths, folder / "out" / "a"


def evaluate(capsys, *arguments):
    assert cli.main(["evaluate", *map(str, arguments), "--json"]) == 0
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert all(line.startswith("unireg: warning: ") for line in lines)
    return json.loads(captured.out)


def test_evaluate_field_and_composite_agree(registered, capsys):
    paths, case = registered
    labels = ("--fixed-label", paths["fixed_label"])
    labels = (*labels, "--moving-label", paths["moving_label"])
    first = evaluate(capsys, "--transform", case / "a_1Warp.nii.gz", *labels)
    second = evaluate(capsys, "--transform", case / "a_Composite.h5", *labels)
    assert set(first["labels"]) == {"1", "3"}
    assert set(first["labels"]["1"]) == {
        *("dsc_before", "dsc", "hd95_mm_before", "hd95_mm", "nsd_before", "nsd")
    }
    for name, value in first["field"].items():
        assert second["field"][name] == pytest.approx(value, abs=1e-3), name
    for name, value in first["mean"].items():
        assert second["mean"][name] == pytest.approx(value, abs=0.02), name
    # Every number has its definition beside it.
    names = {name.removesuffix("_before") for name in first["mean"]}
    assert names | set(first["field"]) <= set(first["definitions"])


def test_evaluate_known_shift_is_exact(tmp_path, capsys):
    shape, place = (20, 18, 16), np.diag([2.0, 3.0, 4.0, 1.0])
    labels = np.zeros(shape, np.uint8)
    labels[6:12, 6:12, 4:10] = 1
    labels[2:4, 2:4, 2:4] = 9  # outside the moving scan once shifted: lost
    moving = np.zeros(shape, np.uint8)
    moving[8:14, 5:11, 5:11] = 1
    paths = [
        write(tmp_path / f"{name}.nii.gz", array, place)
        for name, array in (("fixed", labels), ("moving", moving))
    ]
    disp_mm = np.zeros((*shape, 3), np.float32)
    disp_mm[:] = [4.0, -3.0, 4.0]  # 2, -1 and 1 voxels
    transforms.write_field(tmp_path / "u.nii.gz", disp_mm, place)
    (tmp_path / "p.csv").write_text(
        "fixed_x_mm,fixed_y_mm,fixed_z_mm,moving_x_mm,moving_y_mm,moving_z_mm\n"
        "10,10,10,14,7,14\n12,20,30,16,17,37\n"
    )
    report = evaluate(
        capsys,
        *("--transform", tmp_path / "u.nii.gz", "--landmarks", tmp_path / "p.csv"),
        *("--fixed-label", paths[0], "--moving-label", paths[1]),
    )
    assert report["labels"]["1"]["dsc"] == 1.0
    assert report["labels"]["1"]["hd95_mm"] == 0.0
    assert report["labels"]["1"]["dsc_before"] == pytest.approx(100 / 216)
    assert report["labels"]["9"]["dsc"] == 0.0
    assert report["labels"]["9"]["hd95_mm"] is None
    assert report["mean"]["dsc"] == 0.5
    points = report["landmarks"]
    assert points["points"] == 2
    assert points["tre_mm"] == pytest.approx(1.5, abs=1e-5)
    before = (np.sqrt(41) + np.sqrt(16 + 9 + 49)) / 2
    assert points["tre_mm_before"] == pytest.approx(before, abs=1e-5)
    field = report["field"]
    assert field["max_mm"] == pytest.approx(np.sqrt(41), abs=1e-5)
    assert field["sdlogj"] == pytest.approx(0.0, abs=1e-6)
    assert field["fold_percent"] == field["fold_percent_whole"] == 0.0


def test_evaluate_counts_folds_in_the_mask(tmp_path, capsys):
    shape, place = (12, 10, 9), vox2world((12, 10, 9), (2.0, 3.0, 4.0), "RSA", 20.0)
    # The upper half runs backwards along x, the lower half stands still.
    disp = np.zeros((*shape, 3), np.float32)
    disp[6:, ..., 0] = (-2.5 * np.arange(6))[:, None, None]
    disp_mm = disp @ place[:3, :3].T.astype(np.float32)
    transforms.write_field(tmp_path / "u.nii.gz", disp_mm, place)
    mask = np.zeros(shape, np.uint8)
    mask[8:] = 1
    path = write(tmp_path / "mask.nii.gz", mask, place)
    report = evaluate(
        capsys, "--transform", tmp_path / "u.nii.gz", "--fixed-mask", path
    )
    assert report["field"]["fold_percent"] == 100.0
    # Central differences: -1.5 at 7 ... 10, -0.25 at 6, 1 at 1 ... 5.
    assert report["field"]["fold_percent_whole"] == pytest.approx(50.0)
    share = 0.5
    sd = np.log(1e9) * np.sqrt(share * (1 - share))
    assert report["field"]["sdlogj_whole"] == pytest.approx(sd, rel=1e-5)


def test_evaluate_table_is_for_people(registered, capsys):
    paths, case = registered
    arguments = ["evaluate", "-t", str(case / "a_1Warp.nii.gz")]
    labels = ["--fixed-label", paths["fixed_label"]]
    labels += ["--moving-label", paths["moving_label"]]
    assert cli.main(arguments + labels) == 0
    out = capsys.readouterr().out
    assert "mean" in out and "sdlogj_l2r" in out and "hd95_mm" in out


@pytest.mark.parametrize(
    ("name", "content", "code", "match"),
    [
        ("absent.nii.gz", None, errors.FAILED, "not_found"),
        ("absent.h5", None, errors.FAILED, "not_found"),
        ("junk.h5", b"\x89HDF\r\n\x1a\n but no more", errors.FAILED, "schema"),
        ("junk.nii.gz", b"<html>", errors.FAILED, "an HTML page"),
    ],
)
def test_evaluate_refuses_what_is_no_transform(
    name, content, code, match, tmp_path, capsys
):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    assert match in refused(capsys, ["evaluate", "-t", str(path)], code)


def test_evaluate_refuses_a_mask_on_another_grid(registered, capsys):
    paths, case = registered
    arguments = ["evaluate", "-t", str(case / "a_1Warp.nii.gz")]
    arguments += ["--fixed-mask", paths["moving_label"]]
    assert "grid_mismatch" in refused(capsys, arguments, errors.FAILED)


def test_evaluate_reads_what_simpleitk_writes(tmp_path, capsys):
    vectors = np.broadcast_to([1.0, 2.0, 2.0], (8, 7, 6, 3)).copy()
    field = sitk.GetImageFromArray(vectors, isVector=True)
    field.SetSpacing((2.0, 3.0, 4.0))
    field = sitk.DisplacementFieldTransform(field)
    affine = sitk.AffineTransform(3)
    affine.SetTranslation((0.0, 0.0, 10.0))
    # The last one added acts first.
    sitk.WriteTransform(
        sitk.CompositeTransform([affine, field]), str(tmp_path / "c.h5")
    )
    report = evaluate(capsys, "--transform", tmp_path / "c.h5")
    assert report["field"]["max_mm"] == pytest.approx(np.sqrt(1 + 4 + 144), abs=1e-5)


# --- export -------------------------------------------------------------------------


def test_export_runs_without_this_package_and_equals_register(
    tmp_path, network, capsys
):
    """In a process that has JAX and the two files only."""
    out = tmp_path / "tiny.stablehlo"
    arguments = ["export", "--weights", network, "--shape", "32,16,32"]
    arguments += ["--out", str(out), "--json"]
    assert cli.main(arguments) == 0
    captured = capsys.readouterr()
    card = json.loads(captured.out)
    assert card == json.loads(out.with_suffix(".json").read_text())
    assert all(line.startswith("unireg: ") for line in captured.err.splitlines())
    assert sorted(os.listdir(tmp_path)) == ["tiny.json", "tiny.stablehlo"]
    digest = outputs.digest(out)
    assert card["artefact"]["sha256"] == digest["sha256"]
    assert card["weights"]["sha256"] == outputs.digest(Path(network))["sha256"]
    assert card["preprocess"] == SPEC.to_json() | {"shape": [32, 16, 32]}
    assert card["platforms"] == ["cpu", "cuda"]
    assert str(tmp_path) not in out.with_suffix(".json").read_text()
    hu = np.random.default_rng(0).integers(-1000, 600, (2, 2, 32, 16, 32))
    hu = hu.astype(np.int16)
    np.savez(tmp_path / "in.npz", fixed=hu[0, ..., None], moving=hu[1, ..., None])
    code = (
        "import jax.export, numpy as np, sys\n"
        f"run = jax.export.deserialize(open({str(out)!r}, 'rb').read()).call\n"
        f"x = np.load({str(tmp_path / 'in.npz')!r})\n"
        "codes = np.array([1, 2], np.int32), np.array([0, 1], np.int32)\n"
        "both = run(x['fixed'], x['moving'], *codes)\n"
        "one = run(x['fixed'][1:], x['moving'][1:], codes[0][1:], codes[1][1:])\n"
        f"np.savez({str(tmp_path / 'out.npz')!r}, both=both, one=one)\n"
        "assert 'unireg_jax' not in sys.modules\n"
    )
    process_run = process("-c", code)
    assert process_run.returncode == 0, process_run.stderr
    program = compile_register(load_model(network), (32, 16, 32), unit_shape=SPEC.shape)
    result = np.load(tmp_path / "out.npz")
    for i, (region, pair_type) in enumerate(((1, 0), (2, 1))):
        expected = program(hu[0, i], hu[1, i], region, pair_type)[0]
        # Other fusions of the same float32 arithmetic; voxels.
        np.testing.assert_allclose(result["both"][i], expected, atol=1e-4)
    np.testing.assert_allclose(result["one"][0], expected, atol=1e-4)
    assert result["both"].dtype == np.float32 and np.abs(result["both"]).max() > 0.1


@pytest.mark.parametrize(
    ("change", "code", "match"),
    [
        (["--shape", "32,24,32"], errors.USAGE, "multiples of 16"),
        (["--shape", "32,32"], errors.USAGE, "multiples of 16"),
        (["--shape", "32,-16,32"], errors.USAGE, "multiples of 16"),
        (["--out", "net.bin"], errors.USAGE, "ends in .stablehlo"),
        (["--out", "absent/net.stablehlo"], errors.STORAGE, "a folder expected"),
        (["--weights", "absent.safetensors"], errors.CHECKPOINT, "--weights"),
    ],
)
def test_export_mistake_is_one_line_and_leaves_nothing(
    change, code, match, tmp_path, network, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    arguments = ["export", "--weights", network, "--out", "net.stablehlo", "--quiet"]
    assert match in refused(capsys, [*arguments, *change], code)
    assert os.listdir(tmp_path) == []


def test_export_overwrites_only_when_asked(tmp_path, network, capsys):
    out = tmp_path / "net.stablehlo"
    out.with_suffix(".json").write_text("mine")
    arguments = ["export", "--weights", network, "--out", str(out), "--quiet"]
    arguments += ["--shape", "16,16,32"]
    assert "--overwrite" in refused(capsys, arguments, errors.USAGE)
    assert os.listdir(tmp_path) == ["net.json"]
    assert cli.main([*arguments, "--overwrite"]) == 0
    card = json.loads(out.with_suffix(".json").read_text())
    assert card["artefact"]["sha256"] == outputs.digest(out)["sha256"]
    assert sorted(os.listdir(tmp_path)) == ["net.json", "net.stablehlo"]


def test_export_never_replaces_the_description_of_weights(tmp_path, network, capsys):
    mine = tmp_path / "my.safetensors"
    for path in (mine, mine.with_suffix(".json")):
        path.write_bytes(Path(network).with_suffix(path.suffix).read_bytes())
    arguments = ["export", "--weights", str(mine), "--quiet", "--overwrite"]
    arguments += ["--out", str(tmp_path / "my.stablehlo")]
    line = refused(capsys, arguments, errors.USAGE)
    assert "the description of my.safetensors" in line
    assert sorted(os.listdir(tmp_path)) == ["my.json", "my.safetensors"]
    weights.load_weights(mine)


def test_export_without_flatbuffers_names_the_extra(
    tmp_path, network, capsys, monkeypatch
):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda n: None if n == "flatbuffers" else find(n)
    )
    arguments = ["export", "--weights", network, "--quiet"]
    arguments += ["--out", str(tmp_path / "net.stablehlo")]
    line = refused(capsys, arguments, errors.USAGE)
    assert "not_installed" in line and "unireg-jax[export]" in line
    assert os.listdir(tmp_path) == []


# --- info ---------------------------------------------------------------------------


def test_info_lists_tasks_and_weights(capsys, monkeypatch, network):
    monkeypatch.setenv(weights.VARIABLE, network)
    assert cli.main(["info", "--json"]) == 0
    info = json.loads(capsys.readouterr().out)
    assert info["tasks"]["lung"] == {"region": "chest", "type": "intra"}
    assert info["weights"]["name"] == "tiny.safetensors"
    assert info["weights"]["licence"] == "not stated"
    assert cli.main(["info"]) == 0
    assert "headneck" in capsys.readouterr().out


def test_info_prints_the_licence_of_the_packages_weights(capsys, monkeypatch):
    monkeypatch.delenv(weights.VARIABLE, raising=False)
    card = weights.load_weights(weights.PACKAGE / weights.DEFAULT)[1]
    assert cli.main(["info"]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == f"weights {weights.DEFAULT}  {card['licence']}"


def test_info_says_what_is_wrong_with_weights(capsys, monkeypatch, tmp_path, network):
    torn = tmp_path / "torn.safetensors"
    torn.write_bytes(Path(network).read_bytes()[:-1])
    torn.with_suffix(".json").write_bytes(
        Path(network).with_suffix(".json").read_bytes()
    )
    monkeypatch.setenv(weights.VARIABLE, str(torn))
    assert cli.main(["info"]) == 0
    assert "SHA-256" in capsys.readouterr().out.splitlines()[-1]


def test_choices_are_those_of_the_pipeline():
    assert results.AFFINES == pipeline.AFFINES
    assert results.NO_TASK == pipeline.NO_TASK


# --- as a process -------------------------------------------------------------------


def process(*arguments, **kwargs):
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=REPO,
        capture_output=True,
        text=True,
        check=False,
        **kwargs,
    )


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a file that is full")
def test_exit_code_is_the_same_where_the_line_cannot_be_written(tmp_path):
    command = [sys.executable, "-m", "unireg_jax", "register", "-f", "absent.nii.gz"]
    command += ["-m", "b.nii.gz", "-o", str(tmp_path), "--task", "lung"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, cwd=REPO, stderr=full, check=False)
    assert done.returncode == errors.FAILED


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a file that is full")
@pytest.mark.parametrize("verb", [["info", "--json"], ["weights", "list"]])
def test_a_full_stdout_is_told_as_storage(verb):
    command = [sys.executable, "-m", "unireg_jax", *verb]
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            command, cwd=REPO, stdout=full, stderr=subprocess.PIPE, check=False
        )
    assert done.returncode == errors.STORAGE
    (line,) = done.stderr.decode().splitlines()
    assert line.startswith("unireg: error: storage: No space left")


def test_process_exits_with_the_code_and_one_line(tmp_path):
    run = process(
        *("-m", "unireg_jax", "register", "-f", "absent.nii.gz", "-m", "b.nii.gz"),
        *("-o", str(tmp_path / "out"), "--task", "lung", "--quiet"),
    )
    assert run.returncode == errors.FAILED
    assert run.stdout == ""
    (line,) = run.stderr.splitlines()
    assert line.startswith("unireg: error: ") and "not_found" in line
    assert not (tmp_path / "out").exists()


def test_version_is_that_of_the_command():
    code = "import sys, unireg_jax; print('unireg', unireg_jax.__version__)"
    run = process("-c", f"{code}; assert 'jax' not in sys.modules")
    assert run.stdout == process("-m", "unireg_jax", "--version").stdout, run.stderr


def test_process_version_help_and_info_import_no_jax():
    code = (
        "import sys\nfrom unireg_jax.__main__ import main\n"
        "for words in (['--version'], ['register', '--help'], ['evaluate', '-h']):\n"
        "    try:\n        main(words)\n"
        "    except SystemExit as stop:\n        assert stop.code == 0\n"
        "assert main(['info']) == 0\n"
        "assert 'jax' not in sys.modules\n"
    )
    run = process("-c", code)
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("unireg ")


def test_register_warped_labels_are_those_that_are_judged(
    scans, tmp_path, network, capsys
):
    labels = ("--fixed-label", scans["fixed_label"])
    labels += ("--moving-label", scans["moving_label"])
    more = (*labels, "--affine", "com", "--json", "--quiet")
    assert cli.main(command(scans, tmp_path / "out", network, *more)) == 0
    record = json.loads(capsys.readouterr().out)
    prefix = str(tmp_path / "out" / "fixed__moving" / "fixed__moving")
    transform = sitk.ReadTransform(f"{prefix}_Composite.h5")
    fixed, moving = (sitk.ReadImage(scans[n]) for n in ("fixed", "moving_label"))
    expected = sitk.Resample(moving, fixed, transform, sitk.sitkNearestNeighbor)
    voxels, theirs, target = (
        sitk.GetArrayFromImage(image)
        for image in (
            sitk.ReadImage(f"{prefix}_warped_label.nii.gz"),
            expected,
            sitk.ReadImage(scans["fixed_label"]),
        )
    )
    assert (voxels != theirs).mean() < 1e-3  # faces between voxels, in float32
    for label, row in record["scores"]["labels"].items():
        a, b = target == int(label), voxels == int(label)
        assert row["dsc"] == pytest.approx(2 * (a & b).sum() / (a.sum() + b.sum()))
    # Contours that are there for the moving scan alone.
    more = ("--moving-label", scans["moving_label"], "--case", "alone", *more[4:])
    assert cli.main(command(scans, tmp_path / "out", network, *more)) == 0
    assert json.loads(capsys.readouterr().out)["scores"] is None
    alone = sitk.ReadImage(str(tmp_path / "out/alone/alone_warped_label.nii.gz"))
    assert (sitk.GetArrayFromImage(alone) == voxels).all()
