"""SegRap2023: head-neck CT of 120 patients with 45 organs at risk, which overlap.

    FOLDER/SegRap2023_Training_Set_120cases/segrap_0000/image.nii.gz, <Organ>.nii.gz …
    FOLDER/SegRap2023_Training_Set_120cases_OneHot_Labels/Task001/segrap_0000.nii.gz

Labels come from the map of 54 disjoint classes where there is one, else from the masks
of the organs; both give the same 45 structures. The scan without contrast is used,
targets (GTV) are not. Only the training set has labels: its subjects are split by a
seed.
"""

import os
from pathlib import Path

from data_pipeline.datasets import folders
from data_pipeline.datasets.manifest import Collection, Record

# Organ -> classes of the map. Where organs overlap, the one of fewer classes, or named
# first, is in the first layer.
ORGANS = {
    "BrainStem": (2,),
    "Chiasm": (3,),
    "Hippocampus_L": (8, 6),
    "Hippocampus_R": (9, 7),
    "TemporalLobe_L": (4, 6),
    "TemporalLobe_R": (5, 7),
    "Brain": (1, 2, 3, 4, 5, 6, 7, 8, 9),
    "Lens_L": (12,),
    "Lens_R": (13,),
    "Eye_L": (10, 12),
    "Eye_R": (11, 13),
    "OpticNerve_L": (14,),
    "OpticNerve_R": (15,),
    "IAC_L": (18,),
    "IAC_R": (19,),
    "Cochlea_L": (28,),
    "Cochlea_R": (29,),
    "TympanicCavity_L": (22, 20),
    "TympanicCavity_R": (23, 21),
    "VestibulSemi_L": (26, 24),
    "VestibulSemi_R": (27, 25),
    "ETbone_L": (32, 30),
    "ETbone_R": (33, 31),
    "MiddleEar_L": (18, 16, 20, 24, 28, 30),
    "MiddleEar_R": (19, 17, 21, 25, 29, 31),
    "Pituitary": (34,),
    "OralCavity": (35,),
    "Mandible_L": (36,),
    "Mandible_R": (37,),
    "Submandibular_L": (38,),
    "Submandibular_R": (39,),
    "Parotid_L": (40,),
    "Parotid_R": (41,),
    "Mastoid_L": (42,),
    "Mastoid_R": (43,),
    "TMjoint_L": (44,),
    "TMjoint_R": (45,),
    "SpinalCord": (46,),
    "Esophagus": (47,),
    "Larynx_Glottic": (49,),
    "Larynx_Supraglot": (50,),
    "PharynxConst": (51, 52),
    "Larynx": (48, 49, 50, 51),
    "Thyroid": (53,),
    "Trachea": (54,),
}
_ORDER = sorted(ORGANS, key=lambda name: len(ORGANS[name]))
LABEL_MAP = tuple(
    (raw_id, name)
    for raw_id in range(1, 55)
    for name in _ORDER
    if raw_id in ORGANS[name]
)


def read(folder: Path) -> Collection:
    """Reads the training set.

    Args:
        folder: see above; or the folder of the cases itself.

    Returns:
        Collection, task headneck.

    Raises:
        UserError: exit code 2, the folder has another layout.
    """
    expected = "segrap_0000/image.nii.gz, … or SegRap2023_Training_Set_120cases/ of it"
    folder = folders.check_root(folder, expected, lambda f: bool(_cases(f)))
    maps = _maps(folder)
    splits = folders.split_subjects(case.name for case in _cases(folder))
    records, bare = [], []
    for case in _cases(folder):
        label = next((p for f in maps if (p := folders.existing(f, case.name))), None)
        masks = () if label else _masks(case)
        if not label and not masks:
            bare.append(case.name)
        records.append(
            Record(
                id=case.name,
                image=folders.existing(case, "image"),
                labels=label,
                label_map=LABEL_MAP if label else None,
                task="headneck",
                subject=case.name,
                split=splits[case.name],
                masks=masks,
            )
        )
    notes = (f"{len(bare)} cases have no labels, such as {bare[0]}",) if bare else ()
    return Collection(records, notes=notes)


def _cases(folder: Path) -> list[Path]:
    """Case folders, in the folder or in its Training_Set."""
    inside = [f for f in folders.visible(folder, "*Training_Set*") if f.is_dir()]
    return [
        case
        for parent in (folder, *inside)
        for case in folders.visible(parent, "segrap_*")
        if folders.existing(case, "image")
    ]


def _maps(folder: Path) -> list[Path]:
    """Folders of maps of 54 classes, corrected ones first."""
    near = [folder, *([folder.parent] if "Training_Set" in folder.name else [])]
    named = [f for parent in near for f in folders.visible(parent, "*Labels*")]
    named.sort(key=lambda f: "Update" not in f.name)
    return [
        place
        for f in named
        for place in (f / "Task001", f)
        if folders.scans(place, "segrap_*")
    ]


def _masks(case: Path) -> tuple[tuple[str, str], ...]:
    found = ((name, folders.existing(case, name)) for name in _ORDER)
    return tuple((name, os.fspath(path)) for name, path in found if path)
