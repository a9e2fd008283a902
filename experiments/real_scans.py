"""Manifest of the small real-scan collection: head-neck, chest, abdomen, liver, lung.

    python -m experiments.real_scans --data=FOLDER --out=runs/real
    python -m data_pipeline.prepare --manifest runs/real/manifest.json \
        --data-root FOLDER --out runs/real/prepared --shape 96,96,80 --spacing 4
    python -m experiments.prealign --data=runs/real/prepared

12 head-neck patients train, the other 4 are held out (split `val`: 12 ordered pairs);
the liver, lung, chest and abdomen scans are too few to hold any out and all train.
--fold=1, 2 or 3 holds out other four: together each patient once (cross_validate.py);
--fold=-1 nobody, for weights to use rather than to judge.
`collection.json` beside it also lists what nothing is trained on: scans of other kinds
and label maps without a CT, for `data_pipeline.check`.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from experiments import cli
from unireg_jax.errors import USAGE, UserError

# Head-neck patients in four parts; `unireg_heldout` leaves the first one out.
FOLDS = (
    ("0022", "0061", "0096", "0112"),
    ("0004", "0034", "0082", "0099"),
    ("0013", "0059", "0083", "0109"),
    ("0017", "0060", "0087", "0095"),
)
HELD_OUT = FOLDS[0]
LUNG_LOBES = range(10, 15)
# Structures that both abdomen scans show and that a registration can hope to match.
ABDOMEN = (
    "spleen",
    "kidney_right",
    "kidney_left",
    "gallbladder",
    "liver",
    "stomach",
    "pancreas",
    "adrenal_gland_right",
    "adrenal_gland_left",
    "duodenum",
    "aorta",
    "inferior_vena_cava",
    "portal_vein_and_splenic_vein",
    "vertebrae_T11",
    "vertebrae_T12",
    "vertebrae_L1",
)


class _Rows(list):
    """Rows of a manifest; label maps are written as they are named."""

    def __init__(self, data: Path, out: Path):
        super().__init__()
        self._data, self._out = data, out

    def add(
        self, name, image, task, subject, split="train", label=None, names=None
    ) -> None:
        """Adds one scan; paths are relative to the collection."""
        data, out = self._data, self._out
        if not (data / image).is_file():
            raise UserError("not_found", f"--data: {data / image} is not there", USAGE)
        row = {
            "id": name,
            "image": os.path.relpath(data / image, out),
            "task": task,
            "subject": subject,
            "split": split,
        }
        if label:
            path = out / f"{name}.labels.json"
            path.write_text(json.dumps(names, indent=1))
            row |= {
                "label": os.path.relpath(data / label, out),
                "label_map": path.name,
            }
        self.append(row)


def manifest(data: Path, out: Path, held_out: Sequence[str] = HELD_OUT) -> list[dict]:
    """Rows of the manifest; writes the label maps beside it.

    Args:
        data: folder with headneck_openkbp/, chest_lidc0001/ and so on.
        out: folder of the manifest; paths are relative to it.
        held_out: head-neck patients of split `val`.

    Raises:
        UserError: exit code 2, a scan is not there.
    """
    rows = _Rows(data, out)
    add = rows.add

    folder = "headneck_openkbp"
    names = json.loads((data / folder / "labels.json").read_text())
    for path in sorted((data / folder / "images").glob("case_*.nii.gz")):
        case = path.name.removeprefix("case_").removesuffix(".nii.gz")
        split = "val" if case in held_out else "train"
        label = f"{folder}/labels/{path.name}"
        image = f"{folder}/images/{path.name}"
        add(f"hn_{case}", image, "headneck", f"hn_{case}", split, label, names)
    lidc, other = "chest_lidc0001", "chest_nsclc_r01_001"
    lobes = {str(i): "lungs" for i in LUNG_LOBES}
    image, label = f"{lidc}/ct.nii.gz", f"{lidc}/labels_totalseg.nii.gz"
    add("chest_lidc", image, "chest", "lidc0001", label=label, names=lobes)
    add(
        "chest_nsclc",
        f"{other}/ct.nii.gz",
        "chest",
        "nsclc_r01",
        label=f"{other}/labels_auto.nii.gz",
        names={"1": "lungs"},
    )
    for name, folder, subject in (
        ("abdomen_lidc", lidc, "lidc0001"),
        ("abdomen_ts", "abdomen_totalseg_example", "totalseg_example"),
    ):
        names = json.loads((data / folder / "labels.json").read_text())
        names = {k: v for k, v in names.items() if v in ABDOMEN}
        image, label = f"{folder}/ct.nii.gz", f"{folder}/labels_totalseg.nii.gz"
        add(name, image, "abdomen", subject, label=label, names=names)
    folder = "liver_multiphase/liver_hcc007_t1"
    for phase in ("pre", "art", "pvp"):
        add(f"liver_{phase}", f"{folder}/{phase}.nii.gz", "liver", "hcc007")
    for scan in ("baseline", "followup"):
        add(f"lung_{scan}", f"lung_elastix/{scan}.nii.gz", "lung", "elastix")
    return rows


def collection(data: Path, out: Path, held_out: Sequence[str] = HELD_OUT) -> list[dict]:
    """Rows of `manifest` and of everything else that is there.

    Writes the label maps beside the manifest. A label map without a CT stands in the
    place of its image, too: a check then says so, and still looks at its structures.

    Args:
        data: as in `manifest`.
        out: as in `manifest`.
        held_out: as in `manifest`.

    Raises:
        UserError: exit code 2, a scan is not there.
    """
    rows = _Rows(data, out)
    rows.extend(manifest(data, out, held_out))
    folder = "lung_elastix"
    for row in rows:
        scan = row["id"].removeprefix("lung_")
        mask = data / folder / f"{scan}_lungmask.nii.gz"
        if row["task"] == "lung" and mask.is_file():
            path = out / f"{row['id']}.labels.json"
            path.write_text(json.dumps({"1": "lung_right"}))
            row |= {"label": os.path.relpath(mask, out), "label_map": path.name}
    if (data / "abdomen_chaos").is_dir():
        folder = "abdomen_chaos"
        image, label = f"{folder}/ct.nii.gz", f"{folder}/label_liver.nii.gz"
        names = json.loads((data / folder / "labels.json").read_text())
        rows.add("abdomen_chaos", image, "abdomen", "chaos", "test", label, names)
    if (data / "brain_mr_voxelmorph").is_dir():
        folder = "brain_mr_voxelmorph"
        names = json.loads((data / folder / "labels.json").read_text())
        for who in ("subject_a", "subject_b"):
            image, label = (f"{folder}/{who}{end}.nii.gz" for end in ("", "_seg"))
            rows.add(f"brain_{who}", image, "headneck", who, "test", label, names)
    if (data / "abdomen_btcv_labels").is_dir():
        folder = "abdomen_btcv_labels"
        names = json.loads((data / folder / "labels.json").read_text())
        for path in sorted((data / folder / "labels").glob("*.nii.gz")):
            label = f"{folder}/labels/{path.name}"
            case = "btcv_" + path.name.split("_")[1]
            rows.add(case, label, "abdomen", case, "test", label, names)
    return list(rows)


def held_out(fold: int) -> tuple[str, ...]:
    """Patients of a part of FOLDS; of -1, nobody."""
    return FOLDS[fold] if fold >= 0 else ()


def main(argv) -> None:
    del argv
    out = Path(flags.FLAGS.out)
    out.mkdir(parents=True, exist_ok=True)
    for name, rows in (("collection", collection), ("manifest", manifest)):
        patients = held_out(flags.FLAGS.fold)
        text = json.dumps(rows(Path(flags.FLAGS.data), out, patients), indent=1)
        (out / f"{name}.json").write_text(text)
    print(out / "manifest.json")


if __name__ == "__main__":
    # Here, so that one script can import another.
    flags.DEFINE_string("data", None, "Folder of the collection.")
    flags.DEFINE_string("out", None, "Where manifest.json and label maps go.")
    last = len(FOLDS) - 1
    flags.DEFINE_integer("fold", 0, "Held out: of FOLDS; -1: nobody.", -1, last)
    flags.mark_flags_as_required(["data", "out"])
    cli.run(main)
