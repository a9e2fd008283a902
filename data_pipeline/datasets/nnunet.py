"""nnU-Net's layout, versions 1 and 2: any CT dataset in it; needs --task.

    FOLDER/dataset.json, imagesTr/<case>_0000.nii.gz, labelsTr/<case>.nii.gz
    FOLDER/imagesTs/…, labelsTs/… where given; splits_final.json where given

`file_ending` of dataset.json is .nii.gz, .nii, or with the extra `itk` .nrrd or .mha.
Names come from `labels`; regions ("tumour": [2, 3]) may overlap. Every case is taken
for a subject of its own: where patients have several cases, or for tasks within one
patient, write a manifest. imagesTs is test; imagesTr is split as fold 0 of
splits_final.json says, else by a seed.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data_pipeline.datasets import folders
from data_pipeline.datasets.manifest import Collection, Record
from unireg_jax.imaging import itk_files
from unireg_jax.manifest import decode, load_json, stem

LabelMap = tuple[tuple[int, str], ...]
_ITK = (".nrrd", ".mha")


def read(folder: Path) -> Collection:
    """Reads a dataset in nnU-Net's layout.

    Args:
        folder: holds dataset.json.

    Returns:
        Collection; records have no task yet.

    Raises:
        UserError: exit code 2: another layout, several channels, another modality,
            files that are not read.
    """
    expected = "dataset.json beside imagesTr/ and labelsTr/"
    folder = folders.check_root(folder, expected, fits)
    path = folder / "dataset.json"
    data = load_json(path.name, decode(path))
    if not isinstance(data, Mapping):
        raise folders.refuse(path, "a JSON object", "another; download it again")
    channels = data.get("channel_names") or data.get("modality") or {"0": "CT"}
    channels = list(channels.values()) if isinstance(channels, Mapping) else [channels]
    if len(channels) != 1 or str(channels[0]).upper() not in ("CT", "RESCALE_TO_0_1"):
        got = f"{', '.join(map(str, channels))}; pass CT of one channel"
        raise folders.refuse(path, "the one channel CT", got)
    table, endings = label_map(path, data), _endings(path, data)
    return Collection(cases(folder, table, "", _folds(folder), endings=endings))


def fits(folder: Path) -> bool:
    """Whether a folder has dataset.json beside scans."""
    return (folder / "dataset.json").is_file() and bool(
        folders.visible(folder / "imagesTr")
    )


def cases(
    folder: Path,
    table: LabelMap,
    task: str,
    splits: Mapping[str, str],
    *,
    sets: Mapping[str, str] | None = None,
    endings: Sequence[str] = folders.NIFTI,
) -> list[Record]:
    """Lists the scans of the image folders.

    Args:
        folder: holds imagesTr and so on.
        table: label map.
        task: of all records; "" leaves it open.
        splits: case -> split, for those of imagesTr; empty: by a seed.
        sets: ending of the folders -> split; None: Tr and Ts.
        endings: of the files.

    Returns:
        Records, ids as the cases are called.
    """
    records = []
    for ending, split in (sets or {"Tr": "train", "Ts": "test"}).items():
        found = folders.scans(folder / f"images{ending}", endings=endings)
        images = {case_name(p): p for p in found}
        seeded = folders.split_subjects(images)
        for name, image in images.items():
            label = folders.existing(folder / f"labels{ending}", name, endings)
            if ending == "Tr":
                split = splits.get(name, "train") if splits else seeded[name]
            records.append(
                Record(
                    id=name,
                    image=os.fspath(image),
                    labels=label,
                    label_map=table if label else None,
                    task=task,
                    subject=name,
                    split=split,
                )
            )
    return records


def case_name(path: Path) -> str:
    """Gives the case of an image: its name without the channel _0000."""
    return stem(path).removesuffix("_0000")


def _endings(path: Path, data: Mapping[str, Any]) -> Sequence[str]:
    """Those of the files, by dataset.json; refuses files that are not read."""
    told = data.get("file_ending", folders.NIFTI[0])
    if told not in (*folders.NIFTI, *_ITK):
        expected = f"file_ending {', '.join((*folders.NIFTI, *_ITK))}"
        got = f"{str(told)[:60]}; convert images and labels to .nii.gz, and name that"
        raise folders.refuse(path, expected, got)
    endings = (told,) if told in _ITK else folders.NIFTI
    images = folders.scans(path.parent / "imagesTr", endings=endings)
    if not images:
        name = folders.visible(path.parent / "imagesTr")[0].name
        got = f"{name}; set file_ending to that of the files"
        raise folders.refuse(path, f"imagesTr/*{told} as file_ending says", got)
    if told in _ITK:
        itk_files.check_installed(images[0])
    return endings


def label_map(path: Path, data: Mapping[str, Any]) -> LabelMap:
    """Reads `labels` of dataset.json.

    Args:
        path: for messages.
        data: content of dataset.json.

    Returns:
        (raw id, name) pairs; of regions that share an id, the smaller ones first.

    Raises:
        UserError: exit code 2, it is neither version 1 nor 2.
    """
    labels = data.get("labels")
    expected = 'labels {"liver": 1} or {"1": "liver"}'
    if not isinstance(labels, Mapping) or not labels:
        raise folders.refuse(path, expected, f"{str(labels)[:60]}; mend it")
    ids: dict[str, list[int]] = {}
    for key, value in labels.items():
        if str(key).isdigit() and isinstance(value, str):  # version 1
            key, value = value, int(key)
        numbers = value if isinstance(value, list) else [value]
        if not all(isinstance(n, int) and 0 <= n <= 65535 for n in numbers):
            raise folders.refuse(path, expected, f"{key}: {value}; mend it")
        if str(key).lower() not in ("background", "ignore"):
            ids.setdefault(str(key), []).extend(n for n in numbers if n)
    order = sorted(ids, key=lambda name: len(ids[name]))
    numbers = sorted({n for found in ids.values() for n in found})
    return tuple((n, name) for n in numbers for name in order if n in ids[name])


def _folds(folder: Path) -> dict[str, str]:
    """Case -> train or val by the first fold, when the dataset has folds."""
    path = folder / "splits_final.json"
    if not path.is_file():
        return {}
    data = load_json(path.name, decode(path))
    try:
        held_out = {str(name): "val" for name in data[0]["val"]}
        return {**{str(name): "train" for name in data[0]["train"]}, **held_out}
    except (TypeError, KeyError, IndexError) as error:
        got = "another; remove the file to split by a seed"
        raise folders.refuse(path, '[{"train": [...], "val": [...]}]', got) from error
