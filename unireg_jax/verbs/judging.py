"""Quality of a case: its numbers, its page, and the gate; shared by the verbs."""

import argparse
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from unireg_jax.errors import FAILED, UserError, shown
from unireg_jax.evaluation import metrics, quality
from unireg_jax.imaging import nifti
from unireg_jax.imaging.nifti import Volume
from unireg_jax.reports import case, page, pictures
from unireg_jax.verbs import outputs
from unireg_jax.verbs.messages import warn, with_reason

COLUMNS = ("coverage", "local_ncc", "local_ncc_gain", "mirror_sure")  # of a table
_TURNED = 1e6  # volume_factor of a label turned over: JSON has no infinity


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """--html and --qc-gate.

    Args:
        parser: of the verb.
    """
    add = parser.add_argument
    add(
        "--html",
        action="store_true",
        help=f"also CASE/{outputs.PAGE}, a page to look at",
    )
    add(
        "--qc-gate",
        action="store_true",
        help="a case whose quality is out of bounds fails; its results are kept apart "
        f"in OUT/{outputs.REJECTED}/CASE",
    )


def assess(
    fixed: Volume,
    moving: Volume,
    disp_mm: np.ndarray,
    affine: np.ndarray,
    *,
    mask: np.ndarray | None = None,
    fixed_labels: np.ndarray | None = None,
    scores: Mapping[str, Any] | None = None,
    back_mm: np.ndarray | None = None,
) -> dict[str, Any]:
    """Makes the part `quality` of a record.

    Args:
        fixed: scan on LPS+ axes.
        moving: scan on LPS+ axes.
        disp_mm: [X, Y, Z, 3] LPS mm on fixed, the whole map.
        affine: [4, 4], fixed world -> moving world, LPS mm.
        mask: [X, Y, Z] bool on fixed, where scans are compared.
        fixed_labels: [X, Y, Z] on fixed, for changes of volume.
        scores: of the record.
        back_mm: [X', Y', Z', 3] LPS mm on moving, of the opposite registration.

    Returns:
        Numbers by name, see quality.CHECKS, and volume_change: label -> factor. JSON
        has no infinity: volume_factor is a million where the map turns a label over.
    """
    found: dict[str, Any] = quality.measure(fixed, moving, disp_mm, affine, mask=mask)
    if back_mm is not None:
        found |= quality.inverse_consistency(fixed, disp_mm, moving, back_mm, mask=mask)
    if fixed_labels is not None:
        changes = quality.volume_changes(disp_mm, fixed.vox2world, fixed_labels)
        factor = quality.volume_factor(changes)
        found["volume_factor"] = _TURNED if factor == math.inf else factor
        found["volume_change"] = changes
    # Of labels that both maps bring into view: the means may be of different ones.
    gains = [
        row["dsc"] - row["dsc_affine"]
        for row in (scores or {}).get("labels", {}).values()
        if row.get("dsc") is not None and row.get("dsc_affine") is not None
    ]
    if gains:
        found["dsc_gain"] = float(np.mean(gains))
    return metrics.as_json(found)


def findings(record: Mapping[str, Any]) -> list[quality.Finding]:
    """Says which numbers of a record are out of bounds.

    Args:
        record: CASE_run.json.

    Returns:
        Findings; none for a record without quality.
    """
    values = case.numbers(record)
    return quality.judge(values, case.kind(record)) if values else []


def labels_to_outline(
    folder: Path, record: Mapping[str, Any], fixed: Volume, labels: Volume | None
) -> dict[str, np.ndarray]:
    """Gathers the labels that a page outlines.

    Args:
        folder: of the case, with the warped labels that its record may list.
        record: CASE_run.json.
        fixed: scan.
        labels: of the fixed scan, on its grid, or None.

    Returns:
        "warped" and "fixed", as far as there are such -> [X, Y, Z] whole numbers. Of
        warped labels that are not those of the record a warning is printed.
    """
    found, listed = {}, record.get("outputs")
    name = f"{record['case']}_warped_label.nii.gz"
    if isinstance(listed, Mapping) and name in listed:
        try:
            found["warped"] = _recorded_labels(folder / name, listed[name], fixed)
        except UserError as error:
            why = with_reason(error)
            warn(f"{record['case']}: warped labels are not outlined: {why}")
    if labels is not None:
        found["fixed"] = labels.data
    return found


def _recorded_labels(path: Path, known: Any, fixed: Volume) -> np.ndarray:
    """Labels on the grid of `fixed`, if the file is still the one of the record."""
    labels = nifti.read_labels(path)
    nifti.check_same_grid(fixed, labels)
    digest = outputs.digest(path)["sha256"]
    if not isinstance(known, Mapping) or known.get("sha256") != digest:
        raise UserError(
            "checksum",
            f"{shown(path)}: the file that was written expected, its digest is "
            "another; register again",
        )
    return labels.data


def page_text(record: Mapping[str, Any], drawn: pictures.Scene) -> str:
    """Makes the page of a case.

    Args:
        record: CASE_run.json.
        drawn: its scans.

    Returns:
        HTML.
    """
    kind, values = case.kind(record), case.numbers(record)
    return page.case_page(
        str(record.get("case", "")),
        status=case.status(record),
        findings=case.warnings(record),
        rows=case.rows(values, kind),
        slices=pictures.draw(drawn),
        labels=case.labels(record),
        facts=case.facts(record),
    )


def finish(
    args: argparse.Namespace,
    folder: Path,
    record: dict[str, Any],
    inputs: Any,
    result: Any,
) -> None:
    """Writes the page and lets the gate set the record's status; before it is sealed.

    Args:
        args: of `add_arguments`.
        folder: from `outputs.case_folder`.
        record: from `results.write`; changed in place.
        inputs: from `results.Files.read`.
        result: Registration.
    """
    if args.qc_gate and (found := findings(record)):
        record["status"], record["reason"] = "failed", found[0].reason
    if args.html:
        fixed, (target, _) = inputs.fixed, inputs.labels or (None, None)
        drawn = pictures.scene(
            *(fixed, inputs.moving, result.warped, result.disp_mm, result.affine),
            labels=labels_to_outline(folder, record, fixed, target),
        )
        text = page_text(record, drawn)
        (folder / outputs.PAGE).write_text(text, encoding="utf-8")


def hold_back(
    args: argparse.Namespace,
    folder: Path,
    record: Mapping[str, Any],
    *,
    tag: str = "",
    claim: Callable[[], None] = lambda: None,
) -> None:
    """Keeps the results of a case that the gate refuses apart; after it is sealed.

    Args:
        args: of `add_arguments`, with `out`.
        folder: from `outputs.case_folder`; emptied if the case is refused.
        record: from `finish`.
        tag, claim: as of `outputs.case_folder`.

    Raises:
        UserError: the first finding, exit code 4, if the gate refuses the case.
    """
    if not args.qc_gate or record["status"] != "failed":
        return
    name = str(record["case"])
    kept = Path(args.out) / outputs.REJECTED
    with outputs.case_folder(kept, name, True, tag=tag, claim=claim) as apart:
        for file in folder.iterdir():
            os.replace(file, apart / file.name)
    note = f"results are kept in {outputs.REJECTED}/{shown(name)}"
    if outputs.set_aside(Path(args.out), name):
        note += f", earlier ones in {outputs.SUPERSEDED}/{shown(name)}"
    _refuse(record, note)


def check_kept(args: argparse.Namespace, record: Mapping[str, Any]) -> None:
    """Refuses results of an earlier run that the gate does not let pass.

    Args:
        args: of `add_arguments`.
        record: of the results that are there.

    Raises:
        UserError: the first finding, exit code 4.
    """
    if args.qc_gate and findings(record):
        note = "these results are of a run without --qc-gate; --overwrite makes them"
        _refuse(record, f"{note} again and holds them back")


def _refuse(record: Mapping[str, Any], note: str) -> None:
    found = findings(record)
    more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
    raise UserError(found[0].reason, f"{found[0].line}{more}; {note}", FAILED)
