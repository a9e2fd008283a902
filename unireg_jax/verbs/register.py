"""`unireg register`: one pair of scans -> transform and warped image."""

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from unireg_jax import registration
from unireg_jax.errors import USAGE, UserError, shown
from unireg_jax.evaluation import metrics
from unireg_jax.imaging import nifti, orientation, transforms
from unireg_jax.tasks import TASKS
from unireg_jax.verbs import options, outputs, versions
from unireg_jax.verbs.messages import number, progress

HELP = "one pair of scans -> transform and warped image"

SCHEMA = 1  # of <case>_run.json
# Spelled here so that --help imports no JAX; a test compares them.
AFFINES = ("auto", "none", "com", "rigid", "affine", "features", "coarse")
TYPES = ("inter", "intra")
IO_FEATURES = ("image", "mind", "sam")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Of this verb."""
    parser.description = (
        "Writes into OUT/CASE: CASE_warped.nii.gz, the moving image on the fixed "
        "grid; CASE_1Warp.nii.gz, the whole map as one displacement field in mm "
        "(works alone in ITK, ANTs, Slicer); CASE_Composite.h5, the same map as "
        "affine and field; CASE_0GenericAffine.txt, the pre-alignment, for "
        "information: it is part of the other two; CASE_run.json, settings, quality "
        "and timings."
    )
    add = parser.add_argument
    add("-f", "--fixed", required=True, metavar="FILE", help="NIfTI that stays")
    add("-m", "--moving", required=True, metavar="FILE", help="NIfTI to be warped")
    add("-o", "--out", required=True, metavar="DIR", help="folder, made if absent")
    add(
        "--task",
        required=True,
        choices=(*sorted(TASKS), "none"),
        help="what is registered; none: without the network",
    )
    add("--type", choices=TYPES, help="default: the usual one of the task")
    options.add_weights(parser)
    add(
        "--affine",
        choices=AFFINES,
        default="auto",
        help="pre-alignment, default auto; features: by points matched by the "
        "anatomical embedding; coarse: and a coarse displacement through them",
    )
    add(
        "--io-iterations",
        type=options.count,
        default=0,
        metavar="N",
        help="steps of instance optimisation on this pair, default 0",
    )
    add(
        "--io-features",
        choices=IO_FEATURES,
        help="what it compares, default image; sam: the anatomical embedding of "
        "$UNIREG_SAM, then the package's",
    )
    add(
        "--io-smoothness",
        type=options.weight,
        metavar="X",
        help="weight of its smoothness, default 4",
    )
    add("--fixed-label", metavar="FILE", help="with --moving-label: DSC in the record")
    add("--moving-label", metavar="FILE", help="labels to be warped too")
    add("--fixed-mask", metavar="FILE", help="where scans are compared, default body")
    add("--case", metavar="NAME", help="default: FIXED__MOVING")
    options.add_overwrite(parser, "the results of the case")
    options.add_messages(parser)


def run(args: argparse.Namespace) -> int:
    """Exit code."""
    started = time.perf_counter()
    case = outputs.case_name(args.case, args.fixed, args.moving)
    options.both_labels(args)
    if not args.io_iterations and (args.io_features or args.io_smoothness is not None):
        raise UserError(
            "schema",
            "--io-features and --io-smoothness need --io-iterations of at least 1",
            USAGE,
        )
    say = progress(args.quiet)
    with outputs.case_folder(Path(args.out), case, args.overwrite) as folder:
        say("reading")
        # Before JAX is imported: a wrong file is refused within a second.
        fixed, moving, labels, mask = _read_inputs(args)
        read = time.perf_counter() - started
        if registration.use_compilation_cache() is None:
            say("warning: no folder of yours for compiled programs: set UNIREG_CACHE")
        model = registration.load_model(args.weights)
        result = registration.register(
            fixed,
            moving,
            task=args.task,
            pair_type=args.type,
            weights=model,
            affine=args.affine,
            fixed_mask=mask,
            refine=_plan(args),
            progress=say,
        )
        say("writing")
        _write(folder / case, result, fixed, say)
        scores = _score(folder / case, result, labels, fixed) if labels else None
        record = _record(args, case, result, model, (fixed, moving))
        record["scores"] = scores
        record["outputs"] = {
            f.name: outputs.digest(f) for f in sorted(folder.iterdir())
        }
        total = time.perf_counter() - started
        record["timings"] |= {"read": round(read, 3), "total": round(total, 3)}
        text = json.dumps(record, indent=2, allow_nan=False) + "\n"
        (folder / f"{case}_run.json").write_text(text, encoding="utf-8")
    _summarize(say, record, Path(args.out) / case)
    if args.json:
        sys.stdout.write(text)
        sys.stdout.flush()
    return 0


def _plan(args: argparse.Namespace) -> Any:
    """Of the instance optimisation, or None."""
    given = {"features": args.io_features, "smoothness": args.io_smoothness}
    given = {name: value for name, value in given.items() if value is not None}
    return (
        registration.Plan(args.io_iterations, **given) if args.io_iterations else None
    )


def _read_inputs(args: argparse.Namespace):
    """Images, label maps (or None) and mask (or None), on matching grids."""
    fixed, moving = nifti.read_image(args.fixed), nifti.read_image(args.moving)
    labels = mask = None
    if args.fixed_label:
        labels = [nifti.read_labels(p) for p in (args.fixed_label, args.moving_label)]
        for image, label in zip((fixed, moving), labels, strict=True):
            nifti.check_same_grid(image, label)
    if args.fixed_mask:
        volume = nifti.read_labels(args.fixed_mask)
        nifti.check_same_grid(fixed, volume)
        mask = volume.data > 0
    return fixed, moving, labels, mask


def _write(prefix: Path, result, fixed, say: Callable[[str], None]) -> None:
    """The transform in three spellings, and the warped image."""
    nifti.write_like(f"{prefix}_warped.nii.gz", result.warped, fixed)
    grid = {"vox2world": result.vox2world, "like": fixed}
    transforms.write_field(f"{prefix}_1Warp.nii.gz", result.disp_mm, **grid)
    transforms.write_affine_txt(f"{prefix}_0GenericAffine.txt", result.affine)
    axes = result.vox2world[:3, :3] / np.array(fixed.spacing_mm)
    if np.abs(axes.T @ axes - np.eye(3)).max() > 1e-4:
        say("warning: no Composite.h5: ITK cannot hold the shear of the fixed grid")
        return
    residual = registration.residual_mm(result)
    path = f"{prefix}_Composite.h5"
    transforms.write_composite(path, result.affine, residual, **grid)


def _score(prefix: Path, result, labels, fixed) -> dict[str, Any]:
    """DSC as the scans lie, pre-aligned, and registered; writes the warped labels."""
    target, source = labels
    stages = metrics.warp_stages(
        result.disp_mm, result.vox2world, result.affine, source, target
    )
    names = {"before": "initial", "affine": "affine", "": "network"}
    warped = {ending: stages[stage] for ending, stage in names.items()}
    nifti.write_like(f"{prefix}_warped_label.nii.gz", warped[""], fixed)
    return metrics.overlap(target, source, warped, surface=False)


def _record(args, case: str, result, model, volumes) -> dict[str, Any]:
    """What was done, with what, and how well; no absolute path, no header text."""
    inputs = {}
    for name, volume in zip(("fixed", "moving"), volumes, strict=True):
        native = volume.native
        inputs[name] = {
            **outputs.digest(Path(volume.path)),
            "name": Path(volume.path).name,
            "shape": list(native.shape),
            "spacing_mm": list(orientation.spacing_mm(native.vox2world)),
            "axes": orientation.axis_codes(native.vox2world),
        }
    for name in ("fixed_label", "moving_label", "fixed_mask"):
        if path := getattr(args, name):
            inputs[name] = {**outputs.digest(Path(path)), "name": Path(path).name}
    warnings = [
        f"{name}: {line}"
        for name, volume in zip(("fixed", "moving"), volumes, strict=True)
        for line in volume.warnings
    ]
    warnings += [*result.warnings, *registration.quality_warnings(result.qc)]
    return metrics.as_json(
        {
            "schema": SCHEMA,
            "case": case,
            "status": "warn" if warnings else "ok",
            "warnings": warnings,
            "settings": result.settings,
            "inputs": inputs,
            "weights": {
                key: model.spec.get(key)
                for key in ("sha256", "architecture", "features", "preprocess")
            },
            "affine": result.affine.tolist(),
            "qc": result.qc,
            "versions": {
                "unireg": versions.version(),
                "python": platform.python_version(),
                **{name: versions.version(name) for name in versions.PACKAGES},
            },
            "device": registration.device(),
            "peak_mib": versions.peak_mib(),
            "timings": result.timings,
        }
    )


def _summarize(say: Callable[[str], None], record: dict[str, Any], where: Path) -> None:
    """Two lines for the person at the terminal."""
    qc, scores = record["qc"], record["scores"]
    line = (
        f"NCC {number(qc['ncc_before'])} -> {number(qc['ncc_after'])}, longest "
        f"vector after pre-alignment {number(qc['max_mm'])} mm, folding "
        f"{number(qc['fold_percent'])} %"
    )
    if scores:
        mean = scores["mean"]
        steps = (mean[k] for k in ("dsc_before", "dsc_affine", "dsc") if k in mean)
        line += f", mean DSC {' -> '.join(map(number, steps))}"
    say(line)
    for warning in record["warnings"]:
        say(f"warning: {warning}")
    say(f"done in {record['timings']['total']:.1f} s: {shown(where)}")
