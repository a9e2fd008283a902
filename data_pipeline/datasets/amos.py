"""AMOS22: abdominal CT with 15 organs; its MR scans (ids above 500) are left out.

    FOLDER/imagesTr/amos_0001.nii.gz, labelsTr/…, imagesVa/…, labelsVa/…, imagesTs/…

imagesTr is train, imagesVa val, imagesTs test (without labels).
"""

from pathlib import Path

from data_pipeline.datasets import abdomen, folders, nnunet
from data_pipeline.datasets.manifest import Collection

_LAST_CT = 500


def read(folder: Path) -> Collection:
    """Reads the CT scans.

    Args:
        folder: see above.

    Returns:
        Collection, task abdomen.

    Raises:
        UserError: exit code 2, the folder has another layout.
    """
    expected = "imagesTr/amos_0001.nii.gz, … with labelsTr/"
    folder = folders.check_root(folder, expected, _fits)
    own = bool(folders.scans(folder / "imagesVa"))
    trained = {folders.stem(p): "train" for p in folders.scans(folder / "imagesTr")}
    records = nnunet.cases(
        folder,
        abdomen.AMOS,
        "abdomen",
        trained if own else {},
        sets={"Tr": "train", "Va": "val", "Ts": "test"},
    )
    ct = [record for record in records if _number(record.id) <= _LAST_CT]
    notes = []
    if left := len(records) - len(ct):
        notes.append(f"{left} MR scans are left out")
    return Collection(ct, notes=tuple(notes))


def _fits(folder: Path) -> bool:
    return bool(folders.scans(folder / "imagesTr", "amos_*"))


def _number(name: str) -> int:
    digits = name.removeprefix("amos_")
    return int(digits) if digits.isdigit() else 0
