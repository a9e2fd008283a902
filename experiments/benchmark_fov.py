"""A scan taller than the network's window: crop, tiles and one larger window.

    python -m experiments.benchmark_fov --data=FOLDER

Two real scans stacked (an abdomen with pelvis, and the chest of another patient, at
3 mm, 579 mm high) are the moving scan; the fixed one is the same, deformed by a known
smooth field of 6 mm on average. The packaged weights look through 384 x 384 x 320 mm.
Prints the mean error of the field over the body, at all heights and in the outer 80 mm,
and how much it changes from slice to slice there where windows meet.
"""

import json
import time
from pathlib import Path

import numpy as np
from absl import flags
from scipy import ndimage

from experiments import cli
from unireg_jax import registration
from unireg_jax.imaging import nifti
from unireg_jax.imaging.nifti import Volume

_SPACING_MM = 3.0
_SIDES = (136, 112)  # voxels
_DROP = 30  # slices of the chest scan, which show the abdomen again
_ENDS_MM = 80.0


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
    model = registration.load_model()
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
    measure(Path(flags.FLAGS.data), [int(n) for n in flags.FLAGS.refining])


if __name__ == "__main__":
    # Here, so that one script can import another.
    flags.DEFINE_string("data", None, "Folder of real scans.", required=True)
    flags.DEFINE_list("refining", ["0", "50"], "Steps of instance optimisation.")
    cli.run(main)
