import math
import random
from statistics import NormalDist

import pytest

from rlhf_lightning.evaluation.win_rate import mean_interval, win_rate

Z = NormalDist().inv_cdf(0.975)


def wilson(wins: int, count: int) -> tuple[float, float]:
    """Wilson's interval from its closed form."""
    p = wins / count
    middle = (p + Z**2 / (2 * count)) / (1 + Z**2 / count)
    half = Z / (1 + Z**2 / count) * math.sqrt(p * (1 - p) / count + Z**2 / (4 * count**2))
    return middle - half, middle + half


def outcomes(wins: int, losses: int, ties: int) -> tuple[list[float], list[float]]:
    """Scores against a reference of 0."""
    scores = [1.0] * wins + [-1.0] * losses + [0.0] * ties
    return scores, [0.0] * len(scores)


@pytest.mark.parametrize(("wins", "losses"), [(30, 70), (50, 50), (1, 19), (7, 0), (0, 7)])
def test_without_ties_the_interval_is_wilsons(wins: int, losses: int) -> None:
    rate = win_rate(*outcomes(wins, losses, 0))
    assert rate.mean == wins / (wins + losses)
    assert (rate.low, rate.high) == pytest.approx(wilson(wins, wins + losses), abs=1e-9)


def test_the_best_and_the_worst_stay_within_0_and_1() -> None:
    best, worst = win_rate(*outcomes(12, 0, 0)), win_rate(*outcomes(0, 12, 0))
    assert (best.mean, best.high) == pytest.approx((1.0, 1.0))
    assert 0.5 < best.low < 1.0
    assert (worst.low, worst.high) == pytest.approx((1 - best.high, 1 - best.low), abs=1e-9)


@pytest.mark.parametrize("count", [5, 50, 500])
def test_ties_alone_are_one_half_but_not_certain(count: int) -> None:
    rate = win_rate(*outcomes(0, 0, count))
    assert rate.mean == 0.5
    # Without a win or a loss, the score test solves by hand: difference = z^2 / (n + z^2).
    assert rate.high - 0.5 == pytest.approx(Z**2 / (count + Z**2) / 2, abs=1e-9)
    assert rate.high - 0.5 == pytest.approx(0.5 - rate.low, abs=1e-9)


def test_a_tie_is_worth_half_a_win() -> None:
    assert win_rate(*outcomes(20, 20, 60)).mean == 0.5
    assert win_rate(*outcomes(60, 20, 20)).mean == 0.7


def test_ties_make_the_interval_narrower_than_wins_and_losses_of_the_same_mean() -> None:
    tied, split = win_rate(*outcomes(20, 20, 60)), win_rate(*outcomes(50, 50, 0))
    assert tied.high - tied.low < 0.75 * (split.high - split.low)


def test_the_interval_agrees_with_a_bootstrap() -> None:
    random.seed(3)
    values = [1.0] * 180 + [0.0] * 60 + [0.5] * 160
    means = sorted(sum(random.choices(values, k=len(values))) / len(values) for _ in range(2000))
    rate = win_rate(*outcomes(180, 60, 160))
    assert (rate.low, rate.high) == pytest.approx((means[50], means[1949]), abs=0.006)


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    random.seed(5)
    truth, covered, repeats = 0.25 + 0.55 / 2, 0, 600
    for _ in range(repeats):
        draws = [random.random() for _ in range(60)]
        scores = [1.0 if u < 0.25 else 0.0 if u < 0.80 else -1.0 for u in draws]
        rate = win_rate(scores, [0.0] * 60)
        covered += rate.low <= truth <= rate.high
    # Three standard errors of a share of 600.
    assert covered / repeats == pytest.approx(0.95, abs=3 * math.sqrt(0.95 * 0.05 / repeats))


def test_more_confidence_is_wider() -> None:
    scores = outcomes(30, 20, 10)
    narrow, wide = win_rate(*scores, confidence=0.5), win_rate(*scores, confidence=0.99)
    assert wide.low < narrow.low < narrow.mean < narrow.high < wide.high


def test_exchanging_the_sides_mirrors_the_interval() -> None:
    scores, reference = outcomes(33, 12, 9)
    rate, mirrored = win_rate(scores, reference), win_rate(reference, scores)
    assert (mirrored.low, mirrored.mean, mirrored.high) == pytest.approx((1 - rate.high, 1 - rate.mean, 1 - rate.low))


@pytest.mark.parametrize(
    ("scores", "reference", "message"),
    [
        ([1.0], [1.0, 2.0], "1 scores cannot be paired with 2"),
        ([], [], "empty"),
        ([math.nan], [1.0], "NaN"),
        ([1.0], [math.nan], "NaN"),
    ],
)
def test_what_cannot_be_compared_is_refused(scores: list[float], reference: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        win_rate(scores, reference)


def test_the_mean_has_the_interval_of_its_standard_error() -> None:
    found = mean_interval([1.0, 2.0, 3.0, 4.0])
    assert found.mean == 2.5
    assert found.high - found.mean == pytest.approx(Z * math.sqrt(5 / 3) / 2)


def test_a_single_value_has_no_interval() -> None:
    found = mean_interval([2.0])
    assert found.mean == 2.0
    assert math.isnan(found.low)
    assert math.isnan(found.high)
