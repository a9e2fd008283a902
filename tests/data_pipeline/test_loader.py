"""The stream: determined by (seed, step), weighted exactly, resumed exactly."""

import collections
import io
import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import grain
import numpy as np
import pytest

from data_pipeline import loader, store
from data_pipeline.pairs import Pair
from unireg_jax.errors import DATA_CHANGED, NOTHING, STORAGE, USAGE, UserError
from unireg_jax.tasks import OUTSIDE_HU, TASKS, PairType, Region

SHAPE = (12, 10, 8)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Noise for scans: per task 3 subjects to train on and 2 to judge on."""
    folder = tmp_path_factory.mktemp("prepared")
    rng = np.random.default_rng(0)
    volumes = []
    for task, subject in itertools.product(TASKS, range(5)):
        for phase in range(1 + (TASKS[task].pair_type == PairType.INTRA)):
            name = f"{task}{subject}{phase}"
            hu = rng.integers(-1000, 1000, SHAPE, np.int16)
            labels = rng.integers(0, 4, SHAPE, np.uint8)
            volumes.append(
                {
                    "id": name,
                    "task": task,
                    "subject": f"{task}{subject}",
                    "split": "train" if subject < 3 else "val",
                    "vox2world": np.diag([4.0, 5.0, 6.0, 1.0]).tolist(),
                    **store.write_volume(folder, name, hu, labels),
                }
            )
    tasks = {task: {"labels": ["a", "b", "c"]} for task in TASKS}
    spec = {"shape": list(SHAPE)}
    index = {"version": 1, "spec": spec, "tasks": tasks, "volumes": volumes}
    store.write_index(folder, index)
    return folder


@pytest.fixture
def copy(root, tmp_path):
    return shutil.copytree(root, tmp_path / "copy")


def _numbers(iterator, count):
    return [next(iterator).pair.tolist() for _ in range(count)]


def _stream(root, count=10, **options):
    options = {"batch_size": 2, "seed": 3, **options}
    iterator = loader.make_iterator(root, "train", **options)
    try:
        return _numbers(iterator, count)
    finally:
        iterator.close()


def test_batch_has_the_agreed_arrays(root):
    dataset = loader.Dataset(root)
    iterator = loader.make_iterator(dataset, "train", batch_size=3, seed=0, shape=SHAPE)
    batch = next(iterator)
    assert {k: (v.shape, v.dtype.name) for k, v in batch._asdict().items()} == {
        "fixed": ((3, *SHAPE, 1), "int16"),
        "moving": ((3, *SHAPE, 1), "int16"),
        "fixed_labels": ((3, *SHAPE), "uint8"),
        "moving_labels": ((3, *SHAPE), "uint8"),
        "fixed_more": ((3, 0, *SHAPE), "uint8"),
        "moving_more": ((3, 0, *SHAPE), "uint8"),
        "align": ((3, 4, 4), "float32"),
        "region": ((3,), "int32"),
        "pair_type": ((3,), "int32"),
        "pair": ((3,), "int32"),
    }
    pairs = dataset.pairs("train")
    for i, number in enumerate(batch.pair):
        pair = pairs[number]
        hu, labels, _ = dataset.volume(pair.moving)
        np.testing.assert_array_equal(batch.moving[i, ..., 0], hu)
        np.testing.assert_array_equal(batch.moving_labels[i], labels)
        np.testing.assert_array_equal(
            batch.fixed[i, ..., 0], dataset.volume(pair[0])[0]
        )
        np.testing.assert_array_equal(batch.align[i], np.float32(pair.align))
        assert (batch.region[i], batch.pair_type[i]) == (pair.region, pair.pair_type)


def test_stream_is_a_function_of_the_seed(root):
    assert _stream(root) == _stream(root)
    assert _stream(root) != _stream(root, seed=4)


def test_stream_does_not_depend_on_threads(root):
    assert _stream(root, num_threads=0) == _stream(root, num_threads=7)


def test_neighbouring_seeds_do_not_share_permutations(root):
    """As they would with grain's shuffle, which takes seed + e for epoch e."""
    one = dict(weights={"headneck": 1}, batch_size=1)
    size = sum(p.task == "headneck" for p in loader.Dataset(root).pairs("train"))
    first, second = (_stream(root, 6 * size, seed=s, **one) for s in (10, 11))
    assert first[size : 5 * size] != second[: 4 * size]


def test_epochs_are_permutations_and_differ(root):
    positions = [
        i for i, p in enumerate(loader.Dataset(root).pairs("train")) if p.task == "lung"
    ]
    assert len(positions) == 6
    drawn = _stream(root, 6 * 12, weights={"lung": 2.5}, batch_size=1)
    epochs = [tuple(n for (n,) in drawn[i : i + 6]) for i in range(0, len(drawn), 6)]
    assert all(sorted(epoch) == positions for epoch in epochs)
    assert len(set(epochs)) > 6


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        (None, dict.fromkeys(TASKS, 60)),
        ({"headneck": 3, "lung": 7}, {"headneck": 90, "lung": 210}),
        (
            {"liver": 0.1, "chest": 0.2, "abdomen": 0.3, "headneck": 0.4, "lung": 0},
            {"liver": 30, "chest": 60, "abdomen": 90, "headneck": 120},
        ),
    ],
)
def test_stream_interleaves_tasks_in_exact_counts(root, weights, expected):
    pairs = loader.Dataset(root).pairs("train")
    drawn = [pairs[n].task for b in _stream(root, 150, weights=weights) for n in b]
    assert collections.Counter(drawn) == expected
    # Evenly spread: no window of the pattern is short of a task.
    share = {task: n / 300 for task, n in expected.items()}
    for start in range(0, 250, 25):
        seen = collections.Counter(drawn[start : start + 50])
        assert all(abs(seen[t] - 50 * s) <= 2 for t, s in share.items())


def test_shards_together_are_the_whole_stream(root):
    whole = _stream(root, 6, batch_size=4)
    parts = [_stream(root, 6, batch_size=2, shard=(i, 2)) for i in range(2)]
    for batch, *shards in zip(whole, *parts, strict=True):
        assert batch == [n for both in zip(*shards, strict=True) for n in both]


def test_shard_knows_the_pairs_of_all(root):
    parts = [
        loader.make_iterator(root, "train", batch_size=2, seed=1, shard=(i, 2))
        for i in range(2)
    ]
    parts[0].set_state({"next_index": 3})
    parts[1].set_state({"next_index": 3})
    for _ in range(4):
        drawn = [next(part).pair.tolist() for part in parts]
        expected = [n for both in zip(*drawn, strict=True) for n in both]
        assert [part.last_pairs() for part in parts] == [expected, expected]


def test_resume_equals_uninterrupted(root):
    options = dict(batch_size=2, seed=9, weights={"chest": 1, "liver": 2})
    first = loader.make_iterator(root, "train", **options)
    _numbers(first, 7)
    state = json.loads(json.dumps(first.get_state()))
    rest = _numbers(first, 9)
    again = loader.make_iterator(root, "train", num_threads=1, **options)
    _numbers(again, 3)
    again.set_state(state)
    assert _numbers(again, 9) == rest
    assert again.get_state() == first.get_state()
    # The position is the step: a state can be made from it.
    third = loader.make_iterator(root, "train", **options)
    third.set_state({"next_index": 7})
    assert _numbers(third, 9) == rest


def test_resume_through_orbax_equals_uninterrupted(root, tmp_path):
    import orbax.checkpoint as ocp

    options = dict(batch_size=1, seed=2)
    first = loader.make_iterator(root, "train", **options)
    _numbers(first, 4)
    with ocp.CheckpointManager(tmp_path / "checkpoints") as manager:
        saved = ocp.args.Composite(
            data=grain.checkpoint.CheckpointSave(first),
            state=ocp.args.StandardSave({"x": np.arange(3.0)}),
        )
        manager.save(4, args=saved)
        manager.wait_until_finished()
        rest = _numbers(first, 5)
        second = loader.make_iterator(root, "train", **options)
        restored = ocp.args.Composite(data=grain.checkpoint.CheckpointRestore(second))
        again = manager.restore(4, args=restored)["data"]
    assert _numbers(again, 5) == rest


def test_resume_with_more_processes_continues_the_stream(root):
    first = loader.make_iterator(root, "train", batch_size=4, seed=1)
    _numbers(first, 3)
    state = first.get_state()
    rest = _numbers(first, 2)
    parts = []
    for i in range(2):
        shard = loader.make_iterator(root, "train", batch_size=2, seed=1, shard=(i, 2))
        shard.set_state(state)
        parts.append(_numbers(shard, 2))
    joined = [
        [n for both in zip(*shards, strict=True) for n in both]
        for shards in zip(*parts, strict=True)
    ]
    assert joined == rest


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"seed": 8}, "seed 7 then, 8 now"),
        ({"batch_size": 3}, "global_batch_size 2 then, 3 now"),
        ({"weights": {"lung": 1}}, "weights .* then, {'lung': 1} now"),
    ],
)
def test_resume_with_other_settings_is_refused(root, change, match):
    options = dict(batch_size=2, seed=7)
    state = loader.make_iterator(root, "train", **options).get_state()
    other = loader.make_iterator(root, "train", **{**options, **change})
    with pytest.raises(UserError, match=match) as caught:
        other.set_state(state)
    assert caught.value.exit_code == USAGE


def test_resume_on_other_data_is_refused(root, copy):
    state = loader.make_iterator(root, "train", batch_size=1, seed=0).get_state()
    index = store.read_index(copy)
    pair = f"{index['volumes'][0]['id']}|{index['volumes'][1]['id']}"
    store.write_json(copy / "align.json", {pair: np.diag([1, 1, 1.1, 1]).tolist()})
    other = loader.make_iterator(copy, "train", batch_size=1, seed=0)
    with pytest.raises(UserError, match="when the run began") as caught:
        other.set_state(state)
    assert caught.value.exit_code == DATA_CHANGED


def test_prepared_alignments_reach_the_batch(copy):
    dataset = loader.Dataset(copy)
    pair = dataset.pairs("val")[0]
    ids = [dataset.index["volumes"][i]["id"] for i in (pair.fixed, pair.moving)]
    matrix = np.diag([1.0, 1.1, 0.9, 1.0])
    store.write_json(copy / "align.json", {"|".join(ids): matrix.tolist()})
    _, batch = next(loader.make_eval_batches(copy, "val"))
    np.testing.assert_array_equal(batch.align[0], np.float32(matrix))


@pytest.mark.parametrize("num_threads", (0, 4))
def test_changed_volume_is_refused(copy, num_threads):
    index = store.read_index(copy)
    entry = next(v for v in index["volumes"] if v["task"] == "chest")
    path = copy / entry["image"]
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    iterator = loader.make_iterator(
        copy,
        "train",
        batch_size=1,
        seed=0,
        weights={"chest": 1},
        num_threads=num_threads,
    )
    with pytest.raises(UserError, match="changed since it was prepared") as caught:
        _numbers(iterator, 30)
    assert (caught.value.exit_code, caught.value.reason) == (DATA_CHANGED, "checksum")
    assert entry["id"] in str(caught.value)


def test_removed_volume_is_refused(copy):
    index = store.read_index(copy)
    (copy / index["volumes"][0]["labels"]).unlink()
    with pytest.raises(UserError, match="is gone") as caught:
        loader.Dataset(copy).volume(0)
    assert caught.value.exit_code == DATA_CHANGED


def _damage(copy, ids):
    for entry in store.read_index(copy)["volumes"]:
        if entry["id"] in ids:
            path = copy / entry["image"]
            content = bytearray(path.read_bytes())
            content[-1] ^= 1
            path.write_bytes(content)


def test_bad_volume_is_skipped_by_the_next_of_the_order(root, copy, capsys):
    """The order stays a function of (seed, step) and of which volumes are bad."""
    whole = list(itertools.chain.from_iterable(_stream(root, 40)))
    assert _stream(root, 40, on_fault="skip") == _stream(root, 40)
    _damage(copy, ["chest10"])
    pairs = loader.Dataset(root).pairs("train")
    names = [v["id"] for v in store.read_index(root)["volumes"]]

    def bad(position):
        pair = pairs[position]
        return "chest10" in (names[pair.fixed], names[pair.moving])

    streams = [
        list(
            itertools.chain.from_iterable(
                _stream(copy, 40, on_fault="skip", num_threads=n)
            )
        )
        for n in (0, 4)
    ]
    assert streams[0] == streams[1]
    assert any(map(bad, whole)) and not any(map(bad, streams[0]))
    for k, (given, meant) in enumerate(zip(streams[0], whole, strict=True)):
        if not bad(meant):
            assert given == meant
        elif after := [p for p in whole[k:] if not bad(p)]:
            assert given == after[0]
    lines = [x for x in capsys.readouterr().err.splitlines() if "skipped" in x]
    assert len(lines) == 2 and all("chest10" in line for line in lines)  # per stream


def test_too_many_bad_volumes_end_the_stream(copy):
    """Of 35 volumes one may be skipped."""
    _damage(copy, ["chest00", "headneck20"])
    with pytest.raises(UserError, match="2 volumes at fault, at most 1") as caught:
        _stream(copy, 60, on_fault="skip")
    assert caught.value.exit_code == DATA_CHANGED


def test_index_that_lies_about_the_shape_is_refused(copy):
    index = store.read_index(copy)
    index["spec"]["shape"] = [8, 10, 12]
    store.write_index(copy, index)
    with pytest.raises(UserError, match="int16 and uint8 of") as caught:
        loader.Dataset(copy).volume(0)
    assert caught.value.exit_code == DATA_CHANGED


@pytest.mark.parametrize(
    ("options", "reason", "exit_code"),
    [
        (dict(weights={"knee": 1}), "task_unknown", USAGE),
        (dict(weights={"lung": -1}), "schema", USAGE),
        (dict(weights={"lung": float("nan")}), "schema", USAGE),
        (dict(weights={"lung": True}), "schema", USAGE),
        (dict(weights={"lung": 0}), "schema", NOTHING),
        (dict(weights={}), "schema", NOTHING),
        (dict(split="test"), "schema", NOTHING),
        (dict(split="train", shape=(10, 12, 8)), "grid_mismatch", USAGE),
    ],
)
def test_make_iterator_refuses(root, options, reason, exit_code):
    options = {"split": "train", "batch_size": 1, "seed": 0, **options}
    with pytest.raises(UserError) as caught:
        loader.make_iterator(root, **options)
    assert (caught.value.reason, caught.value.exit_code) == (reason, exit_code)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (dict(batch_size=0), "batch_size must be at least 1 and shard"),
        (dict(shard=(2, 2)), "batch_size must be at least 1 and shard"),
        (dict(on_fault="drop"), "on_fault must be one of"),
    ],
)
def test_make_iterator_rejects_bad_arguments(root, options, match):
    with pytest.raises(ValueError, match=match):
        loader.make_iterator(root, "train", **{"batch_size": 1, "seed": 0, **options})


def test_unprepared_folder_is_refused(tmp_path):
    with pytest.raises(UserError, match="no prepared data") as caught:
        loader.Dataset(tmp_path)
    assert caught.value.exit_code == NOTHING


@pytest.mark.parametrize("name", ["index.json", "align.json", "align_kinds.json"])
def test_what_may_not_be_read_is_one_line(copy, monkeypatch, name):
    """Of a colleague's folder; by hand, since root reads everything."""
    read = Path.read_text

    def read_text(path, *args, **kwargs):
        if path.name == name:
            raise PermissionError(13, "Permission denied", str(path))
        return read(path, *args, **kwargs)

    monkeypatch.setattr(Path, "read_text", read_text)
    with pytest.raises(UserError, match=f"{name}: Permission denied") as caught:
        loader.Dataset(copy)
    assert (caught.value.reason, caught.value.exit_code) == ("permission", STORAGE)


def test_index_of_another_version_is_refused(copy):
    store.write_index(copy, {**store.read_index(copy), "version": 99})
    with pytest.raises(UserError, match="version 1 or 2 expected, 99 found"):
        loader.Dataset(copy)


def test_eval_batches_are_every_pair_once_in_order(root):
    dataset = loader.Dataset(root)
    made = list(loader.make_eval_batches(dataset, "val"))
    assert [pair for pair, _ in made] == dataset.pairs("val")
    assert [int(batch.pair[0]) for _, batch in made] == list(range(len(made)))
    assert all(batch.fixed.shape == (1, *SHAPE, 1) for _, batch in made)
    only = list(loader.make_eval_batches(dataset, "val", tasks=["liver"]))
    assert {pair.task for pair, _ in only} == {"liver"}
    assert {int(b.region[0]) for _, b in only} == {Region.LIVER}
    assert {int(b.pair_type[0]) for _, b in only} == {PairType.INTRA}
    # Numbers stay those of the whole split.
    assert all(made[int(b.pair[0])][0] == p for p, b in only)
    with pytest.raises(UserError) as caught:
        loader.make_eval_batches(dataset, "test")
    assert caught.value.exit_code == NOTHING


def test_eval_pairs_are_spread_and_no_other_is_read(root, monkeypatch):
    """Validation of a few pairs must not stay with the first patient."""
    dataset = loader.Dataset(root)
    pairs = dataset.pairs("train")
    read, example = [], loader.Dataset.example

    def spy(self, pair, position):
        read.append(position)
        return example(self, pair, position)

    monkeypatch.setattr(loader.Dataset, "example", spy)
    made = list(loader.make_eval_batches(dataset, "train", pairs_per_task=3))
    assert read == [int(batch.pair[0]) for _, batch in made]
    for task in TASKS:
        mine = [pair for pair in pairs if pair.task == task]
        chosen = [pair for pair, _ in made if pair.task == task]
        assert len(chosen) == 3 and len({pair.fixed for pair in chosen}) == 3
        assert chosen[0] == mine[0] and chosen[-1] == mine[-1]
    many = list(loader.make_eval_batches(dataset, "train", pairs_per_task=1000))
    assert [pair for pair, _ in many] == pairs
    assert not list(loader.make_eval_batches(dataset, "train", pairs_per_task=0))


def test_volume_without_labels_gives_background(tmp_path):
    volumes = []
    for name in ("a", "b"):
        hu = np.full((5, 4, 3), OUTSIDE_HU, np.int16)
        fields = store.write_volume(tmp_path, name, hu, None)
        place = {"task": "chest", "split": "train", "vox2world": np.eye(4).tolist()}
        volumes.append({"id": name, "subject": name, **place, **fields})
    index = {"version": 1, "spec": {"shape": [5, 4, 3]}, "volumes": volumes}
    store.write_index(tmp_path, {**index, "tasks": {"chest": {"labels": []}}})
    _, batch = next(loader.make_eval_batches(tmp_path, "train"))
    assert batch.fixed_labels.dtype == np.uint8 and not batch.fixed_labels.any()
    assert (batch.fixed == OUTSIDE_HU).all()


def test_arrays_come_back_as_written_and_read_only(tmp_path):
    rng = np.random.default_rng(0)
    written = {
        "image": rng.integers(-1000, 1000, SHAPE, np.int16),
        "labels": np.asfortranarray(rng.integers(0, 9, SHAPE, np.uint8)),
        "overlaps": rng.integers(0, 9, (2, *SHAPE), np.uint8),
        "points": np.zeros((0, 3)),
    }
    more = {"overlaps": written["overlaps"], "points": written["points"]}
    entry = {"id": "a"} | store.write_volume(
        tmp_path, "a", written["image"], written["labels"], **more
    )
    for kind, array in written.items():
        read = store.read_array(tmp_path, entry, kind)
        np.testing.assert_array_equal(read, array, strict=True)
        assert not read.flags.writeable


@pytest.mark.parametrize("dtype", ["int16", "uint8", "float64", "bool"])
@pytest.mark.parametrize("shape", [(5, 4, 3), (0, 3), (7,)])
def test_arrays_are_viewed_without_the_parser_of_python(monkeypatch, dtype, shape):
    """In several threads that parser fails now and then, and with it a training."""
    array = np.arange(np.prod(shape)).reshape(shape).astype(dtype)
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)

    def parse(*given, **options):
        raise SystemError("AST constructor recursion depth mismatch")

    with monkeypatch.context() as patch:
        patch.setattr("ast.parse", parse)
        patch.setattr("ast.literal_eval", parse)
        found = store._view_npy(buffer.getvalue())
    np.testing.assert_array_equal(found, array)
    assert found.dtype == array.dtype and not found.flags.writeable


def test_batch_of_one_copies_no_volume(root):
    dataset = loader.Dataset(root)
    pairs = dataset.pairs("train")
    batch = next(loader.make_iterator(dataset, "train", batch_size=1, seed=0))
    hu, labels, _ = dataset.volume(pairs[batch.pair[0]].fixed)
    assert np.shares_memory(batch.fixed, hu)
    assert np.shares_memory(batch.fixed_labels, labels)
    assert not batch.fixed.flags.writeable


def test_cache_forgets_the_oldest_beyond_its_budget(root):
    volume_bytes = 3 * np.prod(SHAPE)
    dataset = loader.Dataset(root)
    dataset.limit(2.5 * volume_bytes / 2**30)
    dataset.limit(1.0)  # no more than was given before
    assert dataset.pairs("train") is dataset.pairs("train")
    first = dataset.volume(0)
    assert dataset.volume(0) is first
    for position in (1, 2):
        dataset.volume(position)
    assert dataset.volume(2) is dataset.volume(2)
    assert dataset.volume(0) is not first
    with pytest.raises(ValueError, match="read-only"):
        first[0][0, 0, 0] = 1


def test_pair_order_needs_no_history(root):
    pairs = loader.Dataset(root).pairs("train")
    shares = {"headneck": 2, "lung": 3}
    walked = loader.PairOrder(pairs, shares, 5)
    expected = [walked[k] for k in range(400)]
    fresh = loader.PairOrder(pairs, shares, 5)
    assert [fresh[k] for k in reversed(range(400))] == expected[::-1]


def test_pair_order_is_pinned():
    """The stream of a seed must not change between releases."""
    pairs = [Pair(0, 1, task, 0, 0, ()) for task in 4 * ("headneck", "lung")]
    order = loader.PairOrder(pairs, {"headneck": 1, "lung": 2}, 0)
    assert [order[k] for k in range(12)] == [3, 0, 1, 7, 6, 5, 5, 4, 3, 7, 2, 1]


def test_volumes_are_read_once_by_many_threads(root, monkeypatch):
    calls = collections.Counter()
    plain = store.read_array

    def counted(root, entry, kind):
        calls[entry["id"], kind] += 1
        return plain(root, entry, kind)

    monkeypatch.setattr(store, "read_array", counted)
    dataset = loader.Dataset(root)
    iterator = loader.make_iterator(dataset, "train", batch_size=1, seed=0)
    _numbers(iterator, 60)
    iterator.close()
    # Two threads may meet at a volume that neither finds in memory, not more often.
    assert max(calls.values()) <= 4
    before = calls.total()
    list(itertools.islice(loader.make_eval_batches(dataset, "train"), 5))
    assert calls.total() == before


_STUCK = """
import sys
from data_pipeline import loader
loader.Dataset(sys.argv[1], read_timeout_s=0.2).volume(0)
"""


def test_a_read_that_hangs_is_named_and_ends_the_process(copy):
    dataset = loader.Dataset(copy, read_timeout_s=30)
    dataset.volume(1)  # one that does not hang is nothing to it
    entry = dataset.index["volumes"][0]
    (copy / entry["image"]).unlink()
    os.mkfifo(copy / entry["image"])  # nobody will write
    done = subprocess.run(
        [sys.executable, "-c", _STUCK, str(copy)], capture_output=True, text=True
    )
    assert done.returncode == STORAGE, done.stderr
    said = f"error: worker_died: {entry['id']}: read within 0.2 s expected"
    assert said in done.stderr
