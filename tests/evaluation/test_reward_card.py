import math

import numpy as np
import pytest

from rlhf_lightning.evaluation.reward_card import RewardCard, correlation, margin_bins, reward_card


def bradley_terry(count: int = 40_000) -> np.ndarray:
    """Margins of a model that knows the truth about labels drawn from it."""
    random = np.random.default_rng(0)
    margins = random.normal(0, 1.5, count)
    right = random.random(count) < 1 / (1 + np.exp(-np.abs(margins)))
    return np.where(right, np.abs(margins), -np.abs(margins))


def test_small_numbers_by_hand() -> None:
    card = reward_card([2.0, -1.0, 0.0, 1.0])
    assert card.pairs == 4
    assert card.accuracy == (1 + 0 + 0.5 + 1) / 4
    assert card.mean_margin == 0.5
    losses = [math.log1p(math.exp(-m)) for m in (2.0, -1.0, 0.0, 1.0)]
    assert card.log_loss == pytest.approx(sum(losses) / 4)


def test_true_margins_are_calibrated() -> None:
    assert reward_card(bradley_terry()).expected_calibration_error < 0.01


def test_margins_three_times_too_large_are_overconfident() -> None:
    true, bold = reward_card(bradley_terry()), reward_card(3 * bradley_terry())
    assert bold.accuracy == true.accuracy
    assert bold.log_loss > true.log_loss
    assert bold.expected_calibration_error > 0.1
    assert all(b.confidence > b.accuracy for b in bold.reliability if b.confidence > 0.6)


def test_every_pair_is_in_one_bin() -> None:
    margins = bradley_terry(1000)
    card = reward_card(margins.tolist())
    assert sum(b.pairs for b in card.reliability) == 1000
    assert sum(b.pairs for b in card.margin_bins) == 1000
    total = sum(b.pairs * b.accuracy for b in card.margin_bins)
    assert total / 1000 == pytest.approx(card.accuracy)


def test_a_margin_on_an_edge_belongs_to_the_bin_above() -> None:
    (low, high) = margin_bins(np.array([0.5, -0.4]))
    assert (low.low, low.high, low.accuracy, low.pairs) == (0.0, 0.5, 0.0, 1)
    assert (high.low, high.high, high.accuracy, high.pairs) == (0.5, 1.0, 1.0, 1)


def test_certainty_falls_into_the_last_bin() -> None:
    (only,) = reward_card([800.0, 900.0]).reliability
    assert (only.confidence, only.accuracy, only.pairs) == (1.0, 1.0, 2)


def test_the_number_of_bins_counts() -> None:
    margins = bradley_terry(500).tolist()
    assert len(reward_card(margins, num_bins=2).reliability) < len(reward_card(margins, num_bins=10).reliability)


def test_scores_that_follow_length_are_found_out() -> None:
    lengths = [3.0, 9.0, 4.0, 12.0]
    card = reward_card([1.0], scores=[2 * n + 1 for n in lengths], lengths=lengths)
    assert card.length_correlation == pytest.approx(1.0)


def test_a_reward_model_that_loves_length_is_right_on_the_longer_and_wrong_on_the_shorter() -> None:
    random = np.random.default_rng(0)
    chosen, rejected = random.integers(1, 20, (2, 500))
    card = reward_card(0.3 * (chosen - rejected), length_differences=chosen - rejected)
    found = {b.chosen: b for b in card.length_bins}
    assert {name: b.accuracy for name, b in found.items()} == {"longer": 1.0, "shorter": 0.0, "equal": 0.5}
    assert found["longer"].mean_margin > 0 > found["shorter"].mean_margin
    assert found["longer"].pairs == (chosen > rejected).sum()
    assert sum(b.pairs for b in card.length_bins) == 500


def test_a_reward_model_that_knows_the_truth_is_as_right_whichever_is_longer() -> None:
    margins = bradley_terry()
    differences = np.random.default_rng(1).integers(-3, 4, len(margins))
    accuracies = [b.accuracy for b in reward_card(margins, length_differences=differences).length_bins]
    assert accuracies == pytest.approx([reward_card(margins).accuracy] * 3, abs=0.02)


def test_every_pair_has_a_length_difference() -> None:
    assert reward_card([1.0]).length_bins == []
    with pytest.raises(ValueError, match="2 margins cannot be paired with 1 length differences"):
        reward_card([1.0, 2.0], length_differences=[1.0])


def test_the_scores_of_the_best_responses_are_summed_up() -> None:
    card = reward_card([1.0], best_scores=[1.0, 2.0, 6.0])
    assert card.best_score_mean == 3.0
    assert card.best_score_std == pytest.approx(math.sqrt(14 / 3))
    assert reward_card([1.0]).best_score_mean is None


def test_what_does_not_vary_has_no_correlation() -> None:
    assert correlation([1.0, 2.0], [5.0, 5.0]) is None
    assert reward_card([1.0]).length_correlation is None


def test_a_card_survives_its_plain_form() -> None:
    card = reward_card(bradley_terry(100).tolist(), length_differences=[1.0, -2.0] * 50, best_scores=[1.0, 2.0])
    assert RewardCard.from_dict(card.as_dict()) == card


@pytest.mark.parametrize("margins", [[], [1.0, math.nan], [math.inf]])
def test_margins_that_are_no_numbers_are_refused(margins: list[float]) -> None:
    with pytest.raises(ValueError, match="margins must be finite"):
        reward_card(margins)
