"""Made pairs: streams and folders that training reads, with the fields beside them."""

import argparse
import copy
import json
from pathlib import Path

import numpy as np
import pytest

from data_pipeline import fields, generate, loader, store, synthesize, synthetic
from unireg_jax.errors import UserError
from unireg_jax.imaging import nifti
from unireg_jax.imaging.preprocess import PreprocessSpec
from unireg_jax.tasks import TASKS, PairType

# Never cubic: a swapped axis must fail.
SPEC = PreprocessSpec((30, 22, 26), (12.0, 13.0, 12.5))
GRID = ["--shape", "30,22,26", "--spacing", "12,13,12.5"]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Label maps and scans of two phantoms, as NIfTI files with labels.json."""
    root = tmp_path_factory.mktemp("raw")
    made = [
        synthetic.phantom("abdomen", shape=(40, 30, 36), spacing_mm=9.0, seed=s)
        for s in range(2)
    ]
    for i, phantom in enumerate(made):
        for name, array in (("map", phantom.labels), ("ct", phantom.hu)):
            nifti.write_volume(root / f"{name}{i}.nii.gz", array, phantom.vox2world)
    table = {str(i): name for i, name in enumerate(made[0].label_names, 1)}
    (root / "labels.json").write_text(json.dumps(table))
    return root


def _names(root):
    return {
        int(k): v for k, v in json.loads((root / "labels.json").read_text()).items()
    }


def _source(kind, root, task="abdomen", seed=1, known=True):
    if kind == "phantoms":
        return generate.PhantomPairs(task, SPEC, seed=seed, known=known)
    maps = [root / f"map{i}.nii.gz" for i in range(2)]
    if kind == "painted":
        read, names = generate.read_maps(maps, _names(root), SPEC)
        return generate.PaintedPairs(task, SPEC, read, names, seed=seed, known=known)
    scans = [root / f"ct{i}.nii.gz" for i in range(2)]
    read, names = generate.read_scans(scans, SPEC, label_paths=maps, names=_names(root))
    return generate.DeformedPairs(task, SPEC, read, names, seed=seed)


@pytest.mark.parametrize("kind", synthesize.KINDS)
def test_source_element_depends_on_seed_and_number_alone(kind, files):
    first, again = (_source(kind, files)[3] for _ in range(2))
    other, next_seed = _source(kind, files)[5], _source(kind, files, seed=2)[3]
    for scan, same in zip(first[:2], again[:2], strict=True):
        np.testing.assert_array_equal(scan.hu, same.hu)
        np.testing.assert_array_equal(scan.labels, same.labels)
    np.testing.assert_array_equal(first.disp_fm, again.disp_fm)
    for changed in (other, next_seed):
        assert np.mean(first.fixed.hu != changed.fixed.hu) > 0.1


@pytest.mark.parametrize("kind", ("painted", "deformed"))
def test_source_of_another_task_or_vocabulary_is_another(kind, files):
    one, other = (_source(kind, files, task=task) for task in ("abdomen", "chest"))
    assert np.mean(one[3].disp_fm != other[3].disp_fm) > 0.9
    renamed = copy.copy(one)
    renamed.label_names = one.label_names[::-1]
    assert repr(renamed) != repr(one)


@pytest.mark.parametrize("kind", synthesize.KINDS)
def test_source_pair_of_one_anatomy_has_its_field_both_ways(kind, files):
    pair = _source(kind, files)[0]
    for scan in pair[:2]:
        assert scan.hu.shape == scan.labels.shape == SPEC.shape
        assert scan.hu.dtype == np.int16 and scan.labels.dtype == np.uint8
    for there, back in ((pair.disp_fm, pair.disp_mf), (pair.disp_mf, pair.disp_fm)):
        missed = fields.residual_mm(there, back, SPEC.spacing_mm)
        # Linear sampling at voxels of 13 mm.
        assert np.nanmax(missed) < 2.0 and np.nanmean(missed) < 0.2
        assert fields.determinant(there).min() > 0.1
    warped = fields.warp(pair.moving.labels, pair.disp_fm, order=0)
    liver = _names(files)
    liver = {n: i for i, n in liver.items()}["liver"]
    fixed, moved = pair.fixed.labels == liver, warped == liver
    # Twice nearest neighbour at 13 mm.
    assert 2 * (fixed & moved).sum() > 0.8 * (fixed.sum() + moved.sum())


@pytest.mark.parametrize("kind", ("phantoms", "painted"))
def test_source_pair_of_two_subjects_has_no_field(kind, files):
    pair = _source(kind, files, known=False)[0]
    assert pair.disp_fm is None and pair.disp_mf is None
    assert np.mean(pair.fixed.labels != pair.moving.labels) > 0.01


def test_painted_liver_changes_its_contrast(files):
    source = _source("painted", files, task="liver")
    assert all(len({p.fixed.kind, p.moving.kind}) == 2 for p in (source[0], source[1]))


def test_stream_gives_batches_and_resumes(files):
    source = _source("deformed", files, task="chest")
    batches = generate.make_iterator(source, batch_size=2, num_threads=1)
    first, second = next(batches), next(batches)
    assert first.fixed.shape == (2, *SPEC.shape, 1) and first.fixed.dtype == np.int16
    assert first.region.tolist() == 2 * [int(TASKS["chest"].region)]
    assert first.pair_type.tolist() == 2 * [int(PairType.INTER)]
    assert second.pair.tolist() == [2, 3]
    again = generate.make_iterator(source, batch_size=2, num_threads=0)
    again.set_state({"next_index": 1})
    for one, two in zip(second, next(again), strict=True):
        np.testing.assert_array_equal(one, two)
    assert again.get_state() == batches.get_state()
    # Two processes draw together what one would.
    shard = generate.make_iterator(source, batch_size=1, shard=(1, 2), num_threads=0)
    np.testing.assert_array_equal(next(shard).fixed[0], first.fixed[1])
    other = generate.make_iterator(_source("deformed", files, seed=9), batch_size=2)
    with pytest.raises(UserError, match="prepared data: digest"):
        other.set_state(batches.get_state())


def test_stream_rejects_bad_batches(files):
    with pytest.raises(ValueError, match="batch_size must be"):
        generate.make_iterator(_source("phantoms", files), batch_size=0)


@pytest.mark.parametrize(
    ("kind", "task", "options"),
    [
        ("phantoms", "lung", []),
        ("phantoms", "chest", ["--known"]),
        ("painted", "abdomen", []),
        ("painted", "liver", []),
        ("deformed", "abdomen", []),
    ],
)
def test_command_writes_a_folder_that_training_reads(
    kind, task, options, files, tmp_path, capsys
):
    maps, scans = (
        [str(files / f"{n}{i}.nii.gz") for i in (0, 1)] for n in ("map", "ct")
    )
    if kind != "phantoms":
        options = [*options, "--labels", *maps]
    if kind == "deformed":
        options += ["--scans", *scans]
    out = tmp_path / "data"
    arguments = ["--kind", kind, "--task", task, "--count", "2", *GRID, *options]
    assert synthesize.main([*arguments, "--out", str(out)]) == 0
    assert capsys.readouterr().out.strip() == str(out)
    dataset = loader.Dataset(out)
    pairs = dataset.pairs("train")
    known = kind == "deformed" or task != "abdomen"
    # Known: each pair both ways. Else each of four scans with those of the others.
    assert len(pairs) == (4 if known else 12)
    batch = next(loader.make_iterator(dataset, "train", batch_size=1, seed=0))
    assert batch.fixed.shape == (1, *SPEC.shape, 1) and batch.fixed_labels.any()
    assert batch.fixed.min() >= -1000 or kind == "deformed"
    ids = [dataset.index["volumes"][i]["id"] for i in pairs[0][:2]]
    if known:
        there, back = (synthesize.read_field(out, *i) for i in (ids, ids[::-1]))
        missed = fields.residual_mm(there, back, SPEC.spacing_mm)
        assert np.nanmean(missed) < 0.25  # mm; float16 and voxels of 13 mm
    else:
        with pytest.raises(UserError, match="a known field expected"):
            synthesize.read_field(out, *ids)


def test_painted_phantoms_need_no_file(tmp_path):
    maps, names = generate.phantom_maps("headneck", SPEC, count=2, seed=1)
    assert names == synthetic.HEADNECK_LABELS
    assert np.mean(maps[0].labels != maps[1].labels) > 0.001
    options = ["--kind", "painted", "--task", "headneck", "--count", "1", *GRID]
    assert synthesize.main([*options, "--out", str(tmp_path)]) == 0
    dataset = loader.Dataset(tmp_path)
    assert dataset.label_names("headneck") == names
    assert len(dataset.pairs("train")) == 2


def test_command_writes_the_same_files_again(files, tmp_path):
    options = ["--kind", "deformed", "--task", "chest", "--count", "1", *GRID]
    options += ["--scans", str(files / "ct0.nii.gz"), "--out"]
    digests = []
    for name in ("one", "two"):
        assert synthesize.main([*options, str(tmp_path / name)]) == 0
        digests.append(store.index_digest(store.read_index(tmp_path / name)))
    assert digests[0] == digests[1]


def test_command_keeps_every_fourth_pair_for_val(tmp_path):
    options = ["--kind", "phantoms", "--task", "lung", "--count", "4", *GRID]
    assert synthesize.main([*options, "--out", str(tmp_path)]) == 0
    dataset = loader.Dataset(tmp_path)
    assert [len(dataset.pairs(s)) for s in ("train", "val", "test")] == [6, 2, 0]


def test_every_scan_is_used_and_no_field_twice(tmp_path):
    spec = PreprocessSpec((8, 6, 7), (12.0, 13.0, 12.5))
    nothing = np.zeros(spec.shape, np.uint8)
    scans = [generate.Scan(nothing.astype(np.int16) + i, nothing, "") for i in range(8)]
    sources = synthesize._split(
        argparse.Namespace(count=8, seed=3),
        scans,
        lambda some, seed: generate.DeformedPairs("chest", spec, some, seed=seed),
    )
    synthesize.write_pairs(tmp_path, sources, 8)
    index = store.read_index(tmp_path)
    used = {"train": [], "val": []}
    for volume in index["volumes"]:
        source, hu = volume["source"], store.read_array(tmp_path, volume, "image")
        assert source["generated"] == repr(sources[volume["split"]])
        pair = sources[volume["split"]][source["element"]]
        np.testing.assert_array_equal(hu, getattr(pair, source["scan"]).hu)
        if source["scan"] == "moving":
            used[volume["split"]].append(int(hu.max()))
    assert used == {"train": [0, 1, 2, 4, 5, 6], "val": [3, 7]}
    found = {(tmp_path / name).read_bytes() for name in index["fields"].values()}
    assert len(found) == 16


@pytest.mark.parametrize(
    ("command", "options"),
    [
        (synthesize.main, ["--kind", "phantoms", "--task", "lung", "--count", "1"]),
        (synthetic.main, ["--tasks", "lung", "--subjects", "1"]),
    ],
)
def test_command_replaces_made_pairs_alone(command, options, tmp_path, capsys):
    options = [*options, "--out", str(tmp_path), "--shape", "6,5,7", "--spacing", "60"]
    assert [command(options), command(options)] == [0, 0]
    with store.lock(tmp_path):
        assert command(options) == 2
    assert "another run is writing to it" in capsys.readouterr().err
    index = store.read_index(tmp_path)
    index["volumes"][1] |= {"id": "a", "source": {"sha256": {}}}
    store.write_index(tmp_path, index)
    assert command(options) == 2
    assert "prepared scans (a); give another --out" in capsys.readouterr().err
    assert store.read_index(tmp_path) == index


def test_folder_written_anew_keeps_no_array_of_the_pairs_before(tmp_path):
    options = ["--kind", "phantoms", "--task", "chest", "--out", str(tmp_path)]
    options += ["--shape", "6,5,7", "--spacing", "60"]
    counts = []
    for more in (["--count", "2", "--known"], ["--count", "2"], ["--count", "1"]):
        assert synthesize.main([*options, *more]) == 0
        index = store.read_index(tmp_path)
        named = {v[kind] for v in index["volumes"] for kind in v["sha256"]}
        named |= set(index.get("fields", {}).values())
        found = {p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*.npy")}
        assert found == named
        counts.append(len(found))
    # Image and labels of two scans a pair; fields both ways.
    assert counts == [8 + 4, 8, 4]


def test_command_leaves_a_preparation_that_was_stopped(tmp_path, capsys):
    store.make_folders(tmp_path, store.VOLUMES_NAME, store.RECORDS_NAME)
    array = tmp_path / store.VOLUMES_NAME / "a.hu.npy"
    array.write_bytes(b"of hours")
    options = ["--kind", "phantoms", "--task", "lung", "--count", "1", *GRID]
    assert synthesize.main([*options, "--out", str(tmp_path)]) == 2
    assert "got one of prepared scans" in capsys.readouterr().err
    assert array.exists()


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--kind", "phantoms", "--shape", "1"], "--shape: one or three numbers above"),
        (["--kind", "deformed"], "needs --scans"),
        (["--kind", "phantoms", "--scans", "x.nii"], "--scans goes with"),
        (["--kind", "phantoms", "--labels", "x.nii"], "--labels goes with"),
        (["--kind", "painted", "--names", "n.json"], "--names goes with"),
        (["--kind", "phantoms", "--count", "0"], "--count must be"),
        (["--kind", "deformed", "--scans", "a", "--labels", "a", "b"], "as many as"),
    ],
)
def test_command_refuses_bad_usage(options, line, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        synthesize.main(
            ["--task", "chest", "--count", "1", "--out", str(tmp_path), *options]
        )
    assert stop.value.code == 2 and line in capsys.readouterr().err


def test_command_refuses_names_that_do_not_fit(files, tmp_path, capsys):
    common = ["--kind", "painted", "--task", "abdomen", "--count", "1", *GRID]
    common += ["--labels", str(files / "map0.nii.gz"), "--out", str(tmp_path / "out")]
    for text, code, reason in (
        ("[1]", 2, "schema"),
        ('{"70000": "liver"}', 2, "schema"),
        ('{"1": null}', 2, "schema"),
        ('{"0": "background"}', 2, "schema"),
        ('{"99": "liver"}', 4, "label_set"),
        (json.dumps({i: f"n{i}" for i in range(1, 300)}), 2, "label_set"),
    ):
        names = tmp_path / "names.json"
        names.write_text(text)
        assert synthesize.main([*common, "--names", str(names)]) == code
        assert f"error: {reason}" in capsys.readouterr().err
    assert synthesize.main([*common, "--names", str(tmp_path / "none.json")]) == 2
    names.write_text('{"2": ["left lung", "lung"], "1": "liver"}')
    options = argparse.Namespace(labels=[files / "map0.nii.gz"], names=names)
    assert synthesize._read_names(options) == {1: "liver", 2: "left lung"}


def test_command_refuses_a_grid_that_shows_no_organ(tmp_path, capsys):
    labels = np.zeros((40, 30, 36), np.uint8)
    labels[0, 0, 0] = labels[-1, -1, -1] = 1  # between the points of the grid
    nifti.write_volume(tmp_path / "map.nii.gz", labels, np.eye(4))
    (tmp_path / "labels.json").write_text('{"1": "liver"}')
    common = ["--kind", "painted", "--task", "headneck", "--count", "1"]
    common += ["--out", str(tmp_path / "out")]
    maps = ["--labels", str(tmp_path / "map.nii.gz")]
    for options in ([*GRID, *maps], ["--shape", "2", "--spacing", "2"]):
        assert synthesize.main([*common, *options]) == 2
        told = capsys.readouterr().err
        assert told.startswith("error: label_set") and "--shape or --spacing" in told


def test_sources_reject_bad_arguments(files):
    with pytest.raises(ValueError, match="task must be one of"):
        generate.PhantomPairs("heart", SPEC, seed=0, known=True)
    with pytest.raises(ValueError, match="maps must hold"):
        generate.PaintedPairs("abdomen", SPEC, [], (), seed=0, known=True)
    with pytest.raises(ValueError, match="scans must hold"):
        generate.DeformedPairs("abdomen", SPEC, [], seed=0)
    with pytest.raises(ValueError, match="label_paths must be"):
        generate.read_scans(
            [files / "ct0.nii.gz"], SPEC, label_paths=["a", "b"], names={}
        )
    with pytest.raises(ValueError, match="count must be"):
        synthesize.write_pairs("out", {"train": _source("phantoms", files)}, 0)
    twice = dict.fromkeys(("train", "val"), _source("phantoms", files))
    with pytest.raises(ValueError, match="each of its own seed"):
        synthesize.write_pairs("out", twice, 4)


def test_every_command_of_the_docs_is_one_that_is_taken():
    docs = Path(__file__).resolve().parents[2] / "docs" / "made_pairs.md"
    lines = [line.split() for line in docs.read_text().splitlines()]
    kinds = []
    for words in lines:
        if words[:3] == ["python", "-m", "data_pipeline.synthesize"]:
            kinds.append(synthesize._parser().parse_args(words[3:]).kind)
    assert tuple(kinds) == synthesize.KINDS
