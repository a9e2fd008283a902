"""Manifest of the small real-scan collection: head-neck, chest, abdomen, liver, lung.

    python -m experiments.real_scans --data=FOLDER --out=runs/real
    python -m data_pipeline.prepare --manifest runs/real/manifest.json \
        --data-root FOLDER --out runs/real/prepared --shape 96,96,80 --spacing 4
    python -m experiments.prealign --data=runs/real/prepared

12 head-neck patients train, the other 4 are held out (split `val`: 12 ordered pairs);
the liver, lung, chest and abdomen scans are too few to hold any out and all train.
"""

import json
import os
from pathlib import Path

from absl import flags

from experiments import cli
from unireg_jax.errors import USAGE, UserError

HELD_OUT = ("0022", "0061", "0096", "0112")
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


def manifest(data: Path, out: Path) -> list[dict]:
    """Rows of the manifest; writes the label maps beside it.

    Args:
        data: folder with headneck_openkbp/, chest_lidc0001/ and so on.
        out: folder of the manifest; paths are relative to it.

    Raises:
        UserError: exit code 2, a scan is not there.
    """
    rows = []

    def add(name, image, task, subject, split="train", label=None, names=None):
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
        rows.append(row)

    folder = "headneck_openkbp"
    names = json.loads((data / folder / "labels.json").read_text())
    for path in sorted((data / folder / "images").glob("case_*.nii.gz")):
        case = path.name.removeprefix("case_").removesuffix(".nii.gz")
        split = "val" if case in HELD_OUT else "train"
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


def main(argv) -> None:
    del argv
    out = Path(flags.FLAGS.out)
    out.mkdir(parents=True, exist_ok=True)
    rows = manifest(Path(flags.FLAGS.data), out)
    (out / "manifest.json").write_text(json.dumps(rows, indent=1))
    print(out / "manifest.json")


if __name__ == "__main__":
    # Here, so that one script can import another.
    flags.DEFINE_string("data", None, "Folder of the collection.")
    flags.DEFINE_string("out", None, "Where manifest.json and label maps go.")
    flags.mark_flags_as_required(["data", "out"])
    cli.run(main)
