"""`unireg warp-points`: points through a transform."""

import argparse

import numpy as np

from unireg_jax.errors import shown
from unireg_jax.imaging import mapping, points
from unireg_jax.verbs import files, options
from unireg_jax.verbs.messages import number, progress, warn

HELP = "points through a transform"

_ENDINGS = (".csv", ".fcsv", ".json")
_OF_THE_PAIR = ("grid_mismatch", "no_overlap")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Of this verb."""
    parser.description = (
        "Sends points of the fixed scan to the moving one. A registration leads this "
        "way: images come back along it, points go forth. Points of the moving scan "
        "need the transform back, see `unireg invert`, and --of moving."
    )
    parser.epilog = (
        "example: unireg warp-points --points fixed.csv --space lps -t c_1Warp.nii.gz "
        "-o moving.csv"
    )
    add = parser.add_argument
    add(
        *("-p", "--points"),
        required=True,
        metavar="FILE",
        help=".csv with columns x, y, z, or landmarks of `unireg evaluate`; Slicer's "
        ".fcsv or .mrk.json",
    )
    add(
        "--of",
        choices=tuple(points.SCANS),
        default="fixed",
        help="whose points they are, default fixed; moving: with the transform back",
    )
    files.add_transforms(parser)
    files.add_out(parser, ".csv, .fcsv or .mrk.json")
    add(
        "--space",
        type=_space,
        choices=points.SPACES,
        help="of the coordinates, mm or voxels (also ijk) from 0 as stored; Slicer's "
        "files tell",
    )
    add(
        "--out-space",
        type=_space,
        choices=points.SPACES,
        help="of the result, default the same; lps in a .csv made of a file of Slicer, "
        "which cannot tell",
    )
    add(
        *("-f", "--fixed"),
        metavar="FILE",
        help="fixed scan of the pair, whichever way points go: for voxels, and to "
        "check that the transform is this pair's",
    )
    add("-m", "--moving", metavar="FILE", help="moving scan, for the same")
    options.add_messages(parser)


def _space(text: str) -> str:
    """ijk, as Slicer and NumPy's users call it, is voxel."""
    return "voxel" if text == "ijk" else text


def run(args: argparse.Namespace) -> int:
    """Exit code."""
    inputs = (args.points, *args.transforms)
    files.output(args.file, _ENDINGS, overwrite=args.overwrite, inputs=inputs)
    say = progress(args.quiet)
    fixed, moving = files.read_grid(args.fixed), files.read_grid(args.moving)
    # The transform back starts from the moving scan: that is its fixed one.
    start, end = (fixed, moving) if args.of == "fixed" else (moving, fixed)
    given = points.read_file(args.points, args.space, start, scan=args.of)
    whole, warnings = files.read_chain(args.transforms, fixed=start, moving=end)
    if args.of == "moving":
        note = "(--of moving: the fixed scan is that of --moving here)"
        warnings = [
            f"{line} {note}" if line.startswith(_OF_THE_PAIR) else line
            for line in warnings
        ]
    lost = points.unplaced(given)
    if lost and not args.file.lower().endswith(".json"):  # markups keep them
        warnings.append(
            f"no place in {shown(args.points)}: {', '.join(lost)}; left out, so that "
            "rows of a table stand elsewhere"
        )
    moved = mapping.points(whole, given.xyz)
    found = given._replace(xyz=moved)
    space = points.write_file(args.file, found, args.out_space, end)
    way = np.linalg.norm(moved - given.xyz, axis=1)
    beyond = int((~mapping.within(whole, given.xyz)).sum())
    if beyond:
        warnings.append(
            f"fov: {beyond} of {len(way)} points lie beyond the grid of the "
            "displacements, which are zero there"
        )
    for line in warnings:
        warn(line)
    say(
        f"done: {shown(args.file)}, {len(way)} points moved by {number(way.mean())} "
        f"mm in the mean, {number(way.max())} mm at most; {space}"
    )
    files.report(
        args,
        "warp-points",
        count=len(way),
        beyond=beyond,
        mean_mm=float(way.mean()),
        max_mm=float(way.max()),
        space=space,
        warnings=warnings,
    )
    return 0
