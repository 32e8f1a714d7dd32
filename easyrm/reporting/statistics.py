"""Arithmetic on rewards and lengths; NumPy only, no files and no drawing.

P pairs. A share's interval is Wilson's, at 95 %.
"""

import math
from typing import NamedTuple

import numpy as np
from scipy import stats

from easyrm.suites.interval import wilson

_BIN = 25  # pairs a bin at least
_BINS = 10  # at most


class Bin(NamedTuple):
    """Pairs that lie together: least, mean and largest of what they are sorted by, and a share with its interval."""

    least: float
    mean: float
    largest: float
    count: int
    share: float
    low: float
    high: float


class Calibration(NamedTuple):
    """Bins by predicted probability, the expected calibration error, and both means over all pairs."""

    bins: list[Bin]
    error: float
    predicted: float
    observed: float
    low: float
    high: float


class LengthBias(NamedTuple):
    """Accuracy by token difference, and how often the longer answer is favoured and is chosen.

    The two shares are (share, low, high) over the `unequal` pairs, None without any; `excess` is (favoured minus
    chosen, low, high). Correlations are None where one side never varies.
    """

    bins: list[Bin]
    unequal: int
    favoured: tuple[float, float, float] | None
    chosen: tuple[float, float, float] | None
    excess: tuple[float, float, float] | None
    pearson: float | None
    spearman: float | None
    difference_pearson: float | None


def running_mean(values: np.ndarray, width: int) -> np.ndarray:
    """The mean of the `width` (odd) values around each, at the ends of those that there are."""
    window = np.ones(width)
    middle = slice(width // 2, width // 2 + len(values))
    return np.convolve(values, window)[middle] / np.convolve(np.ones(len(values)), window)[middle]


def calibrate(difference: np.ndarray) -> Calibration:
    """How often the favoured answer is the chosen one, against what Bradley-Terry predicts. `difference`: float64[P].

    A pair of reward difference d says with probability sigmoid(|d|) that the answer it favours is the chosen one; a
    tie (d = 0) predicts 1/2 and counts half. Bins hold equally many pairs, as in Nguyen and O'Connor (2015); the error
    is the mean over pairs of |predicted - observed| of their bin.
    """
    predicted = 1 / (1 + np.exp(-np.abs(difference)))
    observed = np.where(difference == 0, 0.5, difference > 0)
    order = np.argsort(predicted, kind="stable")
    bins = [_bin(predicted[part], observed[part]) for part in np.array_split(order, _bin_count(len(order)))]
    error = sum(one.count * abs(one.mean - one.share) for one in bins) / len(order)
    return Calibration(bins, error, float(predicted.mean()), *_share(observed))


def length_bias(
    chosen: np.ndarray, rejected: np.ndarray, chosen_tokens: np.ndarray, rejected_tokens: np.ndarray
) -> LengthBias:
    """What rewards, float64[P] each, have to do with lengths in tokens, float64[P] each.

    Accuracy counts a tie as wrong. Which answer is favoured and which is chosen are asked of pairs of unequal lengths
    alone; a tie favours the longer one by half. Correlations of reward and length are over all 2P answers.
    """
    margin, longer = chosen - rejected, chosen_tokens - rejected_tokens
    edges = np.unique(np.quantile(longer, np.linspace(0, 1, _bin_count(len(longer)) + 1), method="nearest"))
    which = np.clip(np.searchsorted(edges, longer, side="right") - 1, 0, max(len(edges) - 2, 0))
    bins = [_bin(longer[which == i], margin[which == i] > 0) for i in np.unique(which)]
    unequal = longer != 0
    is_chosen = (longer > 0)[unequal].astype(np.float64)
    favoured = (0.5 + 0.5 * np.sign(margin) * np.sign(longer))[unequal]
    rewards, lengths = np.concatenate([chosen, rejected]), np.concatenate([chosen_tokens, rejected_tokens])
    return LengthBias(
        bins,
        int(unequal.sum()),
        _share(favoured) if unequal.any() else None,
        _share(is_chosen) if unequal.any() else None,
        _mean(favoured - is_chosen) if unequal.sum() > 1 else None,
        _correlation(stats.pearsonr, rewards, lengths),
        _correlation(stats.spearmanr, rewards, lengths),
        _correlation(stats.pearsonr, margin, longer),
    )


def _bin_count(pairs: int) -> int:
    return max(1, min(_BINS, pairs // _BIN))


def _bin(sorted_by: np.ndarray, hits: np.ndarray) -> Bin:
    least, mean, largest = float(sorted_by.min()), float(sorted_by.mean()), float(sorted_by.max())
    return Bin(least, mean, largest, len(hits), *_share(hits))


def _share(hits: np.ndarray) -> tuple[float, float, float]:
    return float(np.mean(hits)), *wilson(float(np.sum(hits)), len(hits))


def _mean(values: np.ndarray) -> tuple[float, float, float]:
    """A mean with its 95 % interval by the normal approximation: of differences within pairs, which are no shares."""
    mean, half = float(values.mean()), 1.959964 * float(values.std(ddof=1)) / math.sqrt(len(values))
    return mean, mean - half, mean + half


def _correlation(of, x: np.ndarray, y: np.ndarray) -> float | None:
    if len(x) < 3 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return None
    value = float(of(x, y).statistic)
    return value if math.isfinite(value) else None
