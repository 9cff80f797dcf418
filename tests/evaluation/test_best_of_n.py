import math
from itertools import combinations, product

import pytest
import torch
from torch import Tensor

from rlhf_lightning.evaluation.best_of_n import best_of_n, best_of_n_kl, expected_best_of_n


def tilted(probabilities: Tensor, scores: Tensor, n: int) -> Tensor:
    """The distribution of the best of n: F(<= score)^n - F(< score)^n, shared among equal scores by probability."""
    below = torch.stack([probabilities[scores < score].sum() for score in scores])
    equal = torch.stack([probabilities[scores == score].sum() for score in scores])
    return ((below + equal) ** n - below**n) * probabilities / equal


def kl(p: Tensor, q: Tensor) -> float:
    return float(torch.special.xlogy(p, p / q).sum())


# Choosing --------------------------------------------------------------------


def test_the_highest_score_of_each_group_is_chosen_and_of_equal_ones_the_first() -> None:
    assert best_of_n([1.0, 3.0, 2.0, -1.0, -5.0, -1.0], 3) == [1, 3]


def test_of_one_response_there_is_no_choice() -> None:
    assert best_of_n([1.0, 3.0, 2.0], 1) == [0, 1, 2]


@pytest.mark.parametrize("n", [0, 2])
def test_scores_that_are_no_groups_are_refused(n: int) -> None:
    with pytest.raises(ValueError, match=f"n={n} must"):
        best_of_n([1.0, 3.0, 2.0], n)


def test_a_choice_by_nan_is_refused() -> None:
    with pytest.raises(ValueError, match="NaN"):
        best_of_n([1.0, math.nan], 2)


def test_what_is_chosen_is_distributed_as_the_distribution_function_says() -> None:
    """All 4^3 draws of three responses, each with its probability."""
    probabilities, scores = torch.tensor([0.4, 0.3, 0.2, 0.1]).double(), [0.5, 2.0, -1.0, 1.0]
    found = torch.zeros(4).double()
    for draw in product(range(4), repeat=3):
        (best,) = best_of_n([scores[response] for response in draw], 3)
        found[draw[best]] += probabilities[list(draw)].prod()
    torch.testing.assert_close(found, tilted(probabilities, torch.tensor(scores), 3))


# KL --------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "expected"), [(1, 0.0), (4, 0.636), (16, 1.835), (64, 3.175), (256, 4.549)])
def test_the_kl_in_nats(n: int, expected: float) -> None:
    assert best_of_n_kl(n) == pytest.approx(expected, abs=5e-4)


@pytest.mark.parametrize("n", [2, 4, 16, 64])
def test_the_more_responses_a_policy_has_the_nearer_is_the_kl_of_its_best_of_n(n: int) -> None:
    """Equally likely responses with different scores: the gap closes with the square of their number, or nearly so."""
    gaps = []
    for count in (1_000, 10_000):
        through = torch.arange(count + 1).double() / count
        gaps.append(best_of_n_kl(n) - kl((through**n).diff(), torch.full((count,), 1 / count, dtype=torch.float64)))
    assert 0 < gaps[1] < gaps[0] / 50
    assert gaps[1] < 1e-5


@pytest.mark.parametrize("n", [2, 4, 16, 64, 1024])
@pytest.mark.parametrize("values_of_scores", [2, 10, 50])
def test_with_few_responses_or_equal_scores_the_kl_is_an_upper_bound(n: int, values_of_scores: int) -> None:
    generator = torch.Generator().manual_seed(n)
    probabilities = torch.randn(50, generator=generator, dtype=torch.float64).mul(2).softmax(0)
    scores = torch.randint(values_of_scores, (50,), generator=generator)
    # The best response has a probability, and nothing can be further away than it alone.
    found = kl(tilted(probabilities, scores, n), probabilities)
    assert 0 < found < best_of_n_kl(n)
    assert found <= -math.log(probabilities[scores == scores.max()].sum()) + 1e-9


def test_no_n_below_1_has_a_kl() -> None:
    with pytest.raises(ValueError, match="n=0"):
        best_of_n_kl(0)


# The expected value ----------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_the_estimate_is_the_mean_over_all_choices_of_n_samples(n: int) -> None:
    scores, values = [0.3, -1.0, 2.0, 0.7, 1.1], [5.0, -2.0, 0.5, 1.0, 4.0]
    best = [max(choice, key=scores.__getitem__) for choice in combinations(range(5), n)]
    expected = sum(values[i] for i in best) / len(best)
    assert expected_best_of_n(values, scores, n) == pytest.approx(expected)


def test_of_one_sample_it_is_the_mean_and_of_all_samples_the_best() -> None:
    scores = [0.3, -1.0, 2.0, 0.7]
    assert expected_best_of_n(scores, scores, 1) == pytest.approx(0.5)
    assert expected_best_of_n(scores, scores, 4) == pytest.approx(2.0)


def test_equal_scores_share_what_they_are_worth_in_any_order() -> None:
    # Of the three pairs each has one of the two best as its best, or both: they are drawn from by chance.
    assert expected_best_of_n([0.0, 1.0, 3.0], [0.0, 7.0, 7.0], 2) == pytest.approx(2.0)
    assert expected_best_of_n([0.0, 3.0, 1.0], [0.0, 7.0, 7.0], 2) == pytest.approx(2.0)


@pytest.mark.parametrize("scores", [[0.5, 2.0, -1.0], [1.0, 1.0, 0.0]])
@pytest.mark.parametrize("n", [1, 2, 4])
def test_the_estimate_is_unbiased(n: int, scores: list[float]) -> None:
    """All 3^4 draws of four samples; the truth is the mean value under the distribution of the best of n."""
    probabilities, values = torch.tensor([0.5, 0.3, 0.2]).double(), [1.0, -4.0, 2.5]
    mean = 0.0
    for draw in product(range(3), repeat=4):
        estimate = expected_best_of_n([values[i] for i in draw], [scores[i] for i in draw], n)
        mean += float(probabilities[list(draw)].prod()) * estimate
    truth = tilted(probabilities, torch.tensor(scores), n) @ torch.tensor(values).double()
    assert mean == pytest.approx(float(truth))


def test_many_samples_are_no_trouble() -> None:
    # Of 0, 1, ..., N - 1 the largest of n is on average n (N + 1) / (n + 1) - 1.
    samples = [float(i) for i in range(20_000)]
    assert expected_best_of_n(samples, samples, 1_000) == pytest.approx(1_000 * 20_001 / 1_001 - 1)


@pytest.mark.parametrize(
    ("values", "scores", "n", "message"),
    [
        ([1.0], [1.0, 2.0], 1, "1 values cannot be paired with 2 scores"),
        ([1.0, 2.0], [1.0, 2.0], 3, "n=3 must lie between 1 and the number of samples, 2"),
        ([1.0, 2.0], [1.0, 2.0], 0, "n=0 must"),
        ([1.0, math.nan], [1.0, 2.0], 1, "NaN"),
        ([1.0, 2.0], [1.0, math.nan], 1, "NaN"),
    ],
)
def test_what_has_no_estimate_is_refused(values: list[float], scores: list[float], n: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        expected_best_of_n(values, scores, n)
