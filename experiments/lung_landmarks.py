"""What the landmarks of the lung pair permit: each beside the best match around it.

    python -m experiments.lung_landmarks --data=FOLDER [--plot=landmarks.png]

For each landmark this takes the cube of tissue around the point of the fixed scan, at
the scan's own resolution, and looks for it, by correlation, in every position of the
moving scan up to 16 mm from the mark along each axis. It is a second opinion, not a
judge: like registration it goes by intensities, but it tries every place and bends
nothing. A mark is doubtful where the tissue is found more than 3 mm from it. Prints a
table, and means with and without the doubtful ones; the picture shows these.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from absl import flags
from tqdm import tqdm

from experiments import cli, figures, real_pairs
from unireg_jax import registration
from unireg_jax.imaging import mapping
from unireg_jax.imaging.nifti import Volume
from unireg_jax.registration.refine import Plan

REACH_MM = 16.0  # of the search, along each axis
EDGE_MM = 20.0  # of the cube of tissue
DOUBTFUL_MM = 3.0  # any value from 2 to 5 doubts the same two marks
_HU = (-1000.0, 300.0)  # so that bone does not decide alone
_SHOWN = (-1000.0, 100.0)


class Match(NamedTuple):
    """Where a cube of the fixed scan is found again.

    Attributes:
        offset_mm: [3] float, from where the search began; LPS.
        correlation: there, in [-1, 1].
        others: of the cubes at the asked positions.
    """

    offset_mm: np.ndarray
    correlation: float
    others: list[float]


def match(
    fixed: Volume,
    moving: Volume,
    point: np.ndarray,
    start: np.ndarray,
    *,
    others: Sequence[np.ndarray] = (),
    reach_mm: float = REACH_MM,
    edge_mm: float = EDGE_MM,
) -> Match:
    """Looks for the tissue around a point of the fixed scan in the moving scan.

    Every position on a lattice of half the fixed voxel's edges around `start` is tried;
    the cube is sampled at whole edges. It is neither turned nor stretched.

    Args:
        fixed: scan, HU, its axes along LPS; its edges are the lattice's.
        moving: scan, HU.
        point: [3] float, LPS mm, of the fixed scan.
        start: [3] float, LPS mm, of the moving scan; centre of the search.
        others: [3] float each, LPS mm, of the moving scan: also compared.
        reach_mm: of the search, along each axis.
        edge_mm: of the cube.

    Returns:
        Match; the first of equal ones.

    Raises:
        ValueError: a point that is not [3].
    """
    for one in (point, start, *others):
        if np.shape(one) != (3,):
            raise ValueError(f"points must be (3,) in mm, got {np.shape(one)}")
    step = np.asarray(fixed.spacing_mm, float)
    half = np.maximum(np.round(edge_mm / 2 / step).astype(int), 1)
    cube = _lattice(half, step)
    wanted = _centred(_values(fixed, point + cube))
    tries = np.ceil(reach_mm / (step / 2)).astype(int)
    around = _values(moving, start + _lattice(tries + 2 * half, step / 2))
    best, offset = -math.inf, np.zeros(3)
    for place in np.ndindex(*(2 * tries + 1)):
        part = [slice(p, p + 4 * h + 1, 2) for p, h in zip(place, half, strict=True)]
        found = float(np.vdot(wanted, _centred(around[tuple(part)])))
        if found > best:
            best, offset = found, (np.array(place) - tries) * step / 2
    told = [
        float(np.vdot(wanted, _centred(_values(moving, one + cube)))) for one in others
    ]
    return Match(offset, best, told)


def rounding_mm(steps_mm: Sequence[float]) -> float:
    """Mean length of what rounding to a lattice takes away: uniform in its cell."""
    parts = [((np.arange(64) + 0.5) / 64 - 0.5) * s for s in steps_mm]
    return float(np.linalg.norm(np.stack(np.meshgrid(*parts)), axis=0).mean())


def _lattice(half: np.ndarray, step: np.ndarray) -> np.ndarray:
    """[X, Y, Z, 3] mm around 0, `half` steps to either side."""
    axes = [np.arange(-n, n + 1) * s for n, s in zip(half, step, strict=True)]
    return np.stack(np.meshgrid(*axes, indexing="ij"), -1)


def _values(scan: Volume, xyz: np.ndarray) -> np.ndarray:
    """HU at points, air beyond the scan."""
    return np.clip(np.nan_to_num(mapping.sample(scan, xyz), nan=_HU[0]), *_HU)


def _centred(values: np.ndarray) -> np.ndarray:
    values = values - values.mean()
    return values / max(float(np.linalg.norm(values)), 1e-6)


class Checked(NamedTuple):
    """One landmark.

    Attributes:
        name: of the table.
        points: LPS mm: in the fixed scan; in the moving one as marked, as mapped, and
            where the tissue is found.
        correlations: of the tissue at the mark, where it is mapped, at the best match.
    """

    name: str
    points: tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]
    correlations: tuple[float, float, float]

    @property
    def mapped_mm(self) -> float:
        """Distance of the mapped point from the mark."""
        return math.dist(self.points[1], self.points[2])

    @property
    def matched_mm(self) -> float:
        """Distance of the best match from the mark."""
        return math.dist(self.points[1], self.points[3])

    @property
    def apart_mm(self) -> float:
        """Distance of the mapped point from the best match."""
        return math.dist(self.points[2], self.points[3])

    @property
    def doubtful(self) -> bool:
        """Whether the search disagrees with the mark; the map has no say."""
        return self.matched_mm > DOUBTFUL_MM


def check(
    scans: tuple[Volume, Volume],
    name: str,
    fixed: np.ndarray,
    mark: np.ndarray,
    mapped: np.ndarray,
) -> Checked:
    """Compares one mark, and where a map puts it, with the best match.

    Args:
        scans: fixed and moving, HU.
        name: of the landmark.
        fixed: [3] LPS mm, in the fixed scan.
        mark: [3] LPS mm, in the moving scan.
        mapped: [3] LPS mm, in the moving scan.

    Returns:
        Checked.
    """
    best = match(*scans, fixed, mark, others=(mark, mapped))
    points = (fixed, mark, mapped, mark + best.offset_mm)
    return Checked(name, points, (*best.others, best.correlation))


def table(rows: Sequence[Checked], steps_mm: Sequence[float]) -> str:
    """Markdown, and the means below it.

    Args:
        rows: of all landmarks.
        steps_mm: of the lattice that the marks are set on.

    Returns:
        Text.
    """
    lines = [
        "| landmark | as mapped, mm from the mark | best match, mm from the mark | "
        "between the two, mm | correlation at the mark, as mapped, best |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {row.name}{', doubtful' * row.doubtful} | {row.mapped_mm:.1f} | "
        f"{row.matched_mm:.1f} | {row.apart_mm:.1f} | "
        f"{', '.join(f'{value:.2f}' for value in row.correlations)} |"
        for row in rows
    ]
    sure = [row for row in rows if not row.doubtful]
    lines.append("")
    for told, some in ((f"all {len(rows)}", rows), (f"{len(sure)} not doubtful", sure)):
        mapped = np.mean([row.mapped_mm for row in some])
        matched = np.mean([row.matched_mm for row in some])
        lines.append(
            f"{told}: mapped {mapped:.2f}, best match {matched:.2f} mm from the mark"
        )
    lines.append(
        f"rounding marks to their lattice takes {rounding_mm(steps_mm):.2f} mm"
    )
    return "\n".join(lines)


def draw(
    path: Path | str, scans: tuple[Volume, Volume], rows: Sequence[Checked]
) -> None:
    """Draws the points of each landmark, in a row of four coronal cuts.

    Args:
        path: PNG file.
        scans: fixed and moving, HU.
        rows: of the landmarks to draw; cuts are 61×61 samples, 1 mm apart.
    """
    offsets = _lattice(np.array([30, 0, 30]), np.ones(3))[:, 0]
    fixed, moving = scans
    cuts = []
    told = ("fixed", "as marked", "as mapped", "best match")
    for row in rows:
        for name, scan, point in zip(
            told, (fixed, moving, moving, moving), row.points, strict=True
        ):
            cuts.append((f"{row.name}: {name}", _values(scan, point + offsets)))
    figures.save_cuts(path, cuts, columns=len(told), window=_SHOWN)


def main(argv) -> None:
    del argv
    cli.setup()
    options = flags.FLAGS
    (pair,) = real_pairs.pairs(Path(options.data), tasks=["lung"])
    scans, truth = real_pairs.read_scans(pair), real_pairs.read_truth(pair)
    result = registration.register(
        *scans, task="lung", weights=options.weights, refine=Plan(finer=2)
    )
    mapped = mapping.points(real_pairs.stages(result)["network"], truth.fixed)
    points = list(zip(truth.names, truth.fixed, truth.moving, mapped, strict=True))
    rows = [check(scans, *one) for one in tqdm(points, disable=None)]
    # The marks of the moving scan: half voxels in plane, whole slices.
    print(table(rows, np.array(scans[1].spacing_mm) * (0.5, 0.5, 1)))
    if options.plot:
        draw(options.plot, scans, [row for row in rows if row.doubtful])


if __name__ == "__main__":
    # Here, so that one script can import another.
    flags.DEFINE_string("data", None, "Folder of the collection.")
    flags.DEFINE_string("weights", real_pairs.WEIGHTS, "File, or name in the package.")
    flags.DEFINE_string("plot", None, "PNG of the doubtful landmarks.")
    flags.mark_flags_as_required(["data"])
    cli.run(main)
