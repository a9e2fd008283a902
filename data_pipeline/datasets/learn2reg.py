"""Learn2Reg from 2021 on: a task's folder with its <TASK>_dataset.json.

    FOLDER/AbdomenCTCT_dataset.json
    FOLDER/imagesTr/AbdomenCTCT_0001_0000.nii.gz, labelsTr/…, masksTr/…, keypointsTr/…

Subjects of `registration_val` are held out (val), those of `test` are test, all others
train. Listed pairs are kept in their order: fixed, moving. Masks of LungCT and NLST
mark the lungs and are also taken as the structure `lungs`; landmarks set by hand
(landmarksTr) are preferred to key points.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_pipeline.datasets import abdomen, folders
from data_pipeline.datasets.manifest import Collection, Record
from unireg_jax.errors import USAGE, UserError
from unireg_jax.imaging.nifti import shown
from unireg_jax.manifest import load_json

# Task of Learn2Reg -> ours, the ids' names, and the structure that the masks mark.
TASKS = {
    "AbdomenCTCT": ("abdomen", abdomen.BTCV, None),
    "LungCT": ("lung", None, "lungs"),
    "NLST": ("lung", None, "lungs"),
    "ThoraxCBCT": ("lung", None, None),
}
_PAIRS = {
    "train": ("training_paired_images",),
    "val": ("registration_val",),
    "test": ("registration_test", "test_paired_images"),
}


def read(folder: Path) -> Collection:
    """Reads one task of Learn2Reg.

    Args:
        folder: holds <TASK>_dataset.json.

    Returns:
        Collection.

    Raises:
        UserError: exit code 2: another layout, a task that is not CT, a JSON that does
            not say what it should.
    """
    expected = "<TASK>_dataset.json beside imagesTr/, labelsTr/ …"
    folder = folders.check_root(folder, expected, lambda f: len(_descriptions(f)) == 1)
    (path,) = _descriptions(folder)
    name = path.name.removesuffix("_dataset.json")
    if name not in TASKS:
        known = ", ".join(TASKS)
        raise folders.refuse(path, f"one of {known}", f"{name}; use a manifest")
    data = _load(path)
    task, table, lungs = TASKS[name]
    items = _items(path, data)
    listed = {split: _listed(path, data, keys) for split, keys in _PAIRS.items()}
    for split, pairs in listed.items():
        for image in (image for pair in pairs for image in pair):
            alone = ("test" if split == "test" else "train", {"image": image})
            items.setdefault(folders.stem(image), alone)
    held_out = {_subject(image) for pair in listed["val"] for image in pair}
    records, absent = [], []
    for scan, (split, item) in sorted(items.items()):
        subject = _subject(scan)
        if subject in held_out:
            split = "val"
        place = {kind: _path(folder, item, kind) for kind in ("image", "label", "mask")}
        if split == "test" and not os.path.exists(place["image"]):
            absent.append(scan)  # images of the test phase are not always given
            continue
        mask, label = place["mask"], place["label"] if table else None
        records.append(
            Record(
                id=scan,
                image=place["image"],
                labels=label,
                label_map=table if label else None,
                task=task,
                subject=subject,
                split=split,
                group=scan.rpartition("_")[2],
                masks=((lungs, mask),) if lungs and mask else (),
                roi=mask,
                points=_points(folder, item),
                frame="voxel_from_0",
            )
        )
    return _with_pairs(records, listed, absent)


def _with_pairs(
    records: list[Record],
    listed: Mapping[str, list[tuple[str, str]]],
    absent: list[str],
) -> Collection:
    """The listed pairs of scans that are there, each in the split of its scans."""
    splits = {record.id: record.split for record in records}
    pairs, dropped = [], 0
    for split, found in listed.items():
        for images in found:
            fixed, moving = (folders.stem(image) for image in images)
            if splits.get(fixed) == splits.get(moving) == split:
                pairs.append((fixed, moving))
            else:
                dropped += fixed in splits and moving in splits
    notes = []
    if absent:
        notes.append(f"{len(absent)} test scans are not here, such as {absent[0]}")
    if dropped:
        notes.append(
            f"{dropped} training pairs hold a subject of val, and are left out"
        )
    return Collection(records, tuple(dict.fromkeys(pairs)), tuple(notes))


def _descriptions(folder: Path) -> list[Path]:
    return folders.visible(folder, "*_dataset.json")


def _load(path: Path) -> Mapping[str, Any]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError("schema", f"{shown(path)}: {error}", USAGE) from error
    data = load_json(path.name, text)
    if not isinstance(data, Mapping):
        raise folders.refuse(path, "a JSON object", "another; download it again")
    return data


def _list(path: Path, data: Mapping[str, Any], key: str) -> list[Any]:
    value = data.get(key) or []
    if not isinstance(value, list):
        raise folders.refuse(path, f"a list {key!r}", "another; download it again")
    return value


def _items(path: Path, data: Mapping[str, Any]) -> dict[str, tuple[str, dict]]:
    """Scan -> its split and its files as listed."""
    found = {}
    for key, split in (("training", "train"), ("test", "test")):
        for item in _list(path, data, key):
            item = {"image": item} if isinstance(item, str) else item
            if not isinstance(item, dict) or not isinstance(item.get("image"), str):
                raise folders.refuse(
                    path, f'{key}: {{"image": …}}', f"{str(item)[:60]}; mend the list"
                )
            found.setdefault(folders.stem(item["image"]), (split, item))
    return found


def _listed(
    path: Path, data: Mapping[str, Any], keys: tuple[str, ...]
) -> list[tuple[str, str]]:
    """(fixed, moving) images of the lists of pairs."""
    found = []
    for key in keys:
        for pair in _list(path, data, key):
            try:
                fixed, moving = pair["fixed"], pair["moving"]
                found.append((str(fixed), str(moving)))
            except (TypeError, KeyError) as error:
                got = f"{str(pair)[:60]}; mend the list"
                expected = f'{key}: {{"fixed": …, "moving": …}}'
                raise folders.refuse(path, expected, got) from error
    return found


def _subject(image: str) -> str:
    """AbdomenCTCT_0001 of AbdomenCTCT_0001_0000."""
    return folders.stem(image).rpartition("_")[0]


def _path(folder: Path, item: Mapping[str, Any], kind: str) -> str | None:
    """A file of a scan: as listed, else beside its image if it is there."""
    if isinstance(item.get(kind), str):
        return os.fspath(folder / item[kind])
    place = folder / _beside(item["image"], f"{kind}s")
    return os.fspath(place) if place.is_file() else None


def _points(folder: Path, item: Mapping[str, Any]) -> str | None:
    """Landmarks of a scan, else its key points."""
    for kind in ("landmarks", "keypoints"):
        listed = item.get(kind)
        listed = listed if isinstance(listed, str) else _beside(item["image"], kind)
        # Lists name some of them like the image.
        place = folder / f"{listed.removesuffix('.csv').removesuffix('.nii.gz')}.csv"
        if place.is_file():
            return os.fspath(place)
    return None


def _beside(image: str, kind: str) -> str:
    return image.replace("images", kind, 1)
