"""Pictures: the right side up, the right colours, lines where the map puts them."""

import struct
import zlib

import numpy as np
import pytest

from tests.reports.test_outlines import filled
from unireg_jax.imaging.nifti import Volume
from unireg_jax.reports import pictures

SHAPE, SPACING = (40, 30, 20), (4.0, 4.0, 8.0)  # pictures of 40 x 30 x 40 cubes


def decode(png):
    """[rows, columns, 3] uint8 of a PNG with a palette and no filters."""
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    parts, at = {}, 8
    while at < len(png):
        (size,) = struct.unpack(">I", png[at : at + 4])
        name, data = png[at + 4 : at + 8], png[at + 8 : at + 8 + size]
        (checksum,) = struct.unpack(">I", png[at + 8 + size : at + 12 + size])
        assert checksum == zlib.crc32(name + data)
        parts[name], at = data, at + 12 + size
    columns, rows, depth, kind = struct.unpack(">IIBB", parts[b"IHDR"][:10])
    assert (depth, kind) == (8, 3)
    raw = np.frombuffer(zlib.decompress(parts[b"IDAT"]), np.uint8)
    raw = raw.reshape(rows, columns + 1)
    assert (raw[:, 0] == 0).all()
    return np.frombuffer(parts[b"PLTE"], np.uint8).reshape(-1, 3)[raw[:, 1:]]


def place():
    out = np.diag([*SPACING, 1.0])
    out[:3, 3] = (-80, -60, 500)
    return out


def body():
    """Soft tissue almost to the faces of the scan."""
    hu = np.full(SHAPE, -1000, np.int16)
    hu[2:-2, 2:-2, 1:-1] = 0
    return hu


def scene(fixed=None, moving=None, disp=None, affine=None):
    fixed = Volume(body() if fixed is None else fixed, place())
    moving = fixed if moving is None else Volume(moving, place())
    disp = np.zeros((*SHAPE, 3), np.float32) if disp is None else disp
    affine = np.eye(4) if affine is None else affine
    return pictures.scene(fixed, moving, moving.data, disp, affine)


def show(scene, mode, plane, **window):
    axis = {"axial": 2, "coronal": 1, "sagittal": 0}[plane]
    place = scene.grid.shape[axis] // 2
    return decode(pictures.picture(scene, mode, plane, place, **window)).astype(int)


@pytest.mark.parametrize(
    ("side", "shown"),
    [
        ("left", {"axial": "right", "coronal": "right"}),
        ("posterior", {"axial": "bottom", "sagittal": "right"}),
        ("superior", {"coronal": "top", "sagittal": "top"}),
    ],
)
def test_sides_are_where_radiologists_look_for_them(side, shown):
    """LPS+ axes: a dense plate at the far end of one axis."""
    hu = body()
    axis = ("left", "posterior", "superior").index(side)
    plate = [slice(2, -2), slice(2, -2), slice(1, -1)]
    plate[axis] = slice(SHAPE[axis] * 3 // 4, -2 if axis < 2 else -1)
    hu[tuple(plate)] = 300
    for plane, where in shown.items():
        image = show(scene(hu), "fixed", plane)[..., 0]
        bright = np.argwhere(image > 200).mean(axis=0) / image.shape
        row, column = bright
        found = {
            "right": column > 0.7,
            "bottom": row > 0.7,
            "top": row < 0.3,
        }
        assert found[where], (plane, bright)


def test_cubes_show_anisotropic_voxels_in_shape():
    drawn = pictures.draw(scene(), slices=5)
    assert drawn.size == {"axial": (40, 30), "coronal": (40, 40), "sagittal": (30, 40)}
    assert drawn.count == {"axial": 20, "coronal": 30, "sagittal": 40}
    for plane in pictures.PLANES:
        count = len(drawn.index[plane])
        assert count == 5
        modes = drawn.png["soft"]
        assert all(len(planes[plane]) == count for planes in modes.values())
        assert drawn.index[plane] == sorted(set(drawn.index[plane]))
        assert 0 <= drawn.index[plane][0] < drawn.index[plane][-1] < drawn.count[plane]


def test_overlay_is_grey_only_where_scans_agree():
    moving = body()
    moving[10:20, 8:20, 5:15] = 250  # brighter in moving: magenta
    moving[24:34, 8:20, 5:15] = -250  # darker: green
    image = show(scene(moving=moving), "overlay", "axial")
    red, green, blue = (image[..., i] for i in range(3))
    assert (red == blue).all()
    assert (red == green)[14, 4] and not (red == green)[14, 15]
    assert red[14, 15] > green[14, 15] and red[14, 29] < green[14, 29]


def test_difference_has_a_sign_and_is_dark_at_zero():
    moving = body()
    moving[10:20, 8:20, 5:15], moving[24:34, 8:20, 5:15] = 250, -250
    image = show(scene(moving=moving), "difference", "axial")
    assert image[14, 22].max() < 30  # the same in both
    assert image[14, 15, 0] > image[14, 15, 2] + 50  # brighter: orange
    assert image[14, 29, 2] > image[14, 29, 0] + 50  # darker: blue


def test_before_shows_the_pre_alignment_alone():
    """The moving scan lies 8 mm off and the displacement brings it there."""
    hu = body()
    hu[10:20, 8:20, 5:15] = 250
    moving = np.roll(hu, 2, axis=0)
    disp = np.zeros((*SHAPE, 3), np.float32)
    disp[..., 0] = 8.0
    fixed, other = Volume(hu, place()), Volume(moving, place())
    found = pictures.scene(fixed, other, hu, disp, np.eye(4))
    assert np.abs(found.warped - found.fixed).max() < 1e-3
    assert np.abs(found.before - found.fixed).max() > 200
    shift = np.eye(4)
    shift[0, 3] = 8.0
    found = pictures.scene(fixed, other, hu, disp, shift)
    inside = (slice(4, -4),) * 3
    assert np.abs(found.before - found.fixed)[inside].max() < 1e-2


def test_lung_shows_in_its_own_window_where_there_is_enough():
    hu = body()
    hu[10:30, 8:22, 5:15] = -850
    hu[15:20, 10:20, 5:15] = -700  # a vessel's worth
    found = scene(hu)
    assert set(found.windows) == {"soft", "lung"}
    soft, lung = (
        show(found, "fixed", "axial", window=w)[..., 0] for w in found.windows
    )
    assert soft[14, 12] == soft[14, 17] == 0
    assert lung[14, 17] > lung[14, 12] + 15 and lung[14, 4] > 200
    hu = body()
    hu[10:30, 8:22, 5:15] = -1000  # gas is no lung
    assert set(scene(hu).windows) == {"soft"}
    # Of a scan without air no window is known.
    assert set(scene(np.maximum(hu, -400)).windows) == {"soft"}


def test_pre_alignment_leaves_grid_and_jacobian_alone():
    """A map that is affine through and through has no displacement of its own."""
    affine = np.array(
        [[1.1, 0.1, 0, 3], [-0.1, 0.9, 0, 4], [0, 0.05, 1.2, -90], [0, 0, 0, 1]]
    )
    x = np.stack(np.meshgrid(*map(np.arange, SHAPE), indexing="ij"), -1)
    x = x @ place()[:3, :3].T + place()[:3, 3]
    disp = (x @ (affine[:3, :3] - np.eye(3)).T + affine[:3, 3]).astype(np.float32)
    found = scene(disp=disp, affine=affine)
    still = scene()
    # Beyond the outermost voxel's centre the field keeps its value: two cubes wide.
    inside = (slice(3, -3),) * 3
    np.testing.assert_allclose(found.detj[inside], 1, atol=1e-3)  # float32 at 600 mm
    np.testing.assert_allclose(
        found.moved_mm[inside], still.moved_mm[inside], atol=2e-3
    )


def test_grid_of_a_sheared_scan_moves_as_the_map_does():
    """Coordinates along axes that are not perpendicular, of a tilted gantry."""
    sheared = place()
    sheared[:3, 2] = sheared[2, 2] * np.array([0.0, 0.36, 1.0])
    fixed = Volume(body(), sheared)
    disp = np.zeros((*SHAPE, 3), np.float32)
    disp[..., 1] = 10.0
    scenes = (
        pictures.scene(fixed, fixed, fixed.data, d, np.eye(4))
        for d in (disp, np.zeros_like(disp))
    )
    moved, still = (s.moved_mm for s in scenes)
    inside = (slice(3, -3),) * 3
    apart = (moved - still)[inside].reshape(-1, 3)
    np.testing.assert_allclose(apart.min(axis=0), [0, 10, 0], atol=1e-3)
    np.testing.assert_allclose(apart.max(axis=0), [0, 10, 0], atol=1e-3)


def test_jacobian_is_yellow_where_the_map_folds():
    disp = np.zeros((*SHAPE, 3), np.float32)
    x = np.arange(SHAPE[0]) * SPACING[0]
    disp[..., 0] = np.where(x < 80, 0.9 * x, 0.9 * 80 - 1.5 * (x - 80))[:, None, None]
    image = show(scene(disp=disp), "jacobian", "axial")
    yellow = (image == (255, 235, 0)).all(axis=-1)
    assert yellow[4:-4, 25:36].all() and not yellow[:, 3:15].any()
    assert not yellow[:, :2].any() and not yellow[0].any()  # not beside the body
    assert image[14, 8, 0] > image[14, 8, 2] + 30  # J = 1.9 grows: red


def test_grid_lines_lie_where_the_map_puts_them():
    """x + u = 1.5 x: lines every 10 mm of the fixed scan, not every 15."""
    disp = np.zeros((*SHAPE, 3), np.float32)
    disp[..., 0] = (0.5 * np.arange(SHAPE[0]) * SPACING[0])[:, None, None]

    def lines(found):
        ink = found - show(scene(np.full(SHAPE, -1000, np.int16)), "fixed", "axial")
        # Between two horizontal lines only the vertical ones are bright.
        row = ink[..., 2].sum(axis=1).argmin()
        bright = ink[row, :, 2] > 120
        return (bright[1:] & ~bright[:-1]).sum() + bright[0]

    air = np.full(SHAPE, -1000, np.int16)
    straight = lines(show(scene(air), "grid", "axial"))
    stretched = lines(show(scene(air, disp=disp), "grid", "axial"))
    assert straight == 11  # 160 mm, from 0 on
    assert stretched == 16  # 240 mm


def test_scene_limits_the_size_of_its_pictures():
    data = np.zeros((400, 30, 20), np.int16)
    fixed = Volume(data, np.diag([0.7, 0.7, 5.0, 1.0]))
    disp = np.zeros((*data.shape, 3), np.float32)
    found = pictures.scene(fixed, fixed, data, disp, np.eye(4))
    assert max(found.grid.shape) <= 208


def test_scene_refuses_other_grids():
    fixed = Volume(body(), place())
    with pytest.raises(ValueError, match="warped and disp_mm must be"):
        pictures.scene(fixed, fixed, fixed.data, np.zeros((4, 5, 6, 3)), np.eye(4))
    with pytest.raises(ValueError, match="labels must be"):
        still = np.zeros((*SHAPE, 3), np.float32)
        labels = {"fixed": np.zeros((4, 5, 6), np.uint8)}
        pictures.scene(fixed, fixed, fixed.data, still, np.eye(4), labels=labels)


def test_outlines_lie_on_what_the_pictures_show():
    """A label of one bright organ, on the scan's own grid; no side is symmetric."""
    hu, labels = body(), np.zeros(SHAPE, np.uint16)
    organ = (slice(22, 33), slice(5, 14), slice(4, 9))
    hu[organ], labels[organ] = 300, 700
    fixed = Volume(hu, place())
    still = np.zeros((*SHAPE, 3), np.float32)
    given = {"fixed": labels, "warped": np.zeros_like(labels)}
    found = pictures.scene(fixed, fixed, hu, still, np.eye(4), labels=given)
    drawn = pictures.draw(found, slices=9)
    assert set(drawn.outlines) == set(given) and drawn.ids == (700,)
    for plane in pictures.PLANES:
        assert not any(drawn.outlines["warped"][plane])
        seen = 0
        shown = zip(
            drawn.png["soft"]["fixed"][plane],
            drawn.outlines["fixed"][plane],
            strict=True,
        )
        for png, paths in shown:
            bright = decode(png)[..., 0] > 190  # between slices, too
            np.testing.assert_array_equal(
                filled(paths.get(700, ""), bright.shape), bright
            )
            seen += bright.any()
        assert seen


def test_legends_are_whole_sentences():
    for title, legend in pictures.MODES.values():
        assert title and legend.endswith(".") and not set("{}") & set(legend)
