"""Learn2Reg from 2021 on: a task's folder with its <TASK>_dataset.json.

    FOLDER/AbdomenCTCT_dataset.json
    FOLDER/imagesTr/AbdomenCTCT_0001_0000.nii.gz, labelsTr/…, masksTr/…, keypointsTr/…

Subjects of `registration_val` are held out (val), those of `test` are test, all others
train. Listed pairs are kept in their order: fixed, moving. Masks of LungCT and NLST
mark the lungs and are also taken as the structure `lungs`. Points are those of the
listed pairs, of one kind for each list, see `manifest.learn2reg_points`.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_pipeline.datasets import abdomen, folders
from data_pipeline.datasets.manifest import Collection, Record
from unireg_jax.errors import USAGE, UserError
from unireg_jax.imaging.nifti import shown
from unireg_jax.manifest import learn2reg_points, load_json

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
                frame="voxel_from_0",
            )
        )
    return _with_pairs(folder, records, listed, absent)


def _with_pairs(
    folder: Path,
    records: list[Record],
    listed: Mapping[str, list[tuple[str, str]]],
    absent: list[str],
) -> Collection:
    """The listed pairs of scans that are there, each in the split of its scans."""
    splits = {record.id: record.split for record in records}
    kept: dict[str, list[tuple[str, str]]] = {split: [] for split in listed}
    dropped = 0
    for split, found in listed.items():
        for images in found:
            fixed, moving = _scans(images)
            if splits.get(fixed) == splits.get(moving) == split:
                kept[split].append(images)
            else:
                dropped += fixed in splits and moving in splits
    pairs = [_scans(images) for found in kept.values() for images in found]
    points, alone = _points(folder, kept)
    records = [record._replace(points=points.get(record.id)) for record in records]
    notes = []
    if absent:
        notes.append(f"{len(absent)} test scans are not here, such as {absent[0]}")
    if dropped:
        notes.append(
            f"{dropped} training pairs hold a subject of val, and are left out"
        )
    if alone:
        notes.append(
            f"{alone} pairs are without points, as a scan of theirs has others in an "
            "earlier pair"
        )
    return Collection(records, tuple(dict.fromkeys(pairs)), tuple(notes))


def _points(
    folder: Path, kept: Mapping[str, list[tuple[str, str]]]
) -> tuple[dict[str, str], int]:
    """Scan -> its table, and how many pairs go without: a scan has one table only."""
    points: dict[str, str] = {}
    alone = 0
    for found in kept.values():
        for images, tables in zip(found, learn2reg_points(folder, found), strict=True):
            places = [os.fspath(folder / table) for table in tables or ()]
            own = dict(zip(_scans(images), places, strict=False))
            if all(points.get(scan, place) == place for scan, place in own.items()):
                points |= own
            else:
                alone += 1
    return points, alone


def _scans(images: tuple[str, str]) -> tuple[str, str]:
    fixed, moving = (folders.stem(image) for image in images)
    return fixed, moving


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
    place = folder / item["image"].replace("images", f"{kind}s", 1)
    return os.fspath(place) if place.is_file() else None
