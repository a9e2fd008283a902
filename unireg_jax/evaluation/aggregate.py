"""Many cases in a few numbers: mean, spread, median, the worst, and how many count."""

import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

WORST = 0.3  # share of the cases
# First words of the metrics whose good end is known.
_HIGHER = ("dsc", "nsd", "dice")
_LOWER = ("hd95", "tre", "sdlogj", "fold", "folds", "nd", "ndv", "max")


class Summary(NamedTuple):
    """Of one metric over cases; those where it is undefined are left out and counted.

    Attributes:
        mean, median: NaN when none is defined.
        std: over n - 1; NaN for fewer than two.
        worst30: mean over the worst 30 % of the cases, rounded up; NaN also for a
            metric whose bad end is not known.
        n: values that are defined.
        undefined: values that are not.
    """

    mean: float
    std: float
    median: float
    worst30: float
    n: int
    undefined: int


def better(metric: str) -> str | None:
    """Says which end of a metric is the good one.

    Args:
        metric: its name, with any ending such as `_before`.

    Returns:
        "higher" for overlaps, "lower" for distances, folds and spreads, None for names
        that this package does not know.
    """
    word = metric.lower().split("_")[0]
    return "higher" if word in _HIGHER else "lower" if word in _LOWER else None


def summarize(values: Iterable[float | None], *, metric: str) -> Summary:
    """Summarises one metric over cases.

    Args:
        values: one per case, NaN or None where undefined.
        metric: its name, which says whether low or high is worse.

    Returns:
        Summary.

    Raises:
        ValueError: a value is infinite.
    """
    given = np.array([math.nan if v is None else v for v in values], np.float64)
    if np.isinf(given).any():
        raise ValueError(
            f"values of {metric} must be finite or NaN, got infinity; leave it out"
        )
    some = np.sort(given[~np.isnan(given)])
    n = some.size
    if n == 0:
        return Summary(*[math.nan] * 4, 0, given.size)
    good = better(metric)
    worst = (some if good == "higher" else some[::-1])[: math.ceil(WORST * n - 1e-9)]
    return Summary(
        mean=float(some.mean()),
        std=float(some.std(ddof=1)) if n > 1 else math.nan,
        median=float(np.median(some)),
        worst30=float(worst.mean()) if good else math.nan,
        n=n,
        undefined=given.size - n,
    )


def quantile_l2r(values: Iterable[float | None], *, metric: str) -> float:
    """Learn2Reg's robustness: the 0.3 quantile, or 0.7 where low is better.

    Args:
        values: one per case, NaN or None where undefined.
        metric: its name.

    Returns:
        Linearly interpolated; NaN when none is defined.
    """
    given = np.array([math.nan if v is None else v for v in values], np.float64)
    some = given[~np.isnan(given)]
    share = WORST if better(metric) == "higher" else 1 - WORST
    return float(np.quantile(some, share)) if some.size else math.nan
