"""Which part of the body a CT shows, from the image alone; NumPy and SciPy only.

Every axial slice, some 5 mm apart, is described by the size of the body, its air and
its bone; a small logistic model says how likely it is of head and neck, chest or
abdomen. The three follow each other along the patient, so the scan is cut in at most
three pieces in that order; the answer is the expected share of each piece, over all
ways to cut, of the body's length.

Abdomen and liver are two tasks in one place and count as one here. Measured in
docs/control.md (experiments/benchmark_region.py).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from unireg_jax.errors import USAGE, UserError
from unireg_jax.imaging import nifti, preprocess
from unireg_jax.imaging.nifti import Volume
from unireg_jax.tasks import TASKS, PairType, Region

PLACES = ("abdomen", "chest", "headneck")  # towards the head
_PLACE_OF = {
    Region.HEADNECK: "headneck",
    Region.CHEST: "chest",
    Region.ABDOMEN: "abdomen",
    Region.LIVER: "abdomen",
}
_COARSE_MM = 5.0
_LEAST_SLICE_MM2 = 2000.0  # less is no cross-section of a body
_LEAST_LENGTH_MM = 30.0  # less is too little to tell
_SURE = 0.55  # share of the best place, to be named
_CLEARLY = 0.6  # share of the best place, to contradict
_HARDLY = 0.3  # share of the asked place, to be contradicted
_MUCH_AIR = 0.2  # of the body: lungs, whatever more there is
_CORRELATED_MM = 20.0  # slices nearer than this say much the same
_LEAST_BONE = 2e-3  # share of the body; less is no CT of a person
_NO_HU = "the values are no Hounsfield units"
# See `slice_features`. Means, deviations, and per place a bias and weights, fitted by
# experiments/benchmark_region.py --fit.
FEATURES = ("area", "shape", "air", "bone", "dense")
_MEAN = (10.38, 1.015, 0.08282, 0.1684, 0.0942)
_SCALE = (0.53, 0.5846, 0.08401, 0.09736, 0.09394)
_WEIGHTS = (
    (-0.616, 1.491, -1.308, -1.355, -1.081, -0.643),
    (1.049, -0.070, 0.416, 1.915, 0.378, -0.390),
    (-0.433, -1.421, 0.892, -0.559, 0.703, 1.033),
)


class Model(NamedTuple):
    """Logistic model of a slice.

    Attributes:
        mean, scale: [F] of the features.
        weights: [3, 1 + F], bias and weights per place.
    """

    mean: np.ndarray
    scale: np.ndarray
    weights: np.ndarray


class Seen(NamedTuple):
    """What a scan shows.

    Attributes:
        place: of PLACES; None where the image does not tell.
        shares: place -> expected share of the body's length, sum 1; empty without a
            body.
        why: one line.
    """

    place: str | None
    shares: dict[str, float]
    why: str

    def record(self) -> dict[str, Any]:
        """Place and shares for a JSON record."""
        shares = {name: round(share, 3) for name, share in self.shares.items()}
        return {"region": self.place, "shares": shares}


def estimate_region(volume: Volume, *, model: Model | None = None) -> Seen:
    """Says which part of the body a CT shows.

    Args:
        volume: CT in HU on LPS+ axes, as `nifti.read_image` gives.
        model: of a slice; None for the one that comes with the package.

    Returns:
        Seen; place is None when no place has 55 % of the body's length, the body is
        shorter than 30 mm or holds no bone, or the values are no HU.

    Raises:
        ValueError: data is not 3-D.
    """
    rows, _, step_mm = slice_features(volume)
    # No reader has looked at an array, nor at what took the place of a file's voxels.
    odd = (*volume.warnings, *nifti.intensity_warnings(volume.data))
    if any(line.startswith("constant") for line in odd):
        return Seen(None, {}, "every voxel is the same")
    if any(line.startswith("hu_range") for line in odd):
        return Seen(None, {}, _NO_HU)
    if len(rows) * step_mm < _LEAST_LENGTH_MM:
        return Seen(None, {}, f"a body of {len(rows) * step_mm:.0f} mm is too short")
    bone = float(np.square(rows[:, FEATURES.index("bone")]).mean())
    if bone < _LEAST_BONE:
        return Seen(None, {}, f"only {bone:.2%} of the body is bone")
    shares = _shares(_log_likely(rows, model or _packaged()), step_mm)
    best = max(shares, key=shares.get)
    place = best if shares[best] >= _SURE else None
    return Seen(place, shares, f"{len(rows) * step_mm:.0f} mm of body: {_told(shares)}")


def mismatch(seen: Seen, region: Region | str | None) -> str | None:
    """Says whether a scan clearly shows another place than the task is about.

    Args:
        seen: from `estimate_region`.
        region: asked for, also as the name of a region or task; None asks for nothing.

    Returns:
        What is seen, such as values that are no HU; or None: it agrees, or the image
        does not tell.

    Raises:
        ValueError: no such region.
    """
    if region is None:
        return None
    asked = _place(region)
    if seen.why == _NO_HU:
        return (
            f"a CT in Hounsfield units expected, {_NO_HU}: the network knows nothing "
            "else; of an MR use --task none"
        )
    if not seen.shares:
        return None
    best = max(seen.shares, key=seen.shares.get)
    if seen.shares[best] < _CLEARLY or seen.shares[asked] > _HARDLY:
        return None
    return f"{asked} expected, looks like {best} ({seen.why})"


def choose_task(scans: Sequence[Seen], pair_type: str | None = None) -> str:
    """Names the task for scans of one pair.

    Args:
        scans: of the fixed and the moving scan.
        pair_type: "inter", "intra" or None, as asked for; "intra" in the abdomen is
            the task "liver".

    Returns:
        Name in tasks.TASKS.

    Raises:
        UserError: `task_unknown`, exit code 2: the scans do not tell, or differ.
    """
    named = {seen.place for seen in scans}
    if len(named) == 1 and None not in named:
        place = named.pop()
        intra = pair_type == PairType.INTRA.name.lower()
        return "liver" if place == "abdomen" and intra else place
    told = "; ".join(
        f"{name}: {seen.why}"
        for name, seen in zip(("fixed", "moving"), scans, strict=False)
    )
    mean = {p: sum(seen.shares.get(p, 0.0) for seen in scans) for p in PLACES}
    guesses = [p for p in sorted(mean, key=mean.get, reverse=True) if mean[p] > 0.2]
    hint = " or ".join(f"--task {p}" for p in guesses[:2]) or "--task NAME"
    raise UserError(
        "task_unknown",
        f"task auto: one body region in both scans expected, got {told}; name it: "
        f"{hint} (of {', '.join(sorted(TASKS))})",
        USAGE,
    )


def slice_features(volume: Volume) -> tuple[np.ndarray, np.ndarray, float]:
    """Describes the axial slices of a CT that hold a body.

    Args:
        volume: CT in HU on LPS+ axes.

    Returns:
        [n, 5] float64, from the feet to the head; [n] the slices of the volume; and
        their distance in mm. Features: log of the body's area in mm2; its width over
        its depth; the share of its voxels below -500 HU, at most 0.2; square roots of
        the shares above 400 and above 700 HU.

    Raises:
        ValueError: data is not 3-D.
    """
    coarse = _strided(volume)
    body = _closed(preprocess.body_mask(coarse, coarse_mm=_COARSE_MM))
    x, y, z = coarse.spacing_mm
    count = body.sum(axis=(0, 1))
    keep = count * x * y >= _LEAST_SLICE_MM2
    hu, body, count = coarse.data[..., keep], body[..., keep], count[keep]
    air, bone, dense = (
        (where & body).sum(axis=(0, 1)) / np.maximum(count, 1)
        for where in (hu < -500, hu > 400, hu > 700)
    )
    width, depth = (_extent(body.any(axis=1 - axis)) for axis in (0, 1))
    rows = [
        np.log(np.maximum(count, 1) * x * y),
        width * x / (depth * y),
        np.minimum(air, _MUCH_AIR),
        np.sqrt(bone),
        np.sqrt(dense),
    ]
    slices = np.flatnonzero(keep) * round(z / volume.spacing_mm[2])
    return np.stack(rows, axis=1), slices, float(z)


def _strided(volume: Volume) -> Volume:
    """Every n-th voxel, about `_COARSE_MM` apart."""
    if volume.data.ndim != 3:
        raise ValueError(
            f"volume.data must be (X, Y, Z), got {volume.data.shape}; drop other axes"
        )
    steps = [max(1, round(_COARSE_MM / s)) for s in volume.spacing_mm]
    vox2world = volume.vox2world @ np.diag([*steps, 1.0])
    return Volume(volume.data[tuple(slice(None, None, n) for n in steps)], vox2world)


def _closed(body: np.ndarray) -> np.ndarray:
    """Fills from front to back: a lung that the field of view cuts open is body too."""
    before = np.maximum.accumulate(body, axis=1)
    behind = np.maximum.accumulate(body[:, ::-1], axis=1)[:, ::-1]
    return before & behind


def _extent(marked: np.ndarray) -> np.ndarray:
    """Voxels from the first to the last marked one along axis 0, [n]."""
    first = marked.argmax(axis=0)
    last = len(marked) - 1 - marked[::-1].argmax(axis=0)
    return last - first + 1


def _packaged() -> Model:
    return Model(*(np.array(values) for values in (_MEAN, _SCALE, _WEIGHTS)))


def _log_likely(rows: np.ndarray, model: Model) -> np.ndarray:
    """Log probability of each place, [n, 3]."""
    # Beyond four deviations lies nothing that the model has seen.
    rows = np.clip((rows - model.mean) / model.scale, -4, 4)
    logits = model.weights[:, 0] + rows @ model.weights[:, 1:].T
    logits -= logits.max(axis=1, keepdims=True)
    likely = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    return np.maximum(likely, np.log(0.01))  # one odd slice must not decide


def _shares(likely: np.ndarray, step_mm: float) -> dict[str, float]:
    """Expected share of each place over all cuts [0, i), [i, j), [j, n)."""
    n = len(likely)
    total = np.vstack([np.zeros(3), np.cumsum(likely, axis=0)])
    i, j = np.triu_indices(n + 1)
    score = total[i, 0] + total[j, 1] - total[i, 1] + total[n, 2] - total[j, 2]
    score *= min(1.0, step_mm / _CORRELATED_MM)
    weight = np.exp(score - score.max())
    weight /= weight.sum()
    lengths = (i, j - i, n - j)
    values = [float((weight * length).sum() / n) for length in lengths]
    return dict(zip(PLACES, values, strict=True))


def _place(region: Region | str) -> str:
    if isinstance(region, str):
        if region.lower() not in TASKS:  # which hold the name of every region
            raise ValueError(f"region must be one of {sorted(TASKS)}, got {region!r}")
        region = TASKS[region.lower()].region
    return _PLACE_OF[Region(region)]


def _told(shares: dict[str, float]) -> str:
    ordered = sorted(shares.items(), key=lambda item: -item[1])
    return ", ".join(f"{name} {share:.0%}" for name, share in ordered if share >= 0.05)
