from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rlhf_lightning.functional.rewards import value_mask
from rlhf_lightning.rollout.experience import AdvantageSettings, estimate_advantages
from rlhf_lightning.rollout.metrics import critic_metrics, rollout_metrics, sampler_metrics
from rlhf_lightning.rollout.shaping import RunningMoments, Shaping
from rlhf_lightning.types import Experience, Rollout, SampledRollout, ScoredRollout

PROMPTS = [[5, 9, 7], [8], [40, 41], [50], [3, 4], [7]]
LENGTHS = [3, 6, 1, 4, 2, 5]
ENDED = [True, False, True, True, True, False]
Parts = dict[str, Tensor]
Make = Callable[..., ScoredRollout]
SHAPING = Shaping(
    normalize_scores="scale",
    score_clip=1.0,
    missing_eos="replace",
    missing_eos_penalty=2.0,
    length_penalty=0.1,
    repetition_penalty=0.5,
)


@pytest.fixture
def scored(rollout: Callable[..., Rollout]) -> Make:
    """Six responses; what stands outside of the masks of the padded ones is noise."""

    def make(scores: list[float] | None = None, *, left: int = 0, right: int = 0) -> ScoredRollout:
        responses = [[*range(10, 9 + n), 1 if ended else 77] for n, ended in zip(LENGTHS, ENDED, strict=True)]
        made = rollout(PROMPTS, responses, left=left, right=right)
        generator = torch.Generator().manual_seed(0)
        logprobs, ref_logprobs, values = (torch.randn(6, 7, generator=generator) for _ in range(3))
        noise = torch.randn(6, right)
        states = value_mask(made.response_mask, after_end=True)
        return ScoredRollout(
            **vars(made),
            logprobs=torch.cat([logprobs[:, :6], noise], dim=1) * made.response_mask,
            ref_logprobs=torch.cat([ref_logprobs[:, :6], noise + 1], dim=1) * made.response_mask,
            values=torch.cat([values, noise], dim=1) * states,
            scores=torch.randn(6, generator=generator) if scores is None else torch.tensor(scores),
        )

    return make


def same(x: Any) -> Any:
    return x


def settings(beta: float) -> AdvantageSettings:
    return AdvantageSettings(
        advantage="gae",
        beta=beta,
        gamma=1.0,
        lam=0.95,
        samples_per_prompt=1,
        baseline="batch",
        score_placement="after_end",
        learn_from_cut_off=True,
    )


def worked_out(scored: ScoredRollout, beta: float = 0.3) -> tuple[Experience, Parts]:
    parts = SHAPING(scored, RunningMoments(), sum_over_ranks=same)
    scores = torch.stack(list(parts.values())).sum(dim=0)
    return estimate_advantages(scored, scores, settings(beta), RunningMoments(), sum_over_ranks=same), parts


def metrics_of(scored: ScoredRollout, ranks: Callable[[Tensor], Tensor] = same) -> dict[str, float]:
    experience, parts = worked_out(scored)
    found = rollout_metrics(scored, experience, parts, sum_over_ranks=ranks)
    found |= critic_metrics(experience, sum_over_ranks=ranks)
    return {name: value.item() for name, value in found.items()}


def test_every_number_is_what_a_loop_over_the_responses_finds(scored: Make) -> None:
    rollout = scored()
    found = metrics_of(rollout)
    ratios = [(rollout.logprobs - rollout.ref_logprobs)[row, :n].double().numpy() for row, n in enumerate(LENGTHS)]
    kl = np.array([r.sum() for r in ratios])
    scores = rollout.scores.double().numpy()
    shaped = np.clip(scores / scores.std(), -1, 1)
    expected = {
        "score": scores.mean(),
        "score_std": scores.std(),
        "shaped_score": shaped.mean(),
        "missing_eos_part": np.where(ENDED, 0.0, -2.0 - shaped).mean(),
        "length_part": -0.1 * np.mean(LENGTHS),
        "repetition_part": 0.0,
        "kl_part": -0.3 * kl.mean(),
        "reward": (np.where(ENDED, shaped, -2.0) - 0.1 * np.array(LENGTHS) - 0.3 * kl).mean(),
        "kl": kl.mean(),
        "kl_k3": np.mean([(np.exp(-r) - 1 + r).sum() for r in ratios]),
        "kl_per_token": kl.sum() / sum(LENGTHS),
        "response_length": np.mean(LENGTHS),
        "missing_eos": 2 / 6,
        "score_length_correlation": np.corrcoef(scores, LENGTHS)[0, 1],
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert found.keys() == expected.keys() | {"explained_variance"}


def test_the_parts_and_the_kl_add_up_to_the_reward(scored: Make) -> None:
    found = metrics_of(scored())
    parts = ["shaped_score", "missing_eos_part", "length_part", "repetition_part", "kl_part"]
    assert all(found[name] != 0 for name in parts if name != "repetition_part")
    assert sum(found[name] for name in parts) == pytest.approx(found["reward"], abs=1e-6)


def test_each_part_of_a_reward_made_of_several_is_a_metric_of_its_name(scored: Make) -> None:
    polite, helpful = torch.arange(6.0), torch.tensor([1.0, -1.0, 0.5, 0.0, 2.0, 2.0])
    found = metrics_of(replace(scored(), score_parts={"polite": polite, "std": helpful}))
    assert found["score_part/polite"] == pytest.approx(2.5)
    # An ensemble's standard deviation is not that of the scores over the rollout.
    assert found["score_part/std"] == pytest.approx(0.75)
    assert found["score_std"] == metrics_of(scored())["score_std"]


def test_a_reward_that_loves_length_shows_in_the_correlation(scored: Make) -> None:
    loving = metrics_of(scored([2.0 * n + 3 for n in LENGTHS]))
    assert loving["score_length_correlation"] == pytest.approx(1.0, abs=1e-6)
    hating = metrics_of(scored([-0.01 * n for n in LENGTHS]))
    assert hating["score_length_correlation"] == pytest.approx(-1.0, abs=1e-6)
    # Symmetric about the mean length: neither.
    indifferent = metrics_of(scored([abs(n - 3.5) for n in LENGTHS]))
    assert indifferent["score_length_correlation"] == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("score", [0.0, 0.1, 1e4])
def test_equal_scores_have_no_deviation_and_no_correlation(score: float, scored: Make) -> None:
    found = metrics_of(scored([score] * 6))
    assert found["score_length_correlation"] == pytest.approx(0.0, abs=1e-5)
    assert found["score_std"] == pytest.approx(0.0, abs=1e-6 * max(1.0, score))


@pytest.mark.parametrize(("left", "right"), [(10, 0), (0, 10), (4, 7)])
def test_padding_changes_no_number(left: int, right: int, scored: Make) -> None:
    assert metrics_of(scored(left=left, right=right)) == pytest.approx(metrics_of(scored()), rel=1e-6, abs=1e-7)


def test_the_order_of_the_responses_changes_no_number(scored: Make) -> None:
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    assert metrics_of(scored().rows(order)) == pytest.approx(metrics_of(scored()), rel=1e-6, abs=1e-7)


def test_two_ranks_find_what_one_with_both_rollouts_finds(scored: Make) -> None:
    rollout = scored()
    experience, parts = worked_out(rollout)
    sent: list[list[Tensor]] = []

    def found(ranks: Callable[[Tensor], Tensor], rows: Tensor) -> dict[str, Tensor]:
        own = {name: part[rows] for name, part in parts.items()}
        return rollout_metrics(rollout.rows(rows), experience.rows(rows), own, sum_over_ranks=ranks) | critic_metrics(
            experience.rows(rows), sum_over_ranks=ranks
        )

    halves = [torch.tensor([0, 3]), torch.tensor([1, 2, 4, 5])]
    for half in halves:
        sent.append([])
        found(lambda x: sent[-1].append(x) or x, half)
    totals = [one + two for one, two in zip(*sent, strict=True)]
    whole = found(same, torch.arange(6))
    for half in halves:
        answers = iter(totals)
        torch.testing.assert_close(found(lambda x, answers=answers: next(answers), half), whole)


def sampled_as(scored: ScoredRollout, sampler_logprobs: Tensor) -> SampledRollout:
    """The rollout before it was scored, drawn with these log-probabilities."""
    rollout = {each.name: getattr(scored, each.name) for each in fields(Rollout)}
    return SampledRollout(**rollout, sampler_logprobs=sampler_logprobs)


@pytest.mark.parametrize(("left", "right"), [(0, 0), (10, 0), (0, 10), (4, 7)])
def test_the_gap_of_the_sampler_is_the_mean_distance_over_all_response_tokens(
    left: int, right: int, scored: Make
) -> None:
    rollout = scored(left=left, right=right)
    # At place t of response i the sampler is off by i + 1 - t, and on padding by 100.
    rows, places = torch.arange(6).unsqueeze(1), torch.arange(rollout.response_mask.shape[1])
    off = torch.where(rollout.response_mask, rows + 1.0 - places, 100.0)
    sampled = sampled_as(rollout, rollout.logprobs + off)
    distances = [abs(row + 1 - place) for row, length in enumerate(LENGTHS) for place in range(length)]
    found = sampler_metrics(sampled, rollout, sum_over_ranks=same)
    assert found["sampler_gap"].item() == pytest.approx(sum(distances) / len(distances))
    # Another rank whose 100 tokens are all off by 2.
    others = torch.tensor([100.0, 200.0, 400.0])
    both = sampler_metrics(sampled, rollout, sum_over_ranks=lambda moments: moments + others)
    assert both["sampler_gap"].item() == pytest.approx((sum(distances) + 200) / (len(distances) + 100))


def test_a_sampler_that_agrees_has_no_gap(scored: Make) -> None:
    rollout = scored(right=3)
    found = sampler_metrics(sampled_as(rollout, rollout.logprobs), rollout, sum_over_ranks=same)
    assert found["sampler_gap"].item() == 0


def test_a_critic_that_knows_the_returns_explains_them_all(scored: Make) -> None:
    experience, _ = worked_out(scored())
    perfect = Experience(**{**vars(experience), "old_values": experience.returns})
    constant = Experience(**{**vars(experience), "old_values": torch.full_like(experience.returns, 5.0)})
    assert critic_metrics(perfect, sum_over_ranks=same)["explained_variance"].item() == pytest.approx(1.0)
    assert critic_metrics(constant, sum_over_ranks=same)["explained_variance"].item() == pytest.approx(0.0, abs=1e-6)
