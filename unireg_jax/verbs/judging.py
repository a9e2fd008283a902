"""Quality of a case: its numbers, its page, and the gate; shared by the verbs."""

import argparse
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from unireg_jax.errors import FAILED, UserError, shown
from unireg_jax.evaluation import metrics, quality
from unireg_jax.imaging.nifti import Volume
from unireg_jax.reports import case, page, pictures
from unireg_jax.verbs import outputs

PAGE = "qc.html"
REJECTED = "rejected"  # folder in OUT of cases that the gate holds back


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """--html and --qc-gate.

    Args:
        parser: of the verb.
    """
    add = parser.add_argument
    add("--html", action="store_true", help=f"also CASE/{PAGE}, a page to look at")
    add(
        "--qc-gate",
        action="store_true",
        help="a case whose quality is out of bounds fails; its results are kept apart "
        f"in OUT/{REJECTED}/CASE",
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
        Numbers by name, see quality.CHECKS, and volume_change: label -> factor.
    """
    found: dict[str, Any] = quality.measure(fixed, moving, disp_mm, affine, mask=mask)
    if back_mm is not None:
        found |= quality.inverse_consistency(fixed, disp_mm, moving, back_mm, mask=mask)
    if fixed_labels is not None:
        changes = quality.volume_changes(disp_mm, fixed.vox2world, fixed_labels)
        found["volume_factor"] = quality.volume_factor(changes)
        found["volume_change"] = changes
    mean = (scores or {}).get("mean", {})
    if mean.get("dsc") is not None and mean.get("dsc_affine") is not None:
        found["dsc_gain"] = mean["dsc"] - mean["dsc_affine"]
    return metrics.as_json(found)


def findings(record: Mapping[str, Any]) -> list[quality.Finding]:
    """Says which numbers of a record are out of bounds.

    Args:
        record: CASE_run.json.

    Returns:
        Findings; none for a record without quality.
    """
    values = case.numbers(record)
    return quality.judge(values, case.pair_type(record)) if values else []


def write_page(
    path: str | os.PathLike, record: Mapping[str, Any], drawn: pictures.Scene
) -> None:
    """Writes the page of a case.

    Args:
        path: of the file, written as it is: the caller sees to a temporary name.
        record: CASE_run.json.
        drawn: its scans.
    """
    kind, values = case.pair_type(record), case.numbers(record)
    text = page.case_page(
        str(record.get("case", "")),
        status=case.status(record),
        findings=case.warnings(record),
        rows=case.rows(values, kind),
        slices=pictures.draw(drawn),
        labels=case.labels(record),
        facts=case.facts(record),
    )
    Path(path).write_text(text, encoding="utf-8")


def reject(folder: Path, out: Path, record: Mapping[str, Any]) -> None:
    """Keeps the results of a case apart and refuses it.

    Args:
        folder: that holds the results; they are moved.
        out: OUT.
        record: with `findings`.

    Raises:
        UserError: always: the first finding, exit code 4.
    """
    name = str(record["case"])
    with outputs.case_folder(out / REJECTED, name, True) as apart:
        for file in folder.iterdir():
            os.replace(file, apart / file.name)
    found = findings(record)
    where = shown(Path(REJECTED) / name)
    more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
    raise UserError(
        found[0].reason, f"{found[0].line}{more}; results kept in {where}", FAILED
    )
