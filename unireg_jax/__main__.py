"""`python -m unireg_jax <verb>`: register, evaluate, export, weights, info.

Data goes to stdout, everything else to stderr. A user's mistake is one line and an exit
code of unireg_jax/errors.py; anything else is our fault and exit code 1.
"""

import argparse
import contextlib
import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import signal
import sys
import tempfile
import time
import traceback
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from unireg_jax.errors import CHECKPOINT, LIMIT, STORAGE, USAGE, UserError
from unireg_jax.tasks import TASKS

SCHEMA = 1  # of <case>_run.json and of evaluate's JSON
# Spelled here so that --help imports neither NumPy nor JAX; a test compares them.
AFFINES = ("auto", "none", "com", "rigid", "affine", "features", "coarse")
TYPES = ("inter", "intra")
IO_FEATURES = ("image", "mind", "sam")
OUTPUTS = (  # the record comes last: it says that a case is whole
    "warped.nii.gz",
    "1Warp.nii.gz",
    "0GenericAffine.txt",
    "Composite.h5",
    "warped_label.nii.gz",
    "run.json",
)
VARIABLES = ("UNIREG_WEIGHTS", "UNIREG_SAM")  # that name weights
_TENSORS = "*.safetensors"
_INTERNAL = 1
_VERSIONED = ("jax", "jaxlib", "flax", "numpy", "scipy", "nibabel")


def main(argv: list[str] | None = None) -> int:
    """Runs one verb.

    Args:
        argv: arguments without the program's name; None for the process's own.

    Returns:
        Exit code of unireg_jax/errors.py, 0 when all was done.

    Raises:
        SystemExit: 0 after --help and --version, 2 for a wrong command line.
    """
    # Before JAX is imported: with a warm compilation cache XLA reports as an error, for
    # every program, that `prefer-no-gather` is no feature of this CPU.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    argv = sys.argv[1:] if argv is None else argv
    args = _parser().parse_args([_dashes(word) for word in argv])
    try:
        with _terminable():
            return args.run(args)
    except UserError as error:
        return _complain(_with_reason(error), error.exit_code)
    except KeyboardInterrupt:
        return _complain("interrupted: nothing was written", 128 + signal.SIGINT)
    except BrokenPipeError:
        # Who read stdout has left: nothing more to say to them, also not at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return STORAGE
    except Exception as error:  # the one place where all else ends
        if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
            return _complain(
                "out_of_memory: more is needed than this machine has; crop the scans "
                "or use a larger machine",
                LIMIT,
            )
        return _internal(error, args)


# --- command line -------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    """Complains in one line."""

    def error(self, message):
        line = f"unireg: error: {_one_line(message)}; see `{self.prog} --help`\n"
        self.exit(USAGE, line)


def _parser() -> _Parser:
    parser = _Parser(
        prog="unireg", description="Registers CT scans of any body region."
    )
    parser.add_argument("--version", action="version", version=f"unireg {_version()}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    _add_register(verbs)
    _add_evaluate(verbs)
    _add_export(verbs)
    _add_weights(verbs)
    verb = verbs.add_parser("info", help="version, tasks and weights")
    verb.add_argument("--json", action="store_true", help="as JSON")
    verb.set_defaults(run=_info, debug=False, out=None)
    return parser


def _add_register(verbs) -> None:
    verb = verbs.add_parser(
        "register",
        help="one pair of scans -> transform and warped image",
        description="Writes into OUT/CASE: CASE_warped.nii.gz, the moving image on the "
        "fixed grid; CASE_1Warp.nii.gz, the whole map as one displacement field in mm "
        "(works alone in ITK, ANTs, Slicer); CASE_Composite.h5, the same map as affine "
        "and field; CASE_0GenericAffine.txt, the pre-alignment, for information: it is "
        "part of the other two; CASE_run.json, settings, quality and timings.",
    )
    add = verb.add_argument
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
    add(
        "--weights", metavar="FILE", help="default: $UNIREG_WEIGHTS, then the package's"
    )
    add(
        "--affine",
        choices=AFFINES,
        default="auto",
        help="pre-alignment, default auto; features: by points matched by the "
        "anatomical embedding; coarse: and a coarse displacement through them",
    )
    add(
        "--io-iterations",
        type=_count,
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
        type=_weight,
        metavar="X",
        help="weight of its smoothness, default 4",
    )
    add("--fixed-label", metavar="FILE", help="with --moving-label: DSC in the record")
    add("--moving-label", metavar="FILE", help="labels to be warped too")
    add("--fixed-mask", metavar="FILE", help="where scans are compared, default body")
    add("--case", metavar="NAME", help="default: FIXED__MOVING")
    add("--overwrite", action="store_true", help="replace the results of the case")
    add("--quiet", action="store_true", help="no progress on stderr")
    add("--json", action="store_true", help="the run record on stdout")
    add("--debug", action="store_true", help="trace of an internal error on stderr")
    verb.set_defaults(run=_register)


def _add_evaluate(verbs) -> None:
    verb = verbs.add_parser(
        "evaluate",
        help="metrics of any transform",
        description="Overlap, surface distance, landmark error and regularity of a "
        "displacement field (.nii.gz, mm) or an ITK composite (.h5). --json also names "
        "the definition of every number.",
    )
    add = verb.add_argument
    add("-t", "--transform", required=True, metavar="FILE", help="field or composite")
    add("--fixed-label", metavar="FILE", help="with --moving-label: DSC and HD95")
    add("--moving-label", metavar="FILE", help="labels of the moving scan")
    add("--fixed-mask", metavar="FILE", help="foreground of sdlogj, default the labels")
    add("--landmarks", metavar="CSV", help="columns fixed_x_mm ... moving_z_mm, LPS")
    add("--json", action="store_true", help="all numbers and definitions as JSON")
    add("--debug", action="store_true", help="trace of an internal error on stderr")
    verb.set_defaults(run=_evaluate, out=None)


def _add_export(verbs) -> None:
    verb = verbs.add_parser(
        "export",
        help="the network as a StableHLO file",
        description="Writes FILE, a program for CPU and CUDA with the weights inside, "
        "any batch size, which JAX alone can run, and beside it a .json: inputs, "
        "outputs, units, preprocessing, digests. It takes volumes on the network's "
        "grid; pre-alignment and files are not part of it.",
    )
    add = verb.add_argument
    add(
        *("-o", "--out"),
        dest="file",
        required=True,
        metavar="FILE",
        help="name ending in .stablehlo",
    )
    add(
        "--weights", metavar="FILE", help="default: $UNIREG_WEIGHTS, then the package's"
    )
    add("--shape", type=_grid, metavar="X,Y,Z", help="voxels, default of the weights")
    add("--overwrite", action="store_true", help="replace FILE and its .json")
    add("--quiet", action="store_true", help="no progress on stderr")
    add("--json", action="store_true", help="the description on stdout")
    add("--debug", action="store_true", help="trace of an internal error on stderr")
    verb.set_defaults(run=_export, out=None)


def _add_weights(verbs) -> None:
    verb = verbs.add_parser("weights", help="convert, list and verify weights")
    actions = verb.add_subparsers(dest="action", required=True, metavar="ACTION")

    verb = actions.add_parser(
        "convert",
        help="public SAM checkpoint (.pth) -> .safetensors",
        description="Reads the anatomical embedding network from a public SAM, SAMv2 "
        "or SAME checkpoint, without PyTorch and without running anything that is in "
        "the file, and writes it with its description (.json) beside it.",
        epilog="example: unireg weights convert --from SAM.pth --to sam.safetensors "
        '--licence "as its publisher says"',
    )
    add = verb.add_argument
    add("--from", dest="source", required=True, metavar="FILE", help=".pth to read")
    add(
        "--to",
        dest="file",
        required=True,
        metavar="FILE",
        help="name ending in .safetensors",
    )
    add("--licence", metavar="TEXT", help="of the checkpoint, for the description")
    add("--overwrite", action="store_true", help="replace FILE and its .json")
    add("--quiet", action="store_true", help="no progress on stderr")
    add("--json", action="store_true", help="the description on stdout")
    add("--debug", action="store_true", help="trace of an internal error on stderr")
    verb.set_defaults(run=_weights_convert, out=None)

    verb = actions.add_parser(
        "list",
        help="weights of the package, of the variables, and FILEs",
        description="Lists the package's weights, those that $UNIREG_WEIGHTS and "
        "$UNIREG_SAM name, and FILEs, each verified.",
        epilog="example: unireg weights list sam.safetensors --json",
    )
    verb.add_argument("files", nargs="*", metavar="FILE", help="more .safetensors")
    verb.add_argument("--json", action="store_true", help="as JSON")
    verb.set_defaults(run=_weights_list, debug=False, out=None)

    verb = actions.add_parser(
        "verify",
        help="digest, description and numbers of one file",
        description="Says ok when the tensors have the digest that the description "
        "beside them names and all numbers are finite; else what is wrong, and exit "
        "code 9.",
        epilog="example: unireg weights verify sam.safetensors",
    )
    verb.add_argument("file", metavar="FILE", help=".safetensors")
    verb.add_argument("--json", action="store_true", help="as JSON")
    verb.set_defaults(run=_weights_verify, debug=False, out=None)


def _grid(text: str) -> tuple[int, ...]:
    """X,Y,Z of a network grid."""
    words = text.split(",")
    shape = tuple(int(word) for word in words if word.strip().isdecimal())
    if len(words) != 3 or len(shape) != 3 or any(n < 16 or n % 16 for n in shape):
        raise argparse.ArgumentTypeError(
            f"three multiples of 16 such as 96,96,80 expected, got {text[:40]!r}"
        )
    return shape


def _count(text: str) -> int:
    """Number of iterations."""
    if not text.isdecimal() or not text.isascii() or int(text) > 10_000:
        raise argparse.ArgumentTypeError(
            f"a whole number from 0 to 10000 expected, got {text[:40]!r}"
        )
    return int(text)


def _weight(text: str) -> float:
    """A finite weight."""
    try:
        weight = float(text)
    except ValueError:
        weight = -1.0
    if not 0 <= weight < float("inf"):
        raise argparse.ArgumentTypeError(
            f"a number of at least 0 such as 1.5 expected, got {text[:40]!r}"
        )
    return weight


def _dashes(word: str) -> str:
    """--fixed_label is --fixed-label."""
    if not word.startswith("--"):
        return word
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value


# --- register -----------------------------------------------------------------------


def _register(args: argparse.Namespace) -> int:
    started = time.perf_counter()
    case = _case(args)
    _both_labels(args)
    if not args.io_iterations and (args.io_features or args.io_smoothness is not None):
        raise UserError(
            "schema",
            "--io-features and --io-smoothness need --io-iterations of at least 1",
            USAGE,
        )
    say = _progress(args.quiet)
    with _case_folder(Path(args.out), case, args.overwrite) as folder:
        say("reading")
        # Before JAX is imported: a wrong file is refused within a second.
        fixed, moving, labels, mask = _read_inputs(args)
        read = time.perf_counter() - started
        from unireg_jax.registration import compilation_cache, network, pipeline
        from unireg_jax.registration.refine import Plan

        if compilation_cache.use_compilation_cache() is None:
            say("warning: no folder of yours for compiled programs: set UNIREG_CACHE")
        model = network.load_model(args.weights)
        options = {"features": args.io_features, "smoothness": args.io_smoothness}
        options = {k: v for k, v in options.items() if v is not None}
        plan = Plan(args.io_iterations, **options) if args.io_iterations else None
        result = pipeline.register(
            fixed,
            moving,
            task=args.task,
            pair_type=args.type,
            weights=model,
            affine=args.affine,
            fixed_mask=mask,
            refine=plan,
            progress=say,
        )
        say("writing")
        _write(folder / case, result, fixed, say)
        scores = _score(folder / case, result, labels, fixed) if labels else None
        record = _record(args, case, result, model, (fixed, moving))
        record["scores"] = scores
        record["outputs"] = {f.name: _digest(f) for f in sorted(folder.iterdir())}
        total = time.perf_counter() - started
        record["timings"] |= {"read": round(read, 3), "total": round(total, 3)}
        text = json.dumps(record, indent=2, allow_nan=False) + "\n"
        (folder / f"{case}_run.json").write_text(text, encoding="utf-8")
    _summarize(say, record, Path(args.out) / case)
    if args.json:
        sys.stdout.write(text)
        sys.stdout.flush()
    return 0


def _read_inputs(args: argparse.Namespace):
    """Images, label maps (or None) and mask (or None), on matching grids."""
    from unireg_jax.imaging import nifti

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
    import numpy as np

    from unireg_jax.imaging import nifti, transforms
    from unireg_jax.registration import pipeline

    nifti.write_like(f"{prefix}_warped.nii.gz", result.warped, fixed)
    grid = {"vox2world": result.vox2world, "like": fixed}
    transforms.write_field(f"{prefix}_1Warp.nii.gz", result.disp_mm, **grid)
    transforms.write_affine_txt(f"{prefix}_0GenericAffine.txt", result.affine)
    axes = result.vox2world[:3, :3] / np.array(fixed.spacing_mm)
    if np.abs(axes.T @ axes - np.eye(3)).max() > 1e-4:
        say("warning: no Composite.h5: ITK cannot hold the shear of the fixed grid")
        return
    residual = pipeline.residual_mm(result)
    path = f"{prefix}_Composite.h5"
    transforms.write_composite(path, result.affine, residual, **grid)


def _score(prefix: Path, result, labels, fixed) -> dict[str, Any]:
    """DSC as the scans lie, pre-aligned, and registered; writes the warped labels."""
    from unireg_jax.imaging import nifti
    from unireg_jax.registration import metrics

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
    import jax

    from unireg_jax.imaging import orientation
    from unireg_jax.registration import metrics, pipeline

    inputs = {}
    for name, volume in zip(("fixed", "moving"), volumes, strict=True):
        native = volume.native
        inputs[name] = {
            **_digest(Path(volume.path)),
            "name": Path(volume.path).name,
            "shape": list(native.shape),
            "spacing_mm": list(orientation.spacing_mm(native.vox2world)),
            "axes": orientation.axis_codes(native.vox2world),
        }
    for name in ("fixed_label", "moving_label", "fixed_mask"):
        if path := getattr(args, name):
            inputs[name] = {**_digest(Path(path)), "name": Path(path).name}
    device = jax.devices()[0]
    warnings = [
        f"{name}: {line}"
        for name, volume in zip(("fixed", "moving"), volumes, strict=True)
        for line in volume.warnings
    ]
    warnings += [*result.warnings, *pipeline.quality_warnings(result.qc)]
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
                "unireg": _version(),
                "python": platform.python_version(),
                **{name: _version(name) for name in _VERSIONED},
            },
            "device": {"platform": device.platform, "kind": device.device_kind},
            "peak_mib": _peak_mib(),
            "timings": result.timings,
        }
    )


def _summarize(say: Callable[[str], None], record: dict[str, Any], where: Path) -> None:
    """Two lines for the person at the terminal."""
    qc, scores = record["qc"], record["scores"]
    line = (
        f"NCC {_number(qc['ncc_before'])} -> {_number(qc['ncc_after'])}, longest "
        f"vector after pre-alignment {_number(qc['max_mm'])} mm, folding "
        f"{_number(qc['fold_percent'])} %"
    )
    if scores:
        mean = scores["mean"]
        steps = (mean[k] for k in ("dsc_before", "dsc_affine", "dsc") if k in mean)
        line += f", mean DSC {' -> '.join(map(_number, steps))}"
    say(line)
    for warning in record["warnings"]:
        say(f"warning: {warning}")
    say(f"done in {record['timings']['total']:.1f} s: {_shown(where)}")


# --- evaluate, export, weights, info ------------------------------------------------


def _evaluate(args: argparse.Namespace) -> int:
    _both_labels(args)
    from unireg_jax.imaging import nifti, points
    from unireg_jax.imaging.nifti import Volume

    labels = mask = pairs = None
    if args.fixed_label:
        labels = [nifti.read_labels(p) for p in (args.fixed_label, args.moving_label)]
    if args.fixed_mask:
        mask = nifti.read_labels(args.fixed_mask)
    if args.landmarks:
        pairs = points.read_points(args.landmarks)
    from unireg_jax.registration import metrics

    disp_mm, vox2world = metrics.read_transform(args.transform)
    # Of the field, its first component stands for the grid.
    field = Volume(disp_mm[..., 0], vox2world, path=args.transform)
    if mask is not None:
        nifti.check_same_grid(field, mask)
    report: dict[str, Any] = {
        "schema": SCHEMA,
        "transform": {
            **_digest(Path(args.transform)),
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
            cells = "".join(_number(row.get(name)).rjust(16) for name in names)
            lines.append(label.ljust(10) + cells)
    for name, value in report.get("landmarks", {}).items():
        lines.append(f"{name.ljust(24)} {_number(value)}")
    for name, value in report["field"].items():
        lines.append(f"{name.ljust(24)} {_number(value)}")
    return "\n".join(lines) + "\n"


def _export(args: argparse.Namespace) -> int:
    say = _progress(args.quiet)
    from unireg_jax.registration import export

    say("tracing")
    card = export.export_register(
        args.file, weights=args.weights, shape=args.shape, overwrite=args.overwrite
    )
    size = "x".join(map(str, card["preprocess"]["shape"]))
    mib = card["artefact"]["bytes"] / 2**20
    say(f"{_shown(args.file)}: {size}, {mib:.1f} MiB")
    if args.json:
        print(json.dumps(card, indent=2))
    return 0


def _weights_convert(args: argparse.Namespace) -> int:
    from unireg_jax.registration import sam_weights

    say = _progress(args.quiet)
    say("reading")
    licence = sam_weights.UNKNOWN_LICENCE if args.licence is None else args.licence
    card = sam_weights.convert(
        args.source, args.file, licence=licence, overwrite=args.overwrite
    )
    say(f"{_shown(args.file)}: {card['source']['layout']}, licence {card['licence']}")
    if args.json:
        print(json.dumps(card, indent=2))
    return 0


def _weights_list(args: argparse.Namespace) -> int:
    from unireg_jax.registration import weights

    places = [("package", file) for file in sorted(weights.PACKAGE.glob(_TENSORS))]
    places += [
        (f"${name}", Path(os.environ[name])) for name in VARIABLES if os.getenv(name)
    ]
    places += [("argument", Path(file)) for file in args.files]
    rows = []
    for source, path in places:
        row = {"name": path.name, "source": source}
        try:
            row |= _weights_row(path)
        except UserError as error:
            row["fault"] = _one_line(_with_reason(error))
        rows.append(row)
    if args.json:
        print(json.dumps(rows, indent=2))
    else:
        for row in rows:
            if "fault" not in row:
                print(_weights_line(row))
    faults = [row["fault"] for row in rows if "fault" in row]
    for fault in faults:
        _complain(fault, CHECKPOINT)
    return CHECKPOINT if faults else 0


def _weights_verify(args: argparse.Namespace) -> int:
    path = Path(args.file)
    row = {"name": path.name, **_weights_row(path)}
    print(json.dumps(row, indent=2) if args.json else f"ok  {_weights_line(row)}")
    return 0


def _weights_row(path: Path) -> dict[str, Any]:
    """What a verified file holds."""
    from unireg_jax.registration import weights

    tensors, spec = weights.load_weights(path)

    def count(tree):
        return sum(map(count, tree.values())) if isinstance(tree, dict) else tree.size

    return {
        "kind": spec.get("kind", "unireg"),
        # Of an embedding, its running statistics are none.
        "parameters": count(tensors.get("params", tensors)),
        "licence": spec.get("licence", "not stated"),
        "sha256": spec["sha256"],
    }


def _weights_line(row: dict[str, Any]) -> str:
    """The row for people."""
    count = f"{row['parameters']:,} parameters"
    words = (row["name"], row["kind"], count, row["sha256"][:16], row["licence"])
    return "  ".join(_shown(_one_line(word)) for word in words)


def _info(args: argparse.Namespace) -> int:
    from unireg_jax.registration import weights

    try:
        found = weights.find_weights()
        used: dict[str, Any] = {"name": found.name, **_digest(found)}
    except UserError as error:
        used = {"missing": str(error)}
    info = {
        "version": _version(),
        "tasks": {
            name: {"region": t.region.name.lower(), "type": t.pair_type.name.lower()}
            for name, t in TASKS.items()
        },
        "weights": used,
        "versions": {name: _version(name) for name in _VERSIONED},
    }
    if args.json:
        print(json.dumps(info, indent=2))
        return 0
    print(f"unireg {info['version']}")
    for name, task in info["tasks"].items():
        print(f"task {name.ljust(10)} {task['region']}, {task['type']}-patient")
    print(f"weights {used.get('name') or used['missing']}")
    return 0


# --- files and messages -------------------------------------------------------------


def _case(args: argparse.Namespace) -> str:
    """Name of the case, safe as one folder name."""
    case = args.case
    if case is None:
        case = f"{_stem(args.fixed)}__{_stem(args.moving)}"
    bad = case.strip(". ") == "" or case[0] in "-." or {"/", "\\", "\0"} & set(case)
    if bad or len(os.fsencode(case)) > 200:
        raise UserError(
            "id_invalid",
            f"case {_shown(case)[:60]}: a name of 1 to 200 bytes without a slash and "
            "without a leading dot or dash expected; pass --case NAME",
            USAGE,
        )
    return case


def _stem(path: str) -> str:
    """File name without .nii or .nii.gz; other dots stay."""
    name = Path(path).name
    for ending in (".gz", ".nii"):
        name = name[: -len(ending)] if name.lower().endswith(ending) else name
    return name


def _both_labels(args: argparse.Namespace) -> None:
    if bool(args.fixed_label) != bool(args.moving_label):
        raise UserError(
            "schema",
            "--fixed-label and --moving-label belong together, got one; name both",
            USAGE,
        )


@contextlib.contextmanager
def _case_folder(out: Path, case: str, overwrite: bool) -> Iterator[Path]:
    """A temporary folder whose files reach OUT/CASE when the block ends well."""
    final = out / case
    if out.exists() and not out.is_dir():
        raise UserError("storage", f"--out {_shown(out)}: a folder expected", USAGE)
    if os.path.lexists(final) and not (overwrite and final.is_dir()):
        raise UserError(
            "id_duplicate",
            f"{_shown(final)} exists; pass --overwrite to replace its results, or "
            "--case NAME",
            USAGE,
        )
    made = not out.exists()
    temp = out / f".unireg-{uuid.uuid4().hex}.tmp"
    try:
        out.mkdir(parents=True, exist_ok=True)
        temp.mkdir()
    except OSError as error:
        raise _storage(out, error) from error
    try:
        yield temp
        try:
            _publish(temp, final, case)
        except OSError as error:
            raise _storage(final, error) from error
    finally:
        shutil.rmtree(temp, ignore_errors=True)
        if made:
            with contextlib.suppress(OSError):
                out.rmdir()  # only if empty


def _publish(temp: Path, final: Path, case: str) -> None:
    """Moves results to their final names; the record goes first and comes last."""
    if not final.exists():
        _sync(temp)
        os.rename(temp, final)
    else:
        for name in reversed(OUTPUTS):
            (final / f"{case}_{name}").unlink(missing_ok=True)
        for name in OUTPUTS:
            if (new := temp / f"{case}_{name}").exists():
                os.replace(new, final / new.name)
        _sync(final)
    _sync(final.parent)


def _sync(folder: Path) -> None:
    """Flushes a folder, and the record in it, to disk."""
    for path in (*folder.glob("*_run.json"), folder):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _storage(path: Path, error: OSError) -> UserError:
    return UserError(
        "storage",
        f"{_shown(path)}: cannot be written: {error.strerror or error}; check the "
        "folder's rights and the space left",
        STORAGE,
    )


def _digest(path: Path) -> dict[str, Any]:
    """SHA-256 and size of a file."""
    with open(path, "rb") as file:
        return {
            "sha256": hashlib.file_digest(file, "sha256").hexdigest(),
            "bytes": os.fstat(file.fileno()).st_size,
        }


def _progress(quiet: bool) -> Callable[[str], None]:
    """Prints one line per stage on stderr."""

    def say(line: str) -> None:
        if not quiet:
            print(f"unireg: {_one_line(line)}", file=sys.stderr, flush=True)

    return say


def _complain(message: str, code: int) -> int:
    print(f"unireg: error: {_one_line(message)}", file=sys.stderr, flush=True)
    return code


def _internal(error: Exception, args: argparse.Namespace) -> int:
    """A fault of ours: one line for the user, the trace in a file."""
    trace = "".join(traceback.format_exception(error))
    if args.debug:
        sys.stderr.write(trace)
    name = f"unireg-error-{uuid.uuid4().hex[:8]}.log"
    where = "no log could be written"
    for folder in (args.out, tempfile.gettempdir()):
        if folder is None:
            continue
        with contextlib.suppress(OSError):
            Path(folder).mkdir(parents=True, exist_ok=True)
            (Path(folder) / name).write_text(trace, encoding="utf-8")
            where = f"trace in {_shown(Path(folder) / name)}"
            break
    return _complain(
        f"internal: {type(error).__name__}, a fault of this program; {where}; please "
        "report it",
        _INTERNAL,
    )


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM unwinds like an exception, so that temporary files are removed."""

    def leave(number, frame):
        raise SystemExit(128 + number)

    try:
        previous = signal.signal(signal.SIGTERM, leave)
    except ValueError:  # not the main thread: its owner handles signals
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _with_reason(error: UserError) -> str:
    """The message, its reason code first unless it is already in it."""
    message = str(error)
    named = f"{error.reason}:" in message
    return message if named else f"{error.reason}: {message}"


def _one_line(text: str) -> str:
    return " ".join(str(text).split())


def _shown(path: str | os.PathLike) -> str:
    """A path as printable text."""
    text = os.fspath(path)
    return text if text.isprintable() else ascii(text)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _version(name: str = "unireg-jax") -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _peak_mib() -> float | None:
    """Largest resident memory of this process, MiB; None where unknown."""
    if sys.platform != "linux":
        return None
    import resource

    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1)


if __name__ == "__main__":
    sys.exit(main())
