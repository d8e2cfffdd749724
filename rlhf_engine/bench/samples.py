"""Statistics of times on a machine with other work, which makes a call slower but never faster.

The floor of a case, its smallest sample, repeats far better than its median: on two busy cores the floors of two runs of the
same code differed by 2% where medians differed by 50%. The floor's error is estimated from the gap to the next samples: if
several rounds reach it, it is known.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

LEAST_ERROR = 0.02
"""Standard deviation of the logarithm of a floor between two runs of the same code on an idle machine."""
SINGLE_ERROR = 0.1
"""The same for a case with one sample, whose error is not measured."""
CONTENTION_SHARE = 0.25
"""Share of the median slowdown of the matrix product that counts as an error of every floor of the run."""


class Spread(NamedTuple):
    """Median, quartiles and extremes of samples, in their unit."""

    median: float
    low: float
    """First quartile."""
    high: float
    """Third quartile."""
    least: float
    most: float
    count: int


def spread(samples: Sequence[float]) -> Spread:
    """Return the spread of at least one sample; quartiles are interpolated between samples."""
    low, median, high = (float(x) for x in np.quantile(np.asarray(samples, dtype=np.float64), (0.25, 0.5, 0.75)))
    return Spread(median, low, high, min(samples), max(samples), len(samples))


def floor_error(samples: Sequence[float]) -> float:
    """Return the standard deviation of the logarithm of the smallest sample.

    If the excess over the true floor is exponential with mean m, the smallest of n samples exceeds it by m / n on average, and
    the third smallest exceeds the smallest by m (1 / (n - 1) + 1 / (n - 2)), which gives m.
    """
    n, ordered = len(samples), sorted(samples)
    if n == 1:
        return SINGLE_ERROR
    if n == 2:
        return math.log(ordered[1] / ordered[0]) / 2
    gap = math.log(ordered[2] / ordered[0])
    return gap / (1 / (n - 1) + 1 / (n - 2)) / n


def contention(samples: Sequence[float]) -> float:
    """Return the logarithm of median over smallest time of a call that does not change, as the matrix product."""
    return math.log(statistics.median(samples) / min(samples)) if samples else 0.0


def deviation(values: Sequence[float]) -> float:
    """Return the standard deviation of normal values from their median distance to the median; outliers hardly change it."""
    middle = statistics.median(values)
    return 1.4826 * statistics.median(abs(x - middle) for x in values)
