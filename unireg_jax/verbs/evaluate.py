"""`unireg evaluate`: metrics of any transform."""

import argparse
import contextlib
import json
import sys
from pathlib import Path
from typing import Any

from unireg_jax.errors import UserError
from unireg_jax.evaluation import metrics
from unireg_jax.imaging import nifti, points
from unireg_jax.imaging.nifti import Volume
from unireg_jax.verbs import options, outputs
from unireg_jax.verbs.messages import number

HELP = "metrics of any transform"

SCHEMA = 1  # of the JSON


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Of this verb."""
    parser.description = (
        "Overlap, surface distance, landmark error and regularity of a displacement "
        "field (.nii.gz, mm) or an ITK composite (.h5). --json also names the "
        "definition of every number."
    )
    add = parser.add_argument
    add("-t", "--transform", required=True, metavar="FILE", help="field or composite")
    add("--fixed-label", metavar="FILE", help="with --moving-label: DSC and HD95")
    add("--moving-label", metavar="FILE", help="labels of the moving scan")
    add("--fixed-mask", metavar="FILE", help="foreground of sdlogj, default the labels")
    add("--landmarks", metavar="CSV", help="columns fixed_x_mm ... moving_z_mm, LPS")
    options.add_messages(parser, quiet=False)


def run(args: argparse.Namespace) -> int:
    """Exit code."""
    options.both_labels(args)
    labels = mask = pairs = None
    if args.fixed_label:
        labels = [nifti.read_labels(p) for p in (args.fixed_label, args.moving_label)]
    if args.fixed_mask:
        mask = nifti.read_labels(args.fixed_mask)
    if args.landmarks:
        pairs = points.read_points(args.landmarks)
    disp_mm, vox2world = metrics.read_transform(args.transform)
    # Of the field, its first component stands for the grid.
    field = Volume(disp_mm[..., 0], vox2world, path=args.transform)
    if mask is not None:
        nifti.check_same_grid(field, mask)
    report: dict[str, Any] = {
        "schema": SCHEMA,
        "transform": {
            **outputs.digest(Path(args.transform)),
            "name": Path(args.transform).name,
        },
    }
    if labels:
        target, source = labels
        still = disp_mm[:2, :2, :2] * 0
        before = metrics.warp_labels(still, vox2world, source, target)
        after = metrics.warp_labels(disp_mm, vox2world, source, target)
        warped = {"before": before, "": after}
        report |= metrics.overlap(target, source, warped)
        with contextlib.suppress(UserError):  # labels on another grid: no foreground
            nifti.check_same_grid(field, target)
            mask = mask or target
    if pairs:
        errors = metrics.landmark_errors(disp_mm, vox2world, pairs.fixed, pairs.moving)
        report["landmarks"] = metrics.summarize_errors(*errors)
    foreground = None if mask is None else mask.data > 0
    report["field"] = metrics.field_scores(disp_mm, vox2world, mask=foreground)
    report = metrics.as_json(report | {"definitions": metrics.DEFINITIONS})
    if args.json:
        text = json.dumps(report, indent=2, allow_nan=False) + "\n"
    else:
        text = _table(report)
    sys.stdout.write(text)
    sys.stdout.flush()
    return 0


def _table(report: dict[str, Any]) -> str:
    """The report for people."""
    lines = []
    if "labels" in report:
        names = ("dsc_before", "dsc", "hd95_mm_before", "hd95_mm")
        lines.append("label".ljust(10) + "".join(name.rjust(16) for name in names))
        for label, row in (*report["labels"].items(), ("mean", report["mean"])):
            cells = "".join(number(row.get(name)).rjust(16) for name in names)
            lines.append(label.ljust(10) + cells)
    for name, value in report.get("landmarks", {}).items():
        lines.append(f"{name.ljust(24)} {number(value)}")
    for name, value in report["field"].items():
        lines.append(f"{name.ljust(24)} {number(value)}")
    return "\n".join(lines) + "\n"
