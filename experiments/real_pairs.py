"""The pairs of real scans that results are told of, and how a result is scored.

Of the collection of real_scans: the 12 ordered pairs of the 4 head-neck patients that
training never saw (split `val`), 4 pairs of others, on which defaults are chosen
(`train`), or the 12 of another part that weights of their own leave out (`fold1` and so
on; `weights_of`), with organs; in all splits the arterial onto the portal-venous liver
phase and the follow-up onto the baseline lung scan, with landmarks: there is no other
such pair.

The mean landmark error hides what a method does where marks are off for all of them.
Two of the lung's 17 are (`DOUBTFUL`): the eighth is moved 47.5 mm along the body, the
others 30 to 37.5; the twelfth 1.6 mm to the left, the others 0.5 to 8 mm to the right.
Together they are 0.8 to 0.9 mm of the mean of a refined result: so the median is given,
and the mean of the others.
"""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.real_scans import FOLDS, HELD_OUT
from unireg_jax.evaluation import metrics
from unireg_jax.imaging import mapping, nifti, points
from unireg_jax.imaging.mapping import Mapping
from unireg_jax.imaging.nifti import Volume
from unireg_jax.imaging.points import PointPairs
from unireg_jax.registration import Clock, Session, check_settings, pipeline
from unireg_jax.tasks import TASKS

SPLITS = {
    "val": tuple(itertools.permutations(HELD_OUT, 2)),
    "train": (("0004", "0034"), ("0060", "0013"), ("0017", "0087"), ("0095", "0082")),
    **{
        f"fold{i}": tuple(itertools.permutations(fold, 2))
        for i, fold in enumerate(FOLDS[1:], 1)
    },
}
# Fixed, moving, table of landmarks.
LANDMARKS = {
    "liver": (
        "liver_multiphase/liver_hcc007_t1/pvp.nii.gz",
        "liver_multiphase/liver_hcc007_t1/art.nii.gz",
        "liver_multiphase/liver_hcc007_t1/auto_keypoints_pvp_fixed_art_moving.csv",
    ),
    "lung": (
        "lung_elastix/baseline.nii.gz",
        "lung_elastix/followup.nii.gz",
        "lung_elastix/landmarks.csv",
    ),
}
# Marks, by position in the table, beside which tissue is found more alike than at them:
# lung_landmarks.py.
DOUBTFUL = {"lung": (7, 11)}
# In the package: trained without the patients of `val`. The default, `unireg`, is not.
# Scripts take these unless --weights says otherwise, whatever $UNIREG_WEIGHTS says.
WEIGHTS = "unireg_heldout"
# Of the other parts; in half precision, and not in the package.
PARTS = Path(__file__).with_name("weights")
_DRAWS = 10_000
Truth = tuple[Volume, Volume] | PointPairs


class Pair(NamedTuple):
    """Two scans with what is known of them.

    Attributes:
        task: of tasks.TASKS.
        patients: of fixed and of moving; the task where it is one.
        fixed, moving: paths of the scans.
        truth: paths of the two label maps, or of one table of landmarks.
    """

    task: str
    patients: tuple[str, str]
    fixed: Path
    moving: Path
    truth: tuple[Path, ...]

    @property
    def name(self) -> str:
        """Of its files and rows."""
        if self.task in LANDMARKS:
            return self.task
        return "_".join((self.task, *self.patients))


def headneck_case(data: Path, case: str) -> tuple[Path, Path]:
    """Image and labels of one patient."""
    folder = data / "headneck_openkbp"
    return tuple(folder / f"{kind}/case_{case}.nii.gz" for kind in ("images", "labels"))


def pairs(
    data: Path,
    split: str = "val",
    *,
    tasks: Sequence[str] = ("headneck", *LANDMARKS),
) -> list[Pair]:
    """Pairs of the collection.

    Args:
        data: its folder.
        split: of SPLITS.
        tasks: which, and in what order.

    Returns:
        Pairs; whether their files are there is seen when they are read.
    """
    found = []
    if unknown := set(tasks) - {"headneck", *LANDMARKS}:
        raise ValueError(f"tasks must be of headneck, liver, lung, got {unknown}")
    for task in tasks:
        if task in LANDMARKS:
            fixed, moving, table = (data / name for name in LANDMARKS[task])
            found.append(Pair(task, (task, task), fixed, moving, (table,)))
            continue
        for patients in SPLITS[split]:
            cases = (headneck_case(data, case) for case in patients)
            scans, labels = zip(*cases, strict=True)
            found.append(Pair(task, patients, *scans, labels))
    return found


def weights_of(split: str) -> str:
    """Those that never saw the head-neck patients of a split; of `train`, as of `val`.

    Args:
        split: of SPLITS.

    Returns:
        File, or name in the package.
    """
    return str(PARTS / f"{split}.safetensors") if "fold" in split else WEIGHTS


def settings(pair: Pair, affine: str, *, network: bool = True) -> dict[str, str]:
    """Of `Session.run`: the pair's usual type, with the network or without it."""
    usual = TASKS[pair.task].pair_type.name.lower()
    return check_settings(pair.task if network else "none", usual, affine)


def own_start(
    pair: Pair, scans: tuple[Volume, Volume], session: Session
) -> pipeline.Prepared:
    """Pre-aligns by the pair's own task, for runs with the network and without.

    Left to choose, "auto" looks at the region, which a run without the network has not.
    """
    return session.prepare(*scans, settings(pair, "auto"), clock=Clock())


def read_scans(pair: Pair) -> tuple[Volume, Volume]:
    """Fixed and moving."""
    return nifti.read_image(pair.fixed), nifti.read_image(pair.moving)


def read_truth(pair: Pair) -> Truth:
    """Labels of fixed and of moving, or landmarks."""
    if pair.task in LANDMARKS:
        return points.read_points(pair.truth[0])
    fixed, moving = (nifti.read_labels(path) for path in pair.truth)
    return fixed, moving


def stages(result: Any) -> dict[str, Mapping]:
    """The scanner's own frame, the pre-alignment, and the whole map.

    Args:
        result: Registration.
    """
    return {
        "initial": Mapping(()),
        "affine": mapping.affine(result.affine),
        "network": mapping.field(result.disp_mm, result.vox2world),
    }


def scores(truth: Truth, found: Mapping, *, surface: bool = False) -> dict[str, Any]:
    """Scores of a map, on the fixed scan's own grid.

    Args:
        truth: from `read_truth`.
        found: fixed -> moving.
        surface: whether to measure hd95_mm, which takes longer.

    Returns:
        Of labels: dsc, its mean over them in [0, 1]; hd95_mm, the mean, None where an
        organ of both scans was led out of the fixed one's grid, which no mean of the
        others should hide; labels, dsc by id as text; dsc_shared, the mean of
        `shared_slices`. Of landmarks: tre_mm, the mean; tre_median_mm; errors_mm [N].
    """
    if isinstance(truth, PointPairs):
        _, errors = metrics.target_errors(found, truth.fixed, truth.moving)
        return {
            "tre_mm": float(errors.mean()),
            "tre_median_mm": float(np.median(errors)),
            "errors_mm": errors,
        }
    fixed, moving = truth
    grid = mapping.grid_of(fixed)
    warped = mapping.resample(found, moving, grid, interp="nearest")
    said = metrics.overlap(fixed, moving, {"": warped}, surface=surface)
    each = {label: row["dsc"] for label, row in said["labels"].items()}
    means = {"dsc": said["mean"]["dsc"]}
    if surface:
        both = np.intersect1d(fixed.data, moving.data)
        found_all = said["n"]["hd95_mm"] == np.count_nonzero(both)
        means["hd95_mm"] = said["mean"]["hd95_mm"] if found_all else None
    part = shared_slices(fixed.data, np.asarray(warped), list(map(int, each)))
    # An organ of both scans that is led past all slices of the other one counts 0.
    known = [
        0.0 if value != value else value
        for value, whole in zip(part, each.values(), strict=True)
        if whole == whole
    ]
    shared = float(np.mean(known)) if known else np.nan
    return means | {"labels": each, "dsc_shared": shared}


def overlaps(truth: tuple[Volume, Volume], result: Any) -> dict[str, float]:
    """Mean DSC of each of `stages`: dsc_initial, dsc_affine, dsc_network.

    Args:
        truth: labels of fixed and of moving.
        result: Registration.
    """
    return {
        f"dsc_{name}": scores(truth, stage)["dsc"]
        for name, stage in stages(result).items()
    }


def shared_slices(
    fixed: np.ndarray, warped: np.ndarray, labels: Sequence[int]
) -> list[float]:
    """DSC of organs over the axial slices where both were drawn.

    Cord and oesophagus were drawn up and down to where a plan needed them, which
    differs by centimetres from patient to patient. That lowers the plain DSC whatever
    the map; this one forgives it, and true errors along the body with it.

    Args:
        fixed: [X, Y, Z] ids, axial slices last.
        warped: the same grid.
        labels: ids.

    Returns:
        DSC in [0, 1] of each label; NaN without a shared slice.
    """
    out = []
    for label in labels:
        a, b = fixed == label, warped == label
        both = a.any(axis=(0, 1)) & b.any(axis=(0, 1))
        a, b = a[..., both], b[..., both]
        total = int(a.sum() + b.sum())
        out.append(2 * int((a & b).sum()) / total if total else np.nan)
    return out


def told(scored: dict[str, Any]) -> float:
    """One number of `scores`: mean DSC in percent, or mean landmark error in mm."""
    return 100 * scored["dsc"] if "dsc" in scored else scored["tre_mm"]


def drawn_sums(
    patients: Sequence[tuple[str, str]], values: Sequence[float], drawn: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Sums over pairs when patients are drawn with replacement.

    A pair counts as often as both of its patients were drawn.

    Args:
        patients: of each pair.
        values: of each pair.
        drawn: [D, P], how often each patient, by name, is in each draw.

    Returns:
        [D] weighted sums of the values, and [D] of the weights.
    """
    names = sorted({name for pair in patients for name in pair})
    total, weight = np.zeros(len(drawn)), np.zeros(len(drawn))
    for pair, value in zip(patients, values, strict=True):
        one, other = (drawn[:, names.index(name)] for name in pair)
        total += one * other * value
        weight += one * other
    return total, weight


def interval_of_parts(
    parts: Sequence[tuple[Sequence[tuple[str, str]], Sequence[float]]],
) -> tuple[float, float]:
    """95 % of the means over draws of the patients of each part with replacement.

    Args:
        parts: patients of each pair, and values of the same pairs; no patient in two.

    Returns:
        Lower and upper end, of 10 000 draws, the same ones in every call.
    """
    rng = np.random.default_rng(0)
    total, weight = np.zeros(_DRAWS), np.zeros(_DRAWS)
    for patients, values in parts:
        count = len({name for pair in patients for name in pair})
        if not count:
            continue
        drawn = rng.multinomial(count, [1 / count] * count, size=_DRAWS)
        sums = drawn_sums(patients, values, drawn)
        total, weight = total + sums[0], weight + sums[1]
    return interval(total, weight)


def interval(total: np.ndarray, weight: np.ndarray) -> tuple[float, float]:
    """95 % of the means of all draws.

    Args:
        total: from `drawn_sums`, or several of them added up.
        weight: the same.

    Returns:
        Lower and upper end; draws without a pair are left out.
    """
    means = total[weight > 0] / weight[weight > 0]
    return tuple(float(v) for v in np.percentile(means, (2.5, 97.5)))
