"""Which volumes meet, in which region, as which kind of pair, and how they are aligned.

Inter-patient tasks pair every volume with every volume of another subject;
intra-patient tasks every volume with every other of the same subject. Both directions
count: 20 subjects give 20 * 19 = 380 pairs (UniReg, Table 1). Where the index lists the
pairs of a task and split, as challenges do, these and no others are taken.
"""

import hashlib
import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data_pipeline import store
from unireg_jax.errors import DATA_CHANGED, USAGE, UserError
from unireg_jax.tasks import TASKS, PairType, Region

SPLITS = ("train", "val", "test")
_DIGITS = 16  # of one digest of `volume_digests`

Matrix = tuple[tuple[float, float, float, float], ...]


class Pair(NamedTuple):
    """Two volumes to be registered.

    Attributes:
        fixed: position of the fixed volume in the index's `volumes`.
        moving: position of the moving volume.
        task: name in `unireg_jax.tasks.TASKS`.
        region: anatomical prior.
        pair_type: inter- or intra-patient.
        align: 4 x 4, fixed voxel -> moving voxel, both on their network grids.
    """

    fixed: int
    moving: int
    task: str
    region: Region
    pair_type: PairType
    align: Matrix


def make_pairs(
    index: Mapping[str, Any],
    split: str,
    *,
    alignments: Mapping[str, Any] | None = None,
) -> list[Pair]:
    """Lists a split's pairs, task by task, in the order of the index.

    Without an entry in `alignments`, inter-patient pairs are aligned grid on grid: the
    centres of both bodies coincide. Intra-patient pairs are aligned in the world:

        align = inv(moving vox2world) @ fixed vox2world

    Args:
        index: from `store.read_index`.
        split: "train", "val" or "test".
        alignments: from `read_alignments`; "<fixed id>|<moving id>" -> 4 x 4, fixed
            voxel -> moving voxel.

    Returns:
        Pairs; their position in the list is their number in a batch. Empty when the
        split has none.

    Raises:
        UserError: `schema` or `task_unknown`, exit code 2: split or task that does not
            exist, a subject in two splits.
    """
    if split not in SPLITS:
        raise UserError(
            "schema", f"split: one of {', '.join(SPLITS)}, got {split!r}", USAGE
        )
    if not index.get("allow_leak"):
        _check_subjects(index["volumes"])
    alignments = alignments or {}
    groups: dict[str, list[int]] = {}
    for position, volume in enumerate(index["volumes"]):
        if volume["split"] == split:
            groups.setdefault(volume["task"], []).append(position)
    pairs = []
    for name in TASKS:
        members = groups.pop(name, [])
        listed = index.get("pairs", {}).get(name, {}).get(split)
        chosen = itertools.permutations(members, 2)
        if listed is not None:
            chosen = _listed(index["volumes"], members, listed)
        pairs += _task_pairs(index["volumes"], name, chosen, alignments)
    if groups:
        raise UserError(
            "task_unknown",
            f"index: tasks {', '.join(TASKS)} are known, found {', '.join(groups)}",
            USAGE,
        )
    return pairs


def read_alignments(root: Path | str) -> dict[str, np.ndarray]:
    """Reads `align.json` of a prepared folder.

    Args:
        root: the prepared folder.

    Returns:
        "<fixed id>|<moving id>" -> [4, 4] float64, fixed voxel -> moving voxel; empty
        when there is no such file.

    Raises:
        UserError: `schema`, exit code 10: not JSON, or an entry is not a finite,
            invertible affine; `permission` or `storage`, exit code 6.
    """
    path = Path(root) / store.ALIGN_NAME
    remedy = "delete it, or compute the pre-alignment again"
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise store.unreadable(path, error) from error
    except (ValueError, RecursionError) as error:
        raise UserError(
            "schema", f"{path.name}: not readable as JSON; {remedy}", DATA_CHANGED
        ) from error
    if not isinstance(entries, dict):
        raise UserError(
            "schema", f"{path.name}: must be one JSON object; {remedy}", DATA_CHANGED
        )
    return {key: _affine(key, value, remedy) for key, value in entries.items()}


def volume_digests(index: dict[str, Any]) -> dict[str, str]:
    """What alignments hold for: id -> digest of image and grid, that of task, subject.

    Args:
        index: of a prepared folder.
    """

    def digest(*values: Any) -> str:
        return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:_DIGITS]

    return {
        v["id"]: digest(v["sha256"]["image"], v["vox2world"])
        + digest(v["task"], v["subject"])
        for v in index["volumes"]
    }


def stale_alignments(
    root: Path | str, index: dict[str, Any], entries: Iterable[str]
) -> list[str]:
    """Names alignments of volumes whose image, grid, task or subject is another now.

    Args:
        root: the prepared folder.
        index: of it.
        entries: keys of `read_alignments`.

    Returns:
        Those keys; none where align_kinds.json does not say of which volumes they are.

    Raises:
        UserError: `schema`, exit code 10: align_kinds.json is not readable as JSON;
            `permission` or `storage`, exit code 6.
    """
    path = Path(root) / store.ALIGN_NOTES_NAME
    try:
        then = json.loads(path.read_text(encoding="utf-8")).get("volumes", {})
    except FileNotFoundError:
        return []
    except OSError as error:
        raise store.unreadable(path, error) from error
    except (ValueError, AttributeError, RecursionError) as error:
        raise UserError(
            "schema",
            f"{path.name}: one JSON object expected; delete it and {store.ALIGN_NAME}, "
            "and compute the pre-alignment again",
            DATA_CHANGED,
        ) from error
    now = volume_digests(index)
    # Folders of before know the first half alone.
    other = {
        name
        for name in then.keys() & now.keys()
        if then[name] not in (now[name], now[name][:_DIGITS])
    }
    return [key for key in entries if other & set(key.split("|"))]


def _affine(key: str, value: Any, remedy: str) -> np.ndarray:
    """A matrix that can be used, or UserError."""
    try:
        matrix = np.asarray(value, np.float64)
    except (TypeError, ValueError):
        matrix = np.empty(0)
    good = matrix.shape == (4, 4) and np.isfinite(matrix).all()
    good = good and np.allclose(matrix[3], (0, 0, 0, 1))
    if not good or abs(np.linalg.det(matrix)) < 1e-6:
        raise UserError(
            "schema",
            f"{store.ALIGN_NAME}: {key}: an invertible 4 x 4 affine expected; {remedy}",
            DATA_CHANGED,
        )
    return matrix


def _task_pairs(
    volumes: list[dict],
    name: str,
    chosen: Iterable[tuple[int, int]],
    alignments: Mapping[str, Any],
) -> list[Pair]:
    """Those of the chosen positions that the task's kind allows."""
    task = TASKS[name]
    intra = task.pair_type == PairType.INTRA
    found = []
    for fixed, moving in chosen:
        a, b = volumes[fixed], volumes[moving]
        if (a["subject"] == b["subject"]) != intra:
            continue
        align = alignments.get(f"{a['id']}|{b['id']}")
        if align is None:
            align = _world_identity(a, b) if intra else np.eye(4)
        rows = tuple(tuple(float(v) for v in row) for row in np.asarray(align))
        found.append(Pair(fixed, moving, name, task.region, task.pair_type, rows))
    return found


def _listed(
    volumes: list[dict], members: list[int], listed: Sequence[Sequence[str]]
) -> list[tuple[int, int]]:
    """Positions of listed pairs; a scan that could not be prepared has none."""
    positions = {volumes[i]["id"]: i for i in members}
    return [
        (positions[fixed], positions[moving])
        for fixed, moving in listed
        if fixed in positions and moving in positions
    ]


def _world_identity(fixed: dict, moving: dict) -> np.ndarray:
    """Fixed voxel -> moving voxel at the same place in the world."""
    return np.linalg.solve(
        np.asarray(moving["vox2world"], np.float64),
        np.asarray(fixed["vox2world"], np.float64),
    )


def _check_subjects(volumes: list[dict]) -> None:
    """A subject seen in training must not be judged on."""
    splits: dict[str, set[str]] = {}
    for volume in volumes:
        splits.setdefault(volume["subject"], set()).add(volume["split"])
    leaks = sorted(subject for subject, found in splits.items() if len(found) > 1)
    if leaks:
        raise UserError(
            "schema",
            f"index: subjects in more than one split: {', '.join(leaks[:5])}; give "
            "each subject one split in the manifest and prepare again",
            USAGE,
        )
