"""Losses, gradients and advantages of PPO against loops over responses and tokens, in float64."""

import math
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf_lightning.types import PromptBatch, ScoredRollout

BETA, GAMMA, LAM, CLIP, VALUE_CLIP, VALUE_COEF, TEMPERATURE = 0.3, 0.97, 0.9, 0.05, 0.04, 0.7, 0.8
PENALTY, ENTROPY = 0.6, 0.2
GROUP = 3
SEEN = [0.5, -1.0, 2.0]
FIXED: dict[str, Any] = {
    "beta": BETA,
    "gamma": GAMMA,
    "lam": LAM,
    "clip_range": CLIP,
    "value_clip_range": VALUE_CLIP,
    "value_coef": VALUE_COEF,
    "temperature": TEMPERATURE,
    "missing_eos": "subtract",
    "missing_eos_penalty": PENALTY,
    "samples_per_prompt": GROUP,
    "ppo_epochs": 1,
    "seed": 1,
}
ESTIMATORS: list[dict[str, str]] = [
    {"advantage": "gae", "score_placement": "after_end"},
    {"advantage": "gae", "score_placement": "end_token"},
    {"advantage": "reinforce", "baseline": "batch"},
    {"advantage": "reinforce", "baseline": "running"},
    {"advantage": "rloo"},
    {"advantage": "grpo"},
]
Rows = list[list[float]]


def responses(scored: ScoredRollout) -> list[tuple[Tensor, int]]:
    """Each sequence without padding, and the length of its response."""
    lengths = scored.response_mask.sum(dim=1).tolist()
    return [(row[mask], n) for row, mask, n in zip(scored.tokens, scored.attention_mask, lengths, strict=True)]


EPS = 1e-8
"""What `center_and_scale` and `group_normalized` add to a standard deviation."""


def mean(numbers: list[float]) -> float:
    return sum(numbers) / len(numbers)


def deviation(numbers: list[float]) -> float:
    return math.sqrt(mean([(x - mean(numbers)) ** 2 for x in numbers]))


def rewards_by_hand(scored: ScoredRollout, settings: dict[str, str]) -> Rows:
    """The reward of each step of each response."""
    found = []
    for row, (_, length) in enumerate(responses(scored)):
        kl = [(scored.logprobs[row, t] - scored.ref_logprobs[row, t]).item() for t in range(length)]
        price = BETA if settings["kl_penalty"] == "reward" else 0.0
        rewards = [-price * k for k in kl]
        if settings.get("score_placement", "after_end") == "after_end":
            rewards.append(0.0)
        rewards[-1] += scored.scores[row].item() - (0.0 if scored.ended[row] else PENALTY)
        found.append(rewards)
    return found


def gae_by_hand(scored: ScoredRollout, rewards: Rows) -> tuple[Rows, Rows]:
    """Advantages of the tokens, centred and scaled, and returns of the states: sums over all later TD errors."""
    raw: Rows = []
    for row, of_row in enumerate(rewards):
        values = [*scored.values[row, : len(of_row)].tolist(), 0.0]
        errors = [r + GAMMA * values[t + 1] - values[t] for t, r in enumerate(of_row)]
        raw.append([sum((GAMMA * LAM) ** k * e for k, e in enumerate(errors[t:])) for t in range(len(errors))])
    returns = [[a + scored.values[row, t].item() for t, a in enumerate(of_row)] for row, of_row in enumerate(raw)]
    lengths = [length for _, length in responses(scored)]
    flat = [a for of_row, n in zip(raw, lengths, strict=True) for a in of_row[:n]]
    centre, scale = mean(flat), deviation(flat) + EPS
    return [[(a - centre) / scale for a in of_row[:n]] for of_row, n in zip(raw, lengths, strict=True)], returns


def whole_by_hand(rewards: Rows, settings: dict[str, str]) -> list[float]:
    """One advantage a response."""
    totals, found = [sum(of_row) for of_row in rewards], []
    for row, total in enumerate(totals):
        first = row // GROUP * GROUP
        group = totals[first : first + GROUP]
        if settings["advantage"] == "rloo":
            found.append(total - (sum(group) - total) / (GROUP - 1))
        elif settings["advantage"] == "grpo":
            found.append((total - mean(group)) / (deviation(group) + EPS))
        elif settings["baseline"] == "running":
            found.append(total - mean(SEEN))
        else:
            found.append(total - (sum(totals) - total) / (len(totals) - 1))
    return found


def one_if(holds: bool) -> Tensor:
    return torch.tensor(float(holds), dtype=torch.float64)


def loss_by_hand(module: Any, scored: ScoredRollout, settings: dict[str, str]) -> tuple[Tensor, dict[str, float]]:
    """What is minimised, response by response and token by token; and the means of its terms."""
    rewards = rewards_by_hand(scored, settings)
    if settings["advantage"] == "gae":
        advantages, returns = gae_by_hand(scored, rewards)
    else:
        of_responses = whole_by_hand(rewards, settings)
        advantages = [[a] * n for a, (_, n) in zip(of_responses, responses(scored), strict=True)]
        returns = []
    names = ["policy_loss", "entropy", "kl_loss", "value_loss", "ratio", "approx_kl", "clip_fraction"]
    terms: dict[str, list[Tensor]] = {name: [] for name in [*names, "value_clip_fraction"]}
    for row, (tokens, length) in enumerate(responses(scored)):
        logits = module.policy(tokens.unsqueeze(0)).logits[0]
        logprobs = (logits[-length - 1 : -1] / TEMPERATURE).log_softmax(-1)
        chosen = [logprobs[t, tokens[len(tokens) - length + t]] for t in range(length)]
        to_reference = [chosen[t] - scored.ref_logprobs[row, t] for t in range(length)]
        for t in range(length):
            advantage = advantages[row][t]
            ratio = (chosen[t] - scored.logprobs[row, t]).exp()
            clipped = min(max(ratio.item(), 1 - CLIP), 1 + CLIP)
            if settings["advantage"] == "reinforce":
                terms["policy_loss"].append(-advantage * chosen[t])
            elif ratio.item() * advantage <= clipped * advantage:
                terms["policy_loss"].append(-ratio * advantage)
            else:
                terms["policy_loss"].append(torch.tensor(-clipped * advantage, dtype=torch.float64))
            terms["ratio"].append(ratio.detach())
            terms["approx_kl"].append((chosen[t].detach() - scored.logprobs[row, t]) ** 2 / 2)
            terms["clip_fraction"].append(one_if(ratio.item() < 1 - CLIP or ratio.item() > 1 + CLIP))
            terms["entropy"].append(-(logprobs[t].exp() * logprobs[t]).sum())
            if settings["kl_penalty"] == "loss_k2":
                terms["kl_loss"].append(to_reference[t] ** 2 / 2)
            elif settings["kl_penalty"] == "loss_k1":
                terms["kl_loss"].append(sum(k.item() for k in to_reference[t:]) * chosen[t])
        if settings["advantage"] == "gae":
            values = module.critic(tokens.unsqueeze(0), torch.ones(1, len(tokens), dtype=torch.bool))[0, -length - 1 :]
            for t, target in enumerate(returns[row]):
                old = scored.values[row, t].item()
                error = (values[t] - target) ** 2
                terms["value_clip_fraction"].append(one_if(abs(values[t].item() - old) > VALUE_CLIP))
                near = min(max(values[t].item(), old - VALUE_CLIP), old + VALUE_CLIP)
                constant = torch.tensor((near - target) ** 2, dtype=torch.float64)
                terms["value_loss"].append((error if error.item() >= constant.item() else constant) / 2)
    sums = {name: sum(found) for name, found in terms.items() if found}
    count = len(scored) if settings["loss_mean"] == "sequences" else len(terms["ratio"])
    policy = sums["policy_loss"] - ENTROPY * sums["entropy"] + BETA * sums.get("kl_loss", 0.0)
    loss = policy / count
    if "value_loss" in sums:
        loss = loss + VALUE_COEF * sums["value_loss"] / len(terms["value_loss"])
    return loss, {name: (sums[name] / len(terms[name])).item() for name in sums}


def assert_agree(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(
    ("estimator", "kl_penalty", "loss_mean"),
    list(product(ESTIMATORS, ["reward", "loss_k1", "loss_k2"], ["tokens", "sequences"])),
    ids=lambda x: "-".join(x.values()) if isinstance(x, dict) else x,
)
def test_loss_gradient_and_advantages_are_those_of_a_loop_over_the_tokens(
    estimator: dict[str, str], kl_penalty: str, loss_mean: str, bench: Callable[..., Any], prompts: PromptBatch
) -> None:
    settings = {**estimator, "kl_penalty": kl_penalty, "loss_mean": loss_mean}
    work = bench(**FIXED, **settings, entropy_coef=ENTROPY)
    scored = work.score(work.rollout(prompts.rows(torch.tensor([0, 3]))))
    found = work.work(scored, SEEN)
    work.module.load_state_dict(work.updated)
    work.module.zero_grad()
    loss, terms = loss_by_hand(work.module, scored, settings)
    loss.backward()
    expected = work.gradients()
    assert found.gradients.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient.dtype == torch.float64
        assert_agree(found.gradients[name], gradient)
    assert {name: found.metrics[name] for name in terms} == pytest.approx(terms, rel=1e-6)
    # Otherwise the cases would not reach what they are about.
    assert len({length for _, length in responses(scored)}) > 2
    assert 0 < found.metrics["clip_fraction"] < 1
    assert 0 < found.metrics["missing_eos"] < 1
    assert 0 < found.metrics.get("value_clip_fraction", 0.5) < 1


def test_a_module_in_float64_works_in_float64_from_the_rollout_to_the_gradient(
    bench: Callable[..., Any], prompts: PromptBatch
) -> None:
    work = bench(entropy_coef=0.1, kl_penalty="loss_k1")
    scored = work.score(work.rollout(prompts))
    assert {x.dtype for x in (scored.logprobs, scored.ref_logprobs, scored.values)} == {torch.float64}
    experience = work.work(scored).experience
    assert {x.dtype for x in (experience.rewards, experience.advantages, experience.returns)} == {torch.float64}
    assert {x.dtype for x in work.module.losses(experience).values()} == {torch.float64}
