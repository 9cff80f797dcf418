"""Best-of-n: of n responses to a prompt the one with the highest score is kept."""

import math
from collections.abc import Sequence
from itertools import groupby


def best_of_n(scores: Sequence[float], n: int) -> list[int]:
    """Return the index of the highest score among each n neighbours, the first of equal ones.

    Raises `ValueError` where the scores are no groups of n, and for NaN.
    """
    if n < 1 or len(scores) % n:
        raise ValueError(f"n={n} must be at least 1 and divide the {len(scores)} scores")
    _require_numbers(scores)
    return [max(range(start, start + n), key=scores.__getitem__) for start in range(0, len(scores), n)]


def best_of_n_kl(n: int) -> float:
    """Return log n - (n - 1) / n: KL(best of n || policy) in nats where no two responses score alike (Gao et al. 2022).

    With responses that have a probability of their own, or equal scores, it is an upper bound (Beirami et al. 2024).
    """
    if n < 1:
        raise ValueError(f"n={n} must be at least 1")
    return math.log(n) - (n - 1) / n


def expected_best_of_n(values: Sequence[float], scores: Sequence[float], n: int) -> float:
    """Return the mean value of the best of n by score, over all choices of n of the N >= n samples of one prompt.

    The sum over i of C(i - 1, n - 1) / C(N, n) times the value of the i-th smallest score: an unbiased estimate, from
    N samples, of what best-of-n reaches (Nakano et al. 2021). ``values`` are the scores themselves, or what another,
    truer reward says. Equal scores are drawn from by chance. Raises `ValueError` for lists of different lengths, for
    fewer samples than n, and for NaN.
    """
    if len(values) != len(scores):
        raise ValueError(f"{len(values)} values cannot be paired with {len(scores)} scores")
    if not 1 <= n <= len(scores):
        raise ValueError(f"n={n} must lie between 1 and the number of samples, {len(scores)}")
    _require_numbers([*values, *scores])
    weights = _chances_to_be_the_best(len(scores), n)
    total, smaller = 0.0, 0
    for _, tied in groupby(sorted(zip(scores, values, strict=True)), key=lambda pair: pair[0]):
        tied_values = [value for _, value in tied]
        share = sum(weights[smaller : smaller + len(tied_values)]) / len(tied_values)
        total += share * math.fsum(tied_values)
        smaller += len(tied_values)
    return total


def _chances_to_be_the_best(samples: int, n: int) -> list[float]:
    """Return C(i - 1, n - 1) / C(N, n) for i = 1 to N, each from the one after it: the binomials are huge."""
    weights = [0.0] * samples
    weights[-1] = n / samples
    for i in range(samples - 1, n - 1, -1):
        weights[i - 1] = weights[i] * (i - n + 1) / i
    return weights


def _require_numbers(numbers: Sequence[float]) -> None:
    if any(math.isnan(number) for number in numbers):
        raise ValueError("values and scores must not hold NaN: it is neither better nor worse than anything")
