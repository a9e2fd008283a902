"""DIR-Lab 4DCT: ten patients, end of inhale (T00) and exhale (T50), 300 landmarks each.

    FOLDER/Case1Pack/Images/case1_T00_s.img, case1_T50_s.img
    FOLDER/Case1Pack/ExtremePhases/Case1_300_T00_xyz.txt, Case1_300_T50_xyz.txt

The files have no header: size and spacing are those that DIR-Lab publishes, HU is the
stored value - 1024. The first slice is the highest: of the landmarks those of the last
slices move farthest, and on exhale towards the first ones, as the diaphragm does. All
cases are test: fixed T00, moving T50. Names vary between cases (Case8Deploy,
case6_T00.img, case6_dirLab300_T00_xyz.txt); all of these are found.
"""

import os
import re
from pathlib import Path

from data_pipeline.datasets import folders
from data_pipeline.datasets.manifest import Collection, Record
from unireg_jax.imaging.raw import RawGrid

# Case -> size and spacing in plane, and slices of 2.5 mm.
CASES = {
    1: (256, 0.97, 94),
    2: (256, 1.16, 112),
    3: (256, 1.15, 104),
    4: (256, 1.13, 99),
    5: (256, 1.10, 106),
    6: (512, 0.97, 128),
    7: (512, 0.97, 136),
    8: (512, 0.97, 128),
    9: (512, 0.97, 128),
    10: (512, 0.97, 120),
}


def read(folder: Path) -> Collection:
    """Reads the two extreme phases of every case that is there.

    Args:
        folder: see above.

    Returns:
        Collection, task lung.

    Raises:
        UserError: exit code 2, the folder has another layout.
    """
    expected = "Case1Pack/, Case2Pack/, … each with Images/case1_T00_s.img"
    folder = folders.check_root(folder, expected, lambda f: bool(_packs(f)))
    records, pairs, notes = [], [], []
    for case, pack in _packs(folder).items():
        size, spacing, slices = CASES[case]
        shape, mm = (size, size, slices), (spacing, spacing, 2.5)
        grid = RawGrid(shape, mm, -1024, "LPI")
        files = [p for p in sorted(pack.rglob("*")) if not p.name.startswith(".")]
        found = {}
        for phase in ("T00", "T50"):
            image = _one(files, rf"case{case}_{phase}.*\.img")
            if image is not None:
                name = f"dirlab_case{case:02d}_{phase}"
                found[phase] = Record(
                    id=name,
                    image=image,
                    labels=None,
                    label_map=None,
                    task="lung",
                    subject=f"dirlab_case{case:02d}",
                    split="test",
                    group=phase,
                    points=_one(files, rf"case{case}_(dirlab)?300_{phase}_xyz\.txt"),
                    frame="voxel_from_1",
                    grid=grid,
                )
        if len(found) < 2:
            notes.append(f"case {case}: no T00 and T50 image in {pack.name}; left out")
            continue
        records += found.values()
        pairs.append(tuple(record.id for record in found.values()))
    return Collection(records, tuple(pairs), tuple(notes))


def _packs(folder: Path) -> dict[int, Path]:
    """Case -> folder, in order."""
    found = {}
    for path in folders.visible(folder):
        match = re.fullmatch(r"case(\d+)(pack|deploy)", path.name.lower())
        if match and path.is_dir() and int(match[1]) in CASES:
            found[int(match[1])] = path
    return dict(sorted(found.items()))


def _one(files: list[Path], pattern: str) -> str | None:
    """The first file of that name, whatever its case."""
    for path in files:
        if re.fullmatch(pattern, path.name, re.IGNORECASE):
            return os.fspath(path)
    return None
