"""Random maps of a training pair, drawn from grain's generator of the record.

Not in the paper, and off unless asked for. Per pair, in this order:

  flip      both volumes along x, with the names of left and right organs exchanged
  affine    the moving volume about the grid's centre: rotation, scale, shift
  elastic   the moving volume, by a smooth field that never folds
  cut       each volume for itself: a field of view that ends earlier along z
  contrast  each volume for itself: gain about 0 HU, shift, noise

Scans of one patient are moved alike, by one affine and one elastic map, and not cut:
that is another patient, with the motion between the scans that was really there.

What becomes of `align`, the matrix from fixed to moving voxels: a flip mirrors both of
its ends, and every point keeps its partner. Affine and elastic leave it: they play a
worse pre-alignment and another anatomy, which the network is to undo, or move both ends
alike; the labels move with the image, so that loss and DSC stay right. A cut leaves the
labels whole: the loss counts what both scans show, so that the rest of the body has to
tell where the organ lies that was cut away.

OUTSIDE_HU is no intensity: a voxel that would be interpolated from one, or from beyond
the grid, is itself outside. Types stay int16 and uint8.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy import ndimage, special

from data_pipeline import anatomy
from unireg_jax.errors import USAGE, UserError
from unireg_jax.tasks import OUTSIDE_HU, PairBatch, PairType

_AIR_HU, _MAX_HU = -1024, 32767
# Cubic B-splines do not fold below 1 / 2.48 of their spacing (Choi and Lee, 2000).
_NO_FOLD = 0.4
# Slices along x that are changed at a time, so that buffers stay in the cache.
_SLAB = 2


class AugmentSpec(NamedTuple):
    """How much a pair is changed; all 0: not at all.

    Attributes:
        flip: probability of mirroring both volumes along x.
        rotate_deg: greatest rotation of the moving volume about each axis, degrees.
        scale: greatest relative change of its size along each axis.
        shift_mm: greatest shift of it along each axis, mm.
        elastic_mm: bound of its elastic displacement along each axis, mm; at most 0.4
            of elastic_spacing_mm.
        elastic_spacing_mm: distance of the control points, mm.
        cut: greatest share of the scanned slices along z that is cut away at one end.
        gain: greatest relative change of contrast, about 0 HU.
        shift_hu: greatest change of brightness, HU.
        noise_hu: greatest standard deviation of noise, HU.
    """

    flip: float = 0.0
    rotate_deg: float = 0.0
    scale: float = 0.0
    shift_mm: float = 0.0
    elastic_mm: float = 0.0
    elastic_spacing_mm: float = 40.0
    cut: float = 0.0
    gain: float = 0.0
    shift_hu: float = 0.0
    noise_hu: float = 0.0

    @property
    def on(self) -> bool:
        """Whether anything is changed."""
        return any(self._replace(elastic_spacing_mm=0.0))


def find_fault(spec: AugmentSpec) -> tuple[str, str] | None:
    """Finds a number that cannot be.

    Args:
        spec: what the user asks for.

    Returns:
        Name of the field and what it must be, or None.
    """
    if not 0 <= spec.flip <= 1:
        return "flip", "0 to 1"
    if not 0 <= spec.scale <= 0.5:
        return "scale", "0 to 0.5"
    if not spec.elastic_spacing_mm > 0:
        return "elastic_spacing_mm", "more than 0"
    if not 0 <= spec.elastic_mm <= _NO_FOLD * spec.elastic_spacing_mm:
        return "elastic_mm", f"0 to {_NO_FOLD} of elastic_spacing_mm, or it would fold"
    if not 0 <= spec.cut < 1:
        return "cut", "0 to below 1"
    if not 0 <= spec.gain < 1:
        return "gain", "0 to below 1"
    for name in ("rotate_deg", "shift_mm", "shift_hu", "noise_hu"):
        if not 0 <= getattr(spec, name) < np.inf:
            return name, "0 or more"
    return None


def make_augment(
    spec: AugmentSpec,
    labels: Mapping[str, Sequence[str]],
    spacing_mm: Sequence[float],
) -> Callable[[PairBatch, str, np.random.Generator], PairBatch]:
    """Makes the function that changes a pair.

    Args:
        spec: how much.
        labels: task -> names, id i + 1 is the i-th; only of tasks that are drawn.
        spacing_mm: voxel edges of the grid, mm.

    Returns:
        augment(example, task, rng) -> example; see `Dataset.example`. What it gives is
        a function of the three; the arrays that it takes are not changed.

    Raises:
        UserError: `schema`, exit code 2: a number that cannot be, or flips of a task
            in which the left or right of an organ has no partner.
    """
    if fault := find_fault(spec):
        name, expected = fault
        raise UserError(
            "schema",
            f"augment.{name}: {expected} expected, got {getattr(spec, name)!r}",
            USAGE,
        )
    mirrors = {}
    if spec.flip:
        mirrors = {task: mirror_ids(task, names) for task, names in labels.items()}
    spacing = np.asarray(spacing_mm, np.float64)

    def augment(example: PairBatch, task: str, rng: np.random.Generator) -> PairBatch:
        if spec.flip and rng.random() < spec.flip:
            example = flip(example, mirrors[task])
        one_patient = int(example.pair_type) == PairType.INTRA
        if spec.rotate_deg or spec.scale or spec.shift_mm or spec.elastic_mm:
            shape = example.moving.shape[:3]
            affine = draw_affine(spec, shape, spacing, rng)
            disp = draw_elastic(spec, shape, spacing, rng)
            if one_patient:
                carried = carry(affine, disp, example.align, example.fixed.shape[:3])
                example = _move(example, "fixed", *carried)
            example = _move(example, "moving", affine, disp)
        if spec.cut and not one_patient:
            fixed = cut(example.fixed, spec, rng)
            example = example._replace(
                fixed=fixed, moving=cut(example.moving, spec, rng)
            )
        if spec.gain or spec.shift_hu or spec.noise_hu:
            fixed = change_contrast(example.fixed, spec, rng)
            moving = change_contrast(example.moving, spec, rng)
            example = example._replace(fixed=fixed, moving=moving)
        return example

    return augment


def _move(
    example: PairBatch, which: str, affine: np.ndarray, disp: np.ndarray | None
) -> PairBatch:
    """The pair with one volume and its labels resampled; see `deform`."""
    hu, ids, more = (
        getattr(example, name) for name in (which, f"{which}_labels", f"{which}_more")
    )
    hu, layers = deform(hu[..., 0], np.concatenate([ids[None], more]), affine, disp)
    return example._replace(
        **{which: hu[..., None], f"{which}_labels": layers[0]},
        **{f"{which}_more": layers[1:]},
    )


def carry(
    affine: np.ndarray,
    disp: np.ndarray | None,
    align: np.ndarray,
    shape: Sequence[int],
) -> tuple[np.ndarray, np.ndarray | None]:
    """Gives the map of the fixed volume that moves each point as its partner.

    T = affine + disp on the moving volume,  S = align^-1 T align on the fixed one

    Args:
        affine: [4, 4] float64, voxels of the changed moving volume -> of the volume.
        disp: [3, X, Y, Z] float32, voxels of the moving volume, or None.
        align: [4, 4], fixed voxel -> moving voxel.
        shape: (X, Y, Z) of the fixed volume.

    Returns:
        affine and disp of S, as `deform` takes them.
    """
    align = align.astype(np.float64)
    back = np.linalg.inv(align)
    if disp is not None:
        there = [
            ndimage.affine_transform(
                part, align, output_shape=tuple(shape), order=1, mode="nearest"
            )
            for part in disp
        ]
        disp = np.tensordot(back[:3, :3].astype(np.float32), np.stack(there), axes=1)
    return back @ affine @ align, disp


def mirror_ids(task: str, names: Sequence[str]) -> np.ndarray:
    """Makes the table that exchanges the ids of left and right organs.

    Args:
        task: for the message.
        names: the task's vocabulary, id i + 1 is the i-th; LeftParotid, "left kidney",
            kidney_left and Lens_L all say a side.

    Returns:
        [256] uint8: id -> id of the organ on the other side, or itself.

    Raises:
        UserError: `schema`, exit code 2: an organ of one side has no partner, or two.
    """
    sides: dict[tuple, list[int]] = {}
    for i, name in enumerate(names, start=1):
        sides.setdefault(anatomy.side(name), []).append(i)
    table = np.arange(256, dtype=np.uint8)
    for (which, rest), ids in sides.items():
        if which is None:
            continue
        other = sides.get(({"left": "right", "right": "left"}[which], rest), [])
        if len(ids) != 1 or len(other) != 1:
            raise UserError(
                "schema",
                f"augment.flip: {task}: one partner of {names[ids[0] - 1]!r} on the "
                f"other side expected, {len(other)} found; set augment.flip to 0, or "
                "the task's weight to 0",
                USAGE,
            )
        table[ids[0]] = other[0]
    return table


def flip(example: PairBatch, mirror: np.ndarray) -> PairBatch:
    """Mirrors both volumes of a pair along x.

    flipped[x] = volume[F x],  F x = (n - 1 - x_0, x_1, x_2),  align' = F align F

    Args:
        example: one pair, see `Dataset.example`.
        mirror: from `mirror_ids`.

    Returns:
        The mirrored pair; twice gives the pair itself.
    """
    matrix = np.diag([-1.0, 1.0, 1.0, 1.0])
    matrix[0, 3] = example.fixed.shape[0] - 1
    other = np.diag([-1.0, 1.0, 1.0, 1.0])
    other[0, 3] = example.moving.shape[0] - 1
    align = other @ example.align.astype(np.float64) @ matrix
    return example._replace(
        fixed=example.fixed[::-1],
        moving=example.moving[::-1],
        fixed_labels=mirror[example.fixed_labels[::-1]],
        moving_labels=mirror[example.moving_labels[::-1]],
        fixed_more=mirror[example.fixed_more[:, ::-1]],
        moving_more=mirror[example.moving_more[:, ::-1]],
        align=align.astype(np.float32),
    )


def draw_affine(
    spec: AugmentSpec,
    shape: Sequence[int],
    spacing_mm: np.ndarray,
    rng: np.random.Generator,
) -> np.ndarray:
    """Draws where the voxels of a changed volume are taken from.

    Args:
        spec: rotate_deg, scale and shift_mm count.
        shape: (X, Y, Z) of the volume.
        spacing_mm: [3] its voxel edges, mm.
        rng: source of all choices.

    Returns:
        [4, 4] float64, changed voxel -> voxel of the volume; angles and sizes are right
        in mm, the grid's centre only shifts.
    """
    linear = np.diag(1 + spec.scale * rng.uniform(-1, 1, 3))
    for axis, angle in enumerate(np.deg2rad(spec.rotate_deg * rng.uniform(-1, 1, 3))):
        i, j = [a for a in range(3) if a != axis]
        turn = np.eye(3)
        turn[i, i] = turn[j, j] = np.cos(angle)
        turn[i, j], turn[j, i] = -np.sin(angle), np.sin(angle)
        linear = turn @ linear
    center = (np.array(shape) - 1) / 2
    shift = spec.shift_mm * rng.uniform(-1, 1, 3) / spacing_mm
    matrix = np.eye(4)
    matrix[:3, :3] = linear * spacing_mm / spacing_mm[:, None]
    matrix[:3, 3] = center - matrix[:3, :3] @ center + shift
    return matrix


def draw_elastic(
    spec: AugmentSpec,
    shape: Sequence[int],
    spacing_mm: np.ndarray,
    rng: np.random.Generator,
) -> np.ndarray | None:
    """Draws a smooth displacement: cubic B-splines of uniform coefficients.

    Args:
        spec: elastic_mm and elastic_spacing_mm count.
        shape: (X, Y, Z) of the volume.
        spacing_mm: [3] its voxel edges, mm.
        rng: source of all choices.

    Returns:
        [3, X, Y, Z] float32, voxels, within elastic_mm and without folds; None when
        elastic_mm is 0.
    """
    if not spec.elastic_mm:
        return None
    weights = [
        _spline_weights(n, spec.elastic_spacing_mm / s)
        for n, s in zip(shape, spacing_mm, strict=True)
    ]
    size = (3, *(w.shape[1] for w in weights))
    bound = spec.elastic_mm / spacing_mm[:, None, None, None]
    field = (bound * rng.uniform(-1, 1, size)).astype(np.float32)
    for weight in weights:  # each takes the first spatial axis and appends it anew
        field = np.tensordot(field, weight, axes=(1, 1))
    return field


def _spline_weights(count: int, distance: float) -> np.ndarray:
    """[count, controls] float32: cubic B-spline weights of points 1 voxel apart."""
    place = np.arange(count) / distance
    first = place.astype(int)
    t = place - first
    pieces = (
        (1 - t) ** 3 / 6,
        (3 * t**3 - 6 * t**2 + 4) / 6,
        (-3 * t**3 + 3 * t**2 + 3 * t + 1) / 6,
        t**3 / 6,
    )
    weights = np.zeros((count, first[-1] + 4), np.float32)
    for k, piece in enumerate(pieces):
        weights[np.arange(count), first + k] = piece
    return weights


def deform(
    hu: np.ndarray,
    labels: np.ndarray,
    affine: np.ndarray,
    disp: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Resamples a volume and its labels through an affine and a displacement.

    out[x] = volume[affine(x) + disp(x)]

    Args:
        hu: [X, Y, Z] int16, HU; OUTSIDE_HU beyond the scan.
        labels: [..., X, Y, Z] uint8, any number of maps.
        affine: [4, 4], changed voxel -> voxel of the volume.
        disp: [3, X, Y, Z] float32, voxels, or None.

    Returns:
        hu, linear, and labels, nearest, of the same shapes and types. Where a voxel
        with weight in hu is OUTSIDE_HU or lies beyond the grid: OUTSIDE_HU. Beyond the
        grid labels are 0.
    """
    out_hu, out_labels = np.empty_like(hu), np.empty_like(labels)
    outside = hu == OUTSIDE_HU
    image = _flat(np.where(outside, np.int16(_AIR_HU), hu))
    missing = _flat(outside)
    # Only where the nearest voxel touches the outside can any weight lie in it.
    near = _touches(outside).ravel()
    layers = np.ascontiguousarray(labels).reshape(-1, hu.size)
    moved = out_labels.reshape(-1, *hu.shape)
    for part in _slabs(hu.shape[0]):
        coords = _coordinates(affine, hu.shape, part)
        if disp is not None:
            coords += disp[:, part]
        beyond = _clamp(coords, hu.shape)
        # Rounding of float32 moves a coordinate by some 1e-5 voxels.
        valid = beyond < 1e-4
        cells = _cells(coords, hu.shape)
        nearest = _nearest(cells, hu.shape)
        doubtful = near.take(nearest)
        doubtful &= valid
        if doubtful.any():
            some = _Cells(cells.index[doubtful], cells.fraction[:, doubtful])
            # float32 gives a voxel with no weight some 1e-5 of it.
            valid[doubtful] = _sample(missing, some, hu.shape) < 1e-4
        values = _sample(image, cells, hu.shape)
        np.rint(values, out=values)
        values[~valid] = OUTSIDE_HU
        out_hu[part] = values
        there = beyond <= 0.5
        for layer, out in zip(layers, moved, strict=True):
            np.multiply(layer.take(nearest), there, out=out[part])
    return out_hu, out_labels


def _touches(mask: np.ndarray) -> np.ndarray:
    """[X, Y, Z] bool: whether any of the 27 voxels about one is in the mask."""
    for axis in range(3):
        before, after = [slice(None)] * 3, [slice(None)] * 3
        before[axis], after[axis] = slice(None, -1), slice(1, None)
        wide = mask.copy()
        wide[tuple(after)] |= mask[tuple(before)]
        wide[tuple(before)] |= mask[tuple(after)]
        mask = wide
    return mask


def _flat(volume: np.ndarray) -> np.ndarray:
    """The volume's voxels as float32, and as many more as a corner is ever ahead.

    A point on the upper edge has weight 0 in the corners beyond it: whatever is read
    for them does not count, but there has to be something.
    """
    flat = np.zeros(volume.size + sum(_steps(volume.shape)), np.float32)
    flat[: volume.size].reshape(volume.shape)[...] = volume
    return flat


def _clamp(coords: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """Moves coordinates [3, ...] into the grid; gives how far the furthest axis was."""
    furthest = np.zeros(coords.shape[1:], np.float32)
    for axis, n in zip(coords, shape, strict=True):
        inside = np.clip(axis, 0, n - 1)
        axis -= inside
        np.maximum(furthest, np.abs(axis, out=axis), out=furthest)
        axis[...] = inside
    return furthest


class _Cells(NamedTuple):
    """Where in the grid points lie.

    Attributes:
        index: [...] int32, the lower corner of their cell in the flat volume.
        fraction: [3, ...] float32, place in the cell, from 0 to below 1.
    """

    index: np.ndarray
    fraction: np.ndarray


def _cells(coords: np.ndarray, shape: Sequence[int]) -> _Cells:
    """The cells of coordinates that lie in the grid, which become the fractions."""
    index = np.zeros(coords.shape[1:], np.int32)
    for axis, step in zip(coords, _steps(shape), strict=True):
        corner = np.floor(axis)
        axis -= corner
        index += corner.astype(np.int32) * np.int32(step)
    return _Cells(index, coords)


def _nearest(cells: _Cells, shape: Sequence[int]) -> np.ndarray:
    """[...] int64, the nearest voxel in the flat volume."""
    index = cells.index.copy()
    for fraction, step in zip(cells.fraction, _steps(shape), strict=True):
        index += (fraction > 0.5) * np.int32(step)
    return index.astype(np.int64)


def _sample(flat: np.ndarray, cells: _Cells, shape: Sequence[int]) -> np.ndarray:
    """[...] float32: a volume made by `_flat`, linear between its voxels."""
    index, steps = cells.index.astype(np.int64), _steps(shape)

    def along(axis, offset):
        if axis == 3:
            return flat[offset:].take(index)
        low, high = (along(axis + 1, offset + step) for step in (0, steps[axis]))
        high -= low
        high *= cells.fraction[axis]
        low += high
        return low

    return along(0, 0)


def _steps(shape: Sequence[int]) -> tuple[int, int, int]:
    """Distance of neighbours in the flat volume."""
    return shape[1] * shape[2], shape[2], 1


def _coordinates(affine: np.ndarray, shape: Sequence[int], part: slice) -> np.ndarray:
    """[3, x, Y, Z] float32: affine of the voxels of some slices along x."""
    x, y, z = (np.arange(n, dtype=np.float32) for n in shape)
    coords = np.empty((3, part.stop - part.start, *shape[1:]), np.float32)
    for out, (a, b, c, d) in zip(coords, affine[:3].astype(np.float32), strict=True):
        plane = (a * x[part] + d)[:, None] + b * y
        np.add(plane[..., None], c * z, out=out)
    return coords


def _slabs(count: int) -> Iterator[slice]:
    for start in range(0, count, _SLAB):
        yield slice(start, min(start + _SLAB, count))


def cut(hu: np.ndarray, spec: AugmentSpec, rng: np.random.Generator) -> np.ndarray:
    """Ends a scan earlier along z, at its lower or its upper end.

    Args:
        hu: [X, Y, Z, ...] int16, HU; OUTSIDE_HU beyond the scan.
        spec: cut counts.
        rng: source of all choices.

    Returns:
        The same with OUTSIDE_HU in the slices that are cut away: up to spec.cut of
        those that hold any of the scan.
    """
    seen = np.flatnonzero((hu != OUTSIDE_HU).any(axis=(0, 1, *range(3, hu.ndim))))
    count = int(len(seen) * rng.uniform(0, spec.cut))
    upper = rng.random() < 0.5
    away = seen[len(seen) - count :] if upper else seen[:count]
    out = hu.copy()
    out[:, :, away] = OUTSIDE_HU
    return out


def change_contrast(
    hu: np.ndarray, spec: AugmentSpec, rng: np.random.Generator
) -> np.ndarray:
    """Changes gain, brightness and noise of a volume.

    Args:
        hu: [X, ...] int16, HU; OUTSIDE_HU beyond the scan.
        spec: gain, shift_hu and noise_hu count.
        rng: source of all choices.

    Returns:
        [X, ...] int16, HU from -1024; OUTSIDE_HU where hu has it.
    """
    gain = np.float32(1 + spec.gain * rng.uniform(-1, 1))
    shift = np.float32(spec.shift_hu * rng.uniform(-1, 1))
    noise = np.float32(spec.noise_hu * rng.random())
    if spec.noise_hu:
        # One of 65536 quantiles, up to 4.3 standard deviations: a fifth of the time of
        # standard_normal, and HU are whole numbers anyway.
        quantiles = special.ndtri((np.arange(2**16) + 0.5) / 2**16).astype(np.float32)
        quantiles *= noise
    out = np.empty_like(hu)
    for part in _slabs(len(hu)):
        image = hu[part] * gain
        image += shift
        if spec.noise_hu:
            bits = np.frombuffer(rng.bytes(2 * image.size), "<u2")
            image += quantiles.take(bits).reshape(image.shape)
        np.clip(np.rint(image, out=image), _AIR_HU, _MAX_HU, out=image)
        image[hu[part] == OUTSIDE_HU] = OUTSIDE_HU
        out[part] = image
    return out
