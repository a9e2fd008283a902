"""A pair's files in, its results and its record out: what `register` and `batch` share.

A record says what was made of what: it names no folder, and its digests are those of
the bytes that were read and written.
"""

import argparse
import functools
import hashlib
import json
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from unireg_jax import registration
from unireg_jax.errors import USAGE, UserError, shown
from unireg_jax.evaluation import metrics, quality
from unireg_jax.imaging import mapping, nifti, orientation, points, scans, transforms
from unireg_jax.imaging.inverse import doubts, invert
from unireg_jax.imaging.nifti import Volume
from unireg_jax.manifest import AUTO_TASK, NO_TASK, PATHS, TYPES, Case
from unireg_jax.registration import weights
from unireg_jax.registration.kept import Kept
from unireg_jax.tasks import TASKS
from unireg_jax.verbs import judging, options, outputs, versions

SCHEMA = 2  # of <case>_run.json
# Spelled here so that --help imports no JAX; a test compares them.
AFFINES = ("auto", "none", "com", "rigid", "affine", "features", "coarse")
IO_FEATURES = ("image", "mind", "sam")
IO_FINER = (1, 2, 4)
PASSES, MOST_PASSES, SYMMETRIC = 1, 8, False
# Of pre-alignments and instance optimisation: what another left is not what was asked
# for. That of matches, too, is held against plain starts by the search's similarity.
_SEARCHED = ("auto", "rigid", "affine", "features", "coarse")
SEARCH_ALGORITHM = 3
_COARSE_ALGORITHM = 2
_IO_ALGORITHM = "greedy 4"
_FEATURES_ALGORITHM = 3  # of the former, where it compares features
_MASKED_ALGORITHM = 2  # of pre-alignment with a mask
FOVS = ("auto", "crop", "tiles", "whole")
_UNUSED = ("moving_mask",)  # columns of a case that registration does not look at
_OF_THE_CASE = ("subjects", *_UNUSED)  # kinds of warnings of `_case_warnings`


# --- settings -----------------------------------------------------------------------


def add_settings(parser: argparse.ArgumentParser, *, required: bool) -> None:
    """--task, --type, --weights, --affine, --fov, --device ...: what is asked for.

    Args:
        parser: of the verb.
        required: whether --task must be given.
    """
    add = parser.add_argument
    elsewhere = "" if required else " of the pairs whose list says none"
    add(
        "--task",
        required=required,
        choices=(*sorted(TASKS), AUTO_TASK, NO_TASK),
        help=f"what is registered{elsewhere}; auto: the body region that both scans "
        "show, or a refusal; none: without the network",
    )
    add("--type", choices=TYPES, help=f"default: the usual one of the task{elsewhere}")
    options.add_weights(parser)
    add(
        "--affine",
        choices=AFFINES,
        default="auto",
        help="pre-alignment, default auto; features: by points matched by the "
        "anatomical embedding; coarse: and a coarse displacement through them",
    )
    add(
        "--fov",
        choices=FOVS,
        default="auto",
        help="where the fixed body is larger than the network's window: crop, its "
        "middle; tiles, overlapping windows; whole, one larger window; default auto: "
        "tiles where a crop would lose three tenths of the body",
    )
    add(
        "--passes",
        type=int,
        choices=range(1, MOST_PASSES + 1),
        default=PASSES,
        metavar="N",
        help="how often the network acts, each time on the moving scan as warped so "
        f"far, 1 to {MOST_PASSES}, default {PASSES}",
    )
    add(
        "--symmetric",
        action=argparse.BooleanOptionalAction,
        default=SYMMETRIC,
        help="each pass averages the map there with the inverse of the map back: "
        "fewer folds, for twice the time of the network; default: %(default)s",
    )
    add(
        "--io-iterations",
        type=options.count,
        default=50,
        metavar="N",
        help="instance optimisation of each pair: steps on the second of its grids, "
        "twice as many on the coarsest, fewer on finer ones; default 50, 0 for none",
    )
    add(
        "--io-features",
        choices=IO_FEATURES,
        help="what it compares, default image; mind: self-similarity, for scans of "
        "unlike contrasts; sam: the anatomical embedding of $UNIREG_SAM, then the "
        "package's",
    )
    add(
        *("--reg-weight", "--io-smoothness"),
        dest="reg_weight",
        type=options.smoothness,
        metavar="X",
        help="how often each of its steps smooths the field, 0 to 20, default 0.5: "
        "more gives a smoother field, less follows the images closer",
    )
    add(
        "--io-finer",
        type=int,
        choices=IO_FINER,
        help="of its finest grid, voxels per voxel of the network's along each axis, "
        "default 1: with the package's weights 4 mm, with 2 it ends at 2 mm, closer to "
        "small structures, for several times the seconds",
    )
    add(
        "--write-inverse",
        action="store_true",
        help="also CASE_1InverseWarp.nii.gz, the whole map back on the grid of the "
        "moving scan, as `unireg invert` makes it, in as long a time",
    )
    options.add_device(parser)


def check_settings(args: argparse.Namespace) -> None:
    """Refuses options of an instance optimisation that is left out."""
    asked = (args.io_features, args.reg_weight, args.io_finer)
    if not args.io_iterations and any(value is not None for value in asked):
        raise UserError(
            "schema",
            "--io-features, --reg-weight and --io-finer need --io-iterations of at "
            "least 1",
            USAGE,
        )


def session_settings(args: argparse.Namespace) -> dict[str, Any]:
    """How pairs are registered, as `registration.Session` takes it."""
    return {
        "passes": args.passes,
        "symmetric": args.symmetric,
        "refine": _plan(args),
        "fov": args.fov,
    }


def _plan(args: argparse.Namespace) -> Any:
    """Of the instance optimisation, or None."""
    given = {
        "features": args.io_features,
        "smoothness": args.reg_weight,
        "finer": args.io_finer,
    }
    given = {name: value for name, value in given.items() if value is not None}
    return (
        registration.Plan(args.io_iterations, **given) if args.io_iterations else None
    )


def settings_sha256(args: argparse.Namespace, case: Case) -> str:
    """Digest of what was asked for, besides the files and the weights.

    Args:
        args: of `add_settings`.
        case: its own task and type.

    Returns:
        SHA-256, hexadecimal.
    """
    named = TASKS.get(case.task)
    usual = "inter" if named is None else named.pair_type.name.lower()
    asked = {
        "task": case.task,
        "type": case.type or usual,
        "affine": "given" if case.init else args.affine,
        "io": args.io_iterations
        and [
            *(_IO_ALGORITHM, args.io_iterations, args.io_features or "image"),
            options.SMOOTHNESS if args.reg_weight is None else args.reg_weight,
        ],
    }
    if args.io_iterations and (args.io_features or "image") != "image":
        asked["io_features"] = _FEATURES_ALGORITHM
    if args.io_iterations and (args.io_finer or 1) != 1:
        asked["io_finer"] = args.io_finer
    if case.task != NO_TASK and (args.passes, args.symmetric) != (1, False):
        asked["passes"] = [args.passes, args.symmetric]
    if args.fov != "auto":
        asked["fov"] = args.fov
    if case.points_frame:
        asked["points_frame"] = case.points_frame
    elif case.fixed_points:
        asked["points_frame"] = 2  # before, tables without a header were in mm
    if case.fixed_points:
        asked["landmarks"] = 2  # before, those beyond the fixed scan stayed
    if args.write_inverse:
        asked["inverse"] = True
    if args.affine in _SEARCHED and not case.init:
        asked["search"] = SEARCH_ALGORITHM
    elif not args.io_iterations:
        asked["prepared"] = 2  # before, padding was air; the others' rose with it
    if args.affine != "none" and case.fixed_mask and not case.init:
        asked["masked"] = _MASKED_ALGORITHM
    if args.affine == "coarse" and not case.init:
        asked["coarse"] = _COARSE_ALGORITHM
    if args.affine in ("features", "coarse") or args.io_features == "sam":
        # What describes the scans then is chosen by the environment.
        found = weights.default_embedding()
        asked["embedding"] = _sha256(found) if found.is_file() else None
    text = json.dumps(asked, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


@functools.lru_cache(maxsize=1)
def _sha256(path: Path) -> str:
    return outputs.digest(path)["sha256"]


# --- files in -----------------------------------------------------------------------


class Inputs(NamedTuple):
    """The files of a pair, read and checked.

    Attributes:
        case: their names.
        fixed, moving: scans.
        labels: of fixed, or None, and of moving, on their grids; or None.
        mask: [X, Y, Z] bool on the LPS+ axes of `fixed`, or None.
        points: [N, 3] float64, LPS mm, of fixed and of moving; or None.
        init: [4, 4] float64, fixed world -> moving world, LPS mm; or None.
        digests: column of the case -> sha256 and bytes.
        warnings: what reading labels and masks warned of; scans hold their own.
    """

    case: Case
    fixed: Volume
    moving: Volume
    labels: tuple[Volume | None, Volume] | None
    mask: np.ndarray | None
    points: tuple[np.ndarray, np.ndarray] | None
    init: np.ndarray | None
    digests: dict[str, dict[str, Any]]
    warnings: list[str]


class Files:
    """Reads files, once while they keep coming back; for several threads.

    A file is known by its path, size, time and inode, so that one that was replaced is
    read again.
    """

    def __init__(self, keep: int = 1):
        """Takes the number of files of each kind that are remembered."""
        self._images, self._labels, self._digests = (Kept(keep) for _ in range(3))

    def read(self, case: Case) -> Inputs:
        """Reads the files of a pair.

        Args:
            case: names at least two scans.

        Returns:
            Inputs.

        Raises:
            UserError: a file that cannot be read, is on another grid, or changes
                meanwhile.
        """
        listed = [c for c in PATHS if getattr(case, c) and c not in _UNUSED]
        before = {column: _state(getattr(case, column)) for column in listed}
        fixed, moving = self._image(case.fixed), self._image(case.moving)
        labels = mask = table = init = None
        others: dict[str, Volume | None] = {}
        if case.moving_label:
            labels = tuple(
                self._label(path) if path else None
                for path in (case.fixed_label, case.moving_label)
            )
            for image, label in zip((fixed, moving), labels, strict=True):
                if label:
                    nifti.check_same_grid(image, label)
            others |= zip(("fixed_label", "moving_label"), labels, strict=True)
        if case.fixed_mask:
            volume = self._label(case.fixed_mask)
            nifti.check_same_grid(fixed, volume)
            mask = volume.data > 0
            others["fixed_mask"] = volume
        if case.fixed_points:
            tables = case.fixed_points, case.moving_points
            found = points.read_pair(tables, case.points_frame, (fixed, moving))
            table = found.fixed, found.moving
        if case.init:
            init = transforms.read_affine(case.init)
        digests = {column: self.digest(getattr(case, column)) for column in listed}
        for column in listed:
            if _state(path := getattr(case, column)) != before[column]:
                raise UserError(
                    "checksum",
                    f"{shown(path)}: a file that stays as it is expected, it changed "
                    "while being read; wait for its writer",
                )
        told = nifti.told_of(others)
        return Inputs(case, fixed, moving, labels, mask, table, init, digests, told)

    def digest(self, path: str) -> dict[str, Any]:
        """SHA-256 and size of a scan's file, or of its files one after the other.

        Args:
            path: of a regular file, or of a folder of DICOM slices.

        Returns:
            sha256, bytes; of several files also files, their number.

        Raises:
            UserError: `not_found`, `not_a_file`, `permission`, `empty`.
        """
        try:
            files = scans.files_of(path)
            for file in files:
                nifti.check_file(file)
            return self._digests.get(
                _state(path), lambda: outputs.digest_of(files), path
            )
        except PermissionError as error:
            raise nifti.permission_error(path) from error

    def _image(self, path):
        return self._images.get(_state(path), lambda: scans.read_scan(path))

    def _label(self, path):
        return self._labels.get(_state(path), lambda: scans.read_labels(path))


def _state(path: str) -> tuple:
    """What changes when a file does, or one of those that a scan is made of."""
    state: list[Any] = [path]
    try:
        for file in scans.files_of(path):
            found = os.stat(file)  # of what a link leads to
            state += [found.st_size, found.st_mtime_ns, found.st_ino]
    except (OSError, ValueError):  # reading it says what is wrong
        return (path,)
    return tuple(state)


# --- results out --------------------------------------------------------------------


def check_inverse_fits(args: argparse.Namespace, inputs: Inputs) -> None:
    """Refuses --write-inverse of scans larger than what is free, before the work.

    Args:
        args: parsed.
        inputs: of the case.

    Raises:
        UserError: `too_large`, exit code 7.
    """
    if args.write_inverse:
        shapes = inputs.fixed.data.shape, inputs.moving.data.shape
        registration.check_memory(*shapes, inverse=True)


def write(
    folder: Path,
    inputs: Inputs,
    result: Any,
    model: Any,
    settings: str,
    *,
    inverse: bool = False,
    back_mm: np.ndarray | None = None,
) -> dict[str, Any]:
    """Writes a pair's results into its folder; `seal` adds the record.

    Args:
        folder: from `outputs.case_folder`.
        inputs: from `Files.read`.
        result: Registration.
        model: of the registration.
        settings: from `settings_sha256`.
        inverse: whether the map back is written, too.
        back_mm: [X', Y', Z', 3] LPS mm on moving, of the opposite registration.

    Returns:
        The record, without the time that writing takes.

    Raises:
        UserError: `storage`.
    """
    case = inputs.case
    prefix = folder / case.id
    warnings = _write_transforms(prefix, result, inputs.fixed)
    scores = way_back = None
    if inverse:
        way_back = _write_inverse(prefix, result, inputs.moving)
        warnings += doubts(way_back)
    target, source = inputs.labels or (None, None)
    if target:
        scores = _score(prefix, result, inputs.labels, inputs.fixed)
        warnings += _label_warnings(inputs.labels)
    elif source:
        where = result.disp_mm, result.vox2world
        warped = metrics.warp_labels(*where, source, inputs.fixed)
        nifti.write_like(f"{prefix}_warped_label.nii.gz", warped, inputs.fixed)
    numbers = judging.assess(
        inputs.fixed,
        inputs.moving,
        result.disp_mm,
        result.affine,
        mask=inputs.mask,
        fixed_labels=None if target is None else target.data,
        scores=scores,
        back_mm=back_mm,
    )
    found = quality.judge(numbers, quality.kind_of(result.settings))
    warnings += [finding.line for finding in found]
    errors = None
    if inputs.points:
        whole = result.disp_mm, result.vox2world
        errors = metrics.landmark_errors(*whole, *inputs.points, result.affine)
        transform = mapping.Mapping((mapping.Field(*whole),))  # checked as it was made
        warnings += metrics.landmark_warnings(transform, *inputs.points, *errors)
    record = _record(inputs, result, model, warnings)
    record["quality"] = numbers
    record["scores"] = scores
    if way_back:
        record["inverse"] = metrics.as_json(way_back)
    if errors:
        record["landmarks"] = metrics.as_json(metrics.summarize_errors(*errors))
    record["settings_sha256"] = settings
    record["outputs"] = {f.name: outputs.digest(f) for f in sorted(folder.iterdir())}
    return record


def seal(folder: Path, record: Mapping[str, Any]) -> str:
    """Writes the record as CASE_run.json.

    Args:
        folder: from `outputs.case_folder`.
        record: from `write`.

    Returns:
        Its text.
    """
    text = json.dumps(record, indent=2, allow_nan=False) + "\n"
    (folder / f"{record['case']}_run.json").write_text(text, encoding="utf-8")
    return text


def _write_transforms(prefix: Path, result, fixed) -> list[str]:
    """The transform in three spellings, and the warped image."""
    nifti.write_like(f"{prefix}_warped.nii.gz", result.warped, fixed)
    grid = {"vox2world": result.vox2world, "like": fixed}
    transforms.write_field(f"{prefix}_1Warp.nii.gz", result.disp_mm, **grid)
    transforms.write_affine_txt(f"{prefix}_0GenericAffine.txt", result.affine)
    if transforms.has_shear(result.vox2world):
        return ["no Composite.h5: ITK cannot hold the shear of the fixed grid"]
    # Turned here, so that one field is held while HDF5 packs it, not two.
    residual = nifti.to_native(registration.residual_mm(result, copy=False), fixed)
    own = fixed.native.vox2world
    transforms.write_composite(f"{prefix}_Composite.h5", result.affine, residual, own)
    return []


def _write_inverse(prefix: Path, result, moving) -> dict[str, float]:
    """The map back, found of the parts, as one field; how well it leads back."""
    residual = registration.residual_mm(result, copy=False)
    parts = [mapping.field(residual, result.vox2world)]
    if not np.array_equal(result.affine, np.eye(4)):
        parts.append(mapping.affine(result.affine))
    grid = mapping.grid_of(moving)
    found = invert(mapping.compose(parts), grid)
    stats, flat = found.stats, mapping.flatten(found.mapping, grid)
    del residual, parts, found  # each as large as the inverse
    back = mapping.field(flat, grid.vox2world)
    mapping.write(f"{prefix}_1InverseWarp.nii.gz", back, fixed=moving)
    return stats


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


def _label_warnings(labels) -> list[str]:
    """Names the structures that one scan lacks."""
    fixed, moving = (set(np.unique(label.data).tolist()) for label in labels)
    lone = sorted(fixed ^ moving)
    if not lone:
        return []
    named = ", ".join(map(str, lone[:20])) + (" ..." if len(lone) > 20 else "")
    return [f"label_set: in one of the two label maps only: {named}"]


def _case_warnings(case: Case, pair_type: str) -> list[str]:
    """What the case says of itself that does not go together, or is not used."""
    lines = []
    subjects = (case.fixed_subject, case.moving_subject)
    if all(subjects) and (subjects[0] == subjects[1]) != (pair_type == "intra"):
        # Not who: a record names no patient.
        same = subjects[0] == subjects[1]
        asked, got = ("two patients", "one") if same else ("one patient", "two")
        lines.append(
            f"subjects: {asked} expected of a pair of type {pair_type}, got {got}"
        )
    lines += [f"{column}: not used" for column in _UNUSED if getattr(case, column)]
    return lines


def _record(inputs: Inputs, result, model, warnings: list[str]) -> dict[str, Any]:
    """What was done, with what, and how well; no absolute path, no header text."""
    case, described = inputs.case, {}
    volumes = {"fixed": inputs.fixed, "moving": inputs.moving}
    for name, digest in inputs.digests.items():
        described[name] = {**digest, "name": Path(getattr(case, name)).name}
        if name in volumes:
            native = volumes[name].native
            described[name] |= {
                "shape": list(native.shape),
                "spacing_mm": list(orientation.spacing_mm(native.vox2world)),
                "axes": orientation.axis_codes(native.vox2world),
            }
    lines = [*inputs.warnings, *result.warnings, *warnings]
    lines += _case_warnings(case, result.settings["pair_type"])
    return metrics.as_json(
        {
            "schema": SCHEMA,
            "case": case.id,
            "status": "warn" if lines else "ok",
            "warnings": lines,
            "settings": result.settings,
            "inputs": described,
            "weights": {
                key: model.spec.get(key)
                for key in (
                    "sha256",
                    "architecture",
                    "features",
                    "embedding",
                    "preprocess",
                )
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


# --- results that are there ---------------------------------------------------------


def disagreement(
    folder: Path, case: Case, files: Files, *, weights_sha256: str, settings: str
) -> tuple[str | None, dict[str, Any] | None]:
    """Holds the results in a case's folder against what would be made now.

    Args:
        folder: OUT/CASE, which exists.
        case: its files.
        files: to digest inputs.
        weights_sha256: of the network.
        settings: from `settings_sha256`.

    Returns:
        Why they are not those that would be made, one line, or None; and the record.

    Raises:
        UserError: an input that cannot be read.
    """
    try:
        text = (folder / f"{case.id}_run.json").read_bytes()
        record = json.loads(text)
        inputs = {n: (d["sha256"], d["bytes"]) for n, d in record["inputs"].items()}
        made = {n: (d["sha256"], d["bytes"]) for n, d in record["outputs"].items()}
        known = record["weights"]["sha256"], record["settings_sha256"]
        pair_type, lines = record["settings"]["pair_type"], record["warnings"]
        told = [line for line in lines if line.partition(":")[0] in _OF_THE_CASE]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return "no whole record", None
    if known[0] != weights_sha256:
        return "other weights", record
    if known[1] != settings:
        return "other settings", record
    listed = {c for c in PATHS if getattr(case, c) and c not in _UNUSED}
    if set(inputs) != listed:
        return "other kinds of inputs", record
    if told != _case_warnings(case, pair_type):
        return "other subjects or columns", record
    for column in sorted(listed):
        digest = files.digest(getattr(case, column))
        if inputs[column] != (digest["sha256"], digest["bytes"]):
            return f"another {column}", record
    for name, expected in made.items():
        path = folder / Path(name).name
        try:
            same = path.stat().st_size == expected[1]
            same = same and outputs.digest(path)["sha256"] == expected[0]
        except OSError:
            same = False
        if not same:
            return f"{shown(path.name)} is not what was written", record
    return None, record
