"""`unireg jacobian`: map and statistics of local volume change."""

import argparse
import sys

import numpy as np

from unireg_jax.errors import USAGE, UserError, shown
from unireg_jax.evaluation.regularity import measurable
from unireg_jax.imaging import mapping, nifti, scans
from unireg_jax.imaging.nifti import Volume
from unireg_jax.verbs import files, options
from unireg_jax.verbs.messages import number, progress, warn

HELP = "map and statistics of local volume change"

_ENDINGS = (".nii.gz", ".nii")
_FLOOR = 1e-9  # of the determinant, before the logarithm


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Of this verb."""
    parser.description = (
        "Determinant of the Jacobian of the whole map, affines included, by central "
        "differences: volume in the moving scan over volume in the fixed one; 0 or "
        "less where the map folds. Statistics go to stdout, the map to --out. Voxels "
        "at or beyond the border of the displacements, where it jumps, are left out "
        "of the statistics."
    )
    parser.epilog = (
        "example: unireg jacobian -t c_1Warp.nii.gz -o c_jacobian.nii.gz --log"
    )
    add = parser.add_argument
    files.add_transforms(parser)
    add(
        *("-f", "--fixed", "--reference"),
        dest="fixed",
        metavar="FILE",
        help="fixed scan that gives the grid; default: that of the field that acts "
        "first",
    )
    add("-m", "--moving", metavar="FILE", help="moving scan, for a Learn2Reg field")
    add("--mask", metavar="FILE", help="statistics where it is above 0, default all")
    files.add_out(parser, ".nii.gz or .nii", required=False)
    add("--log", action="store_true", help="write log max(determinant, 1e-9)")
    options.add_messages(parser)


def run(args: argparse.Namespace) -> int:
    """Exit code."""
    inputs = (args.fixed, args.moving, args.mask, *args.transforms)
    if args.file:
        files.output(args.file, _ENDINGS, overwrite=args.overwrite, inputs=inputs)
    say = progress(args.quiet)
    say("reading")
    fixed, moving = files.read_grid(args.fixed), files.read_grid(args.moving)
    whole, warnings = files.read_chain(args.transforms, fixed=fixed, moving=moving)
    for line in warnings:
        warn(line)
    target = fixed or _own_grid(whole)
    shape = target.data.shape
    if min(shape) < 2:
        raise UserError(
            "schema",
            "--fixed: a grid of 2 voxels or more along each axis expected, got "
            f"{'x'.join(map(str, shape))}; name a scan that has them",
            USAGE,
        )
    mask = None
    if args.mask:
        volume = scans.read_labels(args.mask)
        nifti.check_same_grid(target, volume)
        mask = volume.data > 0
    say("measuring")
    detj = mapping.jacobian(whole, mapping.grid_of(target))
    known = measurable(whole, mapping.grid_of(target))
    beyond = 100 * float(1 - known.mean())
    known = known if mask is None else known & mask
    ending = "_whole" if mask is None else ""
    stats = statistics(detj[known], ending) | {"beyond_percent": beyond}
    if args.file:
        out = np.log(np.maximum(detj, _FLOOR)) if args.log else detj
        nifti.write_like(args.file, out, target)
        say(f"done: {shown(args.file)}")
    if args.json:
        files.report(args, "jacobian", **files.plain(stats), warnings=warnings)
        return 0
    lines = [f"{name.ljust(19)} {number(value)}\n" for name, value in stats.items()]
    sys.stdout.write("".join(lines))
    sys.stdout.flush()
    return 0


def statistics(detj: np.ndarray, ending: str) -> dict[str, float]:
    """Of determinants [...]: their number, range, and share of folds.

    Returns:
        voxels; mean, min, p1, p99, max; sdlogj, the standard deviation of
        log max(determinant, 1e-9), and fold_percent, the share of 0 or less, whose
        names end in `ending`, as those of `evaluate` do.
    """
    if not detj.size:
        raise UserError(
            "empty",
            "--fixed, --mask: empty: expected one voxel or more within the "
            "displacements, got none; check both",
            USAGE,
        )
    logs = np.log(np.maximum(detj, _FLOOR))
    low, high = np.percentile(detj, (1, 99))
    return {
        "voxels": int(detj.size),
        "mean": float(detj.mean(dtype=np.float64)),
        "min": float(detj.min()),
        "p1": float(low),
        "p99": float(high),
        "max": float(detj.max()),
        f"sdlogj{ending}": float(logs.std(dtype=np.float64)),
        f"fold_percent{ending}": 100 * float((detj <= 0).mean()),
    }


def _own_grid(whole: mapping.Mapping) -> Volume:
    """Of the field that acts first, as a volume without voxels."""
    if not whole.parts or mapping.kind_of(whole.parts[0]) != "field":
        raise UserError(
            "schema",
            "--fixed: the scan that gives the grid expected, got none, and no field "
            "acts first; name it",
            USAGE,
        )
    grid = whole.parts[0].grid
    return Volume(np.broadcast_to(np.uint8(0), grid.shape), grid.vox2world)
