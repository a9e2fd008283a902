"""FLARE22: abdominal CT with 13 organs; the 50 labelled cases.

    FOLDER/Training/FLARE22_LabeledCase50/images/FLARE22_Tr_0001_0000.nii.gz
    FOLDER/Training/FLARE22_LabeledCase50/labels/FLARE22_Tr_0001.nii.gz
    FOLDER/Validation/…/FLARETs_0001_0000.nii.gz, where given: test, without labels

The labelled cases are split by a seed.
"""

import os
from pathlib import Path

from data_pipeline.datasets import abdomen, folders, nnunet
from data_pipeline.datasets.manifest import Collection, Record


def read(folder: Path) -> Collection:
    """Reads the labelled cases, and those for validation if they are there.

    Args:
        folder: see above; or FLARE22_LabeledCase50 itself.

    Returns:
        Collection, task abdomen.

    Raises:
        UserError: exit code 2, the folder has another layout.
    """
    expected = "Training/FLARE22_LabeledCase50/images/ and labels/ of FLARE22_Tr_0001 …"
    folder = folders.check_root(folder, expected, lambda f: _labelled(f) is not None)
    labelled = _labelled(folder)
    images = {nnunet.case_name(p): p for p in folders.scans(labelled / "images")}
    splits = folders.split_subjects(images)
    records = []
    for name, path in images.items():
        label = folders.existing(labelled / "labels", name)
        table = abdomen.FLARE if label else None
        split = splits[name]
        records.append(
            Record(name, os.fspath(path), label, table, "abdomen", name, split)
        )
    validation = folder / "Validation"
    for place in (validation, *folders.visible(validation)):
        for path in folders.scans(place, "FLARE*_0000"):
            name = nnunet.case_name(path)
            records.append(
                Record(name, os.fspath(path), None, None, "abdomen", name, "test")
            )
    return Collection(records)


def _labelled(folder: Path) -> Path | None:
    for place in (folder / "Training" / "FLARE22_LabeledCase50", folder):
        if folders.scans(place / "images", "FLARE*") and (place / "labels").is_dir():
            return place
    return None
