"""Are two methods different? Paired Wilcoxon tests, corrected after Holm.

Every test is two-sided and paired by case. Differences of zero say nothing about the
direction and are dropped (Wilcoxon's own rule); they are counted, as are cases where
the metric is undefined for either method or that only one method has.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

ALPHA = 0.05
EXACT = 50  # up to so many differences the distribution is counted out
# Scores are sums and quotients of float64: what agrees to so many digits is a tie.
_DIGITS = 10


class Test(NamedTuple):
    """One paired comparison.

    Attributes:
        a, b: names of the methods.
        n: pairs with a difference; zero: dropped, without one; undefined: dropped, the
            metric is undefined for either; unmatched: cases that only one has.
        median_difference: of a - b over all defined pairs; NaN without any.
        effect: matched-pairs rank-biserial correlation, (W+ - W-) / (W+ + W-): 1 when
            a is higher in every case, -1 when b is; NaN without a difference.
        p: two-sided, uncorrected; NaN without a difference.
        p_holm: corrected for all tests of the family; NaN as p.
        significant: p_holm < 0.05.
    """

    a: str
    b: str
    n: int
    zero: int
    undefined: int
    unmatched: int
    median_difference: float
    effect: float
    p: float
    p_holm: float = math.nan
    significant: bool = False


def compare(methods: Mapping[str, Mapping[Any, float | None]]) -> list[Test]:
    """Tests every two methods against each other, as one family.

    Args:
        methods: name -> case -> value of one metric, NaN or None where undefined; two
            methods or more.

    Returns:
        One Test per pair of methods, in their order.

    Raises:
        ValueError: fewer than two methods, or an infinite value.
    """
    if len(methods) < 2:
        raise ValueError(f"methods must be two or more, got {list(methods)}")
    tests = [
        _paired(a, b, methods[a], methods[b])
        for a, b in itertools.combinations(methods, 2)
    ]
    return correct(tests)


def correct(tests: Sequence[Test]) -> list[Test]:
    """Corrects a family of tests after Holm.

    Args:
        tests: the family, such as all pairs of methods for all labels.

    Returns:
        The same, with p_holm and significant.
    """
    adjusted = holm([test.p for test in tests])
    return [
        test._replace(p_holm=p, significant=bool(p < ALPHA))
        for test, p in zip(tests, adjusted, strict=True)
    ]


def holm(p: Sequence[float]) -> list[float]:
    """Holm's step-down correction, which bounds the chance of any false finding.

    p_(k) -> max over j <= k of min(1, (m - j + 1) p_(j)), p_(1) <= ... <= p_(m)

    Args:
        p: of the m tests; NaN for one that could not be made, which does not count.

    Returns:
        Corrected, in the same order; NaN stays.
    """
    made = sorted((value, i) for i, value in enumerate(p) if value == value)
    out, least = [math.nan] * len(p), 0.0
    for rank, (value, i) in enumerate(made):
        least = max(least, min(1.0, (len(made) - rank) * value))
        out[i] = least
    return out


def signed_rank(differences: np.ndarray) -> tuple[float, float]:
    """Wilcoxon's signed-rank test of differences that are not zero.

    Up to 50 of them the distribution of W+ is counted out, with ties (of equal |d|,
    which share their mean rank) as they are; beyond, the normal approximation with the
    correction for ties. Written out because importing scipy.stats takes longer than the
    rest of `unireg evaluate`; tests hold it against SciPy's.

    Args:
        differences: [N], none of them 0.

    Returns:
        p, two-sided, and the rank-biserial correlation; NaN for N = 0.
    """
    n = len(differences)
    if n == 0:
        return math.nan, math.nan
    ranks, ties = _ranks(np.abs(differences))
    total = ranks.sum()
    up = ranks[differences > 0].sum()
    effect = float((2 * up - total) / total)
    if n > EXACT:
        variance = n * (n + 1) * (2 * n + 1) / 24 - (ties**3 - ties).sum() / 48
        return math.erfc(abs(up - total / 2) / math.sqrt(2 * variance)), effect
    # Twice the ranks are whole numbers; so many of the 2^n signs give each sum.
    doubled = np.rint(2 * ranks).astype(int)
    ways = np.zeros(doubled.sum() + 1)
    ways[0] = 1.0
    for rank in doubled:
        ways[rank:] = ways[rank:] + ways[: ways.size - rank]
    least = int(np.rint(2 * min(up, total - up)))
    return float(min(1.0, 2 * ways[: least + 1].sum() / 2.0**n)), effect


def _ranks(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ranks from 1, equal values sharing their mean; how many share each."""
    _, places, ties = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(ties)
    return (last - (ties - 1) / 2)[places], ties.astype(float)


def _paired(a: str, b: str, one: Mapping, other: Mapping) -> Test:
    """Of two methods, uncorrected."""
    common = [case for case in one if case in other]
    pairs = np.array(
        [[_number(one[case]), _number(other[case])] for case in common], np.float64
    ).reshape(-1, 2)
    if np.isinf(pairs).any():
        raise ValueError(f"values of {a} and {b} must be finite or NaN, got infinity")
    defined = ~np.isnan(pairs).any(axis=1)
    differences = np.round(pairs[defined, 0] - pairs[defined, 1], _DIGITS)
    moved = differences[differences != 0]
    p, effect = signed_rank(moved)
    return Test(
        a=a,
        b=b,
        n=moved.size,
        zero=differences.size - moved.size,
        undefined=int(np.count_nonzero(~defined)),
        unmatched=len(one) + len(other) - 2 * len(common),
        median_difference=float(np.median(differences)) if differences.size else np.nan,
        effect=effect,
        p=p,
    )


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)
