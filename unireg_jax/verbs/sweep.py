"""`unireg sweep`: one pair under every task and pair type."""

import argparse
import csv
import importlib.util
import json
import sys
import textwrap
from pathlib import Path
from typing import Any

from unireg_jax import registration
from unireg_jax.errors import USAGE, UserError, shown
from unireg_jax.evaluation import metrics
from unireg_jax.imaging import nifti, scans
from unireg_jax.verbs import files, options, results, versions
from unireg_jax.verbs.messages import progress, warn

HELP = "one pair under every task and pair type: similarity against folding"

SCHEMA = 2
COLUMNS = (
    *("region", "type", "task", "ncc_before", "ncc_after"),
    *(
        "fold_percent_network",
        "sdlogj_network",
        "max_mm_network",
        "p99_mm_network",
        "dsc",
    ),
)
EXAMPLES = """example:
  unireg sweep -f fixed.nii.gz -m moving.nii.gz --plot sweep.png > sweep.csv

One pass of the backbone serves all conditions. The first line is the pre-alignment
alone. All is measured over the fixed body on the network's grid, lengths anywhere on
it.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Of this verb."""
    text = (
        "Predicts the pair once for every body region and pair type and prints a "
        "table, CSV or --json: correlation before and after, folded share of the "
        "body, SDlogJ, longest vector, and with labels the mean Dice."
    )
    parser.description = textwrap.fill(text, 79)
    parser.epilog = EXAMPLES
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("-f", "--fixed", required=True, metavar="FILE", help="scan that stays")
    add("-m", "--moving", required=True, metavar="FILE", help="scan to be warped")
    text = "with --moving-label: Dice per row"
    add(*options.FIXED_LABEL, metavar="FILE", help=text)
    add(*options.MOVING_LABEL, metavar="FILE", help="labels of the moving scan")
    options.add_weights(parser)
    add(
        "--affine",
        choices=[kind for kind in results.AFFINES if kind != "coarse"],
        default="auto",
        help="pre-alignment of all rows, default auto (affine)",
    )
    add("--plot", metavar="FILE.png", help="similarity against folding, as a picture")
    options.add_overwrite(parser, "the picture")
    options.add_device(parser)
    options.add_messages(parser)


def run(args: argparse.Namespace) -> int:
    """Exit code."""
    options.both_labels(args)
    if args.plot:
        _check_plot(args)
    say = progress(args.quiet)
    say("reading")
    images = [scans.read_scan(path) for path in (args.fixed, args.moving)]
    labels = None
    if args.fixed_label:
        labels = tuple(
            scans.read_labels(path) for path in (args.fixed_label, args.moving_label)
        )
        for image, label in zip(images, labels, strict=True):
            nifti.check_same_grid(image, label)
    options.use_device(args)
    if registration.use_compilation_cache() is None:
        warn("no folder of yours for compiled programs: set UNIREG_CACHE")
    found = registration.sweep(
        *images, labels=labels, weights=args.weights, affine=args.affine, progress=say
    )
    for line in found.warnings:
        warn(line)
    if args.json:
        print(json.dumps(_report(found), indent=2, allow_nan=False))
    else:
        columns = [name for name in COLUMNS if name in found.rows[0]]
        table = csv.writer(sys.stdout, lineterminator="\n")
        table.writerow(columns)
        for row in found.rows:
            table.writerow([_cell(row[name]) for name in columns])
    sys.stdout.flush()
    if args.plot:  # after the table: a full disk takes the picture alone
        draw(Path(args.plot), found.rows)
        say(f"picture: {shown(args.plot)}")
    return 0


def _report(found: Any) -> dict[str, Any]:
    return metrics.as_json(
        {
            "schema": SCHEMA,
            "rows": found.rows,
            "settings": found.settings,
            "affine": found.affine.tolist(),
            "warnings": list(found.warnings),
            "timings": found.timings,
            "device": registration.device(),
            "versions": {"unireg": versions.version()},
        }
    )


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def _check_plot(args: argparse.Namespace) -> None:
    """Refuses what could not be written, before any work."""
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError(
            "not_installed",
            "--plot: package matplotlib expected, got none; run `pip install "
            "unireg-jax[report]`, or leave --plot out",
            USAGE,
        )
    inputs = (args.fixed, args.moving, args.fixed_label, args.moving_label)
    files.output(args.plot, (".png",), overwrite=args.overwrite, inputs=inputs)


def draw(path: Path, rows: list[dict[str, Any]]) -> None:
    """Writes `chart` as a picture.

    Args:
        path: PNG to be written.
        rows: of registration.Sweep.

    Raises:
        UserError: `storage`.
    """
    figure = chart(rows)
    with nifti.atomic_path(path) as temp:
        figure.savefig(temp, format="png", dpi=110)


def chart(rows: list[dict[str, Any]]) -> Any:
    """Draws similarity and, where there is one, Dice against folding.

    Args:
        rows: of registration.Sweep.

    Returns:
        matplotlib Figure.
    """
    import matplotlib.figure  # an extra: only who draws needs it

    axes_of = [("ncc_after", "correlation after")]
    if "dsc" in rows[0]:
        axes_of.append(("dsc", "mean Dice"))
    figure = matplotlib.figure.Figure(
        figsize=(6.2 * len(axes_of) + 1.6, 4.8), layout="constrained"
    )
    regions = list(dict.fromkeys(row["region"] for row in rows if row["region"]))
    for axes, (name, label) in zip(
        figure.subplots(1, len(axes_of), squeeze=False)[0], axes_of, strict=True
    ):
        for row in rows:
            if row[name] is None or row["fold_percent_network"] is None:
                continue
            if row["region"] is None:
                axes.axhline(row[name], color="0.6", linestyle="--", zorder=0)
                axes.annotate(
                    "pre-alignment",
                    (1, row[name]),
                    xycoords=("axes fraction", "data"),
                    xytext=(-4, 4),
                    textcoords="offset points",
                    ha="right",
                    color="0.4",
                    fontsize=8,
                )
                continue
            axes.scatter(
                row["fold_percent_network"],
                row[name],
                s=60,
                alpha=0.8,  # of two in one place both show
                edgecolors="white",
                color=f"C{regions.index(row['region'])}",
                marker="o" if row["type"] == "inter" else "^",
                label=f"{row['region']} {row['type']}",
            )
        axes.set_xlabel("folded share of the body, %")
        axes.set_ylabel(label)
        axes.margins(0.15)
        axes.grid(alpha=0.25)
    # Beside the axes: within them it hides points.
    figure.legend(
        *axes.get_legend_handles_labels(),
        fontsize=8,
        title="task",
        title_fontsize=8,
        loc="outside right center",
    )
    figure.suptitle("one pair under every task and pair type")
    return figure
