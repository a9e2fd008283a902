"""`unireg compose`: several transforms as one."""

import argparse

from unireg_jax.errors import shown
from unireg_jax.imaging import mapping
from unireg_jax.verbs import files, options
from unireg_jax.verbs.messages import progress, warn

HELP = "several transforms as one"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Of this verb."""
    parser.description = (
        "Chains transforms: the first one named acts first on a point of the fixed "
        "scan, as antsApplyTransforms lists them. An .h5 keeps every part exactly; "
        "other files hold one field on the grid of the fixed scan, or one affine."
    )
    parser.epilog = (
        "example: unireg compose -t fixed_to_atlas.h5 -t atlas_to_moving.h5 "
        "-o fixed_to_moving.h5"
    )
    files.add_transforms(parser)
    parser.add_argument(
        *("-f", "--fixed", "--reference"),
        dest="fixed",
        metavar="FILE",
        help="fixed scan, for a field on its grid",
    )
    parser.add_argument(
        *("-m", "--moving"), metavar="FILE", help="moving scan, for a Learn2Reg field"
    )
    files.add_out(parser, ", ".join(e for e in mapping.USUAL if e != ".npz"))
    options.add_messages(parser)


def run(args: argparse.Namespace) -> int:
    """Exit code."""
    mapping.spelling_of(args.file)
    endings = tuple(e for e in mapping.USUAL if e != ".npz")
    inputs = (args.fixed, args.moving, *args.transforms)
    files.output(args.file, endings, overwrite=args.overwrite, inputs=inputs)
    say = progress(args.quiet)
    say("reading")
    fixed, moving = files.read_grid(args.fixed), files.read_grid(args.moving)
    whole, warnings = files.read_chain(args.transforms, fixed=fixed, moving=moving)
    for line in warnings:
        warn(line)
    say("writing")
    mapping.write(args.file, whole, fixed=fixed)
    kinds = [mapping.kind_of(part) for part in whole.parts]
    say(f"done: {shown(args.file)}, of {', then '.join(kinds) or 'nothing'}")
    files.report(args, "compose", parts=kinds, warnings=warnings)
    return 0
