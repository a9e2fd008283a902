"""`unireg warp`: a scan or labels through a transform."""

import argparse

import numpy as np

from unireg_jax.errors import USAGE, UserError, bad_file, shown
from unireg_jax.imaging import belonging, mapping, nifti, scans
from unireg_jax.imaging.nifti import Volume
from unireg_jax.verbs import files, options
from unireg_jax.verbs.messages import number, one_line, progress, warn

HELP = "a scan or labels through a transform"

_ENDINGS = (".nii.gz", ".nii")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Of this verb."""
    parser.description = (
        "Brings the moving scan onto the grid of the fixed one: at each voxel x of the "
        "fixed grid the moving scan is read at T(x). The file has the geometry of the "
        "fixed scan and the type of the moving one."
    )
    parser.epilog = (
        "example: unireg warp -m moving_seg.nii.gz -f fixed.nii.gz -t c_1Warp.nii.gz "
        "-o warped_seg.nii.gz --interp label"
    )
    add = parser.add_argument
    add("-m", "--moving", required=True, metavar="FILE", help="scan or labels to warp")
    add(
        *("-f", "--fixed", "--reference"),
        dest="fixed",
        required=True,
        metavar="FILE",
        help="scan that gives the grid",
    )
    files.add_transforms(parser)
    files.add_out(parser, ".nii.gz or .nii")
    add(
        "--interp",
        choices=mapping.INTERPOLATIONS,
        help="default linear, for images. Labels need it: nearest, as register, batch "
        "and evaluate warp those that they measure; or label, the id with the largest "
        "trilinear share: smoother borders, so another DSC",
    )
    add(
        "--fill-value",
        type=files.number,
        metavar="X",
        help="beyond the moving scan; default air (-1000) for a CT, the smallest value "
        "of another image, 0 with label, and with nearest of whole numbers from 0 on",
    )
    add(
        "--inverse",
        action="store_true",
        help="refused: `unireg invert` makes the transform back",
    )
    options.add_messages(parser)


def run(args: argparse.Namespace) -> int:
    """Exit code."""
    if args.inverse:
        raise UserError(
            "schema",
            "--inverse: a transform that leads from the fixed to the moving scan "
            "expected; run `unireg invert` once and pass its file",
            USAGE,
        )
    inputs = (args.moving, args.fixed, *args.transforms)
    files.output(args.file, _ENDINGS, overwrite=args.overwrite, inputs=inputs)
    say = progress(args.quiet)
    say("reading")
    label = args.interp == "label"
    _check_fill(args.fill_value, label)
    fixed = scans.read_scan(args.fixed)
    moving = (scans.read_labels if label else scans.read_scan)(args.moving)
    if args.interp is None:
        _check_image(moving)
    interp = args.interp or "linear"
    whole, warnings = files.read_chain(args.transforms, fixed=fixed, moving=moving)
    grid = mapping.grid_of(fixed)
    if not label:
        warnings += belonging.similarity_warnings(whole, fixed, moving)
    for line in warnings:
        warn(line)
    fixed = scans.without_voxels(fixed)
    ids = label or (interp == "nearest" and _like_ids(moving.data))
    fill = 0 if ids else mapping.fill_of(moving.data)
    fill = fill if args.fill_value is None else args.fill_value
    moving, dtype = _stored(moving, fill, np.int32 if label else np.float32)
    say("warping")
    warped = mapping.resample(whole, moving, grid, interp=interp, fill=fill)
    say("writing")
    nifti.write_like(args.file, warped, fixed, dtype=dtype)
    say(f"done: {shown(args.file)}, {interp}, {number(fill)} outside")
    files.report(
        args,
        "warp",
        interp=interp,
        fill=fill,
        dtype=str(dtype),
        warnings=[one_line(line) for line in warnings],
    )
    return 0


def _check_image(moving: Volume) -> None:
    """Raises UserError, exit code 2, for labels, of which linear would make new ids."""
    if scans.like_labels(moving.data, background=0) and _patched(moving.data):
        raise bad_file(
            moving.path,
            "label_value",
            "an image, or --interp with a label map",
            f"whole values from 0 to {moving.data.max():g} that look like labels",
            "pass --interp nearest or label; linear if it is an image",
            USAGE,
        )


def _patched(data: np.ndarray) -> bool:
    """Whether most voxels equal a neighbour, as in labels; an image has slopes."""
    if np.unique(data[::4, ::4, ::4]).size <= 3:  # a mask may be thin
        return True
    for here, there in (
        (data[1:], data[:-1]),  # organs of a few voxels go on along some axis
        (data[:, 1:], data[:, :-1]),
        (data[..., 1:], data[..., :-1]),
    ):
        some = (here != 0) | (there != 0)
        if (here == there)[some].mean() > 0.5:
            return True
    return False


def _like_ids(data: np.ndarray) -> bool:
    """Whether voxels may be those of labels or a mask, of which 0 is background."""
    return bool(data.min() >= 0 and (data == np.rint(data)).all())


def _check_fill(fill: float | None, label: bool) -> None:
    """Raises UserError, exit code 2, for what no voxel can hold."""
    most = float(np.iinfo(np.int32).max if label else np.finfo(np.float32).max)
    if fill is None or (abs(fill) <= most and not (label and fill % 1)):
        return
    kind = "whole number" if label else "number"
    raise UserError(
        "schema",
        f"--fill-value: a {kind} from {-most:g} to {most:g} expected, got {fill:g}",
        USAGE,
    )


def _stored(moving: Volume, fill: float, wide: type) -> tuple[Volume, np.dtype]:
    """The volume in a type that holds `fill`, and the type to store: the file's own.

    `wide` is the type of voxels whose own does not hold it.
    """
    data = moving.data
    if data.dtype.kind in "iu" and np.array(fill).astype(data.dtype) != fill:
        data = data.astype(wide)
    dtype = data.dtype
    header = moving.header
    if tuple(header.get_data_shape()[:3]) != moving.native.shape:
        return moving._replace(data=data), dtype  # made for another format
    scaled = float(header["scl_slope"]) not in (0, 1) or float(header["scl_inter"])
    own = np.dtype(header.get_data_dtype()).newbyteorder("=")
    if data.dtype == moving.data.dtype and not scaled:
        fits = own.kind == "f" or np.array(fill).astype(own) == fill
        dtype = own if fits else dtype
    return moving._replace(data=data), dtype
