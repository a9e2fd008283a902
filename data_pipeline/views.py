"""Two overlapping views of one volume: what the anatomical embedding learns from.

Each view is a patch with a scale, a place and, if asked for, a rotation of its own; its
voxel -> mm matrix says which voxels of the two show the same point (SAM, Yan et al.,
IEEE TMI 2022).
"""

import collections
import functools
from typing import Any, NamedTuple

import grain
import numpy as np
from scipy import ndimage

from data_pipeline import loader
from unireg_jax.errors import NOTHING, UserError
from unireg_jax.imaging import preprocess
from unireg_jax.imaging.nifti import Volume
from unireg_jax.tasks import OUTSIDE_HU, ViewBatch

_AIR_HU = -1024


class ViewSpec(NamedTuple):
    """How views are drawn.

    Attributes:
        shape: (X, Y, Z) voxels of a view.
        spacing_mm: voxel edge of a view of scale 1, mm.
        scales: least and greatest scale, drawn per view.
        apart: share of pairs whose views are placed without regard to each other.
        rotate_deg: greatest rotation about each axis, degrees.
        gain: greatest relative change of contrast, about 0 HU.
        shift_hu: greatest change of brightness, HU.
        noise_hu: greatest standard deviation of noise, HU.
    """

    shape: tuple[int, int, int] = (96, 96, 32)
    spacing_mm: float = 2.0
    scales: tuple[float, float] = (0.8, 1.2)
    apart: float = 0.2
    rotate_deg: float = 0.0
    gain: float = 0.0
    shift_hu: float = 0.0
    noise_hu: float = 0.0


def make_view_iterator(
    dataset: loader.Dataset,
    split: str,
    *,
    batch_size: int,
    seed: int,
    spec: ViewSpec,
    weights: dict[str, float] | None = None,
    num_threads: int = 2,
) -> loader.PairIterator:
    """Makes the endless stream of view pairs.

    Which volume comes when, and its views, are a function of (seed, weights, step).

    Args:
        dataset: prepared volumes.
        split: "train", "val" or "test".
        batch_size: volumes per batch.
        seed: of volumes and views.
        spec: how views are drawn.
        weights: task -> share of the volumes; None: as many as it has.
        num_threads: readers; no effect on the order.

    Returns:
        Iterator of ViewBatch (NumPy), with get_state and set_state.

    Raises:
        UserError: `schema`, exit code 3, when the split holds no such volume.
    """
    scans = [
        _Scan(position, entry["task"])
        for position, entry in enumerate(dataset.index["volumes"])
        if entry["split"] == split
    ]
    counts = collections.Counter(scan.task for scan in scans)
    shares = dict(counts)
    if weights is not None:
        shares = {
            t: max(1, round(1000 * w))
            for t, w in weights.items()
            if w > 0 and t in counts
        }
    if not shares:
        raise UserError(
            "schema",
            f"split {split}: volumes of {', '.join(weights or ['any task'])} expected, "
            "none found; check the split column of the manifest",
            NOTHING,
        )
    bodies = _Bodies(dataset)
    ahead = 8 if num_threads else 0
    batches = (
        grain.MapDataset.source(loader.PairOrder(scans, shares, seed))
        .seed(seed)
        .random_map(
            lambda place, rng: draw(
                *bodies.volume(scans[place].position),
                spec=spec,
                volume_mm=dataset.index["spec"]["spacing_mm"],
                position=scans[place].position,
                rng=rng,
            )
        )
        .batch(batch_size, drop_remainder=True, batch_fn=loader.stack)
    )
    options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=ahead)
    settings: dict[str, Any] = {
        "data": dataset.digest,
        "split": split,
        "seed": seed,
        "weights": shares,
        "global_batch_size": batch_size,
    }
    return loader.PairIterator(iter(batches.to_iter_dataset(options)), settings)


def draw(
    hu: np.ndarray,
    body: np.ndarray,
    *,
    spec: ViewSpec,
    volume_mm: tuple[float, float, float],
    position: int,
    rng: np.random.Generator,
) -> ViewBatch:
    """Draws two views of a volume.

    Args:
        hu: [X, Y, Z] int16, HU; OUTSIDE_HU beyond the scan.
        body: [X, Y, Z] bool.
        spec: how.
        volume_mm: voxel edges of hu, mm.
        position: of the volume in its index.
        rng: source of all choices.

    Returns:
        ViewBatch without the batch axis.
    """
    volume_mm = np.asarray(volume_mm, float)
    points = np.argwhere(body if body.any() else hu != OUTSIDE_HU)
    together = rng.random() >= spec.apart
    seed_mm = points[rng.integers(len(points))] * volume_mm
    parts = []
    for _ in range(2):
        if not together:
            seed_mm = points[rng.integers(len(points))] * volume_mm
        vox2mm = _place(seed_mm, hu.shape * volume_mm, spec, rng)
        parts.append((*_resample(hu, body, volume_mm, vox2mm, spec, rng), vox2mm))
    views, bodies, matrices = (np.stack(part) for part in zip(*parts, strict=True))
    return ViewBatch(
        hu=views[..., None],
        body=bodies,
        vox2mm=matrices.astype(np.float32),
        volume=np.int32(position),
    )


class _Scan(NamedTuple):
    position: int
    task: str


class _Bodies:
    """Volumes with their body masks, made once each: a bit per voxel is kept."""

    def __init__(self, dataset: loader.Dataset):
        self._dataset = dataset
        self._masks: dict[int, np.ndarray] = {}

    def volume(self, position: int) -> tuple[np.ndarray, np.ndarray]:
        hu, *_ = self._dataset.volume(position)
        # Two readers may make the same mask, which costs time and changes nothing.
        if position not in self._masks:
            place = np.diag([*self._dataset.index["spec"]["spacing_mm"], 1.0])
            volume = Volume(np.maximum(hu, _AIR_HU), place)
            mask = preprocess.body_mask(volume) & (hu != OUTSIDE_HU)
            self._masks[position] = np.packbits(mask)
        bits = np.unpackbits(self._masks[position], count=hu.size)
        return hu, bits.reshape(hu.shape).astype(bool)


def _place(seed_mm, extent_mm, spec, rng) -> np.ndarray:
    """Voxel -> mm of a view that holds the seed and, if it can, stays in the volume."""
    shape = np.array(spec.shape)
    spacing = spec.spacing_mm * rng.uniform(*spec.scales)
    size = shape * spacing
    # Of the view's own extent, how much lies before the seed; 0.1: not at the rim.
    before = rng.uniform(0.1, 0.9, 3) * size
    before = np.clip(before, seed_mm + size - extent_mm, seed_mm)
    before = np.clip(before, 0.05 * size, 0.95 * size)
    x, y, z = np.deg2rad(rng.uniform(-1, 1, 3) * spec.rotate_deg)
    linear = _rotation(x, 0) @ _rotation(y, 1) @ _rotation(z, 2) * spacing
    matrix = np.eye(4)
    matrix[:3, :3] = linear
    matrix[:3, 3] = seed_mm - linear @ (before / spacing)
    return matrix


def _rotation(angle: float, axis: int) -> np.ndarray:
    out = np.eye(3)
    i, j = [a for a in range(3) if a != axis]
    out[i, i] = out[j, j] = np.cos(angle)
    out[i, j], out[j, i] = -np.sin(angle), np.sin(angle)
    return out


def _resample(hu, body, volume_mm, vox2mm, spec, rng):
    """HU [X, Y, Z] int16 and body mask of one view."""
    linear = vox2mm[:3, :3] / volume_mm[:, None]
    offset = vox2mm[:3, 3] / volume_mm
    sample = functools.partial(
        ndimage.affine_transform, matrix=linear, offset=offset, output_shape=spec.shape
    )
    near = {"order": 0, "mode": "constant"}
    valid = sample((hu != OUTSIDE_HU).view(np.uint8), cval=0, **near) > 0
    mask = sample(body.view(np.uint8), cval=0, **near) > 0
    image = np.maximum(hu, _AIR_HU).astype(np.float32)
    image = sample(image, order=1, mode="nearest")
    gain = 1 + spec.gain * rng.uniform(-1, 1)
    image = gain * image + spec.shift_hu * rng.uniform(-1, 1)
    if spec.noise_hu:
        noise = rng.standard_normal(spec.shape, np.float32)
        image += spec.noise_hu * rng.random() * noise
    image = np.clip(np.rint(image), _AIR_HU, 3071)
    return np.where(valid, image, OUTSIDE_HU).astype(np.int16), mask & valid
