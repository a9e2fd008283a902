"""Slices of a registered pair as PNG, in every way a person looks at one.

Every picture is 8-bit with a palette. Two things in one picture, such as an image under
a coloured map, share the byte: 16 levels of one, 16 of the other.
"""

import base64
import struct
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from unireg_jax.evaluation import regularity
from unireg_jax.imaging import preprocess
from unireg_jax.imaging.nifti import Volume
from unireg_jax.imaging.preprocess import Grid
from unireg_jax.png import encode
from unireg_jax.reports import outlines

PLANES = ("axial", "coronal", "sagittal")
_LINES_MM = 15.0  # of the grid
# Name -> title and how to read it. Their order is that of the page.
MODES = {
    "overlay": (
        "Overlay",
        "Fixed in green, warped moving in magenta: grey where they agree.",
    ),
    "checkerboard": (
        "Checkerboard",
        "Squares of fixed and warped moving in turn: edges should go on across them.",
    ),
    "fixed": ("Fixed", "The scan that stays."),
    "warped": ("Warped", "The moving scan after registration; air where it ends."),
    "before": ("Overlay before", "As the overlay, after the pre-alignment alone."),
    "difference_before": (
        "Difference before",
        "Moving after the pre-alignment minus fixed: orange brighter, blue darker.",
    ),
    "difference": (
        "Difference after",
        "Warped moving minus fixed: orange brighter, blue darker.",
    ),
    "grid": (
        "Deformed grid",
        f"A grid of {_LINES_MM:g} mm in the pre-aligned moving scan, as the map draws "
        "it into the fixed one.",
    ),
    "jacobian": (
        "Jacobian",
        "Volume that the displacement adds to the pre-alignment, in the body: blue "
        "smaller in moving, red larger, fullest at half and double; yellow where the "
        "map folds.",
    ),
}
IMAGES = tuple(mode for mode in MODES if mode not in ("grid", "jacobian"))
# Name -> title, and what is black and what is white, HU. The first is on every page.
WINDOWS = {
    "soft": ("Soft tissue", (-300.0, 300.0)),
    "lung": ("Lung", (-1350.0, 150.0)),
}
_AXES = {"axial": 2, "coronal": 1, "sagittal": 0}  # across the slices
_LUNG_HU = (-950.0, -600.0)  # lung with air in it; gas in a bowel is darker
_LEAST_LUNG = 0.03  # of the body
_LONGEST = 208  # pixels of the longest edge
_DIFFERENCE = 0.5  # of the window: fully coloured
_OCTAVES = 1.0  # of the Jacobian: fully coloured
_SQUARES = 10  # of the checkerboard, along the longest edge


class Slices(NamedTuple):
    """Pictures of one pair.

    Attributes:
        png: window -> mode -> plane -> PNG bytes, one per slice; the first window has
            all MODES, others IMAGES.
        index: plane -> index of each slice on the fixed image's LPS+ axes.
        count: plane -> slices of the fixed image.
        middle: plane -> position in the lists of the slice to begin with.
        size: plane -> (width, height) in pixels.
        outlines: of outlines.LAYERS -> plane -> what `outlines.trace` gives, one per
            slice; empty without labels.
        ids: all labels, in any slice or in none, in their order.
    """

    png: dict[str, dict[str, dict[str, list[bytes]]]]
    index: dict[str, list[int]]
    count: dict[str, int]
    middle: dict[str, int]
    size: dict[str, tuple[int, int]]
    outlines: dict[str, dict[str, list[dict[int, str] | None]]]
    ids: tuple[int, ...]


class Scene(NamedTuple):
    """A pair on one isotropic grid, ready to be drawn.

    Attributes:
        grid: of all arrays.
        fixed, before, warped: [X, Y, Z] float32, HU or the scan's own values.
        windows: name -> (low, high) of fixed and of moving: black to white.
        moved_mm: [X, Y, Z, 3] float32, x + u(x) along the grid's axes, mm from its
            first voxel; u without pre-alignment.
        detj: [X, Y, Z] float32, determinant of the Jacobian of x + u.
        body: [X, Y, Z] bool, of the fixed scan.
        native: (X, Y, Z) of the fixed scan.
        labels: of outlines.LAYERS -> [X, Y, Z] whole numbers; empty without labels.
        ids: all labels, also those too small for the grid, in their order.
    """

    grid: Grid
    fixed: np.ndarray
    before: np.ndarray
    warped: np.ndarray
    windows: dict[str, tuple[tuple[float, float], tuple[float, float]]]
    moved_mm: np.ndarray
    detj: np.ndarray
    body: np.ndarray
    native: tuple[int, int, int]
    labels: dict[str, np.ndarray]
    ids: tuple[int, ...]


def scene(
    fixed: Volume,
    moving: Volume,
    warped: np.ndarray,
    disp_mm: np.ndarray,
    affine: np.ndarray,
    *,
    labels: Mapping[str, np.ndarray] | None = None,
) -> Scene:
    """Brings a registered pair onto the grid of the pictures.

    Args:
        fixed: scan, LPS+ axes.
        moving: scan, LPS+ axes.
        warped: [X, Y, Z], moving on the grid of `fixed`.
        disp_mm: [X, Y, Z, 3] LPS mm, the whole map, on the grid of `fixed`.
        affine: [4, 4], fixed world -> moving world, LPS mm: the pre-alignment.
        labels: of outlines.LAYERS -> [X, Y, Z] whole numbers, on the grid of `fixed`.

    Returns:
        Scene, at most 208 voxels along an axis.

    Raises:
        ValueError: warped, disp_mm or labels are not on the grid of fixed.
    """
    shape = fixed.data.shape
    if warped.shape != shape or disp_mm.shape != (*shape, 3):
        raise ValueError(
            f"warped and disp_mm must be {shape} and {(*shape, 3)} on fixed's LPS+ "
            f"grid, got {warped.shape} and {disp_mm.shape}"
        )
    for name, data in (labels or {}).items():
        if data.shape != shape:
            raise ValueError(
                f"labels must be {shape} on fixed's LPS+ grid, got {data.shape} of "
                f"{name}"
            )
    grid, edge_mm = _isotropic(fixed)
    images = (
        preprocess.resample(fixed, grid, fill=_dark(fixed.data)),
        preprocess.resample(moving, grid, fill=_dark(moving.data), matrix=affine),
        preprocess.resample(fixed._replace(data=warped), grid, fill=_dark(moving.data)),
    )
    u = _residual(disp_mm, fixed, grid, affine)
    detj = np.ones(grid.shape, np.float32)
    if min(grid.shape) >= regularity.LEAST_VOXELS:
        inner = regularity.jacobian_determinant(u, grid.vox2world)
        detj = np.pad(inner, 1, mode="edge")
    turn = grid.vox2world[:3, :3] / edge_mm
    moved = u @ np.linalg.inv(turn).T.astype(np.float32)
    for axis, count in enumerate(grid.shape):
        line = np.arange(count, dtype=np.float32) * np.float32(edge_mm)
        moved[..., axis] += np.expand_dims(line, [a for a in range(3) if a != axis])
    body = preprocess.body_mask(Volume(images[0], grid.vox2world))
    windows = {"soft": (_window(fixed.data), _window(moving.data))}
    low, high = _LUNG_HU
    lung = (images[0] > low) & (images[0] < high) & body
    if _is_ct(fixed.data) and lung.sum() > _LEAST_LUNG * body.sum():
        windows["lung"] = (WINDOWS["lung"][1], _window(moving.data, "lung"))
    on_grid = {
        name: preprocess.resample(fixed._replace(data=data), grid, fill=0, order=0)
        for name, data in (labels or {}).items()
    }
    found = set().union(*(np.unique(data).tolist() for data in (labels or {}).values()))
    ids = tuple(sorted(found - {0}))
    return Scene(grid, *images, windows, moved, detj, body, shape, on_grid, ids)


def draw(scene: Scene, *, slices: int = 24) -> Slices:
    """Draws every mode in every plane and window, and outlines of labels.

    Args:
        scene: from `scene`.
        slices: per plane, at most; evenly spread over the body.

    Returns:
        Slices.
    """
    png: dict[str, dict[str, dict[str, list[bytes]]]] = {
        window: {mode: {} for mode in (MODES if i == 0 else IMAGES)}
        for i, window in enumerate(scene.windows)
    }
    index, count, middle, size = {}, {}, {}, {}
    lines: dict[str, dict] = {name: {} for name in scene.labels}
    for plane, axis in _AXES.items():
        places = _places(scene.body, axis, slices)
        of_native = scene.native[axis] / scene.grid.shape[axis]
        index[plane] = [int((p + 0.5) * of_native) for p in places]
        count[plane] = scene.native[axis]
        middle[plane] = len(places) // 2
        for window, modes in png.items():
            for mode in modes:
                modes[mode][plane] = [
                    picture(scene, mode, plane, p, window=window) for p in places
                ]
        first = png["soft"]["fixed"][plane][0]
        size[plane] = struct.unpack(">II", first[16:24])
        for name, labels in scene.labels.items():
            lines[name][plane] = [
                outlines.trace(_cut(labels, plane, p)) for p in places
            ]
    return Slices(png, index, count, middle, size, lines, scene.ids)


def middle_slice(scene: Scene, plane: str) -> int:
    """Index of the middle slice of the body on the scene's grid.

    Args:
        scene: from `scene`.
        plane: of PLANES.

    Returns:
        Index along the axis across the plane.
    """
    places = _places(scene.body, _AXES[plane], 24)
    return places[len(places) // 2]


def picture(
    scene: Scene, mode: str, plane: str, place: int, *, window: str = "soft"
) -> bytes:
    """Draws one slice.

    Args:
        scene: from `scene`.
        mode: of MODES.
        plane: of PLANES.
        place: index along the axis across the plane, on the scene's grid.
        window: of scene.windows.

    Returns:
        PNG. Patient's left at the right edge, anterior or superior at the top;
        sagittal: anterior at the left edge.
    """
    axis = _AXES[plane]

    def cut(volume):
        return _cut(volume, plane, place)

    of_fixed, of_moving = scene.windows[window]
    fixed = _shown(cut(scene.fixed), of_fixed)
    before, warped = (_shown(cut(a), of_moving) for a in (scene.before, scene.warped))
    if mode in ("fixed", "warped", "checkerboard"):
        image = {"fixed": fixed, "warped": warped}.get(mode)
        image = _checkerboard(fixed, warped) if image is None else image
        return _png(_level(image, 64), _greys())
    if mode in ("overlay", "before"):
        other = warped if mode == "overlay" else before
        return _png(_level(fixed, 16) * 16 + _level(other, 16), _complementary())
    if mode in ("difference", "difference_before"):
        other = warped if mode == "difference" else before
        change = (other - fixed) / (2 * _DIFFERENCE) + 0.5
        return _png(_level(change, 65), _diverging())
    ground = _level(fixed, 16) * 16
    if mode == "grid":
        across = [a for a in range(3) if a != axis]
        ink = _lines(np.stack([cut(scene.moved_mm[..., a]) for a in across], axis=-1))
        return _png(ground + _level(ink, 16), _inked())
    detj = np.where(cut(scene.body), cut(scene.detj), 1.0)
    scale = np.log2(np.maximum(detj, 1e-3)) / (2 * _OCTAVES) + 0.5
    return _png(ground + np.where(detj > 0, _level(scale, 15), 15), _volumes())


def data_uri(png: bytes) -> str:
    """Spells a PNG as an address that needs no other file.

    Args:
        png: bytes of the file.

    Returns:
        ASCII, `data:image/png;base64,…`.
    """
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


# --- geometry -----------------------------------------------------------------------


def _isotropic(volume: Volume) -> tuple[Grid, float]:
    """A grid of cubes over a scan, and their edge in mm."""
    spacing, shape = np.array(volume.spacing_mm), np.array(volume.data.shape)
    extent = spacing * shape
    edge = max(float(spacing.min()), 0.8, float(extent.max()) / _LONGEST)
    counts = np.maximum(1, np.rint(extent / edge)).astype(int)
    vox2world = volume.vox2world.copy()
    vox2world[:3, :3] = volume.vox2world[:3, :3] / spacing * edge
    first = (shape - 1) / 2 - (counts - 1) / 2 * edge / spacing
    vox2world[:3, 3] += volume.vox2world[:3, :3] @ first
    return Grid(tuple(int(n) for n in counts), vox2world), edge


def _residual(disp_mm, fixed, grid, affine) -> np.ndarray:
    """u in x + disp_mm(x) = affine (x + u(x)), on the grid of the pictures."""
    parts = [
        preprocess.resample(
            fixed._replace(data=np.ascontiguousarray(disp_mm[..., i])), grid, fill=0
        )
        for i in range(3)
    ]
    total = np.stack(parts, axis=-1)
    inverse = np.linalg.inv(affine)
    shift = (np.eye(4) - inverse) @ grid.vox2world
    u = total @ inverse[:3, :3].T.astype(np.float32)
    # u(x) = A^-1 (x + d) - x = A^-1 d - (x - affine^-1 x)
    for axis in range(3):
        row = shift[axis]
        i, j, k = np.ogrid[: grid.shape[0], : grid.shape[1], : grid.shape[2]]
        u[..., axis] -= (row[0] * i + row[1] * j + row[2] * k + row[3]).astype("f4")
    return u


def _cut(volume: np.ndarray, plane: str, place: int) -> np.ndarray:
    """[rows, columns] of a slice; rows downwards: posterior or inferior."""
    flat = np.swapaxes(np.take(volume, place, axis=_AXES[plane]), 0, 1)
    return flat if plane == "axial" else flat[::-1]


def _places(body: np.ndarray, axis: int, slices: int) -> list[int]:
    """Indices of the slices to draw, over the extent of the body."""
    others = tuple(a for a in range(3) if a != axis)
    inside = np.flatnonzero(body.any(axis=others))
    first, last = int(inside[0]), int(inside[-1])
    if last - first >= 4:  # the outermost show a rim of skin
        first, last = first + 1, last - 1
    count = min(slices, last - first + 1)
    return sorted({int(p) for p in np.rint(np.linspace(first, last, count))})


# --- pixels -------------------------------------------------------------------------


def _dark(data: np.ndarray) -> float:
    """What is drawn where a scan ends: air, or the smallest value if that is none."""
    return float(max(-1000, data.min()))


def _is_ct(data: np.ndarray) -> bool:
    return bool(data.min() < -500)


def _window(data: np.ndarray, name: str = "soft") -> tuple[float, float]:
    """Values that become black and white; of a scan without air, by percentiles."""
    if _is_ct(data):
        return WINDOWS[name][1]
    low, high = (float(v) for v in np.percentile(data[::3, ::3, ::3], (1, 99)))
    return low, max(high, low + 1e-3)


def _shown(image: np.ndarray, window: tuple[float, float]) -> np.ndarray:
    """Values as 0 black to 1 white."""
    low, high = window
    return np.clip((image - low) / (high - low), 0, 1)


def _level(image: np.ndarray, levels: int) -> np.ndarray:
    """0 … 1 as 0 … levels - 1."""
    return np.clip(image * levels, 0, levels - 1).astype(np.uint8)


def _checkerboard(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    rows, columns = np.indices(a.shape)
    edge = max(1, max(a.shape) // _SQUARES)
    return np.where((rows // edge + columns // edge) % 2 == 0, a, b)


def _lines(moved_mm: np.ndarray) -> np.ndarray:
    """Ink, 0 to 1, where x + u(x) lies on a grid line; [rows, columns, 2] mm.

    The distance to the line is divided by the gradient, so that lines keep their width
    in pixels however the map stretches them.
    """
    ink = np.zeros(moved_mm.shape[:2], np.float32)
    if min(ink.shape) < 2:
        return ink
    for axis in range(2):
        y = moved_mm[..., axis]
        slope = np.hypot(*np.gradient(y)) + 1e-6
        away = np.abs((y / _LINES_MM + 0.5) % 1 - 0.5) * _LINES_MM / slope
        ink = np.maximum(ink, np.clip(1.05 - away, 0, 1))
    return ink


def _png(index: np.ndarray, palette: np.ndarray) -> bytes:
    """As small as it gets: a page holds hundreds."""
    return encode(index, palette, level=9)


# --- palettes -----------------------------------------------------------------------


def _greys() -> np.ndarray:
    """[64, 3] uint8, black to white."""
    return _ramp([(0, 0, 0), (255, 255, 255)], 64)


def _complementary() -> np.ndarray:
    """[256, 3]: 16 levels of the first image green, 16 of the second magenta."""
    first, second = np.divmod(np.arange(256), 16)
    return 17 * np.stack([second, first, second], axis=-1)


def _diverging() -> np.ndarray:
    """[65, 3]: blue below, black in the middle, orange above."""
    blue, orange = (20, 110, 200), (220, 105, 10)
    return _ramp([(140, 220, 255), blue, (8, 8, 10), orange, (255, 225, 140)], 65)


def _inked() -> np.ndarray:
    """[256, 3]: 16 greys under 16 strengths of ink."""
    return _mixed(np.tile((80, 230, 255), (16, 1)), np.linspace(0, 0.95, 16), 0.8)


def _volumes() -> np.ndarray:
    """[256, 3]: 16 greys under blue to red in 15 steps, and yellow for folds."""
    shrinks, grows = (120, 170, 230), (240, 130, 100)
    steps = [(40, 90, 255), shrinks, (190, 190, 190), grows, (230, 20, 30)]
    colors = np.concatenate([_ramp(steps, 15), [(255, 235, 0)]])
    alpha = np.append(0.25 + 0.45 * np.abs(np.linspace(-1, 1, 15)), 1.0)
    return _mixed(colors, alpha, 1.0)


def _ramp(stops: list[tuple[int, int, int]], count: int) -> np.ndarray:
    """[count, 3] uint8 colours, linear between stops."""
    places, at = np.linspace(0, 1, len(stops)), np.linspace(0, 1, count)
    columns = [np.interp(at, places, channel) for channel in zip(*stops, strict=True)]
    return np.rint(np.stack(columns, axis=-1)).astype(np.uint8)


def _mixed(over: np.ndarray, alpha: np.ndarray, bright: float) -> np.ndarray:
    """[256, 3]: 16 greys up to `bright`, each under 16 colours."""
    greys = np.repeat(np.linspace(0, 255 * bright, 16), 16)[:, None]
    colors, alpha = np.tile(over, (16, 1)), np.tile(alpha, 16)[:, None]
    return np.rint(greys * (1 - alpha) + colors * alpha).astype(np.uint8)
