"""Preparation: the same patient in any orientation, resumed, faults kept apart."""

import csv
import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from data_pipeline import loader, parallel, prepare, sources, store, synthetic
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
from unireg_jax.imaging import nifti
from unireg_jax.imaging.preprocess import PreprocessSpec
from unireg_jax.tasks import OUTSIDE_HU

SPEC = PreprocessSpec(shape=(18, 16, 14), spacing_mm=(20.0, 21.0, 24.0))
GRID = ["--shape", "18,16,14", "--spacing", "20,21,24"]
RAW = dict(shape=(24, 19, 17), spacing_mm=(16.0, 17.0, 18.0), subjects_per_task=2)


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    """Phantoms as NIfTI: two chest subjects, one scan each."""
    return synthetic.write_nifti(
        tmp_path_factory.mktemp("raw"), tasks=("chest",), **RAW
    )


@pytest.fixture
def scans(raw, tmp_path):
    """Own rows for the raw scans, to be spoilt by a test: absolute paths."""
    with open(raw, newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        for column in ("image", "label", "label_map"):
            row[column] = str(raw.parent / row[column])
    return rows


def _write(folder, rows):
    with open(folder / "m.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    return str(folder / "m.csv")


def _command(raw, rows, tmp_path, *more):
    return prepare.main(
        ["--manifest", _write(tmp_path, rows), "--out", str(tmp_path / "out")]
        + ["--data-root", str(raw.parent), *GRID, *more]
    )


def _prepare(manifest_path, out, **options):
    results = []
    index = prepare.prepare(
        manifest.collect(manifest_path).records,
        out,
        SPEC,
        report=results.append,
        **options,
    )
    return index, [r["status"] for r in results]


def _arrays(out, index):
    return [
        (store.read_array(out, v, "image"), store.read_array(out, v, "labels"))
        for v in index["volumes"]
    ]


def test_prepared_volumes_lie_on_the_network_grid(raw, tmp_path):
    index, statuses = _prepare(raw, tmp_path)
    assert statuses == ["done", "done"]
    assert index == store.read_index(tmp_path)
    assert index["spec"] == SPEC.to_json()
    assert index["tasks"] == {"chest": {"labels": list(synthetic.CHEST_LABELS)}}
    for entry, (hu, labels) in zip(
        index["volumes"], _arrays(tmp_path, index), strict=True
    ):
        assert hu.shape == labels.shape == SPEC.shape
        assert (hu.dtype, labels.dtype) == (np.int16, np.uint8)
        # The grid reaches beyond the scan from head to feet.
        assert (hu == OUTSIDE_HU).any() and hu[hu != OUTSIDE_HU].min() == -1000
        assert not labels[hu == OUTSIDE_HU].any()
        vox2world = np.array(entry["vox2world"])
        np.testing.assert_array_equal(np.diag(vox2world), [20, 21, 24, 1])
        assert entry["source"]["sha256"].keys() == {"image", "labels"}
        assert "/" not in json.dumps(entry["source"])


def test_prepared_labels_follow_the_phantom(raw, tmp_path):
    """Every organ stays where it was in the world."""
    index, _ = _prepare(raw, tmp_path)
    entry = index["volumes"][1]
    labels = store.read_array(tmp_path, entry, "labels")
    source = nifti.read_labels(raw.parent / "labels" / f"{entry['id']}.nii.gz")
    large = [i for i in range(1, 9) if (labels == i).sum() > 12]
    assert len(large) >= 5
    for i in large:
        found = [
            vox2world[:3, :3] @ np.argwhere(data == i).mean(0) + vox2world[:3, 3]
            for data, vox2world in (
                (labels, np.array(entry["vox2world"])),
                (source.data, source.vox2world),
            )
        ]
        np.testing.assert_allclose(*found, atol=12)  # mm, half a voxel of the grid


@pytest.mark.parametrize("codes", ("RAS", "PIR", "SLA"))
def test_storage_orientation_changes_nothing(raw, tmp_path, codes):
    turned = synthetic.write_nifti(
        tmp_path / "raw", tasks=("chest",), codes=codes, **RAW
    )
    stored = nifti.read_image(tmp_path / "raw/images/chest_000_scan.nii.gz")
    assert stored.native.shape != stored.data.shape or codes == "RAS"
    expected, found = (
        _prepare(path, tmp_path / name)[0]
        for path, name in ((raw, "plain"), (turned, "turned"))
    )
    plain, other = (
        _arrays(tmp_path / "plain", expected),
        _arrays(tmp_path / "turned", found),
    )
    for (hu, labels), (hu2, labels2) in zip(plain, other, strict=True):
        # Affines are stored in float32: interpolation differs in the last digit.
        assert np.abs(hu.astype(int) - hu2).max() <= 1
        assert np.mean(labels != labels2) < 1e-3
    for a, b in zip(expected["volumes"], found["volumes"], strict=True):
        np.testing.assert_allclose(a["vox2world"], b["vox2world"], atol=1e-3)


def test_second_run_does_nothing(raw, tmp_path):
    first, _ = _prepare(raw, tmp_path)
    written = {p: p.stat().st_mtime_ns for p in (tmp_path / "volumes").iterdir()}
    second, statuses = _prepare(raw, tmp_path)
    assert statuses == ["skipped", "skipped"]
    assert second == first
    assert {p: p.stat().st_mtime_ns for p in written} == written
    assert not list(tmp_path.rglob("*.tmp"))


def _other_spec(out, rows):
    return SPEC.__class__(shape=SPEC.shape, spacing_mm=(20, 21, 25))


def _torn_array(out, rows):
    path = out / "volumes" / f"{rows[0]['id']}.labels.npy"
    path.write_bytes(path.read_bytes()[:-9])


def _missing_array(out, rows):
    (out / "volumes" / f"{rows[0]['id']}.hu.npy").unlink()


def _spoilt_record(out, rows):
    (out / "records" / f"{rows[0]['id']}.json").write_text("{")


def _other_source(out, rows):
    rows[0]["image"], rows[0]["label"] = rows[1]["image"], rows[1]["label"]


def _other_map(out, rows):
    table = out.parent / "raw.json"
    table.write_text('{"1": "aorta", "3": "heart"}')
    rows[0]["label_map"] = str(table)


def _older_code(out, rows):
    path = out / "records" / f"{rows[0]['id']}.json"
    record = json.loads(path.read_text())
    record["source"]["code"] = 1
    path.write_text(json.dumps(record))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (_older_code, ["done", "skipped"]),
        (_other_spec, ["done", "done"]),
        (_torn_array, ["done", "skipped"]),
        (_missing_array, ["done", "skipped"]),
        (_spoilt_record, ["done", "skipped"]),
        (_other_source, ["done", "skipped"]),
        (_other_map, ["done", "skipped"]),
    ],
)
def test_what_changed_is_made_again(raw, scans, tmp_path, change, expected):
    out = tmp_path / "out"
    roots = [raw.parent]
    records = manifest.collect(_write(tmp_path, scans), roots=roots).records
    prepare.prepare(records, out, SPEC)
    spec = change(out, scans) or SPEC
    records = manifest.collect(_write(tmp_path, scans), roots=roots).records
    results = []
    index = prepare.prepare(records, out, spec, report=results.append)
    assert [r["status"] for r in results] == expected
    _arrays(out, index)  # digests agree


def test_changed_split_needs_no_new_arrays(raw, scans, tmp_path):
    assert _command(raw, scans, tmp_path) == 0
    scans[1]["split"] = "val"
    assert _command(raw, scans, tmp_path) == 0
    index = store.read_index(tmp_path / "out")
    assert [v["split"] for v in index["volumes"]] == ["train", "val"]


def test_bad_scans_are_reported_and_the_others_done(raw, scans, tmp_path, capsys):
    plain = nifti.read_labels(scans[0]["label"])
    shifted = tmp_path / "shifted.nii.gz"
    moved = plain.vox2world.copy()
    moved[0, 3] += 3
    nifti.write_volume(shifted, plain.data, moved)
    (tmp_path / "torn.nii.gz").write_bytes(
        (raw.parent / "images/chest_000_scan.nii.gz").read_bytes()[:-500]
    )
    rows = [
        scans[0],
        dict(scans[0], id="torn", image="torn.nii.gz", subject="s3"),
        dict(scans[0], id="absent", image="absent.nii.gz", subject="s4"),
        dict(scans[0], id="shifted", label="shifted.nii.gz", subject="s5"),
        scans[1],
    ]
    assert _command(raw, rows, tmp_path) == PARTLY
    told = capsys.readouterr().err
    for says in (
        "failed: torn (truncated): ",
        "failed: absent (not_found): ",
        "failed: shifted (grid_mismatch): ",
        "2 of 5 scans prepared",
    ):
        assert says in told
    assert "Traceback" not in told
    index = store.read_index(tmp_path / "out")
    assert [v["id"] for v in index["volumes"]] == [scans[0]["id"], scans[1]["id"]]
    assert [f["reason"] for f in index["failed"]] == [
        "truncated",
        "not_found",
        "grid_mismatch",
    ]
    assert not list((tmp_path / "out" / "volumes").glob("torn*"))
    assert len(loader.Dataset(tmp_path / "out").pairs("train")) == 2


def test_exit_codes(raw, scans, tmp_path, capsys):
    absent = [dict(row, image="absent.nii.gz") for row in scans]
    assert _command(raw, absent, tmp_path) == FAILED
    assert not (tmp_path / "out" / "index.json").exists()
    assert _command(raw, absent, tmp_path, "--strict") == USAGE
    assert _command(raw, [dict(scans[0], task="knee")], tmp_path) == USAGE
    assert "task 'knee'" in capsys.readouterr().err
    (tmp_path / "e.csv").write_text("id,image,task,subject,split\n")
    empty = ["--manifest", str(tmp_path / "e.csv"), "--out", str(tmp_path / "out")]
    assert prepare.main(empty) == NOTHING
    (tmp_path / "file").write_text("")
    taken = ["--manifest", str(raw), "--out", str(tmp_path / "file")]
    assert prepare.main(taken) == USAGE
    for bad in (["--shape", "1,2"], ["--spacing", "0"], ["--shape", "a"]):
        with pytest.raises(SystemExit) as stop:
            prepare.main([*taken, *bad])
        assert stop.value.code == USAGE


def test_full_disk_stops_the_run(raw, tmp_path, monkeypatch, capsys):
    def full(*_):
        raise UserError("storage", "no space left", STORAGE)

    monkeypatch.setattr(store, "write_atomic", full)
    options = ["--manifest", str(raw), "--out", str(tmp_path), *GRID]
    assert prepare.main(options) == STORAGE
    assert "no space left" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("module", "name"), [(store, "file_sha256"), (nifti, "_load_stream")]
)
def test_a_scan_that_the_disk_refuses_costs_no_other(
    raw, scans, tmp_path, monkeypatch, module, name
):
    plain = getattr(module, name)

    def refuse(*args):
        if scans[0]["image"] in map(str, args):
            raise OSError(errno.EIO, "Input/output error")
        return plain(*args)

    monkeypatch.setattr(module, name, refuse)
    assert _command(raw, scans, tmp_path) == PARTLY
    index = store.read_index(tmp_path / "out")
    assert [v["id"] for v in index["volumes"]] == [scans[1]["id"]]
    (failed,) = index["failed"]
    assert (failed["id"], failed["reason"]) == (scans[0]["id"], "storage")
    assert "Input/output error" in failed["message"]
    monkeypatch.undo()
    assert _command(raw, scans, tmp_path) == 0
    # Prepared by now: a share that goes away takes nothing out of the index.
    monkeypatch.setattr(module, name, refuse)
    assert _command(raw, scans, tmp_path) == (PARTLY if name == "file_sha256" else 0)
    index = store.read_index(tmp_path / "out")
    assert [v["id"] for v in index["volumes"]] == [scan["id"] for scan in scans]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a file that is full")
@pytest.mark.parametrize("name", ["check", "prepare", "preview"])
def test_exit_code_is_the_same_where_the_line_cannot_be_written(name, tmp_path):
    command = [sys.executable, "-m", f"data_pipeline.{name}", "--manifest", "absent"]
    if name != "check":
        command += ["--out", str(tmp_path / "out")]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stderr=full, check=False)
    assert done.returncode == USAGE


def test_second_run_on_one_folder_is_refused(raw, tmp_path):
    _prepare(raw, tmp_path)
    with open(tmp_path / ".lock") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert prepare.main(["--manifest", str(raw), "--out", str(tmp_path)]) == USAGE
    assert _prepare(raw, tmp_path)[1] == ["skipped", "skipped"]


def test_interrupted_run_goes_on(raw, tmp_path, monkeypatch, capsys):
    plain = prepare.prepare_volume

    def interrupted(job):
        if job.record.id.startswith("chest_001"):
            raise KeyboardInterrupt
        return plain(job)

    options = ["--manifest", str(raw), "--out", str(tmp_path), *GRID]
    monkeypatch.setattr(prepare, "prepare_volume", interrupted)
    assert prepare.main(options) == PREEMPTED
    assert "run the same command to go on" in capsys.readouterr().err
    # No index of a part of the data: it would train on less without a word.
    assert not (tmp_path / "index.json").exists()
    monkeypatch.setattr(prepare, "prepare_volume", plain)
    assert _prepare(raw, tmp_path)[1] == ["skipped", "done"]


def test_leftovers_of_killed_runs_are_swept(raw, tmp_path):
    (tmp_path / "volumes").mkdir()
    litter = tmp_path / "volumes" / ".unireg-0.tmp"
    litter.write_bytes(b"half")
    _prepare(raw, tmp_path)
    assert not litter.exists()


def test_workers_give_the_same_as_one_process(raw, tmp_path):
    one, _ = _prepare(raw, tmp_path / "one")
    two, statuses = _prepare(raw, tmp_path / "two", workers=2)
    assert statuses == ["done", "done"]
    assert one == two


class _Deadly(str):
    """Kills the process that unpickles it."""

    def __reduce__(self):
        return os._exit, (9,)


@pytest.mark.slow
def test_killed_worker_is_named_and_the_others_done(raw, tmp_path):
    names = synthetic.CHEST_LABELS
    store.make_folders(tmp_path, "volumes", "records")
    good = [
        prepare.Job(r, str(tmp_path), SPEC, names)
        for r in manifest.collect(raw).records
    ]
    bad = good[0]._replace(root=_Deadly(tmp_path))
    jobs = [good[0], bad, good[1]]
    results = list(parallel.run(prepare._guarded, jobs, 2, died=prepare._died))
    # A scan whose result was lost with the pool is found on disk: "skipped".
    assert len(results) == 3
    assert {r["status"] for r in results} <= {"done", "skipped", "failed"}
    assert [r["reason"] for r in results if r["status"] == "failed"] == ["worker_died"]


@pytest.mark.slow
def test_sigterm_ends_the_command_in_order(raw, tmp_path):
    command = [sys.executable, "-m", "data_pipeline.prepare", "--workers", "2", *GRID]
    process = subprocess.Popen(
        [*command, "--manifest", str(raw), "--out", str(tmp_path)],
        stderr=subprocess.PIPE,
        text=True,
    )
    while not (tmp_path / ".lock").exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, told = process.communicate(timeout=60)
    assert process.returncode == PREEMPTED
    assert "run the same command to go on" in told


def test_labels_are_compacted_by_name():
    record = manifest.Record(
        "a",
        "a.nii",
        "l.nii",
        ((2, "Left"), (9, "Right"), (40, "Left")),
        "chest",
        "s",
        "",
    )
    raw_ids = np.array([[[0, 2, 9, 40, 7, 255]]], np.uint8)
    names = ("Brain", "Left", "Right")
    compact = sources.map_layers(raw_ids, record, names)
    assert compact.dtype == np.uint8
    np.testing.assert_array_equal(compact, [[[[0, 2, 3, 2, 0, 0]]]])
    wide = sources.map_layers(raw_ids.astype(np.uint16) * 20, record, names)
    np.testing.assert_array_equal(wide, [[[[0, 2, 0, 0, 0, 0]]]])
    with pytest.raises(ValueError, match="must be uint8 or uint16"):
        sources.map_layers(raw_ids.astype(np.int32), record, names)


def test_vocabulary_joins_cohorts_by_name(raw, scans, tmp_path):
    """A second cohort with other ids for the same names gets the same compact ids."""
    labels = nifti.read_labels(scans[1]["label"])
    nifti.write_volume(
        tmp_path / "l.nii.gz",
        np.where(labels.data == 3, 77, 0).astype(np.uint8),
        labels.vox2world,
    )
    (tmp_path / "map.json").write_text('{"77": "heart"}')
    rows = [scans[0], dict(scans[1], label="l.nii.gz", label_map="map.json")]
    assert _command(raw, rows, tmp_path) == 0
    out = tmp_path / "out"
    index = store.read_index(out)
    (_, first), (_, second) = _arrays(out, index)
    heart = index["tasks"]["chest"]["labels"].index("heart") + 1
    assert set(np.unique(second)) == {0, heart}
    assert len(np.unique(first)) == 9


def test_scans_without_labels_and_warnings(raw, scans, tmp_path, capsys):
    (tmp_path / "map.json").write_text('{"200": "heart"}')
    rows = [
        {k: v for k, v in scans[0].items() if not k.startswith("label")},
        dict(scans[1], task="lung", label_map=str(tmp_path / "map.json")),
    ]
    rows = [{**dict.fromkeys(scans[0], ""), **row} for row in rows]
    assert _command(raw, rows, tmp_path) == 0
    told = capsys.readouterr().err
    assert f"warning: {rows[1]['id']}: label_set: no structure" in told
    assert "warning: chest: split train has scans but no pair" in told
    assert "warning: lung: split train has scans but no pair" in told
    index = store.read_index(tmp_path / "out")
    assert index["volumes"][0]["labels"] is None
    assert _command(raw, rows, tmp_path) == 0
    assert "label_set: no structure" in capsys.readouterr().err  # kept in the record


def test_allowed_leak_reaches_the_pairs(raw, scans, tmp_path):
    scans[1].update(subject=scans[0]["subject"], split="val")
    assert _command(raw, scans, tmp_path) == USAGE
    assert _command(raw, scans, tmp_path, "--allow-leak") == 0
    assert loader.Dataset(tmp_path / "out").pairs("val") == []


def test_real_scans_become_pairs(data_root, tmp_path):
    """Two head-neck patients with seven organs, one lung at two breath holds."""
    rows = [["id", "image", "label", "label_map", "task", "subject", "split"]]
    for name in ("case_0004", "case_0013"):
        files = [f"headneck_openkbp/{f}/{name}.nii.gz" for f in ("images", "labels")]
        files = [str(data_root / f) for f in (*files, "headneck_openkbp/labels.json")]
        rows.append([name, *files, "headneck", name, "train"])
    for name in ("baseline", "followup"):
        image = str(data_root / f"lung_elastix/{name}.nii.gz")
        rows.append([name, image, "", "", "lung", "one", "train"])
    with open(tmp_path / "m.csv", "w", newline="") as file:
        csv.writer(file).writerows(rows)
    options = ["--manifest", str(tmp_path / "m.csv"), "--out", str(tmp_path / "out")]
    options += ["--data-root", str(data_root), "--shape", "48,40,44", "--spacing", "8"]
    assert prepare.main(options) == 0
    dataset = loader.Dataset(tmp_path / "out")
    assert dataset.label_names("headneck") == synthetic.HEADNECK_LABELS
    batches = list(loader.make_eval_batches(dataset, "train"))
    assert [pair.task for pair, _ in batches] == 2 * ["headneck"] + 2 * ["lung"]
    for pair, batch in batches:
        scan = batch.fixed[batch.fixed != OUTSIDE_HU]
        assert np.mean((scan > -200) & (scan < 300)) > 0.1
        if pair.task == "headneck":
            assert set(range(1, 8)) <= set(np.unique(batch.fixed_labels))
        else:
            # Centred on the body, the two grids differ; the world does not.
            place = np.array(pair.align)[:3, 3]
            assert 0.1 < np.abs(place).max() < 20
