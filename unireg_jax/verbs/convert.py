"""`unireg convert`: a transform in the spelling of another tool."""

import argparse

from unireg_jax.errors import shown
from unireg_jax.imaging import mapping
from unireg_jax.verbs import files, options
from unireg_jax.verbs.messages import progress, warn

HELP = "a transform in the spelling of another tool"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Of this verb."""
    parser.description = (
        "itk: composite .h5 (ITK, ANTs, Slicer), every part kept. ants, nifti1007: "
        "field in LPS mm; nifti1006: in RAS mm. l2r: Learn2Reg field in voxels. "
        "slicer: NRRD field. affine-txt: ITK text. bids: .h5 or .txt under a name "
        "such as from-MOVING_to-FIXED_mode-image_xfm.h5. The map stays the same; see "
        "`unireg invert` for the way back."
    )
    parser.epilog = (
        "example: unireg convert -t c_1Warp.nii.gz --to l2r -f fixed.nii.gz "
        "-m moving.nii.gz -o disp_1_2.nii.gz"
    )
    add = parser.add_argument
    files.add_transforms(parser, one=True)
    add("--to", required=True, choices=tuple(mapping.SPELLINGS), help="spelling")
    add(
        *("-f", "--fixed", "--reference"),
        dest="fixed",
        metavar="FILE",
        help="fixed scan, on whose stored grid a field is written; default: the grid "
        "of the field that acts first",
    )
    add("-m", "--moving", metavar="FILE", help="moving scan, for l2r")
    files.add_out(parser, "that of the spelling")
    options.add_messages(parser)


def run(args: argparse.Namespace) -> int:
    """Exit code."""
    mapping.spelling_of(args.file, args.to)
    inputs = (args.fixed, args.moving, *args.transforms)
    files.output(args.file, (), overwrite=args.overwrite, inputs=inputs)
    say = progress(args.quiet)
    say("reading")
    fixed, moving = files.read_grid(args.fixed), files.read_grid(args.moving)
    whole = files.read_chain(args.transforms, fixed=fixed, moving=moving)
    if args.to == "l2r" and moving is None:
        warn(
            "no --moving: the field holds only if the moving scan lies on the "
            "grid of the fixed one"
        )
    say("writing")
    mapping.write(args.file, whole, args.to, fixed=fixed, moving=moving)
    say(f"done: {shown(args.file)}")
    files.report(args, "convert", to=args.to)
    return 0
