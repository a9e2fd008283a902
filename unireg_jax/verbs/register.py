"""`unireg register`: one pair of scans -> transform and warped image."""

import argparse
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from unireg_jax import registration
from unireg_jax.errors import USAGE, UserError, shown
from unireg_jax.evaluation import metrics
from unireg_jax.manifest import NO_TASK, Case
from unireg_jax.verbs import judging, options, outputs, results
from unireg_jax.verbs.messages import number, progress, warn

HELP = "one pair of scans -> transform and warped image"
EXAMPLES = """examples:
  unireg register -f fixed.nii.gz -m moving.nii.gz --task abdomen -o results
  unireg register -f day1_dicom -m day2_dicom --task auto --type intra -o results
  unireg register -f f.nii.gz -m m.nii.gz --task chest -o results --reg-weight 2
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Of this verb."""
    text = (
        "Writes into OUT/CASE: CASE_warped.nii.gz, the moving image on the fixed "
        "grid; CASE_1Warp.nii.gz, the whole map as one displacement field in mm "
        "(works alone in ITK, ANTs, Slicer); CASE_Composite.h5, the same map as "
        "affine and field (none of a sheared fixed grid); CASE_0GenericAffine.txt, the "
        "pre-alignment, for information: it is part of the other two; CASE_run.json, "
        "settings, quality and timings; with --moving-label CASE_warped_label.nii.gz, "
        "with --write-inverse CASE_1InverseWarp.nii.gz, with --html qc.html. Scans are "
        "NIfTI; NRRD or MetaImage with the extra itk; a folder of DICOM slices with "
        "the extra dicom."
    )
    parser.description = textwrap.fill(text, 79)
    parser.epilog = EXAMPLES
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("-f", "--fixed", required=True, metavar="FILE", help="scan that stays")
    add("-m", "--moving", required=True, metavar="FILE", help="scan to be warped")
    add("-o", "--out", required=True, metavar="DIR", help="folder, made if absent")
    results.add_settings(parser, required=True)
    text = "with --moving-label: DSC in the record"
    add(*options.FIXED_LABEL, metavar="FILE", help=text)
    text = "labels to be warped, by themselves too"
    add(*options.MOVING_LABEL, metavar="FILE", help=text)
    add("--fixed-mask", metavar="FILE", help="where scans are compared, default body")
    add(
        "--init",
        metavar="FILE",
        help="pre-alignment of your own in place of --affine: ITK transform of affines "
        "(.txt, .tfm, .h5, ANTs' .mat), fixed point -> moving point, LPS mm",
    )
    add("--case", metavar="NAME", help="default: FIXED__MOVING")
    add(
        "--inverse-consistency",
        action="store_true",
        help="also register fixed to moving, which takes as long again, and measure "
        "how far there and back leads away",
    )
    judging.add_arguments(parser)
    options.add_overwrite(parser, "the results of the case")
    options.add_messages(parser)


def run(args: argparse.Namespace) -> int:
    """Exit code."""
    started = time.perf_counter()
    name = outputs.case_name(args.case, args.fixed, args.moving)
    if args.fixed_label is not None:
        options.both_labels(args)
    results.check_settings(args)
    if args.task == NO_TASK and (args.passes > 1 or args.symmetric):
        raise UserError(
            "schema",
            "--passes and --symmetric need a network, got --task none; name a task",
            USAGE,
        )
    if args.init and args.affine != "auto":
        raise UserError(
            "schema",
            f"--init and --affine {args.affine}: one pre-alignment expected, got two; "
            "leave one out",
            USAGE,
        )
    case = Case(
        name,
        args.fixed,
        args.moving,
        args.task,
        args.type,
        fixed_label=args.fixed_label,
        moving_label=args.moving_label,
        fixed_mask=args.fixed_mask,
        init=args.init,
    )
    say = progress(args.quiet)
    with outputs.case_folder(Path(args.out), name, args.overwrite) as folder:
        say("reading")
        # Before JAX is imported: a wrong file is refused within a second.
        inputs = results.Files().read(case)
        results.check_inverse_fits(args, inputs)
        read = time.perf_counter() - started
        options.use_device(args)
        if registration.use_compilation_cache() is None:
            warn("no folder of yours for compiled programs: set UNIREG_CACHE")
        model = registration.load_model(args.weights)
        result = registration.register(
            inputs.fixed,
            inputs.moving,
            task=args.task,
            pair_type=args.type,
            weights=model,
            affine=args.affine if inputs.init is None else inputs.init,
            fixed_mask=inputs.mask,
            progress=say,
            **results.session_settings(args),
        )
        back = None
        if args.inverse_consistency:
            back = _back(args, inputs, model, result.settings, say)
        say("writing")
        settings = results.settings_sha256(args, case)
        write = time.perf_counter()
        record = results.write(
            *(folder, inputs, result, model, settings),
            inverse=args.write_inverse,
            back_mm=back,
        )
        judge = time.perf_counter()
        judging.finish(args, folder, record, inputs, result)
        end = time.perf_counter()
        laps = {"read": read, "write": judge - write, "judge": end - judge}
        laps["total"] = end - started
        record["timings"] |= {lap: round(seconds, 3) for lap, seconds in laps.items()}
        text = results.seal(folder, record)
        judging.hold_back(args, folder, record)
    _summarize(say, record, Path(args.out) / name)
    if args.json:
        sys.stdout.write(text)
        sys.stdout.flush()
    return 0


def _back(args, inputs, model, settings, say) -> np.ndarray:
    """The map of the opposite registration, [X, Y, Z, 3] mm on moving."""
    say("fixed to moving")
    return registration.register(
        inputs.moving,
        inputs.fixed,
        task=settings["task"],
        pair_type=settings["pair_type"],
        weights=model,
        affine=args.affine if inputs.init is None else np.linalg.inv(inputs.init),
        progress=say,
        **results.session_settings(args),
    ).disp_mm


def _summarize(say: Callable[[str], None], record: dict[str, Any], where: Path) -> None:
    """Two lines for the person at the terminal."""
    qc, scores = record["qc"], record["scores"]
    line = (
        f"NCC {number(qc['ncc_before'])} -> {number(qc['ncc_after'])}, longest "
        f"vector after pre-alignment {number(qc['max_mm_network'])} mm, the map folds "
        f"in {number(record['quality']['fold_percent_body'])} % of the body"
    )
    if scores:
        names = [n for n in ("dsc_before", "dsc_affine", "dsc") if n in scores["mean"]]
        steps = metrics.shared_means(scores["labels"], names) or [None] * len(names)
        line += f", mean DSC {' -> '.join(map(number, steps))}"
    say(line)
    for warning in record["warnings"]:
        warn(warning)
    say(f"done in {record['timings']['total']:.1f} s: {shown(where)}")
