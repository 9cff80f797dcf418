"""What policies answer to held-out prompts, and what a reward says of it."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from rlhf_lightning.functional.kl import k1
from rlhf_lightning.functional.masking import masked_sum
from rlhf_lightning.modules import SFTModule
from rlhf_lightning.networks import stop_token_ids
from rlhf_lightning.rollout.experience import micro_batches
from rlhf_lightning.rollout.generate import Sampler, generate
from rlhf_lightning.rollout.reward import Reward
from rlhf_lightning.rollout.score import response_predictions, spread
from rlhf_lightning.types import PromptBatch, Rollout, SFTBatch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Answers:
    """A policy's responses to a list of prompts, in its order."""

    responses: list[str]
    ended: list[bool]
    """Whether the response has an end token."""
    scores: list[float] | None
    """The reward of each, None where there was no reward to ask."""
    kl: float | None
    """Mean over responses of log p / p_ref in nats, None where there was no reference."""


@torch.no_grad()
def answer(
    policy: nn.Module,
    tokenizer: "PreTrainedTokenizerBase",
    batches: Iterable[PromptBatch],
    *,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    reward: Reward | None = None,
    reference: nn.Module | None = None,
    sampler: Sampler = "builtin",
) -> Answers:
    """Sample one response for each prompt; score them with ``reward`` and measure the KL to ``reference`` if given."""
    device = next(policy.parameters()).device
    generator = torch.Generator(device=device).manual_seed(seed)
    policy.eval()
    rollouts = [
        generate(
            policy,
            batch.to(device),
            tokenizer,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            stop_tokens=stop_token_ids(policy, tokenizer),
            generator=generator,
            sampler=sampler,
        )
        for batch in batches
    ]
    scores = None if reward is None else [score for r in rollouts for score in reward(r).tolist()]
    kls = None
    if reference is not None:
        kls = [kl for r in rollouts for kl in sequence_kl(policy, reference, r, temperature=temperature)]
    return Answers(
        responses=[response for r in rollouts for response in r.responses],
        ended=[ended for r in rollouts for ended in r.ended.tolist()],
        scores=scores,
        kl=None if kls is None else sum(kls) / len(kls),
    )


@torch.no_grad()
def perplexity(policy: nn.Module, tokenizer: "PreTrainedTokenizerBase", batches: Iterable[SFTBatch]) -> float:
    """Return the perplexity of responses that somebody else wrote, end tokens included, as fine-tuning validates it."""
    device = next(policy.parameters()).device
    module = SFTModule(policy, tokenizer=tokenizer).eval().to(device)
    for batch in batches:
        logits, targets = module(batch.to(device))
        module.val_perplexity.update(logits.unsqueeze(0), targets.unsqueeze(0))
    return float(module.val_perplexity.compute())


def with_responses(batch: PromptBatch, responses: list[str], tokenizer: "PreTrainedTokenizerBase") -> Rollout:
    """Return the prompts with responses that somebody else wrote, each with its end token."""
    ids = [[*tokenizer(text, add_special_tokens=False).input_ids, tokenizer.eos_token_id] for text in responses]
    width = max(len(row) for row in ids)
    padded = torch.tensor([row + [tokenizer.pad_token_id] * (width - len(row)) for row in ids])
    mask = torch.arange(width) < torch.tensor([len(row) for row in ids]).unsqueeze(1)
    return Rollout(
        **vars(batch),
        tokens=torch.cat([batch.prompt_tokens, padded.to(batch.prompt_tokens)], dim=1),
        attention_mask=torch.cat([batch.prompt_mask, mask.to(batch.prompt_mask)], dim=1),
        response_mask=mask.to(batch.prompt_mask),
        ended=torch.ones(len(responses), dtype=torch.bool, device=batch.prompt_mask.device),
        responses=responses,
    )


@torch.no_grad()
def sequence_kl(policy: nn.Module, reference: nn.Module, rollout: Rollout, *, temperature: float) -> list[float]:
    """Return log p(y|x) - log p_ref(y|x) of each response, both at the sampling temperature, in nats."""
    kl: Any = torch.zeros(len(rollout), device=rollout.tokens.device)
    for part in micro_batches(rollout, micro_batch_size=32):
        sequences = (part.tokens, part.attention_mask, part.response_starts, part.response_mask)
        logprobs, ref_logprobs = (
            spread(response_predictions(network, *sequences).logprobs(temperature=temperature), part.response_mask)
            for network in (policy, reference)
        )
        kl[part.rows] = masked_sum(k1(logprobs, ref_logprobs), part.response_mask)
    return [float(value) for value in kl]
