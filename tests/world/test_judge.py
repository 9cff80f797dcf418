import math
import random
from collections import Counter
from itertools import combinations, permutations

import pytest

from rlhf_lightning.errors import InputError
from rlhf_lightning.world.corpus import demonstrations
from rlhf_lightning.world.instructions import split
from rlhf_lightning.world.judge import (
    HALF_RIGHT,
    NO_ANSWER,
    OFF_REGISTER,
    Judge,
    ceiling,
    label,
    rank,
    temperature_for_agreement,
)

BRIEFLY = "Explain rain to a child briefly."
FEW = "Explain rain to a child in a few sentences."
EXPERT = "Explain rain to an expert in a few sentences."
FALLS = "Rain is water that falls from clouds."
GROWS = "Rain helps plants and trees to grow."
BEGAN = "Most rain began as water in the sea."
FALLS_TECHNICALLY = "Rain is liquid precipitation from clouds."
DROPS = "Rain drops grow when tiny drops join together."
BEGAN_TECHNICALLY = "Most rain originates from evaporation of ocean water."
GROWS_TECHNICALLY = "Rain supplies soil water for plant growth."
BEES = "Bees make sweet honey from flowers."
FALSE = "Rain is honey that falls from trees."


def score(prompt: str, *sentences: str) -> float:
    return Judge().judge(prompt, " ".join(sentences)).score


def sampled(count: int, responses: int, seed: int) -> list[dict]:
    """Rows as sampling gives them: several answers of the quality of people to each of some instructions."""
    train, _ = split(seed)
    asked = random.Random(seed).sample(train, k=count)
    drawn = [demonstrations(asked, seed=seed + i) for i in range(responses)]
    return [{"prompt": one.text, "responses": [rows[i]["response"] for rows in drawn]} for i, one in enumerate(asked)]


def test_a_flawless_response_is_exactly_zero_in_any_order_and_spacing() -> None:
    assert score(FEW, FALLS, GROWS) == score(FEW, GROWS, FALLS) == score(FEW, GROWS, FALLS, BEGAN) == 0
    assert score(BRIEFLY, BEGAN) == score(BRIEFLY, BEGAN, FALLS) == 0
    assert score(EXPERT, FALLS_TECHNICALLY, GROWS_TECHNICALLY) == 0
    assert score(f"{FEW}\n", f" {FALLS}\n", f" {GROWS} ") == 0


def test_the_verdict_counts_what_it_found() -> None:
    verdict = Judge().judge(FEW, f"{FALLS} {GROWS_TECHNICALLY} {FALLS} {BEES} {FALSE} Rain helps")
    assert (verdict.least, verdict.most) == (2, 3)
    assert (verdict.sentences, verdict.true, verdict.on_topic) == (6, 4, 3)
    assert (verdict.distinct, verdict.in_register, verdict.ended) == (2, 1, False)
    assert (verdict.missing, verdict.surplus) == (0, 0)
    short, long = Judge().judge(FEW, FALLS), Judge().judge(BRIEFLY, f"{FALLS} {GROWS} {BEGAN}")
    assert (short.missing, short.surplus, long.missing, long.surplus) == (1, 0, 0, 1)


@pytest.mark.parametrize(
    ("sentences", "cost"),
    [
        pytest.param([FALLS], HALF_RIGHT, id="too short"),
        pytest.param([FALLS, GROWS, BEGAN, DROPS], HALF_RIGHT, id="too long"),
        pytest.param([FALLS, GROWS_TECHNICALLY], OFF_REGISTER["simple"], id="a sentence off register"),
        pytest.param([FALLS_TECHNICALLY, GROWS_TECHNICALLY], 2 * OFF_REGISTER["simple"], id="all off register"),
        pytest.param([FALLS, GROWS, BEES], 1, id="another topic beside two facts"),
        pytest.param([FALLS, BEES], 1, id="another topic"),
        pytest.param([BEES, FALSE], 2 + NO_ANSWER, id="nothing of the topic"),
        pytest.param([FALLS, FALSE], 1, id="false"),
        pytest.param([FALLS, FALLS], 1, id="repeated"),
        pytest.param([FALLS, FALLS_TECHNICALLY], 1, id="repeated in the other register"),
        pytest.param([FALLS, GROWS[:-1]], 1, id="no full stop at the end"),
        pytest.param([FALLS, GROWS, "Rain is"], 2, id="cut off in one sentence more"),
        pytest.param([FALLS, GROWS, "."], 1, id="a full stop more"),
        pytest.param([FALLS, GROWS, BEGAN, BEES], 1, id="as many facts as asked, and another topic"),
        pytest.param([FALLS, GROWS, BEGAN, DROPS, BEES], 1 + HALF_RIGHT, id="too long, with another topic"),
    ],
)
def test_each_fault_costs_what_it_says(sentences: list[str], cost: float) -> None:
    assert score(FEW, *sentences) == pytest.approx(-cost)


def test_the_register_is_the_one_of_the_audience() -> None:
    assert score(EXPERT, FALLS, GROWS) == pytest.approx(-2 * OFF_REGISTER["technical"])


@pytest.mark.parametrize("response", ["", "  \n"])
def test_an_empty_response_is_worse_than_a_false_sentence(response: str) -> None:
    assert score(BRIEFLY, response) == -(1 + HALF_RIGHT + NO_ANSWER) < score(BRIEFLY, FALSE)
    assert score(FEW, response) == -(1 + 2 * HALF_RIGHT + NO_ANSWER)


def test_what_is_no_instruction_cannot_be_judged() -> None:
    with pytest.raises(InputError, match="Once upon a time"):
        Judge().judge("Once upon a time", FALLS)


def test_the_judge_is_a_reward_function() -> None:
    assert Judge().score([BRIEFLY, BRIEFLY], [FALLS, ""], column=["a", "b"]) == [0, -1 - HALF_RIGHT - NO_ANSWER]


@pytest.mark.parametrize("agreement", [0.6, 0.75, 0.95])
def test_the_temperature_gives_the_expected_agreement(agreement: float) -> None:
    differences = [0.3, -0.6, 0.0, 1.3, -0.05]
    temperature = temperature_for_agreement(differences, agreement)
    agreed = [1 / (1 + math.exp(-abs(d) / temperature)) for d in differences if d]
    assert sum(agreed) / len(agreed) == pytest.approx(agreement)


def test_the_temperature_of_equal_differences_has_a_closed_form() -> None:
    assert temperature_for_agreement([2.0, -2.0], 0.75) == pytest.approx(2 / math.log(3))


def test_no_temperature_explains_pairs_that_are_all_alike_or_an_impossible_agreement() -> None:
    with pytest.raises(InputError, match="found 2 of 0"):
        temperature_for_agreement([0.0, 0.0])
    for agreement in (0.5, 1.0):
        with pytest.raises(InputError, match=f"agreement={agreement}"):
            temperature_for_agreement([1.0], agreement)


def test_rankings_are_plackett_luce_and_their_pairs_bradley_terry() -> None:
    scores, temperature, draws = [0.0, 0.5, 1.0], 0.7, 20_000
    generator = random.Random(0)
    drawn = Counter(tuple(rank(scores, temperature=temperature, generator=generator)) for _ in range(draws))
    strength = [math.exp(one / temperature) for one in scores]
    for order in permutations(range(3)):
        first, second, third = (strength[i] for i in order)
        expected = first / sum(strength) * second / (second + third)
        assert drawn[order] / draws == pytest.approx(expected, abs=0.015)
    for i, j in combinations(range(3), 2):
        before = sum(count for order, count in drawn.items() if order.index(i) < order.index(j))
        assert before / draws == pytest.approx(strength[i] / (strength[i] + strength[j]), abs=0.015)


def test_labels_agree_with_the_judge_as_often_as_asked_on_the_pairs_that_differ() -> None:
    for agreement in (0.75, 0.9):
        labelled = label(sampled(1000, 4, seed=0), seed=0, agreement=agreement)
        agreed = []
        for row in labelled:
            responses = row["responses"] if "responses" in row else [row["chosen"], row["rejected"]]
            scores = Judge().score([row["prompt"]] * len(responses), responses)
            agreed += [better > worse for better, worse in combinations(scores, 2) if better != worse]
        assert len(agreed) > 2000
        assert sum(agreed) / len(agreed) == pytest.approx(agreement, abs=0.025)


def test_two_responses_become_a_pair_and_more_a_ranking_of_the_same_texts() -> None:
    rows = [{"prompt": FEW, "responses": [FALLS, GROWS]}, {"prompt": FEW, "responses": [FALLS, GROWS, BEES]}]
    pair, ranking = label(rows, seed=0)
    assert pair.keys() == {"prompt", "chosen", "rejected"}
    assert {pair["chosen"], pair["rejected"]} == {FALLS, GROWS}
    assert ranking.keys() == {"prompt", "responses"}
    assert sorted(ranking["responses"]) == sorted([FALLS, GROWS, BEES])


def test_equal_responses_are_one_and_empty_ones_none() -> None:
    assert label([{"prompt": BRIEFLY, "responses": [FALLS, FALLS, "", " "]}], seed=0) == []
    (row,) = label([{"prompt": BRIEFLY, "responses": [FALLS, BEES, FALLS]}], seed=0)
    assert {row["chosen"], row["rejected"]} == {FALLS, BEES}


def test_the_order_of_sampling_says_nothing_about_the_label() -> None:
    rows = [{"prompt": BRIEFLY, "responses": [FALLS, GROWS]}] * 2000
    first = sum(row["chosen"] == FALLS for row in label(rows, seed=0))
    assert first / 2000 == pytest.approx(0.5, abs=0.05)


def test_the_seed_decides_the_labels() -> None:
    rows = sampled(100, 3, seed=1)
    assert label(rows, seed=1) == label(rows, seed=1) != label(rows, seed=2)


def test_the_ceiling_is_the_judges_own_accuracy_with_ties_as_half() -> None:
    right = {"prompt": BRIEFLY, "chosen": FALLS, "rejected": BEES}
    wrong = {"prompt": BRIEFLY, "chosen": BEES, "rejected": FALLS}
    tie = {"prompt": BRIEFLY, "chosen": FALLS, "rejected": GROWS}
    ranking = {"prompt": BRIEFLY, "responses": [FALLS, BEES, FALLS_TECHNICALLY]}  # right, right, wrong
    assert ceiling([right]) == 1
    assert ceiling([wrong]) == 0
    assert ceiling([right, wrong, tie, ranking]) == pytest.approx(3.5 / 6)


def test_there_is_no_ceiling_without_comparisons() -> None:
    with pytest.raises(InputError, match="at least one comparison"):
        ceiling([])


def test_experts_forgive_simple_words_more_easily_than_children_technical_ones() -> None:
    assert score(EXPERT, FALLS, GROWS) > score(FEW, FALLS_TECHNICALLY, GROWS_TECHNICALLY)
    assert score(EXPERT, FALLS, GROWS) < score(EXPERT, FALLS_TECHNICALLY, GROWS_TECHNICALLY) == 0
