"""Organs inside organs, from the raw scans to loss and DSC.

A miniature of SegRap2023: the brain holds brain stem and hippocampus. In a map of one
id per voxel, in which small organs win, the brain would have holes.
"""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from data_pipeline import augment, loader, prepare, store
from unireg_jax.errors import DATA_CHANGED, UserError
from unireg_jax.imaging import nifti
from unireg_jax.models.features import Extractor
from unireg_jax.training import evaluate, mesh, objective
from unireg_jax.training import state as train_state
from unireg_jax.training import step as train_step

SHAPE = (32, 16, 16)
SPACING_MM = (8.0, 9.0, 10.0)
GRID = ["--shape", "32,16,16", "--spacing", "8,9,10"]
ORGANS = ("Brain", "BrainStem", "Hippocampus_L", "Hippocampus_R", "TemporalLobe_L")


def _mask(organ, case):
    """[X, Y, Z] bool; the organs of a case are wider and lie further along x."""
    x0, x1, y0, y1, z0, z1 = {
        "Brain": (5, 21, 3, 13, 3, 13),
        "BrainStem": (8, 14, 5, 10, 4, 9),
        "TemporalLobe_L": (14, 20, 4, 9, 5, 11),
        "Hippocampus_L": (15, 18, 5, 8, 6, 9),
        "Hippocampus_R": (6, 8, 5, 8, 9, 12),
    }[organ]
    mask = np.zeros(SHAPE, bool)
    mask[x0 + case : x1 + case + case // 2, y0:y1, z0:z1] = True
    return mask


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Four cases; those of the last two share a split, and so do the first two."""
    root = tmp_path_factory.mktemp("segrap")
    rng = np.random.default_rng(0)
    for case in range(4):
        folder = root / "raw/SegRap2023_Training_Set_120cases" / f"segrap_{case:04d}"
        folder.mkdir(parents=True)
        hu = rng.integers(-200, 200, SHAPE).astype(np.int16)
        nifti.write_volume(folder / "image.nii.gz", hu, np.diag([*SPACING_MM, 1.0]))
        for organ in ORGANS:
            array = _mask(organ, case).astype(np.uint8)
            nifti.write_volume(
                folder / f"{organ}.nii.gz", array, np.diag([*SPACING_MM, 1.0])
            )
    argv = ["--dataset", "segrap2023", "--raw", str(root / "raw")]
    assert prepare.main([*argv, "--out", str(root / "out"), *GRID]) == 0
    return loader.Dataset(root / "out")


def _number(dataset, position):
    return int(dataset.index["volumes"][position]["id"][-4:])


def _layers(batch, side):
    first = getattr(batch, f"{side}_labels")[:, None]
    return np.concatenate([first, getattr(batch, f"{side}_more")], axis=1)


def _still(params, fixed, *args, **kwargs):
    """A network whose field is one vector everywhere."""
    return jnp.broadcast_to(params, (*fixed.shape[:4], 3))


def _dsc(a, b):
    return 2 * (a & b).sum() / (a.sum() + b.sum())


def test_batches_hold_every_organ_whole(dataset):
    assert dataset.layers == 2  # brain, lobe and hippocampus of one voxel
    pairs = dataset.pairs("train")
    batch = next(loader.make_iterator(dataset, "train", batch_size=2, seed=0))
    assert batch.fixed_more.shape == batch.moving_more.shape == (2, 2, *SHAPE)
    names = dataset.label_names("headneck")
    for i, number in enumerate(batch.pair):
        for side in ("fixed", "moving"):
            case = _number(dataset, getattr(pairs[number], side))
            layers = _layers(batch, side)[i]
            for organ in ORGANS:
                said = (layers == names.index(organ) + 1).sum(axis=0)
                np.testing.assert_array_equal(said, _mask(organ, case))


def test_dsc_is_that_of_the_whole_organ(dataset):
    names = dataset.label_names("headneck")
    judge = train_step.make_eval_step(_still, num_labels=len(names) + 1)
    shift = jnp.array([1.0, 0.0, 0.0])
    batches = loader.make_eval_batches(dataset, "val")
    rows = evaluate.evaluate(judge, shift, Extractor("none"), batches)
    assert len(rows) == 2
    for row in rows:
        fixed, moving = (_number(dataset, row[side]) for side in ("fixed", "moving"))
        for organ in ORGANS:
            # moving(x + 1): what is seen lies a voxel lower.
            masks = _mask(organ, fixed), _mask(organ, moving)
            expected = _dsc(masks[0], np.roll(masks[1], -1, axis=0))
            got = row["dsc"][names.index(organ)]
            np.testing.assert_allclose(got, expected, rtol=1e-6)
            before = row["dsc_before"][names.index(organ)]
            np.testing.assert_allclose(before, _dsc(*masks), rtol=1e-6)
    # One id per voxel tells something else: the test can fail.
    flat = store.read_array(dataset.root, dataset.index["volumes"][0], "labels")
    assert (flat == names.index("Brain") + 1).sum() < 0.9 * _mask("Brain", 0).sum()


def test_training_step_pulls_on_the_whole_organ(dataset):
    names = dataset.label_names("headneck")
    weights = objective.Weights(smoothness=(1.0,) * 4, num_labels=len(names) + 1)
    tx = optax.sgd(1.0)
    devices = mesh.make_mesh(jax.devices()[:1])
    step = train_step.make_train_step(
        objective.make_loss(_still, weights=weights), tx, mesh=devices, accumulate=2
    )
    start = jnp.zeros(3)
    state = train_state.TrainState(
        jnp.zeros((), jnp.int32),
        start,
        tx.init(start),
        jax.random.key_data(jax.random.key(0)),
    )
    batch = next(loader.make_iterator(dataset, "train", batch_size=2, seed=0))
    pairs = dataset.pairs("train")
    sides = [
        [_number(dataset, end) for end in (pairs[n].fixed, pairs[n].moving)]
        for n in batch.pair
    ]
    expected = [
        _dsc(_mask(organ, a), _mask(organ, b)) for a, b in sides for organ in ORGANS
    ]
    _, scalars = step(state, batch, Extractor("none"))
    np.testing.assert_allclose(scalars["dice"], np.mean(expected), rtol=1e-5)


def test_flip_mirrors_every_layer_and_swaps_its_sides(dataset):
    names = dataset.label_names("headneck")
    ids = {organ: names.index(organ) + 1 for organ in ORGANS}
    mirror = np.arange(256, dtype=np.uint8)
    mirror[ids["Hippocampus_L"]] = ids["Hippocampus_R"]
    mirror[ids["Hippocampus_R"]] = ids["Hippocampus_L"]
    pairs = dataset.pairs("train")
    flipped = augment.flip(dataset.example(pairs[0], 0), mirror)
    for side in ("fixed", "moving"):
        case = _number(dataset, getattr(pairs[0], side))
        layers = _layers(loader.stack([flipped]), side)[0]
        for organ, expected in (
            ("Brain", "Brain"),
            ("Hippocampus_R", "Hippocampus_L"),
            ("Hippocampus_L", "Hippocampus_R"),
        ):
            found = (layers == ids[organ]).any(axis=0)
            np.testing.assert_array_equal(found, _mask(expected, case)[::-1])


def test_deformation_moves_every_layer_alike(dataset):
    spec = augment.AugmentSpec(rotate_deg=9, scale=0.1, shift_mm=9, elastic_mm=9)
    change = augment.make_augment(spec, {}, SPACING_MM)
    pair = dataset.example(dataset.pairs("train")[0], 0)
    copies = pair._replace(moving_more=np.stack([pair.moving_labels] * 2))
    out = change(copies, "headneck", np.random.default_rng(1))
    assert (out.moving_labels != pair.moving_labels).any()
    for layer in out.moving_more:
        np.testing.assert_array_equal(layer, out.moving_labels)
    np.testing.assert_array_equal(out.fixed_more, pair.fixed_more)


def test_folder_of_an_earlier_release_and_volumes_of_fewer_layers(dataset, tmp_path):
    """Its index does not tell the number of layers; the arrays do."""
    root = tmp_path / "old"
    shutil.copytree(dataset.root, root)
    index = store.read_index(root)
    for volume in index["volumes"]:
        del volume["layers"]
    first = index["volumes"][0]
    del first["overlaps"], first["sha256"]["overlaps"]
    store.write_index(root, index)
    old = loader.Dataset(root)
    assert old.layers == 2
    for pair in (p for split in ("train", "val") for p in old.pairs(split)):
        example = old.example(pair, 0)
        for side in ("fixed", "moving"):
            more = getattr(example, f"{side}_more")
            assert more.shape == (2, *SHAPE)
            assert more.any() == (getattr(pair, side) != 0)
    (root / index["volumes"][1]["overlaps"]).write_bytes(b"other")
    with pytest.raises(UserError, match="changed since it was prepared") as caught:
        loader.Dataset(root)
    assert caught.value.exit_code == DATA_CHANGED
