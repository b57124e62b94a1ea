"""Is one model, or one recipe over its seeds, really better than another? Functions of arrays."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

RESAMPLES = 1000


class Difference(NamedTuple):
    """The score of the second recipe minus that of the first."""

    value: float
    low: float  # ends of the 95% interval, nan if there is none
    high: float
    p: float
    about_rows: bool = True  # whether other rows are among the chance that the interval allows for

    @property
    def has_interval(self) -> bool:
        return not np.isnan(self.low)

    @property
    def is_clear(self) -> bool:
        return self.about_rows and (self.low > 0 or self.high < 0)


@dataclasses.dataclass(frozen=True)
class Pair:
    """The predictions of two recipes for the same labelled rows. A single model has one seed."""

    metric: Callable[[np.ndarray, np.ndarray], np.ndarray]  # as in evaluation.METRICS
    labels: np.ndarray  # [n_rows]
    first: np.ndarray  # [seeds, n_rows]
    second: np.ndarray  # [seeds, n_rows]

    @functools.cached_property
    def gains(self) -> np.ndarray:
        """The differences between the scores, [seeds]."""
        return self.metric(self.labels, self.second) - self.metric(self.labels, self.first)

    def draw(self, highest: int) -> np.ndarray:
        """Draw a number below `highest` for each row, [RESAMPLES, n_rows], always the same ones."""
        return np.random.default_rng(0).integers(highest, size=(RESAMPLES, len(self.labels)))

    # Loops, since all resamples at once do not fit into memory. SciPy gives the same, no faster.

    @functools.cached_property
    def covariance(self) -> np.ndarray:
        """The covariance of `gains` over other choices of rows, [seeds, seeds]: a bootstrap over rows
        (Efron 1979), the same ones for both recipes and all seeds."""
        resamples = (
            Pair(self.metric, self.labels[rows], self.first[:, rows], self.second[:, rows])
            for rows in self.draw(len(self.labels))
        )
        return np.atleast_2d(np.cov([pair.gains for pair in resamples], rowvar=False))

    @functools.cached_property
    def null(self) -> np.ndarray:
        """Mean differences, [RESAMPLES], if chance decides for each row which recipe has which
        predictions. A row is exchanged for all seeds at once, since they agree on many rows."""
        pairs = [(self.first, self.second), (self.second, self.first)]
        exchanged = (
            Pair(self.metric, self.labels, *(np.where(swap, b, a) for a, b in pairs))
            for swap in self.draw(2)
        )
        return np.array([pair.gains.mean() for pair in exchanged])


def student(value: float, variance: float, freedom: float) -> Difference:
    """Return Student's interval and the p-value of the t test."""
    from scipy.stats import t

    if variance == 0:
        return Difference(value, value, value, float(value == 0))
    law = t(freedom, value, variance**0.5)
    low, high = law.interval(0.95)
    return Difference(value, low, high, 2 * min(law.cdf(0), law.sf(0)))


def difference(pairs: Sequence[Pair]) -> Difference:
    """Compare two recipes by the mean of their scores over `pairs`, one for each task.

    Other rows and other seeds would give another difference. Their variances add up, less the part that
    is in both (two-way clustering: Cameron, Gelbach and Miller 2011). Three seeds are too few for a
    bootstrap over seeds. So the interval is Student's, with the degrees of freedom of this sum
    (Satterthwaite 1946). With one seed, it is about other rows only.
    """
    gains = np.mean([pair.gains for pair in pairs], axis=0)
    covariance = np.sum([pair.covariance for pair in pairs], axis=0) / len(pairs) ** 2
    n_seeds, n_rows = len(gains), min(len(pair.labels) for pair in pairs)
    rows, seeds, both = covariance.mean(), 0.0, 0.0
    if n_seeds > 1:
        seeds = gains.var(ddof=1) / n_seeds
        both = (covariance.trace() / n_seeds - rows) / (n_seeds - 1)
    variance = rows + max(seeds - both, 0.0)
    spread = rows**2 / (n_rows - 1) + seeds**2 / max(n_seeds - 1, 1)
    return student(gains.mean(), variance, variance**2 / spread if spread else 1)


def permutation_test(pairs: Sequence[Pair]) -> float:
    """Return the p-value of a permutation test: would these models differ so much by chance?"""
    null = np.mean([pair.null for pair in pairs], axis=0)
    extreme = np.abs(null) >= abs(np.mean([pair.gains for pair in pairs])) - 1e-12
    return (extreme.sum() + 1) / (len(null) + 1)


def holm(p_values: Sequence[float]) -> np.ndarray:
    """Correct p-values for their number (Holm 1979)."""
    order, n = np.argsort(p_values), len(p_values)
    steps = np.maximum.accumulate(np.asarray(p_values)[order] * np.arange(n, 0, -1))
    return np.minimum(steps, 1)[np.argsort(order)]
