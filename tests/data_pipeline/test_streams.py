"""Made pairs mixed into the stream of prepared scans."""

import collections
import json
import shutil

import numpy as np
import pytest

from data_pipeline import loader, store, streams, synthetic
from data_pipeline.augment import AugmentSpec
from unireg_jax.errors import DATA_CHANGED, NOTHING, UserError
from unireg_jax.tasks import TASKS

SHAPE, SPACING_MM = (32, 16, 16), 12.0
SHARES = {"phantoms": 0.25, "painted": 0.125, "deformed": 0.125}
WEIGHTS = {"headneck": 1.0, "lung": 3.0}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    root = synthetic.write_dataset(
        tmp_path_factory.mktemp("phantoms"),
        shape=SHAPE,
        spacing_mm=SPACING_MM,
        subjects_per_task=4,
        tasks=("headneck", "lung"),
    )
    return loader.Dataset(root)


def _make(dataset, shares=None, **options):
    made = streams.make_streams(dataset, shares or SHARES, WEIGHTS, seed=3)
    options = {"batch_size": 2, "seed": 3, "weights": WEIGHTS, **options}
    return loader.make_iterator(dataset, "train", streams=made, **options)


def _take(iterator, count):
    try:
        return [next(iterator) for _ in range(count)]
    finally:
        iterator.close()


def _same(batches, others):
    for one, other in zip(batches, others, strict=True):
        for a, b in zip(one, other, strict=True):
            np.testing.assert_array_equal(a, b, strict=True)


@pytest.fixture(scope="module")
def batches(dataset):
    """A whole turn of the pattern: 32 pairs."""
    return _take(_make(dataset), 16)


def test_shares_are_exact_and_tasks_in_the_ratio_of_the_weights(dataset, batches):
    made = streams.make_streams(dataset, SHARES, WEIGHTS, seed=3)
    kinds = [pair.task for pair in dataset.pairs("train")] + [s.name for s in made]
    counts = collections.Counter(kinds[n] for batch in batches for n in batch.pair)
    assert counts == {
        "headneck": 4,
        "lung": 12,
        "phantoms_headneck": 2,
        "phantoms_lung": 6,
        "painted_headneck": 1,
        "painted_lung": 3,
        "deformed_headneck": 1,
        "deformed_lung": 3,
    }
    for batch in batches:
        for number, region, pair_type in zip(
            batch.pair, batch.region, batch.pair_type, strict=True
        ):
            task = TASKS[kinds[number].split("_")[-1]]
            assert (region, pair_type) == task


def test_made_pairs_are_new_each_time_and_hold_their_own_organs(dataset, batches):
    made = streams.make_streams(dataset, SHARES, WEIGHTS, seed=3)
    first = len(dataset.pairs("train"))
    seen = collections.defaultdict(set)
    for batch in batches:
        for i, number in enumerate(batch.pair):
            if number < first:
                continue
            stream = made[number - first]
            seen[stream.name].add(batch.fixed[i].tobytes())
            ids = set(np.unique(batch.fixed_labels[i])) - {0}
            assert ids and max(ids) <= len(stream.label_names)
            # Both scans show the same organs: something can be aligned.
            assert ids & set(np.unique(batch.moving_labels[i]))
    assert {name: len(found) for name, found in seen.items()} == {
        "phantoms_headneck": 2,
        "phantoms_lung": 6,
        "painted_headneck": 1,
        "painted_lung": 3,
        "deformed_headneck": 1,
        "deformed_lung": 3,
    }


def test_order_does_not_depend_on_threads_shards_or_history(dataset, batches):
    _same(_take(_make(dataset, num_threads=0), 6), batches[:6])
    _same(_take(_make(dataset, num_threads=7), 6), batches[:6])
    iterator = _make(dataset)
    for _ in range(5):
        next(iterator)
    state = json.loads(json.dumps(iterator.get_state()))
    iterator.close()
    resumed = _make(dataset)
    resumed.set_state(state)
    _same(_take(resumed, 4), batches[5:9])
    parts = [_take(_make(dataset, batch_size=1, shard=(i, 2)), 4) for i in (0, 1)]
    for batch, *shards in zip(batches[:4], *parts, strict=True):
        for a, *b in zip(batch, *shards, strict=True):
            np.testing.assert_array_equal(a, np.concatenate(b))
    other = streams.make_streams(dataset, SHARES, WEIGHTS, seed=4)
    one = other[0].draw(0)
    first = streams.make_streams(dataset, SHARES, WEIGHTS, seed=3)[0].draw(0)
    assert (one.fixed != first.fixed).any()


def test_another_mixture_is_refused_on_resume(dataset):
    state = _make(dataset).get_state()
    other = _make(dataset, SHARES | {"painted": 0.25})
    with pytest.raises(UserError, match="data stream: weights .*painted_lung"):
        other.set_state(state)


def test_pairs_that_another_release_drew_are_refused(dataset):
    iterator = _make(dataset)
    state = iterator.get_state()
    del state["versions"]  # as it was saved before there were any
    with pytest.raises(UserError, match="versions of an older release when") as caught:
        iterator.set_state(state)
    assert caught.value.exit_code == DATA_CHANGED
    # Phantoms are those of before: their runs go on.
    assert "versions" not in _make(dataset, {"phantoms": 1.0}).get_state()


def test_no_stream_is_the_plain_order(dataset):
    off = streams.make_streams(dataset, dict.fromkeys(SHARES, 0.0), WEIGHTS, seed=3)
    assert off == ()
    plain = loader.make_iterator(
        dataset, "train", batch_size=2, seed=3, weights=WEIGHTS
    )
    assert plain.get_state()["weights"] == {"headneck": 1, "lung": 3}
    _same(_take(plain, 4), _take(_make(dataset, {"painted": 0.0}), 4))


def test_made_pairs_alone_and_augmented(dataset):
    """Flips need the names of a stream's own organs."""
    batch, *_ = _take(
        _make(dataset, {"phantoms": 1.0}, augment=AugmentSpec(flip=1.0)), 2
    )
    plain, *_ = _take(_make(dataset, {"phantoms": 1.0}), 2)
    assert (batch.pair >= len(dataset.pairs("train"))).all()
    np.testing.assert_array_equal(batch.fixed, plain.fixed[:, ::-1])


def test_kinds_without_what_they_need_and_bad_shares_are_refused(dataset):
    for kind in ("painted", "deformed"):
        with pytest.raises(UserError, match=f"of liver expected for {kind}") as caught:
            streams.make_streams(dataset, {kind: 0.1}, {"liver": 1.0}, seed=0)
        assert caught.value.exit_code == NOTHING
    drawn = streams.make_streams(dataset, {"phantoms": 0.1}, {"liver": 1.0}, seed=0)
    assert [stream.name for stream in drawn] == ["phantoms_liver"]
    for shares in ({"drawn": 0.1}, {"painted": 0.7, "deformed": 0.4}):
        with pytest.raises(ValueError, match="shares must be of"):
            streams.make_streams(dataset, shares, WEIGHTS, seed=0)


def test_scans_without_a_structure_are_not_painted(dataset, tmp_path):
    root = tmp_path / "copy"
    shutil.copytree(dataset.root, root)
    first, *others = [
        v for v in store.read_index(root)["volumes"] if v["split"] == "train"
    ]
    assert any(v["task"] == first["task"] for v in others)
    path = root / first["labels"]
    np.save(path, np.load(path) * 0)
    index = store.read_index(root)
    for volume in index["volumes"]:
        if volume["id"] == first["id"]:
            volume["sha256"]["labels"] = store.file_sha256(path)
    store.write_index(root, index)
    (stream,) = streams.make_streams(
        loader.Dataset(root), {"painted": 0.5}, {first["task"]: 1.0}, seed=0
    )
    for number in range(4):
        assert stream.draw(number).fixed_labels.any()


def test_volume_gone_bad_is_named_by_a_made_pair(dataset, tmp_path):
    root = tmp_path / "copy"
    shutil.copytree(dataset.root, root)
    for entry in dataset.index["volumes"]:
        (root / entry["labels"]).write_bytes(b"other")
    with pytest.raises(UserError, match="changed since it was prepared") as caught:
        _make(loader.Dataset(root), {"painted": 1.0}, num_threads=0)
    assert caught.value.exit_code == DATA_CHANGED
