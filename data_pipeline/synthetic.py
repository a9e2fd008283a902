"""CT-like phantoms with a known deformation, for tests, smoke runs and the demo.

A subject is a function of position: HU and organ at any point in mm, drawn from a seed
(body size, organ place, size and shape, vessels, texture). A scan evaluates it on a
grid; a second scan of the same subject evaluates it at positions moved by a known
field: breathing in `pair` of liver and lung, a random one in `deformed_pair` of every
task. Nothing is interpolated from another volume, so the known field is exact and both
scans are equally sharp.

Frames: LPS mm about the grid's centre; x to the left, y to the back, z to the head.
"""

import argparse
import sys
import zlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tqdm
from scipy import ndimage

from data_pipeline import store
from data_pipeline.datasets import manifest
from data_pipeline.prepare import grid_arguments
from unireg_jax.errors import UserError
from unireg_jax.imaging import nifti, orientation
from unireg_jax.imaging.preprocess import PreprocessSpec
from unireg_jax.tasks import TASKS, PairType

AIR_HU = -1000
HEADNECK_LABELS = (
    "Brainstem",
    "Esophagus",
    "Larynx",
    "LeftParotid",
    "Mandible",
    "RightParotid",
    "SpinalCord",
)
CHEST_LABELS = (
    "aorta",
    "esophagus",
    "heart",
    "liver",
    "lung_left",
    "lung_right",
    "spine",
    "trachea",
)
ABDOMEN_LABELS = (
    "aorta",
    "esophagus",
    "gallbladder",
    "inferior_vena_cava",
    "left_adrenal_gland",
    "left_kidney",
    "liver",
    "pancreas",
    "portal_and_splenic_vein",
    "right_adrenal_gland",
    "right_kidney",
    "spleen",
    "stomach",
)

# Blood and organ HU by contrast phase: textbook values of clinical CT.
PHASES = {
    "pre": dict(artery=42, portal=40, vein=40, liver=56, spleen=48, cortex=34),
    "art": dict(artery=290, portal=95, vein=75, liver=72, spleen=135, cortex=185),
    "pvp": dict(artery=150, portal=175, vein=145, liver=112, spleen=120, cortex=185),
}
PHASES["pre"] |= dict(medulla=32, pancreas=38, bowel=38, tumour=42, muscle=52)
PHASES["art"] |= dict(medulla=70, pancreas=108, bowel=80, tumour=130, muscle=56)
PHASES["pvp"] |= dict(medulla=165, pancreas=95, bowel=85, tumour=78, muscle=60)


class _Anatomy(NamedTuple):
    """What a task shows: painter, labels, variants (fixed first), z of the centre."""

    torso: bool
    labels: tuple[str, ...]
    variants: tuple[str, ...]
    center_z_mm: float


_ANATOMY = {
    "headneck": _Anatomy(False, HEADNECK_LABELS, ("scan",), 0.0),
    "chest": _Anatomy(True, CHEST_LABELS, ("scan",), 75.0),
    "abdomen": _Anatomy(True, ABDOMEN_LABELS, ("scan",), -95.0),
    "liver": _Anatomy(True, ABDOMEN_LABELS, ("pvp", "art"), -60.0),
    "lung": _Anatomy(True, CHEST_LABELS, ("exp", "insp"), 75.0),
}


class Phantom(NamedTuple):
    """One synthetic scan.

    Attributes:
        hu: [X, Y, Z] int16, HU.
        labels: [X, Y, Z] uint8; 0 background, i + 1 is label_names[i].
        label_names: the task's vocabulary, sorted.
        vox2world: [4, 4] float64, voxel -> LPS mm; axis-aligned, centred on 0.
    """

    hu: np.ndarray
    labels: np.ndarray
    label_names: tuple[str, ...]
    vox2world: np.ndarray


class PhantomPair(NamedTuple):
    """Two synthetic scans on one grid and what relates them.

    Attributes:
        fixed: Phantom.
        moving: Phantom.
        disp: [X, Y, Z, 3] float32, voxels of the fixed grid: moving(x + disp(x)) is the
            tissue of fixed(x), exactly. None where `pair` shows two subjects.
    """

    fixed: Phantom
    moving: Phantom
    disp: np.ndarray | None


def variants(task: str) -> tuple[str, ...]:
    """Names of a task's scans of one subject, the fixed one first."""
    return _anatomy(task).variants


def phantom(
    task: str,
    *,
    shape: Sequence[int] = (96, 96, 80),
    spacing_mm: float | Sequence[float] = 4.0,
    seed: int = 0,
    variant: str | None = None,
) -> Phantom:
    """Paints one scan of the subject that `seed` stands for.

    Args:
        task: a name of `unireg_jax.tasks.TASKS`.
        shape: (X, Y, Z) voxels.
        spacing_mm: voxel edge length, one or (x, y, z) mm. The body fills about
            380 x 260 x 320 mm; smaller grids show its middle.
        seed: the subject.
        variant: one of `variants(task)`; None is the fixed one. liver: "pvp", "art";
            lung: "exp", "insp"; else "scan".

    Returns:
        Phantom; the same bits for the same arguments.

    Raises:
        ValueError: unknown task or variant, bad shape or spacing.
    """
    anatomy = _anatomy(task)
    variant = anatomy.variants[0] if variant is None else variant
    if variant not in anatomy.variants:
        raise ValueError(
            f"variant must be one of {anatomy.variants} for {task}, got {variant!r}"
        )
    shape, spacing = _check_grid(shape, spacing_mm)
    noise = _rng(task, seed, variant)
    return _scan(task, _points(shape, spacing), spacing, seed, variant, noise)


def pair(
    task: str,
    *,
    shape: Sequence[int] = (96, 96, 80),
    spacing_mm: float | Sequence[float] = 4.0,
    seed: int = 0,
) -> PhantomPair:
    """Paints a pair of the task's kind: two phases of one subject, or two subjects.

    Args:
        task, shape, spacing_mm, seed: see `phantom`. Inter-patient: subjects 2 seed and
            2 seed + 1.

    Returns:
        PhantomPair, with the exact field for liver (pvp fixed, art moving; breathing of
        about 10 mm) and lung (exp fixed, insp moving; about 25 mm at the diaphragm).
        Two subjects have none: `deformed_pair` gives one for every task.

    Raises:
        ValueError: as `phantom`.
    """
    grid = dict(shape=shape, spacing_mm=spacing_mm)
    if TASKS[task].pair_type == PairType.INTER:
        first, second = (phantom(task, seed=2 * seed + i, **grid) for i in range(2))
        return PhantomPair(first, second, None)
    first, second = (
        phantom(task, seed=seed, variant=v, **grid) for v in variants(task)
    )
    return PhantomPair(first, second, known_disp(task, seed=seed, **grid))


def deformed_pair(
    task: str,
    *,
    shape: Sequence[int] = (96, 96, 80),
    spacing_mm: float | Sequence[float] = 4.0,
    seed: int = 0,
) -> PhantomPair:
    """Paints one subject twice, related by a smooth random field: any task, one phase.

    The moving scan is `phantom(task, seed=seed)`; the fixed one shows, with noise of
    its own, the tissue that a sum of sine waves points to, some 5 mm away.

    The field never folds, by construction: wave k adds a_k sin(w_k . x + p_k), whose
    Jacobian has norm |a_k| |w_k| at most, and these sum up to 0.5. All singular values
    of the map's Jacobian thus lie within [0.5, 1.5], so that x -> x + disp(x) is one to
    one and its determinant at least 0.125; central differences obey the same bound.

    Args:
        task, shape, spacing_mm, seed: see `phantom`; the seed also draws the field.

    Returns:
        PhantomPair; disp is exact and never None.

    Raises:
        ValueError: as `phantom`.
    """
    variant = variants(task)[0]
    shape, spacing = _check_grid(shape, spacing_mm)
    moved = _waves(task, seed)(*_points(shape, spacing))
    noise = _rng(task, seed, "deformed")
    fixed = _scan(task, _points(shape, spacing), spacing, seed, variant, noise, moved)
    moving = phantom(task, shape=shape, spacing_mm=spacing, seed=seed)
    return PhantomPair(fixed, moving, _in_voxels(moved, spacing))


def known_disp(
    task: str,
    *,
    shape: Sequence[int] = (96, 96, 80),
    spacing_mm: float | Sequence[float] = 4.0,
    seed: int = 0,
) -> np.ndarray:
    """The exact field between a subject's two scans.

    Args:
        task: "liver" or "lung".
        shape, spacing_mm, seed: see `phantom`.

    Returns:
        [X, Y, Z, 3] float32, voxels: moving(x + disp(x)) is the tissue of fixed(x).

    Raises:
        ValueError: the task has one scan per subject; bad shape or spacing.
    """
    if len(variants(task)) < 2:
        raise ValueError(
            f"task must be liver or lung, got {task}: it has no motion; "
            "deformed_pair makes a known field for every task"
        )
    shape, spacing = _check_grid(shape, spacing_mm)
    return _in_voxels(_motion(task, seed)(*_points(shape, spacing)), spacing)


def write_dataset(
    out: Path | str,
    *,
    shape: Sequence[int] = (96, 96, 80),
    spacing_mm: float | Sequence[float] = 4.0,
    subjects_per_task: int = 4,
    seed: int = 0,
    tasks: Sequence[str] = tuple(TASKS),
) -> Path:
    """Writes a prepared folder of phantoms, ready for `loader.make_iterator`.

    Also a command: `python -m data_pipeline.synthetic --out DIR`.

    Args:
        out: folder; made if absent.
        shape, spacing_mm: the network grid.
        subjects_per_task: of n, n // 4 (at least 2 if n >= 4) go to val, as many to
            test if n >= 6, the rest to train.
        seed: subjects are seeds 1000 seed, 1000 seed + 1, …
        tasks: names of `unireg_jax.tasks.TASKS`.

    Returns:
        out as a Path, holding index.json and volumes/.

    Raises:
        ValueError: as `phantom`.
        UserError: `storage`, exit code 6.
    """
    shape, spacing = _check_grid(shape, spacing_mm)
    volumes = []
    for task, number, split, variant in _progress(_roster(tasks, subjects_per_task)):
        subject_seed = 1000 * seed + number
        made = phantom(
            task, shape=shape, spacing_mm=spacing, seed=subject_seed, variant=variant
        )
        hu = np.maximum(made.hu, np.int16(AIR_HU))
        volume_id = f"{task}_{number:03d}_{variant}"
        volumes.append(
            {
                "id": volume_id,
                "task": task,
                "subject": f"{task}_{number:03d}",
                "split": split,
                "group": variant,
                **store.write_volume(out, volume_id, hu, made.labels),
                "vox2world": made.vox2world.tolist(),
                "source": {"phantom": task, "seed": subject_seed, "variant": variant},
            }
        )
    vocabulary = {task: {"labels": list(_anatomy(task).labels)} for task in tasks}
    store.write_index(
        out,
        {
            "version": store.INDEX_VERSION,
            "spec": PreprocessSpec(shape, spacing).to_json(),
            "tasks": vocabulary,
            "volumes": volumes,
        },
    )
    return Path(out)


def write_nifti(
    out: Path | str,
    *,
    shape: Sequence[int] = (96, 96, 80),
    spacing_mm: float | Sequence[float] = 4.0,
    subjects_per_task: int = 4,
    seed: int = 0,
    tasks: Sequence[str] = tuple(TASKS),
    codes: str = "LPS",
) -> Path:
    """Writes phantoms as NIfTI files with a manifest, as raw data would come.

    Args:
        out: folder; made if absent.
        shape, spacing_mm: the scanner's grid, along LPS axes.
        subjects_per_task, seed, tasks: see `write_dataset`.
        codes: storage order of the axes, such as "LPS" or "RAS"; the same patient.

    Returns:
        Path of manifest.csv, for `python -m data_pipeline.prepare --manifest`.

    Raises:
        ValueError: as `phantom`, or bad codes.
        UserError: `storage`, exit code 6.
    """
    shape, spacing = _check_grid(shape, spacing_mm)
    orientation.check_codes(codes)
    out = store.make_folders(out, "images", "labels")
    rows = [(*manifest.REQUIRED, "label", "label_map", "group")]
    for task, number, split, variant in _progress(_roster(tasks, subjects_per_task)):
        subject_seed = 1000 * seed + number
        made = phantom(
            task, shape=shape, spacing_mm=spacing, seed=subject_seed, variant=variant
        )
        vox2world = made.vox2world.copy()
        # A patient lies anywhere on the table, but at one place for all phases.
        place = _rng(task, subject_seed, "table").uniform(-60, 60, 3)
        vox2world[:3, 3] += np.round(place, 1)
        name = f"{task}_{number:03d}_{variant}"
        for folder, array in (("images", made.hu), ("labels", made.labels)):
            turned = orientation.reorient(array, vox2world, codes)
            nifti.write_volume(out / folder / f"{name}.nii.gz", *turned)
        files = (f"images/{name}.nii.gz", f"labels/{name}.nii.gz", f"{task}.json")
        values = dict(id=name, task=task, subject=f"{task}_{number:03d}", split=split)
        values |= dict(zip(("image", "label", "label_map"), files, strict=True))
        rows.append(tuple({**values, "group": variant}[column] for column in rows[0]))
    for task in tasks:
        names = _anatomy(task).labels
        table = {str(i): name for i, name in enumerate(names, 1)}
        store.write_json(out / f"{task}.json", table)
    text = "".join(",".join(row) + "\n" for row in rows)
    store.write_atomic(out / "manifest.csv", text.encode())
    return out / "manifest.csv"


def _roster(tasks: Sequence[str], count: int) -> list[tuple[str, int, str, str]]:
    """(task, subject number, split, variant) of every scan of a dataset."""
    val = max(2, count // 4) if count >= 4 else 0
    test = val if count >= 6 else 0
    train = count - val - test
    splits = ["train"] * train + ["val"] * val + ["test"] * test
    return [
        (task, number, split, variant)
        for task in tasks
        for number, split in enumerate(splits)
        for variant in variants(task)
    ]


def _progress(items: list) -> Iterable:
    """A bar where a terminal shows it."""
    quiet = not sys.stderr.isatty()
    return tqdm.tqdm(items, desc="phantoms", unit="scan", disable=quiet)


def _anatomy(task: str) -> _Anatomy:
    if task not in _ANATOMY:
        raise ValueError(f"task must be one of {tuple(_ANATOMY)}, got {task!r}")
    return _ANATOMY[task]


def _check_grid(
    shape: Sequence[int], spacing_mm: float | Sequence[float]
) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Three positive sizes and spacings, or ValueError."""
    spacing = (spacing_mm,) * 3 if np.isscalar(spacing_mm) else tuple(spacing_mm)
    if len(shape) != 3 or min(shape) < 2:
        raise ValueError(f"shape must be three sizes of at least 2, got {shape}")
    if len(spacing) != 3 or not min(spacing) > 0:
        raise ValueError(f"spacing_mm must be positive, one or three, got {spacing_mm}")
    return tuple(int(n) for n in shape), tuple(float(s) for s in spacing)


def _points(
    shape: tuple[int, ...], spacing: tuple[float, ...]
) -> tuple[np.ndarray, ...]:
    """x, y and z of every voxel, mm about the grid's centre; each [X, Y, Z] float32."""
    axes = [
        (np.arange(n, dtype=np.float32) - np.float32((n - 1) / 2)) * np.float32(s)
        for n, s in zip(shape, spacing, strict=True)
    ]
    return tuple(np.meshgrid(*axes, indexing="ij"))


def _in_voxels(moved: Sequence[np.ndarray], spacing: tuple[float, ...]) -> np.ndarray:
    """Three components in mm -> [X, Y, Z, 3] float32 in voxels."""
    parts = [m / np.float32(s) for m, s in zip(moved, spacing, strict=True)]
    return np.stack(parts, -1).astype(np.float32)


def _scan(
    task: str,
    points: tuple[np.ndarray, ...],
    spacing: tuple[float, ...],
    seed: int,
    variant: str,
    noise: np.random.Generator,
    moved: Sequence[np.ndarray] = (0, 0, 0),
) -> Phantom:
    """Paints at each of `points` the tissue found `moved` mm from it in the variant."""
    anatomy = _ANATOMY[task]
    x, y, z = (p + m for p, m in zip(points, moved, strict=True))
    if variant in ("pvp", "exp"):
        dx, dy, dz = _motion(task, seed)(x, y, z)
        x, y, z = x + dx, y + dy, z + dz
    subject = _rng(task, seed, "subject")
    canvas = _Canvas(*_individual(subject, x, y, z + anatomy.center_z_mm), spacing)
    canvas.noise = _Noise(subject)
    if anatomy.torso:
        _paint_torso(canvas, subject, variant)
    else:
        _paint_headneck(canvas, subject)
    hu = canvas.hu + _scanner_noise(noise, x.shape)
    hu = np.clip(np.rint(hu), -1024, 3071).astype(np.int16)
    lookup = np.zeros(len(canvas.names) + 1, np.uint8)
    for name, code in canvas.names.items():
        if name in anatomy.labels:
            lookup[code] = anatomy.labels.index(name) + 1
    vox2world = np.diag([*spacing, 1.0])
    vox2world[:3, 3] = [p[0, 0, 0] for p in points]
    return Phantom(hu, lookup[canvas.labels], anatomy.labels, vox2world)


def _rng(task: str, seed: int, purpose: str) -> np.random.Generator:
    """Independent generators per subject and purpose; liver and abdomen differ."""
    return np.random.default_rng([zlib.crc32(f"{task}/{purpose}".encode()), seed])


def _normal(rng: np.random.Generator, size: int | None = None) -> np.ndarray:
    """Normal numbers cut at 2, so that no subject is a monster."""
    return np.clip(rng.standard_normal(size), -2, 2)


class _Draw:
    """Draws of one subject: a point near another, radii about the usual ones."""

    def __init__(self, rng: np.random.Generator):
        self.rng = rng

    def place(self, *center: float, sd: float = 2.0) -> np.ndarray:
        return np.asarray(center) + sd * _normal(self.rng, 3)

    def size(self, *radii: float, rel: float = 0.08) -> np.ndarray:
        return np.asarray(radii) * (1 + rel * _normal(self.rng, len(radii)))


# --- geometry: signed distances in mm, negative inside ---

_Sdf = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]


class _Shape(NamedTuple):
    """A signed distance and a box that holds its inside, mm."""

    sdf: _Sdf
    low: np.ndarray
    high: np.ndarray
    thickness: float = np.inf  # mm; what is thinner than a voxel pales


def _ellipsoid(
    center: Sequence[float], radii: Sequence[float], yaw: float = 0.0
) -> _Shape:
    """Ellipsoid turned by `yaw` radians about z."""
    center, radii = np.asarray(center, np.float32), np.asarray(radii, np.float32)
    cos, sin = np.float32(np.cos(yaw)), np.float32(np.sin(yaw))

    def sdf(x, y, z):
        x, y, z = x - center[0], y - center[1], z - center[2]
        u, v = (cos * x + sin * y) / radii[0], (cos * y - sin * x) / radii[1]
        w = z / radii[2]
        k0 = np.sqrt(u * u + v * v + w * w) + np.float32(1e-6)
        u, v, w = u / radii[0], v / radii[1], w / radii[2]
        k1 = np.sqrt(u * u + v * v + w * w) + np.float32(1e-6)
        return k0 * (k0 - 1) / k1

    reach = radii.copy()
    if yaw:
        reach[0] = np.hypot(radii[0] * cos, radii[1] * sin)
        reach[1] = np.hypot(radii[0] * sin, radii[1] * cos)
    return _Shape(sdf, center - reach, center + reach, 2 * float(radii.min()))


def _tube(
    points: Sequence[Sequence[float]],
    radii: float | Sequence[float],
    flat: Sequence[float] = (1, 1, 1),
) -> _Shape:
    """Chain of capsules; `flat` stretches its cross-section along each axis."""
    flat = np.asarray(flat, np.float32)
    points = np.asarray(points, np.float32)
    radii = np.broadcast_to(np.asarray(radii, np.float32), (len(points),))

    def sdf(x, y, z):
        best = None
        position = (x / flat[0], y / flat[1], z / flat[2])
        for i in range(len(points) - 1):
            a, b = points[i] / flat, points[i + 1] / flat
            ab = b - a
            length = np.float32(max(ab @ ab, 1e-6))
            pa = [p - c for p, c in zip(position, a, strict=True)]
            t = (pa[0] * ab[0] + pa[1] * ab[1] + pa[2] * ab[2]) / length
            t = np.clip(t, 0, 1)
            rest = [p - t * c for p, c in zip(pa, ab, strict=True)]
            d = np.sqrt(rest[0] ** 2 + rest[1] ** 2 + rest[2] ** 2)
            d -= radii[i] + t * (radii[i + 1] - radii[i])
            best = d if best is None else np.minimum(best, d)
        return best

    reach = radii[:, None] * flat
    low, high = (points - reach).min(0), (points + reach).max(0)
    return _Shape(sdf, low, high, 2 * float(radii.max()))


def _box(low: Sequence[float], high: Sequence[float]) -> _Shape:
    """Everything between two corners, to be cut by a limit."""

    def sdf(x, y, z):
        return np.full(x.shape, -1e3, np.float32)

    return _Shape(sdf, np.asarray(low, np.float32), np.asarray(high, np.float32))


def _union(*shapes: _Shape, blend: float = 0.0) -> _Shape:
    """Union, rounded over `blend` mm."""

    def sdf(x, y, z):
        best = shapes[0].sdf(x, y, z)
        for shape in shapes[1:]:
            other = shape.sdf(x, y, z)
            best = _smooth_min(best, other, blend)
        return best

    low = np.min([s.low for s in shapes], 0) - blend / 4
    return _Shape(sdf, low, np.max([s.high for s in shapes], 0) + blend / 4)


def _within(shape: _Shape, *limits: _Sdf) -> _Shape:
    """The part of a shape that is also inside all the limits."""

    def sdf(x, y, z):
        best = shape.sdf(x, y, z)
        for limit in limits:
            best = np.maximum(best, limit(x, y, z))
        return best

    return _Shape(sdf, shape.low, shape.high)


def _smooth_min(a: np.ndarray, b: np.ndarray, blend: float) -> np.ndarray:
    if not blend:
        return np.minimum(a, b)
    h = np.maximum(blend - np.abs(a - b), 0) / np.float32(blend)
    return np.minimum(a, b) - h * h * np.float32(blend / 4)


def _radial(x: np.ndarray, y: np.ndarray, rx, ry, power: float = 2.0) -> np.ndarray:
    """Distance along the ray from the axis to a superellipse, mm."""
    u, v = np.abs(x / rx), np.abs(y / ry)
    if power == 2.0:
        k = np.sqrt(u * u + v * v)
    else:
        k = (u**power + v**power) ** np.float32(1 / power)
    k = np.maximum(k, np.float32(1e-3))
    return np.sqrt(x * x + y * y) * (1 - 1 / k) - np.float32(1e-3)


def _profile(z: np.ndarray, knots: Sequence[float], values: Sequence[float]):
    """Piecewise linear function of z, smoothed at the knots."""
    fine = np.linspace(knots[0], knots[-1], 256)
    smooth = ndimage.gaussian_filter1d(np.interp(fine, knots, values), 4)
    return np.interp(z, fine, smooth).astype(np.float32)


# --- canvas ---


class _Noise:
    """Band-limited periodic noise of unit variance, a function of position."""

    def __init__(self, rng: np.random.Generator, size: int = 48):
        white = rng.standard_normal((size,) * 3).astype(np.float32)
        lattice = ndimage.gaussian_filter(white, 1.5, mode="wrap")
        self._lattice = lattice / lattice.std()

    def __call__(self, x, y, z, scale_mm: float, shift: float = 0.0) -> np.ndarray:
        """Values with a correlation length of about `scale_mm`."""
        step = np.float32(3.0 / scale_mm)
        coords = np.stack([x * step + shift, y * step - shift, z * step + 2 * shift])
        # Wrapped by hand: modes that wrap at every neighbour are slower.
        return ndimage.map_coordinates(
            self._lattice, coords, order=1, mode="grid-wrap", output=np.float32
        )


class _Canvas:
    """HU and organ codes on a warped grid; paint covers what lies below."""

    noise: _Noise
    skin: np.ndarray  # [X, Y, Z] mm, negative in the body: nothing is painted outside

    def __init__(self, x, y, z, spacing):
        self.x, self.y, self.z = x, y, z
        self.hu = np.full(x.shape, AIR_HU, np.float32)
        self.labels = np.zeros(x.shape, np.uint8)
        self.names: dict[str, int] = {}
        # An edge takes one voxel, as partial volume does.
        self.edge = np.float32(np.mean(spacing))
        self._range = [
            (c.min(rest), c.max(rest))
            for c, rest in ((x, (1, 2)), (y, (0, 2)), (z, (0, 1)))
        ]

    def box(self, low, high, margin: float = 0.0) -> tuple[slice, ...] | None:
        """Index box of the voxels that may lie between low and high (mm)."""
        slices = []
        for (smallest, largest), a, b in zip(self._range, low, high, strict=True):
            hit = np.flatnonzero((largest >= a - margin) & (smallest <= b + margin))
            if not len(hit):
                return None
            slices.append(slice(int(hit[0]), int(hit[-1]) + 1))
        return tuple(slices)

    def paint(
        self,
        shape: _Shape,
        value: float | Callable,
        label: str | None = None,
        *,
        bump: float = 0.0,
        bump_scale: float = 40.0,
        texture: float = 0.0,
        texture_scale: float = 9.0,
        limit: np.ndarray | None = None,
        keep: bool = False,
    ) -> None:
        """Covers a shape with a value in HU, or value(x, y, z, distance).

        `bump` mm of smooth noise moves the surface, `texture` HU of noise fills it,
        `limit` [X, Y, Z] is a signed distance (mm) whose inside holds the shape too,
        `keep` leaves the labels alone: a detail inside an organ.
        """
        box = self.box(shape.low, shape.high, self.edge + 3 * bump)
        if box is None or (keep and shape.thickness < 0.1 * self.edge):
            return
        x, y, z = self.x[box], self.y[box], self.z[box]
        d = shape.sdf(x, y, z)
        if bump:
            near = np.abs(d) < self.edge + 3 * bump
            at = (x[near], y[near], z[near])
            d[near] += np.float32(bump) * self.noise(*at, bump_scale, shape.low[0])
        if limit is not None:
            d = np.maximum(d, limit[box])
        d = np.maximum(d, self.skin[box])
        cover = np.clip(np.float32(0.5) - d / self.edge, 0, 1)
        if not keep:
            self.labels[box][cover > 0.5] = self.code(label)
        pale = np.float32(min(1.0, shape.thickness / self.edge))
        cover *= pale
        hit = cover > 0
        at = (x[hit], y[hit], z[hit])
        hu = value(*at, d[hit]) if callable(value) else np.float32(value)
        if texture:
            hu = hu + np.float32(texture) * self.noise(*at, texture_scale)
        old = self.hu[box][hit]
        self.hu[box][hit] = old + cover[hit] * (hu - old)

    def code(self, label: str | None) -> int:
        """The organ's code in `labels`; 0 for no organ."""
        return 0 if label is None else self.names.setdefault(label, len(self.names) + 1)


def _scanner_noise(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Noise of the scanner, new in every scan: 9 HU, slightly correlated in plane."""
    white = rng.standard_normal(shape, dtype=np.float32)
    smooth = ndimage.gaussian_filter(white, (0.5, 0.5, 0.0), mode="nearest")
    return np.float32(9) * smooth / smooth.std()


def _individual(rng: np.random.Generator, x, y, z) -> tuple[np.ndarray, ...]:
    """Body size, posture and build: scale, shift and a smooth warp of some mm."""
    scale = 1 + 0.05 * _normal(rng, 3)
    shift = np.array([2.0, 3.0, 6.0]) * _normal(rng, 3)
    tilt = 0.03 * _normal(rng, 3)
    point = [
        (c - np.float32(t)) / np.float32(s)
        for c, s, t in zip((x, y, z), scale, shift, strict=True)
    ]
    out = [
        point[0] + np.float32(tilt[0]) * point[2],
        point[1] + np.float32(tilt[1]) * point[2],
        point[2] - np.float32(tilt[2]) * point[0],
    ]
    for _ in range(3):
        wave = rng.uniform(0.012, 0.026, 3) * rng.choice([-1, 1], 3)
        phase, size = rng.uniform(0, 2 * np.pi), 3.0 * _normal(rng, 3)
        angle = sum(np.float32(w) * c for w, c in zip(wave, point, strict=True))
        ripple = np.sin(angle + np.float32(phase))
        out = [o + np.float32(s) * ripple for o, s in zip(out, size, strict=True)]
    return tuple(out)


def _motion(task: str, seed: int) -> Callable:
    """Breathing between the two scans: (x, y, z) -> (dx, dy, dz), all mm.

    Largest at the diaphragm, gone at the lung's apex, spine and wall; the slope along z
    stays below 0.3, so that the map folds nowhere.
    """
    rng = _rng(task, seed, "motion")
    reach = (25.0 if task == "lung" else 11.0) * (1 + 0.15 * _normal(rng))
    center_z = _ANATOMY[task].center_z_mm
    size = (1.2 if task == "lung" else 1.0) * _normal(rng, (3, 3))
    wave = rng.uniform(0.01, 0.03, (3, 3)) * rng.choice([-1, 1], (3, 3))
    phase = rng.uniform(0, 2 * np.pi, 3)

    def field(x, y, z):
        u = (z + np.float32(center_z + 25)) / np.float32(85)
        rise = np.exp(-u * u)
        wall = np.exp(-((x / 118) ** 4) - ((y + 22) / 66) ** 4).astype(np.float32)
        dz = np.float32(-reach) * rise * wall
        # The chest also gets thinner from front to back when breathing out.
        dy = np.float32(reach / 12) * rise * (1 + np.tanh(-y / np.float32(60)))
        moved = [np.zeros_like(x), -dy, dz]
        for i in range(3):
            angle = sum(
                np.float32(w) * c for w, c in zip(wave[i], (x, y, z), strict=True)
            )
            ripple = np.sin(angle + np.float32(phase[i]))
            moved = [
                m + np.float32(s) * ripple for m, s in zip(moved, size[i], strict=True)
            ]
        return moved

    return field


def _waves(task: str, seed: int) -> Callable:
    """A random field without folds: (x, y, z) -> (dx, dy, dz), all mm.

    Five sine waves of 150 to 300 mm; see `deformed_pair` for why it folds nowhere.
    """
    rng = _rng(task, seed, "waves")
    ways, axes = rng.standard_normal((2, 5, 3))
    ways /= np.linalg.norm(ways, axis=1, keepdims=True)
    axes /= np.linalg.norm(axes, axis=1, keepdims=True)
    turn = 2 * np.pi / rng.uniform(150, 300, 5)  # per mm
    steep = rng.uniform(0.5, 1.5, 5)
    size = 0.5 * steep / steep.sum() / turn  # mm; sizes times turns add up to 0.5
    phase = rng.uniform(0, 2 * np.pi, 5)

    def field(x, y, z):
        moved = [np.zeros_like(x)] * 3
        for k in range(5):
            a, b, c = np.float32(turn[k] * axes[k])
            ripple = np.sin(a * x + b * y + c * z + np.float32(phase[k]))
            moved = [
                m + np.float32(size[k] * way) * ripple
                for m, way in zip(moved, ways[k], strict=True)
            ]
        return moved

    return field


# --- parts that head and torso share ---


def _paint_layers(canvas: _Canvas, skin: np.ndarray, fat_mm, muscle_hu: float) -> None:
    """Skin, subcutaneous fat, and muscle with fat between its bundles.

    `skin` [X, Y, Z] is the signed distance to the surface, mm.
    """
    depth = -skin
    canvas.skin = skin + 2
    x, y, z = canvas.x, canvas.y, canvas.z
    grain = canvas.noise(x, y, z, 14.0)
    fat = np.float32(-104) + 7 * grain
    # Where the noise crosses zero there is a thin sheet: fat between muscle bundles.
    sheet = np.clip(1.6 - 7 * np.abs(canvas.noise(x, y, z / 3, 22.0, 11.0)), 0, 1)
    muscle = np.float32(muscle_hu) + 6 * grain - np.float32(95) * sheet
    inner = np.clip((depth - fat_mm) / canvas.edge + 0.5, 0, 1)
    hu = fat + inner * (muscle - fat)
    outer = np.clip((3 - depth) / canvas.edge + 0.5, 0, 1)
    hu += outer * (20 - hu) * np.float32(min(1.0, 3.0 / canvas.edge))
    body = np.clip(depth / canvas.edge + 0.5, 0, 1)
    canvas.hu += body * (hu - canvas.hu)


def _bone(canvas: _Canvas, rim_hu: float, marrow_hu: float, rim_mm: float = 2.5):
    """HU of a bone: dense rim, spongy inside."""
    rim_mm = max(rim_mm, 0.7 * float(canvas.edge))

    def value(x, y, z, d):
        rim = np.clip((d + rim_mm) / rim_mm + 0.5, 0, 1)
        spongy = marrow_hu + 45 * canvas.noise(x, y, z, 7.0, 5.0)
        return spongy + rim * (rim_hu - spongy)

    return value


class _Column(NamedTuple):
    """A spine: where its bodies lie and how large they are, mm."""

    body_y: Callable  # z -> y of the vertebral bodies' centre
    radii: tuple[float, float]
    pitch: float
    canal_back: float  # from the body's centre to the canal's
    canal_radius: float
    spinous: float  # length of the spinous process
    low: float
    high: float


def _paint_spine(
    canvas: _Canvas, column: _Column, label: str | None, cord: str | None
) -> None:
    """Vertebral bodies, discs, arches, processes, canal and cord."""
    rx, ry = column.radii
    reach = column.canal_back + column.canal_radius + column.spinous + 12
    centers = [float(column.body_y(np.float32(z))) for z in (column.low, column.high)]
    middle = float(column.body_y(np.float32((column.low + column.high) / 2)))
    low = (-3 * rx, min(*centers, middle) - ry - 25, column.low)
    high = (3 * rx, max(*centers, middle) + reach, column.high)

    def level(z):
        """mm from the middle of the vertebra at this height."""
        return (
            np.abs(z / column.pitch - np.floor(z / column.pitch) - 0.5) * column.pitch
        )

    def place(x, y, z):
        return y - column.body_y(z), level(z)

    def body(x, y, z):
        y, t = place(x, y, z)
        flare = 1 + 0.10 * (2 * t / column.pitch) ** 2
        return _radial(x, y, rx * flare, ry * flare, 2.4)

    def disc_free(x, y, z):
        return level(z) - (0.5 * column.pitch - 0.11 * column.pitch)

    def ends(x, y, z):
        return np.maximum(column.low - z, z - column.high)

    def arch(x, y, z):
        y, t = place(x, y, z)
        y = y - column.canal_back
        ring = np.abs(np.sqrt(x * x + y * y) - (column.canal_radius + 3)) - 3
        ring = np.maximum(ring, t - 0.34 * column.pitch)
        side = np.maximum(np.abs(y + 6) - 5, np.abs(x) - 1.75 * rx)
        side = np.maximum(side, np.maximum(t - 5, column.canal_radius - np.abs(x)))
        slant = level(z + 0.35 * np.maximum(y - column.canal_radius, 0))
        back = np.maximum(np.abs(x) - 3.5, slant - 0.26 * column.pitch)
        start, stop = column.canal_radius, column.canal_radius + 5 + column.spinous
        back = np.maximum(back, np.maximum(start - y, y - stop))
        return np.minimum(np.minimum(ring, side), back)

    def canal(radius):
        def sdf(x, y, z):
            y, _ = place(x, y, z)
            y = y - column.canal_back
            return np.sqrt(x * x + y * y) - radius

        return sdf

    whole = _Shape(body, np.array(low), np.array(high))
    canvas.paint(_within(whole, ends), 95, label, texture=8)  # discs
    bodies = _within(whole, disc_free, ends)
    canvas.paint(bodies, _bone(canvas, 620, 210), label)
    arches = _Shape(arch, np.array(low), np.array(high))
    canvas.paint(_within(arches, ends), _bone(canvas, 640, 330, 2.0), label)
    tunnel = _Shape(canal(column.canal_radius), np.array(low), np.array(high))
    canvas.paint(_within(tunnel, ends), 12)
    cord_shape = _Shape(
        canal(0.62 * column.canal_radius), np.array(low), np.array(high)
    )
    canvas.paint(_within(cord_shape, ends), 40, cord)


def _mirror(points: Sequence[Sequence[float]], side: int) -> list[tuple[float, ...]]:
    """Points given for the left (x > 0), put on the side wanted (-1 right)."""
    return [(side * p[0], *p[1:]) for p in points]


# --- head and neck ---


def _paint_headneck(canvas: _Canvas, rng: np.random.Generator) -> None:
    """Head, neck and shoulders; z = 0 is the level of the ears' lower end."""

    draw = _Draw(rng)
    skull = draw.size(75, 94, 86, rel=0.03)
    cavity = _cranial_cavity(skull)
    canal_y = _neck_curve(rng)
    _paint_head_surface(canvas, rng, skull, canal_y)
    _paint_neck(canvas, draw, canal_y)
    _paint_face(canvas, draw)
    _paint_skull(canvas, draw, cavity)
    column = _Column(lambda z: canal_y(z) - 18, (12.5, 9), 18.5, 18, 8.5, 22, -200, 4)
    _paint_spine(canvas, column, None, "SpinalCord")
    stem = _tube(
        [draw.place(0, 10, 40, sd=1), (0, 18, 18), (0, canal_y(0), 2)],
        draw.size(14, 11, 6.5),
    )
    canvas.paint(stem, 33, "Brainstem", texture=3)
    _paint_airway(canvas, draw, canal_y)


def _neck_curve(rng: np.random.Generator) -> Callable:
    """y of the spinal canal against z: lordosis, different in everyone."""
    bend, lean = 9 + 5 * _normal(rng), 12 + 5 * _normal(rng)

    def canal_y(z):
        t = np.clip(-z / np.float32(160), -0.1, 1.3)
        return np.float32(25) - bend * np.sin(np.pi * t) + lean * t

    return canal_y


def _cranial_cavity(skull: np.ndarray) -> _Sdf:
    """Inside of the skull: an ellipsoid above the sloping base."""
    dome = _ellipsoid((0, 5, 66), skull - 13).sdf

    def sdf(x, y, z):
        floor = np.float32(27) - np.float32(0.26) * y - z
        floor = floor + np.float32(5) * np.cos(y / np.float32(22))
        return -_smooth_min(-dome(x, y, z), -floor * np.float32(0.95), 14.0)

    return sdf


def _paint_head_surface(canvas, rng, skull, canal_y) -> None:
    x, y, z = canvas.x, canvas.y, canvas.z
    build = _normal(rng)
    head = _ellipsoid((0, 5, 66), skull + (1, 2, 1)).sdf(x, y, z)
    face = _ellipsoid((0, -36, 2), (65, 58, 78)).sdf(x, y, z)
    chin = _ellipsoid((0, -70, -54), (30, 24, 20)).sdf(x, y, z)
    nose = _ellipsoid((0, -94, 14), (13, 18, 20)).sdf(x, y, z)
    width = _profile(z, (-190, -130, -70, 0, 40), (80, 64, 58, 62, 60)) + 4 * build
    depth = _profile(z, (-190, -130, -70, 0, 40), (72, 66, 60, 64, 60)) + 3 * build
    neck = np.maximum(_radial(x, y - canal_y(z) + 20, width, depth), z - 40)
    shoulder = _ellipsoid((0, 38, -192), (205 + 8 * build, 84, 78)).sdf(x, y, z)
    d = _smooth_min(_smooth_min(head, face, 30), chin, 20)
    d = _smooth_min(_smooth_min(d, nose, 10), neck, 26)
    d = _smooth_min(d, shoulder, 45)
    for side in (-1, 1):  # ears
        ear = _ellipsoid((side * 80, 14, 22), (5, 15, 28), side * 0.5).sdf(x, y, z)
        d = _smooth_min(d, ear, 6)
    d = d + np.float32(1.5) * canvas.noise(x, y, z, 60.0, 2.0)
    fat = np.float32(5) + (8 + 3 * build) * _profile(
        z, (-190, -80, 0, 30), (1, 0.7, 0.3, 0)
    )
    _paint_layers(canvas, d, np.maximum(fat, 2), 56)


def _paint_skull(canvas, draw, cavity) -> None:
    big = np.array([100.0, 120.0, 160.0])
    everywhere = _Shape(cavity, -big, big)
    thick = 6.0

    def shell(x, y, z):
        return cavity(x, y, z) - np.float32(thick)

    def tables(x, y, z, d):
        """Two dense tables, spongy diploe between them."""
        middle = np.abs(d + thick / 2) / (thick / 2)
        return 520 + 700 * np.clip(middle, 0, 1) ** 2 + 90 * canvas.noise(x, y, z, 10.0)

    canvas.paint(_Shape(shell, -big, big), tables, bump=0.7)
    for side in (-1, 1):
        petrous = _tube(_mirror([(18, 8, 18), (58, 30, 10)], side), draw.size(9, 14))
        canvas.paint(petrous, 900, texture=170, texture_scale=6)
        mastoid = _ellipsoid((side * 60, 34, 2), draw.size(11, 14, 17))
        canvas.paint(mastoid, 120, texture=480, texture_scale=6)
    canvas.paint(everywhere, 9)  # fluid

    def brain(x, y, z):
        folds = np.clip(1.5 - 5 * np.abs(canvas.noise(x, y, z, 19.0, 3.0)), 0, 1)
        d = cavity(x, y, z) + 2.5
        return d + 5 * folds * np.clip(1 + d / 14, 0, 1)

    def tissue(x, y, z, d):
        grey = np.clip(1 + (d + 4) / 6, 0, 1)
        return 29 + 8 * grey + 1.5 * canvas.noise(x, y, z, 10.0)

    canvas.paint(_Shape(brain, -big, big), tissue)
    size = draw.size(7, 30, 9, rel=0.2)
    for side in (-1, 1):
        horn = _ellipsoid(draw.place(side * 11, -2, 82), size, side * 0.18)
        back = _tube(_mirror([(13, 22, 80), (22, 34, 64), (27, 10, 54)], side), 4.5)
        canvas.paint(_union(horn, back, blend=4), 7, bump=0.8)
        canvas.paint(
            _ellipsoid((side * 17, 3, 68), draw.size(8, 15, 9)), 40
        )  # thalamus
    falx = _ellipsoid((0, 5, 88), (1.4, 78, 50))
    canvas.paint(_within(falx, cavity), 58)
    cerebellum = _tube([(-24, 48, 26), (24, 48, 26)], 23)
    canvas.paint(_within(cerebellum, cavity), 38, texture=4, texture_scale=6)
    tent = _tube([(-45, 52, 47), (0, 44, 56), (45, 52, 47)], 1.6, (1, 6, 1))
    canvas.paint(_within(tent, cavity), 55)


def _paint_face(canvas, draw) -> None:
    """Mandible, teeth, maxilla, sinuses, orbits, cheek bones, glands."""
    chin, angle = draw.place(0, -84, -58, sd=2.5), draw.place(45, -14, -44, sd=2.5)
    joint = (49, 3, 14)
    canvas.paint(
        _ellipsoid((0, -46, -2), draw.size(36, 42, 26)), 330, texture=120
    )  # maxilla
    parotid = draw.size(12, 17, 25, rel=0.12)
    for side in (-1, 1):
        line = [(0, *chin[1:]), (24, -70, -56), angle * (1, 1, 1.0)]
        body = _tube(_mirror(line, side), draw.size(6.5, 6, 6.5, rel=0.05), (1, 1, 1.9))
        ramus = _tube(
            _mirror([angle, (50, -8, -14), joint], side), (8, 6.5, 5), (0.8, 1.6, 1)
        )
        jaw = _union(body, ramus, blend=6)
        canvas.paint(jaw, _bone(canvas, 1350, 380, 2.8), "Mandible")
        arch = [(side * 49, -62, 16), (side * 64, -38, 18), (side * 62, -4, 16)]
        canvas.paint(_tube(arch, draw.size(7, 4, 4)), _bone(canvas, 900, 450))
        masseter = _tube(
            _mirror([(58, -30, 10), (54, -22, -34)], side), 9, (0.8, 1.6, 1)
        )
        canvas.paint(masseter, 62, texture=6)
        name = "LeftParotid" if side > 0 else "RightParotid"
        gland = _ellipsoid(
            draw.place(side * 49, 12, -12, sd=1.5),
            parotid * draw.size(1, 1, 1, rel=0.04),
            side * 0.4,
        )
        canvas.paint(
            gland, -8, name, bump=1.8, bump_scale=22, texture=18, texture_scale=7
        )
        canvas.paint(
            _ellipsoid(draw.place(side * 28, -40, -60), draw.size(9, 14, 11)),
            42,
            texture=6,
        )
        orbit = _ellipsoid((side * 32, -68, 36), (21, 24, 20))
        canvas.paint(orbit, 620, texture=80)
        canvas.paint(_ellipsoid((side * 32, -71, 36), (18, 23, 17.5)), -75, texture=12)
        canvas.paint(_tube([(side * 31, -68, 36), (side * 14, -26, 34)], 2.4), 38)
        globe = draw.place(side * 32, -77, 36, sd=1)
        canvas.paint(_ellipsoid(globe, (12.3, 12.3, 12.3)), 12)
        canvas.paint(_ellipsoid(globe + (0, -9, 0), (5, 2.2, 5)), 85)
        sinus = _ellipsoid(
            draw.place(side * 27, -52, 12), draw.size(13, 16, 16, rel=0.15)
        )
        canvas.paint(sinus, -985, bump=1)
    _paint_teeth(canvas)
    canvas.paint(
        _ellipsoid(draw.place(0, -74, 54), draw.size(15, 7, 10, rel=0.25)), -980, bump=1
    )
    canvas.paint(
        _ellipsoid((0, -30, 24), draw.size(13, 11, 10)), -970
    )  # sphenoid sinus
    ethmoid = _ellipsoid((0, -58, 34), (12, 20, 11))
    canvas.paint(ethmoid, -620, texture=420, texture_scale=8)
    nose = _ellipsoid((0, -56, 10), (14, 38, 15))

    def turbinates(x, y, z, d):
        folds = canvas.noise(x, y / 3, z, 10.0, 4.0) > 0.25
        return np.where((np.abs(x) < 1.8) | folds, 30, -960).astype(np.float32)

    canvas.paint(nose, turbinates)
    canvas.paint(_ellipsoid((0, -50, -8), (22, 30, 3)), 560)  # hard palate
    tongue = _ellipsoid(draw.place(0, -46, -32), draw.size(23, 30, 20))
    canvas.paint(tongue, 60, texture=12, bump=1.5)
    canvas.paint(_ellipsoid((0, -50, -13), (20, 27, 2.6)), -700)


def _paint_teeth(canvas) -> None:
    """Two rows along the jaw's arch."""

    def row(middle_z, height):
        def sdf(x, y, z):
            arch = np.sqrt((x / 26) ** 2 + ((y + 46) / 36) ** 2)
            across = np.abs(arch - 1) * 28 - 4.5
            angle = np.arctan2(x, -(y + 46))
            gap = np.float32(3.6) - np.abs((angle / 0.17) % 1 - 0.5) * 8
            d = np.maximum(across, np.abs(z - middle_z) - height)
            return np.maximum(np.maximum(d, -gap - 0.6), y + 40)

        return _Shape(sdf, np.array([-40, -90, -60]), np.array([40, -38, 5]))

    canvas.paint(row(-36, 7), 1900, texture=250)
    canvas.paint(row(-19, 7), 1900, texture=250)


def _paint_neck(canvas, draw, canal_y) -> None:
    """Muscles, vessels, thyroid, oesophagus, collar bones, lung tips."""

    def back(z):
        return float(canal_y(np.float32(z)))

    for side in (-1, 1):
        strap = [(56, 26, 0), (44, 4, -70), (16, -12, -150)]
        canvas.paint(
            _tube(_mirror(strap, side), draw.size(11, 11, 8), (1, 1.3, 1)),
            62,
            texture=5,
        )
        deep = [
            (24, back(0) + 24, 0),
            (22, back(-80) + 22, -80),
            (26, back(-160) + 20, -160),
        ]
        canvas.paint(
            _tube(_mirror(deep, side), draw.size(14, 15, 17), (1.2, 1, 1)),
            60,
            texture=7,
        )
        outer = [(30, back(0) + 42, -20), (50, back(-90) + 30, -100), (110, 62, -140)]
        canvas.paint(_tube(_mirror(outer, side), draw.size(9, 12, 15)), 58, texture=7)
        shaft = [(30, 4, 0), (27, 0, -60), (22, 6, -170)]
        canvas.paint(_tube(_mirror(shaft, side), 3.8), 170)
        shaft = [(38, 9, 0), (35, 2, -60), (29, 3, -170)]
        canvas.paint(_tube(_mirror(shaft, side), draw.size(6, 6.5, 7)), 150)
        lobe = _ellipsoid(
            draw.place(side * 19, -6, -108), draw.size(9, 11, 22, rel=0.15)
        )
        canvas.paint(lobe, 125, texture=9, bump=1)
        lung = _ellipsoid((side * 46, 38, -196), (38, 44, 48))
        canvas.paint(lung, -850, texture=22)
        collar = [(16, -22, -150), (70, -6, -142), (140, 26, -134)]
        canvas.paint(
            _tube(_mirror(collar, side), draw.size(8, 6, 8)), _bone(canvas, 900, 260)
        )
        head = _ellipsoid(draw.place(side * 160, 38, -168, sd=4), draw.size(25, 25, 26))
        canvas.paint(head, _bone(canvas, 700, 240))
        blade = _tube(
            _mirror([(140, 52, -142), (95, 92, -176), (80, 100, -220)], side), 5
        )
        canvas.paint(blade, _bone(canvas, 800, 350))


def _paint_airway(canvas, draw, canal_y) -> None:
    """Pharynx, larynx, trachea with cartilage, hyoid, and the gullet behind."""

    def front(z, ahead):
        """A point `ahead` mm in front of the spine."""
        return (0.0, float(canal_y(np.float32(z))) - 28 - ahead, z)

    box = [draw.place(*front(-62, 22), sd=1.5), front(-90, 17)]
    canvas.paint(_tube(box, draw.size(18, 14), (1, 1.05, 1)), 55, "Larynx", texture=8)
    center = float(box[0][1])

    def shield(x, y, z):
        wall = np.abs(np.sqrt(x * x + (y - center) ** 2) - 15) - 1.8
        return np.maximum(np.maximum(wall, y - center - 4), np.maximum(-88 - z, z + 60))

    low, high = np.array([-20, center - 20, -88]), np.array([20, center + 8, -60])
    canvas.paint(_Shape(shield, low, high), 280, keep=True, texture=60)
    arc = [(22, -2), (14, -18), (-14, -18), (-22, -2)]
    hyoid = [(x, center + 6 + y, -50) for x, y in arc]
    canvas.paint(_tube(hyoid, 2.8), _bone(canvas, 700, 350))
    pipe = [front(-92, 18), front(-130, 18), front(-165, 19), front(-200, 20)]
    canvas.paint(_tube(pipe, 10.8), 90, texture=20)
    gullet = [front(-94, 4), front(-130, 4), front(-165, 5), front(-200, 6)]
    gullet = [(p[0] + 3, *p[1:]) for p in gullet]
    canvas.paint(_tube(gullet, draw.size(6, 6, 6.5, 7), (1.4, 0.9, 1)), 40, "Esophagus")
    air = [(0, -14, 10), (0, -6, -22), front(-52, 10), front(-66, 20), front(-80, 20)]
    canvas.paint(_tube(air, draw.size(9, 8, 8, 8, 5), (1.4, 0.8, 1)), -985, keep=True)
    lumen = _tube([air[-1], *pipe], draw.size(5, 8.2, 8.4, 8.6, 8.6, rel=0.05))
    canvas.paint(lumen, -985, keep=True)


# --- chest and abdomen ---

_BODY_Z = (-300, -230, -150, -50, 50, 130, 175, 205, 235, 260, 300)
_BODY_X = (168, 165, 152, 150, 156, 164, 176, 168, 100, 64, 60)
_BODY_Y = (104, 106, 106, 110, 112, 108, 94, 80, 66, 58, 58)
_RIB_Z = (-140, -100, -60, 0, 60, 110, 150, 180, 205, 216)
_RIB_X = (124, 128, 131, 131, 125, 113, 93, 66, 34, 18)
_RIB_Y = (84, 87, 92, 95, 92, 83, 69, 52, 30, 18)


class _Trunk(NamedTuple):
    """The torso's walls: signed distances [X, Y, Z] in mm, negative inside."""

    fat_mm: float
    skin: np.ndarray
    cage: np.ndarray  # outer surface of the ribs
    roof: np.ndarray  # negative below the diaphragm
    belly: np.ndarray  # the abdominal cavity


def _trunk(canvas: _Canvas, rng: np.random.Generator) -> _Trunk:
    x, y, z = canvas.x, canvas.y, canvas.z
    fat_mm = float(np.clip(14 + 5 * _normal(rng), 6, 25))
    rib_x, rib_y = 1 + 0.03 * _normal(rng, 2)
    right, left = np.array([6.0, -6.0]) + 5 * _normal(rng, 2)
    rx, ry = (_profile(z, _BODY_Z, v) + fat_mm - 12 for v in (_BODY_X, _BODY_Y))
    skin = _radial(x, y - 4, rx, ry, 2.35)
    skin -= np.float32(1.5) * canvas.noise(x, y, z, 70.0, 2.0)
    rx, ry = rib_x * _profile(z, _RIB_Z, _RIB_X), rib_y * _profile(z, _RIB_Z, _RIB_Y)
    cage = _radial(x, y - 2, rx.astype(np.float32), ry.astype(np.float32), 2.2)
    # Two domes, lower at the back and the sides.
    one = 0.0062 * ((x + 58) ** 2 + 1.15 * (y + 8) ** 2) - np.float32(right)
    two = 0.0072 * ((x - 58) ** 2 + 1.15 * (y + 6) ** 2) - np.float32(left)
    roof = z + _smooth_min(one, two, 14.0)
    belly = np.maximum(skin + np.float32(fat_mm + 13), np.float32(0.7) * roof)
    belly = np.maximum(belly, np.where(z > -110, cage + 10, np.float32(-50)))
    return _Trunk(fat_mm, skin, cage, roof, belly)


def _paint_torso(canvas: _Canvas, rng: np.random.Generator, variant: str) -> None:
    """Neck to pelvis; z = 0 is the top of the diaphragm."""
    draw, trunk = _Draw(rng), _trunk(canvas, rng)
    phase = PHASES["art" if variant == "art" else "pvp"]
    _paint_layers(canvas, trunk.skin, np.float32(trunk.fat_mm), phase["muscle"])
    _paint_bowel(canvas, draw, trunk, phase)
    _paint_belly_organs(canvas, draw, trunk, phase)
    _paint_lungs(canvas, draw, trunk, variant)
    _paint_mediastinum(canvas, draw, phase)
    _paint_lung_vessels(canvas, draw)
    _paint_torso_bones(canvas, draw, trunk)


def _paint_bowel(canvas, draw, trunk, phase) -> None:
    """Fat of the belly, muscles behind it, colon and small bowel."""
    cavity = _box((-170, -125, -300), (170, 110, 30))
    canvas.paint(cavity, -102, texture=7, limit=trunk.belly)
    for side in (-1, 1):
        psoas = [(28, 52, -80), (40, 56, -150), (66, 34, -240), (80, 0, -300)]
        radii = draw.size(9, 19, 23, 20)
        canvas.paint(_tube(_mirror(psoas, side), radii), phase["muscle"], texture=6)
    loops = []
    for _ in range(46):
        start = np.array([0, -38, -185]) + draw.rng.uniform(-1, 1, 3) * (82, 34, 78)
        step = draw.rng.standard_normal(3) * (26, 14, 16)
        loops.append((start, start + step, draw.rng.uniform(9, 14), draw.rng.random()))
    for start, end, radius, gas in loops:
        wall, inner = (_tube([start, end], r) for r in (radius, 0.68 * radius))
        rough = dict(bump=1.5, bump_scale=20, limit=trunk.belly)
        canvas.paint(wall, phase["bowel"], **rough)
        canvas.paint(inner, -850 if gas > 0.85 else 18, texture=12, **rough)
    colon = [
        [draw.place(104, 12, -245), (106, 8, -190), draw.place(100, -2, -132)],
        [draw.place(98, -30, -122), (0, -78, -140), draw.place(-95, -38, -118)],
        [draw.place(-106, 18, -100), (-108, 26, -180), (-92, 20, -250)],
    ]

    def stool(x, y, z, d):
        speckle = canvas.noise(x, y, z, 8.0, 9.0)
        gas = (canvas.noise(x, y, z, 34.0, 6.0) - y / 60 > 1.3) & (d < 0)
        return np.where(gas, -880, -20 + 85 * speckle - 60 * (speckle < -1))

    for line in colon:
        rough = dict(bump=3, bump_scale=26, limit=trunk.belly)
        canvas.paint(_tube(line, 23), phase["bowel"], **rough)
        canvas.paint(_tube(line, 19.5), stool, **rough)


def _paint_belly_organs(canvas, draw, trunk, phase) -> None:
    """The thirteen organs of the abdominal vocabulary."""
    below = trunk.belly + 3
    _paint_belly_vessels(canvas, draw, phase)
    pancreas = [
        draw.place(-30, -18, -112),
        (-16, -34, -92),
        (26, -16, -82),
        draw.place(72, 20, -62),
    ]
    canvas.paint(
        _tube(pancreas, draw.size(15, 12, 10, 10), (1, 0.9, 1.1)),
        phase["pancreas"],
        "pancreas",
        bump=2.5,
        bump_scale=16,
        texture=14,
        texture_scale=6,
        limit=trunk.belly,
    )
    for side, name in ((1, "left"), (-1, "right")):
        center = draw.place(side * 62, 54, -108 if side > 0 else -120)
        _paint_kidney(canvas, center, draw.size(28, 27, 55), side, name, phase)
        top = center + (-side * 22, -20, 46)
        limbs = [top + (-side * 3, -14, 4), top, top + (side * 9, 12, -10)]
        canvas.paint(
            _tube(limbs, 4.2, (1, 1, 2.4)), 75, f"{name}_adrenal_gland", bump=0.8
        )
    spleen = _ellipsoid(draw.place(98, 38, -50, sd=3), draw.size(34, 44, 56), 0.5)
    mottle = 30 if phase is PHASES["art"] else 6
    canvas.paint(
        spleen,
        phase["spleen"],
        "spleen",
        bump=3,
        texture=mottle,
        texture_scale=16,
        limit=below,
    )
    _paint_stomach(canvas, draw, below, phase)
    _paint_liver(canvas, draw, below, phase)


def _paint_belly_vessels(canvas, draw, phase) -> None:
    trunk_line = [(16, 40, 40), (10, 34, -40), (4, 30, -130), (2, 26, -205)]
    aorta = _tube(trunk_line, draw.size(12.5, 11.5, 10, 9))
    legs = [
        _tube([(2, 26, -203), (side * 34, 30, -265), (side * 50, 10, -310)], 6.5)
        for side in (-1, 1)
    ]
    canvas.paint(_union(aorta, *legs, blend=4), phase["artery"], "aorta")
    cava = [(-20, -2, 12), (-24, 14, -60), (-26, 24, -140), (-20, 30, -215)]
    canvas.paint(
        _tube(cava, draw.size(12, 11, 11, 10), (1.15, 0.9, 1)),
        phase["vein"],
        "inferior_vena_cava",
    )
    for side in (-1, 1):
        canvas.paint(
            _tube([(side * 4, 28, -100), (side * 44, 46, -112)], 3), phase["artery"]
        )
    canvas.paint(
        _tube([(4, 24, -90), (4, 4, -104), (0, -22, -190)], 4), phase["artery"]
    )
    canvas.paint(_tube([(-6, -6, -98), (-10, -26, -190)], 5.5), phase["portal"])
    confluence = draw.place(-8, -8, -92, sd=2)
    vein = _tube(
        [(-42, -10, -56), confluence, (30, 4, -76), (80, 30, -58)], (7.5, 7.5, 5.5, 5)
    )
    canvas.paint(vein, phase["portal"], "portal_and_splenic_vein")


def _paint_kidney(canvas, center, radii, side, name, phase) -> None:
    kidney = _ellipsoid(center, radii, side * 0.45)
    hilum = _ellipsoid(center + (-side * 19, -9, 0), (14, 11, 19))

    def tissue(x, y, z, d):
        """Cortex outside, pyramids inside."""
        cortex = np.clip((d + 8) / 2, 0, 1)
        pyramid = np.clip(canvas.noise(x, y, z, 16.0, 8.0) + 0.8, 0, 1) * (1 - cortex)
        return phase["cortex"] + pyramid * (phase["medulla"] - phase["cortex"])

    canvas.paint(kidney, tissue, f"{name}_kidney", bump=1.2)
    canvas.paint(hilum, -75, bump=3, bump_scale=14, texture=30)


def _paint_stomach(canvas, draw, limit, phase) -> None:
    line = [
        draw.place(52, 16, -20),
        draw.place(66, -22, -56),
        (36, -62, -98),
        (-16, -50, -100),
    ]
    radii = draw.size(30, 31, 22, 13)
    gullet = _tube([(20, 26, 20), (26, 22, -8), (40, 14, -20)], 7.5)
    canvas.paint(gullet, 42, "esophagus", texture=6)
    canvas.paint(_tube(line, radii), 72, "stomach", bump=3, limit=limit)

    def food(x, y, z, d):
        """Gas rises to the front of a patient who lies on the back."""
        level = np.clip((y + 42) / canvas.edge + 0.5, 0, 1)
        return -930 + level * (960 + 14 * canvas.noise(x, y, z, 12.0))

    canvas.paint(_tube(line, radii - 5), food, bump=3, keep=True, limit=limit + 5)


def _paint_liver(canvas, draw, limit, phase) -> None:
    right = _ellipsoid(draw.place(-66, -6, -52), draw.size(74, 84, 84, rel=0.07))
    left = _ellipsoid(draw.place(8, -52, -34), draw.size(66, 38, 34, rel=0.14))

    # The hollow under the liver, where kidney and bowel lie.
    hollow = _ellipsoid((-30, 24, -128), (62, 60, 62)).sdf
    limit = np.maximum(limit, -hollow(canvas.x, canvas.y, canvas.z))
    liver = _union(right, left, blend=24)
    canvas.paint(
        liver, phase["liver"], "liver", bump=3.5, bump_scale=55, texture=5, limit=limit
    )
    inside = np.where(canvas.labels == canvas.code("liver"), np.float32(-9), 9)
    detail = dict(keep=True, limit=inside)
    vein_hu = 0.5 * (phase["vein"] + phase["portal"])
    hub = np.array([-44, -10, -56.0])
    for _ in range(9):
        end = np.array([-70, -8, -48]) + draw.rng.uniform(-1, 1, 3) * (58, 62, 46)
        middle = 0.5 * (hub + end) + 8 * draw.rng.standard_normal(3)
        tree = _tube([hub, middle, end], (5, 3.4, 1.6))
        canvas.paint(tree, phase["portal"], **detail)
    for x_end, y_end in ((-118, 20), (-82, -62), (-10, -46)):
        end = draw.place(x_end, y_end, -50, sd=8)
        middle = 0.5 * (end + (-22, 2, -8)) + draw.place(0, 0, 6)
        tree = _tube([(-22, 2, -4), middle, end], (5.5, 4, 2))
        canvas.paint(tree, vein_hu, **detail)
    for _ in range(2):
        spot = np.array([-76, -6, -56]) + draw.rng.uniform(-1, 1, 3) * (48, 48, 34)
        size = draw.rng.uniform(7, 15)
        tumour = _ellipsoid(spot, draw.size(size, size, size))
        canvas.paint(tumour, phase["tumour"], bump=1.2, texture=9, **detail)
    sac = [draw.place(-44, -40, -94), draw.place(-54, -56, -122)]
    canvas.paint(_tube(sac, draw.size(10, 15)), 9, "gallbladder")


def _paint_lungs(canvas, draw, trunk, variant) -> None:
    """Diaphragm, and both lungs beside a mediastinum of fat."""
    x, y, z = canvas.x, canvas.y, canvas.z
    box = _box((-140, -105, -110), (140, 105, 215))
    chest = np.maximum(trunk.cage + 9, -trunk.roof)
    canvas.paint(box, -92, texture=14, limit=chest)
    muscle = np.maximum(np.abs(trunk.roof + 1.5) - 2.5, trunk.cage + 8)
    canvas.paint(box, 52, keep=True, limit=muscle)  # the diaphragm
    # Breathing out leaves the same tissue in less air.
    base = {"exp": -790, "insp": -872}.get(
        variant, -845 + 15 * float(_normal(draw.rng))
    )
    middle = 4 + 3 * float(_normal(draw.rng))
    outer = np.maximum(trunk.cage + np.float32(10.5), 2 - trunk.roof)
    front, rear = np.clip(-y / 80 - 0.35, 0, 1), np.clip(y / 80, 0, 1)
    bulge = 12 * np.exp(-(((z - 62) / 45) ** 2))

    def tissue(x, y, z, d):
        """Denser at the back, where the blood sinks."""
        grain = 15 * canvas.noise(x, y, z, 7.0, 1.0)
        return base + 32 * (y / 90) + grain + 10 * canvas.noise(x, y, z, 40.0)

    for side, name in ((1, "lung_left"), (-1, "lung_right")):
        gap = 20 - 13 * front * (z > 0) + 8 * rear + (side > 0) * bulge
        lung = -_smooth_min(-outer, side * (x - middle) - gap, 12.0)
        canvas.paint(box, tissue, name, limit=lung.astype(np.float32))


def _paint_lung_vessels(canvas, draw) -> None:
    """Arteries, veins and airways that fan out from each hilum."""
    codes = [canvas.code("lung_left"), canvas.code("lung_right")]
    lungs = np.where(np.isin(canvas.labels, codes), np.float32(-9), 9)
    detail = dict(keep=True, limit=lungs)
    for side in (-1, 1):
        hub = np.array([side * 32, 16, 78.0])
        for _ in range(64):
            end = np.array([side * 76, 0, 62]) + draw.rng.uniform(-1, 1, 3) * (
                48,
                82,
                122,
            )
            bend = (
                hub + (end - hub) * (0.40, 0.45, 0.55) + 8 * draw.rng.standard_normal(3)
            )
            late = bend + 0.55 * (end - bend) + 6 * draw.rng.standard_normal(3)
            twig = late + draw.rng.standard_normal(3) * (14, 18, 18)
            size = draw.rng.uniform(2.6, 4.8)
            line = _tube([hub, bend, late, end], size * np.array([1, 0.65, 0.45, 0.25]))
            canvas.paint(line, 50, **detail)
            canvas.paint(
                _tube([bend, twig], size * np.array([0.5, 0.25])), 50, **detail
            )
        for _ in range(5):
            end = np.array([side * 66, 4, 66]) + draw.rng.uniform(-1, 1, 3) * (
                20,
                36,
                60,
            )
            canvas.paint(_tube([hub, end], (5.0, 2.2)), 0, **detail)
            canvas.paint(_tube([hub, end], (3.4, 0.9)), -960, **detail)


def _paint_mediastinum(canvas, draw, phase) -> None:
    """Heart, great vessels, airway, gullet."""
    artery, vein = phase["artery"], phase["vein"]
    gullet = [draw.place(3, 24, 230, sd=2), (2, 30, 150), (6, 34, 60), (20, 26, 12)]
    canvas.paint(_tube(gullet, draw.size(8, 8, 8, 8)), 40, "esophagus", texture=8)
    center = draw.place(20, -34, 34, sd=3)
    heart = _ellipsoid(center, draw.size(58, 44, 45, rel=0.07), 0.55)
    canvas.paint(_ellipsoid(center, (62, 48, 48), 0.55), -70, bump=2)
    canvas.paint(heart, 105, "heart", bump=2.5, texture=5)
    for shift, radii, hu in (
        ((20, 0, -6), (27, 16, 21), artery),
        ((-12, -18, 2), (26, 13, 24), vein),
        ((2, 24, 16), (28, 11, 15), artery),
        ((-34, 6, 10), (15, 18, 22), vein),
    ):
        room = _ellipsoid(center + shift, draw.size(*radii), 0.5)
        canvas.paint(room, hu, keep=True, bump=1.5)
    ascending = [
        (2, -24, 58),
        (-8, -26, 98),
        (0, -14, 124),
        (16, 14, 126),
        (22, 36, 108),
    ]
    arch = _tube(ascending, draw.size(15, 15, 14, 13, 12.5, rel=0.06))
    down = _tube([(22, 36, 108), (22, 44, 50), (14, 40, -10)], (12.5, 12, 11.5))
    canvas.paint(_union(arch, down), artery, "aorta")
    for x_end in (-18, 8, 26):
        canvas.paint(_tube([(x_end / 2, -4, 128), (x_end, -4, 215)], 5), artery)
    canvas.paint(
        _tube([(-26, -14, 165), (-26, -14, 100), (-22, -12, 66)], (8, 9.5, 10)), vein
    )
    canvas.paint(_tube([(-26, -14, 165), (30, -24, 170)], 6.5), vein)
    root = [(14, -36, 66), (12, -18, 88)]
    canvas.paint(_tube(root, 14), vein)
    for side in (-1, 1):
        canvas.paint(_tube([(12, -16, 88), (side * 30 + 2, 8, 80)], (12, 9)), vein)
        canvas.paint(_tube([(side * 34, 22, 62), (8, 16, 58)], (6, 9)), artery)
    windpipe = [(0, 6, 260), draw.place(0, 8, 180, sd=2), (1, 16, 108)]
    main = [_tube([(1, 16, 108), (side * 32, 20, 82)], (8.5, 6)) for side in (-1, 1)]
    canvas.paint(_union(_tube(windpipe, 10.5), *main), 35, "trachea")
    main = [_tube([(1, 16, 108), (side * 34, 20, 81)], (6.8, 4.6)) for side in (-1, 1)]
    canvas.paint(_union(_tube(windpipe, 8.6), *main), -975, keep=True)
    for side in (-1, 1):
        lobe = _ellipsoid((side * 18, -4, 236), (9, 11, 20))
        canvas.paint(lobe, 120, texture=9)


def _paint_torso_bones(canvas, draw, trunk) -> None:
    """Ribs, spine, breast bone, shoulder, pelvis."""
    drop, pitch = 62 + 8 * _normal(draw.rng), 25.5

    x, y, z = canvas.x, canvas.y, canvas.z
    angle = np.arctan2(np.abs(x), y - 2)  # 0 at the back
    along = z + np.float32(drop) * (1 - np.cos(np.minimum(angle, 2.4))) / 2
    level = (along / pitch - np.floor(along / pitch) - 0.5) * np.float32(pitch)
    deep = (trunk.cage + np.float32(4.5)) / np.float32(4.2)
    ribs = (np.sqrt(deep * deep + (level / np.float32(6.4)) ** 2) - 1) * np.float32(4.5)
    ends = np.maximum(np.maximum(-88 - along, along - 200), (0.25 - angle) * 60)
    ribs = np.maximum(ribs, ends)
    box = _box((-145, -110, -160), (145, 105, 215))
    gristle = np.maximum(ribs, (2.35 - angle) * 60)
    canvas.paint(box, 125, texture=40, limit=gristle)
    bony = np.maximum(ribs, (angle - 2.35) * 60)
    canvas.paint(box, _bone(canvas, 820, 260, 1.8), limit=bony)

    def body_y(z):
        return np.float32(52) + np.float32(8) * np.sin((z + 30) / np.float32(76))

    for side in (-1, 1):
        erector = [(30, 92, -300), (32, 92, -100), (28, 92, 60), (22, 84, 180)]
        shape = _tube(_mirror(erector, side), draw.size(21, 20, 15, 12), (1.35, 1, 1))
        canvas.paint(shape, 56, texture=9)
    column = _Column(body_y, (20, 15.5), 27.0, 25, 9.5, 20, -310, 330)
    _paint_spine(canvas, column, "spine", None)
    sternum = _tube(
        [(0, -88, 28), (0, -92, 80), (0, -76, 136), (0, -62, 162)],
        (4, 5, 6, 7),
        (3.4, 1, 1),
    )
    canvas.paint(sternum, _bone(canvas, 520, 160))
    for side in (-1, 1):
        collar = _mirror([(14, -52, 168), (70, -46, 190), (138, -6, 204)], side)
        canvas.paint(_tube(collar, (9, 6, 8)), _bone(canvas, 900, 260))
        blade = _ellipsoid(draw.place(side * 104, 74, 138), (42, 5, 58), side * -0.5)
        canvas.paint(blade, _bone(canvas, 760, 330))
        canvas.paint(
            _ellipsoid((side * 150, 14, 196), (24, 24, 26)), _bone(canvas, 720, 240)
        )
        wing = _tube(
            _mirror([(62, 66, -225), (104, 20, -238), (112, -22, -258)], side),
            6,
            (1, 1, 6),
        )
        canvas.paint(wing, _bone(canvas, 780, 260))
    sacrum = _ellipsoid((0, 74, -272), (50, 18, 50))
    canvas.paint(sacrum, _bone(canvas, 480, 230), "spine")


# --- command ---


def main(argv: Sequence[str] | None = None) -> int:
    """Writes a dataset of phantoms.

    Args:
        argv: arguments; None: those of the process.

    Returns:
        Exit code: 0, 2 (usage), 6 (storage).
    """
    parser = argparse.ArgumentParser(
        prog="python -m data_pipeline.synthetic",
        description="Writes CT-like phantoms of every task, ready for training.",
    )
    parser.add_argument("--out", required=True, help="folder to write")
    grid_arguments(parser, shape="96,96,80", spacing_mm="4")
    parser.add_argument("--subjects", type=int, default=4, help="per task (default: 4)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--tasks", default=",".join(TASKS), help="comma-separated (default: all)"
    )
    parser.add_argument(
        "--nifti",
        action="store_true",
        help="write NIfTI files and a manifest for data_pipeline.prepare instead",
    )
    options = parser.parse_args(argv)
    tasks = options.tasks.split(",")
    if unknown := [task for task in tasks if task not in TASKS]:
        parser.error(f"--tasks: known are {', '.join(TASKS)}, got {', '.join(unknown)}")
    if options.subjects < 1 or options.seed < 0:
        parser.error("--subjects must be at least 1 and --seed at least 0")
    write = write_nifti if options.nifti else write_dataset
    try:
        made = write(
            options.out,
            shape=options.shape,
            spacing_mm=options.spacing,
            subjects_per_task=options.subjects,
            seed=options.seed,
            tasks=tasks,
        )
    except UserError as error:
        print(f"error: {error.reason}: {error}", file=sys.stderr)
        return error.exit_code
    print(made)
    return 0


if __name__ == "__main__":
    sys.exit(main())
