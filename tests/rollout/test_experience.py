from collections.abc import Callable
from typing import Any

import pytest
import torch

from rlhf_lightning.functional.rewards import value_mask
from rlhf_lightning.rollout.experience import (
    AdvantageSettings,
    estimate_advantages,
    micro_batches,
    minibatches,
    trimmed_micro_batches,
)
from rlhf_lightning.rollout.shaping import RunningMoments
from rlhf_lightning.types import Experience, Rollout, ScoredRollout

PROMPTS = [[5, 9, 7, 30, 2], [8, 4], [40, 41, 42], [50], [60, 61]]
RESPONSES = [[11, 1], [12, 13, 14, 15, 16, 17], [20, 21, 22, 1], [30, 31, 32], [1]]
LENGTHS = [2, 6, 4, 3, 1]
SETTINGS: dict[str, Any] = {
    "advantage": "gae",
    "beta": 0.1,
    "gamma": 0.97,
    "lam": 0.9,
    "samples_per_prompt": 1,
    "baseline": "batch",
    "score_placement": "after_end",
    "learn_from_cut_off": True,
}


@pytest.fixture
def scored(rollout: Callable[..., Rollout]) -> ScoredRollout:
    made = rollout(PROMPTS, RESPONSES)
    generator = torch.Generator().manual_seed(0)
    logprobs, ref_logprobs = (torch.randn(5, 6, generator=generator) * made.response_mask for _ in range(2))
    values = torch.randn(5, 7, generator=generator) * value_mask(made.response_mask, after_end=True)
    return ScoredRollout(
        **vars(made),
        logprobs=logprobs,
        ref_logprobs=ref_logprobs,
        values=values,
        scores=torch.randn(5, generator=generator),
    )


def experience_of(
    scored: ScoredRollout,
    ranks: Callable[[Any], Any] = lambda x: x,
    seen: RunningMoments | None = None,
    **settings: Any,
) -> Experience:
    chosen = AdvantageSettings(**{**SETTINGS, **settings})
    return estimate_advantages(scored, scored.scores, chosen, seen or RunningMoments(), sum_over_ranks=ranks)


def by_hand(scored: ScoredRollout, placement: str) -> tuple[list[list[float]], list[list[float]]]:
    """Rewards, and advantages before they are centred and scaled, with loops."""
    all_rewards, all_advantages = [], []
    for row, length in enumerate(LENGTHS):
        kl = (scored.logprobs - scored.ref_logprobs)[row, :length].tolist()
        rewards = [-SETTINGS["beta"] * k for k in kl]
        if placement == "after_end":
            rewards.append(scored.scores[row].item())
        else:
            rewards[-1] += scored.scores[row].item()
        steps = len(rewards)
        values = [*scored.values[row, :steps].tolist(), 0.0]
        advantages, advantage = [], 0.0
        for t in reversed(range(steps)):
            delta = rewards[t] + SETTINGS["gamma"] * values[t + 1] - values[t]
            advantage = delta + SETTINGS["gamma"] * SETTINGS["lam"] * advantage
            advantages.insert(0, advantage)
        all_rewards.append(rewards)
        all_advantages.append(advantages)
    return all_rewards, all_advantages


@pytest.mark.parametrize("placement", ["after_end", "end_token"])
def test_experience_is_what_loops_over_the_tokens_find(scored: ScoredRollout, placement: str) -> None:
    found = experience_of(scored, score_placement=placement)
    rewards, advantages = by_hand(scored, placement)
    of_tokens = [row[:length] for row, length in zip(advantages, LENGTHS, strict=True)]
    flat = torch.tensor([a for row in of_tokens for a in row])
    for row, length in enumerate(LENGTHS):
        raw, steps = torch.tensor(advantages[row]), len(rewards[row])
        assert found.value_mask[row].sum() == steps
        torch.testing.assert_close(found.rewards[row, :steps], torch.tensor(rewards[row]))
        torch.testing.assert_close(found.returns[row, :steps], raw + scored.values[row, :steps])
        torch.testing.assert_close(
            found.advantages[row, :length], (raw[:length] - flat.mean()) / flat.std(correction=0)
        )


@pytest.mark.parametrize("placement", ["after_end", "end_token"])
def test_everything_outside_of_the_masks_is_0(scored: ScoredRollout, placement: str) -> None:
    found = experience_of(scored, score_placement=placement)
    for x in (found.advantages, found.old_logprobs, found.ref_logprobs):
        assert (x[~found.response_mask] == 0).all()
    for x in (found.rewards, found.returns, found.old_values):
        assert (x[~found.value_mask] == 0).all()


def test_advantages_share_one_mean_and_scale_over_all_ranks(scored: ScoredRollout) -> None:
    whole = experience_of(scored)
    parts = [scored.rows(torch.tensor(rows)) for rows in ([0, 1], [2, 3, 4])]
    seen: list[torch.Tensor] = []
    for part in parts:
        experience_of(part, lambda x: seen.append(x) or x)
    total = seen[0] + seen[1]
    found = torch.cat([experience_of(part, lambda x: total).advantages for part in parts])
    torch.testing.assert_close(found, whole.advantages)
    alone = torch.cat([experience_of(part).advantages for part in parts])
    assert not torch.allclose(alone, whole.advantages, atol=1e-2)


@pytest.mark.parametrize("setting", [{"beta": 0.5}, {"gamma": 0.5}, {"lam": 0.5}, {"score_placement": "end_token"}])
def test_every_setting_changes_the_advantages(scored: ScoredRollout, setting: dict[str, Any]) -> None:
    assert not torch.allclose(experience_of(scored, **setting).advantages, experience_of(scored).advantages)


@pytest.mark.parametrize("placement", ["after_end", "end_token"])
def test_what_was_cut_off_can_be_left_out_of_both_masks_and_of_mean_and_scale(
    scored: ScoredRollout, placement: str
) -> None:
    settings = {"score_placement": placement}
    whole, found = (experience_of(scored, **settings, learn_from_cut_off=learn) for learn in (True, False))
    ended = [0, 2, 4]
    assert found.response_mask.sum(dim=1).tolist() == [2, 0, 4, 0, 1]
    assert found.value_mask.any(dim=1).tolist() == [True, False, True, False, True]
    assert torch.equal(found.value_mask[ended], whole.value_mask[ended])
    for name in ("rewards", "returns", "old_values"):
        assert torch.equal(getattr(found, name), getattr(whole, name))
    _, advantages = by_hand(scored, placement)
    flat = torch.tensor([a for row in ended for a in advantages[row][: LENGTHS[row]]])
    expected = (flat - flat.mean()) / flat.std(correction=0)
    torch.testing.assert_close(found.advantages[found.response_mask], expected)
    assert (found.advantages[~found.response_mask] == 0).all()


def test_what_is_left_out_of_the_loss_is_still_compared_with(scored: ScoredRollout) -> None:
    whole, found = (experience_of(scored, advantage="reinforce", learn_from_cut_off=x) for x in (True, False))
    ended = [0, 2, 4]
    assert torch.equal(found.advantages[ended], whole.advantages[ended])
    assert (found.advantages[[1, 3]] == 0).all()


@pytest.mark.parametrize("size", [1, 2, 5])
def test_micro_batches_hold_the_whole_of_what_is_left_out_of_the_loss(scored: ScoredRollout, size: int) -> None:
    found = experience_of(scored, learn_from_cut_off=False)
    lengths = []
    for part in trimmed_micro_batches(found, micro_batch_size=size):
        assert part.response_mask.shape[1] >= 1
        assert part.value_mask.shape[1] == part.response_mask.shape[1] + 1
        lengths += (part.attention_mask.sum(dim=1) - part.response_starts).tolist()
    assert sorted(lengths) == sorted(LENGTHS)


def test_a_rollout_of_a_single_token_has_advantage_0(scored: ScoredRollout) -> None:
    found = experience_of(scored.rows(torch.tensor([4])))
    assert (found.advantages == 0).all()
    assert torch.isfinite(found.returns).all()


def test_minibatches_use_every_row_once_in_a_new_order(scored: ScoredRollout) -> None:
    experience = experience_of(scored)
    first_tokens = experience.tokens[:, 4].tolist()
    generator = torch.Generator().manual_seed(0)
    orders = []
    for _ in range(4):
        parts = list(minibatches(experience, minibatch_size=2, generator=generator))
        assert [len(part) for part in parts] == [2, 2, 1]
        orders.append(torch.cat([part.tokens[:, 4] for part in parts]).tolist())
        assert sorted(orders[-1]) == sorted(first_tokens)
    assert len({tuple(order) for order in orders}) > 1


def test_a_minibatch_keeps_together_what_belongs_to_a_row(scored: ScoredRollout) -> None:
    experience = experience_of(scored)
    for part in minibatches(experience, minibatch_size=2, generator=torch.Generator().manual_seed(0)):
        for i in range(len(part)):
            row = next(j for j in range(5) if torch.equal(experience.tokens[j], part.tokens[i]))
            for name, value in vars(part).items():
                assert torch.equal(value[i], getattr(experience, name)[row]), name


@pytest.mark.parametrize("size", [1, 2, 3, 5, 9])
@pytest.mark.parametrize(("left", "right"), [(0, 0), (3, 2)])
def test_micro_batches_yield_every_row_once_and_cut_only_padding(
    size: int, left: int, right: int, rollout: Callable[..., Rollout]
) -> None:
    sequences = rollout(PROMPTS, RESPONSES, left=left, right=right)
    seen = []
    for part in micro_batches(sequences, micro_batch_size=size):
        assert len(part.rows) <= size
        # Nothing can be cut any more.
        assert part.attention_mask[:, 0].all()
        assert part.attention_mask[:, -1].any()
        assert part.response_mask[:, -1].any()
        for i, row in enumerate(part.rows.tolist()):
            seen.append(row)
            assert part.tokens[i][part.attention_mask[i]].tolist() == PROMPTS[row] + RESPONSES[row]
            assert part.response_starts[i] == len(PROMPTS[row])
            assert part.response_mask[i].sum() == len(RESPONSES[row])
    assert sorted(seen) == [0, 1, 2, 3, 4]


def test_micro_batches_hold_sequences_of_about_equal_length(rollout: Callable[..., Rollout]) -> None:
    found = [
        part.attention_mask.sum(dim=1).tolist()
        for part in micro_batches(rollout(PROMPTS, RESPONSES), micro_batch_size=2)
    ]
    expected = sorted(len(p) + len(r) for p, r in zip(PROMPTS, RESPONSES, strict=True))
    assert [length for part in found for length in part] == expected


@pytest.mark.parametrize("size", [1, 3, 9])
@pytest.mark.parametrize("tokens", [1, 8, 13, 1000])
def test_micro_batches_of_several_rows_have_no_more_tokens_than_asked_for_and_as_many_as_fit(
    size: int, tokens: int, rollout: Callable[..., Rollout]
) -> None:
    sequences = rollout(PROMPTS, RESPONSES, left=3, right=2)
    parts = list(micro_batches(sequences, micro_batch_size=size, micro_batch_tokens=tokens))
    shapes = [tuple(part.tokens.shape) for part in parts]
    assert sum(rows for rows, _ in shapes) == 5
    assert all(rows == 1 or (rows <= size and rows * width <= tokens) for rows, width in shapes)
    for (rows, _), after in zip(shapes, parts[1:], strict=False):
        shortest = int(after.attention_mask.sum(dim=1).min())
        assert rows == size or (rows + 1) * shortest > tokens


@pytest.mark.parametrize("size", [1, 2, 5])
def test_trimming_experience_loses_nothing_inside_of_the_mask(scored: ScoredRollout, size: int) -> None:
    experience = experience_of(scored)
    of_tokens, of_states = ["old_logprobs", "ref_logprobs", "advantages"], ["old_values", "rewards", "returns"]
    for names, mask in ((of_tokens, "response_mask"), (of_states, "value_mask")):
        for name in names:
            parts = trimmed_micro_batches(experience, micro_batch_size=size)
            kept = [getattr(part, name)[getattr(part, mask)] for part in parts]
            expected = getattr(experience, name)[getattr(experience, mask)]
            assert torch.cat(kept).sort().values.tolist() == expected.sort().values.tolist(), name
        for part in trimmed_micro_batches(experience, micro_batch_size=size):
            assert {getattr(part, name).shape for name in names} == {getattr(part, mask).shape}


def sequence(scored: ScoredRollout, seen: RunningMoments | None = None, **settings: Any) -> torch.Tensor:
    """The advantage of each response, which all of its tokens share."""
    found = experience_of(scored, seen=seen, **settings)
    firsts = found.advantages[:, 0]
    assert torch.equal(found.advantages, firsts.unsqueeze(1) * found.response_mask)
    assert (found.returns == 0).all()
    return firsts


def whole_rewards(scored: ScoredRollout) -> list[float]:
    kl = (scored.logprobs - scored.ref_logprobs).sum(dim=1)
    return (scored.scores - SETTINGS["beta"] * kl).tolist()


def test_reinforce_compares_a_response_with_the_mean_of_the_others_of_the_rollout(scored: ScoredRollout) -> None:
    rewards = whole_rewards(scored)
    expected = [r - (sum(rewards) - r) / 4 for r in rewards]
    assert sequence(scored, advantage="reinforce").tolist() == pytest.approx(expected, abs=1e-5)


def test_the_running_baseline_is_the_mean_of_the_rollouts_before(scored: ScoredRollout) -> None:
    rewards, seen = whole_rewards(scored), RunningMoments()
    first = sequence(scored, seen, advantage="reinforce", baseline="running")
    assert first.tolist() == pytest.approx(rewards, abs=1e-5)
    second = sequence(scored, seen, advantage="reinforce", baseline="running")
    mean = sum(rewards) / 5
    assert second.tolist() == pytest.approx([r - mean for r in rewards], abs=1e-5)
    assert seen.count == 10


def test_rloo_and_grpo_compare_the_samples_of_one_prompt(scored: ScoredRollout) -> None:
    four = scored.rows(torch.arange(4))
    one, two, three, four_ = whole_rewards(four)
    rloo = sequence(four, advantage="rloo", samples_per_prompt=2)
    assert rloo.tolist() == pytest.approx([one - two, two - one, three - four_, four_ - three], abs=1e-5)
    grpo = sequence(four, advantage="grpo", samples_per_prompt=2)
    signs = [1.0 if a > b else -1.0 for a, b in ((one, two), (two, one), (three, four_), (four_, three))]
    assert grpo.tolist() == pytest.approx(signs, abs=1e-4)
