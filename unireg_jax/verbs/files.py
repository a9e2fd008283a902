"""Files of the verbs that read transforms: arguments, checks, reading, writing."""

import argparse
import json
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from unireg_jax import manifest
from unireg_jax.errors import STORAGE, USAGE, UserError, shown
from unireg_jax.imaging import belonging, mapping, nifti, scans, transforms
from unireg_jax.imaging.mapping import Mapping
from unireg_jax.imaging.nifti import Volume
from unireg_jax.verbs import options, outputs

# Results of a case in a folder.
_RESULTS = ("{0}/{0}_Composite.h5", "{0}/{0}_1Warp.nii.gz", "{0}.nii.gz", "{0}.h5")


def add_transforms(
    parser: argparse.ArgumentParser, *, one: bool = False, required: bool = True
) -> None:
    """-t, once or more."""
    once = "field, ITK transform, ANTs .mat, NRRD [itk]; identity: none"
    parser.add_argument(
        *("-t", "--transform"),
        dest="transforms",
        action="append",
        required=required,
        metavar="FILE",
        help=once
        if one
        else f"{once}; several, each after a -t: the first acts first on points of the "
        "fixed scan, as antsApplyTransforms lists them",
    )


def add_results(
    parser: argparse.ArgumentParser, *, dest: str = "transforms", default: str = ""
) -> None:
    """--transforms DIR and --data-root, of a list of cases."""
    parser.add_argument(
        "--transforms",
        dest=dest,
        metavar="DIR",
        help="results of the list's cases: DIR/ID/ID_Composite.h5, ID_1Warp.nii.gz, "
        f"DIR/ID.nii.gz or Learn2Reg's names{default}",
    )
    parser.add_argument(
        "--data-root",
        action="append",
        default=[],
        metavar="DIR",
        help="further folder that paths of the list may lead into",
    )


def add_out(parser: argparse.ArgumentParser, endings: str, *, required=True) -> None:
    """-o FILE and --overwrite."""
    parser.add_argument(
        *("-o", "--out"),
        dest="file",
        required=required,
        metavar="FILE",
        help=f"name ending in {endings}",
    )
    options.add_overwrite(parser, "FILE")


def number(text: str) -> float:
    """A finite number."""
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not abs(value) < float("inf"):
        raise argparse.ArgumentTypeError(f"a number expected, got {text[:40]!r}")
    return value


def positive(text: str) -> float:
    """A finite number above 0."""
    if (value := number(text)) <= 0:
        raise argparse.ArgumentTypeError(
            f"a number above 0 such as 0.01 expected, got {text[:40]!r}"
        )
    return value


def output(
    path: str,
    endings: Sequence[str],
    *,
    overwrite: bool,
    inputs: Sequence[str | None] = (),
) -> None:
    """Refuses, before any work, a file that could not or must not be written.

    `inputs` are the command's other files.

    Raises:
        UserError: exit code 2: `name_mismatch` for another ending, `id_duplicate` for a
            file that exists, or is another one of the command; exit code 6: `storage`
            for a folder that is absent or not writable.
    """
    if endings and not path.lower().endswith(tuple(endings)):
        raise UserError(
            "name_mismatch",
            f"{shown(path)}: a name that ends in {' or '.join(endings)} "
            "expected; rename it",
            USAGE,
        )
    if any(_same_file(path, name) for name in inputs if name):
        raise UserError(
            "id_duplicate",
            f"{shown(path)} is another file of this command; choose another name",
            USAGE,
        )
    if os.path.lexists(path) and not (overwrite and os.path.isfile(path)):
        raise UserError(
            "id_duplicate",
            f"{shown(path)} exists; pass --overwrite to replace it, or choose another "
            "name"
            if not os.path.isdir(path)
            else f"{shown(path)} is a folder; name a file in it",
            USAGE,
        )
    folder = os.path.dirname(path) or "."
    if not os.path.isdir(folder) or not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(
            "storage",
            f"{shown(path)}: a folder that exists and is writable expected, got "
            f"{shown(folder)}; make it, or choose another",
            STORAGE,
        )


def spare(inputs: Iterable[str], out: str | os.PathLike, names: Sequence[str]) -> None:
    """Refuses, before any work, to write tables over what they are made of.

    `inputs` are lists and tables that are read, `names` the files to be written in OUT.

    Raises:
        UserError: `id_duplicate`, exit code 2.
    """
    for path in inputs:
        if name := next((n for n in names if _same_file(path, Path(out, n))), None):
            raise UserError(
                "id_duplicate",
                f"{shown(path)}: another file than those to be written expected, got "
                f"{name} of --out; rename it, or choose another --out",
                USAGE,
            )


def _same_file(a: str | os.PathLike, b: str | os.PathLike) -> bool:
    if os.path.exists(a) and os.path.exists(b):
        return os.path.samefile(a, b)
    return os.path.abspath(a) == os.path.abspath(b)


def read_chain(
    paths: Sequence[str],
    *,
    fixed: Volume | None = None,
    moving: Volume | None = None,
) -> tuple[Mapping, list[str]]:
    """One or several transforms as one map, every part kept, and what to warn of.

    Held against the scans that are known. Learn2Reg fields, which need them, can only
    stand alone.

    Raises:
        UserError: a transform that cannot be read; exit code 4 for one that cannot be
            of these scans, see `belonging.check`.
    """
    if len(paths) > 1 and any(is_l2r(path) for path in paths):
        raise UserError(
            "schema",
            "--transform: a Learn2Reg field stands alone expected, got it in a list; "
            "convert it to .h5 first",
            USAGE,
        )
    check_scans(paths[0], fixed, moving)
    known = {"fixed": fixed, "moving": moving}
    warnings = nifti.told_of(known, intensities=False)  # any scan may be warped
    if fixed and is_l2r(paths[0]):
        warnings.append(
            f"{shown(paths[0])} does not tell its unit: read as a Learn2Reg "
            "field, in voxels"
        )
    warnings += [
        f"{shown(path)}: a map of `unireg register` beside it holds it already, here "
        "it acts once more; leave it out"
        for path in _twice(paths)
    ]
    whole = mapping.compose(
        [mapping.read(path, fixed=fixed, moving=moving) for path in paths]
    )
    if fixed is not None:
        grids = (
            mapping.grid_of(fixed),
            None if moving is None else mapping.grid_of(moving),
        )
        found = belonging.fit(whole, *grids)
        belonging.check(found, paths[0] if len(paths) == 1 else "the transforms")
        warnings += found.warnings
    return whole, warnings


def _twice(paths: Sequence[str]) -> list[str]:
    """What is listed beside a map of the same case that holds it; the affines of ANTs,
    which are not in its fields, have another ending."""
    names = {os.path.basename(path) for path in paths}
    whole = {"_1Warp.nii.gz": ("_Composite.h5",)}
    whole["_0GenericAffine.txt"] = (*whole, "_Composite.h5", "_1InverseWarp.nii.gz")
    return [
        path
        for path in paths
        for ending, maps in whole.items()
        if path.endswith(ending)
        and any(os.path.basename(path).replace(ending, m) in names for m in maps)
    ]


def check_results(folder: str) -> None:
    """Refuses what is no folder of results."""
    if not os.path.isdir(folder):
        raise UserError(
            "not_found",
            f"{shown(folder)}: not_found: a folder of results expected",
            USAGE,
        )


def find_result(folder: Path, case: manifest.Case) -> Path:
    """The transform of a case; where it should be when it is not there."""
    names = [spelling.format(case.id) for spelling in _RESULTS]
    for name in manifest.learn2reg_fields(case):
        names += [f"{name}.nii.gz", f"{name}.npz"]
    found = (folder / name for name in names if os.path.isfile(folder / name))
    path = next(found, folder / names[1])
    affine = path.with_name(f"{case.id}_0GenericAffine.mat")
    both = os.path.isfile(path) and os.path.isfile(affine)
    if path.name == f"{case.id}_1Warp.nii.gz" and both:
        raise UserError(
            "schema",
            f"schema: {shown(path.name)}: a map with its affine expected, got that of "
            f"ANTs, whose affine is in {shown(affine.name)} beside it; write both into "
            f"one file: unireg compose -t {shown(path.name)} -t {shown(affine.name)} "
            f"-o {shown(case.id)}_Composite.h5",
            USAGE,
        )
    return path


def check_scans(path: str, fixed: Volume | None, moving: Volume | None) -> None:
    """Refuses a Learn2Reg field of which the fixed scan alone is known."""
    if fixed and moving is None and is_l2r(path):
        raise UserError(
            "schema",
            "--moving: the scan whose voxels a Learn2Reg field leads to expected, got "
            "none; name it",
            USAGE,
        )


def is_l2r(path: str | os.PathLike) -> bool:
    """Whether a transform is in voxels of its scans."""
    return transforms.spelling(path) == "l2r"


def sha256(path: str | os.PathLike) -> str | None:
    """Of a file, its voxels too; None for one that will fail at its turn."""
    if transforms.is_identity(path):
        return transforms.IDENTITY
    try:
        return outputs.digest_of(scans.files_of(path))["sha256"]
    except OSError:
        return None


def read_grid(path: str | None) -> Volume | None:
    """Geometry and header of a scan, without its voxels."""
    return None if path is None else scans.read_grid(path)


def report(args: argparse.Namespace, verb: str, **content: Any) -> None:
    """JSON on stdout, if asked for: what was read, what was written, and numbers."""
    if not args.json:
        return
    known: dict[str, Any] = {"schema": 1, "verb": verb}
    known["transforms"] = [named(path) for path in args.transforms]
    for name in ("fixed", "moving", "points"):
        if getattr(args, name, None):
            known[name] = named(getattr(args, name))
    if getattr(args, "file", None):
        known["out"] = named(args.file)
    text = json.dumps(known | content, indent=2, allow_nan=False) + "\n"
    sys.stdout.write(text)
    sys.stdout.flush()


def named(path: str) -> dict[str, Any]:
    """Name and digest; of a folder of slices, the digest of their digests."""
    if transforms.is_identity(path):
        return {"name": transforms.IDENTITY}
    return {
        "name": Path(path).name,
        **outputs.digest_of(scans.files_of(path)),
    }


def plain(values: dict[str, float]) -> dict[str, float | None]:
    """Without NaN, which JSON does not have."""
    return {
        k: None if isinstance(v, float) and v != v else v for k, v in values.items()
    }
