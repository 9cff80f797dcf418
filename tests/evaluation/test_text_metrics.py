import pytest

from rlhf_lightning.evaluation.text_metrics import rouge_l


def f_measure(subsequence: int, response: int, reference: int) -> float:
    precision, recall = subsequence / response, subsequence / reference
    return 2 * precision * recall / (precision + recall)


def test_rouge_l_counts_the_longest_common_subsequence() -> None:
    # "the cat ... mat": 3 words in common in this order, of 4 and of 6.
    (found,) = rouge_l(["the cat mat sat"], [["the cat sat on the mat"]])
    assert found == pytest.approx(f_measure(3, 4, 6))


def test_order_counts() -> None:
    straight, reversed_ = rouge_l(["one two three", "three two one"], [["one two three"]] * 2)
    assert straight == 1.0
    assert reversed_ == pytest.approx(1 / 3)


def test_the_nearest_reference_counts() -> None:
    assert rouge_l(["yes"], [["no way", "yes"]]) == [1.0]


def test_an_empty_response_scores_zero() -> None:
    assert rouge_l([""], [["something"]]) == [0.0]


def test_a_response_without_a_reference_is_refused() -> None:
    with pytest.raises(ValueError, match="response 1 has no reference"):
        rouge_l(["a", "b"], [["a"], []])
