"""One pair from arrays: grids, pre-alignment, composition, refusals."""

import types

import jax
import jax.numpy as jnp
import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from data_pipeline import synthetic
from unireg_jax import errors
from unireg_jax.errors import UserError
from unireg_jax.evaluation import metrics
from unireg_jax.imaging import nifti, orientation, preprocess
from unireg_jax.imaging.nifti import Volume
from unireg_jax.imaging.preprocess import Grid, PreprocessSpec
from unireg_jax.models import features
from unireg_jax.models.conditioning import dynamic
from unireg_jax.models.unireg import UniReg
from unireg_jax.ops import warp
from unireg_jax.registration import affine as prealign
from unireg_jax.registration import compiled, memory, pipeline, prediction, weights
from unireg_jax.registration import matcher as matching_scans
from unireg_jax.registration.network import initializer, load_model
from unireg_jax.registration.pipeline import register
from unireg_jax.registration.refine import Plan
from unireg_jax.tasks import Region

SPEC = PreprocessSpec(shape=(48, 32, 48), spacing_mm=(8.0, 9.0, 8.0))
ARCHITECTURE = {"encoder": (4, 4, 4, 4), "decoder": (4, 4, 4, 4), "remaining": (8,)}
# At a few pixels a search of a few steps is enough.
QUICK = prealign.Plan(starts=2, finalists=1, coarse_steps=5, fine_steps=5)


def network(scale=1.0):
    """A small random network; `scale` multiplies the field's last layer."""
    module = UniReg(**ARCHITECTURE, field_level=1, conv_impl="direct")
    params = jax.jit(initializer(module))(jax.random.key(0))
    controller = params["head"]["controller"]
    last = slice(dynamic.NUM_WEIGHTS - 3 * dynamic.HIDDEN, dynamic.NUM_WEIGHTS)
    controller["bias"] = controller["bias"].at[last].multiply(scale)
    # As initialised it is 0, and the condition has no say.
    noise = jax.random.normal(jax.random.key(1), controller["kernel"].shape)
    controller["kernel"] = 5e-7 * scale * noise
    spec = {
        "architecture": {**ARCHITECTURE, "field_level": 1, "conv_impl": "direct"},
        "features": "none",
        "preprocess": SPEC.to_json(),
    }
    return params, spec


def saved(folder, scale=1.0):
    path = folder / "tiny.safetensors"
    weights.save_weights(path, *network(scale))
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A network whose field moves by millimetres."""
    return load_model(saved(tmp_path_factory.mktemp("weights"), scale=3e3))


@pytest.fixture(scope="module")
def calm(tmp_path_factory):
    """A network as initialised: a field near zero."""
    return load_model(saved(tmp_path_factory.mktemp("weights")))


def oblique(
    shape, spacing, *, codes="LPS", angle_deg=8.0, center=(10.0, -220.0, 900.0)
):
    """An oblique grid, [4, 4]; codes other than LPS flip and permute its axes."""
    angle = np.deg2rad(angle_deg)
    turn = np.eye(3)
    turn[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    axes = np.zeros((3, 3))
    for column, code in enumerate(codes):
        axes["LRPASI".find(code) // 2, column] = 1.0 if code in "LPS" else -1.0
    vox2world = np.eye(4)
    vox2world[:3, :3] = turn @ axes @ np.diag(spacing)
    vox2world[:3, 3] = center - vox2world[:3, :3] @ (np.array(shape) - 1) / 2
    return vox2world


def smooth_body(shape, vox2world, *, shift=(0.0, 0.0, 0.0)):
    """A smooth ellipsoid of HU with an off-centre bright spot, int16."""
    axes = np.meshgrid(*(np.arange(n) for n in shape), indexing="ij")
    x = np.stack(axes, axis=-1) @ vox2world[:3, :3].T + vox2world[:3, 3]
    x = x - np.array([10.0, -220.0, 900.0]) - shift
    body = 1 / (1 + np.exp((np.square(x / [110, 90, 130]).sum(-1) - 1) * 6))
    spot = np.exp(-np.square((x - [40, -20, 50]) / 45).sum(-1))
    return np.rint(-1000 + 1040 * body + 250 * spot).astype(np.int16)


def pair():
    """Two scans of different grid, orientation and position."""
    shapes = (33, 40, 29), (36, 28, 41)
    grids = (
        oblique(shapes[0], (8.0, 7.0, 10.0), codes="LPS"),
        oblique(shapes[1], (8.5, 9.5, 7.5), codes="ASR", angle_deg=-5.0),
    )
    images = (
        smooth_body(shapes[0], grids[0]),
        smooth_body(shapes[1], grids[1], shift=(12.0, 5.0, -9.0)),
    )
    return images, grids


def run(images, grids, **kwargs):
    return register(
        *images, fixed_vox2world=grids[0], moving_vox2world=grids[1], **kwargs
    )


def read_at(image, vox2world, points):
    """Linear sampling at world points in float64, -1000 outside the outer faces."""
    to_voxel = np.linalg.inv(vox2world)
    coords = points @ to_voxel[:3, :3].T + to_voxel[:3, 3]
    limit = np.array(image.shape)
    inside = ((coords >= -0.5) & (coords <= limit - 0.5)).all(-1)
    coords = np.clip(coords, 0, limit - 1)
    base = np.minimum(coords.astype(int), limit - 2)
    part = coords - base
    out = 0.0
    for corner in np.ndindex(2, 2, 2):
        weight = np.prod(np.where(corner, part, 1 - part), axis=-1)
        x, y, z = np.moveaxis(base + corner, -1, 0)
        out = out + weight * image[x, y, z]
    return np.where(inside, out, -1000.0)


def world(shape, vox2world):
    axes = np.meshgrid(*(np.arange(n) for n in shape), indexing="ij")
    return np.stack(axes, axis=-1) @ vox2world[:3, :3].T + vox2world[:3, 3]


MATRIX = np.array(
    [
        [1.05, 0.04, 0.0, -3.0],
        [-0.03, 0.97, 0.06, 61.0],
        [0.0, -0.02, 1.02, -30.0],
        [0.0, 0.0, 0.0, 1.0],
    ]
)


def test_register_initial_network_is_near_the_identity(calm):
    hu = synthetic.phantom("chest", shape=(40, 30, 36), spacing_mm=9.0, seed=1)
    result = run(
        (hu.hu, hu.hu), (hu.vox2world, hu.vox2world), task="lung", weights=calm
    )
    assert result.settings["affine_used"] == "none"
    np.testing.assert_array_equal(result.affine, np.eye(4))
    assert 0 < np.abs(result.disp_mm).max() < 0.1 * min(SPEC.spacing_mm)
    # Steep edges of 1000 HU per voxel times a hundredth of a voxel.
    assert np.abs(result.warped.astype(float) - hu.hu).mean() < 1.0
    assert result.qc["ncc_before"] == pytest.approx(1.0, abs=1e-5)
    assert result.qc["fold_percent_network"] == 0.0


def test_register_total_map_is_affine_after_network(model):
    images, grids = pair()
    result = run(images, grids, task="chest", weights=model, affine=MATRIX)
    assert result.disp_mm.shape == (*images[0].shape, 3)
    np.testing.assert_array_equal(result.vox2world, grids[0])
    x = world(images[0].shape, grids[0])
    # The network's part in mm, sampled in float64 from its own grid.
    grid = result.network_grid
    u = [
        read_at_clamped(result.network_disp[..., i] * SPEC.spacing_mm[i], grid, x)
        for i in range(3)
    ]
    u = np.stack(u, axis=-1)
    assert 1.0 < np.abs(u).max() < 60.0
    y = (x + u) @ MATRIX[:3, :3].T + MATRIX[:3, 3]
    # float32 coordinates of some hundred voxels.
    np.testing.assert_allclose(result.disp_mm, y - x, atol=2e-3)
    np.testing.assert_allclose(pipeline.residual_mm(result), u, atol=2e-3)
    expected = read_at(images[1], grids[1], y)
    assert result.warped.dtype == np.int16
    edge = np.abs(expected + 1000) < 1  # where a rounding decides inside or outside
    gap = np.abs(result.warped - expected)[~edge]
    assert gap.max() < 1.0 and edge.mean() < 0.9


def read_at_clamped(component, grid, points):
    to_voxel = np.linalg.inv(grid.vox2world)
    coords = points @ to_voxel[:3, :3].T + to_voxel[:3, 3]
    coords = np.clip(coords, 0, np.array(grid.shape) - 1)
    return read_at(component, np.eye(4), coords)


def test_register_slabs_give_the_same_as_one_piece(model, monkeypatch):
    images, grids = pair()
    whole = run(images, grids, task="chest", weights=model, affine=MATRIX)
    _, y, z = images[0].shape
    # 8 slices a slab: 33 is no multiple
    monkeypatch.setattr(pipeline, "_SLAB_VOXELS", 4 * y * z)
    parts = run(images, grids, task="chest", weights=model, affine=MATRIX)
    np.testing.assert_allclose(parts.disp_mm, whole.disp_mm, atol=1e-4)
    assert np.abs(parts.warped - whole.warped).max() <= 1


def test_register_scans_of_nearly_one_size_share_every_program(calm, monkeypatch):
    traces = []
    slab = pipeline._slab

    def counted(*args, **kwargs):
        traces.append(1)
        return slab(*args, **kwargs)

    monkeypatch.setattr(pipeline, "_slab", counted)
    images, grids = pair()
    for drop in range(3):
        cut = images[0][:, :, : 29 - drop], images[1][: 36 - drop, :, : 41 - drop]
        run(cut, grids, task="lung", weights=calm, affine="none")
    assert len(traces) == 1


def test_register_does_not_depend_on_the_storage_order(model):
    images, grids = pair()
    first = run(images, grids, task="abdomen", weights=model, affine=MATRIX)
    # The same fixed scan stored S, R, A instead of L, P, S.
    turned = np.transpose(images[0][::-1, ::-1], (2, 0, 1))
    flip = np.eye(4)[:, [2, 0, 1, 3]]
    place = np.diag([-1.0, -1.0, 1.0, 1.0])
    place[:2, 3] = np.array(images[0].shape[:2]) - 1
    result = run(
        (turned, images[1]),
        (grids[0] @ place @ flip, grids[1]),
        task="abdomen",
        weights=model,
        affine=MATRIX,
    )
    back = np.transpose(result.disp_mm, (1, 2, 0, 3))[::-1, ::-1]
    np.testing.assert_allclose(back, first.disp_mm, atol=1e-3)
    assert (
        np.abs(np.transpose(result.warped, (1, 2, 0))[::-1, ::-1] - first.warped).max()
        <= 1
    )


def test_register_prealigns_with_auto(calm, monkeypatch):
    monkeypatch.setattr(prealign, "Plan", lambda: QUICK)
    images, grids = pair()
    lines = []
    common = dict(weights=calm, progress=lines.append)
    inter = run(images, grids, task="chest", **common)
    assert inter.settings["affine_used"] == "affine"
    intra = run(images, grids, task="lung", **common)
    assert intra.settings["affine_used"] == "none"
    far = grids[1].copy()
    far[2, 3] += 200.0
    # Breathing changes the size of a chest, not that of an abdomen.
    moved = run(images, (grids[0], far), task="lung", **common)
    assert moved.settings["affine_used"] == "affine"
    moved = run(images, (grids[0], far), task="liver", **common)
    assert moved.settings["affine_used"] == "rigid"
    assert any("200 mm apart" in line for line in lines)
    # Found, though the two do not overlap as they lie.
    assert moved.qc["ncc_before"] > 0.9
    forced = run(images, grids, task="lung", pair_type="inter", **common)
    assert forced.settings["pair_type"] == "inter"
    assert forced.settings["affine_used"] == "affine"


@pytest.fixture(scope="module")
def matcher(tmp_path_factory):
    """A network as initialised that joins MIND, at the resolution to match by."""
    params, spec = network()
    grid = PreprocessSpec(shape=(64, 48, 64), spacing_mm=(6.0, 6.0, 6.0))
    path = tmp_path_factory.mktemp("weights") / "mind.safetensors"
    changed = {"features": "mind", "preprocess": grid.to_json()}
    weights.save_weights(path, params, spec | changed)
    return load_model(path)


def turned_phantoms(angle_deg=12.0):
    """One subject, and its upper part on another grid; fixed world -> moving world,
    exactly; organs that both show."""
    fixed = synthetic.phantom("headneck", shape=(60, 44, 56), spacing_mm=6.0, seed=3)
    moving = synthetic.phantom(
        "headneck", shape=(58, 52, 50), spacing_mm=(5.5, 6.5, 7.0), seed=3
    )
    low = 16  # slices cut off: the centroids are no help
    place = moving.vox2world @ oblique(
        (1, 1, 1), (1, 1, 1), angle_deg=0.0, center=(0, 0, low)
    )
    moving = moving._replace(hu=moving.hu[:, :, low:], vox2world=place)
    truth = oblique((1, 1, 1), (1.0, 1.0, 1.0), angle_deg=angle_deg)
    organs = np.argwhere(fixed.labels > 0) @ fixed.vox2world[:3, :3].T
    organs = organs + fixed.vox2world[:3, 3]
    return fixed, moving, truth, organs[organs[:, 2] > place[2, 3]]


@pytest.fixture
def own_features(monkeypatch):
    """Matching by the network's own features, whatever embedding is installed."""
    monkeypatch.setattr(matching_scans, "load_matcher", lambda own: own)


def test_register_prealigns_by_features(matcher, own_features):
    fixed, moving, truth, organs = turned_phantoms()
    places = fixed.vox2world, truth @ moving.vox2world
    lines, gaps = [], {}
    for kind in ("features", "coarse", "com"):
        result = run(
            (fixed.hu, moving.hu),
            places,
            task="headneck",
            weights=matcher,
            affine=kind,
            progress=lines.append,
        )
        assert result.settings["affine_used"] == result.settings["affine"] == kind
        assert result.warnings == ()
        wrong = result.affine - truth
        gap = organs @ wrong[:3, :3].T + wrong[:3, 3]
        gaps[kind] = np.linalg.norm(gap, axis=1).mean()
        if kind != "com":
            assert result.settings["matched_by"] == "mind"
        moved = np.abs(result.network_disp).max()
        assert (moved > 0.1) == (kind == "coarse")  # the network is as initialised
    # A voxel of the fine grid: MIND turns a little with the patient.
    assert gaps["features"] < 12.0 < 24.0 < gaps["com"], gaps
    assert any("matches, affine map" in line for line in lines)


def test_network_sees_the_coarsely_warped_scan_and_is_composed(matcher, own_features):
    """total(x) = u(x) + coarse(x + u(x)), u of the network for the warped scan."""
    fixed, moving, truth, _ = turned_phantoms(6.0)
    scans = [
        Volume(fixed.hu, fixed.vox2world),
        Volume(moving.hu, truth @ moving.vox2world),
    ]
    session, seen = pipeline.Session(matcher), []
    programs = session.programs
    shape = programs.shape
    x, y, z = np.meshgrid(*map(np.arange, shape), indexing="ij")
    known = np.stack([3 * np.sin(y / 9), 2 * np.cos(z / 7), 1 + x / 30], -1)
    known = known[None].astype(np.float32)

    class Programs:
        def __getattr__(self, name):
            return getattr(programs, name)

        def __call__(self, fixed, moving, *codes):
            seen.append(np.asarray(moving.hu)[0, ..., 0])
            return jnp.asarray(known)

    session.programs = Programs()

    def total(task, affine):
        settings = pipeline.check_settings(task, "inter", "coarse")
        return session.run(*scans, settings, affine=affine, clock=pipeline.Clock())

    coarse = total("none", "coarse")
    both = total("headneck", "coarse")
    plain = total("headneck", coarse.affine)
    u = known[0].astype(float)
    places = np.moveaxis(np.stack([x, y, z], -1) + u, -1, 0)
    expected = u + np.stack(
        [
            ndimage.map_coordinates(c, places, order=1, mode="nearest")
            for c in np.moveaxis(coarse.network_disp.astype(float), -1, 0)
        ],
        -1,
    )
    swapped = coarse.network_disp + u
    assert np.abs(swapped - expected).max() > 0.05  # another order would show
    np.testing.assert_allclose(both.network_disp, expected, atol=1e-3)
    # Without "coarse" the network sees the scan as it lies.
    warped = prediction.prewarp(seen[1], coarse.network_disp[None])
    np.testing.assert_array_equal(seen[0], warped)
    np.testing.assert_allclose(plain.network_disp, u, atol=1e-5)


def test_matching_grid_has_the_spacing_of_the_embedding():
    spec = PreprocessSpec()
    trained = features.Extractor("mind", spacing_mm=(4.0, 4.0, 4.0))
    grid = matching_scans.matching_grid(spec, trained)
    assert grid.shape == (96, 96, 80) and grid.spacing_mm == (4.0, 4.0, 4.0)
    assert matching_scans.matching_grid(spec, features.Extractor("mind")) is spec


def test_register_warns_where_features_do_not_match(matcher, own_features):
    air = np.full((40, 30, 36), -1000, np.int16)
    place = oblique(air.shape, (8.0, 8.0, 8.0), angle_deg=0.0)
    result = run(
        (air, air), (place, place), task="headneck", weights=matcher, affine="features"
    )
    line, *flat = result.warnings
    assert line.startswith("pre-alignment: features: ")
    assert [w.partition(", got")[0] for w in flat] == [
        f"contrast: {name}: 32 grey levels or more expected"
        for name in ("fixed", "moving")
    ]
    assert np.isfinite(result.affine).all()


def test_session_describes_each_scan_once_on_its_own_grid(matcher, own_features):
    fixed, moving, truth, _ = turned_phantoms()
    scans = [
        Volume(fixed.hu, fixed.vox2world),
        Volume(moving.hu, moving.vox2world),
    ]
    session = pipeline.Session(matcher)
    described = []
    program = session.programs.describe

    class Programs:
        def describe(self, hu):
            described.append(1)
            return program(hu)

        def __getattr__(self, name):
            return getattr(programs, name)

        def __call__(self, *args):
            return programs(*args)

    programs, session.programs = session.programs, Programs()
    settings = pipeline.check_settings("headneck", None, "features")
    for one, other in (scans, scans[::-1]):
        clock = pipeline.Clock()
        session.run(one, other, settings, affine="features", clock=clock)
    # Two scans, and each once more where it was the moving one, pre-aligned.
    assert len(described) == 4


def test_register_fills_beyond_the_moving_scan_with_air(calm):
    images, grids = pair()
    shift = np.eye(4)
    shift[2, 3] = 200.0  # the top slice of fixed now lies above the moving scan
    result = run(images, grids, task="lung", weights=calm, affine=shift)
    assert (result.warped[:, :, -1] == -1000).all()
    # An image without air, such as MR, gets its smallest value.
    plain = images[1].astype(np.float32) + 1000
    result = run((images[0], plain), grids, task="lung", weights=calm, affine=shift)
    assert result.warped.dtype == np.float32
    assert (result.warped[:, :, -1] == plain.min()).all()


def test_register_compares_only_in_the_mask(calm):
    images, grids = pair()
    mask = np.zeros(images[0].shape, bool)
    mask[10:20, 10:25, 8:20] = True
    common = dict(task="lung", weights=calm, affine="none")
    whole = run(images, grids, **common)
    part = run(images, grids, fixed_mask=mask, **common)
    np.testing.assert_array_equal(part.disp_mm, whole.disp_mm)
    assert part.qc["ncc_before"] != whole.qc["ncc_before"]


def test_mask_changed_in_place_is_seen(calm):
    images, grids = pair()
    target, source = (
        pipeline.as_volume(*scan, "scan") for scan in zip(images, grids, strict=True)
    )
    settings = pipeline.check_settings("none", None, "none")
    session = pipeline.Session(calm, network=False)
    # All that `_finer` asks of it; compiling one takes seconds.
    session.refiner = types.SimpleNamespace(plan=Plan(1, finer=2))
    mask = np.zeros(target.data.shape, bool)
    found = []
    for part in (slice(8, 16), slice(16, 24)):
        mask[:] = False
        mask[part, 10:25, 8:20] = True
        prepared = session.prepare(
            target, source, settings, affine="none", mask=mask, clock=pipeline.Clock()
        )
        fine = session._finer(prepared, source, mask)
        found.append((prepared.body, fine.body))
    for first, second in zip(*found, strict=True):
        assert first.any() and second.any()
        assert first.argmax() != second.argmax()


def test_result_shares_no_array_with_its_caller(calm):
    images, grids = pair()
    volumes = [
        pipeline.as_volume(*scan, "scan") for scan in zip(images, grids, strict=True)
    ]
    session = pipeline.Session(calm, network=False)
    settings = pipeline.check_settings("none", None, np.eye(4))
    matrix = np.eye(4)
    given = [*grids, *(volume.vox2world for volume in volumes)]
    before = [array.copy() for array in given]

    def of_arrays():
        return run(images, grids, task="none", weights=calm, affine=matrix)

    def of_volumes():
        return session.run(*volumes, settings, affine=matrix, clock=pipeline.Clock())

    for make in (of_arrays, of_volumes):
        first = make()
        disp_mm, grid = first.disp_mm.copy(), first.network_grid.vox2world.copy()
        for array in (
            matrix,
            first.vox2world,
            first.network_grid.vox2world,
            pipeline.residual_mm(first),
        ):
            array += 1.0
        np.testing.assert_array_equal(first.affine, np.eye(4))
        np.testing.assert_array_equal(first.disp_mm, disp_mm)
        for array, as_given in zip(given, before, strict=True):
            np.testing.assert_array_equal(array, as_given)
        matrix[:] = np.eye(4)
        np.testing.assert_array_equal(make().network_grid.vox2world, grid)


def test_register_takes_arrays_of_jax(calm):
    images, grids = (both[::-1] for both in pair())
    mask = np.zeros(images[0].shape, bool)
    mask[10:20, 10:25, 8:20] = True
    common = dict(task="none", weights=calm, affine="none", fixed_mask=mask)
    plain = run(images, grids, **common)
    other = run([jnp.asarray(image) for image in images], grids, **common)
    np.testing.assert_array_equal(other.vox2world, grids[0])
    np.testing.assert_array_equal(other.warped, plain.warped)
    assert other.qc == plain.qc


def test_register_takes_images_along_their_own_axes(calm):
    images, grids = (both[::-1] for both in pair())
    mask = np.zeros(images[0].shape, bool)
    mask[10:20, 10:25, 8:20] = True
    common = dict(task="none", weights=calm, affine="none", fixed_mask=mask)
    plain = run(images, grids, **common)
    held = [
        nib.Nifti1Image(image, orientation.ras_from_lps(grid))
        for image, grid in zip(images, grids, strict=True)
    ]
    other = register(*held, **common)
    # NIfTI keeps its geometry in float32.
    np.testing.assert_allclose(other.vox2world, grids[0], atol=1e-4)
    assert other.warped.shape == images[0].shape and other.warped.dtype == np.int16
    off = np.abs(other.warped.astype(int) - plain.warped)
    assert off.max() <= 1  # HU, of rounding
    assert other.qc["ncc_before"] == pytest.approx(plain.qc["ncc_before"], abs=1e-4)
    with pytest.raises(ValueError, match="fixed_mask must be"):
        register(*held, **common | {"fixed_mask": mask[1:]})


def test_register_traces_once_for_all_tasks(calm, monkeypatch):
    traces = []
    predict = compiled._predict

    def counted(*args, **kwargs):
        traces.append(1)
        return predict(*args, **kwargs)

    monkeypatch.setattr(compiled, "_predict", counted)
    images, grids = pair()
    for task in ("headneck", "chest", "abdomen", "liver", "lung"):
        run(images, grids, task=task, weights=calm, affine="none")
    assert len(traces) == 1


def test_scans_of_nearly_one_size_share_the_program_of_results(calm, monkeypatch):
    traces = []
    slab = pipeline._slab

    def counted(*args, **kwargs):
        traces.append(kwargs["shape"])
        return slab(*args, **kwargs)

    monkeypatch.setattr(pipeline, "_slab", counted)
    images, grids = pair()
    monkeypatch.setattr(pipeline, "_SLAB_PROGRAMS", 1)
    session = pipeline.Session(calm)
    settings = pipeline.check_settings("lung", None, "none")
    for height in (40, 39, 37, 30, 40):
        one = pipeline.as_volume(images[0][:, :height], grids[0], "fixed")
        other = pipeline.as_volume(images[1], grids[1], "moving")
        found = session.run(one, other, settings, clock=pipeline.Clock())
        assert found.disp_mm.shape == (33, height, 29, 3)
        assert found.warped.shape == (33, height, 29)
    # The last size alone is kept: the first one is made again when it comes back.
    assert [shape[1] for shape in traces] in ([64, 32], [64, 32, 64])
    (kept,) = session._slabs._entries
    assert kept[0] == (40, 64, 32)


def test_register_conditions_on_the_task(model):
    images, grids = pair()
    common = dict(weights=model, affine="none")
    chest, other, abdomen = (
        run(images, grids, task=task, pair_type=kind, **common).disp_mm
        for task, kind in (("chest", "inter"), ("chest", "intra"), ("abdomen", "inter"))
    )
    assert np.abs(chest - other).max() > 1.0  # mm
    assert np.abs(chest - abdomen).max() > 1.0


def test_register_refuses_scans_without_common_space(calm):
    images, grids = pair()
    far = grids[1].copy()
    far[2, 3] += 5000.0  # mm
    with pytest.raises(UserError, match="none shared after") as caught:
        run(images, (grids[0], far), task="lung", weights=calm, affine="none")
    assert caught.value.reason == "no_overlap"
    assert caught.value.exit_code == errors.FAILED


def test_register_refuses_a_field_that_is_not_finite(calm):
    images, grids = pair()
    params = jax.tree.map(lambda p: jnp.full_like(p, jnp.nan), calm.params)
    with pytest.raises(UserError, match="finite vectors expected") as caught:
        run(images, grids, task="lung", weights=calm._replace(params=params))
    assert caught.value.reason == "field_nonfinite"
    assert caught.value.exit_code == errors.NUMERICAL


def test_register_refuses_a_field_of_kilometres(calm):
    images, grids = pair()
    params = jax.tree.map(jnp.array, calm.params)
    bias = params["head"]["controller"]["bias"]
    params["head"]["controller"]["bias"] = bias.at[-3:].set(1e3)
    with pytest.raises(UserError, match="within 1000 mm") as caught:
        run(images, grids, task="lung", weights=calm._replace(params=params))
    assert caught.value.reason == "field_range"
    assert caught.value.exit_code == errors.NUMERICAL


@pytest.mark.parametrize("which", [0, 1])
def test_register_refuses_a_volume_that_is_not_finite(calm, which):
    images, grids = pair()
    volumes = [Volume(i, g) for i, g in zip(images, grids, strict=True)]
    data = images[which].astype(np.float32)
    data[3, 4, 5] = (np.nan, -np.inf)[which]
    volumes[which] = volumes[which]._replace(data=data)
    name = ("fixed", "moving")[which]
    with pytest.raises(UserError, match=f"{name}: nonfinite: .*-1000 HU") as caught:
        register(*volumes, task="none", weights=calm, affine="none")
    assert (caught.value.reason, caught.value.exit_code) == ("nonfinite", errors.FAILED)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"task": "knee"}, "task must be one of"),
        ({"pair_type": "both"}, "type must be one of"),
    ],
)
def test_register_refuses_unknown_tasks(calm, change, match):
    images, grids = pair()
    with pytest.raises(UserError, match=match) as caught:
        run(images, grids, **({"task": "lung", "weights": calm} | change))
    assert caught.value.exit_code == errors.USAGE


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"affine": "fancy"}, "affine must be one of"),
        ({"affine": np.eye(3)}, r"affine must be a finite invertible \(4, 4\)"),
        ({"affine": np.diag([1.0, 1.0, 1.0, 0.0])}, "affine must be a finite"),
        ({"affine": np.diag([1.0, 1.0, 0.0, 1.0])}, "affine must be a finite"),
        ({"affine": np.diag([1.0, 1.0, 1e-7, 1.0])}, "affine must be invertible"),
        ({"fixed_vox2world": None}, "fixed_vox2world must be .*lps_from_ras"),
        ({"moving_vox2world": np.eye(3)}, "moving_vox2world must be a finite"),
        (
            {"moving_vox2world": np.diag([1.0, 1.0, 0.0, 1.0])},
            "moving_vox2world must be a finite",
        ),
        ({"fixed_mask": np.ones((2, 2, 2), bool)}, "fixed_mask must be"),
        ({"fixed": np.zeros((2, 3, 4, 5))}, r"fixed must be \(X, Y, Z\)"),
        ({"moving": np.full((4, 5, 6), np.nan)}, "moving must be finite"),
        ({"moving": np.ones((4, 5, 6), bool)}, "moving must be real numbers.*got bool"),
        ({"fixed": np.ones((4, 5, 6), complex)}, "fixed must be real .*complex128"),
        (
            {"fixed": nib.MGHImage(np.zeros((4, 5, 6), np.int16), np.eye(4))},
            "fixed must be a path, Volume, image .*, got MGHImage; .* LPS mm .*affine",
        ),
        (
            {"fixed": nib.Nifti1Image(np.zeros((4, 5, 6), np.int16), np.eye(4))},
            "fixed_vox2world must be None",
        ),
        ({"task": "none", "passes": 2}, "passes and symmetric need a network"),
        ({"task": "none", "symmetric": True}, "passes and symmetric need a network"),
        ({"refine": Plan(0, "edges")}, "features must be one of"),
    ],
)
def test_register_rejects(calm, change, match):
    images, grids = pair()
    arguments = {
        "fixed": images[0],
        "moving": images[1],
        "fixed_vox2world": grids[0],
        "moving_vox2world": grids[1],
        "task": "lung",
        "weights": calm,
    } | change
    fixed, moving = arguments.pop("fixed"), arguments.pop("moving")
    with pytest.raises(ValueError, match=match):
        register(fixed, moving, **arguments)


def test_register_is_exported(calm):
    from unireg_jax import registration

    assert registration.register is register
    with pytest.raises(AttributeError, match="nothing"):
        registration.nothing  # noqa: B018


@pytest.mark.parametrize(
    ("change", "reason", "match"),
    [
        ({"features": "sam9"}, "checkpoint_other", "sam9"),
        ({"architecture": {"layers": 5}}, "checkpoint_other", "layers"),
        ({"architecture": {"conditioner": "odd"}}, "checkpoint_other", "odd"),
        ({"architecture": {}}, "checkpoint_other", r"expected, got \("),
        (
            {"preprocess": PreprocessSpec(shape=(40, 32, 32)).to_json()},
            "checkpoint_other",
            "multiples of 16",
        ),
        (
            {"preprocess": PreprocessSpec(codes="RAS").to_json()},
            "checkpoint_other",
            "RAS",
        ),
    ],
)
def test_load_model_refuses_weights_of_another_network(tmp_path, change, reason, match):
    params, spec = network()
    path = tmp_path / "other.safetensors"
    weights.save_weights(path, params, spec | change)
    with pytest.raises(UserError, match=match) as caught:
        load_model(path)
    assert caught.value.reason == reason
    assert caught.value.exit_code == errors.CHECKPOINT
    assert "\n" not in str(caught.value)


def test_load_model_computes_with_float32_whatever_is_stored(tmp_path):
    params, spec = network(scale=3e3)
    half = jax.tree.map(lambda x: np.asarray(x, np.float16), params)
    weights.save_weights(tmp_path / "half.safetensors", half, spec)
    loaded = load_model(tmp_path / "half.safetensors").params
    for exact, got in zip(*map(jax.tree.leaves, (params, loaded)), strict=True):
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got, exact, rtol=1e-3, atol=1e-6)


def test_load_model_refuses_missing_tensors(tmp_path):
    params, spec = network()
    del params["head"]["controller"]["bias"]
    path = tmp_path / "torn.safetensors"
    weights.save_weights(path, params, spec)
    with pytest.raises(UserError, match=r"head/controller/bias: \(171,\) expected"):
        load_model(path)


def test_warp_labels_follows_the_field(model):
    images, grids = pair()
    result = run(images, grids, task="chest", weights=model, affine=MATRIX)
    source = Volume((images[1] > 100).astype(np.uint8) * 7, grids[1])
    target = Volume(images[0], grids[0])
    warped = metrics.warp_labels(result.disp_mm, grids[0], source, target)
    y = world(images[0].shape, grids[0]) + result.disp_mm
    expected = read_at(source.data.astype(float), grids[1], y)
    assert warped.dtype == np.uint8 and set(np.unique(warped)) == {0, 7}
    # Nearest and linear agree away from the surface.
    np.testing.assert_array_equal(warped[expected == 7], 7)
    np.testing.assert_array_equal(warped[np.abs(expected) < 1e-9], 0)


def test_grid_is_the_weights_own(calm):
    images, grids = pair()
    result = run(images, grids, task="lung", weights=calm)
    assert isinstance(result.network_grid, Grid)
    assert result.network_disp.shape == (*SPEC.shape, 3)
    assert result.timings["total"] > 0


def test_scans_of_two_parts_of_the_body_do_not_correlate(calm):
    """A head on an abdomen, and an abdomen on another one, all at one place."""
    grid = dict(shape=(33, 40, 29), spacing_mm=(11.0, 9.0, 12.0))
    head, *abdomens = (
        synthetic.phantom(task, seed=seed, **grid)
        for task, seed in (("headneck", 0), ("abdomen", 1), ("abdomen", 2))
    )
    place = oblique(grid["shape"], grid["spacing_mm"])
    for fixed, apart in ((head, True), (abdomens[1], False)):
        images = fixed.hu, abdomens[0].hu
        result = run(
            images, (place, place), task="abdomen", weights=calm, affine="none"
        )
        after = result.qc["ncc_after"]
        assert (after is None or after < 0.2) == apart


# --- windows, and what the scans show ------------------------------------------------


def long_pair():
    """Scans 700 mm high, nearly two windows of 384 mm."""
    shape, moving_shape = (33, 30, 80), (30, 27, 75)
    grids = (
        oblique(shape, (9.0, 8.0, 9.0), angle_deg=0.0),
        oblique(moving_shape, (10.0, 9.0, 9.6), angle_deg=4.0),
    )
    return (
        tall_body(shape, grids[0]),
        tall_body(moving_shape, grids[1], shift=(9.0, 4.0, -8.0)),
    ), grids


def tall_body(shape, vox2world, *, shift=(0.0, 0.0, 0.0)):
    """An elliptic column with a bright spot every 100 mm, int16."""
    x = world(shape, vox2world) - np.array([10.0, -220.0, 900.0]) - shift
    body = 1 / (1 + np.exp((np.square(x[..., :2] / [120, 95]).sum(-1) - 1) * 6))
    ends = 1 / (1 + np.exp((np.abs(x[..., 2]) - 340) / 6))
    spots = np.cos(x[..., 2] / 100 * 2 * np.pi) * np.exp(
        -np.square((x[..., :2] - [30, -20]) / 50).sum(-1)
    )
    return np.rint(-1000 + 1040 * body * ends + 250 * spots * ends).astype(np.int16)


def test_register_names_the_matching_window_that_a_mask_misses(calm, own_features):
    """The tiles cover the mask, so that other pre-alignments take it."""
    images, grids = long_pair()
    mask = images[0] > -300
    mask[:, :, 10:] = False
    common = dict(task="chest", weights=calm, fov="tiles", fixed_mask=mask)
    with pytest.raises(UserError, match="matching window.* --affine affine") as error:
        run(images, grids, affine="features", **common)
    assert (error.value.reason, error.value.exit_code) == ("empty", errors.FAILED)
    run(images, grids, affine="com", **common)


def test_register_looks_through_one_window_where_the_body_fits(model):
    images, grids = pair()
    common = dict(task="chest", weights=model, affine=MATRIX)
    first = run(images, grids, fov="crop", **common)
    for fov in ("auto", "tiles", "whole"):
        other = run(images, grids, fov=fov, **common)
        np.testing.assert_array_equal(other.disp_mm, first.disp_mm)
        assert other.settings["windows"] == 1
        assert other.settings["fov"] == fov
    assert first.settings["body_covered"] == 1.0


def test_register_tiles_are_the_network_in_each_window(model):
    images, grids = long_pair()
    lines = []
    result = run(
        images,
        grids,
        task="chest",
        weights=model,
        affine="none",
        progress=lines.append,
    )
    settings = result.settings
    assert settings["fov_used"] == "tiles" and settings["body_covered"] == 1.0
    assert settings["windows"] == sum("window " in line for line in lines) == 3
    assert result.network_grid.shape[2] == 96 and result.network_grid.shape[:2] == (
        *SPEC.shape[:2],
    )
    assert result.disp_mm.shape == (*images[0].shape, 3)
    # Where one window alone has weight, its field is the network's, bit for bit.
    volumes = [
        pipeline.as_volume(*scan, "scan") for scan in zip(images, grids, strict=True)
    ]
    hu = [preprocess.prepare_image(v, result.network_grid, SPEC) for v in volumes]
    program = compiled.compile_register(model)
    for start, alone in ((0, slice(0, 12)), (48, slice(36, 48))):
        part = [np.ascontiguousarray(h[..., start : start + 48]) for h in hu]
        disp = np.asarray(program(*part, Region.CHEST, 0)[0])
        got = result.network_disp[:, :, start : start + 48]
        np.testing.assert_array_equal(got[:, :, alone], disp[:, :, alone])
    # No seam: along the column the field changes no faster than within a window.
    steps = np.abs(np.diff(result.network_disp, axis=2)).max(axis=(0, 1, 3))
    inner = np.r_[steps[2:10], steps[-10:-2]].max()
    assert steps.max() < 3 * inner


def test_register_tiles_refine_every_window(calm):
    images, grids = long_pair()
    common = dict(task="lung", weights=calm, affine="none")
    plain = run(images, grids, **common)
    plan = Plan(iterations=8)
    result = run(images, grids, refine=plan, **common)
    assert result.qc["refine_after"] < result.qc["refine_before"]
    assert result.qc["ncc_after"] > plain.qc["ncc_after"] + 0.005
    moved = np.abs(result.network_disp).max(axis=(0, 1, 3))
    assert (moved[10:86] > 0.1).all()  # in every window
    fine = run(images, grids, refine=plan._replace(finer=2), **common)
    assert fine.network_grid.shape == tuple(2 * n for n in result.network_grid.shape)
    assert fine.qc["ncc_after"] > plain.qc["ncc_after"] + 0.005
    moved = np.abs(fine.network_disp).max(axis=(0, 1, 3))
    assert (moved[20:172] > 0.1).all()


def test_refinement_without_anything_to_compare_is_told(calm):
    """Two slices of the grid in a thick fixed scan hold no whole window."""
    images, grids = pair()
    thin = images[0][:, :, 12:14], grids[0].copy()
    thin[1][:3, 3] += grids[0][:3, :3] @ (0, 0, 12)
    common = dict(task="chest", weights=calm, affine="none")

    def refined(moving):
        both = (images[0], moving[0]), (grids[0], moving[1])
        plain = run(*both, **common)
        found = run(*both, refine=Plan(iterations=2), **common)
        moved = np.abs(found.network_disp - plain.network_disp).max()
        told = [line for line in found.warnings if "nothing to compare" in line]
        return moved, told

    moved, told = refined(thin)
    assert moved == 0.0 and len(told) == 1
    moved, told = refined((images[1], grids[1]))
    assert moved > 0.0 and told == []


def test_costs_are_of_the_windows_that_compared_anything():
    found = [(1.0, 1.0, 5.0), (0.5, 0.2, 1.0), (0.3, 0.1, 3.0)]
    costs, doubts = pipeline._costs(found)
    np.testing.assert_allclose([*costs.values()], (0.35, 0.125))
    assert len(doubts) == 1 and "1 of 3 windows: nothing to compare" in doubts[0]
    assert pipeline._costs(found[1:])[1] == []
    assert pipeline._costs([]) == ({}, [])


def test_a_mask_that_the_moving_scan_does_not_reach_is_told(calm):
    images, grids = pair()
    fixed, half = images[0], images[0][:, :, :14]

    def judged(slices):
        mask = np.zeros(fixed.shape, bool)
        mask[:, :, slices] = True
        common = dict(task="chest", weights=calm, affine="none", fixed_mask=mask)
        result = run((fixed, half), (grids[0], grids[0]), **common)
        return result.qc["ncc_after"], [w for w in result.warnings if "overlap:" in w]

    assert judged(slice(5, 9)) == (pytest.approx(1.0, abs=0.1), [])
    correlation, told = judged(slice(20, 24))
    assert correlation is None
    assert told == ["overlap: nothing of the fixed mask is in the moving scan"]


def test_volumes_that_are_none_are_refused_as_files_are(calm):
    images, grids = pair()
    thin = images[0][:, :, :1]
    for scan in (thin, Volume(thin, grids[0])):
        own = grids[0] if scan is thin else None
        with pytest.raises(UserError, match="2 slices or more") as caught:
            register(
                *(scan, images[1]),
                fixed_vox2world=own,
                moving_vox2world=grids[1],
                task="chest",
                weights=calm,
            )
        assert caught.value.reason == "fov"
    # Of a file, with its voxels replaced.
    broken = images[0].astype(np.float32)
    broken[3, 3, 3] = np.nan
    scan = Volume(broken, grids[0], path="scan.nii.gz")
    with pytest.raises(UserError, match="NaN") as caught:
        register(
            *(scan, images[1]), moving_vox2world=grids[1], task="chest", weights=calm
        )
    assert caught.value.reason == "nonfinite"
    with pytest.raises(ValueError, match="keep must be at least 1"):
        pipeline.Session(calm, keep=0)


def test_symmetric_leaves_equal_scans_nearly_where_they_are(model):
    images, grids = pair()

    def longest(**more):
        equal = (images[0], images[0]), (grids[0], grids[0])
        common = dict(task="chest", weights=model, affine="none")
        return np.abs(run(*equal, **common, **more).disp_mm).max()

    assert longest() > 2.0
    assert longest(symmetric=True) < 0.2 * longest()


def test_second_pass_starts_where_the_first_one_ended(model):
    images, grids = pair()
    common = dict(task="chest", weights=model, affine="none")
    one, two = (run(images, grids, passes=n, **common) for n in (1, 2))
    assert (two.settings["passes"], two.settings["symmetric"]) == (2, False)
    volumes = [
        pipeline.as_volume(*scan, "scan") for scan in zip(images, grids, strict=True)
    ]
    fixed, moving = (
        preprocess.prepare_image(v, one.network_grid, SPEC) for v in volumes
    )
    program = compiled.compile_register(model)
    seen = prediction.prewarp(moving, one.network_disp[None])
    more = np.asarray(program(fixed, seen, Region.CHEST, 0))
    expected = np.asarray(warp.compose(more, one.network_disp[None]))[0]
    np.testing.assert_allclose(two.network_disp, expected, atol=1e-4)
    assert np.abs(two.network_disp - one.network_disp).max() > 0.5
    with pytest.raises(ValueError, match="passes must be"):
        run(images, grids, passes=9, **common)


def test_passes_over_tiles_see_one_warped_scan(model):
    images, grids = long_pair()
    lines = []
    common = dict(task="chest", weights=model, affine="none", symmetric=True)
    one = run(images, grids, **common)
    plan = Plan(iterations=2)
    two = run(images, grids, passes=2, progress=lines.append, **common)
    assert sum("window " in line for line in lines) == 2 * one.settings["windows"]
    assert "network: pass 2: window 3 of 3" in lines
    assert any("2 passes, both ways" in line for line in lines)
    # No seam: along the column the field changes no faster than within a window.
    steps = np.abs(np.diff(two.network_disp, axis=2)).max(axis=(0, 1, 3))
    assert steps.max() < 3 * np.r_[steps[2:10], steps[-10:-2]].max()
    assert np.abs(two.network_disp - one.network_disp).max() > 0.3
    for fov in ("tiles", "whole"):
        more = run(images, grids, passes=2, refine=plan, fov=fov, **common)
        assert more.qc["refine_after"] < more.qc["refine_before"]
        assert more.qc["ncc_after"] > two.qc["ncc_after"]


def test_further_passes_compile_nothing_anew(model):
    images, grids = pair()
    volumes = [
        pipeline.as_volume(*scan, "scan") for scan in zip(images, grids, strict=True)
    ]
    session = pipeline.Session(model, passes=3, symmetric=True)
    settings = pipeline.check_settings("chest", None, "none")

    def run_once():
        return session.run(*volumes, settings, affine="none", clock=pipeline.Clock())

    first = run_once()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prediction.warp, "sample", None)  # a trace would call it
        patch.setattr(prediction.warp, "invert", None)
        again = run_once()
    np.testing.assert_array_equal(again.network_disp, first.network_disp)


def test_register_one_larger_window_holds_the_whole_body(model):
    images, grids = long_pair()
    common = dict(task="chest", weights=model, affine="none")
    result = run(images, grids, fov="whole", **common)
    assert result.settings["windows"] == 1
    assert result.settings["fov_used"] == "whole"
    assert result.network_grid.shape == (48, 32, 96)
    plan = Plan(iterations=1, finer=2)
    mask = np.ones(images[0].shape, bool)
    fine = run(images, grids, fov="whole", refine=plan, fixed_mask=mask, **common)
    assert fine.network_grid.shape == (96, 64, 192)
    crop = run(images, grids, fov="crop", **common)
    assert crop.settings["body_covered"] < 0.6
    assert crop.network_grid.shape == SPEC.shape
    # Millimetres stay millimetres in the larger window.
    ratio = result.qc["p99_mm_network"] / crop.qc["p99_mm_network"]
    assert 0.5 < ratio < 1.5


@pytest.fixture(scope="module")
def bodies():
    """One chest and one abdomen, on the network's grid."""
    return {
        task: synthetic.phantom(task, shape=(48, 36, 40), spacing_mm=(8, 8, 8), seed=1)
        for task in ("chest", "abdomen")
    }


def scans_of(bodies, fixed, moving):
    found = bodies[fixed], bodies[moving]
    return [b.hu for b in found], [b.vox2world for b in found]


def test_register_finds_the_task_by_itself(calm, bodies):
    lines = []
    common = dict(task="auto", weights=calm, affine="none", progress=lines.append)
    result = run(*scans_of(bodies, "chest", "chest"), **common)
    settings = result.settings
    assert (settings["task"], settings["task_asked"]) == ("chest", "auto")
    assert (settings["region"], settings["pair_type"]) == ("chest", "inter")
    assert settings["seen"]["fixed"]["region"] == "chest"
    assert any(line.startswith("task: auto: chest, inter-patient") for line in lines)
    named = run(
        *scans_of(bodies, "chest", "chest"), task="chest", weights=calm, affine="none"
    )
    np.testing.assert_array_equal(result.disp_mm, named.disp_mm)
    given = run(*scans_of(bodies, "chest", "chest"), **(common | {"affine": np.eye(4)}))
    assert given.settings["affine"] == given.settings["affine_used"] == "given"
    np.testing.assert_array_equal(given.disp_mm, named.disp_mm)
    liver = run(*scans_of(bodies, "abdomen", "abdomen"), pair_type="intra", **common)
    assert (liver.settings["task"], liver.settings["region"]) == ("liver", "liver")
    with pytest.raises(UserError, match="fixed: .*chest.*; moving: .*abdomen") as error:
        run(*scans_of(bodies, "chest", "abdomen"), **common)
    assert error.value.exit_code == errors.USAGE


@pytest.mark.parametrize("affine", ["affine", "none", "features"])
def test_register_refuses_a_mask_without_a_voxel(calm, bodies, affine):
    scans = scans_of(bodies, "chest", "chest")
    mask = np.zeros(scans[0][0].shape, bool)
    with pytest.raises(UserError, match="fixed mask: a voxel of the scan") as error:
        run(*scans, task="chest", weights=calm, affine=affine, fixed_mask=mask)
    assert (error.value.reason, error.value.exit_code) == ("empty", errors.FAILED)


def test_register_warns_where_a_scan_shows_another_region(calm, bodies):
    common = dict(weights=calm, affine="none")
    result = run(*scans_of(bodies, "chest", "chest"), task="headneck", **common)
    assert len(result.warnings) == 2
    assert result.warnings[0].startswith(
        "task: fixed: headneck expected, looks like chest"
    )
    for task in ("chest", "lung", "none"):
        result = run(*scans_of(bodies, "chest", "chest"), task=task, **common)
        assert not result.warnings
    assert "seen" not in result.settings  # nobody asked


def test_register_warns_of_arrays_that_are_no_hu(calm, bodies):
    (chest, _), places = scans_of(bodies, "chest", "chest")
    mr = np.clip((chest.astype(float) + 1000) / 8, 0, 255).astype(np.int16)
    result = run((mr, chest), places, task="chest", weights=calm, affine="none")
    (line,) = result.warnings
    assert line.startswith("task: fixed: a CT in Hounsfield units expected")
    result = run((mr, mr), places, task="none", weights=calm, affine="none")
    assert not result.warnings


def test_register_tells_what_readers_do(calm, bodies, tmp_path):
    (chest, _), (place, _) = scans_of(bodies, "chest", "chest")
    paths = [tmp_path / f"{name}.nii" for name in ("hu", "stored")]
    for path, array in zip(paths, (chest, chest + 1024), strict=True):
        nifti.write_volume(path, array.astype(np.int16), place)
    result = register(*paths, task="none", weights=calm, affine="none")
    (line,) = result.warnings
    assert line.startswith("moving: hu_range: not Hounsfield units?")


def test_register_rejects_an_unknown_fov(calm):
    with pytest.raises(ValueError, match="fov must be one of"):
        run(*pair(), task="chest", weights=calm, fov="patches")


def test_register_refuses_what_memory_cannot_hold(calm, monkeypatch):
    assert memory.available_bytes() is None or memory.available_bytes() > 2**20
    monkeypatch.setattr(memory, "available_bytes", lambda: 2**33)
    memory.check_memory((512, 512, 400), (512, 512, 300))
    with pytest.raises(UserError, match="8192 MiB are free, about .* needed") as error:
        memory.check_memory((512, 512, 2000), (512, 512, 300))
    assert (error.value.reason, error.value.exit_code) == ("too_large", errors.LIMIT)
    monkeypatch.setattr(memory, "available_bytes", lambda: 0)
    memory.check_memory((96, 96, 80), (96, 96, 80))  # a small pair is tried anyway
    # What `register` was measured to take beyond the scans: docs/control.md.
    with pytest.raises(UserError, match="about 7525 MiB are needed"):
        memory.check_memory((512, 512, 700), (512, 512, 700))
    with pytest.raises(UserError, match="about 7500 MiB are needed"):
        memory.check_memory((10, 10, 10), (512, 512, 1000), inverse=True)
    monkeypatch.setattr(memory, "_LEAST_BYTES", 0)
    with pytest.raises(UserError, match="too_large|crop or resample"):
        run(*pair(), task="chest", weights=calm)


@pytest.mark.parametrize(
    ("line", "root", "names"),
    [
        (
            "0::/job/step",
            ".",
            ("memory.max", "memory.current", "inactive_file"),
        ),
        (
            "4:cpu,memory:/job/step",
            "memory",
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ),
    ],
)
def test_memory_of_the_own_groups_is_all_there_is(
    tmp_path, monkeypatch, line, root, names
):
    limit, current, cache = names

    def group(path, most, used, files):
        folder = tmp_path / root / path
        folder.mkdir(parents=True, exist_ok=True)
        (folder / limit).write_text(f"{most}\n")
        (folder / current).write_text(f"{used}\n")
        (folder / "memory.stat").write_text(f"active_file 7\n{cache} {files}\n")

    own = tmp_path / "own"
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    monkeypatch.setattr(memory, "_OWN_GROUPS", own)
    own.write_text(f"3:cpuset:/other\n{line}\n")
    group("other", 50, 0, 0)
    group("", 900, 100, 0)
    assert memory.available_bytes() == 800  # of a container, whose path is the host's
    group("job/step", "max", 100, 0)
    assert memory.available_bytes() == 800
    group("job", 500, 200, 30)
    assert memory.available_bytes() == 330
    group("job/step", 200, 150, 20)
    assert memory.available_bytes() == 70
    group("job/step", 200, 250, 20)
    assert memory.available_bytes() == 0
