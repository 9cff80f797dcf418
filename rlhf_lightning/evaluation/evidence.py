"""What the stages bought: the policies' answers to held-out prompts, judged, and the report made of it."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from rlhf_lightning.errors import InputError
from rlhf_lightning.evaluation.policies import Answers, answer, with_responses
from rlhf_lightning.evaluation.win_rate import win_rate
from rlhf_lightning.networks import load_policy, load_tokenizer
from rlhf_lightning.rollout.reward import Reward, load_reward
from rlhf_lightning.types import ComparisonBatch, PromptBatch, RewardFunction
from rlhf_lightning.functional.losses import ranked_pairs

DEMONSTRATION = "response"
"""The column of the prompts that holds what a person answered, where there is one."""

Batches = Callable[[Any], list[PromptBatch]]
"""Held-out prompts in the tokens of a tokenizer."""


def gather(
    policies: Mapping[str, str],
    batches: Batches,
    *,
    reward: Any,
    judge: RewardFunction | None,
    max_new_tokens: int,
    temperature: float,
    seed: int,
) -> dict[str, Any]:
    """Return prompts, demonstrations, and each policy's responses with what reward and judge say of them.

    ``policies`` are Hugging Face folders in the order of the stages; the KL of each is measured to the one named "sft".
    """
    gathered: dict[str, Any] = {"responses": {}, "scores": {}, "judge_scores": {}, "kl": {}}
    for name, folder in policies.items():
        tokenizer = load_tokenizer(folder)
        prompts = batches(tokenizer)
        scorer = load_reward(reward, tokenizer)
        reference = load_policy(policies["sft"]).eval()
        answers = answer(
            load_policy(folder),
            tokenizer,
            prompts,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
            reward=scorer,
            reference=reference,
        )
        gathered["responses"][name] = answers.responses
        gathered["scores"][name] = answers.scores
        gathered["kl"][name] = answers.kl
        _add_prompts(gathered, prompts, scorer, tokenizer)
    if judge is not None:
        _judge(gathered, judge)
    return gathered


@torch.no_grad()
def margins(score: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], batches: Iterable[ComparisonBatch]) -> list[float]:
    """Return score(better) - score(worse) of all ranked pairs."""
    found: list[float] = []
    for batch in batches:
        scores = score(batch.tokens, batch.attention_mask)
        winners, losers = ranked_pairs(batch.prompt_index, batch.ranks)
        found += (scores[winners] - scores[losers]).tolist()
    return found


def _add_prompts(gathered: dict[str, Any], prompts: Sequence[PromptBatch], reward: Reward, tokenizer: Any) -> None:
    """Add the prompts and, once, what people answered and its scores."""
    if "prompts" in gathered:
        return
    gathered["prompts"] = [prompt for batch in prompts for prompt in batch.prompts]
    if all(DEMONSTRATION in batch.columns for batch in prompts):
        gathered["demonstrations"] = [text for batch in prompts for text in batch.columns[DEMONSTRATION]]
        rollouts = [with_responses(batch, batch.columns[DEMONSTRATION], tokenizer) for batch in prompts]
        gathered["scores"]["demonstrations"] = [score for r in rollouts for score in reward(r).tolist()]


def _judge(gathered: dict[str, Any], judge: RewardFunction) -> None:
    responses = dict(gathered["responses"])
    if "demonstrations" in gathered:
        responses["demonstrations"] = gathered["demonstrations"]
    gathered["judge_scores"] = {name: list(judge(gathered["prompts"], texts)) for name, texts in responses.items()}
