"""Which volumes meet: counts, direction, alignment, and what is refused."""

import collections
import json

import numpy as np
import pytest

from data_pipeline import pairs, store
from unireg_jax.errors import DATA_CHANGED, USAGE, UserError
from unireg_jax.tasks import PairType, Region


def _volume(number, task="abdomen", subject=None, split="train", origin=(0, 0, 0)):
    vox2world = np.diag([2.0, 3.0, 4.0, 1.0])
    vox2world[:3, 3] = origin
    return {
        "id": f"{task}{number}",
        "task": task,
        "subject": subject or f"{task}{number}",
        "split": split,
        "vox2world": vox2world.tolist(),
    }


def _index(*volumes):
    return {"volumes": list(volumes)}


def test_inter_pairs_are_all_ordered_pairs_of_subjects():
    """20 subjects give 20 * 19 = 380 pairs, as the paper's Table 1 has for abdomen."""
    index = _index(*(_volume(i) for i in range(20)))
    made = pairs.make_pairs(index, "train")
    assert len(made) == 380
    assert len({(p.fixed, p.moving) for p in made}) == 380
    assert all(p.fixed != p.moving for p in made)
    assert {(p.task, p.region, p.pair_type) for p in made} == {
        ("abdomen", Region.ABDOMEN, PairType.INTER)
    }
    np.testing.assert_array_equal(made[0].align, np.eye(4))


def test_inter_pairs_never_join_two_scans_of_one_subject():
    index = _index(_volume(0, subject="a"), _volume(1, subject="a"), _volume(2))
    made = pairs.make_pairs(index, "train")
    assert {(p.fixed, p.moving) for p in made} == {(0, 2), (1, 2), (2, 0), (2, 1)}


def test_intra_pairs_are_all_ordered_phases_of_one_subject():
    """25 patients with 3 phases give 25 * 6 = 150 pairs, the paper's liver count."""
    scans = [_volume(3 * s + p, "liver", f"s{s}") for s in range(25) for p in range(3)]
    made = pairs.make_pairs(_index(*scans), "train")
    assert len(made) == 150
    assert all(p.fixed // 3 == p.moving // 3 for p in made)
    assert {(p.region, p.pair_type) for p in made} == {(Region.LIVER, PairType.INTRA)}


def test_lung_is_chest_and_intra():
    index = _index(_volume(0, "lung", "s"), _volume(1, "lung", "s"))
    made = pairs.make_pairs(index, "train")
    assert {(p.region, p.pair_type) for p in made} == {(Region.CHEST, PairType.INTRA)}


def test_intra_align_keeps_the_place_in_the_world():
    index = _index(
        _volume(0, "liver", "s", origin=(10, -6, 8)),
        _volume(1, "liver", "s", origin=(4, 3, 0)),
    )
    first = pairs.make_pairs(index, "train")[0]
    expected = np.eye(4)
    expected[:3, 3] = (10 - 4) / 2, (-6 - 3) / 3, (8 - 0) / 4
    np.testing.assert_allclose(first.align, expected, atol=1e-12)  # float64 rounding
    fixed, moving = (np.array(v["vox2world"]) for v in index["volumes"])
    voxel = np.array([5, 7, 2, 1.0])
    np.testing.assert_allclose(
        moving @ np.array(first.align) @ voxel, fixed @ voxel, atol=1e-12
    )


def test_alignments_override_one_direction():
    matrix = np.eye(4)
    matrix[0, 3] = 2.5
    index = _index(_volume(0), _volume(1))
    made = pairs.make_pairs(index, "train", alignments={"abdomen1|abdomen0": matrix})
    by_ids = {(p.fixed, p.moving): np.array(p.align) for p in made}
    np.testing.assert_array_equal(by_ids[1, 0], matrix)
    np.testing.assert_array_equal(by_ids[0, 1], np.eye(4))


def test_splits_do_not_meet_and_tasks_do_not_mix():
    index = _index(
        *(_volume(i, split=("train", "val")[i % 2]) for i in range(4)),
        *(_volume(i, "chest") for i in range(3)),
    )
    counts = {
        split: collections.Counter(p.task for p in pairs.make_pairs(index, split))
        for split in pairs.SPLITS
    }
    assert counts == {
        "train": {"abdomen": 2, "chest": 6},
        "val": {"abdomen": 2},
        "test": {},
    }


def test_subject_in_two_splits_is_refused_unless_allowed():
    index = _index(_volume(0, subject="a"), _volume(1, "chest", "a", split="val"))
    with pytest.raises(UserError, match="in more than one split: a;") as caught:
        pairs.make_pairs(index, "train")
    assert caught.value.exit_code == USAGE
    assert pairs.make_pairs({**index, "allow_leak": True}, "train") == []


def test_unknown_split_and_task_are_refused():
    with pytest.raises(UserError, match="one of train, val, test, got 'training'"):
        pairs.make_pairs(_index(), "training")
    with pytest.raises(UserError, match="found knee") as caught:
        pairs.make_pairs(_index(_volume(0, "knee")), "train")
    assert (caught.value.exit_code, caught.value.reason) == (USAGE, "task_unknown")


def test_read_alignments(tmp_path):
    assert pairs.read_alignments(tmp_path) == {}
    matrix = np.diag([1.0, 2.0, 3.0, 1.0])
    store.write_json(tmp_path / "align.json", {"a|b": matrix.tolist()})
    np.testing.assert_array_equal(pairs.read_alignments(tmp_path)["a|b"], matrix)


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[1]",
        '{"a|b": "no"}',
        json.dumps({"a|b": [[1, 0, 0, 0]] * 3}),
        json.dumps({"a|b": np.zeros((4, 4)).tolist()}),
        json.dumps({"a|b": np.diag([0.0, 1, 1, 1]).tolist()}),
        '{"a|b": [[NaN,0,0,0],[0,1,0,0],[0,0,1,0],[0,0,0,1]]}',
    ],
)
def test_read_alignments_refuses_what_is_no_affine(tmp_path, text):
    (tmp_path / "align.json").write_text(text)
    with pytest.raises(UserError, match="align.json") as caught:
        pairs.read_alignments(tmp_path)
    assert caught.value.exit_code == DATA_CHANGED
