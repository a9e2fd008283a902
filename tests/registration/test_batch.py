"""Many pairs: the same results, shared work done once, faults that stay apart."""

import threading
from pathlib import Path

import jax
import nibabel as nib
import numpy as np
import pytest

from data_pipeline import synthetic
from unireg_jax.errors import UserError
from unireg_jax.imaging import nifti
from unireg_jax.imaging.nifti import Volume
from unireg_jax.imaging.preprocess import PreprocessSpec
from unireg_jax.models.features import Extractor
from unireg_jax.models.unireg import UniReg
from unireg_jax.registration import compiled, pipeline
from unireg_jax.registration.batch import Outcome, Pair, register_many
from unireg_jax.registration.network import Model, initializer
from unireg_jax.registration.pipeline import register

HU = np.zeros((4, 5, 6), np.int16)
SPEC = PreprocessSpec(shape=(32, 16, 32), spacing_mm=(12.0, 18.0, 11.0))


@pytest.fixture(scope="module")
def model():
    module = UniReg(
        encoder=(4, 4, 4, 4),
        decoder=(4, 4, 4, 4),
        remaining=(8,),
        field_level=1,
        conv_impl="direct",
    )
    params = jax.jit(initializer(module))(jax.random.key(0))
    controller = params["head"]["controller"]
    # As initialised it is 0, and the condition has no say.
    noise = jax.random.normal(jax.random.key(1), controller["kernel"].shape)
    controller["kernel"] = 0.01 * noise
    return Model(module, params, SPEC, Extractor("none"), {})


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    """Four scans on disk, [40, 30, 36] at 9 mm; the first is the atlas."""
    folder = tmp_path_factory.mktemp("scans")
    paths = []
    for seed in range(4):
        scan = synthetic.phantom("chest", shape=(40, 30, 36), spacing_mm=9.0, seed=seed)
        paths.append(str(folder / f"{seed}.nii.gz"))
        nifti.write_volume(paths[-1], scan.hu, scan.vox2world)
    return paths


def atlas_pairs(scans, **options):
    options = {"task": "chest", "affine": "none"} | options
    return [Pair(scans[0], path, name=path, **options) for path in scans[1:]]


def threads():
    return [t for t in threading.enumerate() if t.name.startswith("unireg-pair")]


def test_register_many_equals_one_by_one(model, scans):
    pairs = [*atlas_pairs(scans), Pair(scans[1], scans[0], "lung", affine="com")]
    outcomes = list(register_many(pairs, weights=model))
    assert [outcome.pair for outcome in outcomes] == pairs
    for pair, outcome in zip(pairs, outcomes, strict=True):
        assert outcome.error is None
        expected = register(
            pair.fixed, pair.moving, task=pair.task, affine=pair.affine, weights=model
        )
        np.testing.assert_array_equal(outcome.value.disp_mm, expected.disp_mm)
        np.testing.assert_array_equal(outcome.value.warped, expected.warped)
        np.testing.assert_array_equal(outcome.value.affine, expected.affine)
        assert outcome.value.qc == expected.qc
        assert outcome.value.settings == expected.settings


def count(monkeypatch, owner, name):
    """Counts the calls of a function, by its first argument."""
    calls = []
    real = getattr(owner, name)

    def counted(*args, **kwargs):
        calls.append(args[0])
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, counted)
    return calls


def test_register_many_reads_and_describes_an_atlas_once(model, scans, monkeypatch):
    reads = count(monkeypatch, nifti, "read_image")
    described = count(monkeypatch, compiled.Compiled, "describe")
    bodies = count(monkeypatch, pipeline.preprocess, "body_mask")
    traces = count(monkeypatch, compiled, "_predict")
    list(register_many(atlas_pairs(scans), weights=model))
    assert sorted(reads) == scans
    assert len(described) == 1 + 3  # the atlas, and each moving scan
    assert len(bodies) == 1 + 4  # where the atlas is compared; what each scan shows
    assert len(traces) == 1


def test_register_many_forgets_scans_beyond_keep(model, scans, monkeypatch):
    reads = count(monkeypatch, nifti, "read_image")
    pairs = atlas_pairs(scans)
    pairs = [*pairs, pairs[0], pairs[0]]
    list(register_many(pairs, weights=model, workers=1, keep=2))
    # The atlas stays, since it comes back; the first moving scan has to be read again.
    assert sorted(reads) == sorted([*scans, scans[1]])


def test_register_many_failure_stays_with_its_pair(model, scans, tmp_path):
    torn = tmp_path / "torn.nii.gz"
    torn.write_bytes(Path(scans[1]).read_bytes()[:2000])
    good = atlas_pairs(scans)
    bad = [
        good[0]._replace(moving=str(torn)),
        good[0]._replace(fixed=str(tmp_path / "absent.nii.gz")),
        good[0]._replace(task="knee"),
        good[0]._replace(affine=np.diag([1.0, 1.0, 1.0, 1.0]) + far()),
    ]
    pairs = [bad[0], good[0], bad[1], bad[2], good[1], bad[3], good[2]]
    outcomes = list(register_many(pairs, weights=model, workers=2))
    reasons = [outcome.error and outcome.error.reason for outcome in outcomes]
    assert reasons == [
        "truncated",
        None,
        "not_found",
        "task_unknown",
        None,
        "no_overlap",
        None,
    ]
    assert all((o.value is None) == (o.error is not None) for o in outcomes)
    errors = [outcome.error for outcome in outcomes if outcome.error]
    # Frames of a trace would keep the volumes of every failed pair in memory.
    assert not any(e.__traceback__ or e.__cause__ or e.__context__ for e in errors)
    assert not threads()


def far():
    shift = np.zeros((4, 4))
    shift[2, 3] = 5000.0  # mm
    return shift


def test_register_many_refuses_a_volume_of_one_slice(model, scans):
    volume = nifti.read_image(scans[0])
    thin = volume._replace(data=volume.data[..., :1])
    (outcome,) = register_many(
        [Pair(thin, scans[1], name="thin", task="chest")], weights=model
    )
    assert outcome.error.reason == "fov"


@pytest.mark.parametrize("held", [np.zeros, lambda _: nib.Nifti1Image(HU, np.eye(4))])
def test_register_many_says_how_to_pass_what_is_no_file(model, scans, held):
    """An array has no place, and the axes of a result are those of a Volume."""
    pairs = [Pair(scans[0], held((4, 5, 6)), "chest", affine="none")]
    with pytest.raises(ValueError, match=r"path or Volume, got .*as_volume\(.*LPS mm"):
        list(register_many(pairs, weights=model))


def test_register_many_yields_in_order_whoever_ends_first(model, scans):
    volumes = [nifti.read_image(path) for path in scans]
    pairs = atlas_pairs(volumes)
    ended, others = [], threading.Barrier(3)

    def finish(pair, registration, fixed, moving):
        assert isinstance(fixed, Volume) and fixed is volumes[0]
        assert registration.disp_mm.shape == (*fixed.data.shape, 3)
        if moving is not volumes[1]:
            ended.append(moving)
        others.wait(timeout=60)  # seconds, of a test that hangs
        if moving is volumes[1]:
            ended.append(moving)
        return next(i for i, volume in enumerate(volumes) if volume is moving)

    outcomes = list(register_many(pairs, weights=model, finish=finish, workers=3))
    assert [outcome.value for outcome in outcomes] == [1, 2, 3]
    assert ended[-1] is volumes[1]
    assert isinstance(outcomes[0], Outcome)


def test_register_many_takes_pairs_only_a_few_ahead(model, scans):
    taken = []

    def pairs():
        for i in range(8):
            taken.append(i)
            yield Pair(scans[0], scans[1], "knee")

    outcomes = register_many(pairs(), weights=model, workers=2)
    assert taken == []
    next(outcomes)
    assert len(taken) == 3
    outcomes.close()
    assert len(taken) == 3 and not threads()


def test_register_many_finish_may_refuse_a_pair(model, scans):
    def finish(pair, registration, fixed, moving):
        if pair.name == scans[2]:
            raise UserError("storage", "disk full")
        return pair.name

    outcomes = list(register_many(atlas_pairs(scans), weights=model, finish=finish))
    assert [o.value for o in outcomes] == [scans[1], None, scans[3]]
    assert outcomes[1].error.reason == "storage"


def test_register_many_fault_of_ours_ends_it_without_threads(model, scans):
    def finish(pair, registration, fixed, moving):
        raise RuntimeError("odd")

    with pytest.raises(RuntimeError, match="odd"):
        list(register_many(atlas_pairs(scans), weights=model, finish=finish))
    assert not threads()
    with pytest.raises(ValueError, match="affine must be one of"):
        list(register_many(atlas_pairs(scans, affine="fancy"), weights=model))
    assert not threads()

    def pairs():
        yield from atlas_pairs(scans)[:1]
        raise OSError("the list ends early")

    with pytest.raises(OSError, match="ends early"):
        list(register_many(pairs(), weights=model))
    assert not threads()


@pytest.mark.parametrize("options", [{"workers": 0}, {"keep": 0}])
def test_register_many_rejects(model, options):
    with pytest.raises(ValueError, match="at least 1"):
        register_many([], weights=model, **options)
