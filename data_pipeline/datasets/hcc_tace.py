"""HCC-TACE-Seg (TCIA): multiphase liver CT as DICOM; needs the extra `dicom`.

    FOLDER/HCC_001/<date>-NA-<study>/<series>/1-01.dcm …

Every stack of slices of a study is a scan, also where several phases share a series.
Pairs are all ordered pairs within a study, since the liver of another date is a treated
one. Segmentations (one phase has them) are left out: a pair needs them on both sides.
Patients are split by a seed.
"""

import collections
import itertools
import os
from pathlib import Path

from data_pipeline.datasets import folders
from data_pipeline.datasets.manifest import Collection, Record
from unireg_jax.imaging import dicom

_MIN_SLICES = 8  # fewer are tests of the contrast's arrival


def read(folder: Path) -> Collection:
    """Reads all studies.

    Args:
        folder: see above.

    Returns:
        Collection, task liver.

    Raises:
        UserError: exit code 2: another layout, or pydicom is not installed.
    """
    expected = "HCC_001/, HCC_002/, … each with <study>/<series>/*.dcm"
    folder = folders.check_root(folder, expected, lambda f: bool(_patients(f)))
    splits = folders.split_subjects(p.name for p in _patients(folder))
    records, pairs, alone = [], [], []
    for patient in _patients(folder):
        found = [s for s in dicom.find_series(patient) if len(s.paths) >= _MIN_SLICES]
        studies: dict[str, list[Record]] = {}
        seen: collections.Counter[str] = collections.Counter()
        for series in found:
            name = f"{patient.name}_{series.date}_s{series.number}p{series.part}"
            seen[name] += 1
            studies.setdefault(series.study, []).append(
                Record(
                    id=f"{name}-{seen[name]}" if seen[name] > 1 else name,
                    image=os.path.dirname(series.paths[0]),
                    labels=None,
                    label_map=None,
                    task="liver",
                    subject=patient.name,
                    split=splits[patient.name],
                    group=" ".join(series.description.split()) or None,
                    slices=series.paths,
                )
            )
        for scans in studies.values():
            if len(scans) < 2:
                alone += [scan.id for scan in scans]
                continue
            records += scans
            names = [scan.id for scan in scans]
            pairs += itertools.permutations(names, 2)
    notes = []
    if alone:
        notes.append(
            f"{len(alone)} scans are alone in their study and left out, such as "
            f"{alone[0]}"
        )
    return Collection(records, tuple(pairs), tuple(notes))


def _patients(folder: Path) -> list[Path]:
    """Folders of patients that hold studies."""
    return [
        path
        for path in folders.visible(folder, "HCC_*")
        if any(study.is_dir() for study in folders.visible(path))
    ]
