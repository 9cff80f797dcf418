"""From a scored rollout to experience, and from experience to the batches of the updates."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Protocol

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from rlhf_lightning.functional.advantages import gae
from rlhf_lightning.functional.kl import k1
from rlhf_lightning.functional.masking import center_and_scale, masked_moments
from rlhf_lightning.functional.rewards import subtract_missing_eos, token_rewards
from rlhf_lightning.types import Experience, ScoredRollout


def estimate_advantages(
    scored: ScoredRollout,
    *,
    beta: float,
    gamma: float,
    lam: float,
    missing_eos_penalty: float,
    sum_over_ranks: Callable[[Tensor], Tensor],
) -> Experience:
    """Turn scores and KL into rewards per token, and these into advantages and returns.

    Returns are the advantages before centring and scaling plus the values. ``sum_over_ranks`` adds a tensor up over
    all processes, so that the advantages share one mean and one scale.
    """
    mask = scored.response_mask
    scores = subtract_missing_eos(scored.scores, scored.ended, penalty=missing_eos_penalty)
    rewards = token_rewards(scores, k1(scored.logprobs, scored.ref_logprobs), mask, beta=beta)
    advantages = gae(rewards, scored.values, mask, gamma=gamma, lam=lam)
    moments = sum_over_ranks(masked_moments(advantages, mask))
    return Experience(
        tokens=scored.tokens,
        attention_mask=scored.attention_mask,
        response_mask=mask,
        old_logprobs=scored.logprobs,
        old_values=scored.values,
        rewards=rewards,
        advantages=center_and_scale(advantages, mask, moments),
        returns=(advantages + scored.values).masked_fill(~mask, 0.0),
    )


def minibatches(experience: Experience, *, minibatch_size: int, generator: torch.Generator) -> Iterator[Experience]:
    """Yield the rollout in a new random order, ``minibatch_size`` sequences for each optimizer step, every row once."""
    order = torch.randperm(len(experience), generator=generator)
    for rows in order.split(minibatch_size):
        yield experience.rows(rows)


class Sequences(Protocol):
    """Anything with prompts and responses in one tensor."""

    @property
    def tokens(self) -> Tensor:
        """(B, T) ids."""

    @property
    def attention_mask(self) -> Tensor:
        """(B, T) bool."""

    @property
    def response_mask(self) -> Tensor:
        """(B, R) bool."""


def micro_batches(
    sequences: Sequences, *, micro_batch_size: int
) -> Iterator[tuple[Int[Tensor, " M"], Int[Tensor, "M T"], Bool[Tensor, "M T"], Bool[Tensor, "M R"]]]:
    """Yield rows, tokens, attention and response mask of sequences of about equal length, shared padding cut off."""
    prompt_width = sequences.tokens.shape[1] - sequences.response_mask.shape[1]
    by_length = sequences.attention_mask.sum(dim=1).argsort(stable=True)
    for rows in by_length.split(micro_batch_size):
        attention_mask, response_mask = sequences.attention_mask[rows], sequences.response_mask[rows]
        left = int(attention_mask.any(dim=0).nonzero()[0])
        length = int(response_mask.sum(dim=1).max())
        columns = slice(left, prompt_width + length)
        yield rows, sequences.tokens[rows, columns], attention_mask[:, columns], response_mask[:, :length]


def trimmed_micro_batches(experience: Experience, *, micro_batch_size: int) -> Iterator[Experience]:
    """Yield the experience in micro-batches as `micro_batches` does, with all that belongs to their tokens."""
    for rows, tokens, attention_mask, response_mask in micro_batches(experience, micro_batch_size=micro_batch_size):
        part = experience.rows(rows)
        length = response_mask.shape[1]
        yield replace(
            part,
            tokens=tokens,
            attention_mask=attention_mask,
            response_mask=response_mask,
            old_logprobs=part.old_logprobs[:, :length],
            old_values=part.old_values[:, :length],
            rewards=part.rewards[:, :length],
            advantages=part.advantages[:, :length],
            returns=part.returns[:, :length],
        )
