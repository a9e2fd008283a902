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
from data_pipeline.phantoms import headneck, motion, torso
from data_pipeline.phantoms.canvas import AIR_HU, Canvas, Noise
from data_pipeline.prepare import grid_arguments
from unireg_jax.errors import UserError, on_terminal, tell
from unireg_jax.imaging import nifti, orientation
from unireg_jax.imaging.preprocess import PreprocessSpec
from unireg_jax.tasks import TASKS, PairType

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


class _Anatomy(NamedTuple):
    """What a task shows: painter, labels, variants (fixed first), z of the centre.

    `more` are variants that `phantom` paints but datasets do not hold.
    """

    torso: bool
    labels: tuple[str, ...]
    variants: tuple[str, ...]
    center_z_mm: float
    more: tuple[str, ...] = ()


_ANATOMY = {
    "headneck": _Anatomy(False, HEADNECK_LABELS, ("scan",), 0.0),
    "chest": _Anatomy(True, CHEST_LABELS, ("scan",), 75.0),
    "abdomen": _Anatomy(True, ABDOMEN_LABELS, ("scan",), -95.0),
    "liver": _Anatomy(True, ABDOMEN_LABELS, ("pvp", "art"), -60.0, ("pre",)),
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
        disp_mf: [X, Y, Z, 3] float32, voxels: the way back, to 0.001 mm. None unless
            asked for.
    """

    fixed: Phantom
    moving: Phantom
    disp: np.ndarray | None
    disp_mf: np.ndarray | None = None


def variants(task: str) -> tuple[str, ...]:
    """Names of a task's scans of one subject, the fixed one first."""
    return _anatomy(task).variants


def label_names(task: str) -> tuple[str, ...]:
    """A task's vocabulary: id i + 1 is the i-th name."""
    return _anatomy(task).labels


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
        variant: one of `variants(task)`; None is the fixed one. liver: "pvp", "art" or
            "pre", without contrast and in the breath of "art";
            lung: "exp", "insp"; else "scan".

    Returns:
        Phantom; the same bits for the same arguments.

    Raises:
        ValueError: unknown task or variant, bad shape or spacing.
    """
    anatomy = _anatomy(task)
    variant = anatomy.variants[0] if variant is None else variant
    known = anatomy.variants + anatomy.more
    if variant not in known:
        raise ValueError(f"variant must be one of {known} for {task}, got {variant!r}")
    shape, spacing = _check_grid(shape, spacing_mm)
    noise = _rng(task, seed, variant)
    return _scan(task, _points(shape, spacing), spacing, seed, variant, noise)


def pair(
    task: str,
    *,
    shape: Sequence[int] = (96, 96, 80),
    spacing_mm: float | Sequence[float] = 4.0,
    seed: int = 0,
    both_ways: bool = False,
) -> PhantomPair:
    """Paints a pair of the task's kind: two phases of one subject, or two subjects.

    Args:
        task, shape, spacing_mm, seed: see `phantom`. Inter-patient: subjects 2 seed and
            2 seed + 1.
        both_ways: compute disp_mf too, where there is a field.

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
    back = None
    if both_ways:
        points = _points(*_check_grid(shape, spacing_mm))
        moved = motion.invert(_motion(task, seed), *points)
        back = _in_voxels(moved, _check_grid(shape, spacing_mm)[1])
    return PhantomPair(first, second, known_disp(task, seed=seed, **grid), back)


def deformed_pair(
    task: str,
    *,
    shape: Sequence[int] = (96, 96, 80),
    spacing_mm: float | Sequence[float] = 4.0,
    seed: int = 0,
    both_ways: bool = False,
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
        both_ways: compute disp_mf too.

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
    back = None
    if both_ways:
        field, points = _waves(task, seed), _points(shape, spacing)
        back = _in_voxels(motion.invert(field, *points), spacing)
    return PhantomPair(fixed, moving, _in_voxels(moved, spacing), back)


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
        out: folder; made if absent. The caller holds it; see `store.made_folder`.
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
    quiet = not on_terminal()
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
    canvas = Canvas(*motion.individual(subject, x, y, z + anatomy.center_z_mm), spacing)
    canvas.noise = Noise(subject)
    if anatomy.torso:
        torso.paint(canvas, subject, variant)
    else:
        headneck.paint(canvas, subject)
    hu = canvas.hu + _scanner_noise(noise, x.shape)
    hu = np.clip(np.rint(hu), -1024, 3071).astype(np.int16)
    lookup = np.zeros(len(canvas.names) + 1, np.uint8)
    for name, code in canvas.names.items():
        if name in anatomy.labels:
            lookup[code] = anatomy.labels.index(name) + 1
    vox2world = np.diag([*spacing, 1.0])
    vox2world[:3, 3] = [p[0, 0, 0] for p in points]
    return Phantom(hu, lookup[canvas.labels], anatomy.labels, vox2world)


def _motion(task: str, seed: int) -> Callable:
    """Breathing between the subject's two scans."""
    return motion.breathing(
        _rng(task, seed, "motion"),
        deep=task == "lung",
        center_z_mm=_ANATOMY[task].center_z_mm,
    )


def _waves(task: str, seed: int) -> Callable:
    """The random field of `deformed_pair`."""
    return motion.waves(_rng(task, seed, "waves"))


def _rng(task: str, seed: int, purpose: str) -> np.random.Generator:
    """Independent generators per subject and purpose; liver and abdomen differ."""
    return np.random.default_rng([zlib.crc32(f"{task}/{purpose}".encode()), seed])


def _scanner_noise(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Noise of the scanner, new in every scan: 9 HU, slightly correlated in plane."""
    white = rng.standard_normal(shape, dtype=np.float32)
    smooth = ndimage.gaussian_filter(white, (0.5, 0.5, 0.0), mode="nearest")
    return np.float32(9) * smooth / smooth.std()


# --- command ---


def main(argv: Sequence[str] | None = None) -> int:
    """Writes a dataset of phantoms.

    Args:
        argv: arguments; None: those of the process.

    Returns:
        Exit code: 0, 2 (usage), 6 (storage), 9 or 10 (the index in --out cannot be
        read).
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
        with store.made_folder(options.out):
            made = write(
                options.out,
                shape=options.shape,
                spacing_mm=options.spacing,
                subjects_per_task=options.subjects,
                seed=options.seed,
                tasks=tasks,
            )
    except UserError as error:
        tell(f"error: {error.reason}: {error}")
        return error.exit_code
    print(made)
    return 0


if __name__ == "__main__":
    sys.exit(main())
