"""One pair judged from files, and many pairs one after another.

    report = score_files(Files("u.nii.gz", fixed_label="a.nii.gz", moving_label=...))
    for case in score_cases({"a01": Files(...), "a02": Files(...)}): ...

A case that cannot be judged is failed with its reason, and the others go on.
"""

import math
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from unireg_jax.errors import USAGE, UserError, of_item, shown
from unireg_jax.evaluation import learn2reg, metrics, regularity
from unireg_jax.evaluation.aggregate import better, quantile_l2r, summarize
from unireg_jax.evaluation.tables import as_json
from unireg_jax.imaging import belonging, mapping, nifti, points, scans, transforms
from unireg_jax.imaging.grids import Grid
from unireg_jax.imaging.nifti import Volume
from unireg_jax.imaging.points import PointPairs

Path = str | os.PathLike


class Files(NamedTuple):
    """What is known of one pair.

    Attributes:
        transform: any spelling that imaging.mapping reads, or "identity".
        fixed_label, moving_label: label maps, both or none.
        fixed_mask: foreground of the regularity, on the field's grid.
        landmarks: CSV with columns fixed_x_mm ... moving_z_mm, LPS mm.
        fixed_points, moving_points: instead: one table of x, y, z per scan, line by
            line.
        points_frame: what their numbers are, one of points.FRAMES; None: LPS mm, of
            tables with a header alone.
        fixed, moving: the scans, both or none, in whose voxels, as stored, points and
            fields of Learn2Reg are; points in voxels need them, such fields do without
            where there are labels.
    """

    transform: Path
    fixed_label: Path | None = None
    moving_label: Path | None = None
    fixed_mask: Path | None = None
    landmarks: Path | None = None
    fixed_points: Path | None = None
    moving_points: Path | None = None
    points_frame: str | None = None
    fixed: Path | None = None
    moving: Path | None = None


class Case(NamedTuple):
    """What became of one pair.

    Attributes:
        id: its name.
        report: see `score`; None when it failed.
        reason: code of docs/errors.md when it failed, else "".
        message: one line when it failed, else "".
        exit_code: of the failure, else 0.
    """

    id: str
    report: dict[str, Any] | None
    reason: str = ""
    message: str = ""
    exit_code: int = 0


def score(
    transform: mapping.Mapping,
    *,
    fixed_labels: Volume | None = None,
    moving_labels: Volume | None = None,
    grids: tuple[Grid, Grid] | None = None,
    mask: Volume | None = None,
    pairs: PointPairs | None = None,
    surface: bool = True,
    tolerance_mm: float = metrics.TOLERANCE_MM,
    l2r: bool = False,
) -> dict[str, Any]:
    """Judges one transform.

    Args:
        transform: fixed -> moving.
        fixed_labels: label map of the fixed scan, with moving_labels.
        moving_labels: label map of the moving scan.
        grids: of the fixed and the moving scan; those of the labels where given.
        mask: on the field's grid, foreground above 0; None: fixed_labels above 0.
        pairs: landmarks.
        surface: whether to measure hd95_mm and nsd, which takes longer.
        tolerance_mm: of nsd.
        l2r: also as the Learn2Reg challenge does.

    Returns:
        With labels: labels, mean, n, as metrics.overlap gives them, of the labels as
        they lay (`_before`) and warped. With landmarks: landmarks, see
        metrics.summarize_errors. field, see regularity.field_scores; empty for affines
        without a grid. With l2r:
        learn2reg, see learn2reg.scores. undefined: metric -> reason, or metric -> id ->
        reason. warnings: one line each. None where undefined.

    Raises:
        ValueError: one label map without the other.
        UserError: `schema`: no field acts first, no labels, scans or mask give a grid,
            and there are no landmarks, or l2r asks for a grid;
            `grid_mismatch`: the mask lies on another grid than the field, or the field
            covers none of the fixed scan's grid; `no_overlap`: the transform leads no
            voxel of it into that of the moving scan.
    """
    if (fixed_labels is None) != (moving_labels is None):
        raise ValueError("fixed_labels and moving_labels belong together, got one")
    report: dict[str, Any] = {"undefined": {}, "warnings": []}
    if fixed_labels is not None and moving_labels is not None:
        grids = mapping.grid_of(fixed_labels), mapping.grid_of(moving_labels)
    field, known = _field(transform, mask, grids)
    if field is None and (pairs is None or l2r):
        raise UserError(
            "schema",
            "schema: a grid to be judged on expected, got none, as no field acts "
            "first; name the labels of both scans or a mask of the fixed one",
            USAGE,
        )
    if grids is not None:
        lies = belonging.fit(transform, *grids)
        belonging.check(lies, "the transform")
        report["warnings"] += lies.warnings
    if fixed_labels is not None and moving_labels is not None:
        report |= _overlap(
            transform, fixed_labels, moving_labels, surface, tolerance_mm
        )
        report["warnings"] += _label_sets(fixed_labels, moving_labels)
        report["warnings"] += _worse_labels(report["labels"])
    if pairs is not None:
        errors = metrics.target_errors(transform, pairs.fixed, pairs.moving)
        report["landmarks"] = metrics.summarize_errors(*errors)
        both = pairs.fixed, pairs.moving
        report["warnings"] += metrics.landmark_warnings(transform, *both, *errors)
        for name in ("tre_mm_before_std", "tre_mm_std"):
            if math.isnan(report["landmarks"][name]):
                report["undefined"][name] = "one point has no spread"
    report["field"] = {}
    if field is None:
        report["warnings"].append(
            "no grid for regularity: no field acts first, and no labels, scans or "
            "mask give one"
        )
    else:
        report["field"] = _regularity(field, known, fixed_labels, mask, report)
    if l2r:
        given = (fixed_labels, moving_labels)
        where = None if mask is None else mask.data > 0
        if mask is not None and grids is not None:
            what = "the mask of Learn2Reg's scores was brought onto the fixed grid"
            where = _brought(mask, grids[0], what, report)
        report["learn2reg"] = _learn2reg(
            transform, field, given, grids, mask=where, pairs=pairs
        )
    return as_json(report)


def score_files(
    files: Files,
    *,
    surface: bool = True,
    tolerance_mm: float = metrics.TOLERANCE_MM,
    l2r: bool = False,
) -> dict[str, Any]:
    """Judges one transform from its files.

    Args:
        files: of the pair.
        surface, tolerance_mm, l2r: as in `score`.

    Returns:
        As `score`.

    Raises:
        UserError: a file cannot be used, or they do not fit together; reason says why.
    """
    _check_both(files)
    fixed, moving = (
        scans.read_labels(path) if path else None
        for path in (files.fixed_label, files.moving_label)
    )
    mask = scans.read_labels(files.fixed_mask) if files.fixed_mask else None
    stored = tuple(
        scans.read_grid(path) if path else None for path in (files.fixed, files.moving)
    )
    pairs = _landmarks(files, stored)
    both = stored if files.fixed else (fixed, moving)
    if mask and not both[1] and transforms.spelling(files.transform) == "l2r":
        raise UserError(
            "schema",
            f"schema: {shown(files.transform)}: the label maps of both scans, whose "
            "voxels a Learn2Reg field is in, expected, got none; name both, in a list "
            "these or the scans, or convert it to .h5 first",
            USAGE,
        )
    transform = mapping.read(files.transform, fixed=both[0] or mask, moving=both[1])
    read = {"fixed_label": fixed, "moving_label": moving, "fixed_mask": mask}
    read |= {"fixed": stored[0], "moving": stored[1]}
    report = score(
        transform,
        fixed_labels=fixed,
        moving_labels=moving,
        grids=tuple(map(mapping.grid_of, both)) if both[0] else None,
        mask=mask,
        pairs=pairs,
        surface=surface,
        tolerance_mm=tolerance_mm,
        l2r=l2r,
    )
    report["warnings"] = [*nifti.told_of(read), *report["warnings"]]
    return report


def score_case(
    name: str,
    files: Files,
    *,
    surface: bool = True,
    tolerance_mm: float = metrics.TOLERANCE_MM,
    l2r: bool = False,
) -> Case:
    """Judges one pair, or says why it cannot be judged.

    Args:
        name: of the case.
        files: of the pair.
        surface, tolerance_mm, l2r: as in `score`.

    Returns:
        Case.
    """
    try:
        report = score_files(files, surface=surface, tolerance_mm=tolerance_mm, l2r=l2r)
    except Exception as any_error:  # a fault of ours too: the others are still judged
        error = of_item(any_error)
        message = " ".join(str(error).split())
        for path in filter(None, files):  # a table names no folder of this machine
            message = message.replace(shown(path), shown(os.path.basename(path)))
        return Case(name, None, error.reason, message, error.exit_code)
    return Case(name, report)


def score_cases(
    cases: Mapping[str, Files],
    *,
    surface: bool = True,
    tolerance_mm: float = metrics.TOLERANCE_MM,
    l2r: bool = False,
) -> Iterator[Case]:
    """Judges many pairs; those that cannot be are failed, the others go on.

    Args:
        cases: id -> files.
        surface, tolerance_mm, l2r: as in `score`.

    Yields:
        One Case per entry, in order, when it is judged.
    """
    for name, files in cases.items():
        yield score_case(
            name, files, surface=surface, tolerance_mm=tolerance_mm, l2r=l2r
        )


def case_row(case: Case) -> dict[str, Any]:
    """One line of the table of cases.

    Args:
        case: done or failed.

    Returns:
        id, status, reason, message; of a done one the mean of each metric over its
        labels, how many labels count, its landmarks and the regularity of its field.
    """
    row: dict[str, Any] = {
        "id": case.id,
        "status": "failed" if case.report is None else "ok",
        "reason": case.reason,
        "message": case.message,
    }
    if case.report is None:
        return row
    if case.report["warnings"]:
        row["status"], row["message"] = "warn", "; ".join(case.report["warnings"])
    row |= metric_row(case.report)
    row |= {f"labels_{name}": n for name, n in case.report.get("n", {}).items()}
    row["undefined"] = "; ".join(_reasons(case.report["undefined"]))
    return row


def metric_row(report: Mapping[str, Any]) -> dict[str, float | None]:
    """The metrics of one pair, one number each.

    Args:
        report: of `score`.

    Returns:
        Metric -> value; None where undefined.
    """
    row = dict(report.get("mean", {})) | report.get("landmarks", {})
    return row | report["field"] | report.get("learn2reg", {}).get("mean", {})


def label_rows(case: Case) -> list[dict[str, Any]]:
    """Lines of the table of labels.

    Args:
        case: done or failed.

    Returns:
        One per label: id, label, metrics, and why any is undefined.
    """
    if case.report is None:
        return []
    compat = case.report.get("learn2reg", {})
    reasons = [case.report["undefined"], compat.get("undefined", {})]
    rows = []
    for label, values in case.report.get("labels", {}).items():
        row = {"id": case.id, "label": int(label)} | values
        row |= compat.get("labels", {}).get(label, {})
        why = [
            f"{name}: {found[label]}"
            for undefined in reasons
            for name, found in undefined.items()
            if isinstance(found, Mapping) and label in found
        ]
        rows.append(row | {"undefined": "; ".join(why)})
    return rows


def summarize_cases(cases: Iterable[Case]) -> dict[str, Any]:
    """Many cases in a few numbers.

    Args:
        cases: done and failed.

    Returns:
        cases: how many there are, are done and failed; metrics: metric -> mean, std,
        median, worst30, n, undefined over the cases; labels: label -> metric -> the
        same over the cases that have the label; failed: id, reason and message of each.
        With Learn2Reg's scores also quantile_l2r, of all metrics. None where undefined.
    """
    cases = list(cases)
    done = [case for case in cases if case.report is not None]
    compat = any("learn2reg" in case.report for case in done)
    per_case = [metric_row(case.report) for case in done]
    labels: dict[int, list[dict[str, Any]]] = {}
    for row in (row for case in done for row in label_rows(case)):
        values = {k: v for k, v in row.items() if k not in ("id", "label", "undefined")}
        labels.setdefault(row["label"], []).append(values)
    failed = [case for case in cases if case.report is None]
    return as_json(
        {
            "cases": {
                "total": len(cases),
                "done": len(done),
                "failed": len(failed),
            },
            "metrics": _columns(per_case, compat),
            "labels": {i: _columns(labels[i], compat) for i in sorted(labels)},
            "failed": [
                {"id": c.id, "reason": c.reason, "message": c.message} for c in failed
            ],
        }
    )


def definitions(*, l2r: bool = False) -> dict[str, str]:
    """What every metric is.

    Args:
        l2r: with those of the challenge.

    Returns:
        Metric -> one line.
    """
    return metrics.DEFINITIONS | (learn2reg.DEFINITIONS if l2r else {})


def _columns(rows: list[dict[str, Any]], compat: bool) -> dict[str, dict[str, Any]]:
    """Each metric over the rows that have it."""
    out = {}
    for name in dict.fromkeys(name for row in rows for name in row):
        if name == "points":
            continue
        values = [row[name] for row in rows if name in row]
        out[name] = summarize(values, metric=name)._asdict()
        out[name]["better"] = better(name)
        if compat:
            out[name]["quantile_l2r"] = quantile_l2r(values, metric=name)
    return out


def _check_both(files: Files) -> None:
    """Refuses what is named of one scan alone."""
    for what, one, other in (
        ("labels", files.fixed_label, files.moving_label),
        ("points", files.fixed_points, files.moving_points),
        ("files", files.fixed, files.moving),
    ):
        if bool(one) != bool(other):
            raise UserError(
                "schema",
                f"schema: the {what} of both scans belong together, got those of one; "
                "name both",
                USAGE,
            )


def _landmarks(
    files: Files, stored: tuple[Volume | None, Volume | None]
) -> PointPairs | None:
    if files.landmarks:
        return points.read_points(files.landmarks)
    if not files.fixed_points:
        return None
    tables = files.fixed_points, files.moving_points
    return points.read_pair(tables, files.points_frame, stored)


def _field(
    transform: mapping.Mapping, mask: Volume | None, grids: tuple[Grid, Grid] | None
) -> tuple[mapping.Field | None, np.ndarray | None]:
    """The whole map, on the grid of a field that acts first, else of mask or scan; and
    where it can be differentiated, None for everywhere.

    A field behind an affine does not lie where the map starts. No map without a grid.
    """
    known = None
    if len(transform.parts) == 1 and transform.fields:
        field = transform.fields[0]
    else:
        first = transform.parts[:1]
        found = [part.grid for part in first if isinstance(part, mapping.Field)]
        found += [] if mask is None else [mapping.grid_of(mask)]
        found += [] if grids is None else [grids[0]]
        if not found:
            return None, None
        whole = mapping.flatten(transform, found[0])
        field = mapping.Field(whole, found[0].vox2world)
        own = bool(first) and isinstance(first[0], mapping.Field)  # which ends nowhere
        if mapping.Mapping(transform.parts[own:]).fields:
            known = regularity.measurable(transform, found[0])
    if mask is not None:
        # Of the field, its first component stands for the grid.
        stand_in = Volume(field.disp_mm[..., 0], field.vox2world)
        nifti.check_same_grid(stand_in, mask)
    return field, known


def _regularity(
    field: mapping.Field,
    known: np.ndarray | None,
    labels: Volume | None,
    mask: Volume | None,
    report: dict[str, Any],
) -> dict[str, float]:
    """Scores of the field; adds to the report's undefined and warnings."""
    foreground = None if mask is None else mask.data > 0
    if mask is None and labels is not None:
        what = "the foreground, labels above 0, was brought onto the field's grid"
        foreground = _brought(labels, field.grid, what, report)
    if known is not None and not known.all():
        report["warnings"].append(
            f"fov: {100 * (1 - known.mean()):.3g} % of the grid lie where a field of "
            "the chain ends or beyond: left out of the regularity"
        )
    found = regularity.field_scores(
        field.disp_mm,
        field.vox2world,
        mask=foreground,
        l2r_mask=None if mask is None else foreground,
        known=known,
    )
    for name, value in found.items():
        if math.isnan(value):
            reason = regularity.field_reason(name, field.disp_mm.shape[:3])
            report["undefined"][name] = reason
    return found


def _overlap(
    transform: mapping.Mapping,
    fixed: Volume,
    moving: Volume,
    surface: bool,
    tolerance_mm: float,
) -> dict[str, Any]:
    """Labels as they lie and warped."""
    grid, still = mapping.grid_of(fixed), mapping.Mapping(())
    before = moving.data
    if not _on_grid(moving, grid):
        before = mapping.resample(still, moving, grid, interp="nearest")
    after = mapping.resample(transform, moving, grid, interp="nearest")
    warped = {"before": before, "": after}
    return metrics.overlap(
        fixed, moving, warped, surface=surface, tolerance_mm=tolerance_mm
    )


def _worse_labels(labels: Mapping[int, Mapping[str, float | None]]) -> list[str]:
    """Warns of labels that the transform takes apart."""
    means = metrics.shared_means(labels, ("dsc_before", "dsc"))
    if means is None or means[0] <= means[1] + 0.01:
        return []
    before, after = means
    return [
        f"similarity: the labels overlap less with the transform (DSC {after:.3f}) "
        f"than without it ({before:.3f}): of another pair, or scans exchanged?"
    ]


def _on_grid(volume: Volume, grid: mapping.Grid) -> bool:
    gap = np.abs(volume.vox2world - grid.vox2world).max()
    return volume.data.shape == tuple(grid.shape) and bool(gap < 1e-4)


def _label_sets(fixed: Volume, moving: Volume) -> list[str]:
    """Warns of labels that only one scan has, or none."""
    a, b = (set(np.unique(v.data).tolist()) - {0} for v in (fixed, moving))
    if not a | b:
        return ["label_set: neither map has a label, nothing overlaps"]
    return [
        f"label_set: only the {name} labels have {', '.join(map(str, sorted(more)))}"
        for name, more in (("fixed", a - b), ("moving", b - a))
        if more
    ]


def _brought(
    volume: Volume, grid: Grid, what: str, report: dict[str, Any]
) -> np.ndarray:
    """Where a mask or labels are above 0, on a grid; from another one that is told."""
    above = volume.data > 0
    if _on_grid(volume, grid):
        return above
    report["warnings"].append(f"grid_mismatch: {what}")
    volume = volume._replace(data=above.astype(np.uint8))
    still = mapping.Mapping(())
    return mapping.resample(still, volume, grid, interp="nearest") > 0


def _learn2reg(
    transform: mapping.Mapping,
    field: mapping.Field,
    labels: tuple[Volume | None, Volume | None],
    grids: tuple[Grid, Grid] | None,
    *,
    mask: np.ndarray | None,
    pairs: PointPairs | None,
) -> dict[str, Any]:
    """On the grid of the fixed scan, or, unknown, of the field for both scans."""
    fixed, moving = labels
    if grids is None:
        disp_mm, places = field.disp_mm, [field.vox2world] * 2
    else:
        disp_mm = mapping.flatten(transform, grids[0])
        places = [grid.vox2world for grid in grids]
    indices = [None, None]
    if pairs is not None:
        # Rounded: the way through mm must not lead a point off the outermost voxels.
        indices = [
            np.round((p - m[:3, 3]) @ np.linalg.inv(m[:3, :3]).T, 6)
            for p, m in zip((pairs.fixed, pairs.moving), places, strict=True)
        ]
    return learn2reg.scores(
        learn2reg.voxel_displacement(disp_mm, *places),
        fixed_labels=None if fixed is None else fixed.data,
        moving_labels=None if moving is None else moving.data,
        mask=mask,
        fixed_points=indices[0],
        moving_points=indices[1],
        moving_spacing_mm=tuple(np.linalg.norm(places[1][:3, :3], axis=0)),
    )


def _reasons(undefined: Mapping[str, Any]) -> list[str]:
    """One text per metric."""
    return [
        f"{name}: "
        + (
            ", ".join(f"{reason} ({label})" for label, reason in found.items())
            if isinstance(found, Mapping)
            else found
        )
        for name, found in undefined.items()
    ]
