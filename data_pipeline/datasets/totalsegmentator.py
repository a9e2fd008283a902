"""TotalSegmentator: CT of all body regions, one mask per structure (104 or 117).

    FOLDER/meta.csv
    FOLDER/s0000/ct.nii.gz, FOLDER/s0000/segmentations/<structure>.nii.gz

A scan serves `chest`, `abdomen`, both or none by its `study_type` in meta.csv; without
one, by its masks: lungs and heart, or liver, spleen and kidney. The split is that of
meta.csv, else one by a seed.
"""

import csv
import os
import re
from collections.abc import Mapping
from pathlib import Path

from data_pipeline.datasets import folders, manifest
from data_pipeline.datasets.manifest import Collection, Record
from unireg_jax.errors import UserError
from unireg_jax.imaging import nifti

_WORDS = {
    "chest": r"thorax|thx|chest|lung|polytrauma|whole body",
    "abdomen": r"abdomen|abd\b|abdominal|liver|polytrauma|whole body",
}
# Without a study type: a scan shows the region if all of these are in it.
_MARKS = {
    "chest": ("heart", "lung_upper_lobe_left", "lung_lower_lobe_right"),
    "abdomen": ("liver", "kidney_left", "spleen"),
}


def read(folder: Path) -> Collection:
    """Reads all scans that show chest or abdomen.

    Args:
        folder: see above.

    Returns:
        Collection, tasks chest and abdomen; a scan that shows both is listed twice.

    Raises:
        UserError: exit code 2, the folder has another layout.
    """
    expected = "s0000/ct.nii.gz with s0000/segmentations/, … and meta.csv"
    folder = folders.check_root(folder, expected, lambda f: bool(_cases(f)))
    cases = _cases(folder)
    meta = _meta(folder / "meta.csv")
    splits = folders.split_subjects(case.name for case in cases)
    records, others = [], []
    for case in cases:
        row = meta.get(case.name, {})
        masks = tuple(
            (folders.stem(path), os.fspath(path))
            for path in folders.scans(case / "segmentations")
        )
        tasks = _tasks(row, dict(masks))
        if not tasks:
            others.append(case.name)
        split = row.get("split") or ""
        for task in tasks:
            records.append(
                Record(
                    id=f"{case.name}_{task}",
                    image=folders.existing(case, "ct"),
                    labels=None,
                    label_map=None,
                    task=task,
                    subject=case.name,
                    split=split if split in manifest.SPLITS else splits[case.name],
                    masks=masks,
                )
            )
    notes = []
    if others:
        notes.append(
            f"{len(others)} scans of other regions are left out, such as {others[0]}"
        )
    return Collection(records, notes=tuple(notes))


def _cases(folder: Path) -> list[Path]:
    return [
        case
        for case in folders.visible(folder, "s[0-9]*")
        if folders.existing(case, "ct") and (case / "segmentations").is_dir()
    ]


def _meta(path: Path) -> dict[str, Mapping[str, str]]:
    """Rows of meta.csv by scan; none without the file."""
    if not path.is_file():
        return {}
    with open(path, newline="", encoding="utf-8-sig", errors="replace") as file:
        rows = list(csv.DictReader(file, delimiter=";"))
    if rows and "image_id" not in rows[0]:
        got = f"{', '.join(map(str, rows[0]))[:80]}; download it again"
        raise folders.refuse(path, "columns image_id;…;study_type;split", got)
    return {row["image_id"]: row for row in rows}


def _tasks(row: Mapping[str, str], masks: Mapping[str, str]) -> list[str]:
    """What a scan can train."""
    kind = (row.get("study_type") or "").lower()
    if kind:
        return [task for task, words in _WORDS.items() if re.search(words, kind)]
    return [
        task
        for task, names in _MARKS.items()
        if all(name in masks and _marked(masks[name]) for name in names)
    ]


def _marked(path: str) -> bool:
    """Whether a mask holds anything; one that cannot be read is told of later."""
    try:
        return bool(nifti.read_labels(path).data.any())
    except UserError:
        return True
