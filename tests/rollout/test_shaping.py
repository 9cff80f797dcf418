from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhf_lightning.rollout.shaping import RunningMoments, Shaping, moments_of
from rlhf_lightning.types import Rollout, ScoredRollout

PROMPTS = [[5, 9], [8], [40, 41], [50]]
RESPONSES = [[11, 12, 1], [13, 14, 15, 16, 17, 18], [20, 21, 20, 21, 20, 21], [1]]
SCORES = [4.0, -2.0, 1.0, 9.0]
OFF: dict[str, Any] = {
    "normalize_scores": "none",
    "score_clip": None,
    "missing_eos": "subtract",
    "missing_eos_penalty": 0.0,
    "length_penalty": 0.0,
    "repetition_penalty": 0.0,
}
Make = Callable[..., ScoredRollout]
batches = st.lists(st.lists(st.floats(-50, 50, width=32), min_size=1, max_size=5), min_size=1, max_size=4)


@pytest.fixture
def scored(rollout: Callable[..., Rollout]) -> Make:
    """Four responses, of which the second and the third have not ended, with the scores given."""

    def make(scores: list[float] = SCORES, **padding: int) -> ScoredRollout:
        made = rollout(PROMPTS, RESPONSES, **padding)
        zeros = torch.zeros(made.response_mask.shape)
        values = torch.zeros(len(made), zeros.shape[1] + 1)
        return ScoredRollout(
            **vars(made), logprobs=zeros, ref_logprobs=zeros, values=values, scores=torch.tensor(scores)
        )

    return make


def parts_of(
    scored: ScoredRollout,
    seen: RunningMoments | None = None,
    ranks: Callable[[Any], Any] = lambda x: x,
    **settings: Any,
) -> dict[str, list[float]]:
    shaping = Shaping(**{**OFF, **settings})
    found = shaping(scored, RunningMoments() if seen is None else seen, sum_over_ranks=ranks)
    return {name: part.tolist() for name, part in found.items()}


# Running moments ---------------------------------------------------------------


@given(batches)
def test_running_moments_are_those_of_everything_seen_so_far(parts: list[list[float]]) -> None:
    seen = RunningMoments()
    for part in parts:
        seen.add(moments_of(torch.tensor(part)))
    everything = np.concatenate([np.array(part, dtype=np.float64) for part in parts])
    assert seen.count == len(everything)
    assert seen.mean == pytest.approx(everything.mean(), abs=1e-9)
    assert seen.std == pytest.approx(everything.std(), abs=2e-6 * max(1.0, np.abs(everything).max()))


def test_nothing_has_mean_0_and_deviation_0() -> None:
    assert (RunningMoments().mean, RunningMoments().std) == (0.0, 0.0)


@pytest.mark.parametrize("score", [0.1, 0.7, 1e4])
def test_equal_scores_have_a_deviation_of_exactly_0(score: float) -> None:
    seen = RunningMoments()
    for size in (3, 7, 1000):
        seen.add(moments_of(torch.full((size,), score)))
        assert seen.std == 0.0


def test_two_ranks_keep_the_moments_of_one_with_both_rollouts(scored: Make) -> None:
    whole, one, two = RunningMoments(), RunningMoments(), RunningMoments()
    rollout = scored()
    halves = [rollout.rows(torch.tensor(rows)) for rows in ([0], [1, 2, 3])]
    total = sum(moments_of(half.scores) for half in halves)
    together = parts_of(rollout, whole, normalize_scores="shift_and_scale")["shaped_score"]
    found = [
        parts_of(half, seen, lambda x: total, normalize_scores="shift_and_scale")["shaped_score"]
        for half, seen in zip(halves, (one, two), strict=True)
    ]
    assert found[0] + found[1] == pytest.approx(together)
    assert one == two == whole
    alone = parts_of(halves[1], normalize_scores="shift_and_scale")["shaped_score"]
    assert alone != pytest.approx(together[1:], abs=0.1)


# Normalising and clipping --------------------------------------------------------


def test_scaling_divides_by_the_deviation_and_keeps_sign_and_ratio_of_the_mean(scored: Make) -> None:
    found = parts_of(scored(), normalize_scores="scale")["shaped_score"]
    assert found == pytest.approx(list(np.array(SCORES) / np.std(SCORES)))
    assert np.mean(found) == pytest.approx(3.0 / np.std(SCORES))


def test_only_shifting_takes_the_mean_off(scored: Make) -> None:
    found = parts_of(scored(), normalize_scores="shift_and_scale")["shaped_score"]
    assert found == pytest.approx(list((np.array(SCORES) - 3.0) / np.std(SCORES)))
    assert np.mean(found) == pytest.approx(0.0, abs=1e-12)


def test_scaling_around_the_mean_keeps_it_and_makes_the_deviation_1(scored: Make) -> None:
    found = parts_of(scored(), normalize_scores="scale_around_mean")["shaped_score"]
    assert (np.mean(found), np.std(found)) == pytest.approx((3.0, 1.0))
    # In the order and at the distances of the scores.
    assert np.subtract(found, found[0]) == pytest.approx(np.subtract(SCORES, SCORES[0]) / np.std(SCORES))


def test_the_moments_are_those_of_all_rollouts_this_one_included(scored: Make) -> None:
    seen = RunningMoments()
    parts_of(scored([100.0, 102.0, 98.0, 90.0]), seen)
    found = parts_of(scored(), seen, normalize_scores="shift_and_scale")["shaped_score"]
    everything = np.array([100.0, 102.0, 98.0, 90.0, *SCORES])
    assert found == pytest.approx(list((np.array(SCORES) - everything.mean()) / everything.std()))


@pytest.mark.parametrize("normalize_scores", ["scale", "shift_and_scale"])
@given(scale=st.floats(0.01, 100), seed=st.integers(0, 100))
def test_the_unit_of_the_scores_is_irrelevant_once_they_are_scaled(
    normalize_scores: Any, scale: float, seed: int
) -> None:
    shaping = Shaping(**{**OFF, "normalize_scores": normalize_scores})
    scores = torch.randn(5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    seen, other = RunningMoments(), RunningMoments()
    seen.add(moments_of(scores))
    other.add(moments_of(scores * scale))
    torch.testing.assert_close(shaping._normalized(scores * scale, other), shaping._normalized(scores, seen))


@pytest.mark.parametrize(
    ("normalize_scores", "expected"), [("scale", 0.1), ("scale_around_mean", 0.1), ("shift_and_scale", 0.0)]
)
def test_scores_that_never_varied_are_not_divided(normalize_scores: str, expected: float, scored: Make) -> None:
    found = parts_of(scored([0.1] * 4), normalize_scores=normalize_scores)["shaped_score"]
    assert found == pytest.approx([expected] * 4, abs=1e-6)


def test_the_limit_is_applied_to_the_normalised_score(scored: Make) -> None:
    assert parts_of(scored(), score_clip=3.0)["shaped_score"] == [3.0, -2.0, 1.0, 3.0]
    normalised = np.array(SCORES) / np.std(SCORES)
    found = parts_of(scored(), normalize_scores="scale", score_clip=1.0)["shaped_score"]
    assert found == pytest.approx(list(np.clip(normalised, -1.0, 1.0)))
    assert found[2] < 1.0  # 1 before it is normalised: clipped first it would have stayed the largest


# Penalties for form --------------------------------------------------------------


def test_a_missing_end_token_replaces_the_shaped_score_or_is_taken_off_it(scored: Make) -> None:
    for settings in ({}, {"normalize_scores": "scale", "score_clip": 0.5}):
        shaped = parts_of(scored(), **settings)["shaped_score"]
        for missing_eos in ("replace", "subtract"):
            parts = parts_of(scored(), missing_eos=missing_eos, missing_eos_penalty=1.5, **settings)
            total = np.add(parts["shaped_score"], parts["missing_eos_part"])
            instead = [-1.5, -1.5] if missing_eos == "replace" else [shaped[1] - 1.5, shaped[2] - 1.5]
            assert total.tolist() == pytest.approx([shaped[0], *instead, shaped[3]])


def test_what_is_left_out_of_the_loss_keeps_its_score(scored: Make) -> None:
    parts = parts_of(scored(), missing_eos="mask", missing_eos_penalty=1.5)
    assert parts["missing_eos_part"] == [0.0] * 4
    assert parts["shaped_score"] == SCORES


def test_what_replaces_a_score_does_not_depend_on_it_even_by_rounding(scored: Make) -> None:
    parts = parts_of(scored([0.1, 1234.5678, 0.3333333, 7.7]), missing_eos="replace", missing_eos_penalty=0.1)
    totals = torch.tensor(parts["shaped_score"], dtype=torch.float64) + torch.tensor(
        parts["missing_eos_part"], dtype=torch.float64
    )
    assert totals.float()[1] == totals.float()[2] == torch.tensor(-0.1)


def test_every_token_of_a_response_costs_the_length_penalty(scored: Make) -> None:
    for padding in ({}, {"left": 3, "right": 2}):
        found = parts_of(scored(**padding), length_penalty=0.25)["length_part"]
        assert found == [-0.75, -1.5, -1.5, -0.25]


def test_repeated_runs_of_four_tokens_cost_their_share_times_the_penalty(scored: Make) -> None:
    for padding in ({}, {"left": 3, "right": 6}):
        # 20 21 20 21, 21 20 21 20, 20 21 20 21: the third stood there before.
        found = parts_of(scored(**padding), repetition_penalty=3.0)["repetition_part"]
        assert found == pytest.approx([0.0, 0.0, -1.0, 0.0])
    assert "repetition_part" not in parts_of(scored())


def test_with_everything_off_the_score_is_what_the_reward_says(scored: Make) -> None:
    parts = parts_of(scored())
    assert parts["shaped_score"] == SCORES
    assert parts["missing_eos_part"] == parts["length_part"] == [0.0] * 4


def test_the_parts_add_up_to_what_each_setting_says_by_itself(scored: Make) -> None:
    parts = parts_of(
        scored(),
        normalize_scores="shift_and_scale",
        score_clip=1.2,
        missing_eos="replace",
        missing_eos_penalty=2.0,
        length_penalty=0.1,
        repetition_penalty=3.0,
    )
    shaped = np.clip((np.array(SCORES) - 3.0) / np.std(SCORES), -1.2, 1.2)
    expected = [shaped[0] - 0.3, -2.0 - 0.6, -2.0 - 0.6 - 1.0, shaped[3] - 0.1]
    assert np.sum(list(parts.values()), axis=0).tolist() == pytest.approx(expected)
