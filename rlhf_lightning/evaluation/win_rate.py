"""How often one policy's responses beat another's, and how sure that is."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean, stdev


@dataclass(frozen=True)
class Interval:
    """An estimate with the limits of its confidence interval."""

    mean: float
    low: float
    high: float


def win_rate(scores: Sequence[float], reference_scores: Sequence[float], *, confidence: float = 0.95) -> Interval:
    """Share of prompts on which the score beats the reference's score of the same prompt, a tie counting 1/2.

    With w the share of wins and l of losses, the win rate is (1 + w - l) / 2: a difference of paired proportions. Its
    interval is that of Tango (1998), found by inverting the score test; without ties it is Wilson's (1927), and ties
    alone do not make it narrow to nothing. Raises `ValueError` for lists of different lengths, empty ones, and NaN.
    """
    if len(scores) != len(reference_scores):
        raise ValueError(f"{len(scores)} scores cannot be paired with {len(reference_scores)} reference_scores")
    if not scores:
        raise ValueError("scores is empty: a win rate needs at least one prompt")
    if any(math.isnan(score) for score in [*scores, *reference_scores]):
        raise ValueError("scores and reference_scores must not hold NaN: it beats nothing and ties with nothing")
    pairs = list(zip(scores, reference_scores, strict=True))
    wins = sum(score > reference for score, reference in pairs)
    losses = sum(score < reference for score, reference in pairs)
    low, high = paired_difference_interval(wins, losses, len(pairs), confidence=confidence)
    ties = len(pairs) - wins - losses
    return Interval((wins + ties / 2) / len(pairs), (1 + low) / 2, (1 + high) / 2)


def mean_interval(values: Sequence[float], *, confidence: float = 0.95) -> Interval:
    """Mean with its normal interval, whose limits are NaN for a single value. Raises `ValueError` for none."""
    if not values:
        raise ValueError("values is empty: a mean needs at least one")
    mean = fmean(values)
    half = _quantile(confidence) * stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return Interval(mean, mean - half, mean + half)


def paired_difference_interval(wins: int, losses: int, count: int, *, confidence: float = 0.95) -> tuple[float, float]:
    """Limits of P(win) - P(loss) of ``count`` pairs, ties among them, by inverting the score test (Tango 1998)."""
    z = _quantile(confidence)
    estimate = (wins - losses) / count

    def distance(difference: float) -> float:
        return _score_statistic(difference, wins, losses, count)

    low = _root(lambda difference: distance(difference) - z, -1.0, estimate)
    high = _root(lambda difference: distance(difference) + z, estimate, 1.0)
    return low, high


def _score_statistic(difference: float, wins: int, losses: int, count: int) -> float:
    """Distance of the observed difference from a supposed one, in standard errors of the supposed one."""
    # The losses' probability is estimated by maximum likelihood under the supposed difference: a quadratic equation.
    a = 2 * count
    b = -wins - losses + (2 * count - wins + losses) * difference
    c = -losses * difference * (1 - difference)
    loss_probability = (math.sqrt(max(b * b - 4 * a * c, 0.0)) - b) / (2 * a)
    variance = count * (2 * loss_probability + difference * (1 - difference))
    excess = wins - losses - count * difference
    if variance <= 1e-12:
        return math.copysign(math.inf, excess) if abs(excess) > 1e-9 else 0.0
    return excess / math.sqrt(variance)


def _root(decreasing: Callable[[float], float], low: float, high: float) -> float:
    """Return where the function crosses zero, by bisection to machine precision; an end where it does not cross."""
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if decreasing(middle) > 0 else (low, middle)
    return (low + high) / 2


def _quantile(confidence: float) -> float:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence={confidence} must lie between 0 and 1")
    return NormalDist().inv_cdf((1 + confidence) / 2)
