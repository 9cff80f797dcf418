"""What the stages bought: the policies' answers to held-out prompts, judged, and the reward model's on comparisons."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from rlhf_lightning.evaluation.policies import answer, with_responses
from rlhf_lightning.evaluation.reward_card import RewardCard, reward_card
from rlhf_lightning.functional.losses import ranked_pairs
from rlhf_lightning.modules import RewardModule
from rlhf_lightning.networks import NetworkConfig, load_policy, load_reward_model, load_tokenizer, max_positions
from rlhf_lightning.rollout.generate import Sampler
from rlhf_lightning.rollout.reward import Reward, load_reward
from rlhf_lightning.types import ComparisonBatch, PromptBatch, RewardFunction

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DEMONSTRATION = "response"
"""The column of the held-out prompts that holds what a person answered, where there is one."""

Prompts = Callable[["PreTrainedTokenizerBase", int | None], Sequence[PromptBatch]]
"""Held-out prompts in a tokenizer's ids, none longer than so many tokens."""

Follow = Callable[[Sequence[PromptBatch], str], Iterable[PromptBatch]]
"""Returns the batches, and shows on the way how many the policy of this name has answered."""


def gather_answers(
    policies: Mapping[str, str | NetworkConfig],
    prompts: Prompts,
    *,
    reward: Any,
    judge: RewardFunction | None,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    reference: str = "sft",
    device: torch.device | str = "cpu",
    sampler: Sampler = "builtin",
    follow: Follow = lambda batches, _: batches,
) -> dict[str, Any]:
    """Return prompts, demonstrations, and each policy's responses with the scores of reward and judge.

    ``policies`` are networks by name; the KL of each is measured to the one named ``reference``. Demonstrations count
    only where every prompt has one.
    """
    found: dict[str, Any] = {"reference": reference, "responses": {}, "scores": {}, "kl": {}}
    reference_policy: Any = load_policy(policies[reference])
    reference_policy = reference_policy.eval().to(device)
    for name, network in policies.items():
        policy: Any = load_policy(network)
        tokenizer = load_tokenizer(network)
        batches = [batch.to(device) for batch in prompts(tokenizer, _room(policy, max_new_tokens))]
        scorer = load_reward(reward, tokenizer).to(device)
        answers = answer(
            policy.to(device),
            tokenizer,
            follow(batches, name),
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
            reward=scorer,
            reference=reference_policy,
            sampler=sampler,
        )
        found["responses"][name] = answers.responses
        found["scores"][name] = answers.scores
        found["kl"][name] = answers.kl
        found |= _questions(batches)
        if _all_demonstrated(batches):
            found["responses"]["demonstrations"] = _demonstrations(batches)
            found["scores"]["demonstrations"] = _demonstration_scores(batches, scorer, tokenizer)
        found["scored_by"] = scorer.kind
    if judge is not None:
        found["judge_scores"] = {
            name: list(judge(found["prompts"], texts)) for name, texts in found["responses"].items()
        }
    return found


def load_reward_module(model: str | Path | NetworkConfig) -> RewardModule:
    """Return a trained reward model as the module that scores sequences; raises `InputError` where it is none."""
    module = RewardModule(load_reward_model(model, trained=True), tokenizer=load_tokenizer(model))
    module.eval()
    return module


@torch.no_grad()
def measure_reward(score: RewardModule, batches: Iterable[ComparisonBatch]) -> RewardCard:
    """Return the card of a reward model on held-out comparisons; lengths are tokens of the response."""
    margins: list[float] = []
    differences: list[float] = []
    all_scores: list[float] = []
    best_scores: list[float] = []
    lengths: list[float] = []
    for batch in batches:
        batch = batch.to(score.device)
        scores = score(batch.tokens, batch.attention_mask)
        length = batch.response_mask.sum(dim=1)
        winners, losers = ranked_pairs(batch.prompt_index, batch.ranks)
        margins += (scores[winners] - scores[losers]).tolist()
        differences += (length[winners] - length[losers]).tolist()
        all_scores += scores.tolist()
        best_scores += scores[batch.ranks == 0].tolist()
        lengths += length.tolist()
    return reward_card(
        margins, scores=all_scores, lengths=lengths, length_differences=differences, best_scores=best_scores
    )


def _room(policy: nn.Module, max_new_tokens: int) -> int | None:
    """Return how many tokens a prompt may have; None where positions have no end."""
    positions = max_positions(policy)
    return None if positions is None else positions - max_new_tokens


def _questions(batches: Sequence[PromptBatch]) -> dict[str, list[Any]]:
    return {"prompts": [prompt for batch in batches for prompt in batch.prompts]}


def _all_demonstrated(batches: Sequence[PromptBatch]) -> bool:
    found = [text for batch in batches for text in batch.columns.get(DEMONSTRATION, [None])]
    return all(isinstance(text, str) and text.strip() for text in found)


def _demonstrations(batches: Sequence[PromptBatch]) -> list[str]:
    return [text for batch in batches for text in batch.columns[DEMONSTRATION]]


def _demonstration_scores(
    batches: Sequence[PromptBatch], reward: Reward, tokenizer: "PreTrainedTokenizerBase"
) -> list[float]:
    rollouts = [with_responses(batch, batch.columns[DEMONSTRATION], tokenizer) for batch in batches]
    return [score for rollout in rollouts for score in reward(rollout).tolist()]
