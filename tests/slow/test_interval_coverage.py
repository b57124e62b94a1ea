"""How often an interval contains the true difference, over made-up recipes of three seeds."""

import numpy as np
import pytest
from scipy.stats import norm

import significance
from evaluation import METRICS
from significance import Pair, difference, permutation_test

N_TRIALS, N_ROWS, N_SEEDS = 1000, 400, 3
# Standard deviations, of what makes an answer right or wrong, that belong to a recipe and a row, to
# a recipe and a seed, and to all three.
NOISES = {"rows": (0.5, 0.0, 0.2), "seeds": (0.0, 0.5, 0.0), "both": (0.5, 0.05, 0.5)}


def made_up(generator, noise, gain):
    """Return recipes that differ by `gain`, and by how much the second is right more often."""
    by_row, by_seed, by_both = noise
    sizes = {(2, 1, N_ROWS): by_row, (2, N_SEEDS, 1): by_seed, (2, N_SEEDS, N_ROWS): by_both}
    score = 0.7 * generator.normal(size=N_ROWS)
    score = score + sum(
        deviation * generator.normal(size=size) for size, deviation in sizes.items()
    )
    right = (score + np.array([0.0, gain]).reshape(2, 1, 1) > 0).astype(float)
    spread = np.sqrt(0.7**2 + sum(deviation**2 for deviation in noise))
    return Pair(METRICS["accuracy"], np.ones(N_ROWS), *right), norm.cdf(gain / spread) - 0.5


@pytest.mark.parametrize("kind", NOISES)
def test_95_percent_of_the_intervals_contain_the_difference(kind, monkeypatch):
    monkeypatch.setattr(significance, "RESAMPLES", 400)
    generator = np.random.default_rng(1)
    hits = 0
    for _ in range(N_TRIALS):
        pair, true = made_up(generator, NOISES[kind], 0.1)
        found = difference([pair])
        hits += found.low <= true <= found.high
    print(f"{kind}: {hits / N_TRIALS:.3f}")
    assert 0.93 <= hits / N_TRIALS <= 0.97


@pytest.mark.parametrize("kind", NOISES)
def test_equal_recipes_seldom_have_a_small_p(kind, monkeypatch):
    """The permutation test alone knows nothing of other seeds, so the larger of both p counts."""
    monkeypatch.setattr(significance, "RESAMPLES", 400)
    generator = np.random.default_rng(2)
    pairs = [[made_up(generator, NOISES[kind], 0.0)[0]] for _ in range(N_TRIALS // 2)]
    p_values = [max(difference(pair).p, permutation_test(pair)) for pair in pairs]
    print(f"{kind}: {np.mean(np.array(p_values) < 0.05):.3f}")
    assert np.mean(np.array(p_values) < 0.05) <= 0.08
