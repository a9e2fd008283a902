"""Vocabulary shared by data and model: body regions, pair types, one batch of pairs.

Standard library and NumPy only, so that importing it costs nothing. UniReg, eq. 3-4.
"""

import enum
from typing import Any, NamedTuple

# Value of int16 HU volumes where the network grid lies outside the scan's own field of
# view, or where that is padded. Below every HU a scanner stores (-1024 after clipping),
# so one array carries both the intensities and the validity mask.
OUTSIDE_HU = -32768


class Region(enum.IntEnum):
    """Anatomical prior of a pair: index into the task one-hot T (eq. 3)."""

    HEADNECK = 0
    CHEST = 1
    ABDOMEN = 2
    LIVER = 3


class PairType(enum.IntEnum):
    """Registration type: inter-patient e = [0, 1], intra-patient e = [1, 0] (eq. 4)."""

    INTER = 0
    INTRA = 1


class Task(NamedTuple):
    """A named registration problem: what the user asks for."""

    region: Region
    pair_type: PairType


# Lung is not a region of its own: the paper registers it as chest + intra (Table 3).
TASKS = {
    "headneck": Task(Region.HEADNECK, PairType.INTER),
    "chest": Task(Region.CHEST, PairType.INTER),
    "abdomen": Task(Region.ABDOMEN, PairType.INTER),
    "liver": Task(Region.LIVER, PairType.INTRA),
    "lung": Task(Region.CHEST, PairType.INTRA),
}


class PairBatch(NamedTuple):
    """One batch of pairs, NumPy on the host and jax.Array in the compiled step.

    Attributes:
        fixed: [B, X, Y, Z, 1] int16, HU; OUTSIDE_HU beyond the scan.
        moving: [B, X, Y, Z, 1] int16, HU, on its own network grid.
        fixed_labels: [B, X, Y, Z] uint8; 0 background, ids of the task's vocabulary.
        moving_labels: [B, X, Y, Z] uint8; all 0 when the pair has no labels.
        fixed_more, moving_more: [B, L, X, Y, Z] uint8, further ids of the same voxels,
            where organs overlap; 0 nothing. L is the same for a whole dataset, 0 if
            nothing overlaps; no layer repeats what another says of a voxel.
        align: [B, 4, 4] float32; fixed voxel -> moving voxel, the pre-alignment.
        region: [B] int32, Region.
        pair_type: [B] int32, PairType.
        pair: [B] int32, position of the pair in the dataset's pair list; of made pairs,
            beyond its end.
    """

    fixed: Any
    moving: Any
    fixed_labels: Any
    moving_labels: Any
    fixed_more: Any
    moving_more: Any
    align: Any
    region: Any
    pair_type: Any
    pair: Any


class ViewBatch(NamedTuple):
    """Two views of each of B volumes, for training the anatomical embedding.

    Attributes:
        hu: [B, 2, X, Y, Z, 1] int16, HU; OUTSIDE_HU beyond the scan.
        body: [B, 2, X, Y, Z] bool, inside the body.
        vox2mm: [B, 2, 4, 4] float32, voxel of the view -> mm of the volume.
        volume: [B] int32, position of the volume in the dataset's index.
    """

    hu: Any
    body: Any
    vox2mm: Any
    volume: Any
