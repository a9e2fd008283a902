"""Instance optimisation: known deformations, guards, one program, nothing scattered."""

import argparse
import functools
import json
import re

import jax
import jax.numpy as jnp
import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from unireg_jax import __main__ as cli
from unireg_jax import errors
from unireg_jax.evaluation import quality
from unireg_jax.imaging.preprocess import PreprocessSpec
from unireg_jax.manifest import Case
from unireg_jax.models import features
from unireg_jax.models.features import Extractor, sam
from unireg_jax.models.unireg import UniReg
from unireg_jax.ops import jacobian, smoothness
from unireg_jax.registration import (
    affine,
    batch,
    embedding,
    memory,
    pipeline,
    refine,
    weights,
)
from unireg_jax.registration.compiled import Compiled, Described, compile_register
from unireg_jax.registration.network import Model, initializer
from unireg_jax.registration.refine import Plan
from unireg_jax.tasks import OUTSIDE_HU, PairType, Region
from unireg_jax.verbs import judging, options
from unireg_jax.verbs import results as verb

SHAPE = (32, 16, 48)
MIND = Extractor("mind")
SPEC = PreprocessSpec(shape=SHAPE, spacing_mm=(8.0, 9.0, 8.0))
ARCHITECTURE = {
    "encoder": (4, 4, 4, 4),
    "decoder": (4, 4, 4, 4),
    "remaining": (8,),
    "field_level": 1,
    "conv_impl": "direct",
}
# What is off by several voxels is alike within windows of 3: the cost tells it less.
PLANS = {
    "image": Plan(20, "image", window=5),
    "mind": Plan(20, "mind"),
    "sam": Plan(20, "sam"),
}
# Stands for any embedding, whose maps have half the resolution.
EMBEDDING = Extractor("sam")


def known_disp():
    """A smooth bump of up to 2.4 voxels, 0 on the border, [1, X, Y, Z, 3]."""
    axes = [np.sin(np.pi * np.arange(n) / (n - 1)) ** 2 for n in SHAPE]
    bump = np.einsum("x,y,z->xyz", *axes)
    return (bump[..., None] * [1.6, -1.0, 1.5]).astype(np.float32)[None]


@pytest.fixture(scope="module")
def scans():
    """Texture in HU, moving, and fixed(x) = moving(x + known_disp(x))."""
    rng = np.random.default_rng(0)
    moving = ndimage.gaussian_filter(rng.normal(size=SHAPE), 1.5)
    moving = -200 + 250 * moving / moving.std()
    coords = np.moveaxis(known_disp()[0], -1, 0) + np.indices(SHAPE)
    fixed = ndimage.map_coordinates(moving, coords, order=3, mode="nearest")
    return np.rint(np.stack([fixed, moving])).astype(np.int16)


def compiled(plan):
    """`refine` from HU volumes: the lowered and the compiled program."""

    def whole(hu, disp, mask):
        views = []
        for volume in (hu[:1, ..., None], hu[1:, ..., None]):
            scan = Described(volume, features.describe(volume, MIND))
            own = plan.features == "sam"
            views.append(refine.view(scan, EMBEDDING, plan=plan, described=own))
        return refine.refine(disp, *views, mask, plan=plan)

    of = jax.ShapeDtypeStruct
    lowered = jax.jit(whole).lower(
        of((2, *SHAPE), jnp.int16),
        of((1, *SHAPE, 3), jnp.float32),
        of((1, *SHAPE), bool),
    )
    return lowered, lowered.compile()


@pytest.fixture(scope="module")
def programs():
    return {kind: compiled(plan) for kind, plan in PLANS.items()}


EVERYWHERE = np.ones((1, *SHAPE), bool)
STILL = np.zeros((1, *SHAPE, 3), np.float32)


def error(disp):
    """Mean distance from the truth in voxels, away from the border."""
    gap = np.linalg.norm(np.asarray(disp) - known_disp(), axis=-1)
    return gap[:, 4:-4, 4:-4, 4:-4].mean()


@pytest.mark.parametrize("kind", sorted(PLANS))
def test_refine_recovers_a_known_field(kind, scans, programs):
    out = programs[kind][1](scans, STILL, EVERYWHERE)
    assert out.disp.shape == STILL.shape and out.disp.dtype == jnp.float32
    # On half the resolution the bump is one voxel high.
    left, cost = {"sam": (0.55, 0.85)}.get(kind, (0.25, 0.5))
    assert error(out.disp) < left * error(STILL)
    assert float(out.cost_after[0]) < cost * float(out.cost_before[0])


def test_refine_by_mind_bears_other_contrasts(scans, programs):
    """What is bright in one scan is bright and dark in the other."""
    other = scans.copy()
    other[1] = np.abs(scans[1] + 200)
    left = {
        kind: error(program(other, STILL, EVERYWHERE).disp) / error(STILL)
        for kind, (_, program) in programs.items()
    }
    assert left["mind"] < 0.5 and left["mind"] < 0.7 * left["image"]


@pytest.mark.parametrize(("mean", "scale"), [(-960, 0.06), (2600, 2.0)])
def test_refine_by_mind_sees_lungs_and_what_no_ct_has(mean, scale, scans, programs):
    other = np.rint(mean + scale * (scans + 200.0)).astype(np.int16)
    out = programs["mind"][1](other, STILL, EVERYWHERE)
    assert error(out.disp) < 0.35 * error(STILL)


def test_refine_sees_soft_tissue_beside_bone(monkeypatch):
    """Rods of bone along z, in every window, hide how the tissue moves along them."""
    disp = known_disp() * (0.0, 0.0, 1.0)
    coords = np.moveaxis(disp[0], -1, 0) + np.indices(SHAPE)
    x, y, _ = np.indices(SHAPE)
    bone = (x % 4 < 2) & (y % 4 < 2)
    pairs = []
    for seed in range(3):  # one pair alone ends here or there, as sums are rounded
        noise = np.random.default_rng(seed).normal(size=SHAPE)
        tissue = ndimage.gaussian_filter(noise, 1.5)
        moving = 40 + 60 * tissue / tissue.std()
        fixed = ndimage.map_coordinates(moving, coords, order=3, mode="nearest")
        pairs.append(np.where(bone, 1200, np.stack([fixed, moving])).astype(np.int16))
    left = []
    for ranges in (refine.HU_RANGES, refine.HU_RANGES[:1]):
        monkeypatch.setattr(refine, "HU_RANGES", ranges)
        _, program = compiled(Plan(20))
        outs = (program(hu, STILL, EVERYWHERE).disp for hu in pairs)
        gaps = [np.linalg.norm(np.asarray(out) - disp, axis=-1) for out in outs]
        left.append(np.mean([gap[:, 4:-4, 4:-4, 4:-4] for gap in gaps]))
    assert left[0] < 0.6 * left[1]


def test_refine_unfolds_a_folded_start(scans):
    axis = np.arange(SHAPE[0])
    folded = STILL.copy()
    folded[..., 0] = (3.0 * np.sin(axis / 1.6))[:, None, None]
    _, program = compiled(Plan(20))
    out = program(scans, folded, EVERYWHERE)
    before, after = (float(jacobian.folding_fraction(d)[0]) for d in (folded, out.disp))
    assert before > 0.2 and after < 0.01
    # With nothing to compare no result is better than the start.
    out = program(scans, folded, np.zeros_like(EVERYWHERE))
    np.testing.assert_array_equal(out.disp, folded)


def test_refine_smoothness_weighs_more_than_once(scans):
    """A fraction and several passes over the field."""
    rough = []
    for weight in (0.5, 8.0):
        _, program = compiled(Plan(20, smoothness=weight))
        out = program(scans, STILL, EVERYWHERE)
        rough.append(float(smoothness.diffusion(out.disp)[0]))
    assert rough[1] < 0.6 * rough[0]


def test_refine_steps_are_as_long_as_asked(scans):
    """One step on each grid, two on the coarsest, and no smoothing of the field."""
    _, program = compiled(Plan(1, smoothness=0.0, step=0.25))
    out = program(scans, STILL, EVERYWHERE)
    length = np.linalg.norm(out.disp, axis=-1).max()
    # Two steps on the coarsest grid, whose voxels are four of the finest.
    assert 0.25 < length <= 0.25 * (2 * 4 + 2 + 1) + 1e-3


def test_steps_start_as_coarse_as_the_grid_allows():
    plan, usual = Plan(), [(4, 100), (2, 50), (1, 10)]
    assert refine.steps(plan, (96, 96, 80)) == usual
    assert refine.steps(plan, (96, 96, 160)) == usual
    fine = [(8, 100), (4, 50), (2, 20), (1, 10)]
    assert refine.steps(plan, (192, 192, 160)) == fine
    assert refine.steps(plan, SHAPE) == usual  # however small
    finer = [(4, 100), (2, 50), (1, 20), (0.5, 10)]
    assert refine.steps(plan._replace(finer=2), (96, 96, 80)) == finer
    # However small, it starts as coarse as on the network's own grid.
    assert refine.steps(plan._replace(finer=2), SHAPE) == finer
    finest = refine.steps(plan._replace(finer=4), SHAPE)
    assert [factor for factor, _ in finest] == [4, 2, 1, 0.5, 0.25]
    assert refine.steps(Plan(3, "sam"), (96, 96, 80)) == [(4, 6), (2, 3)]
    assert [count for _, count in refine.steps(Plan(1), SHAPE)] == [2, 1, 1]


def test_refine_without_iterations_is_exact(scans):
    _, program = compiled(PLANS["mind"]._replace(iterations=0))
    out = program(scans, known_disp(), EVERYWHERE)
    np.testing.assert_array_equal(out.disp, known_disp())
    np.testing.assert_array_equal(out.cost_before, out.cost_after)


def test_refine_never_ends_worse_than_it_began(scans):
    """Steps far too long, from the truth itself: the start is the best seen."""
    _, program = compiled(PLANS["image"]._replace(step=50.0, iterations=3))
    out = program(scans, known_disp(), EVERYWHERE)
    np.testing.assert_array_equal(out.cost_before, out.cost_after)
    np.testing.assert_array_equal(out.disp, known_disp())
    # A start without a cost stays as it is.
    broken = known_disp()
    broken[0, 5, 6, 7, 0] = np.nan
    out = program(scans, broken, EVERYWHERE)
    np.testing.assert_array_equal(out.disp, broken)
    assert np.isnan(out.cost_after[0])


def test_refine_examples_of_a_batch_are_independent(scans, programs):
    """Two pairs at once, one from a start without a cost."""
    plan = PLANS["image"]
    hu = np.repeat(scans[:, None, ..., None], 2, axis=1)
    start = np.repeat(STILL, 2, axis=0)
    start[1, 5, 6, 7, 0] = np.nan

    @jax.jit
    def both(hu, disp):
        views = (refine.view(Described(v, None), EMBEDDING, plan=plan) for v in hu)
        return refine.refine(disp, *views, plan=plan)

    out = both(hu, start)
    alone = programs["image"][1](scans, STILL, EVERYWHERE)
    np.testing.assert_allclose(out.disp[0], alone.disp[0], atol=1e-3)
    assert out.cost_after[0] < out.cost_before[0]
    np.testing.assert_array_equal(out.disp[1], start[1])


@pytest.mark.parametrize("kind", sorted(PLANS))
def test_refine_sees_neither_outside_the_scans_nor_the_mask(kind, scans, programs):
    """Where nothing may be compared, what lies there changes nothing."""
    _, program = programs[kind]
    mask = EVERYWHERE.copy()
    mask[:, :12] = False
    spoiled = scans.copy()
    # Windows and descriptors reach 6 voxels beyond the mask.
    spoiled[0, :4] = 300
    clean, other = (program(hu, STILL, mask) for hu in (scans, spoiled))
    # MIND clamps by its mean over the volume.
    tolerance = 1e-4 if kind == "image" else 0.1
    np.testing.assert_allclose(clean.disp, other.disp, atol=tolerance)
    assert float(jnp.abs(clean.disp).max()) > 1.0
    # Outside the moving scan: no pull although the images differ there.
    cut = scans.copy()
    cut[1, :16] = OUTSIDE_HU
    mask = np.zeros((1, *SHAPE), bool)
    mask[:, :8] = True
    out = program(cut, STILL, mask)
    np.testing.assert_array_equal(out.disp, STILL)
    assert float(out.cost_before[0]) == 1.0  # nothing in common


@pytest.mark.parametrize("kind", sorted(PLANS))
def test_refine_is_not_pulled_where_the_moving_scan_ends(kind, scans, programs):
    """Half of the scan itself, moved a little; nothing tells where the rest went."""
    hu = np.stack([scans[1], np.roll(scans[1], 1, axis=1)])
    truth = np.broadcast_to(np.float32([0, 1, 0]), STILL.shape)
    hu[1, :, :, 24:] = OUTSIDE_HU
    out = np.asarray(programs[kind][1](hu, STILL, EVERYWHERE).disp)
    gap = np.linalg.norm(out - truth, axis=-1)[:, 4:-4, 4:-4]
    # What has a partner finds it; on half the resolution not all windows fit.
    near, last = {"sam": (0.7, 1.2)}.get(kind, (0.2, 0.8))
    assert gap[..., 4:20].mean() < near
    assert gap[..., 20:24].max() < last
    # What has none follows, or stays: it is not torn along the body.
    assert np.abs(out[:, 4:-4, 4:-4, 24:, 2]).max() < 0.5


@pytest.mark.parametrize(("kind", "slices"), [("image", 2), ("mind", 4)])
def test_refine_of_thin_scans(kind, slices, scans, programs):
    """No window lies in them as a whole: all count, or nothing could be done."""
    hu = np.stack([scans[1], np.roll(scans[1], 1, axis=1)])
    thin = hu.copy()
    thin[..., :22] = thin[..., 22 + slices :] = OUTSIDE_HU
    out = np.asarray(programs[kind][1](thin, STILL, EVERYWHERE).disp)
    found = out[:, 4:-4, 4:-4, 22 : 22 + slices, 1]
    assert abs(np.median(found) - 1.0) < 0.3
    # Where the moving one alone is, nothing is known; nor is the field smoothed.
    hu[1] = thin[1]
    out = programs[kind][1](hu, known_disp(), EVERYWHERE)
    np.testing.assert_array_equal(out.disp, known_disp())


def test_windows_count_only_inside_both_scans():
    """What lies beyond either end, whatever it is, changes neither cost nor slope."""
    shape, plan = (1, 32, 8, 8), Plan(1)
    rng = np.random.default_rng(0)
    fixed, moving = rng.normal(size=(2, *shape, 2)).astype(np.float32)
    valid = np.ones((2, *shape, 1), np.float32)
    valid[0, :, :4] = valid[1, :, 24:] = 0.0
    disp = jnp.full((*shape, 3), 0.25)

    def found(a, b):
        views = (refine.View(a, valid[0]), refine.View(b, valid[1]))
        costs = refine._costs_at(1, 1, *views, None, plan)
        return jax.value_and_grad(lambda d: costs(d).sum())(disp)

    usual = found(fixed, moving)
    assert float(jnp.abs(usual[1]).max()) > 0
    fixed[:, :4] = moving[:, 24:] = -1.0
    for one, other in zip(usual, found(fixed, moving), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("kind", sorted(PLANS))
def test_refine_holds_no_scatter(kind, programs):
    for stage in programs[kind]:
        text = stage.as_text()
        # The operations, not names that appear in the metadata.
        assert re.search(r"\bgather\"?\(", text)
        assert not re.search(r"\bscatter\"?\(", text)
        assert not re.search(r"\bselect[-_]and[-_]scatter\"?\(", text)
        assert len(re.findall(r"\bwhile\"?\(", text)) >= 1  # loops, in the program


@pytest.fixture(scope="module")
def model():
    """A small network whose head listens to the condition."""
    module = UniReg(**ARCHITECTURE)
    params = jax.jit(initializer(module))(jax.random.key(0))
    controller = params["head"]["controller"]
    noise = jax.random.normal(jax.random.key(1), controller["kernel"].shape)
    controller["kernel"] += 0.01 * noise
    return Model(module, params, SPEC, Extractor("none"), {})


def test_refiner_serves_all_tasks_and_reads_no_parameter(model, scans, monkeypatch):
    traces = []
    original = refine.refine

    def counted(*args, **kwargs):
        traces.append(1)
        return original(*args, **kwargs)

    monkeypatch.setattr(refine, "refine", counted)
    before = jax.tree.map(np.array, model.params)
    program, refiner = compile_register(model), refine.compile_refine(model, Plan(2))
    pair = [program.describe(hu) for hu in scans]
    body = np.ones(SHAPE, bool)
    fields = []
    with jax.transfer_guard("disallow"):
        for region in Region:
            disp = program(*pair, region, PairType.INTER)
            out = refiner(*pair, body, disp)
            fields.append(jax.device_get((disp, *out)))
    assert len(traces) == 1
    for disp, refined, cost_before, cost_after in fields:
        assert cost_after[0] < cost_before[0]
        assert np.abs(refined - disp).max() > 0
    jax.tree.map(np.testing.assert_array_equal, before, model.params)
    with pytest.raises(ValueError, match="body must be"):
        refiner(*pair, body[..., None], disp)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"features": "sift"}, "features must be one of"),
        ({"iterations": -1}, "iterations must be at least 0"),
        ({"step": 0.0}, "step must be positive"),
        ({"smoothness": float("nan")}, "smoothness must be"),
        ({"smoothness": 21.0}, "smoothness must be 0 to 20"),
        ({"window": 4}, "window must be odd"),
        ({"finer": 3}, "finer must be one of"),
        ({"iterations": 2.5}, "iterations must be an int"),
    ],
)
def test_plan_refuses_what_cannot_be_done(change, match):
    with pytest.raises(ValueError, match=match):
        refine.check_plan(Plan(**change))


def test_refine_rejects_a_view_of_another_plan():
    half = (1, *(n // 2 for n in SHAPE))
    wrong = refine.View(jnp.zeros((*half, 12)), jnp.ones((*half, 1)))
    with pytest.raises(ValueError, match="with `view` and the same plan"):
        refine.refine(STILL, wrong, wrong, plan=PLANS["image"])
    with pytest.raises(ValueError, match="multiples of 4 voxels"):
        refine.refine(STILL[:, :, :6], wrong, wrong, plan=Plan(features="sam"))


@pytest.fixture(scope="module")
def files(model, scans, tmp_path_factory):
    """Two scans as files, and weights."""
    folder = tmp_path_factory.mktemp("files")
    place = np.diag([-8.0, -9.0, 8.0, 1.0])  # LPS of the network's own spacing
    paths = {}
    for name, hu in zip(("fixed", "moving"), scans, strict=True):
        image = nib.Nifti1Image(hu, place)
        image.header.set_xyzt_units("mm")
        paths[name] = str(folder / f"{name}.nii.gz")
        nib.save(image, paths[name])
    spec = {"features": "none", "preprocess": SPEC.to_json()}
    paths["weights"] = str(folder / "tiny.safetensors")
    fields = {
        k: list(v) if isinstance(v, tuple) else v for k, v in ARCHITECTURE.items()
    }
    weights.save_weights(
        folder / "tiny.safetensors", model.params, spec | {"architecture": fields}
    )
    return paths


def test_command_register_optimises_and_records_it(files, tmp_path, capsys):
    arguments = [
        *("register", "-f", files["fixed"], "-m", files["moving"], "--task", "lung"),
        *("--weights", files["weights"], "-o", str(tmp_path), "--json"),
    ]
    plan = ("--io-features", "image", "--io-smoothness", "2.5")
    assert cli.main([*arguments, *plan]) == 0
    record = json.loads(capsys.readouterr().out)
    used = record["settings"]["refine"]
    assert (used["iterations"], used["features"], used["smoothness"]) == (
        *(50, "image", 2.5),  # without being asked for
    )
    qc = record["qc"]
    assert qc["refine_after"] < qc["refine_before"]
    assert record["timings"]["refine"] > 0
    # What is warned of is what the gate and the page would say.
    assert quality.kind_of(record["settings"]) == "intra refined"
    found = judging.findings(record)
    assert {f.line for f in found} <= set(record["warnings"])
    told = {line.split(":")[0] for line in record["warnings"]}
    assert told & {c.reason for c in quality.CHECKS.values()} == {
        f.reason for f in found
    }

    line = [*arguments, "--case", "other", "--io-smoothness", "1"]
    line += ["--io-iterations", "0"]
    assert cli.main(line) == errors.USAGE
    assert "need --io-iterations" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main([*arguments, "--io-iterations", "-1"])
    assert "whole number" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main([*arguments, "--io-iterations", "2", "--reg-weight", "21"])
    assert "from 0 to 20 expected" in capsys.readouterr().err


def test_choices_are_those_of_refine_and_of_the_search():
    assert verb.IO_FEATURES == tuple(sorted(refine.LEVELS))
    assert verb.IO_FINER == refine.FINER
    assert options.MOST_SMOOTHNESS == refine.MOST_SMOOTHNESS
    assert options.SMOOTHNESS == Plan().smoothness
    assert verb.SEARCH_ALGORITHM == affine.ALGORITHM
    assert Plan().features == "image"  # as `results.settings_sha256` has it


def test_digest_of_settings_names_the_plan_that_is_used(monkeypatch):
    def digest(task="lung", case=None, **given):
        asked = {"affine": "auto", "fov": "auto", "io_iterations": 50}
        asked |= {"io_features": None, "reg_weight": None, "io_finer": None}
        asked |= {"passes": 1, "symmetric": False, "write_inverse": False} | given
        case = case or Case("a", "f.nii", "m.nii", task)
        return verb.settings_sha256(argparse.Namespace(**asked), case)

    plain = digest()
    # Points whose tables had no header were in mm once.
    pointed = Case("a", "f.nii", "m.nii", "lung", fixed_points="f.csv")
    assert digest(case=pointed) != plain
    assert digest(io_features="image", reg_weight=0.5, io_finer=1) == plain
    others = [digest(reg_weight=1.0), digest(io_features="mind"), digest(io_finer=2)]
    others += [digest(io_iterations=0), digest(io_iterations=49)]
    others += [digest(passes=2), digest(symmetric=True), digest(write_inverse=True)]
    assert digest("none", passes=2) == digest("none")  # no network, no passes
    with monkeypatch.context() as patch:
        patch.setattr(verb, "_FEATURES_ALGORITHM", "another")
        assert digest(io_features="mind") != others[1] and digest() == plain
    monkeypatch.setattr(verb, "_IO_ALGORITHM", "another")
    assert len({plain, *others, digest()}) == 10
    assert digest(io_iterations=0) == others[3]


@pytest.mark.parametrize("kind", [*verb.AFFINES, "given"])
def test_digest_of_settings_knows_the_search_where_there_is_one(monkeypatch, kind):
    asked = {"fov": "auto", "io_iterations": 0, "io_features": None, "passes": 1}
    asked |= {"io_finer": None, "symmetric": False, "reg_weight": None}
    asked |= {"write_inverse": False}
    init = "a.txt" if kind == "given" else None
    asked["affine"] = "auto" if init else kind
    case = Case("a", "f.nii", "m.nii", "lung", init=init)
    before = verb.settings_sha256(argparse.Namespace(**asked), case)
    monkeypatch.setattr(verb, "SEARCH_ALGORITHM", "another")
    after = verb.settings_sha256(argparse.Namespace(**asked), case)
    assert (after == before) == (kind in ("none", "com", "given"))


@pytest.mark.parametrize(
    ("given", "matters"),
    [
        ({"affine": "features"}, True),
        ({"affine": "coarse"}, True),
        ({"io_features": "sam"}, True),
        ({"io_features": "mind"}, False),
        ({}, False),
    ],
)
def test_digest_of_settings_knows_the_embedding(monkeypatch, tmp_path, given, matters):
    """What describes the scans is named by the environment alone."""
    asked = {"affine": "auto", "fov": "auto", "io_iterations": 50, "passes": 1}
    asked |= {"io_finer": None, "symmetric": False, "reg_weight": None}
    asked |= {"io_features": None, "write_inverse": False} | given
    case = Case("a", "f.nii", "m.nii", "lung")
    found = set()
    for content in (None, b"one", b"two"):
        if content:
            path = tmp_path / f"{content.decode()}.safetensors"
            path.write_bytes(content)
            monkeypatch.setenv("UNIREG_SAM", str(path))
        found.add(verb.settings_sha256(argparse.Namespace(**asked), case))
    assert len(found) == (3 if matters else 1)


def test_many_pairs_are_refined_as_one(files, model):
    pair = batch.Pair(files["fixed"], files["moving"], "lung")
    plan = Plan(3, "image", smoothness=2.5)
    how = {"passes": 2, "symmetric": True, "weights": model, "refine": plan}
    (outcome,) = batch.register_many([pair], **how)
    single = pipeline.register(files["fixed"], files["moving"], task="lung", **how)
    assert outcome.value.settings["passes"] == 2
    np.testing.assert_array_equal(outcome.value.disp_mm, single.disp_mm)
    assert single.settings["refine"] == plan._asdict()
    assert single.qc["refine_after"] < single.qc["refine_before"]
    plain = pipeline.register(
        files["fixed"], files["moving"], task="lung", weights=model, refine=Plan(0)
    )
    assert "refine" not in plain.settings and "refine_after" not in plain.qc
    assert np.abs(plain.disp_mm - single.disp_mm).max() > 0


@pytest.fixture(scope="module")
def embedding_file(tmp_path_factory):
    """A small anatomical embedding at the spacing of the scans."""
    fields = {"stem": 4, "stages": [4, 4, 6, 6], "channels": 5}
    network = sam.Sam(norm="batch", conv_impl="direct", **fields)
    variables = jax.jit(embedding.initializer(network))(jax.random.key(0))
    path = tmp_path_factory.mktemp("embedding") / "sam.safetensors"
    spec = {"kind": "sam", "features": "sam", "preprocess": SPEC.to_json()}
    weights.save_weights(
        path, jax.tree.map(np.asarray, variables), spec | {"architecture": fields}
    )
    return path


def test_embedding_of_the_network_serves_refinement_again(
    files, model, embedding_file, monkeypatch
):
    """The fixed scan's are computed once for both, the moving scan's once for each."""
    own = model._replace(extractor=embedding.load_extractor(embedding_file))
    calls, real = [], Compiled.describe

    def counted(self, hu):
        calls.append(hu)
        return real(self, hu)

    monkeypatch.setattr(Compiled, "describe", counted)
    result = pipeline.register(
        *(files["fixed"], files["moving"]),
        task="none",
        weights=own,
        affine="none",
        refine=Plan(3, "sam"),
    )
    assert len(calls) == 2
    assert result.settings["refined_by"] == own.extractor.label
    assert result.qc["refine_after"] < result.qc["refine_before"]
    assert np.abs(result.network_disp).max() > 0.1


def test_task_none_refines_from_the_affine_alone(files, model, monkeypatch):
    """No network: zero without iterations, and no condition needed."""
    plan = Plan(3, "image", smoothness=2.5)
    run = functools.partial(
        pipeline.register, files["fixed"], files["moving"], task="none", weights=model
    )
    described = []
    with monkeypatch.context() as patch:
        # Not by the network's features, whatever these are.
        patch.setenv(embedding.VARIABLE, "none.safetensors")
        by_mind = run(affine="none", refine=Plan(1, "mind", finer=2))
    assert "refined_by" not in by_mind.settings
    monkeypatch.setattr(Compiled, "describe", described.append)
    still = run(affine="none")
    assert not still.network_disp.any() and still.settings["region"] is None
    refined = run(affine="none", refine=plan)
    assert described == []  # nobody compares features here
    assert np.abs(refined.network_disp).max() > 0
    assert refined.qc["refine_after"] < refined.qc["refine_before"]
    with pytest.raises(ValueError, match="without the network"):
        compile_register(model, network=False)(
            *(np.zeros(SHAPE, np.int16) for _ in range(2)), 0, 0
        )


@pytest.mark.parametrize("kind", ["image", "mind"])
def test_finer_grid_sees_what_the_network_s_cannot(kind, scans, model):
    """Scans on twice the voxels: the same place, and an error in mm that is less."""
    fine = [
        ndimage.zoom(hu.astype(np.float32), 2, order=3, grid_mode=True, mode="nearest")
        for hu in scans
    ]
    place = np.diag([4.0, 4.5, 4.0, 1.0])
    run = functools.partial(
        pipeline.register,
        *(np.rint(hu).astype(np.int16) for hu in fine),
        task="none",
        weights=model,
        affine="none",
        fixed_vox2world=place,
        moving_vox2world=place,
    )
    truth = np.stack(
        [
            ndimage.zoom(part * mm, 2, order=1, grid_mode=True, mode="nearest")
            for part, mm in zip(
                np.moveaxis(known_disp()[0], -1, 0), (8, 9, 8), strict=True
            )
        ],
        axis=-1,
    )
    left = {}
    for finer in (1, 2):
        result = run(refine=Plan(20, kind, finer=finer))
        assert result.network_disp.shape[:3] == tuple(finer * n for n in SHAPE)
        assert result.network_grid.shape == result.network_disp.shape[:3]
        corner = result.network_grid.vox2world @ [-0.5, -0.5, -0.5, 1.0]
        spacing = np.diag(result.network_grid.vox2world)[:3]
        np.testing.assert_allclose(spacing * finer, SPEC.spacing_mm)
        if finer == 1:
            first = corner
        np.testing.assert_allclose(corner, first)
        assert result.settings["refine"]["finer"] == finer
        assert result.qc["refine_after"] < result.qc["refine_before"]
        gap = np.linalg.norm(result.disp_mm - truth, axis=-1)
        left[finer] = gap[8:-8, 8:-8, 8:-8].mean()
    assert left[2] < 0.9 * left[1]


def test_command_finer(files, tmp_path, capsys):
    line = [
        *("register", "-f", files["fixed"], "-m", files["moving"], "--task", "lung"),
        *("--weights", files["weights"], "-o", str(tmp_path), "--json"),
        *("--io-iterations", "2", "--io-finer", "2"),
    ]
    assert cli.main(line) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["settings"]["refine"]["finer"] == 2


def test_command_task_none(files, tmp_path, capsys):
    arguments = [
        *("register", "-f", files["fixed"], "-m", files["moving"], "--task", "none"),
        *("--weights", files["weights"], "-o", str(tmp_path), "--json"),
        *("--affine", "none", "--io-iterations", "2"),
    ]
    assert cli.main(arguments) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["settings"]["task"] == "none"
    assert record["settings"]["region"] is None
    assert record["qc"]["refine_after"] < record["qc"]["refine_before"]


def test_refine_by_an_embedding(model, files, embedding_file, tmp_path, monkeypatch):
    """The embedding of $UNIREG_SAM, whatever features the network itself has."""
    run = functools.partial(
        pipeline.register,
        *(files["fixed"], files["moving"]),
        task="none",
        weights=model,
        affine="none",
        refine=Plan(3, "sam"),
    )
    monkeypatch.setenv(embedding.VARIABLE, str(embedding_file))
    result = run()
    assert result.settings["refine"]["features"] == "sam"
    assert result.qc["refine_after"] < result.qc["refine_before"]
    assert not any(line.startswith("refinement:") for line in result.warnings)
    finer = run(refine=Plan(1, "sam", finer=2))  # voxels that it was not trained on
    assert any("the grid has (4.0, 4.5, 4.0)" in line for line in finer.warnings)
    monkeypatch.setenv(embedding.VARIABLE, str(tmp_path / "none.safetensors"))
    with pytest.raises(errors.UserError, match="train_sam"):
        run()


def test_grid_that_takes_more_memory_than_there_is_is_refused(model, monkeypatch):
    plan = Plan(1, finer=4)
    monkeypatch.setattr(memory, "_LEAST_BYTES", 0)
    refine.compile_refine(model, plan)
    monkeypatch.setattr(memory, "available_bytes", lambda: 2**20)
    with pytest.raises(
        errors.UserError, match="128x64x192 voxels: 1 MiB are free"
    ) as error:
        refine.compile_refine(model, plan)
    assert (error.value.reason, error.value.exit_code) == ("too_large", errors.LIMIT)
    assert "--io-finer" in str(error.value)


def test_memory_is_looked_at_where_the_cpu_was_asked_for_beside_a_gpu(monkeypatch):
    monkeypatch.setattr(memory, "_LEAST_BYTES", 0)
    monkeypatch.setattr(memory, "available_bytes", lambda: 0)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    with jax.default_device(jax.devices("cpu")[0]):
        program = jax.jit(jnp.sin).lower(jnp.zeros(5)).compile()
        with pytest.raises(errors.UserError, match="a sine: 0 MiB are free"):
            memory.check_program(program, "a sine", "take less")
