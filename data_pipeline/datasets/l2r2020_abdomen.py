"""Learn2Reg 2020, task 3: abdominal CT of BTCV, 13 organs.

    FOLDER/Training/img/img0001.nii.gz, FOLDER/Training/label/label0001.nii.gz
    FOLDER/Testing/img/img0061.nii.gz
    FOLDER/pairs_val.csv (fixed,moving), where it is given

Subjects of pairs_val.csv are val; without it the labelled subjects are split by a seed.
"""

import csv
import io
import os
from pathlib import Path

from data_pipeline.datasets import abdomen, folders
from data_pipeline.datasets.manifest import Collection, Record
from unireg_jax.manifest import decode


def read(folder: Path) -> Collection:
    """Reads training and test scans.

    Args:
        folder: see above; or the folder of img/ and label/ itself.

    Returns:
        Collection, task abdomen.

    Raises:
        UserError: exit code 2, the folder has another layout.
    """
    expected = "Training/img/img0001.nii.gz, … with Training/label/label0001.nii.gz, …"
    folder = folders.check_root(folder, expected, lambda f: _labelled(f) is not None)
    labelled = _labelled(folder)
    labels = {_number(p): os.fspath(p) for p in folders.scans(labelled / "label")}
    images = {_number(p): os.fspath(p) for p in folders.scans(labelled / "img")}
    pairs = _pairs(folder)
    held_out = {number for pair in pairs for number in pair}
    splits = folders.split_subjects(number for number in images if number in labels)
    if held_out:
        splits = {n: "val" if n in held_out else "train" for n in images}
    records = [
        _record(number, image, labels.get(number), splits.get(number, "test"))
        for number, image in images.items()
    ]
    records += [
        _record(_number(p), os.fspath(p), None, "test")
        for p in folders.scans(folder / "Testing" / "img")
        if _number(p) not in images
    ]
    known = {record.id for record in records}
    named = [(f"btcv_{fixed}", f"btcv_{moving}") for fixed, moving in pairs]
    return Collection(records, tuple(p for p in named if known.issuperset(p)))


def _labelled(folder: Path) -> Path | None:
    """The folder that has img and label."""
    for place in (folder / "Training", folder):
        if folders.scans(place / "img") and folders.scans(place / "label"):
            return place
    return None


def _number(path: Path) -> str:
    """0001 of img0001.nii.gz and of label0001.nii.gz."""
    return folders.stem(path).lstrip("abcdefghijklmnopqrstuvwxyz_")


def _pairs(folder: Path) -> list[tuple[str, str]]:
    path = folder / "pairs_val.csv"
    if not path.is_file():
        return []
    rows = list(csv.DictReader(io.StringIO(decode(path)), skipinitialspace=True))
    try:
        return [(f"{int(r['fixed']):04d}", f"{int(r['moving']):04d}") for r in rows]
    except (KeyError, TypeError, ValueError) as error:
        got = f"{error}; mend or remove the file"
        raise folders.refuse(path, "columns fixed,moving of numbers", got) from error


def _record(number: str, image: str, label: str | None, split: str) -> Record:
    name = f"btcv_{number}"
    table = abdomen.BTCV if label else None
    return Record(name, image, label, table, "abdomen", name, split)
