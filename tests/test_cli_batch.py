"""Many pairs: each good one there once, each bad one with its reason, nothing else."""

import argparse
import csv
import errno
import fcntl
import importlib.machinery
import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk

from experiments.faults import batch as proof
from experiments.faults import scans
from unireg_jax import __main__ as cli
from unireg_jax import errors
from unireg_jax.evaluation import metrics
from unireg_jax.imaging import dicom, mapping, transforms
from unireg_jax.locks import lock
from unireg_jax.registration import pipeline
from unireg_jax.registration.threads import GivenUp
from unireg_jax.verbs import batch, journal, judging, outputs, results, worker

REPO = Path(__file__).resolve().parents[1]
SHIFTS = ((0.0, 0.0, 0.0), (8.0, 0.0, -5.0), (-6.0, 9.0, 4.0), (3.0, -7.0, 10.0))


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    return str(proof.make_network(tmp_path_factory.mktemp("net") / "tiny.safetensors"))


@pytest.fixture
def folder(tmp_path):
    """Scans s0 ... s3, label maps l0 ... l3, and list.csv: s0 to each of the others."""
    for i, shift in enumerate(SHIFTS):
        array, place = proof.body(np.array(shift))
        (tmp_path / f"s{i}.nii").write_bytes(scans.encode(array, place))
        labels = (array > -200).astype("u1")
        (tmp_path / f"l{i}.nii").write_bytes(scans.encode(labels, place))
    put(tmp_path, rows())
    return tmp_path


def rows(**more):
    return [
        {"id": f"a{i}", "fixed": "s0.nii", "moving": f"s{i}.nii"} | more
        for i in (1, 2, 3)
    ]


def put(folder, rows, name="list.csv"):
    proof.write_list(folder / name, rows)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, network):
    """A folder as `folder`, its pairs registered into out."""
    home = tmp_path_factory.mktemp("finished")
    folder.__wrapped__(home)
    assert run(home, network) == 0
    return home


@pytest.fixture
def done(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "d")
    return tmp_path / "d"


def words(folder, network, *more, name="list.csv"):
    return [
        *("batch", str(folder / name), "--out", str(folder / "out")),
        *("--task", "lung", "--affine", "none", "--weights", network, "--quiet"),
        *("--io-iterations", "0"),  # a compilation less
        *more,
    ]


def run(folder, network, *more, **options):
    return cli.main(words(folder, network, *more, **options))


def told(folder, name="batch"):
    """id -> its last line in the journal; and the number of lines."""
    text = (folder / "out" / f"{name}.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    return {line["id"]: line for line in lines}, len(lines)


def times(folder):
    """When each result was written."""
    out = folder / "out"
    return {p: p.stat().st_mtime_ns for p in out.glob("a?/*") if p.is_file()}


def wraps(monkeypatch, owner, name, before):
    """Calls before(*args) first."""
    real = getattr(owner, name)

    def wrapped(*args, **kwargs):
        before(*args, **kwargs)
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, wrapped)


# --- what is written ----------------------------------------------------------------


def test_batch_gives_what_register_gives(done, network, tmp_path):
    for i in (1, 2, 3):
        pair = ["--fixed", str(done / "s0.nii"), "--moving", str(done / f"s{i}.nii")]
        where = ["--out", str(tmp_path / "one"), "--case", f"a{i}", "--quiet"]
        how = ["--task", "lung", "--affine", "none", "--weights", network]
        how += ["--io-iterations", "0"]
        if i == 1:  # one of them is enough
            assert cli.main(["register", *pair, *where, *how]) == 0
            ours, theirs = (p / "a1" for p in (done / "out", tmp_path / "one"))
            assert set(os.listdir(ours)) == set(os.listdir(theirs))
            for name in os.listdir(ours):
                if not name.endswith("run.json"):
                    assert (ours / name).read_bytes() == (theirs / name).read_bytes()
    assert set(os.listdir(done / "out")) == {
        *("a1", "a2", "a3", ".unireg-batch.lock"),
        *("batch.jsonl", "batch.json", "batch.csv", "failed.csv"),
    }


def test_the_way_back_is_written_when_asked_for(done, network):
    before = times(done)
    # Results without it are other results, and are not taken for what is asked.
    assert run(done, network, "--write-inverse") == errors.FAILED
    assert times(done) == before and told(done)[0]["a1"]["status"] == "refused"
    assert run(done, network, "--write-inverse", "--overwrite") == 0
    written = told(done)[0]["a1"]["outputs"]
    assert "a1/a1_1InverseWarp.nii.gz" in written
    there, back = (
        mapping.read(done / "out" / "a1" / f"a1_{name}.nii.gz")
        for name in ("1Warp", "1InverseWarp")
    )
    x = np.array([[10.0, -10.0, 400.0], [0.0, 10.0, 420.0]])
    gap = mapping.points(back, mapping.points(there, x)) - x
    assert np.abs(gap).max() < 0.2
    before = times(done)
    assert run(done, network, "--write-inverse") == 0  # and now they agree
    assert times(done) == before
    (done / "out" / "a1" / "a1_1InverseWarp.nii.gz").unlink()
    assert run(done, network, "--write-inverse") == errors.PARTLY
    assert "a1_1InverseWarp.nii.gz is not what was" in told(done)[0]["a1"]["message"]


def test_lines_and_tables_say_what_was_done(done, network):
    lines, count = told(done)
    assert count == 3 and list(lines) == ["a1", "a2", "a3"]
    text = (done / "out" / "batch.jsonl").read_text()
    assert str(done.parent) not in text and "NaN" not in text
    line = lines["a2"]
    assert line["status"] == "ok" and line["reason"] is None
    assert set(line["inputs"]) == {"fixed", "moving"}
    assert line["inputs"]["moving"] == outputs.digest(done / "s2.nii")
    assert line["weights"] == outputs.digest(Path(network))["sha256"]
    for name, digest in line["outputs"].items():
        assert name.startswith("a2/") and outputs.digest(done / "out" / name) == digest
    assert set(os.listdir(done / "out" / "a2")) == {
        Path(name).name for name in line["outputs"]
    }
    with open(done / "out" / "batch.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert [row["id"] for row in table] == ["a1", "a2", "a3"]
    assert float(table[1]["ncc_after"]) == line["qc"]["ncc_after"]
    summary = json.loads((done / "out" / "batch.json").read_text())
    assert (summary["pairs"], summary["done"], summary["failed"]) == (3, 3, 0)
    record = json.loads((done / "out" / "a2" / "a2_run.json").read_text())
    assert record["settings_sha256"] == line["settings"]


def shifted(folder, points):
    """Landmarks of the second body, and the start that brings them to their own."""
    shift = np.eye(4)
    shift[:3, 3] = SHIFTS[1]
    transforms.write_affine_txt(folder / "init.txt", shift)
    head = {"delimiter": ",", "header": "x_mm,y_mm,z_mm", "comments": ""}
    for name, table in (("pf", points), ("pm", points + SHIFTS[1])):
        np.savetxt(folder / f"{name}.csv", table, **head)
    return shift


def test_labels_points_masks_and_a_start_of_the_list_are_used(folder, network):
    shift = shifted(folder, np.array([[0.0, 10.0, 400.0], [20.0, -5.0, 420.0]]))
    array, place = proof.body(np.array(SHIFTS[1]))
    more = (array > -200).astype("u1")
    more[2:4, 2:4, 2:4] = 7  # a structure that the fixed scan lacks
    (folder / "more.nii").write_bytes(scans.encode(more, place))
    row = rows()[0] | {
        **{"init": "init.txt", "fixed_points": "pf.csv", "moving_points": "pm.csv"},
        **{"fixed_label": "l0.nii", "moving_label": "more.nii"},
        **{"fixed_mask": "l0.nii", "moving_mask": "l1.nii"},
        **{"fixed_subject": "p1", "moving_subject": "p2"},
    }
    put(folder, [row])
    assert run(folder, network) == 0
    line = told(folder)[0]["a1"]
    record = json.loads((folder / "out" / "a1" / "a1_run.json").read_text())
    np.testing.assert_allclose(record["affine"], shift)
    # The start brings every point to its own; the network hardly moves.
    assert line["qc"]["tre_mm_before"] == pytest.approx(np.linalg.norm(SHIFTS[1]))
    assert line["qc"]["tre_mm"] < 1.0
    assert line["qc"]["dsc_affine"] > line["qc"]["dsc_before"]
    assert line["status"] == "warn"
    kinds = {warning.partition(":")[0] for warning in line["warnings"]}
    assert kinds == {"label_set", "subjects", "moving_mask"}
    assert set(line["inputs"]) == {
        *("fixed", "moving", "fixed_label", "moving_label", "fixed_mask"),
        *("fixed_points", "moving_points", "init"),
    }


def test_points_beyond_the_fixed_scan_go_on_with_the_affine(folder, network):
    """As the .h5 that is written leads them; that they lie there is told."""
    points = np.array([[0.0, 10.0, 4000.0], [20.0, -5.0, 4200.0]])
    shifted(folder, points)
    odd = nib.load(folder / "l0.nii")  # the place of its voxels told twice
    place = odd.affine.copy()
    place[:3, 3] += 15
    odd.set_qform(place, 1)
    nib.save(odd, folder / "odd.nii")
    tables = {"fixed_points": "pf.csv", "moving_points": "pm.csv", "init": "init.txt"}
    put(folder, [rows()[0] | tables | {"fixed_mask": "odd.nii"}])
    assert run(folder, network) == 0
    line = told(folder)[0]["a1"]
    assert line["qc"]["tre_mm"] == pytest.approx(0, abs=1e-3)
    whole = mapping.read(folder / "out" / "a1" / "a1_Composite.h5")
    _, errors_mm = metrics.target_errors(whole, points, points + SHIFTS[1])
    assert line["qc"]["tre_mm"] == pytest.approx(errors_mm.mean(), abs=1e-3)
    first, last = line["warnings"]
    assert first.startswith("fixed_mask: ") and "sform" in first
    summary = json.loads((folder / "out" / "batch.json").read_text())
    assert set(summary["warnings"]) == {"orientation_conflict", "fov"}
    assert last.startswith("fov: 2 of 2 fixed landmarks lie beyond the field")


@pytest.mark.parametrize(
    ("subjects", "kind", "warned"),
    [
        (("p1", "p2"), "intra", True),
        (("p1", "p1"), "intra", False),
        (("p1", "p1"), "inter", True),
        (("p1", "p2"), "inter", False),
        (("p1", None), "intra", False),
    ],
)
def test_pair_whose_subjects_contradict_its_type_is_warned_of(subjects, kind, warned):
    fixed, moving = subjects
    case = results.Case("a", "f", "m", fixed_subject=fixed, moving_subject=moving)
    assert bool(results._case_warnings(case, kind)) == warned


def test_points_in_voxels_are_those_of_the_scans(folder):
    (folder / "f.csv").write_text("3,4,5\n")
    (folder / "m.csv").write_text("3,4,6\n")
    # Axes of their own each, and an origin: an index of one is none of the other's.
    turns = [[2, -1], [0, 1], [1, -1]], [[1, 1], [2, -1], [0, -1]]
    images = [folder / name for name in ("t0.nii", "t1.nii")]
    for n, (path, turn) in enumerate(zip(images, turns, strict=True)):
        image = nib.load(folder / f"s{n}.nii").as_reoriented(turn)
        image.affine[:3, 3] += (7 * n, 30, -11)
        moved = nib.Nifti1Image(np.asarray(image.dataobj), image.affine)
        moved.header.set_xyzt_units("mm")
        nib.save(moved, path)
    tables = dict(fixed_points=folder / "f.csv", moving_points=folder / "m.csv")
    case = results.Case(
        "a1", *map(str, images), **{k: str(v) for k, v in tables.items()}
    )
    in_voxels = case._replace(points_frame="voxel_from_0")
    args = cli._parse(words(folder, "n.safetensors"))
    asked = {results.settings_sha256(args, one) for one in (case, in_voxels)}
    assert len(asked) == 2  # results with other errors in their record
    inputs = results.Files().read(in_voxels)
    volumes, indices = (inputs.fixed, inputs.moving), ((3, 4, 5), (3, 4, 6))
    for path, table, index in zip(images, inputs.points, indices, strict=True):
        world = nib.load(path).affine @ (*index, 1)  # RAS
        expected = world[:3] * (-1, -1, 1)
        np.testing.assert_allclose(table[0], expected, atol=1e-4)  # float32 header
    assert not np.allclose(*(v.native.vox2world for v in volumes))
    in_mm = case._replace(points_frame="lps_mm")
    np.testing.assert_array_equal(results.Files().read(in_mm).points[0], [[3, 4, 5]])
    with pytest.raises(errors.UserError, match="f.csv.*the column points_frame"):
        results.Files().read(case)


def test_start_of_the_list_may_be_of_another_tool(folder):
    rigid = sitk.Euler3DTransform((10.0, -20.0, 35.5), 0.1, -0.2, 0.3, (1.0, 2.0, 3.0))
    images = [str(folder / f"s{i}.nii") for i in (0, 1)]
    for name in ("e.txt", "e.mat", "e.h5"):
        sitk.WriteTransform(rigid, str(folder / name))
        case = results.Case("a1", *images, init=str(folder / name))
        inputs = results.Files().read(case)
        moved = inputs.init[:3] @ (7.0, 8.0, 9.0, 1.0)
        np.testing.assert_allclose(moved, rigid.TransformPoint((7, 8, 9)), atol=1e-9)
        assert inputs.digests["init"] == outputs.digest(folder / name)
    field = str(folder / "w.nii.gz")
    transforms.write_field(field, np.zeros((3, 4, 5, 3), np.float32), np.eye(4))
    with pytest.raises(errors.UserError, match="w.nii.gz: schema: .* affines alone"):
        results.Files().read(results.Case("a1", *images, init=field))


def test_list_is_named_in_either_way(capsys):
    for named in (["a.csv"], ["--manifest", "a.csv"]):
        for order in ([*named, "-o", "out"], ["-o", "out", *named]):
            assert cli._parse(["batch", *order]).list == "a.csv"
    for wrong in ([], ["a.csv", "--manifest", "b.csv"]):
        with pytest.raises(SystemExit):
            cli._parse(["batch", *wrong, "-o", "out"])
        assert "--manifest" in capsys.readouterr().err


@pytest.mark.parametrize("column", ["label", "points"])
def test_pair_with_labels_or_points_that_cannot_be_read_fails(folder, column):
    (folder / "broken.csv").write_text("x")
    named = {
        f"{side}_{column}": str(folder / "broken.csv") for side in ("fixed", "moving")
    }
    case = results.Case("a1", *(str(folder / f"s{i}.nii") for i in (0, 1)), **named)
    with pytest.raises(errors.UserError, match="broken.csv"):
        results.Files().read(case)


# --- every kind of bad pair ---------------------------------------------------------


def test_every_kind_of_damage_fails_alone_with_its_reason(tmp_path, network):
    expected = proof.make_list(
        tmp_path, good=3, kinds=[*scans.KINDS, *scans.KINDS[:3]], seed=1
    )
    assert len({kind.name for kind in scans.KINDS}) >= 40
    assert run(tmp_path, network) == errors.PARTLY
    assert proof.judge(tmp_path / "out", expected, None) == []
    with open(tmp_path / "out" / "failed.csv", newline="") as file:
        failed = {row["id"]: row["reason"] for row in csv.DictReader(file)}
    assert failed == {name: reason for name, reason in expected.items() if reason}
    text = (tmp_path / "out" / "batch.jsonl").read_text()
    assert str(tmp_path) not in text


def test_nothing_but_bad_pairs(folder, network):
    put(folder, rows(moving="absent.nii"))
    assert run(folder, network) == errors.FAILED
    assert told(folder)[0]["a1"]["reason"] == "not_found"
    # A mended pair is done by the same command.
    put(folder, rows())
    assert run(folder, network) == 0
    assert told(folder)[0]["a1"]["status"] == "ok"


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (MemoryError(), "out_of_memory"),
        (RuntimeError("RESOURCE_EXHAUSTED: out of device memory"), "out_of_memory"),
        (errors.UserError("field_nonfinite", "odd", 8), "field_nonfinite"),
        (RuntimeError("odd"), "internal"),
    ],
)
def test_fault_in_one_pair_leaves_its_mates_as_they_are(
    error, reason, done, network, monkeypatch
):
    clean = {p.name: p.read_bytes() for p in (done / "out").glob("a?/*1Warp*")}
    shutil.rmtree(done / "out")

    def fail(folder, inputs, *args, **options):
        if inputs.case.id == "a2":
            raise error

    wraps(monkeypatch, results, "write", fail)
    assert run(done, network) == errors.PARTLY
    lines, _ = told(done)
    assert lines["a2"]["reason"] == reason
    assert [lines[name]["status"] for name in ("a1", "a3")] == ["ok", "ok"]
    assert not (done / "out" / "a2").exists()
    for name in ("a1", "a3"):
        field = (done / "out" / name / f"{name}_1Warp.nii.gz").read_bytes()
        assert field == clean[f"{name}_1Warp.nii.gz"]
    log = done / "out" / "batch.log"
    assert log.exists() == (reason == "internal")
    if reason == "internal":
        assert "odd" in log.read_text() and "odd" not in lines["a2"]["message"]


def test_full_disk_is_the_pairs_own_fault_or_ends_the_run(
    folder, network, monkeypatch, capsys
):
    real = os.replace

    def replace(source, target, **kwargs):
        if str(target).endswith("a2_1Warp.nii.gz"):
            raise OSError(28, "No space left on device")
        return real(source, target, **kwargs)

    def page_text(record, drawn):
        if record["case"] == "a3":
            raise OSError(28, "No space left on device")
        return ""

    monkeypatch.setattr(os, "replace", replace)
    monkeypatch.setattr(judging, "page_text", page_text)
    assert run(folder, network, "--html") == errors.PARTLY
    for name in ("a2", "a3"):
        assert told(folder)[0][name]["reason"] == "storage"
        assert not (folder / "out" / name).exists()
    monkeypatch.undo()

    def full(descriptor):
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(28, "No space left on device")

    # The pairs that are there stay there, only their lines cannot be written.
    (folder / "out" / "batch.jsonl").unlink()
    monkeypatch.setattr(journal.os, "fsync", full)
    assert run(folder, network) == errors.STORAGE
    assert "batch.jsonl: cannot be written: No space left" in capsys.readouterr().err


FULL = """
import resource, signal, sys
from unireg_jax.__main__ import main
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))
sys.exit(main(sys.argv[2:]))
"""


def test_line_that_no_longer_fits_the_disk_ends_the_run(folder, network):
    """The kernel's own refusal, in the midst of the second line."""
    put(folder, rows(moving="absent.nii"))
    assert run(folder, network, "--workers", "1") == errors.FAILED
    path = folder / "out" / "batch.jsonl"
    first = path.read_bytes().splitlines(keepends=True)[0]
    shutil.rmtree(folder / "out")
    process = [sys.executable, "-c", FULL, str(len(first) + 100)]
    process += words(folder, network, "--workers", "1")
    final = subprocess.run(process, cwd=REPO, capture_output=True, text=True)
    assert final.returncode == errors.STORAGE, final.stderr
    assert "batch.jsonl: cannot be written: File too large" in final.stderr
    # No part of a line stays; times may differ in length.
    left = path.read_bytes().splitlines(keepends=True)
    assert [json.loads(line)["id"] for line in left] == ["a1"]


def join_threads():
    """Waits for those that were given up, which would outlive the test."""
    for thread in [t for t in threading.enumerate() if t.name == "unireg-pair"]:
        thread.join(60)
    assert not any(t.name == "unireg-pair" for t in threading.enumerate())


def test_pair_that_hangs_is_given_up_and_leaves_nothing(done, network, monkeypatch):
    shutil.rmtree(done / "out" / "a2")
    release = threading.Event()

    def hang(files, case):
        assert case.id == "a2"
        release.wait(60)  # seconds, of a test that hangs

    wraps(monkeypatch, results.Files, "read", hang)
    code = run(done, network, "--workers", "1", "--timeout", "5")
    lines, _ = told(done)
    assert code == errors.PARTLY
    assert lines["a2"]["reason"] == "timeout"
    # Another thread took its place.
    summary = json.loads((done / "out" / "batch.json").read_text())
    assert summary["this_run"]["skipped"] == 2
    release.set()  # it ends its work after all
    join_threads()
    assert not (done / "out" / "a2").exists()
    assert not list((done / "out").glob("*.tmp"))


def flat(folder, name):
    """A scan that shows nothing: the gate refuses it."""
    array, place = proof.body(np.zeros(3))
    (folder / name).write_bytes(scans.encode(np.full_like(array, 40), place))


def test_pair_that_was_given_up_is_not_held_back_either(folder, network):
    flat(folder, "s1.nii")
    args = cli._parse(words(folder, network, "--qc-gate"))
    case = results.Case("a1", str(folder / "s0.nii"), str(folder / "s1.nii"))
    held, seen = folder / "out" / outputs.REJECTED, []

    def claim():
        seen.extend(os.listdir(held))
        raise GivenUp

    work = worker.Worker(args, outputs.digest(Path(network))["sha256"])
    assert work(case._replace(task="lung", type="intra"), claim) is None
    assert not (folder / "out").exists()
    # A kill would have left what the next run sweeps.
    assert len(seen) == 1 and seen[0].startswith(f".unireg-{worker.tag(args)}")


def test_case_that_passes_is_no_longer_held_back(folder, network):
    good = (folder / "s1.nii").read_bytes()
    flat(folder, "s1.nii")
    put(folder, rows()[:1])
    assert run(folder, network, "--qc-gate") == errors.FAILED
    held = folder / "out" / outputs.REJECTED / "a1"
    assert (held / "a1_run.json").is_file()
    (folder / "s1.nii").write_bytes(good)
    assert run(folder, network) == 0
    assert (folder / "out" / "a1" / "a1_run.json").is_file()
    assert not held.exists()


# --- going on -----------------------------------------------------------------------


def test_same_command_again_does_nothing_and_imports_no_jax(done, network):
    before, (_, count) = times(done), told(done)
    code = (
        "import sys; from unireg_jax.__main__ import main; "
        "code = main(sys.argv[1:]); assert 'jax' not in sys.modules; sys.exit(code)"
    )
    for more in ((), ("--skip-existing",), ("--dry-run",)):
        process = [sys.executable, "-c", code, *words(done, network, *more)]
        subprocess.run(process, cwd=REPO, check=True, stdout=subprocess.DEVNULL)
    assert times(done) == before and told(done)[1] == count
    summary = json.loads((done / "out" / "batch.json").read_text())
    assert summary["this_run"]["skipped"] == 3 and summary["done"] == 3


def test_results_without_a_line_are_told_and_not_made_again(done, network):
    """As after a kill between the results and their line, or within the line."""
    path = done / "out" / "batch.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:2]) + lines[2][:100])
    before = times(done)
    assert run(done, network) == 0
    assert path.read_bytes() == b"".join(lines)
    assert times(done) == before


def _replace_moving(done):
    shutil.copy(done / "s1.nii", done / "s2.nii")


def _damage_result(done):
    path = done / "out" / "a2" / "a2_warped.nii.gz"
    data = bytearray(path.read_bytes())
    data[-10] ^= 1
    path.write_bytes(data)


def _lose_result(done):
    (done / "out" / "a2" / "a2_1Warp.nii.gz").unlink()


def _lose_record(done):
    (done / "out" / "a2" / "a2_run.json").unlink()


def _spoil_record(done):
    (done / "out" / "a2" / "a2_run.json").write_text('{"inputs": []}')


def _spoil_warnings(done):
    path = done / "out" / "a2" / "a2_run.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"warnings": [1]}))


def _put_a2(done, **more):
    put(done, [row | more if row["id"] == "a2" else row for row in rows()])


def _add_subjects(done):
    _put_a2(done, fixed_subject="p1", moving_subject="p2")


def _add_unused_mask(done):
    _put_a2(done, moving_mask="l2.nii")


def _other_task(done):
    _put_a2(done, task="chest")


def _add_labels(done):
    _put_a2(done, fixed_label="l0.nii", moving_label="l2.nii")


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (_replace_moving, "another moving"),
        (_damage_result, "a2_warped.nii.gz is not what was written"),
        (_lose_result, "a2_1Warp.nii.gz is not what was written"),
        (_lose_record, "no whole record"),
        (_spoil_record, "no whole record"),
        (_spoil_warnings, "no whole record"),
        (_add_subjects, "other subjects or columns"),
        (_add_unused_mask, "other subjects or columns"),
        (_other_task, "other settings"),
        (_add_labels, "other kinds of inputs"),
    ],
)
def test_results_that_do_not_agree_are_replaced_only_when_asked(
    change, why, done, network, capsys
):
    change(done)
    before = times(done)
    assert run(done, network) == errors.PARTLY
    line = told(done)[0]["a2"]
    assert (line["status"], line["reason"]) == ("refused", "id_duplicate")
    assert why in line["message"] and "stay as they are" in line["message"]
    assert line["message"].startswith("id_duplicate: ")  # the id stands before it
    assert times(done) == before
    table = (done / "out" / "batch.csv").read_text()
    assert "a2,refused,id_duplicate," in table and ",failed," not in table
    summary = json.loads((done / "out" / "batch.json").read_text())
    assert (summary["done"], summary["failed"], summary["refused"]) == (2, 0, 1)
    assert run(done, network, "--dry-run", "--skip-existing") == 0
    assert f"a2  replace  {why}" in capsys.readouterr().out
    assert run(done, network, "--skip-existing") == 0
    after = times(done)
    redone = {p.parent.name for p in after if after[p] != before.get(p)}
    assert redone == {"a2"}
    assert told(done)[0]["a2"]["status"] in batch.DONE
    assert run(done, network) == 0  # and now they agree


@pytest.mark.parametrize("option", ["--skip-existing", "--overwrite"])
def test_results_of_a_pair_that_fails_when_done_again_are_set_aside(
    option, done, network
):
    """Nothing in OUT/ID looks as if it were of the files that are there now."""
    (done / "s2.nii").unlink()
    before = {p.name: p.read_bytes() for p in (done / "out" / "a2").iterdir()}
    assert run(done, network) == errors.PARTLY  # neither option: nothing is touched
    line = told(done)[0]["a2"]
    assert line["status"] == "failed" and "earlier results stay" in line["message"]
    assert {p.name for p in (done / "out" / "a2").iterdir()} == set(before)
    (done / "s2.nii").write_bytes(b"<html>")
    assert run(done, network, option) == errors.PARTLY
    aside = done / "out" / outputs.SUPERSEDED / "a2"
    assert not (done / "out" / "a2").exists()
    assert {p.name: p.read_bytes() for p in aside.iterdir()} == before
    line = told(done)[0]["a2"]
    assert line["reason"] == "not_nifti" and "superseded/a2" in line["message"]
    assert run(done, network, option) == errors.PARTLY  # and they stay there
    assert len(list(aside.iterdir())) == len(before)
    shutil.copy(done / "s1.nii", done / "s2.nii")
    assert run(done, network) == 0
    assert (done / "out" / "a2" / "a2_run.json").is_file() and not aside.exists()


def test_folder_that_cannot_be_locked_is_told(tmp_path, monkeypatch):
    def refuse(file, kind):
        assert file.readable() and file.writable()  # NFS wants both
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(errors.UserError, match="No locks available") as error:
        with lock(tmp_path, shared=True):
            pass
    assert error.value.exit_code == errors.STORAGE


@pytest.mark.parametrize(
    "how",
    [["--skip-existing"], ["--overwrite"], ["--skip-existing", "--affine", "com"]],
)
def test_results_of_a_scan_that_cannot_be_read_now_stay(how, done, network):
    """A share that is away for a moment disagrees with nothing."""
    put(done, rows()[1:2])
    away = done / "s2.nii"
    away.rename(done / "away.nii")
    before = {p.name: p.read_bytes() for p in (done / "out" / "a2").iterdir()}
    assert run(done, network, *how) == errors.FAILED
    line = told(done)[0]["a2"]
    assert line["reason"] == "not_found" and "earlier results stay" in line["message"]
    assert "begun" not in line
    assert {p.name: p.read_bytes() for p in (done / "out" / "a2").iterdir()} == before
    (done / "away.nii").rename(away)
    assert run(done, network, "--skip-existing") == 0
    summary = json.loads((done / "out" / "batch.json").read_text())
    assert summary["this_run"]["skipped"] == 1


def test_results_stay_where_memory_ends_as_a_scan_is_read(done, network, monkeypatch):
    def fail(*args):
        raise MemoryError

    put(done, rows()[1:2])
    wraps(monkeypatch, results.Files, "read", fail)
    assert run(done, network, "--overwrite") == errors.FAILED
    line = told(done)[0]["a2"]
    assert line["reason"] == "out_of_memory"
    assert "earlier results stay" in line["message"]
    assert (done / "out" / "a2" / "a2_run.json").is_file()


def test_results_of_a_folder_that_cannot_be_listed_now_stay(done, network, monkeypatch):
    """Which is no empty one."""
    pytest.importorskip("pydicom")
    (done / "s2.nii").unlink(), (done / "s2.nii").mkdir()
    put(done, rows()[1:2])

    def refuse(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(dicom.os, "listdir", refuse)
    assert run(done, network, "--overwrite") == errors.FAILED
    line = told(done)[0]["a2"]
    assert line["reason"] == "permission" and "earlier results stay" in line["message"]
    assert (done / "out" / "a2" / "a2_run.json").is_file()
    # Without --overwrite its digest is asked for first.
    assert run(done, network, "--skip-existing") == errors.FAILED
    assert told(done)[0]["a2"]["reason"] == "permission"


def test_pair_that_hangs_while_it_is_read_is_not_begun(done, network, monkeypatch):
    put(done, rows()[1:2])
    release = threading.Event()
    wraps(monkeypatch, results.Files, "read", lambda *args: release.wait(60))
    assert run(done, network, "--overwrite", "--timeout", "1") == errors.FAILED
    release.set()
    join_threads()
    line = told(done)[0]["a2"]
    assert line["reason"] == "timeout" and "earlier results stay" in line["message"]
    assert (done / "out" / "a2" / "a2_run.json").is_file()


def test_gate_sets_results_of_before_aside(done, network):
    flat(done, "s1.nii")
    put(done, rows()[:1])
    code = run(done, network, "--qc-gate", "--skip-existing")
    assert code == errors.FAILED
    out = done / "out"
    for held in (outputs.REJECTED, outputs.SUPERSEDED):
        assert (out / held / "a1" / "a1_run.json").is_file()
    assert not (out / "a1").exists()
    assert "superseded/a1" in told(done)[0]["a1"]["message"]


def test_other_weights_and_settings_make_all_disagree(done, network, tmp_path):
    other = proof.make_network(tmp_path / "other.safetensors", key=1)
    assert run(done, str(other)) == errors.FAILED
    assert "other weights" in told(done)[0]["a1"]["message"]
    assert run(done, network, "--affine", "com") == errors.FAILED
    assert "other settings" in told(done)[0]["a1"]["message"]
    before = times(done)
    assert run(done, network, "--overwrite") == 0
    assert all(before[p] != t for p, t in times(done).items())


def test_tables_of_a_run_that_ends_early_count_no_results_of_others(
    done, network, tmp_path
):
    """Neither those of other weights, nor those of other settings."""
    other = str(proof.make_network(tmp_path / "other.safetensors", key=1))
    (done / "s1.nii").write_bytes(b"<html>")

    def end_early(network, *more):
        early = ("--fail-fast", "--workers", "1", "--skip-existing")
        assert run(done, network, *early, *more) in (errors.FAILED, errors.PARTLY)
        summary = json.loads((done / "out" / "batch.json").read_text())
        with open(done / "out" / "batch.csv", newline="") as file:
            table = [row["id"] for row in csv.DictReader(file)]
        assert summary["done"] + summary["failed"] == len(table)
        assert summary["left"] == 3 - len(table)
        return table

    assert end_early(network) == ["a1", "a2", "a3"]
    for case in (end_early(other), end_early(network, "--affine", "com")):
        assert "a1" in case and "a3" not in case  # a2 may have been begun


def stop_at_first(folder, inputs, *args, **options):
    if inputs.case.id == "a1":
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.2)  # the main thread sees it; a3 is not begun yet


def test_signal_finishes_pairs_in_work_and_the_same_command_goes_on(
    folder, network, monkeypatch
):
    with monkeypatch.context() as patch:
        wraps(patch, results, "write", stop_at_first)
        before = signal.getsignal(signal.SIGTERM)
        assert run(folder, network, "--workers", "1") == errors.PREEMPTED
    assert signal.getsignal(signal.SIGTERM) == before
    lines, _ = told(folder)
    assert lines["a1"]["status"] == "ok" and "a3" not in lines
    summary = json.loads((folder / "out" / "batch.json").read_text())
    assert summary["left"] >= 1
    kept = times(folder)
    assert run(folder, network) == 0
    assert times(folder).items() >= kept.items()
    assert told(folder)[1] == 3


TWICE = """
import signal, types
from unireg_jax.verbs import batch
now = 0.0
batch.time = types.SimpleNamespace(monotonic=lambda: now)
with batch._stop_on_signal(True) as stop:
    for now in (5.0, 5.5, 6.0):  # seconds; `timeout` sends two at once
        signal.raise_signal(signal.SIGTERM)
    print(stop.is_set(), flush=True)
    now = 6.1
    signal.raise_signal(signal.SIGTERM)
    print("not reached", flush=True)
"""


def test_second_signal_acts_at_once_but_not_one_of_the_same_request():
    command = [sys.executable, "-c", TWICE]
    ended = subprocess.run(command, cwd=REPO, capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (-signal.SIGTERM, "True\n")


def no_space(*_):
    raise errors.UserError("storage", "no space", errors.STORAGE)


def test_overwrite_that_was_stopped_goes_on(done, network, monkeypatch, capsys):
    def actions():
        capsys.readouterr()
        assert run(done, network, "--overwrite", "--dry-run", "--json") == 0
        rows = json.loads(capsys.readouterr().out)
        return {row["id"]: row["action"] for row in rows}

    first = times(done)
    assert set(actions().values()) == {"replace"}
    with monkeypatch.context() as patch:
        wraps(patch, results, "write", stop_at_first)
        code = run(done, network, "--overwrite", "--workers", "1")
        assert code == errors.PREEMPTED
    redone = {p: t for p, t in times(done).items() if first[p] != t}
    found = actions()
    assert (found["a1"], found["a3"]) == ("keep", "replace")
    kept = {name for name, action in found.items() if action == "keep"}
    assert kept == {p.parent.name for p in redone}
    with monkeypatch.context() as patch:  # what another version made does not stay
        patch.setattr(batch.versions, "version", lambda: "other")
        assert set(actions().values()) == {"replace"}
    journal = done / "out" / "batch.jsonl"
    lines = journal.read_bytes()
    journal.write_bytes(b"")  # begun anew: what the mark says is of another
    assert set(actions().values()) == {"replace"}
    journal.write_bytes(lines)
    with monkeypatch.context() as patch:  # all is done, but the tables
        wraps(patch, batch, "_write_table", no_space)
        assert run(done, network, "--overwrite") == errors.STORAGE
    assert "--overwrite that was stopped" in capsys.readouterr().err
    assert set(actions().values()) == {"keep"}
    assert run(done, network, "--overwrite") == 0
    after = times(done)
    assert after.items() >= redone.items()
    assert all(after[p] != t for p, t in first.items())
    # It came to its end: the next one begins anew.
    assert set(actions().values()) == {"replace"}


def test_killed_again_and_again_every_pair_is_there_once(tmp_path, network):
    kinds = [scans.KINDS[i] for i in (3, 40, 66)]
    expected = proof.make_list(tmp_path, good=9, kinds=kinds, seed=2)
    shutil.copy(network, tmp_path / "tiny.safetensors")
    card = Path(network).with_suffix(".json")
    shutil.copy(card, tmp_path / "tiny.json")
    command = proof.command(tmp_path, "list.csv", tmp_path / "out")
    env = {**os.environ, "UNIREG_CACHE": str(REPO / ".cache" / "batch")}
    killed = proof.kill_often(
        command, tmp_path / "out", pairs=12, kills=1, seed=3, env=env
    )
    final = subprocess.run(command, env=env, cwd=REPO, capture_output=True, text=True)
    assert final.returncode == errors.PARTLY, final.stderr
    assert len(killed) == 1
    assert proof.judge(tmp_path / "out", expected, None) == []


def test_proof_sees_what_it_looks_for(done, network):
    expected = dict.fromkeys(("a1", "a2", "a3"))
    out = done / "out"
    assert proof.judge(out, expected, None) == []
    assert proof.judge(out, expected | {"a2": "empty"}, None)
    path = out / "batch.jsonl"
    lines = path.read_bytes()
    path.write_bytes(lines + lines.splitlines(keepends=True)[0])
    assert "one good line expected, got 2" in proof.judge(out, expected, None)[0]
    path.write_bytes(lines)
    (out / ".unireg-batch-x.tmp").mkdir()
    assert "lies about" in proof.judge(out, expected, None)[0]
    (out / ".unireg-batch-x.tmp").rmdir()
    _damage_result(done)
    assert "not what the journal says" in proof.judge(out, expected, None)[0]


# --- sharing ------------------------------------------------------------------------


def test_second_run_on_one_folder_leaves_at_once(folder, network, capsys):
    (folder / "out").mkdir()
    with lock(folder / "out", ".unireg-batch.lock"):
        assert run(folder, network) == errors.USAGE
        assert run(folder, network, "--num-parts", "2") == errors.USAGE
    assert "another run is writing" in capsys.readouterr().err
    with lock(folder / "out", ".unireg-batch.lock", shared=True):
        assert run(folder, network) == errors.USAGE
    with lock(folder / "out", ".unireg-batch-1-of-2.lock"):
        again = run(folder, network, "--num-parts", "2", "--part-id", "1")
    assert again == errors.USAGE
    assert not list((folder / "out").glob("a*"))


def test_parts_share_the_list_and_a_whole_run_sums_them_up(folder, network):
    parts = [batch._part(row["id"], 2) for row in rows()]
    assert set(parts) == {0, 1}
    (folder / "out").mkdir()
    litter = [".unireg-batch-0-of-2-" + "0" * 32, ".unireg-batch-1-of-2-" + "0" * 32]
    for name in litter:  # of killed runs
        (folder / "out" / f"{name}.tmp").mkdir()
    for part in (0, 1):
        assert run(folder, network, "--num-parts", "2", "--part-id", str(part)) == 0
        lines, _ = told(folder, f"batch-{part}-of-2")
        assert set(lines) == {
            row["id"] for row, p in zip(rows(), parts, strict=True) if p == part
        }
        left = [name for name in litter if (folder / "out" / f"{name}.tmp").exists()]
        assert left == litter[part + 1 :]  # each sweeps its own
    before = times(folder)
    assert run(folder, network) == 0
    assert times(folder) == before
    assert list(told(folder)[0]) == ["a1", "a2", "a3"]


def test_whole_run_sweeps_what_any_killed_run_left(done, network):
    out, some = done / "out", "0" * 32
    held = out / outputs.REJECTED
    litter = [
        *(out / f".unireg-batch-{tag}{some}.tmp" for tag in ("", "2-of-5-")),
        *(held / f".unireg-batch-{tag}{some}.tmp" for tag in ("", "2-of-5-")),
        *(folder / f".unireg-{some}.tmp" for folder in (out, held)),  # of `register`
    ]
    for path in litter:
        path.mkdir(parents=True)
        (path / "a1_warped.nii.gz").write_bytes(b"")
    litter.append(out / f".unireg-{'1' * 32}.tmp")  # of a table
    litter[-1].write_bytes(b"")
    for path in litter:
        os.utime(path, (1, 1))
    young = out / f".unireg-{'2' * 32}.tmp"  # of a `register` at work
    young.mkdir()
    before = times(done)
    assert run(done, network) == 0
    assert list(done.rglob("*.tmp")) == [young]
    assert times(done) == before


def test_a_sweep_leaves_the_only_copy_of_earlier_results(done, network, capsys):
    temp = done / "out" / f".unireg-batch-{'0' * 32}.tmp"
    (temp / "earlier").mkdir(parents=True)
    (temp / "earlier" / "a1_warped.nii.gz").write_bytes(b"the only one")
    assert run(done, network) == 0
    assert (temp / "earlier" / "a1_warped.nii.gz").read_bytes() == b"the only one"
    assert "could not put back" in capsys.readouterr().err


def test_part_sweeps_its_own_alone(done, network):
    held = done / "out" / outputs.REJECTED
    others = {f".unireg-batch-{i}-of-2-{'0' * 32}.tmp" for i in (0, 1)}
    for name in others:
        (held / name).mkdir(parents=True)
    assert run(done, network, "--num-parts", "2", "--part-id", "1") == 0
    assert os.listdir(held) == [f".unireg-batch-0-of-2-{'0' * 32}.tmp"]


def test_part_of_an_id_is_the_same_everywhere():
    assert [batch._part(name, 7) for name in ("a", "b", "p00042")] == [4, 0, 3]


# --- other options ------------------------------------------------------------------


def test_fail_fast_begins_no_further_pair(folder, network):
    put(folder, [rows(moving="absent.nii")[0], *rows()[1:]])
    code = run(folder, network, "--fail-fast", "--workers", "1")
    assert code in (errors.FAILED, errors.PARTLY)  # a2 may have been begun
    lines, _ = told(folder)
    assert lines["a1"]["status"] == "failed" and "a3" not in lines


def test_dry_run_says_all_and_writes_nothing(folder, network, capsys):
    put(folder, [rows(moving="absent.nii")[0], *rows()[1:]])
    assert run(folder, network, "--dry-run", "--json") == errors.PARTLY
    told = json.loads(capsys.readouterr().out)
    assert [row["action"] for row in told] == ["refuse", "register", "register"]
    assert told[0]["reason"] == "not_found"
    assert not (folder / "out").exists()


@pytest.mark.parametrize(
    "fault, reason", [(MemoryError(), "out_of_memory"), (TypeError("x"), "internal")]
)
def test_dry_run_goes_on_after_a_fault_of_ours(
    folder, network, capsys, monkeypatch, fault, reason
):
    read = results.Files.read

    def break_at(files, case):
        if case.id == "a2":
            raise fault
        return read(files, case)

    monkeypatch.setattr(results.Files, "read", break_at)
    assert run(folder, network, "--dry-run", "--json") == errors.PARTLY
    told = json.loads(capsys.readouterr().out)
    assert [row["action"] for row in told] == ["register", "refuse", "register"]
    assert told[1]["reason"] == reason and reason in told[1]["message"]
    assert not (folder / "out").exists()


def test_no_output_names_what_a_link_leads_to(folder, network, capsys):
    """Of versioned data a digest, of pseudonymous ones the patient."""
    (folder / "store").mkdir()
    for i, name in ((1, "DOE_JANE"), (2, "DOE_JACK")):
        (folder / f"s{i}.nii").rename(folder / "store" / name)
        (folder / f"s{i}.nii").symlink_to(folder / "store" / name)
    (folder / "store" / "DOE_JACK").write_bytes(b"x" * 400)
    put(folder, rows()[:2])
    assert run(folder, network, "--dry-run", "--json") == errors.PARTLY
    stdout = capsys.readouterr().out
    assert [row["action"] for row in json.loads(stdout)] == ["register", "refuse"]
    assert run(folder, network, "--html") == errors.PARTLY
    told = capsys.readouterr()
    texts = [p.read_text("latin-1") for p in folder.glob("out/**/*") if p.is_file()]
    texts += [stdout, told.out, told.err]
    assert any("s1.nii" in text for text in texts)
    assert any("s2.nii" in text for text in texts)
    assert not any("DOE" in text for text in texts)


@pytest.mark.parametrize(
    ("more", "code", "match"),
    [
        (["--part-id", "1"], errors.USAGE, "--num-parts minus 1"),
        (["--num-parts", "0"], errors.USAGE, "--num-parts minus 1"),
        (["--workers", "0"], errors.USAGE, "at least 1"),
        (["--timeout", "0"], errors.USAGE, "above 0"),
        (["--io-smoothness", "3"], errors.USAGE, "--io-iterations"),
        (["--skip-existing", "--overwrite"], errors.USAGE, "not allowed with"),
        (["--weights", "absent.safetensors"], errors.CHECKPOINT, "--weights"),
        (["--device", "gpu:99"], errors.USAGE, "device: --device gpu:99"),
        (["--num-parts", "999999", "--part-id", "7"], errors.NOTHING, "no pair falls"),
    ],
)
def test_mistake_is_one_line_and_makes_nothing(
    more, code, match, folder, network, capsys
):
    try:
        got = run(folder, network, *more)
    except SystemExit as stop:
        got = stop.code
    captured = capsys.readouterr()
    assert got == code and match in captured.err and captured.out == ""
    assert len(captured.err.splitlines()) == 1
    assert not (folder / "out").exists()


def test_mistakes_of_the_list_are_found_before_any_work(folder, network, capsys):
    put(folder, rows(taks="lung"))
    assert run(folder, network) == errors.USAGE
    assert "did you mean 'task'" in capsys.readouterr().err
    put(folder, [row | {"id": outputs.SUPERSEDED} for row in rows()[:1]])
    assert run(folder, network) == errors.USAGE
    assert "folders of OUT" in capsys.readouterr().err
    put(folder, rows(moving="absent.nii"))
    assert run(folder, network, "--strict") == errors.USAGE
    (folder / "list.csv").write_text("id,fixed,moving\n")
    assert run(folder, network) == errors.NOTHING
    put(folder, rows())
    without = [
        word for word in words(folder, network) if word not in ("--task", "lung")
    ]
    assert cli.main(without) == errors.USAGE
    assert "a task for every pair expected" in capsys.readouterr().err
    (folder / "out").write_text("a file")
    assert run(folder, network) == errors.USAGE
    assert (folder / "out").read_text() == "a file"


@pytest.mark.parametrize("more", [[], ["--overwrite"], ["--dry-run"]])
@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("batch.csv", []),
        ("failed.csv", []),
        ("batch.json", []),
        ("batch.jsonl", []),
        ("batch-1-of-2.csv", ["--num-parts", "2", "--part-id", "1"]),
    ],
)
def test_list_is_never_replaced(name, part, more, folder, network, capsys):
    """OUT is the list's own folder, by a link."""
    path = folder / name
    put(folder, rows(), name)
    before = path.read_bytes()
    (folder / "out").symlink_to(folder)
    there = set(os.listdir(folder))
    code = run(folder, network, *part, *more, name=name)
    assert code == errors.USAGE
    assert f"got {name} of --out" in capsys.readouterr().err
    assert path.read_bytes() == before and set(os.listdir(folder)) == there


def test_weights_of_another_network_end_the_run(folder, network, monkeypatch, capsys):
    def other(path):
        raise errors.UserError("checkpoint_other", "another network", 9)

    monkeypatch.setattr("unireg_jax.registration.network.load_model", other)
    monkeypatch.setattr("unireg_jax.registration.load_model", other, raising=False)
    assert run(folder, network) == errors.CHECKPOINT
    assert "another network" in capsys.readouterr().err
    assert not list((folder / "out").glob("a*"))


def test_weights_that_another_run_replaces_end_the_run(
    folder, network, tmp_path, monkeypatch, capsys
):
    """Or that are others on another machine: results tell one network's digest."""
    other = proof.make_network(tmp_path / "other.safetensors", key=1)
    mine = Path(shutil.copy(network, tmp_path / "mine.safetensors"))
    shutil.copy(Path(network).with_suffix(".json"), mine.with_suffix(".json"))

    def replace(files, case):
        for ending in (".safetensors", ".json"):
            shutil.copy(other.with_suffix(ending), mine.with_suffix(ending))

    wraps(monkeypatch, results.Files, "read", replace)
    assert run(folder, str(mine), "--workers", "1") == errors.CHECKPOINT
    assert "as this run began with, got" in capsys.readouterr().err
    assert not list((folder / "out").glob("a*"))


def test_device_that_a_worker_does_not_find_is_no_fault_of_a_pair(folder, network):
    """As on a machine of a Ray cluster."""
    args = cli._parse(words(folder, network, "--device", "gpu:99"))
    case = results.Case(**rows()[0] | {"task": "lung", "type": "intra"})
    case = case._replace(fixed=str(folder / "s0.nii"), moving=str(folder / "s1.nii"))
    with pytest.raises(errors.UserError, match="gpu:99") as caught:
        worker.Worker(args, "0" * 64)(case)
    assert (caught.value.reason, caught.value.exit_code) == ("device", errors.USAGE)


def test_one_network_is_compiled_for_all_shapes(folder, network, monkeypatch):
    array, place = proof.body(np.zeros(3))
    (folder / "s2.nii").write_bytes(scans.encode(array[1:, :, 2:], place))
    made = []
    wraps(monkeypatch, pipeline, "compile_register", lambda *a, **k: made.append(a))
    assert run(folder, network) == 0
    assert len(made) == 1


def test_commands_of_the_page_are_accepted():
    text = (REPO / "docs" / "batch.md").read_text().replace("\\\n", " ")
    found = re.findall(r"^unireg batch .*", text, re.MULTILINE)
    assert len(found) >= 2
    for line in found:
        line = line.replace('"$SLURM_ARRAY_TASK_ID"', "3").removesuffix("&")
        args = cli._parse(shlex.split(line)[1:])
        batch._check(args)


class _Cluster:
    """Stands in for Ray and its data: one actor here, which dies of pairs in `deadly`.

    It holds what the real one is asked for, as far as `ray_job` asks.
    """

    ActorPoolStrategy = dict

    def __init__(self):
        self.DataContext, self.deadly, self.asked = self, (), {}

    def get_current(self):
        return self

    def from_items(self, rows, override_num_blocks):
        self.rows = rows
        return self

    def map_batches(self, actor, *, fn_constructor_args, **asked):
        self.actor, self.asked = actor(*fn_constructor_args), asked
        return self

    def iter_rows(self):
        for row in self.rows:
            if json.loads(row["case"])["id"] not in self.deadly:
                made = self.actor({"case": [row["case"]]})
                yield {name: column[0] for name, column in made.items()}


@pytest.fixture
def ray_job(monkeypatch):
    """The module, with a `cluster` in place of Ray."""
    ray = types.ModuleType("ray")
    ray.__spec__ = importlib.machinery.ModuleSpec("ray", None)
    ray.data, ray.is_initialized = _Cluster(), lambda: True
    ray.cluster_resources = dict
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setitem(sys.modules, "ray.data", ray.data)
    name = "unireg_jax.verbs.ray_job"
    spec = importlib.util.find_spec(name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setitem(sys.modules, name, module)
    module.cluster = ray.data
    return module


def test_ray_gets_paths_that_hold_anywhere(tmp_path, monkeypatch, ray_job):
    """Weights of the package go by name: each machine has its own."""
    monkeypatch.chdir(tmp_path)
    for variable in ("UNIREG_WEIGHTS", "UNIREG_SAM"):
        monkeypatch.delenv(variable, raising=False)
    for name in ("mine", "named"):
        (tmp_path / f"{name}.safetensors").write_bytes(b"")
    args = argparse.Namespace(out="out", weights=None)
    found = {"out": str(tmp_path / "out"), "weights": "unireg"}
    assert ray_job.anywhere(args) == found
    # What this process was told by its environment, the actors are not.
    monkeypatch.setenv("UNIREG_WEIGHTS", "named.safetensors")
    assert ray_job.anywhere(args)["weights"] == str(tmp_path / "named.safetensors")
    args.weights = "mine.safetensors"
    assert ray_job.anywhere(args)["weights"] == str(tmp_path / "mine.safetensors")
    args.weights = "unireg_heldout"
    assert ray_job.anywhere(args)["weights"] == "unireg_heldout"
    assert ray_job.environment() == {"UNIREG_SAM": "sam_lite"}
    monkeypatch.setenv("UNIREG_SAM", "mine.safetensors")
    path = str(tmp_path / "mine.safetensors")
    assert ray_job.environment() == {"UNIREG_SAM": path}


def test_results_of_a_pair_whose_actor_died_stay(done, network, monkeypatch, ray_job):
    """It may not have come to them."""
    monkeypatch.delenv("UNIREG_SAM", raising=False)
    ray_job.cluster.deadly = ("a2",)
    before = times(done)
    code = run(done, network, "--ray", "1", "--skip-existing")
    assert code == errors.PARTLY and times(done) == before
    line = told(done)[0]["a2"]
    assert line["reason"] == "worker_died" and "begun" not in line
    assert "earlier results stay in a2" in line["message"]
    environment = ray_job.cluster.asked["runtime_env"]["env_vars"]
    assert environment == {"UNIREG_SAM": "sam_lite"}


@pytest.mark.slow
def test_ray_actors_do_the_same(done, network, tmp_path):
    pytest.importorskip("ray")
    clean = {p.name: p.read_bytes() for p in (done / "out").glob("a?/*1Warp*")}
    shutil.rmtree(done / "out")
    put(done, [*rows(), rows()[0] | {"id": "bad", "moving": "absent.nii"}])
    # In a process of its own: Ray's threads and warnings stay there.
    command = [sys.executable, "-m", "unireg_jax", *words(done, network, "--ray", "2")]
    final = subprocess.run(command, cwd=REPO, capture_output=True, text=True)
    assert final.returncode == errors.PARTLY, final.stderr
    lines, _ = told(done)
    assert lines["bad"]["reason"] == "not_found"
    for name in ("a1", "a2", "a3"):
        field = (done / "out" / name / f"{name}_1Warp.nii.gz").read_bytes()
        assert field == clean[f"{name}_1Warp.nii.gz"]
    assert run(done, network) == errors.PARTLY  # goes on without Ray
    assert told(done)[1] == 5


KEPT = """
import signal
import ray
from unireg_jax.verbs import ray_job
def handle(number, frame): pass
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, handle)
ray_job.start()
found = [signal.getsignal(n) is handle for n in (signal.SIGTERM, signal.SIGINT)]
ray.shutdown()
assert found == [True, True], found
"""


@pytest.mark.slow
def test_ray_leaves_signals_to_the_run():
    pytest.importorskip("ray")
    subprocess.run([sys.executable, "-c", KEPT], cwd=REPO, check=True)


def test_pages_of_results_that_are_there_are_left_to_report(
    done, network, capsys, monkeypatch
):
    listed = done / "the lists"  # the scans lie elsewhere
    listed.mkdir()
    put(
        listed,
        [row | {k: f"../{row[k]}" for k in ("fixed", "moving")} for row in rows()],
    )
    more = ("--html", "--data-root", str(done))
    assert run(done, network, *more, name="the lists/list.csv") == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert "have no page: 3; unireg report" in line
    command = shlex.split(line.partition("; ")[2])
    assert cli.main([*command[1:], "--quiet"]) == 0
    # Once there is an index it takes --overwrite, and pages for all of many pairs.
    (done / "out" / "a1" / outputs.PAGE).unlink()
    monkeypatch.setattr(outputs, "PAGES", 2)
    assert run(done, network, *more, name="the lists/list.csv") == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(" --pages 3 --overwrite")
    assert cli.main([*shlex.split(line.partition("; ")[2])[1:], "--quiet"]) == 0
    assert len(list((done / "out").glob(f"a?/{outputs.PAGE}"))) == 3
    assert run(done, network, "--html") == 0
    assert capsys.readouterr().err == ""


def test_dry_run_tells_of_inverses_that_do_not_fit(
    folder, network, capsys, monkeypatch
):
    def full(*shapes, inverse=False):
        assert inverse
        raise errors.UserError("too_large", "no room", errors.LIMIT)

    monkeypatch.setattr(results.registration, "check_memory", full)
    words = ("--write-inverse", "--dry-run", "--json")
    assert run(folder, network, *words) == errors.FAILED
    found = json.loads(capsys.readouterr().out)
    assert {row["reason"] for row in found} == {"too_large"}


def test_gate_looks_at_results_that_are_there(folder, network, capsys):
    """Made without it; nothing is registered again."""
    flat(folder, "s1.nii")
    put(folder, rows()[:1])
    assert run(folder, network) == 0
    assert told(folder)[0]["a1"]["status"] == "warn"
    before = times(folder)
    gated = ("--qc-gate", "--dry-run", "--json")
    assert run(folder, network, *gated) == errors.FAILED
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["action"], row["reason"]) == ("refuse", "constant")
    assert run(folder, network, "--qc-gate") == errors.FAILED
    line = told(folder)[0]["a1"]
    assert (line["status"], line["reason"]) == ("failed", "constant")
    assert "without --qc-gate" in line["message"] and times(folder) == before
    assert "--overwrite makes them again and holds them back" in line["message"]


def test_mask_of_the_list_says_where_scans_are_compared(folder, network):
    array, place = proof.body(np.zeros(3))
    part = np.zeros(array.shape, "u1")
    part[tuple(slice(n // 3, 2 * n // 3) for n in part.shape)] = 1
    (folder / "m.nii").write_bytes(scans.encode(part, place))
    row = rows()[0]
    put(folder, [row | {"fixed_mask": ""}, row | {"id": "b1", "fixed_mask": "m.nii"}])
    assert run(folder, network) == 0
    whole, masked = (told(folder)[0][name]["qc"] for name in ("a1", "b1"))
    assert whole["ncc_before"] != masked["ncc_before"]


def test_type_of_the_list_then_the_options_then_the_tasks_own(folder, network):
    put(folder, [rows()[0] | {"type": ""}, rows()[1] | {"type": "inter"}])

    def kinds():
        paths = (folder / "out" / n / f"{n}_run.json" for n in ("a1", "a2"))
        return [json.loads(p.read_text())["settings"]["pair_type"] for p in paths]

    assert run(folder, network) == 0 and kinds() == ["intra", "inter"]
    assert run(folder, network, "--type", "inter") == errors.PARTLY
    assert "other settings" in told(folder)[0]["a1"]["message"]
    assert run(folder, network, "--type", "inter", "--skip-existing") == 0
    assert kinds() == ["inter", "inter"]
