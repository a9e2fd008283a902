"""`unireg check-transform`: what a transform file holds and what is wrong with it."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from unireg_jax.errors import NUMERICAL, UserError, shown
from unireg_jax.imaging import (
    belonging,
    grids,
    mapping,
    nifti,
    orientation,
    scans,
    transforms,
)
from unireg_jax.imaging.grids import Field
from unireg_jax.imaging.mapping import Mapping
from unireg_jax.imaging.nifti import Volume
from unireg_jax.verbs import files, options, outputs
from unireg_jax.verbs.messages import number, one_line

HELP = "what a transform file holds and what is wrong with it"

_SPELLED = {
    "nifti": "NIfTI displacement field",
    "l2r": "Learn2Reg field",
    "itk": "ITK transform file",
    "itk_image": "NRRD or MetaImage displacement field",
}
_TURNED = "turned round (moving to fixed)"
# How displacements may be meant -> the matrix [3, 3] that makes LPS mm of them, given
# that of the field's grid, voxel -> LPS mm.
_MEANT = {
    "as written": lambda grid: np.eye(3),
    "mirrored in x and y (RAS for LPS)": lambda grid: np.diag([-1.0, -1.0, 1.0]),
    _TURNED: lambda grid: -np.eye(3),
    "in voxels": lambda grid: grid,
}
_FAR_MM = 300.0  # no organ is so far from itself in two scans of one frame
_BROKEN = ("field_nonfinite", "field_range", "affine_nonfinite", "affine_singular")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Of this verb."""
    parser.description = (
        "Prints the parts of a transform in the order in which they act on a point of "
        "the fixed scan, their grids, lengths of displacements in mm, folding, and a "
        "verdict. With both scans it also says whether the map helps, and whether it "
        "would help more if its vectors were mirrored, turned round or in voxels. Exit "
        "code 8 for a transform that cannot be right, such as one with NaN."
    )
    parser.epilog = (
        "example: unireg check-transform c_1Warp.nii.gz -f fixed.nii.gz "
        "-m moving.nii.gz"
    )
    add = parser.add_argument
    add("file", metavar="FILE", help="transform in any spelling that unireg reads")
    add("-f", "--fixed", metavar="FILE", help="fixed scan")
    add("-m", "--moving", metavar="FILE", help="moving scan")
    options.add_messages(parser, quiet=False)


def run(args: argparse.Namespace) -> int:
    """Exit code."""
    fixed = scans.read_scan(args.fixed) if args.fixed else None
    moving = scans.read_scan(args.moving) if args.moving else None
    found: dict[str, Any] = {"schema": 1, "verb": "check-transform"}
    broken = None
    try:
        nifti.check_file(args.file)  # the word identity is none
        spelled = transforms.spelling(args.file)
        files.check_scans(args.file, fixed, moving)
        whole = mapping.read(args.file, fixed=fixed, moving=moving)
    except UserError as error:
        if error.reason not in _BROKEN:
            raise
        broken = error
    name, path = Path(args.file).name, Path(args.file)
    found["transform"] = {"name": name, **outputs.digest(path)}
    if broken is None:
        found["spelling"] = _SPELLED[spelled]
        found |= _describe(whole, fixed, moving)
    else:
        found |= {"verdict": "bad", "findings": [one_line(broken)]}
    if args.json:
        text = json.dumps(found, indent=2, allow_nan=False) + "\n"
    else:
        text = _table(found)
    sys.stdout.write(text)
    sys.stdout.flush()
    if found["verdict"] == "bad":
        reason = broken.reason if broken else "field_range"
        line = f"{shown(args.file)}: {reason}: {found['findings'][0]}"
        raise UserError(reason, str(broken or line), NUMERICAL)
    return 0


def _describe(
    whole: Mapping, fixed: Volume | None, moving: Volume | None
) -> dict[str, Any]:
    """Parts, findings and verdict."""
    findings: list[str] = []
    parts = [
        _field(part, findings) if isinstance(part, Field) else _affine(part, findings)
        for part in whole.parts
    ]
    found: dict[str, Any] = {"acts_from": "fixed to moving, LPS mm", "parts": parts}
    first = whole.parts[0] if whole.parts else None
    if fixed is not None:
        target = mapping.grid_of(moving) if moving else None
        lies = belonging.fit(whole, mapping.grid_of(fixed), target)
        findings += lies.warnings
        if moving is not None:
            found["reached_percent"] = lies.reached_percent
        if isinstance(first, Field):
            same = grids.same(first.grid, mapping.grid_of(fixed))
            found["fixed_grid"] = (
                "the same"
                if same
                else f"another, covers {lies.covered_percent:.4g} % of the fixed scan"
            )
    if fixed is not None and moving is not None:
        found["similarity"] = _readings(whole, fixed, moving, findings)
    found["verdict"] = "warn" if findings else "ok"
    return found | {"findings": findings}


def _affine(matrix: np.ndarray, findings: list[str]) -> dict[str, Any]:
    """Numbers of one affine."""
    scales = np.linalg.svd(matrix[:3, :3], compute_uv=False)
    determinant = float(np.linalg.det(matrix[:3, :3]))
    if determinant < 0:
        findings.append("mirrored: the affine mirrors the scan")
    if scales.max() > 3 or scales.min() < 1 / 3:
        findings.append(
            f"field_range: the affine scales by {scales.min():.3g} to "
            f"{scales.max():.3g}: voxels taken for mm?"
        )
    return {
        "kind": "affine",
        "matrix": matrix.tolist(),
        "determinant": determinant,
        "scales": [round(float(s), 6) for s in scales],
    }


def _field(part: Field, findings: list[str]) -> dict[str, Any]:
    """Grid, lengths and folds of one field."""
    shape = part.grid.shape
    lengths = np.concatenate(
        [
            np.linalg.norm(part.disp_mm[:, :, k], axis=-1).ravel()
            for k in range(shape[2])
        ]
    )
    longest = float(lengths.max())
    folds = None
    if min(shape) > 1:
        detj = mapping.jacobian(Mapping((part,)), part.grid)
        folds = 100 * float((detj <= 0).mean())
        if folds > 0:
            findings.append(f"folding: {folds:.3g} % of the voxels of a field")
    if longest > _FAR_MM:
        findings.append(
            f"field_range: a displacement of {longest:.4g} mm is longer than "
            f"{_FAR_MM:g} mm: another unit?"
        )
    if longest == 0:
        findings.append("constant: the field is zero everywhere")
    elif longest <= np.sqrt(3) and lengths.mean() < 0.5:
        findings.append(
            f"field_range: no displacement is longer than {longest:.3g} mm: "
            "normalised coordinates in place of mm?"
        )
    return {
        "kind": "field",
        "shape": list(shape),
        "spacing_mm": list(orientation.spacing_mm(part.vox2world)),
        "axes": orientation.axis_codes(part.vox2world),
        "origin_mm": part.vox2world[:3, 3].tolist(),
        "mean_mm": float(lengths.mean(dtype=np.float64)),
        "p95_mm": float(np.percentile(lengths, 95)),
        "max_mm": longest,
        "fold_percent_whole": folds,
        "shear": transforms.has_shear(part.vox2world),
    }


def _readings(
    whole: Mapping, fixed: Volume, moving: Volume, findings: list[str]
) -> dict[str, float | None]:
    """Correlation of the scans, as the map is written and as it may be meant."""
    points = belonging.lattice(mapping.grid_of(fixed))
    there = mapping.sample(fixed, points)
    led = {"none": points}
    led |= {name: _led(whole, points, change) for name, change in _MEANT.items()}
    if not whole.fields:
        led = {k: led[k] for k in ("none", "as written")}
        if whole.parts:
            matrix = np.linalg.inv(mapping.compose([whole]).parts[0])
            led[_TURNED] = mapping.points(mapping.affine(matrix), points)
    scores = {
        name: belonging.correlation(there, mapping.sample(moving, xyz))
        for name, xyz in led.items()
    }
    known = {name: score for name, score in scores.items() if score is not None}
    if "as written" not in known:  # no overlap, which was found already
        return scores
    best, written = max(known, key=known.get), known["as written"]
    if known[best] > written + belonging.WORSE:
        way = "without the transform" if best == "none" else f"read as '{best}'"
        findings.append(
            f"similarity: the scans agree better ({known[best]:.3f}) {way} than as "
            f"written ({written:.3f})"
        )
    return scores


def _led(whole: Mapping, xyz: np.ndarray, change) -> np.ndarray:
    """Points [N, 3] through a map whose displacements are meant in another way."""
    for part in whole.parts:
        moved = mapping.points(Mapping((part,)), xyz)
        if isinstance(part, Field):  # at the points: no second copy of a large field
            moved = xyz + (moved - xyz) @ change(part.vox2world[:3, :3]).T
        xyz = moved
    return xyz


def _table(found: dict[str, Any]) -> str:
    """The report for people."""
    lines = []
    if "parts" in found:
        lines.append(f"spelling     {found['spelling']}")
        lines.append(f"acts from    {found['acts_from']}")
    for n, part in enumerate(found.get("parts", []), start=1):
        lines.append(f"part {n}       {_part(part)}")
    if "fixed_grid" in found:
        lines.append(f"fixed grid   {found['fixed_grid']}")
    if "reached_percent" in found:
        lines.append(
            f"leads into   the moving scan {found['reached_percent']:.4g} % of the "
            "fixed one"
        )
    for name, score in found.get("similarity", {}).items():
        lines.append(f"correlation  {number(score).ljust(8)} {name}")
    lines.append(f"verdict      {found['verdict']}")
    lines += [f"  {line}" for line in found["findings"]]
    return "\n".join(lines) + "\n"


def _part(part: dict[str, Any]) -> str:
    if part["kind"] == "affine":
        scales = ", ".join(f"{s:.4g}" for s in part["scales"])
        shift = ", ".join(f"{row[3]:.4g}" for row in part["matrix"][:3])
        return f"affine: scales {scales}; shift of the origin {shift} mm"
    shape = "x".join(map(str, part["shape"]))
    spacing = "x".join(f"{s:.4g}" for s in part["spacing_mm"])
    folds = (
        "-"
        if part["fold_percent_whole"] is None
        else f"{part['fold_percent_whole']:.3g}"
    )
    return (
        f"field: {shape} voxels of {spacing} mm, axes {part['axes']}; mean "
        f"{part['mean_mm']:.4g}, 95 % {part['p95_mm']:.4g}, longest "
        f"{part['max_mm']:.4g} mm; folds {folds} %"
    )
