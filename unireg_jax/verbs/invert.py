"""`unireg invert`: the transform back, and how well it leads back."""

import argparse

import numpy as np

from unireg_jax.errors import USAGE, UserError, bad_file, shown
from unireg_jax.imaging import mapping, nifti, transforms
from unireg_jax.imaging.inverse import check_inverse, doubts, invert
from unireg_jax.imaging.nifti import Volume
from unireg_jax.verbs import files, options
from unireg_jax.verbs.messages import number, progress, warn

HELP = "the transform back, and how well it leads back"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Of this verb."""
    parser.description = (
        "Writes the map from the moving scan back to the fixed one, found by fixed "
        "point iteration: one field on the grid of the moving scan, or the exact "
        "inverse of affines. An .h5 keeps the affines apart from the field, so that "
        "they act beyond its grid too. The residual |T(S(y)) - y| is reported in mm. "
        "Voxels that nothing within the grid of the displacements leads to get the "
        "edge continued."
    )
    parser.epilog = (
        "example: unireg invert -t c_1Warp.nii.gz -m moving.nii.gz "
        "-o c_1InverseWarp.nii.gz"
    )
    add = parser.add_argument
    files.add_transforms(parser)
    add(
        *("-m", "--moving", "--reference"),
        dest="moving",
        metavar="FILE",
        help="moving scan, whose grid the result has; not needed for affines",
    )
    add(
        "-f",
        "--fixed",
        metavar="FILE",
        help="fixed scan, for a Learn2Reg field, and to check that it is this pair's",
    )
    files.add_out(parser, ", ".join(mapping.USUAL))
    add(
        "--tolerance",
        type=files.positive,
        default=0.01,
        metavar="MM",
        help="largest residual of a solved voxel, default 0.01",
    )
    add(
        "--max-unsolved",
        type=options.weight,
        default=1.0,
        metavar="PERCENT",
        help="of the covered voxels; more end in exit code 8, default 1",
    )
    add(
        "--residual-out",
        metavar="FILE",
        help="the residual in mm as NIfTI, -1 where nothing leads to",
    )
    options.add_messages(parser)


def run(args: argparse.Namespace) -> int:
    """Exit code."""
    if mapping.spelling_of(args.file) == "l2r" and not args.fixed:
        raise UserError(
            "schema",
            f"--fixed: the scan whose voxels {shown(args.file)} leads to expected, got "
            "none; name it, or write an .h5",
            USAGE,
        )
    inputs = (args.moving, args.fixed, *args.transforms)
    files.output(args.file, (), overwrite=args.overwrite, inputs=inputs)
    if args.residual_out:
        endings = (".nii.gz", ".nii")
        names = (*inputs, args.file)
        files.output(args.residual_out, endings, overwrite=args.overwrite, inputs=names)
    say = progress(args.quiet)
    say("reading")
    fixed, moving = files.read_grid(args.fixed), files.read_grid(args.moving)
    whole, warnings = files.read_chain(args.transforms, fixed=fixed, moving=moving)
    parts = mapping.spelling_of(args.file) in ("itk", "affine-txt")  # without a grid
    if moving is None and (whole.fields or args.residual_out or not parts):
        raise UserError(
            "schema",
            "--moving: the scan that the transform leads to expected, got none; name "
            "it: its grid is that of the inverse and of its residual",
            USAGE,
        )
    if whole.fields:
        _check_spelling(args.file, moving)
    say("inverting")
    grid = mapping.grid_of(moving) if moving else mapping.Grid((2, 2, 2), np.eye(4))
    inverse = invert(whole, grid, tolerance_mm=args.tolerance)
    stats = inverse.stats
    del whole  # as large as the inverse
    check_inverse(inverse, args.transforms[0], args.max_unsolved)
    told = bool(warnings)
    for line in doubts(stats):
        if line.startswith("folding"):
            warnings.append(f"{line}; see --residual-out")
        elif not told:
            warnings.append(f"{line}: is --moving of this pair?")
    for line in warnings:
        warn(line)
    mapping.write(args.file, inverse.mapping, fixed=moving, moving=fixed)
    if args.residual_out:
        residual = np.nan_to_num(inverse.residual_mm, nan=-1)
        nifti.write_like(args.residual_out, residual, moving)
    say(
        f"done: {shown(args.file)}, residual {number(stats['residual_mean_mm'])} mm in "
        f"the mean, {number(stats['residual_max_mm'])} mm at most, "
        f"{number(stats['between_mean_mm'])} mm between voxels, "
        f"{number(stats['covered_percent'])} % of the grid covered"
    )
    files.report(args, "invert", **files.plain(stats), warnings=warnings)
    return 0


def _check_spelling(path: str, moving: Volume) -> None:
    """Refuses, before the work, a file that cannot hold a field on the moving grid."""
    kind = mapping.spelling_of(path)
    if kind == "affine-txt":
        wrong = "a name for displacements", "one for an affine", "use .nii.gz or .h5"
    elif kind == "itk" and transforms.has_shear(moving.vox2world):
        wrong = "a moving grid of perpendicular axes", "a shear", "use .nii.gz"
    else:
        return
    raise bad_file(path, "schema", *wrong, USAGE)
