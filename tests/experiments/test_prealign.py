"""Alignments of a folder say of which volumes they are, whenever a run was stopped."""

import json

import numpy as np
import pytest

from data_pipeline import loader, store, synthetic
from experiments import prealign
from unireg_jax.errors import UserError


@pytest.fixture
def root(tmp_path):
    """Three chests: six pairs."""
    return synthetic.write_dataset(
        tmp_path,
        shape=(8, 6, 7),
        spacing_mm=50.0,
        subjects_per_task=3,
        tasks=("chest",),
    )


@pytest.fixture
def align(monkeypatch):
    """Aligns at once, by a given shift in voxels; stops after some pairs."""

    def run(root, shift=0.0, stop_after=6, save_every=1):
        left = iter(range(stop_after))

        def found(*_):
            if next(left, None) is None:
                raise KeyboardInterrupt
            matrix = np.eye(4)
            matrix[0, 3] = shift
            return matrix, "none", ""

        monkeypatch.setattr(prealign, "_align", found)
        monkeypatch.setattr(prealign, "_SAVE_EVERY", save_every)
        return prealign.prealign(root).total()

    return run


def _move(root):
    """The first volume is prepared anew, on another grid."""
    index = store.read_index(root)
    index["volumes"][0]["vox2world"][0][3] += 1.0
    store.write_index(root, index)
    return index["volumes"][0]["id"]


def _is_refused(root):
    with pytest.raises(UserError, match="run experiments.prealign again"):
        loader.Dataset(root)
    return True


def test_stopped_first_run_knows_its_volumes(root, align):
    with pytest.raises(KeyboardInterrupt):
        align(root, stop_after=4)
    assert len(loader.Dataset(root).alignments) == 4
    first = _move(root)
    assert _is_refused(root)
    align(root, shift=2.0)
    for key, matrix in loader.Dataset(root).alignments.items():
        assert matrix[0, 3] == 2.0 or first not in key.split("|")


def test_volume_that_was_gone_and_came_back_another_is_aligned_anew(root, align):
    assert align(root) == 6
    index = store.read_index(root)
    store.write_index(root, index | {"volumes": index["volumes"][1:]})
    assert align(root) == 0
    store.write_index(root, index)
    assert len(loader.Dataset(root).alignments) == 6
    _move(root)
    assert _is_refused(root)
    assert align(root) == 4


@pytest.mark.parametrize("writes", range(4))
def test_run_killed_between_writes_leaves_no_stale_alignment(
    root, align, monkeypatch, writes
):
    align(root)
    first = _move(root)
    plain, left = store.write_json, iter(range(writes))

    def write(path, value):
        if next(left, None) is None:
            raise KeyboardInterrupt
        plain(path, value)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(store, "write_json", write)
        align(root, shift=2.0, save_every=20)
    if writes < 2:
        assert _is_refused(root)
    for again in (False, True):
        if again:
            assert align(root, shift=2.0) == 4
        elif writes < 2:
            continue
        found = loader.Dataset(root).alignments
        shifts = [m[0, 3] for key, m in found.items() if first in key.split("|")]
        assert shifts == (4 * [2.0] if again else [])


def test_stopped_run_of_volumes_prepared_anew_goes_on(root, align):
    align(root)
    first = _move(root)
    with pytest.raises(KeyboardInterrupt):
        align(root, shift=2.0, stop_after=3)
    assert align(root, shift=2.0) == 1
    found = loader.Dataset(root).alignments
    assert sum(m[0, 3] == 2.0 for m in found.values()) == 4
    assert all(m[0, 3] == 2.0 for key, m in found.items() if first in key.split("|"))


@pytest.mark.parametrize("field", ("subject", "task"))
def test_volume_of_another_subject_or_task_is_aligned_anew(root, align, field):
    align(root)
    index = store.read_index(root)
    index["volumes"][0][field] = {"subject": "another", "task": "abdomen"}[field]
    store.write_index(root, index)
    assert _is_refused(root)
    assert align(root) == {"subject": 4, "task": 0}[field]
    assert len(loader.Dataset(root).alignments) == {"subject": 6, "task": 2}[field]


def test_folder_of_before_that_did_not_change_is_not_aligned_anew(root, align):
    align(root)
    notes = json.loads((root / store.ALIGN_NOTES_NAME).read_text())
    old = {name: digest[:16] for name, digest in notes["volumes"].items()}
    store.write_json(root / store.ALIGN_NOTES_NAME, notes | {"volumes": old})
    assert len(loader.Dataset(root).alignments) == 6
    assert align(root) == 0
    assert json.loads((root / store.ALIGN_NOTES_NAME).read_text()) == notes
    store.write_json(root / store.ALIGN_NOTES_NAME, notes | {"volumes": old})
    _move(root)
    assert _is_refused(root)


def test_pairs_that_a_stopped_run_left_are_warned_of(root, align, capsys):
    def told(**options):
        dataset = loader.Dataset(root, **options)
        loader.make_iterator(dataset, "train", batch_size=1, seed=0, num_threads=0)
        ids = [volume["id"] for volume in dataset.index["volumes"]]
        pairs = [(ids[p.fixed], ids[p.moving]) for p in dataset.pairs("train")]
        left = sum("|".join(pair) not in dataset.alignments for pair in pairs)
        return capsys.readouterr().err, f"{left} of {len(pairs)} pairs ("

    assert told()[0] == ""  # a folder may have no alignments
    for done in (0, 4):
        with pytest.raises(KeyboardInterrupt):
            align(root, stop_after=done)
        said, left = told()
        assert said.startswith(f"warning: {left}") and not left.startswith("0")
        assert f"`python -m experiments.prealign --data={root}`" in said
        assert said.count("\n") == 1
    assert told(stale=True)[0] == ""
    align(root)
    assert told()[0] == ""
