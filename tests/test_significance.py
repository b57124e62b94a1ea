"""Intervals and p-values, against SciPy's own resampling and closed formulas."""

import functools

import numpy as np
import pytest
from scipy import stats

from evaluation import METRICS
from significance import Pair, difference, holm, permutation_test

N_ROWS, N_SEEDS = 120, 3


@pytest.fixture(params=["accuracy", "macro_f1", "matthews", "pearson", "spearman"])
def pair(request):
    """Recipes of three seeds, the second one better."""
    generator = np.random.default_rng(5)
    labels = generator.integers(3, size=N_ROWS).astype(float)
    others = generator.integers(3, size=(2, N_SEEDS, N_ROWS)).astype(float)
    right = generator.random((2, N_SEEDS, N_ROWS)) < np.array([0.5, 0.7]).reshape(2, 1, 1)
    return Pair(METRICS[request.param], labels, *np.where(right, labels, others))


def gain_of(pair, labels, first, second, **_):
    return pair.metric(labels, second) - pair.metric(labels, first)


def test_the_covariance_is_that_of_scipys_bootstrap(pair):
    data = pair.labels[None], pair.first, pair.second
    options = dict(paired=True, vectorized=True, axis=-1, method="percentile", n_resamples=4000)
    gain = functools.partial(gain_of, pair)
    expected = np.cov(stats.bootstrap(data, gain, rng=1, **options).bootstrap_distribution)
    assert pair.covariance == pytest.approx(expected, rel=0.25, abs=0.1 * expected.max())


def test_the_permutation_test_is_scipys(pair):
    """For one seed, where both exchange single rows."""
    weaker = pair.first[0].copy()
    weaker[:40] = pair.second[0, :40]
    data = weaker, pair.second[0]
    gain = functools.partial(gain_of, pair, pair.labels)
    options = dict(permutation_type="samples", n_resamples=4000, vectorized=True, axis=-1)
    found = stats.permutation_test(data, gain, rng=1, **options)
    expected = np.mean(np.abs(found.null_distribution) >= abs(found.statistic) - 1e-12)
    single = Pair(pair.metric, pair.labels, weaker[None], pair.second[:1])
    assert permutation_test([single]) == pytest.approx(expected, abs=0.06)


def test_the_permutation_test_of_an_accuracy_is_the_sign_test():
    generator = np.random.default_rng(3)
    first, second = (generator.random((2, 1, 300)) < [[[0.6]], [[0.67]]]).astype(float)
    wins, losses = int((second > first).sum()), int((second < first).sum())
    expected = stats.binomtest(wins, wins + losses).pvalue
    pair = Pair(METRICS["accuracy"], np.ones(300), first, second)
    assert permutation_test([pair]) == pytest.approx(expected, abs=0.06)


def test_a_repeated_seed_adds_nothing(pair):
    """Its rows are the same. Counted as new ones, they would make the interval narrower."""
    once = Pair(pair.metric, pair.labels, pair.first[:1], pair.second[:1])
    thrice = Pair(
        pair.metric, pair.labels, *(np.repeat(p, 3, 0) for p in (once.first, once.second))
    )
    assert difference([thrice]) == pytest.approx(difference([once]), rel=1e-6)
    assert permutation_test([thrice]) == permutation_test([once])


def test_seeds_alone_give_students_interval():
    """Rows that are all alike say nothing about other rows."""
    labels, first = np.ones(400), np.ones((N_SEEDS, 400))
    means = np.array([0.5, 1.0, 3.0])
    second = np.repeat(means[:, None], 400, axis=1)
    found = difference([Pair(lambda x, y: y.mean(axis=-1), labels, first, second)])
    expected = stats.ttest_1samp(means - 1, 0)
    assert found.value == pytest.approx(0.5) and found.p == pytest.approx(expected.pvalue)
    assert (found.low, found.high) == pytest.approx(expected.confidence_interval(0.95))


def test_one_seed_gives_mcnemars_interval():
    """The variance of a paired difference of accuracies: rows of discordant pairs (McNemar 1947)."""
    generator = np.random.default_rng(0)
    first, second = generator.random((2, 1, 1000)) < [[[0.6]], [[0.7]]]
    only_first, only_second = (first & ~second).sum(), (second & ~first).sum()
    gain = (only_second - only_first) / 1000
    error = np.sqrt((only_first + only_second) / 1000 - gain**2) / np.sqrt(1000)
    pair = Pair(METRICS["accuracy"], np.ones(1000), first.astype(float), second.astype(float))
    found = difference([pair])
    assert found.value == pytest.approx(gain)
    assert found.high - found.low == pytest.approx(2 * 1.96 * error, rel=0.06)
    assert found.is_clear == (abs(gain) > 2 * error)


def test_the_mean_is_over_independent_tasks(pair):
    """The variance of a mean of K independent differences is their sum by K squared."""
    one = Pair(pair.metric, pair.labels, pair.first[:1], pair.second[:1])
    other = Pair(METRICS["accuracy"], pair.labels, pair.first[1:2], pair.second[1:2])
    widths = [found.high - found.low for found in map(difference, ([one], [other], [one, other]))]
    assert widths[2] == pytest.approx(np.hypot(*widths[:2]) / 2, rel=1e-3)
    values = [difference(pairs).value for pairs in ([one], [other], [one, other])]
    assert values[2] == pytest.approx(np.mean(values[:2]))


@pytest.mark.parametrize("n_seeds", [1, 3])
def test_a_recipe_does_not_differ_from_itself(pair, n_seeds):
    same = Pair(pair.metric, pair.labels, pair.first[:n_seeds], pair.first[:n_seeds])
    found = difference([same])
    assert found[:4] == (0, 0, 0, 1) and not found.is_clear and permutation_test([same]) == 1


def test_exchanged_recipes_have_the_opposite_difference(pair):
    found = difference([pair])
    opposite = difference([Pair(pair.metric, pair.labels, pair.second, pair.first)])
    assert opposite[:3] == pytest.approx((-found.value, -found.high, -found.low))
    assert opposite.p == pytest.approx(found.p)
    assert difference([pair]) == found


def test_holm_is_the_example_of_a_textbook():
    """p.adjust(c(0.01, 0.04, 0.03, 0.005), "holm") of R gives 0.03, 0.06, 0.06, 0.02."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == pytest.approx([1, 1])
