"""The race's conventions and bookkeeping, on made volumes; tools where installed."""

import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from experiments import compare_peers as race
from experiments import conventional, digests, real_pairs
from tests.registration import test_pipeline
from unireg_jax import registration
from unireg_jax.errors import USAGE, UserError
from unireg_jax.imaging import grids, mapping, nifti
from unireg_jax.imaging.grids import Field, Grid
from unireg_jax.imaging.nifti import Volume
from unireg_jax.imaging.points import PointPairs
from unireg_jax.registration import Plan

SHAPE = (48, 42, 36)
SPACING = np.array([3.0, 4.0, 5.0])
SHIFT = np.array([0.8, -1.2, 1.6])  # voxels; sign and size differ per axis, in mm too
VOX2WORLD = np.diag([*SPACING, 1.0])
VOX2WORLD[:3, 3] = (-60, 35, -700)


def made(shift=(0, 0, 0)):
    """A textured ellipsoid in air, moved by `shift` voxels; its body."""
    texture = ndimage.gaussian_filter(np.random.default_rng(0).normal(size=SHAPE), 2)
    x = np.stack(np.indices(SHAPE), -1)
    half = np.array(SHAPE) / 2
    body = (((x + 0.5 - half) / (0.8 * half)) ** 2).sum(axis=-1) < 1
    hu = np.where(body, 200 + 150 * texture / texture.std(), -1000.0)
    hu = ndimage.shift(hu, shift, order=1, mode="nearest")
    return np.rint(hu).astype(np.int16), body


@pytest.fixture
def pair(tmp_path):
    fixed, body = made()
    conventional.write_pair(tmp_path, fixed, made(SHIFT)[0], VOX2WORLD)
    return tmp_path, ndimage.binary_erosion(body, iterations=3)


TOLERANCE_MM = 1.5  # of a tool's median displacement
SLOW = ("elastix", "ANTs SyN")  # minutes, on the smallest volumes too


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else [])
        for name in conventional.PEERS
    ],
)
def test_peer_finds_a_known_shift_in_lps_mm(pair, name):
    """moving(x + s) = fixed(x): the field is s, its sign and axes too."""
    folder, inner = pair
    if conventional.version(conventional.PEERS[name]) is None:
        pytest.skip(f"{name} is not installed")
    # In a process of its own, as in the race: a crash there is a failed test here.
    done = subprocess.run(
        [sys.executable, "-m", "experiments.conventional", name, str(folder), "1"],
        env=os.environ | {"OMP_WAIT_POLICY": "PASSIVE"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-500:]
    field, affine, measured = conventional.read_result(folder)
    assert field.disp_mm.shape == (*SHAPE, 3) and affine is None
    np.testing.assert_allclose(field.vox2world, VOX2WORLD, atol=1e-4)
    found = np.median(field.disp_mm[inner], axis=0)
    np.testing.assert_allclose(found, SHIFT * SPACING, atol=TOLERANCE_MM)
    assert measured["cpu_s"] > 0 and measured["peak_mib"] > 10


def test_the_known_shift_tells_conventions_apart():
    """No order or sign of axes but the right one, nor voxels for mm, would pass."""
    shift = SHIFT * SPACING
    others = [SHIFT, np.zeros(3)]
    for order in itertools.permutations(range(3)):
        for signs in itertools.product((1, -1), repeat=3):
            if order != (0, 1, 2) or signs != (1, 1, 1):
                others.append(shift[list(order)] * signs)
    assert len(others) == 49
    assert min(np.abs(other - shift).max() for other in others) > TOLERANCE_MM


@pytest.mark.parametrize("beyond", ["nan", "border"])
def test_by_coordinates_recovers_what_a_tool_does(pair, beyond):
    """Everywhere, whatever the tool says of places that it cannot read."""
    folder, _ = pair
    disp = np.broadcast_to((SHIFT * SPACING).astype(np.float32), (*SHAPE, 3))

    def warp(image, out):  # stands for a tool that reads files of its own
        volume = nifti.read_image(image)
        grid = mapping.grid_of(volume)
        moved = mapping.field(disp, VOX2WORLD)
        if beyond == "nan":
            moved = mapping.resample(moved, volume, grid, fill=np.nan)
        else:
            xyz = mapping.points(moved, grids.positions(grid, slice(None)).T).T
            coords = grids.apply(np.linalg.inv(VOX2WORLD), xyz)
            coords = np.clip(coords, 0, np.array(SHAPE)[:, None] - 1)
            moved = grids.linear(volume.data, coords).reshape(SHAPE)
        nib.save(nib.Nifti1Image(moved.astype(np.float32), None), out)

    field = conventional.by_coordinates(folder, warp)
    # mm: float32 of coordinates of 700.
    np.testing.assert_allclose(field.disp_mm, disp, atol=1e-3)


def test_by_coordinates_refuses_a_tool_that_read_nothing(pair):
    folder, _ = pair

    def warp(image, out):
        del image
        nothing = np.full(SHAPE, np.nan, np.float32)
        nib.save(nib.Nifti1Image(nothing, None), out)

    with pytest.raises(ValueError, match="nothing but border"):
        conventional.by_coordinates(folder, warp)


def test_whole_map_is_that_of_registration(tmp_path, monkeypatch):
    """The judge composes as the library itself does, slab by slab."""
    monkeypatch.setattr(grids, "SLAB_POINTS", 2**12)
    hu, _ = made()
    model = registration.load_model(test_pipeline.saved(tmp_path))
    matrix = np.eye(4)
    matrix[:3, :3] += [[0.02, 0.05, 0], [-0.05, 0.01, 0.03], [0, -0.03, 0.04]]
    matrix[:3, 3] = (7, -5, 11)
    result = registration.register(
        hu,
        made(SHIFT)[0],
        task="none",
        weights=model,
        affine=matrix,
        fixed_vox2world=VOX2WORLD,
        moving_vox2world=VOX2WORLD,
        refine=Plan(5),
    )
    grid = result.network_grid
    field = conventional.from_voxels(result.network_disp, grid.vox2world)
    assert np.abs(field.disp_mm).max() > 0.1
    whole = race.whole_map(field, matrix, Grid(SHAPE, VOX2WORLD))
    # mm: float32 in the library's programs, float64 here.
    np.testing.assert_allclose(whole, result.disp_mm, atol=2e-3)


@pytest.fixture
def start():
    fixed, body = made()
    grid = Grid(SHAPE, VOX2WORLD)
    points = np.argwhere(ndimage.binary_erosion(body, iterations=4))[::50]
    world = points @ VOX2WORLD[:3, :3].T + VOX2WORLD[:3, 3]
    matrix = np.eye(4)
    matrix[:3, 3] = (4, 0, 0)
    truth = PointPairs([""] * len(world), world, world + SHIFT * SPACING)
    return race.Start(grid, "none", matrix, body, fixed, made(SHIFT)[0], grid, truth)


def test_judge_counts_field_and_affine_once(start):
    left = SHIFT * SPACING - (4, 0, 0)
    disp = np.broadcast_to(left.astype(np.float32), (*SHAPE, 3))
    scores = race.judge(start, Field(disp, VOX2WORLD), None)
    assert scores["tre_mm"] < 1e-3 and scores["fold_percent"] == 0
    assert set(scores) == {"fold_percent", "sdlogj", "tre_mm", "tre_median_mm"}
    marks = start.truth.moving + 20 * (np.arange(len(start.truth.moving)) == 3)[:, None]
    wrong = start.truth._replace(moving=marks)  # the fourth in a wrong place
    wrong = start._replace(truth=wrong, doubtful=(3,))
    scores = race.judge(wrong, Field(disp, VOX2WORLD), None)
    assert scores["tre_sure_mm"] < 1e-3
    assert scores["tre_mm"] == pytest.approx(20 * 3**0.5 / len(marks), abs=1e-3)
    scores = race.judge(start, Field(disp, VOX2WORLD), np.eye(4))
    assert scores["tre_mm"] == pytest.approx(4, abs=1e-3)


def test_judge_takes_a_finer_grid(start):
    left = SHIFT * SPACING - (4, 0, 0)
    grid = grids.finer(start.grid, 2)
    disp = np.broadcast_to(left.astype(np.float32), (*grid.shape, 3)).copy()
    scores = race.judge(start, Field(disp, grid.vox2world), None)
    assert scores["tre_mm"] < 1e-3 and scores["fold_percent"] == 0
    inside = np.argwhere(start.body)[start.body.sum() // 2] * 2
    part = tuple(slice(n - 3, n + 4) for n in inside)
    disp[part] += 3 * SPACING * (-1) ** np.arange(7)[:, None, None, None]
    assert race.judge(start, Field(disp, grid.vox2world), None)["fold_percent"] > 0


def test_judge_counts_folds_on_the_working_grid(start):
    turned = np.zeros((*SHAPE, 3), np.float32)
    turned[..., 0] = -2 * SPACING[0] * np.arange(SHAPE[0])[:, None, None]
    scores = race.judge(start, Field(turned, VOX2WORLD), None)
    assert scores["fold_percent"] == 100


def test_judge_refuses_another_grid(start):
    disp = np.zeros((*SHAPE, 3), np.float32)
    with pytest.raises(ValueError, match="working grid"):
        race.judge(start, Field(disp[:-1], VOX2WORLD), None)
    moved = VOX2WORLD.copy()
    moved[0, 3] += 1
    with pytest.raises(ValueError, match="working grid"):
        race.judge(start, Field(disp, moved), None)


@pytest.fixture
def bare(start, monkeypatch, tmp_path):
    """A race of one pair that needs no scans; counts what is run."""
    runs = []

    def run(words, file, *_, **__):
        runs.append(words[3])
        folder = tmp_path / "4mm" / "liver"
        if words[3] == "greedy":
            file.write("one\nSegmentation")
            return -11
        disp = np.full((*SHAPE, 3), 1, np.float32)
        measured = {"cpu_s": 2.0, "start_s": 1.0, "wall_s": 3.0, "peak_mib": 99.0}
        conventional.write_result(folder, Field(disp, VOX2WORLD), measured)
        return 0

    monkeypatch.setattr(race.processes, "exit_code", run)
    monkeypatch.setattr(race, "load", lambda *_: None)
    monkeypatch.setattr(race.registration, "Session", lambda *_, **__: None)
    at = [start]
    monkeypatch.setattr(race, "begin", lambda *_: at[0])
    pair = real_pairs.Pair("liver", ("", ""), tmp_path, tmp_path, (tmp_path,))
    options = {
        "weights": "unireg_heldout",
        "spacing": 4,
        "threads": 1,
        "cache": tmp_path,
    }

    def again(redo=False, settings="s", sources="a", affine=None, late=False):
        names = ("convexAdam", "greedy") if late else ("greedy", "convexAdam")
        if affine is not None:
            at[0] = start._replace(affine=affine)
        found = [race.Method(name, settings, "1", sources) for name in names]
        more = {"picture": None, "accuracy": False}
        out = race.race([pair], found, tmp_path, options | more, redo)
        done, runs[:] = list(runs), []
        return out, done

    return again


def test_race_goes_on_after_a_crash_and_does_not_measure_twice(bare, start):
    rows, done = bare()
    assert done == ["greedy", "convexAdam"]
    assert rows[0]["failed"] == "exit code -11 Segmentation"
    assert rows[1]["tre_mm"] > 0 and rows[1]["cpu_s"] == 2
    assert bare()[1] == ["greedy"]  # what failed is tried again
    assert bare(settings="t")[1] == ["greedy", "convexAdam"]
    assert bare(settings="t", sources="b")[1] == ["greedy", "convexAdam"]
    # What failed had the start found anew: it is that of the other row, or it is not,
    # of rows before and after it.
    assert bare(settings="t", sources="b")[1] == ["greedy"]
    elsewhere = start.affine + np.eye(4)[:, ::-1]
    moved = {"settings": "t", "sources": "b", "affine": elsewhere}
    assert bare(**moved, late=True)[1] == ["convexAdam", "greedy"]
    assert bare(**moved)[1] == ["greedy"]
    moved["affine"] = elsewhere + 1e-5  # as another machine finds it
    assert bare(**moved)[1] == ["greedy"]
    moved["affine"] = elsewhere + 1
    assert bare(**moved)[1] == ["greedy", "convexAdam"]
    rows, done = bare(redo=True, settings="t")
    assert done == ["greedy", "convexAdam"] and len(rows) == 2
    lines = race.table(rows).splitlines()
    assert lines[2].startswith("| greedy | 0/1 | - |")
    assert lines[3].startswith("| convexAdam | 1 | - |") and "| 99 |" in lines[3]
    two = f"| {rows[1]['tre_mm']:.2f} / {rows[1]['tre_median_mm']:.2f}"
    assert f"{two} | - |" in lines[3]
    (line,) = race.table([rows[1] | {"tre_sure_mm": 0.123}]).splitlines()[2:]
    assert f"{two} / 0.12 | - |" in line
    assert len({line.count("|") for line in lines}) == 1


@pytest.mark.parametrize(
    ("says", "expected"),
    [("1.5.58", "1.5.58"), ("Version 2.0", "2.0"), ("alpha (default 1.6)", "sha256 ")],
)
def test_version_of_a_program_is_no_number_of_its_help(
    tmp_path, monkeypatch, says, expected
):
    for name in ("reg_f3d", "reg_resample"):
        (tmp_path / name).write_text(f"#!/bin/sh\necho '{says}'\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    found = conventional.version(conventional.PEERS["NiftyReg"])
    assert found.startswith(expected)
    (tmp_path / "reg_resample").write_text("#!/bin/sh\n# built anew\n")
    changed = conventional.version(conventional.PEERS["NiftyReg"]) != found
    assert changed == (expected == "sha256 ")


def test_methods_names_what_is_missing(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    found, missing = race.methods(["deeds", "ours"], 4)
    assert missing == ["deeds"] and [m.own for m in found] == race.own_rows()
    json.dumps([m.settings for m in found])
    plans = [m.settings["plan"] for m in found if m.settings["plan"]]
    assert plans.count(Plan()._asdict()) == 6
    assert plans.count(Plan(finer=2)._asdict()) == 3 and len(plans) == 9
    found, _ = race.methods(["ours"], 2)
    assert [m.name for m in found] == ["ours: affine", "ours: affine + refined"]
    found, _ = race.methods(["ours: affine"], 4, leave_out=["Finer", "affine"])
    assert len(found) == 5 and found[0].name == "ours: affine + network"
    with pytest.raises(UserError, match="--leave_out: the end of .* got finre"):
        race.methods(["ours"], 4, leave_out=["finre"])
    with pytest.raises(UserError, match="got gredy") as error:
        race.methods(["gredy"], 4)
    assert error.value.exit_code == USAGE


def test_own_run_measures_and_writes_a_field(tmp_path, monkeypatch):
    """What the race starts for one of our rows, on a small grid."""
    weights = test_pipeline.saved(tmp_path)
    shape = test_pipeline.SPEC.shape
    monkeypatch.setitem(race.SHAPES, 4, shape)
    for name, shift in (("a", (0, 0, 0)), ("b", SHIFT)):
        nifti.write_volume(tmp_path / f"{name}.nii", made(shift)[0], VOX2WORLD)
    own = race.Own("x", "auto", Plan(3))._asdict() | {"plan": {"iterations": 3}}
    job = {
        "pair": ["liver", *(str(tmp_path / f"{n}.nii") for n in "ab")],
        "own": own,
        "kind": "none",
        "affine": np.eye(4).tolist(),
        "weights": str(weights),
        "spacing": 4,
    }
    race.register(job, tmp_path)
    field, affine, measured = conventional.read_result(tmp_path)
    assert field.disp_mm.shape == (*shape, 3) and np.array_equal(affine, np.eye(4))
    assert np.abs(field.disp_mm).max() > 0
    stages = measured["stages"]
    assert 0 < measured["cpu_s"] == pytest.approx(stages["network"] + stages["refine"])
    assert measured["cpu_s"] < stages["total"] and measured["start_s"] > 0


def test_accuracy_alone_is_that_of_the_run_of_its_own(tmp_path, monkeypatch):
    weights = str(test_pipeline.saved(tmp_path))
    monkeypatch.setitem(race.SHAPES, 4, test_pipeline.SPEC.shape)
    for name, shift in (("a", (0, 0, 0)), ("b", SHIFT)):
        nifti.write_volume(tmp_path / f"{name}.nii", made(shift)[0], VOX2WORLD)
    here = np.array(SHAPE) // 2 @ VOX2WORLD[:3, :3].T + VOX2WORLD[:3, 3]
    table = tmp_path / "points.csv"
    ends = ("fixed_x_mm,fixed_y_mm,fixed_z_mm", "moving_x_mm,moving_y_mm,moving_z_mm")
    row = ",".join(str(v) for v in (*here, *(here + SHIFT * SPACING)))
    table.write_text(",".join(ends) + f"\n{row}\n")
    scans = [tmp_path / f"{n}.nii" for n in "ab"]
    pair = real_pairs.Pair("liver", ("", ""), *scans, (table,))
    own = race.Own("ours: x", "auto", Plan(3))
    plan = Plan(3)._asdict()
    method = race.Method(own.name, {"plan": plan}, "1", "a", own)
    options = {"weights": weights, "spacing": 4, "threads": 1, "cache": tmp_path}

    def run(*, accuracy):
        more = {"picture": None, "accuracy": accuracy}
        return race.race([pair], [method], tmp_path, options | more, False)

    (row,) = run(accuracy=True)
    assert "failed" not in row and "cpu_s" not in row
    assert race.table([row]).endswith("| - | - | - |")

    job = {"pair": ["liver", *map(str, scans)], "own": own._asdict() | {"plan": plan}}
    start = race.begin(pair, race.session_of(own, weights, 4))
    job |= {"kind": start.kind, "affine": start.affine.tolist()}
    race.register(job | {"weights": weights, "spacing": 4}, tmp_path)
    field, affine, _ = conventional.read_result(tmp_path)
    alone = race.judge(start, field, affine)
    np.testing.assert_allclose(row["tre_mm"], alone["tre_mm"], atol=1e-3)  # mm
    for name in ("find", "measure"):
        monkeypatch.setattr(race, name, lambda *_, name=name: {"failed": name})
    assert run(accuracy=True) == [row]
    # A row without seconds is none where seconds are asked for.
    assert run(accuracy=False)[0]["failed"] == "measure"


def test_accuracy_of_what_cannot_be_registered_is_a_row(start):
    """No network: the pair's files are not there."""
    pair = real_pairs.Pair("liver", ("", ""), Path("a.nii"), Path("b.nii"), ())
    own = race.Own("ours: x", "auto", None)
    row = race.find(race.Method("ours: x", {}, "1", "a", own), pair, start, None)
    assert "a.nii" in row["failed"]


@pytest.fixture
def sources(tmp_path, monkeypatch):
    """The package's sources, to be changed."""
    copy = tmp_path / "unireg_jax"
    leave = shutil.ignore_patterns("*.safetensors", "__pycache__")
    shutil.copytree(digests.LIBRARY, copy, ignore=leave)
    monkeypatch.setattr(digests, "LIBRARY", copy)
    return copy


def test_digest_changes_with_what_a_row_depends_on(tmp_path, sources):
    weights = test_pipeline.saved(tmp_path)

    def found():
        """Of a tool, of our rows without a network, and of those with one."""
        return (
            race.digest(own=False),
            race.digest(own=True),
            race.digest(weights, own=True),
        )

    def changed(path, text):
        """Which of the three change."""
        before = found()
        path.write_bytes(path.read_bytes() + text)
        return [a != b for a, b in zip(before, found(), strict=True)]

    before = found()
    assert before == found() and len(set(before)) == 3
    more = b"\nstep = 2\n"
    # A tool takes minutes a row: of the library the judge alone counts.
    assert changed(sources / "registration/refine.py", more) == [False, True, True]
    for name in (
        "evaluation/metrics.py",
        "evaluation/regularity.py",
        "imaging/surface.py",
        "imaging/grids.py",
        "imaging/nifti.py",
        "imaging/points.py",
        "imaging/mapping.py",
    ):
        assert changed(sources / name, more) == [True, True, True], name
    said = b"\n# said otherwise\n"
    assert changed(sources / "imaging/surface.py", said) == [False, False, False]
    assert changed(weights, b" ") == [False, False, True]


def test_pictures_show_the_map_that_was_judged(start, monkeypatch, tmp_path):
    """Of a row with an affine of its own, not of the pair's."""
    shown = []
    monkeypatch.setattr(
        race.figures, "save_registration", lambda *a, **_: shown.append(a)
    )
    moving = Volume(start.moving, VOX2WORLD)
    monkeypatch.setattr(race.real_pairs, "read_scans", lambda _: (None, moving))
    pair = real_pairs.Pair("liver", ("", ""), tmp_path, tmp_path, ())
    right = np.eye(4)
    right[:3, 3] = SHIFT * SPACING
    nothing = Field(np.zeros((*SHAPE, 3), np.float32), VOX2WORLD)
    for affine in (None, right):
        race.draw(tmp_path / "a.png", pair, start, nothing, "", affine=affine)
    inner = ndimage.binary_erosion(start.body, iterations=4)
    off = [np.abs(warped - fixed)[inner].mean() for _, fixed, _, warped, *_ in shown]
    assert off[1] < 0.3 * off[0]  # HU


def test_own_runs_keep_to_the_cores_they_are_given(tmp_path, monkeypatch):
    """XLA cannot be told a number of threads: the process is bound."""
    (tmp_path / "job.json").write_text(json.dumps({"threads": 3}))
    done = []
    monkeypatch.setattr(race.cli, "setup", lambda: None)
    monkeypatch.setattr(race.processes, "end_on_signals", lambda: None)
    monkeypatch.setattr(race.flags, "FLAGS", SimpleNamespace(job=str(tmp_path)))
    monkeypatch.setattr(conventional, "hold_to", done.append)
    monkeypatch.setattr(race, "register", lambda job, folder: done.append(folder))
    race.main([])
    assert done == [3, tmp_path]


def test_a_process_is_bound_to_some_of_its_cores(monkeypatch):
    code = (
        "from experiments import conventional; conventional.hold_to(1); "
        "import os, subprocess, sys; print(len(os.sched_getaffinity(0)), flush=True); "
        "subprocess.run([sys.executable, '-c', "
        "'import os; print(len(os.sched_getaffinity(0)))'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["1", "1"]  # its children, too
    bound = []
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 5}, raising=False)
    monkeypatch.setattr(
        os, "sched_setaffinity", lambda _, cores: bound.append(cores), raising=False
    )
    monkeypatch.setattr(os, "getpid", lambda: 7)
    conventional.hold_to(2)
    monkeypatch.setattr(os, "getpid", lambda: 8)
    conventional.hold_to(9)
    assert bound == [[5, 0], [0, 1, 2, 5]]
