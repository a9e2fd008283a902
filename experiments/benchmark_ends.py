"""Where the moving scan ends inside the fixed body: does the map follow, or is it torn?

    python -m experiments.benchmark_ends --data=FOLDER

A chest is turned by 4 degrees about the body's axis and moved by 9 mm, with noise; the
fixed scan is the chest as it was. Of the moving scan there is everything ("whole"),
some ten centimetres of its length ("slab"), or a round field of view that cuts through
the body, padded around with -3024 HU ("rim"). The true map is known everywhere: prints
the distance to it over the fixed body, where the moving scan has the partner, and
beyond its end.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from absl import flags

from experiments import cli, real_pairs
from unireg_jax import registration
from unireg_jax.imaging import grids, mapping, nifti, preprocess
from unireg_jax.imaging.nifti import Volume
from unireg_jax.registration import Plan

_SCAN = "chest_lidc0001/ct.nii.gz"
_TURN_DEG, _SHIFT_MM, _NOISE_HU = 4.0, (6.0, -4.0, 5.0), 12.0
_SLAB = slice(60, 110)
_RIM = 0.36  # radius of the round field of view, parts of the scan's width
_PADDING_HU = -3024
_STEP = 3  # of the voxels where the map is looked at
_HEAD = (
    "| moving scan | after | mean mm | 95 % below | longest | beyond: mean | longest |"
)


def truth(fixed: Volume) -> np.ndarray:
    """The known map, [4, 4], fixed world -> moving world, LPS mm."""
    middle = np.append((np.array(fixed.data.shape) - 1) / 2, 1)
    middle = (fixed.vox2world @ middle)[:3]
    sine, cosine = (f(np.deg2rad(_TURN_DEG)) for f in (np.sin, np.cos))
    out = np.eye(4)
    out[:2, :2] = [[cosine, -sine], [sine, cosine]]
    out[:3, 3] = middle - out[:3, :3] @ middle + _SHIFT_MM
    return out


def moved(fixed: Volume) -> Volume:
    """The whole chest, moved by `truth`, on the fixed scan's grid."""
    back = np.linalg.inv(truth(fixed))
    hu = preprocess.resample(fixed, mapping.grid_of(fixed), fill=-1000, matrix=back)
    hu += np.random.default_rng(0).normal(0, _NOISE_HU, hu.shape)
    return fixed._replace(data=np.rint(hu).astype(np.int16))


def cases(whole: Volume) -> Iterator[tuple[str, Volume, np.ndarray]]:
    """Names, moving scans, and [X, Y, Z] bool, what of the whole one they hold."""
    everything = np.ones(whole.data.shape, bool)
    yield "whole", whole, everything
    held = np.zeros_like(everything)
    held[:, :, _SLAB] = True
    corner = whole.vox2world.copy()
    corner[:3, 3] = (corner @ (0, 0, _SLAB.start, 1))[:3]
    yield "slab", whole._replace(data=whole.data[:, :, _SLAB], vox2world=corner), held
    x, y = (np.arange(n) - n / 2 for n in whole.data.shape[:2])
    held = everything & (np.hypot(*np.ix_(x, y)) < _RIM * len(x))[..., None]
    yield "rim", whole._replace(data=np.where(held, whole.data, _PADDING_HU)), held


class Points(NamedTuple):
    """Where the map is looked at, in the fixed body.

    Attributes:
        index: [3, N] voxels of the fixed scan.
        disp_mm: [3, N] LPS mm, of the true map.
        partner: [3, N] nearest voxels of the whole moving scan, or beyond it.
    """

    index: np.ndarray
    disp_mm: np.ndarray
    partner: np.ndarray


def points(fixed: Volume) -> Points:
    """Every third voxel of the body along each axis."""
    some = (slice(None, None, _STEP),) * 3
    index = np.argwhere(preprocess.body_mask(fixed)[some]).T * _STEP
    world = grids.apply(fixed.vox2world, index)
    true = grids.apply(truth(fixed), world)
    partner = np.rint(grids.apply(np.linalg.inv(fixed.vox2world), true)).astype(int)
    return Points(index, true - world, partner)


def row(at: Points, held: np.ndarray, disp_mm: np.ndarray) -> str:
    """Distances of a whole map from the true one, mm.

    Args:
        at: on the grid of the map.
        held: [X, Y, Z] bool, voxels of the whole moving scan that were there.
        disp_mm: [X, Y, Z, 3] LPS mm.
    """
    error = np.linalg.norm(disp_mm[tuple(at.index)].T - at.disp_mm, axis=0)
    size = np.array(held.shape)[:, None]
    there = ((at.partner >= 0) & (at.partner < size)).all(axis=0)
    there[there] = held[tuple(at.partner[:, there])]
    near, far = error[there], error[~there]
    return (
        f"{near.mean():.2f} | {np.percentile(near, 95):.2f} | {near.max():.1f} | "
        f"{far.mean():.2f} | {far.max():.1f} |"
    )


def main(argv) -> None:
    del argv
    flag = flags.FLAGS
    fixed = nifti.read_image(Path(flag.data) / _SCAN)
    model = registration.load_model(flag.weights)
    plans = {"affine": None, "network": None}
    plans |= {f"`{kind}`": Plan(features=kind) for kind in ("image", "mind", "sam")}
    print(_HEAD + "\n" + "|---" * (_HEAD.count("|") - 1) + "|")
    at = points(fixed)
    for name, moving, held in cases(moved(fixed)):
        for what, plan in plans.items():
            result = registration.register(
                fixed,
                moving,
                task="none" if what == "affine" else "chest",
                affine="affine",
                weights=model,
                refine=plan,
            )
            print(f"| {name} | {what} | {row(at, held, result.disp_mm)}", flush=True)


if __name__ == "__main__":
    flags.DEFINE_string("weights", real_pairs.WEIGHTS, "File, or name in the package.")
    flags.DEFINE_string("data", None, "Folder of real scans.", required=True)
    cli.run(main)
