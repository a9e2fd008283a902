"""The experiment scripts: manifest of real scans, pre-alignment, pictures."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from data_pipeline import loader, store, synthetic
from data_pipeline.datasets import manifest
from experiments import demo, figures, prealign, real_pairs, real_scans
from unireg_jax import registration
from unireg_jax.errors import USAGE, UserError
from unireg_jax.models import features
from unireg_jax.models.features import Extractor
from unireg_jax.models.unireg import UniReg
from unireg_jax.tasks import OUTSIDE_HU


def test_real_manifest_holds_out_four_patients(data_root, tmp_path):
    rows = real_scans.manifest(data_root, tmp_path)
    headneck = [r for r in rows if r["task"] == "headneck"]
    held = {r["id"] for r in headneck if r["split"] == "val"}
    assert len(headneck) == 16 and held == {f"hn_{c}" for c in real_scans.HELD_OUT}
    assert {r["task"] for r in rows} == {
        "headneck",
        "chest",
        "abdomen",
        "liver",
        "lung",
    }


def test_real_manifest_of_no_part_holds_out_nobody(data_root, tmp_path):
    assert [real_scans.held_out(i) for i in range(4)] == list(real_scans.FOLDS)
    rows = real_scans.manifest(data_root, tmp_path, real_scans.held_out(-1))
    assert {row["split"] for row in rows} == {"train"}


def test_real_manifest_is_read_by_the_pipeline(data_root, tmp_path):
    path = tmp_path / "manifest.json"
    path.write_text(json.dumps(real_scans.manifest(data_root, tmp_path)))
    records = manifest.collect(path, roots=[data_root]).records
    assert len(records) == 25


def test_real_manifest_says_what_is_missing(tmp_path):
    (tmp_path / "headneck_openkbp").mkdir()
    (tmp_path / "headneck_openkbp" / "labels.json").write_text("{}")
    with pytest.raises(UserError, match="is not there") as error:
        real_scans.manifest(tmp_path, tmp_path)
    assert error.value.exit_code == USAGE


def test_prealign_stores_every_pair_once(tmp_path):
    root = synthetic.write_dataset(
        tmp_path,
        shape=(32, 32, 48),
        spacing_mm=10.0,
        subjects_per_task=2,
        tasks=("chest", "lung"),
    )
    wanted = loader.Dataset(root).pairs("train")
    assert prealign.prealign(root).total() == len(wanted)
    assert prealign.prealign(root).total() == 0
    stored = loader.Dataset(root).alignments
    assert len(stored) == len(wanted)
    # Within a patient and close by: the scanner's own frame.
    lung = [v for k, v in stored.items() if k.startswith("lung")]
    np.testing.assert_allclose(lung, np.tile(np.eye(4), (len(lung), 1, 1)), atol=1e-6)


def test_prealign_begins_anew_where_a_volume_was_prepared_anew(tmp_path):
    root = synthetic.write_dataset(
        tmp_path,
        shape=(32, 24, 32),
        spacing_mm=10.0,
        subjects_per_task=2,
        tasks=("chest", "lung"),
    )
    prealign.prealign(root)
    index = store.read_index(root)
    first = index["volumes"][0]
    first["vox2world"][0][3] += 1.0
    store.write_index(root, index)
    with pytest.raises(UserError, match="run experiments.prealign again"):
        loader.Dataset(root)
    again = prealign.prealign(root).total()
    keys = loader.Dataset(root).alignments
    assert 0 < again < len(keys)
    assert again == sum(first["id"] in key.split("|") for key in keys)


def test_prealign_by_features_says_how_each_pair_was_found(tmp_path):
    root = synthetic.write_dataset(
        tmp_path,
        shape=(48, 32, 48),
        spacing_mm=8.0,
        subjects_per_task=2,
        tasks=("headneck", "lung"),
    )
    mind = features.Extractor("mind")
    used = prealign.prealign(root, kind="features", extractor=mind)
    wanted = loader.Dataset(root).pairs("train")
    assert used.total() == len(wanted) and set(used) <= {"none", "features", "com"}
    stored = loader.Dataset(root).alignments
    assert all(np.isfinite(m).all() for m in stored.values())
    notes = json.loads((root / store.ALIGN_NOTES_NAME).read_text())
    assert notes["kind"] == "features (mind), search 3" and set(notes["pairs"]) == set(
        stored
    )
    found = {key.split("_")[0]: how for key, how in notes["pairs"].items()}
    # Within a patient as before.
    assert found["lung"] == "none"
    again = prealign.prealign(root, kind="features", extractor=mind)
    assert again.total() == 0
    with pytest.raises(UserError, match=r"features \(mind\), search 3 expected"):
        prealign.prealign(root)
    with pytest.raises(ValueError, match="an extractor belongs to 'features' alone"):
        prealign.prealign(root, kind="features")


def test_prealign_sees_volumes_at_the_spacing_of_the_embedding():
    rng = np.random.default_rng(0)
    hu = rng.integers(-900, 900, (32, 32, 20)).astype(np.int16)
    hu[:2, :2, :2] = OUTSIDE_HU
    hu[2, 2, 2] = OUTSIDE_HU
    pooled, place = prealign._pooled(hu, np.diag([2.0, 2.0, 2.0, 1.0]), 2)
    assert pooled.shape == (16, 16, 16)  # 10 slices, padded to a multiple of 8
    np.testing.assert_array_equal(place[:3, 3], [1.0, 1.0, 1.0])  # mm, of 2 mm voxels
    assert pooled[0, 0, 0] == OUTSIDE_HU and (pooled[..., 10:] == OUTSIDE_HU).all()
    cube = hu[2:4, 2:4, 2:4].astype(float)
    assert pooled[1, 1, 1] == np.rint(cube[cube != OUTSIDE_HU].mean())
    known = features.Extractor("mind", spacing_mm=(4.0, 4.0, 4.0))
    assert prealign._factor((2.0, 2.0, 2.0), known) == 2
    assert prealign._factor((2.0, 2.0, 2.0), features.Extractor("mind")) == 1
    with pytest.raises(UserError, match="or a multiple"):
        prealign._factor((3.0, 3.0, 3.0), known)


def test_picture_of_a_registration_is_written(tmp_path):
    rng = np.random.default_rng(0)
    volumes = rng.normal(0, 300, (3, 20, 24, 28))
    labels = np.zeros((20, 24, 28), int)
    labels[5:12, 6:14, 7:20] = 1
    path = tmp_path / "pair.png"
    figures.save_registration(
        path,
        *volumes,
        rng.normal(0, 2, (20, 24, 28, 3)),
        (1.0, 1.5, 2.0),
        labels=(labels, labels),
    )
    assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 20_000


@pytest.mark.slow
def test_demo_improves_every_pair(tmp_path):
    """The whole of `make demo`, in minutes: pictures, metrics, and an actual gain."""
    results = demo.demo(tmp_path)
    assert set(results) == {"chest", "liver", "lung"}
    for task in results:
        assert (tmp_path / "pictures" / f"{task}.png").is_file()
        assert results[task]["fold_percent_network"] < 1
        assert results[task]["ncc_after"] > results[task]["ncc_before"]


@pytest.mark.slow
def test_network_runs_at_the_papers_size():
    """192x192x160 with the full network: finite and near zero at the start."""
    shape = (192, 192, 160)
    rng = np.random.default_rng(0)
    fixed, moving = jnp.asarray(rng.uniform(-1, 1, (2, 1, *shape, 1)), jnp.float32)
    cond = jnp.zeros(1, jnp.int32)
    maps = (
        features.describe(500 * image, Extractor("mind")) for image in (fixed, moving)
    )
    corr = features.correlate(*maps)
    model = UniReg()
    small = jnp.zeros((1, 16, 16, 16, 1))
    params = model.init(
        jax.random.key(0), small, small, jnp.zeros((1, 8, 8, 8, 27)), cond, cond
    )
    disp = jax.jit(model.apply)(params, fixed, moving, corr, cond, cond)
    assert disp.shape == (1, *shape, 3)
    assert bool(jnp.isfinite(disp).all()) and float(jnp.abs(disp).max()) < 0.1


@pytest.mark.slow
@pytest.mark.parametrize("name", [real_pairs.WEIGHTS, "unireg"])
def test_weights_improve_an_affine(data_root, name):
    """Two head-neck pairs that the first never saw, without folding much.

    The second was trained on them: that it does no worse is a check of the file alone.
    """
    model = registration.load_model(name)
    for pair in real_pairs.pairs(data_root, tasks=["headneck"]):
        if pair.patients not in {("0096", "0061"), ("0112", "0061")}:
            continue
        truth = real_pairs.read_truth(pair)
        result = registration.register(
            pair.fixed, pair.moving, task="headneck", weights=model
        )
        dsc = {
            name: real_pairs.scores(truth, stage)["dsc"]
            for name, stage in real_pairs.stages(result).items()
        }
        assert dsc["network"] > dsc["affine"] + 0.03
        assert result.qc["fold_percent_network"] < 3
