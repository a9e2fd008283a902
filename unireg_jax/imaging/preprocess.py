"""Network grid, body mask, resampling: the same code for training and for use.

Method: the network sees a fixed number of voxels of fixed size, axis-aligned in the
world and centred on the body, so that scans of any orientation, spacing and field of
view meet in one frame.
"""

import dataclasses
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
from scipy import ndimage, sparse

from unireg_jax.imaging import orientation
from unireg_jax.imaging.grids import Grid
from unireg_jax.imaging.nifti import Volume
from unireg_jax.tasks import OUTSIDE_HU

_HU_MAX = 3071  # upper end of 12-bit CT: metal would bleed into its surroundings
# Below are no tissue and no noise, but what scanners and tools fill a volume with where
# they saw nothing: around a round field of view, beside a tilted one.
_PADDING_HU = -1500
_LEAST_PADDING = 0.1  # of a voxel of the grid
_ENOUGH = 1000  # voxels, to tell what an image is
_FEW_LEVELS = 32  # a CT has hundreds
_MOST_CLIPPED = 0.03  # of the voxels: more than any metal


@dataclasses.dataclass(frozen=True)
class PreprocessSpec:
    """What a network was trained on; stored beside its weights.

    Attributes:
        shape: (X, Y, Z) voxels of the network grid.
        spacing_mm: voxel edge lengths along these axes, mm.
        hu_low: HU that becomes -1.
        hu_high: HU that becomes 1.
        air_hu: HU of air; values below are raised to it, see `prepare_image`.
        codes: direction in which the axes increase.
        version: of this description.
    """

    shape: tuple[int, int, int] = (192, 192, 160)
    spacing_mm: tuple[float, float, float] = (2.0, 2.0, 2.0)
    hu_low: float = -800.0
    hu_high: float = 400.0
    air_hu: int = -1000
    codes: str = "LPS"
    version: int = 1

    def __post_init__(self):
        # Lists, as JSON gives them, become tuples: specs compare and hash by value.
        object.__setattr__(self, "shape", tuple(int(n) for n in self.shape))
        spacing = tuple(float(s) for s in self.spacing_mm)
        object.__setattr__(self, "spacing_mm", spacing)
        if len(self.shape) != 3 or min(self.shape) < 1:
            raise ValueError(
                f"shape must be 3 positive voxel counts, got {self.shape}; "
                "use (192, 192, 160)"
            )
        if len(spacing) != 3 or not all(0 < s < np.inf for s in spacing):
            raise ValueError(
                f"spacing_mm must be 3 positive mm, got {spacing}; use (2.0, 2.0, 2.0)"
            )
        if not self.hu_low < self.hu_high:
            raise ValueError(
                f"hu_low must be below hu_high, got {self.hu_low} and {self.hu_high}; "
                "swap them"
            )
        orientation.check_codes(self.codes)

    def to_json(self) -> dict[str, Any]:
        """Gives the spec as a dict of numbers, strings and lists."""
        plain = dataclasses.asdict(self)
        return {k: list(v) if isinstance(v, tuple) else v for k, v in plain.items()}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "PreprocessSpec":
        """Builds a spec from `to_json`'s dict.

        Args:
            values: fields by name; absent ones keep their default.

        Returns:
            PreprocessSpec.

        Raises:
            ValueError: unknown field, newer version, or values out of range.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ValueError(
                f"preprocess must hold only {sorted(known)}, got {unknown}; "
                "update the package or mend the file"
            )
        if values.get("version", 1) > cls.version:
            raise ValueError(
                f"preprocess version must be at most {cls.version}, got "
                f"{values['version']}; update the package"
            )
        return cls(**values)


def body_mask(
    volume: Volume, *, threshold_hu: float = -500.0, coarse_mm: float = 4.0
) -> np.ndarray:
    """Marks the body: skin and everything inside, without table and small objects.

    Found on every n-th voxel, about `coarse_mm` apart: threshold, opening by 8 mm (cuts
    the table top and clothes off), the largest component and those of at least a
    quarter of it (two legs), growth back to the threshold, lungs behind walls that were
    too thin for the opening, filling of holes slice by slice along each axis (lungs
    that leave the scan at one end).

    Args:
        volume: CT in HU, data [X, Y, Z].
        threshold_hu: between air and fat, HU.
        coarse_mm: spacing of the voxels looked at, mm.

    Returns:
        [X, Y, Z] bool; all True when nothing is above the threshold.

    Raises:
        ValueError: data is not 3-D.
    """
    mask = _coarse_mask(volume, threshold_hu, coarse_mm)
    steps = _steps(volume, coarse_mm)
    for axis, (count, step) in enumerate(zip(volume.data.shape, steps, strict=True)):
        mask = mask.take(np.arange(count) // step, axis=axis)
    return mask


def body_center_mm(
    volume: Volume, *, threshold_hu: float = -500.0, coarse_mm: float = 4.0
) -> np.ndarray:
    """Gives the centre of the body mask's bounding box, sides along the world axes.

    Args:
        volume: CT in HU, data [X, Y, Z].
        threshold_hu: see `body_mask`.
        coarse_mm: see `body_mask`.

    Returns:
        [3] float64, LPS mm.

    Raises:
        ValueError: data is not 3-D.
    """
    mask = _coarse_mask(volume, threshold_hu, coarse_mm)
    steps = np.array(_steps(volume, coarse_mm))
    first = np.argwhere(mask) * steps
    last = np.minimum(first + steps - 1, np.array(volume.data.shape) - 1)
    # Over the box from first to last, each term of the affine is extreme at one end.
    turn = volume.vox2world[:3, :3]
    ends = [first[:, None, :] * turn[None], last[:, None, :] * turn[None]]
    low = np.minimum(*ends).sum(axis=2).min(axis=0)
    high = np.maximum(*ends).sum(axis=2).max(axis=0)
    return (low + high) / 2 + volume.vox2world[:3, 3]


def network_grid(volume: Volume, spec: PreprocessSpec) -> Grid:
    """Lays the network grid over a scan, centred on the body's bounding box.

    Args:
        volume: CT in HU, data [X, Y, Z].
        spec: shape, spacing and axis codes of the grid.

    Returns:
        Grid, axis-aligned with the world.

    Raises:
        ValueError: data is not 3-D.
    """
    vox2world = np.eye(4)
    vox2world[:3, :3] = orientation.direction(spec.codes) @ np.diag(spec.spacing_mm)
    middle = (np.array(spec.shape) - 1) / 2
    vox2world[:3, 3] = body_center_mm(volume) - vox2world[:3, :3] @ middle
    return Grid(spec.shape, vox2world)


def resample(
    volume: Volume,
    grid: Grid,
    *,
    fill: float,
    matrix: np.ndarray | None = None,
    order: int = 1,
) -> np.ndarray:
    """Samples a volume at the points of a grid (pull-back).

    out[x] = volume(world2vox @ matrix @ grid.vox2world @ x)

    A Gaussian removes what the grid cannot hold where it is coarser than the volume by
    more than 1.2: sigma = sqrt(r^2 - 1) / 2.355 voxels for the ratio r, so that the
    widths (FWHM) of the old and new voxel match (Cardoso et al., MICCAI 2015).

    Args:
        volume: data [X, Y, Z].
        grid: where to sample.
        fill: value at points beyond the outer faces of the volume's voxels.
        matrix: [4, 4] float, grid's world -> volume's world, LPS mm; None is identity.
        order: 1 trilinear, 0 nearest (labels).

    Returns:
        [grid.shape]; float32 for order 1, the volume's dtype for order 0.

    Raises:
        ValueError: order is neither 0 nor 1, matrix is not an invertible 4 x 4.
    """
    if order not in (0, 1):
        raise ValueError(f"order must be 0 or 1, got {order}; 0 is for labels")
    to_voxel = _sampling(volume, grid, matrix)
    inside = _inside(to_voxel, grid.shape, volume.data.shape)
    dtype = np.dtype(np.float32) if order else volume.data.dtype
    if not inside.any():
        return np.full(grid.shape, fill, dtype)
    data, shift = _crop(volume.data, to_voxel, grid.shape)
    to_voxel = shift @ to_voxel
    turn = to_voxel[:3, :3]
    straight = np.array_equal(turn, np.diag(np.diag(turn)))
    if order and straight:
        out = _resample_straight(data, to_voxel, grid.shape)
    else:
        if order:
            data = data.astype(np.float32)
            for axis, ratio in enumerate(np.linalg.norm(turn, axis=1)):
                data = _smooth(data, ratio, axis)
        with warnings.catch_warnings():
            # SciPy before 1.16 warns of what it changed in 2016.
            warnings.filterwarnings("ignore", "The behavior of affine_transform")
            # A diagonal turn, as a vector, is several times faster.
            out = ndimage.affine_transform(
                data,
                np.diag(turn) if straight and (np.diag(turn) > 0).all() else turn,
                to_voxel[:3, 3],
                grid.shape,
                output=dtype,
                order=order,
                mode="nearest",
            )
    out[~inside] = fill
    return out


def prepare_image(
    volume: Volume,
    grid: Grid,
    spec: PreprocessSpec,
    *,
    matrix: np.ndarray | None = None,
) -> np.ndarray:
    """Brings a CT onto the network grid.

    Args:
        volume: CT in HU, data [X, Y, Z].
        grid: from `network_grid`.
        spec: air_hu is the lowest value kept.
        matrix: [4, 4] float, grid's world -> volume's world, LPS mm; None is identity.

    Returns:
        [grid.shape] int16 HU in air_hu ... 3071; OUTSIDE_HU beyond the scan, and where
        it is padded with values below -1500, unless all of it is.

    Raises:
        ValueError: see `resample`.
    """
    clipped = volume._replace(data=np.clip(volume.data, spec.air_hu, _HU_MAX))
    hu = resample(clipped, grid, fill=OUTSIDE_HU, matrix=matrix)
    del clipped  # of a large scan as much memory again
    padding = volume.data < _PADDING_HU
    if padding.any() and not padding.all():
        padding = volume._replace(data=padding)
        padded = resample(padding, grid, fill=0.0, matrix=matrix) > _LEAST_PADDING
        hu[padded] = OUTSIDE_HU
    return np.rint(hu, out=hu).astype(np.int16)


def contrast_fault(hu: np.ndarray) -> str | None:
    """Says where clipping and rounding left little of an image that is none in HU.

    Args:
        hu: [X, Y, Z] int16, from `prepare_image`.

    Returns:
        One line, or None.
    """
    inside = hu[hu != OUTSIDE_HU]
    if inside.size < _ENOUGH:
        return None
    levels = np.count_nonzero(np.bincount(inside.astype(np.int32) - OUTSIDE_HU))
    if levels == 1:  # of which no scale makes more, such as air beside a body
        return f"{_FEW_LEVELS} grey levels or more expected, got {inside[0]} HU alone"
    if levels < _FEW_LEVELS:
        return (
            f"{_FEW_LEVELS} grey levels or more expected, got {levels} once rounded to "
            "whole numbers; scale the image, such as to 0 to 1000"
        )
    high = float((inside == _HU_MAX).mean())
    if high > _MOST_CLIPPED:
        return (
            f"values below {_HU_MAX} expected, {100 * high:.0f} % reach it or were "
            "clipped to it; scale the image, such as to 0 to 1000"
        )
    return None


def prepare_labels(
    volume: Volume, grid: Grid, *, matrix: np.ndarray | None = None
) -> np.ndarray:
    """Brings a label map onto the network grid, nearest neighbour.

    Args:
        volume: data [X, Y, Z] uint8 or uint16, as `read_labels` gives.
        grid: from `network_grid` of the image.
        matrix: [4, 4] float, grid's world -> volume's world, LPS mm; None is identity.

    Returns:
        [grid.shape] of the same dtype; 0 beyond the scan.

    Raises:
        ValueError: data is not uint8 or uint16; see `resample`.
    """
    if volume.data.dtype not in (np.uint8, np.uint16):
        raise ValueError(
            f"labels must be uint8 or uint16, got {volume.data.dtype}; use read_labels"
        )
    return resample(volume, grid, fill=0, matrix=matrix, order=0)


def _steps(volume: Volume, coarse_mm: float) -> list[int]:
    """Every how many voxels along each axis the body is looked for."""
    if volume.data.ndim != 3:
        raise ValueError(
            f"volume.data must be (X, Y, Z), got {volume.data.shape}; drop other axes"
        )
    spacing = orientation.spacing_mm(volume.vox2world)
    return [
        min(n, max(1, round(coarse_mm / s)))
        for n, s in zip(volume.data.shape, spacing, strict=True)
    ]


def _coarse_mask(volume: Volume, threshold_hu: float, coarse_mm: float) -> np.ndarray:
    """Body mask on the middle voxel of every run of n, see `body_mask`."""
    steps = _steps(volume, coarse_mm)
    index = [
        np.minimum(np.arange(0, n, step) + step // 2, n - 1)
        for n, step in zip(volume.data.shape, steps, strict=True)
    ]
    spacing = np.array(orientation.spacing_mm(volume.vox2world)) * steps
    solid = volume.data[np.ix_(*index)] > threshold_hu
    core = _erode(solid, 8.0, spacing)
    core = _large_components(core if core.any() else solid)
    if not core.any():
        return np.ones(solid.shape, bool)
    body = _dilate(core, 12.0, spacing) & solid  # opened, and 4 mm towards the skin
    codes = orientation.axis_codes(volume.vox2world)
    axial = max(codes.find("S"), codes.find("I"))
    lungs = _enclosed_by(body, _fill_slices(solid, axial) & ~solid)
    if lungs.any():
        body |= lungs | (_dilate(lungs, 12.0, spacing) & solid)
    for _ in range(2):
        for axis in range(3):
            body = _fill_slices(body, axis)
    return body


def _enclosed_by(body: np.ndarray, holes: np.ndarray) -> np.ndarray:
    """Holes with half or more of their walls in `body`: lungs, not a hollow table."""
    names, count = ndimage.label(holes)
    walls, mine = np.zeros((2, count + 1), np.int64)
    for axis in range(3):
        for step in (-1, 1):
            here = [slice(None)] * 3
            there = [slice(None)] * 3
            here[axis] = slice(1, None) if step < 0 else slice(None, -1)
            there[axis] = slice(None, -1) if step < 0 else slice(1, None)
            edge = ~holes[tuple(there)]
            walls += np.bincount(names[tuple(here)][edge], minlength=count + 1)
            edge &= body[tuple(there)]
            mine += np.bincount(names[tuple(here)][edge], minlength=count + 1)
    keep = mine * 2 >= np.maximum(walls, 1)
    keep[0] = False
    return keep[names]


def _erode(mask: np.ndarray, radius: float, spacing: tuple) -> np.ndarray:
    """Voxels whose ball of `radius` mm is all True; beyond the volume counts True."""
    if mask.all():
        return mask
    return ndimage.distance_transform_edt(mask, sampling=spacing) > radius


def _dilate(mask: np.ndarray, radius: float, spacing: tuple) -> np.ndarray:
    """Voxels within `radius` mm of a True one."""
    return ~_erode(~mask, radius, spacing)


def _large_components(mask: np.ndarray) -> np.ndarray:
    """The largest component and those of at least a quarter of its size."""
    names, _ = ndimage.label(mask)
    sizes = np.bincount(names.ravel())
    sizes[0] = 0
    return (sizes >= max(1, sizes.max() / 4))[names]


def _fill_slices(mask: np.ndarray, axis: int) -> np.ndarray:
    """Fills the holes of every slice across `axis`."""
    cross = np.expand_dims(ndimage.generate_binary_structure(2, 1), axis)
    return ndimage.binary_fill_holes(mask, cross)


def _sampling(volume: Volume, grid: Grid, matrix: np.ndarray | None) -> np.ndarray:
    """Grid voxel -> volume voxel, [4, 4]."""
    matrix = np.eye(4) if matrix is None else np.asarray(matrix, np.float64)
    if matrix.shape != (4, 4) or not np.isfinite(matrix).all():
        raise ValueError(
            f"matrix must be a finite (4, 4), got {matrix.shape}; pass world -> world"
        )
    to_voxel = np.linalg.inv(volume.vox2world) @ matrix @ grid.vox2world
    # Rounding of the inverse must not make a straight grid look oblique.
    to_voxel[np.abs(to_voxel) < 1e-12] = 0.0
    return to_voxel


def _smooth(data: np.ndarray, ratio: float, axis: int) -> np.ndarray:
    """Gaussian along one axis before sampling every `ratio` voxels."""
    if ratio <= 1.2:
        return data
    sigma = float(np.sqrt(ratio**2 - 1) / 2.355)
    return ndimage.gaussian_filter1d(
        data, sigma, axis=axis, mode="nearest", truncate=3.0
    )


def _resample_straight(
    data: np.ndarray, to_voxel: np.ndarray, shape: tuple[int, int, int]
) -> np.ndarray:
    """Smoothing and linear sampling along parallel axes: one matrix per axis.

    The same numbers as filter and interpolation one after the other, to rounding, and
    several times faster on a whole CT, because the first product already shrinks it.
    """
    weights = []
    for axis, (count, size) in enumerate(zip(shape, data.shape, strict=True)):
        coords = to_voxel[axis, axis] * np.arange(count) + to_voxel[axis, 3]
        coords = np.clip(coords, 0, size - 1)
        low = np.minimum(coords.astype(int), max(0, size - 2))
        high = np.minimum(low + 1, size - 1)
        filters = _smooth(np.eye(size), abs(to_voxel[axis, axis]), 0)
        part = (coords - low)[:, None]
        linear = (1 - part) * filters[low] + part * filters[high]
        weights.append(linear.astype(np.float32))
    # Sparse products: mostly zeros, and the same bits whatever the number of threads.
    first, second, third = (sparse.csr_array(w) for w in weights)
    out = first @ data.astype(np.float32).reshape(data.shape[0], -1)
    out = out.reshape(shape[0], *data.shape[1:])
    out = np.stack([second @ plane for plane in out]).reshape(-1, data.shape[2])
    return np.ascontiguousarray((third @ np.ascontiguousarray(out.T)).T).reshape(shape)


def _inside(to_voxel: np.ndarray, shape: tuple, source: tuple) -> np.ndarray:
    """Grid points within the outer faces of the source's voxels."""
    i, j, k = np.ogrid[: shape[0], : shape[1], : shape[2]]
    inside = np.ones(shape, bool)
    for row, count in zip(to_voxel[:3], source, strict=True):
        coords = row[0] * i + row[1] * j + row[2] * k + row[3]
        # 1e-6 voxel: faces that coincide count as inside.
        inside &= (coords >= -0.5 - 1e-6) & (coords <= count - 0.5 + 1e-6)
    return inside


def _crop(
    data: np.ndarray, to_voxel: np.ndarray, shape: tuple
) -> tuple[np.ndarray, np.ndarray]:
    """The part of the source that the grid and its smoothing reach, and the shift."""
    corners = np.array(np.meshgrid(*((0, n - 1) for n in shape))).reshape(3, -1)
    reached = to_voxel[:3, :3] @ corners + to_voxel[:3, 3:]
    margin = 2 + np.ceil(1.5 * np.linalg.norm(to_voxel[:3, :3], axis=1))
    limit = np.array(data.shape)
    low = np.clip(np.floor(reached.min(axis=1)) - margin, 0, limit - 1).astype(int)
    high = np.clip(np.ceil(reached.max(axis=1)) + margin + 1, low + 1, limit).astype(
        int
    )
    shift = np.eye(4)
    shift[:3, 3] = -low
    return data[tuple(slice(a, b) for a, b in zip(low, high, strict=True))], shift
