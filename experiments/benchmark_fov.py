"""A scan taller than the network's window: crop, tiles and one larger window.

    python -m experiments.benchmark_fov --data=FOLDER

Two real scans stacked (an abdomen with pelvis, and the chest of another patient, at
3 mm, 579 mm high) are the moving scan; the fixed one is the same, deformed by a known
smooth field of 6 mm on average. The packaged weights look through 384 x 384 x 320 mm.
Prints the mean error of the field over the body, at all heights and in the outer 80 mm,
and how much it changes from slice to slice there where windows meet.

    python -m experiments.benchmark_fov --data=FOLDER --large=OUT

writes such a pair of 512 x 512 x 700 voxels with a neck on top, OUT/fixed.nii and
OUT/moving.nii, for `unireg register -o OUT/results --case large`; once that case is
there, prints the mean error of its field.
"""

import json
import time
from pathlib import Path

import numpy as np
from absl import flags
from scipy import ndimage

from experiments import cli, real_pairs
from unireg_jax import registration
from unireg_jax.imaging import nifti, transforms
from unireg_jax.imaging.nifti import Volume

_SPACING_MM = 3.0
_SIDES = (136, 112)  # voxels
_DROP = 30  # slices of the chest scan, which show the abdomen again
_ENDS_MM = 80.0
_LARGE, _LARGE_MM = (512, 512, 700), np.array([0.8, 0.8, 1.0])
_LARGE_PARTS = (  # file, and mm at its lower end that show what the one below shows
    ("abdomen_totalseg_example/ct.nii.gz", 0.0),
    ("chest_lidc0001/ct.nii.gz", 90.0),
    ("headneck_openkbp/images/case_0004.nii.gz", 120.0),
)
_NOISE_HU = 12.0  # of a thin slice
_REACH = 14  # slices: the known field moves no point further


def stacked(data: Path) -> np.ndarray:
    """Abdomen below, chest above, [X, Y, Z] float32 HU."""
    abdomen = nifti.read_image(data / "abdomen_totalseg_example" / "ct.nii.gz")
    chest = nifti.read_image(data / "chest_lidc0001" / "ct.nii.gz")
    return np.concatenate([_centred(abdomen), _centred(chest)[:, :, _DROP:]], axis=2)


def _centred(volume: Volume) -> np.ndarray:
    """A scan at 3 mm in the middle of the stack's sides."""
    factors = [s / _SPACING_MM for s in volume.spacing_mm]
    data = ndimage.zoom(volume.data.astype(np.float32), factors, order=1)
    out = np.full((*_SIDES, data.shape[2]), -1000, np.float32)
    i, j = ((n - m) // 2 for n, m in zip(_SIDES, data.shape[:2], strict=True))
    out[i : i + data.shape[0], j : j + data.shape[1]] = data
    return out


def known_mm(points: np.ndarray) -> np.ndarray:
    """The field, mm, at points [..., 3] in mm."""
    x, y, z = np.moveaxis(points, -1, 0)
    return np.stack(
        [
            8 * np.sin(z / 90) * np.cos(y / 120),
            9 * np.sin(x / 100 + 1) * np.cos(z / 110),
            11 * np.sin(z / 130 + 0.5) * np.cos(x / 140),
        ],
        axis=-1,
    )


def write_large(data: Path, out: Path) -> None:
    """Writes the pair of 512 x 512 x 700 voxels, slice by slice."""
    moving = np.full(_LARGE, -1000, np.float32)
    top = 0
    for name, drop in _LARGE_PARTS:
        scan = nifti.read_image(data / name)
        spacing, middle = np.array(scan.spacing_mm), np.array(scan.data.shape) / 2 - 0.5
        x, y = (
            (np.arange(n) - n / 2 + 0.5) * mm / s + m
            for n, mm, s, m in zip(_LARGE[:2], _LARGE_MM, spacing, middle, strict=False)
        )
        count = int(scan.data.shape[2] * spacing[2] - drop)
        for k in range(min(count, _LARGE[2] - top)):
            at = np.meshgrid(x, y, [(k + drop) / spacing[2]], indexing="ij")
            moving[:, :, top + k] = ndimage.map_coordinates(
                scan.data, at, np.float32, order=1, mode="constant", cval=-1000
            )[..., 0]
        top = min(top + count, _LARGE[2])
    rng = np.random.default_rng(0)
    flat = np.moveaxis(np.indices(_LARGE[:2]), 0, -1) * _LARGE_MM[:2]
    pair = {name: np.empty(_LARGE, np.int16) for name in ("fixed", "moving")}
    for k in range(_LARGE[2]):
        points = np.concatenate([flat, np.full((*_LARGE[:2], 1), float(k))], axis=-1)
        first = max(0, k - _REACH)
        coords = np.moveaxis((points + known_mm(points)) / _LARGE_MM, -1, 0)
        coords[2] -= first
        near = moving[:, :, first : k + _REACH + 1]
        fixed = ndimage.map_coordinates(near, coords, order=1, mode="nearest")
        for name, hu in (("fixed", fixed), ("moving", moving[:, :, k])):
            noise = rng.normal(0, _NOISE_HU, hu.shape) * (hu > -995)
            pair[name][:, :, k] = np.clip(np.rint(hu + noise), -1024, 3071)
    out.mkdir(parents=True, exist_ok=True)
    for name, hu in pair.items():
        nifti.write_volume(out / f"{name}.nii", hu, np.diag([*_LARGE_MM, 1.0]))


def large_error(out: Path, *, step: int = 4) -> dict[str, float]:
    """Mean error of the large case's field over the body, mm, at every 4th voxel."""
    disp_mm, _ = transforms.read_field(out / "results" / "large" / "large_1Warp.nii.gz")
    some = (slice(None, None, step),) * 3
    points = np.stack(np.mgrid[tuple(slice(0, n, step) for n in _LARGE)], axis=-1)
    points = points * _LARGE_MM
    truth = known_mm(points)
    body = nifti.read_image(out / "fixed.nii").data[some] > -300
    ends = np.minimum(points[..., 2], _LARGE[2] - points[..., 2]) < _ENDS_MM
    error = np.linalg.norm(disp_mm[some] - truth, axis=-1)
    size = np.linalg.norm(truth, axis=-1)
    return {
        f"{name}{where}": round(float(values[mask].mean()), 2)
        for name, values in (("without", size), ("error", error))
        for where, mask in (("", body), ("_ends", body & ends))
    }


def measure(data: Path, steps: list[int]) -> list[dict]:
    """One row per window choice and number of refining steps."""
    moving = stacked(data)
    points = np.stack(np.indices(moving.shape), axis=-1) * _SPACING_MM
    truth = known_mm(points)
    coords = np.moveaxis((points + truth) / _SPACING_MM, -1, 0)
    fixed = ndimage.map_coordinates(moving, coords, order=1, mode="nearest")
    pair = [np.rint(hu).astype(np.int16) for hu in (fixed, moving)]
    body = fixed > -300
    height = points[..., 2]
    ends = np.minimum(height, height.max() - height) < _ENDS_MM
    model = registration.load_model(flags.FLAGS.weights)
    grid = np.diag([_SPACING_MM] * 3 + [1.0])
    rows = []
    for fov in ("crop", "tiles", "whole"):
        for iterations in steps:
            started = time.process_time()
            result = registration.register(
                *pair,
                task="chest",
                pair_type="intra",
                affine="none",
                fov=fov,
                weights=model,
                fixed_vox2world=grid,
                moving_vox2world=grid,
                refine=registration.Plan(iterations) if iterations else None,
            )
            error = np.linalg.norm(result.disp_mm - truth, axis=-1)
            jump = np.linalg.norm(np.diff(result.disp_mm, axis=2), axis=-1)
            both = body[:, :, 1:] & body[:, :, :-1]
            rows.append(
                {
                    "fov": fov,
                    "refining": iterations,
                    "windows": result.settings["windows"],
                    "body_covered": round(result.settings["body_covered"], 2),
                    "error_mm": round(float(error[body].mean()), 2),
                    "error_ends_mm": round(float(error[body & ends].mean()), 2),
                    "p99_step_mm": round(float(np.percentile(jump[both], 99)), 2),
                    "fold_percent_network": round(result.qc["fold_percent_network"], 3),
                    "cpu_s": round(time.process_time() - started, 1),
                }
            )
            print(json.dumps(rows[-1]), flush=True)
    size = np.linalg.norm(truth, axis=-1)
    print(
        f"without: {size[body].mean():.2f} mm, ends {size[body & ends].mean():.2f} mm"
    )
    return rows


def main(argv) -> None:
    del argv
    data = Path(flags.FLAGS.data)
    if flags.FLAGS.large is None:
        measure(data, [int(n) for n in flags.FLAGS.refining])
    elif (out := Path(flags.FLAGS.large)) and (out / "results" / "large").is_dir():
        print(json.dumps(large_error(out)))
    else:
        write_large(data, out)


if __name__ == "__main__":
    # Here, so that one script can import another.
    flags.DEFINE_string("weights", real_pairs.WEIGHTS, "File, or name in the package.")
    flags.DEFINE_string("data", None, "Folder of real scans.", required=True)
    flags.DEFINE_list("refining", ["0", "50"], "Steps of instance optimisation.")
    flags.DEFINE_string("large", None, "Where the large pair lies.")
    cli.run(main)
