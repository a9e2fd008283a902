"""Maps between scans, against SimpleITK on the same files, and against themselves."""

import itertools

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk

from tests import oracles
from tests.grids import ALL_CODES, positions
from unireg_jax import errors
from unireg_jax.errors import UserError
from unireg_jax.imaging import grids, mapping, nifti, orientation, transforms
from unireg_jax.imaging.grids import Field, Grid
from unireg_jax.imaging.inverse import check_inverse, doubts, invert
from unireg_jax.imaging.mapping import Mapping
from unireg_jax.imaging.nifti import Volume

CENTER = np.array([12.0, -150.0, 730.0])


def place(shape, spacing, codes="LPS", angles=(0.0, 0.0, 0.0), center=CENTER):
    """[4, 4] LPS mm of a grid whose middle lies at `center`."""
    turn = nib.eulerangles.euler2mat(*angles) @ orientation.direction(codes)
    out = np.eye(4)
    out[:3, :3] = turn @ np.diag(spacing)
    out[:3, 3] = center - out[:3, :3] @ ((np.array(shape) - 1) / 2)
    return out


def grid(shape, spacing, codes="LPS", angles=(0.0, 0.0, 0.0), shift=(0.0, 0.0, 0.0)):
    return Grid(shape, place(shape, spacing, codes, angles, CENTER + np.array(shift)))


# Grids onto which scans are brought: none shares a voxel with that of the field.
GRIDS = {
    "straight": grid((21, 26, 19), (5.1, 4.3, 6.2)),
    "anisotropic": grid((40, 29, 9), (2.7, 3.9, 13.1)),
    "flipped": grid((22, 25, 18), (5.3, 4.1, 6.4), "RAI"),
    "permuted": grid((18, 23, 24), (6.4, 4.9, 4.7), "SLA"),
    "oblique": grid((23, 24, 20), (4.9, 4.6, 5.9), "LPS", (0.3, -0.2, 0.15)),
    "wider": grid((31, 30, 28), (6.7, 6.1, 7.3), "LPI", (-0.1, 0.1, 0.2), (40, -25, 9)),
    "aside": grid((20, 21, 22), (5.0, 4.4, 6.1), "LPS", (0, 0, 0), (55.3, 4.1, -61.7)),
}
FIELD_GRID = grid((24, 20, 17), (5.0, 5.5, 7.0), "LPS", (0.12, 0.05, -0.08))
MOVING_GRID = grid((31, 28, 25), (4.2, 4.4, 5.1), "RSA", (0.05, -0.1, 0.1), (9, -7, 5))


def waves(xyz, *, size=4.0, length=55.0):
    """A smooth displacement, mm, [..., 3]."""
    s = (xyz - CENTER) * (2 * np.pi / length)
    return size * np.stack(
        [
            np.sin(s[..., 1] + 0.3) + 0.7,
            np.cos(0.8 * s[..., 2]) * np.sin(0.6 * s[..., 0]),
            np.sin(0.7 * s[..., 0] - 0.5 * s[..., 1]) - 0.4,
        ],
        axis=-1,
    )


def hu(xyz):
    """A smooth body, HU."""
    s = xyz - CENTER - np.array([6.0, -4.0, 3.0])
    radius = np.square(s / [62, 51, 66]).sum(-1)
    ripple = 120 * np.sin(s[..., 0] / 17) * np.cos(s[..., 1] / 21 + s[..., 2] / 27)
    return -1000 + (1050 + ripple) / (1 + np.exp((radius - 1) * 4))


def turn(shift=(3.0, -5.0, 4.0), angles=(0.1, -0.06, 0.08), scale=1.06):
    """An affine about the middle of the scans, LPS mm."""
    matrix = np.eye(4)
    matrix[:3, :3] = nib.eulerangles.euler2mat(*angles) * scale
    matrix[0, 1] += 0.03
    matrix[:3, 3] = CENTER - matrix[:3, :3] @ CENTER + shift
    return matrix


def field(g=FIELD_GRID, **options):
    return Field(waves(positions(g), **options).astype(np.float32), g.vox2world)


def scan(g=MOVING_GRID, dtype=np.float32):
    """The body on a grid, and the same as a SimpleITK image."""
    data = hu(positions(g))
    data = np.rint(data).astype(dtype) if np.dtype(dtype).kind in "iu" else data
    volume = Volume(data.astype(dtype), g.vox2world)
    return volume, oracles.itk_image(data.astype(np.float64), g.vox2world)


def resampled(image, g, transform, how=sitk.sitkLinear, outside=-1000.0):
    """By SimpleITK, [X, Y, Z]."""
    target = oracles.itk_image(np.zeros(g.shape), g.vox2world)
    return oracles.itk_array(sitk.Resample(image, target, transform, how, outside))


def scattered(count=200, reach=130.0):
    """Points inside and far outside the field's grid, LPS mm."""
    return CENTER + np.random.default_rng(0).uniform(-reach, reach, (count, 3))


def peer_points(transform, xyz):
    return np.array([transform.TransformPoint(p.tolist()) for p in xyz])


def peer_field(path):
    image = sitk.ReadImage(str(path), sitk.sitkVectorFloat64)
    return sitk.DisplacementFieldTransform(image)


def write_1006(path, part):
    image = nib.Nifti1Image(
        (part.disp_mm * [-1, -1, 1])[:, :, :, None, :].astype("f4"),
        orientation.ras_from_lps(part.vox2world),
    )
    image.header["intent_code"] = 1006
    image.header.set_xyzt_units("mm")
    nib.save(image, path)


SPELLED = {
    "1Warp.nii.gz": (lambda p: transforms.write_field(p, *field()), peer_field),
    "ras.nii": (lambda p: write_1006(p, field()), peer_field),
    "slicer.nrrd": (lambda p: transforms.write_nrrd(p, *field()), peer_field),
    "mixed.h5": (
        lambda p: transforms.write_parts(
            p, [turn(), tuple(field()), turn((0, 2, 0)), tuple(field(size=-2.0))]
        ),
        lambda p: sitk.ReadTransform(str(p)),
    ),
    "Composite.h5": (
        lambda p: transforms.write_composite(p, turn(), *field()),
        lambda p: sitk.ReadTransform(str(p)),
    ),
    "Affine.txt": (
        lambda p: transforms.write_affine_txt(p, turn(), center=(1.0, 2.0, 3.0)),
        lambda p: sitk.ReadTransform(str(p)),
    ),
}


# --- SimpleITK applies every file as we do ------------------------------------------


@pytest.mark.parametrize("name", SPELLED)
def test_every_spelling_moves_points_as_itk(tmp_path, name):
    write, peer = SPELLED[name]
    write(tmp_path / name)
    found = mapping.points(mapping.read(tmp_path / name), scattered())
    expected = peer_points(peer(tmp_path / name), scattered())
    # Within the field and beyond it; geometry in float32.
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-3)
    assert np.abs(found - scattered()).max() > 3


@pytest.mark.parametrize("name", SPELLED)
@pytest.mark.parametrize("where", GRIDS)
def test_every_spelling_warps_scans_as_itk(tmp_path, name, where):
    write, peer = SPELLED[name]
    write(tmp_path / name)
    volume, image = scan()
    mine = mapping.resample(
        mapping.read(tmp_path / name), volume, GRIDS[where], fill=-1000
    )
    expected = resampled(image, GRIDS[where], peer(tmp_path / name))
    assert np.ptp(expected) > 500
    np.testing.assert_allclose(mine, expected, rtol=0, atol=0.5)


@pytest.mark.parametrize("where", ["straight", "oblique", "wider"])
def test_nearest_picks_the_voxels_of_itk(where):
    volume, _ = scan()
    labels = (volume.data > -200).astype(np.uint8) + (volume.data > 40)
    whole = Mapping((field(), turn()))
    found = mapping.resample(
        whole, volume._replace(data=labels), GRIDS[where], interp="nearest"
    )
    peer = sitk.CompositeTransform(3)
    peer.AddTransform(_peer_affine(turn()))
    peer.AddTransform(_peer_field(field()))
    image = oracles.itk_image(labels.astype(np.float64), volume.vox2world)
    expected = resampled(image, GRIDS[where], peer, sitk.sitkNearestNeighbor, 0.0)
    assert found.dtype == np.uint8
    # A voxel in ten thousand may lie on a face between two, as float32 has it.
    assert (found != expected).mean() < 1e-4


@pytest.mark.parametrize("where", ["straight", "oblique", "wider"])
def test_label_gives_the_largest_trilinear_share_as_itk(where):
    volume, _ = scan()
    labels = np.digitize(volume.data, [-600, -100, 30, 90]).astype(np.int16) * 7
    found = mapping.resample(
        Mapping((field(),)), volume._replace(data=labels), GRIDS[where], interp="label"
    )
    image = sitk.Cast(oracles.itk_image(labels, volume.vox2world), sitk.sitkInt16)
    how = sitk.sitkLabelLinear
    expected = resampled(image, GRIDS[where], _peer_field(field()), how, 0)
    assert len(np.unique(expected)) == 5
    # Equal shares are the exception; ITK breaks the tie by other rounding.
    assert (found != expected).mean() < 1e-3


def _peer_field(part):
    image = oracles.itk_image(
        part.disp_mm.astype(np.float64), part.vox2world, vector=True
    )
    return sitk.DisplacementFieldTransform(image)


def _peer_affine(matrix):
    peer = sitk.AffineTransform(3)
    peer.SetMatrix(matrix[:3, :3].ravel().tolist())
    peer.SetTranslation(matrix[:3, 3].tolist())
    return peer


# --- algebra ------------------------------------------------------------------------


def chain():
    """Three maps with parts of every kind."""
    return [
        Mapping((turn(), field(size=3.0))),
        Mapping((field(GRIDS["straight"], size=-2.5, length=70.0),)),
        Mapping((turn((-4, 2, 6), (0.0, 0.1, -0.2)), turn((1, 1, 1)))),
    ]


def test_compose_is_applied_part_by_part_and_associative():
    a, b, c = chain()
    one_by_one = scattered()
    for step in (a, b, c):
        one_by_one = mapping.points(step, one_by_one)
    for whole in (
        mapping.compose([a, b, c]),
        mapping.compose([mapping.compose([a, b]), c]),
        mapping.compose([a, mapping.compose([b, c])]),
    ):
        found = mapping.points(whole, scattered())
        np.testing.assert_allclose(found, one_by_one, rtol=0, atol=1e-9)  # float64
    assert [mapping.kind_of(p) for p in mapping.compose([a, b, c]).parts] == [
        *("affine", "field", "field", "affine")
    ]
    swapped = mapping.points(mapping.compose([b, a, c]), scattered())
    assert np.abs(swapped - one_by_one).max() > 1


def test_compose_on_a_grid_is_exact_at_its_voxels():
    g = GRIDS["oblique"]
    whole = mapping.compose(chain())
    (only,) = mapping.compose(chain(), g).parts
    expected = mapping.points(whole, positions(g)) - positions(g)
    np.testing.assert_allclose(only.disp_mm, expected, rtol=0, atol=1e-5)  # float32
    np.testing.assert_array_equal(mapping.flatten(Mapping((only,)), g), only.disp_mm)
    with pytest.raises(ValueError, match="one or more, got none"):
        mapping.compose([])


def test_two_fields_on_the_output_grid_act_one_after_the_other():
    # Only the first is read at the voxels themselves.
    whole = Mapping((field(size=6.0), field(size=-5.0, length=40.0)))
    expected = mapping.points(whole, positions(FIELD_GRID)) - positions(FIELD_GRID)
    found = mapping.flatten(whole, FIELD_GRID)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)  # float32
    volume, _ = scan()
    warped = mapping.resample(whole, volume, FIELD_GRID, fill=-1000)
    there = mapping.sample(volume, positions(FIELD_GRID) + expected)
    np.testing.assert_allclose(warped, np.nan_to_num(there, nan=-1000), atol=1e-2)


def test_label_gives_the_smaller_id_of_equal_shares():
    data = np.full((4, 5, 6), 9, np.uint8)
    data[2:] = 4
    half = np.eye(4)
    half[0, 3] = 1.0
    place = np.diag([2.0, 4.0, 8.0, 1.0])
    found = mapping.resample(
        mapping.affine(half),
        Volume(data, place),
        Grid(data.shape, place),
        interp="label",
    )
    assert found[:, 2, 3].tolist() == [9, 4, 4, 0]


def test_nearest_sends_halves_up_and_faces_in_or_out_as_itk():
    # Numbers that binary fractions hold: no rounding decides.
    place = np.diag([2.0, 4.0, 8.0, 1.0])
    data = np.arange(1, 121, dtype=np.int16).reshape(4, 5, 6)
    half = np.eye(4)
    half[:3, 3] = 1.0, 2.0, 4.0
    for matrix in (half, np.linalg.inv(half)):
        found = mapping.resample(
            mapping.affine(matrix),
            Volume(data, place),
            Grid(data.shape, place),
            interp="nearest",
        )
        g = Grid(data.shape, place)
        how = sitk.sitkNearestNeighbor
        image = oracles.itk_image(data.astype(np.float64), place)
        expected = resampled(image, g, _peer_affine(matrix), how, 0.0)
        np.testing.assert_array_equal(found, expected)


def test_points_and_samples_of_nothing_and_of_one():
    still = Mapping(())
    np.testing.assert_array_equal(mapping.points(still, CENTER), CENTER)
    assert mapping.points(still, np.empty((0, 3))).shape == (0, 3)
    volume, _ = scan()
    assert np.isnan(mapping.sample(volume, CENTER + 900))
    assert abs(mapping.sample(volume, CENTER) - hu(CENTER)) < 8  # linear, 5 mm apart
    with pytest.raises(ValueError, match=r"xyz must be \(\.\.\., 3\) in LPS mm"):
        mapping.points(still, np.zeros((3, 2)))


@pytest.mark.parametrize("interp", mapping.INTERPOLATIONS)
def test_slabs_and_threads_change_nothing(monkeypatch, interp):
    volume, _ = scan(dtype=np.int16)
    whole = mapping.compose(chain())
    target = GRIDS["permuted"]
    results = []
    for points_per_slab, threads in ((2**30, 1), (1, 3), (1000, None)):
        monkeypatch.setattr(grids, "SLAB_POINTS", points_per_slab)
        options = {"threads": threads}
        results.append(
            (
                mapping.resample(whole, volume, target, interp=interp, **options),
                mapping.flatten(whole, target, **options),
                mapping.jacobian(whole, target, **options),
                mapping.coverage(whole, target, **options),
            )
        )
    for other in results[1:]:
        for mine, theirs in zip(results[0], other, strict=True):
            np.testing.assert_array_equal(mine, theirs)


def test_resample_keeps_whole_numbers_and_fills():
    volume, _ = scan(dtype=np.int16)
    far = mapping.affine(turn((400, 0, 0)))
    out = mapping.resample(far, volume, GRIDS["straight"], fill=-1000)
    assert out.dtype == np.int16 and (out == -1000).all()
    exact = mapping.resample(Mapping(()), volume, MOVING_GRID, fill=7)
    np.testing.assert_array_equal(exact, volume.data)
    for change, match in (
        ({"interp": "cubic"}, "interp must be one of"),
        ({"fill": 0.5}, "fill must be a value of int16, got 0.5"),
        ({"fill": 70000}, "fill must be a value of int16"),
    ):
        with pytest.raises(ValueError, match=match):
            mapping.resample(Mapping(()), volume, MOVING_GRID, **change)
    with pytest.raises(ValueError, match="whole ids for 'label', got float32"):
        mapping.resample(Mapping(()), scan()[0], MOVING_GRID, interp="label")


# --- Jacobian -----------------------------------------------------------------------


def test_jacobian_of_affines_is_their_determinant():
    whole = Mapping((turn(), turn((0, 0, 0), (0.4, 0.0, 0.3), 0.8)))
    expected = np.prod([np.linalg.det(m[:3, :3]) for m in whole.parts])
    for g in (GRIDS["oblique"], GRIDS["flipped"]):
        found = mapping.jacobian(whole, g)
        assert found.shape == g.shape
        np.testing.assert_allclose(found, expected, rtol=1e-6)  # float32
    with pytest.raises(ValueError, match="2 voxels or more per axis"):
        mapping.jacobian(whole, Grid((5, 1, 6), np.eye(4)))


def test_jacobian_inside_agrees_with_itk():
    # Its filter takes derivatives along the axes for those along the world's.
    part = field(grid(FIELD_GRID.shape, (5.0, 5.5, 7.0)), size=9.0)
    found = mapping.jacobian(Mapping((part,)), part.grid)
    peer = oracles.itk_image(
        part.disp_mm.astype(np.float64), part.vox2world, vector=True
    )
    expected = oracles.itk_array(sitk.DisplacementFieldJacobianDeterminant(peer))
    inner = (slice(1, -1),) * 3
    np.testing.assert_allclose(found[inner], expected[inner], atol=1e-5)  # float32
    assert found.min() < 0.3 and found.max() > 1.7


def test_coverage_is_where_displacements_are_known():
    part = field()
    covered = mapping.coverage(Mapping((part,)), GRIDS["aside"])
    shifted = part._replace(disp_mm=np.full_like(part.disp_mm, 5.0))
    moved = mapping.flatten(Mapping((shifted,)), GRIDS["aside"])
    np.testing.assert_array_equal(covered, moved[..., 0] > 0)
    assert 0 < covered.sum() < covered.size


# --- inverse ------------------------------------------------------------------------


def swirl(g):
    """Turns about the third axis through CENTER, angle falling with the radius."""
    s = positions(g) - CENTER
    radius = np.linalg.norm(s[..., :2], axis=-1)
    return s, 0.5 * np.exp(-np.square(radius / 40))


def swirled(g, sign):
    """The swirl's displacement, known in closed form for both directions."""
    s, angle = swirl(g)
    angle = sign * angle
    x = np.cos(angle) * s[..., 0] - np.sin(angle) * s[..., 1]
    y = np.sin(angle) * s[..., 0] + np.cos(angle) * s[..., 1]
    return np.stack([x, y, s[..., 2]], axis=-1) - s


def test_inverse_of_a_swirl_is_the_swirl_back():
    errors_mm = []
    for factor in (1, 2):
        shape = tuple(np.array((30, 34, 12)) * factor)
        g = Grid(shape, place(shape, np.array((5.0, 4.6, 9.0)) / factor))
        inverse = invert(mapping.field(swirled(g, 1), g.vox2world), g)
        (back,) = inverse.mapping.parts
        inner = tuple(slice(3 * factor, -3 * factor) for _ in shape)
        off = np.linalg.norm(back.disp_mm - swirled(g, -1), axis=-1)[inner]
        errors_mm.append(off.max())
        assert inverse.stats["unsolved_percent"] == 0
        assert np.nanmax(inverse.residual_mm) <= 0.01
        assert np.abs(back.disp_mm).max() > 8
    # The field is linear between voxels: an error of second order, all that is left.
    assert errors_mm[0] < 0.5
    assert 3 < errors_mm[0] / errors_mm[1] < 5.5


@pytest.mark.parametrize(
    "parts",
    [
        lambda: (field(size=5.0),),
        lambda: (field(size=4.0), turn()),
        lambda: (turn(angles=(0.5, 0.0, 0.3), scale=1.3), field(size=3.0)),
        lambda: (field(size=3.0), turn((60, -35, 40), (0.2, 0.5, -0.4)), field(size=2)),
    ],
)
def test_inverse_leads_back_to_the_tolerance(parts):
    whole = Mapping(parts())
    inverse = invert(whole, MOVING_GRID)
    y = positions(MOVING_GRID)
    there = mapping.points(whole, mapping.points(inverse.mapping, y))
    gap = np.linalg.norm(there - y, axis=-1)
    known = ~np.isnan(inverse.residual_mm)
    stats = inverse.stats
    # Where it is known, no field's edge had to be continued.
    np.testing.assert_allclose(gap[known], inverse.residual_mm[known], atol=1e-5)
    assert gap[known].max() <= 0.01 and known.mean() > 0.15
    assert stats["covered_percent"] == pytest.approx(100 * known.mean())
    assert stats["unsolved_percent"] == 0
    assert stats["residual_max_mm"] == pytest.approx(gap[known].max(), abs=1e-6)
    assert 0 < stats["between_mean_mm"] < 0.5
    check_inverse(inverse, "a.h5", 0.0)


def test_inverse_keeps_affines_apart_and_beyond_the_grid(tmp_path):
    whole = Mapping((field(size=4.0), turn(), turn((2, 1, 0))))
    inverse = invert(whole, MOVING_GRID).mapping
    assert [mapping.kind_of(part) for part in inverse.parts] == ["field", "affine"]
    far = CENTER + np.array([[900.0, 0.0, 0.0], [0.0, -700.0, 300.0]])
    back = mapping.points(inverse, mapping.points(whole, far))
    np.testing.assert_allclose(back, far, atol=1e-9)  # float64
    mapping.write(tmp_path / "a.h5", inverse)
    peer = sitk.ReadTransform(str(tmp_path / "a.h5"))
    xyz = scattered()
    np.testing.assert_allclose(
        peer_points(peer, xyz), mapping.points(inverse, xyz), atol=1e-6
    )


def test_inverse_of_affines_is_exact():
    whole = Mapping((turn(), turn((5, 5, 5), (1.2, 0.4, 0.0))))
    inverse = invert(whole, MOVING_GRID)
    back = mapping.points(inverse.mapping, mapping.points(whole, scattered()))
    np.testing.assert_allclose(back, scattered(), atol=1e-9)  # float64
    assert inverse.stats["residual_max_mm"] == 0
    assert invert(Mapping(()), MOVING_GRID).mapping.parts == ()


def test_inverse_is_no_negation():
    part = field(size=8.0)
    negated = Mapping((part._replace(disp_mm=-part.disp_mm),))
    y = positions(MOVING_GRID)
    gaps = mapping.points(Mapping((part,)), mapping.points(negated, y)) - y
    inverse = invert(Mapping((part,)), MOVING_GRID)
    known = ~np.isnan(inverse.residual_mm)
    assert np.linalg.norm(gaps, axis=-1)[known].max() > 3
    assert np.nanpercentile(inverse.residual_mm, 99) < 0.01


def test_inverse_of_folds_says_so_and_is_refused():
    whole = Mapping((field(size=20.0),))
    assert (mapping.jacobian(whole, FIELD_GRID) <= 0).mean() > 0.1
    inverse = invert(whole, MOVING_GRID)
    assert inverse.stats["unsolved_percent"] > 5
    assert np.nanmax(inverse.residual_mm) > 1
    (line,) = doubts(inverse.stats)
    assert line.startswith("folding: ") and "off by more than 0.01 mm" in line
    with pytest.raises(UserError, match="the map folds") as caught:
        check_inverse(inverse, "a.h5", 1.0)
    assert (caught.value.reason, caught.value.exit_code) == (
        "folding",
        errors.NUMERICAL,
    )


def test_inverse_refuses_a_grid_that_nothing_leads_to():
    away = Grid((8, 9, 10), place((8, 9, 10), (4, 5, 6), center=CENTER + 900))
    inverse = invert(Mapping((field(),)), away)
    assert np.isnan(inverse.residual_mm).all()
    (line,) = doubts(inverse.stats)
    assert line.startswith("no_overlap: the transform leads to 0 % of the moving scan")
    with pytest.raises(UserError, match="name the moving scan") as caught:
        check_inverse(inverse, "a.h5", 1.0)
    assert caught.value.reason == "no_overlap"


# --- files --------------------------------------------------------------------------


def stored(folder, codes="RAI"):
    """A fixed and a moving scan as files of other axis orders, read back."""
    volumes = []
    for name, g, order in (
        ("fixed", FIELD_GRID, codes),
        ("moving", MOVING_GRID, "SPR"),
    ):
        data = np.rint(hu(positions(g))).astype(np.int16)
        data, vox2world = orientation.reorient(data, g.vox2world, order)
        nifti.write_volume(folder / f"{name}.nii.gz", data, vox2world)
        volumes.append(nifti.read_image(folder / f"{name}.nii.gz"))
    return volumes


ROUND = [
    ("a.h5", "itk"),
    ("b.nii.gz", "ants"),
    ("c.nii", "nifti1006"),
    ("d.nrrd", "slicer"),
    ("e.nii.gz", "l2r"),
    ("f.npz", "l2r"),
]


@pytest.mark.parametrize("last", ROUND)
def test_round_trips_between_all_spellings(tmp_path, last):
    fixed, moving = stored(tmp_path)
    whole = Mapping((field(size=4.0), turn()))
    g = mapping.grid_of(fixed)
    inner = positions(Grid(tuple(n - 1 for n in g.shape), g.vox2world)).reshape(-1, 3)
    xyz = inner[::7] + 0.4 * np.array(fixed.spacing_mm)  # between voxels
    flat = mapping.points(mapping.compose([whole], g), xyz)
    for n, (name, to) in enumerate((*ROUND, last)):
        path = tmp_path / f"{n}{name}"
        mapping.write(path, whole, to, fixed=fixed, moving=moving)
        whole = mapping.read(path, fixed=fixed, moving=moving)
        found = mapping.points(whole, xyz)
        # float32 vectors and geometry, seven times over
        np.testing.assert_allclose(found, flat, rtol=0, atol=1e-3)
    assert np.abs(flat - xyz).max() > 5


def test_write_keeps_parts_and_grids_without_a_fixed_scan(tmp_path):
    whole = mapping.compose(chain())
    mapping.write(tmp_path / "a.h5", whole)
    again = mapping.read(tmp_path / "a.h5")
    assert len(again.parts) == len(whole.parts)
    xyz = scattered()
    np.testing.assert_allclose(
        mapping.points(again, xyz), mapping.points(whole, xyz), atol=1e-6
    )
    single = Mapping((field(),))
    mapping.write(tmp_path / "b.nii", single)
    (same,) = mapping.read(tmp_path / "b.nii").parts
    np.testing.assert_array_equal(same.disp_mm, field().disp_mm)
    mapping.write(tmp_path / "c.txt", Mapping((turn(), turn())))
    (matrix,) = mapping.read(tmp_path / "c.txt").parts
    np.testing.assert_allclose(matrix, turn() @ turn(), atol=1e-12)
    mapping.write(tmp_path / "d.h5", Mapping(()))
    peer = sitk.ReadTransform(str(tmp_path / "d.h5"))
    np.testing.assert_allclose(peer_points(peer, xyz), xyz, atol=1e-9)
    # A fixed scan is no wish for one field: beyond its grid the affine acts on.
    mapping.write(tmp_path / "e.h5", whole, fixed=stored(tmp_path)[0])
    assert (tmp_path / "e.h5").read_bytes() == (tmp_path / "a.h5").read_bytes()
    name = "sub-01_from-moving_to-fixed_mode-image_xfm.h5"
    mapping.write(tmp_path / name, whole, "bids")
    assert (tmp_path / name).read_bytes() == (tmp_path / "a.h5").read_bytes()


@pytest.mark.parametrize(
    "name, to, parts, reason, match",
    [
        ("a.mat", None, 0, "name_mismatch", "ends in .h5 or .hdf5 or .nii.gz or"),
        ("a.nii", "itk", 0, "name_mismatch", "ends in .h5 or .hdf5, got a.nii; rename"),
        ("x_xfm.h5", "bids", 0, "name_mismatch", "from-MOVING_to-FIXED_mode-image"),
        ("a.txt", None, 0, "schema", "without displacements, got a field"),
        ("a.nii.gz", None, 2, "schema", "the fixed scan, whose grid is needed"),
        ("a.npz", None, 1, "schema", "the fixed scan, whose grid is needed"),
    ],
)
def test_write_refuses(tmp_path, name, to, parts, reason, match):
    with pytest.raises(UserError, match=match) as caught:
        mapping.write(tmp_path / name, chain()[parts], to)
    assert (caught.value.reason, caught.value.exit_code) == (reason, errors.USAGE)
    assert list(tmp_path.iterdir()) == []


def test_write_refuses_a_field_beyond_a_kilometre(tmp_path):
    far = mapping.compose([Mapping((field(),)), mapping.affine(turn((0, 0, 1.2e6)))])
    with pytest.raises(UserError, match=r"within 1 km, got 1.2e\+06 mm") as caught:
        mapping.write(tmp_path / "a.nii", far)
    assert (caught.value.reason, caught.value.exit_code) == (
        "field_range",
        errors.NUMERICAL,
    )
    mapping.write(tmp_path / "a.h5", far)
    with pytest.raises(UserError, match="within 1 km, got .* write an .h5"):
        mapping.write(tmp_path / "b.nii", far, fixed=stored(tmp_path)[0])


def test_write_refuses_a_shear_in_itk_files(tmp_path):
    vox2world = FIELD_GRID.vox2world.copy()
    vox2world[0, 1] += 0.9
    sheared = mapping.field(field().disp_mm, vox2world)
    with pytest.raises(UserError, match="axes, got a shear; use .nii.gz"):
        mapping.write(tmp_path / "a.h5", sheared)
    mapping.write(tmp_path / "a.nrrd", sheared)  # which holds any axes
    with pytest.raises(ValueError, match="to must be one of"):
        mapping.write(tmp_path / "a.h5", sheared, "elastix")


def test_read_refuses_a_learn2reg_field_alone(tmp_path):
    fixed, moving = stored(tmp_path)
    mapping.write(
        tmp_path / "disp.npz", Mapping((field(),)), fixed=fixed, moving=moving
    )
    with pytest.raises(UserError, match="name the fixed and the moving") as caught:
        mapping.read(tmp_path / "disp.npz")
    assert (caught.value.reason, caught.value.exit_code) == ("schema", errors.USAGE)


def test_makers_reject():
    with pytest.raises(ValueError, match="matrix must be a finite invertible"):
        mapping.affine(np.zeros((4, 4)))
    with pytest.raises(ValueError, match="channels last"):
        mapping.field(np.zeros((3, 4, 5, 6)), np.eye(4))
    with pytest.raises(ValueError, match="within 1 km"):
        mapping.field(np.full((4, 5, 6, 3), np.nan), np.eye(4))


# --- every way to store a scan ------------------------------------------------------

STORED = [  # numpy type, slope, intercept
    ("i2", 1, 0),
    ("u2", 1, -1024),
    ("f4", 1, 0),
    ("f8", 1, 0),
]
SMALL = Grid(
    (9, 8, 7),
    place((9, 8, 7), (3.0, 2.5, 4.0), "LPS", (0.2, -0.1, 0.15), np.array((5, -20, 60))),
)


def store(path, hu_values, vox2world, kind, order, slope, inter):
    """NIfTI-1 bytes, made without the writer under test."""
    header = nib.Nifti1Header(endianness=order)
    header.set_data_shape(hu_values.shape)
    header.set_data_dtype(np.dtype(order + kind))
    header.set_sform(orientation.ras_from_lps(vox2world), 1)
    header.set_qform(orientation.ras_from_lps(vox2world), 1)
    header.set_xyzt_units("mm")
    header["scl_slope"], header["scl_inter"] = slope, inter
    header["vox_offset"], header["magic"] = 352, b"n+1"
    raw = ((hu_values - inter) / slope).astype(order + kind).tobytes(order="F")
    path.write_bytes(header.binaryblock + b"\0\0\0\0" + raw)


@pytest.mark.parametrize("codes", ALL_CODES)
def test_every_storage_form_is_one_volume_and_gives_one_field(tmp_path, codes):
    # 48 orders of the axes x 4 types x 2 byte orders: what the network is given does
    # not differ by a bit, and the field that comes back is one map of the world.
    expected = np.rint(hu(positions(SMALL)))
    data, vox2world = orientation.reorient(expected, SMALL.vox2world, codes)
    disp_mm = waves(positions(SMALL), size=6.0).astype(np.float32)
    inner = np.random.default_rng(1).uniform(0.05, np.array(SMALL.shape) - 1.05, (9, 3))
    xyz = inner @ SMALL.vox2world[:3, :3].T + SMALL.vox2world[:3, 3]
    moved = mapping.points(Mapping((Field(disp_mm, SMALL.vox2world),)), xyz)
    for (kind, slope, inter), order in itertools.product(STORED, "<>"):
        path = tmp_path / "fixed.nii"
        store(path, data, vox2world, kind, order, slope, inter)
        fixed = nifti.read_image(path)
        assert fixed.native.shape == data.shape
        np.testing.assert_array_equal(fixed.data, expected)
        # float32 geometry in the file
        np.testing.assert_allclose(fixed.vox2world, SMALL.vox2world, atol=1e-4)
        if kind == "f8":
            continue  # one field per order of axes and bytes, from two types
        warp = tmp_path / "a_1Warp.nii"
        transforms.write_field(warp, disp_mm, fixed.vox2world, like=fixed)
        peer = sitk.ReadImage(str(warp), sitk.sitkVectorFloat64)
        image = sitk.ReadImage(str(path))
        assert peer.GetSize() == image.GetSize()
        np.testing.assert_allclose(peer.GetOrigin(), image.GetOrigin(), atol=1e-4)
        found = peer_points(sitk.DisplacementFieldTransform(peer), xyz)
        np.testing.assert_allclose(found, moved, rtol=0, atol=1e-4)
        np.testing.assert_allclose(
            mapping.points(mapping.read(warp), xyz), moved, rtol=0, atol=1e-4
        )


def test_a_mirrored_pair_has_the_mirrored_field(tmp_path):
    # Scan and field mirrored in x together, stored as a file whose first axis runs
    # the other way: read on LPS+ axes, one is the mirror image of the other.
    mirror = np.diag([-1.0, 1.0, 1.0, 1.0])
    disp_mm = waves(positions(SMALL), size=6.0).astype(np.float32)
    whole = Mapping((Field(disp_mm, SMALL.vox2world),))
    turned, vox2world = orientation.reorient(
        disp_mm * np.array([-1, 1, 1], np.float32), mirror @ SMALL.vox2world
    )
    transforms.write_field(tmp_path / "m.nii", turned, vox2world)
    xyz = scattered(40, 9) - CENTER + np.array((5, -20, 60))
    expected = mapping.points(whole, xyz) * [-1, 1, 1]
    found = mapping.points(mapping.read(tmp_path / "m.nii"), xyz * [-1, 1, 1])
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
    assert np.abs(expected - xyz * [-1, 1, 1]).max() > 3
