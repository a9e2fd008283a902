"""Signed-rank tests against all signs listed, SciPy and numbers worked by hand."""

import math

import numpy as np
import pytest
from scipy import stats

from tests.evaluation import slow
from unireg_jax.evaluation import aggregate, comparison


@pytest.mark.parametrize(
    ("differences", "p", "effect"),
    [
        ([1.0], 1.0, 1.0),
        ([1.0, 2.0], 0.5, 1.0),
        # All five up: 2 of 32 signs are as far out.
        ([0.1, 0.2, 0.3, 0.4, 0.5], 0.0625, 1.0),
        ([-1.0, -2.0, -3.0, -4.0, -5.0, -6.0], 0.03125, -1.0),
        # W+ = 1 + 3 = 4 of 10: sums 0 ... 4 take 7 of 16 signs.
        ([1.0, -2.0, 3.0, -4.0], 14 / 16, -0.2),
        # Ranks 1.5, 1.5, 3: W+ = 3 is the middle.
        ([1.0, -1.0, -2.0], 1.0 - 2 / 8, -0.5),
    ],
)
def test_signed_rank_by_hand(differences, p, effect):
    got = comparison.signed_rank(np.array(differences))
    assert got == pytest.approx((p, effect))


def test_signed_rank_equals_all_signs_listed():
    rng = np.random.default_rng(0)
    for _ in range(60):
        n = rng.integers(1, 11)
        size = rng.integers(1, 5, n)  # many ties
        differences = size * rng.choice([-1.0, 1.0], n)
        p, _ = comparison.signed_rank(differences)
        assert p == pytest.approx(slow.signed_rank(differences), abs=1e-12)


@pytest.mark.parametrize("n", [3, 12, 25, 50])
def test_signed_rank_equals_scipy_exact(n):
    differences = np.random.default_rng(n).normal(0.3, 1, n)
    p, _ = comparison.signed_rank(differences)
    expected = stats.wilcoxon(differences, method="exact").pvalue
    assert p == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("n", [51, 200])
def test_signed_rank_of_many_equals_scipy(n):
    differences = (
        np.random.default_rng(n).integers(1, 9, n)
        * np.array([1.0, -1, 1])[np.arange(n) % 3]
    )
    p, _ = comparison.signed_rank(differences)
    expected = stats.wilcoxon(differences, method="approx").pvalue
    assert p == pytest.approx(expected, rel=1e-9)


def test_signed_rank_exact_meets_the_approximation():
    """Where one rule hands over to the other, both say about the same."""
    differences = np.random.default_rng(1).normal(0.3, 1, comparison.EXACT)
    exact, _ = comparison.signed_rank(differences)
    normal = stats.wilcoxon(differences, method="approx").pvalue
    assert exact == pytest.approx(normal, rel=0.05)


def test_holm_by_hand():
    # 4 x 0.005, 3 x 0.01, 2 x 0.03, and 0.04 no less than the one before.
    got = comparison.holm([0.01, 0.04, 0.03, 0.005])
    assert got == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert comparison.holm([0.6, 0.7]) == [1.0, 1.0]
    assert comparison.holm([]) == []


def test_holm_leaves_out_what_was_not_tested():
    got = comparison.holm([0.02, math.nan, 0.03])
    assert got[0] == pytest.approx(0.04) and got[2] == pytest.approx(0.04)
    assert math.isnan(got[1])


def test_compare_counts_what_it_drops():
    a = {"1": 0.9, "2": 0.8, "3": 0.5, "4": math.nan, "5": 0.7, "only": 1.0}
    b = {"1": 0.8, "2": 0.7, "3": 0.5, "4": 0.3, "5": None}
    (test,) = comparison.compare({"a": a, "b": b})
    assert (test.n, test.zero, test.undefined, test.unmatched) == (2, 1, 2, 1)
    assert test.p == test.p_holm == 0.5
    assert test.effect == 1.0 and not test.significant
    assert test.median_difference == pytest.approx(0.1)


def test_compare_takes_rounding_for_ties():
    # 0.9 - 0.8 and 0.8 - 0.7 differ in the last bit.
    a, b = {"1": 0.9, "2": 0.7}, {"1": 0.8, "2": 0.8}
    (test,) = comparison.compare({"a": a, "b": b})
    assert test.effect == 0 and test.p == 1


def test_compare_without_a_difference_has_no_p():
    same = {"1": 0.5, "2": 0.6}
    other = {"1": 0.4, "2": 0.5}
    tests = comparison.compare({"a": same, "b": dict(same), "c": other})
    assert [(t.a, t.b) for t in tests] == [("a", "b"), ("a", "c"), ("b", "c")]
    assert math.isnan(tests[0].p) and math.isnan(tests[0].p_holm)
    assert not tests[0].significant and tests[0].zero == 2
    # Two tests were made, not three.
    assert tests[1].p_holm == 1.0


def test_compare_corrects_over_all_pairs():
    rng = np.random.default_rng(0)
    cases = [str(i) for i in range(20)]
    base = rng.normal(size=20)
    methods = {
        "a": dict(zip(cases, base, strict=True)),
        "b": dict(zip(cases, base + 1 + 0.1 * rng.random(20), strict=True)),
        "c": dict(zip(cases, base + 0.5 * rng.normal(size=20), strict=True)),
    }
    tests = comparison.compare(methods)
    assert tests[0].p == pytest.approx(2 / 2**20)
    assert tests[0].p_holm == pytest.approx(3 * 2 / 2**20)
    assert tests[0].significant and tests[0].effect == -1
    assert not tests[1].significant


def test_compare_rejects():
    with pytest.raises(ValueError, match="two or more"):
        comparison.compare({"a": {"1": 1.0}})
    with pytest.raises(ValueError, match="finite or NaN"):
        comparison.compare({"a": {"1": math.inf}, "b": {"1": 1.0}})


# --- summaries ----------------------------------------------------------------------


def test_summarize_by_hand():
    values = [0.9, 0.5, None, 0.7, 0.6, math.nan]
    got = aggregate.summarize(values, metric="dsc")
    assert got.mean == pytest.approx(0.675)
    assert got.median == pytest.approx(0.65)
    # Squares of 0.225, 0.175, 0.025, 0.075 over 3.
    assert got.std == pytest.approx(math.sqrt(0.0875 / 3))
    assert got.worst30 == pytest.approx((0.5 + 0.6) / 2)  # 1.2, rounded up
    assert (got.n, got.undefined) == (4, 2)


def test_summarize_knows_which_end_is_bad():
    values = np.arange(10.0)
    assert aggregate.summarize(values, metric="nsd_before").worst30 == 1.0
    assert aggregate.summarize(values, metric="tre_mm").worst30 == 8.0
    assert aggregate.quantile_l2r(values, metric="dsc_l2r") == pytest.approx(2.7)
    assert aggregate.quantile_l2r(values, metric="sdlogj_l2r") == pytest.approx(6.3)


def test_summarize_does_not_guess_which_end_is_bad():
    assert aggregate.better("Dice_liver") == "higher"
    assert aggregate.better("fold_percent_whole") == "lower"
    assert aggregate.better("score") is None
    got = aggregate.summarize([1.0, 2.0], metric="score")
    assert got.mean == 1.5 and math.isnan(got.worst30)


def test_summarize_of_nothing_is_undefined():
    got = aggregate.summarize([None, math.nan], metric="dsc")
    assert math.isnan(got.mean) and math.isnan(got.worst30)
    assert (got.n, got.undefined) == (0, 2)
    one = aggregate.summarize([0.5], metric="dsc")
    assert one.mean == one.worst30 == 0.5 and math.isnan(one.std)
    assert math.isnan(aggregate.quantile_l2r([], metric="dsc"))


def test_summarize_rejects_infinity():
    with pytest.raises(ValueError, match="hd95_mm must be finite"):
        aggregate.summarize([1.0, math.inf], metric="hd95_mm")
