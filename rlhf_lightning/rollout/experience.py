"""From a scored rollout to experience, and from experience to the batches of the updates."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rlhf_lightning.functional.advantages import baselined, gae, group_normalized, leave_one_out
from rlhf_lightning.functional.kl import k1
from rlhf_lightning.functional.masking import center_and_scale, masked_moments
from rlhf_lightning.functional.rewards import token_rewards, value_mask
from rlhf_lightning.rollout.shaping import RunningMoments, moments_of
from rlhf_lightning.types import Experience, ScoredRollout

Estimator = Literal["gae", "reinforce", "rloo", "grpo"]
Baseline = Literal["batch", "running"]
Placement = Literal["after_end", "end_token"]


@dataclass(frozen=True, kw_only=True)
class AdvantageSettings:
    """How advantages are estimated."""

    advantage: Estimator
    """"gae" with a critic; "reinforce", "rloo" and "grpo" from the rewards of whole responses, without one."""
    beta: float
    """Price of a nat of KL in the reward; 0 where the penalty is part of the loss."""
    gamma: float
    lam: float
    samples_per_prompt: int
    baseline: Baseline
    """Of "reinforce": the mean of the others of the rollout, or of all rollouts before."""
    score_placement: Placement
    """"after_end": at a step of its own after the last token (Huang et al. 2024); "end_token": at the last token."""
    learn_from_cut_off: bool
    """Whether responses without an end token take part in the loss; others are compared with them in any case."""


def estimate_advantages(
    scored: ScoredRollout,
    scores: Float[Tensor, " B"],
    settings: AdvantageSettings,
    seen: RunningMoments,
    *,
    sum_over_ranks: Callable[[Tensor], Tensor],
) -> Experience:
    """Turn shaped scores and KL into rewards per step, and these into advantages and returns.

    Returns are the advantages before centring and scaling plus the values. ``seen`` are the rewards of the rollouts
    before, and takes in those of this one. ``sum_over_ranks`` adds a tensor up over all processes, so that they share
    one mean and one scale, of the tokens that are learned from.
    """
    mask = scored.response_mask
    states = value_mask(mask, after_end=settings.score_placement == "after_end")
    kl = k1(scored.logprobs, scored.ref_logprobs)
    rewards = token_rewards(scores, kl, mask, states, beta=settings.beta)
    values = scored.values.masked_fill(~states, 0.0)
    learned = (scored.ended | settings.learn_from_cut_off).unsqueeze(1)
    learned_tokens = mask & learned
    if settings.advantage == "gae":
        raw = gae(rewards, values, states, gamma=settings.gamma, lam=settings.lam)
        moments = sum_over_ranks(masked_moments(raw[:, :-1], learned_tokens))
        advantages = center_and_scale(raw[:, :-1], learned_tokens, moments)
        returns = raw + values
    else:
        of_responses = sequence_advantages(rewards.sum(dim=1), settings, seen, sum_over_ranks=sum_over_ranks)
        advantages = of_responses.unsqueeze(1).expand_as(mask).masked_fill(~learned_tokens, 0.0)
        returns = torch.zeros_like(rewards)
    return Experience(
        tokens=scored.tokens,
        attention_mask=scored.attention_mask,
        response_starts=scored.response_starts,
        response_mask=learned_tokens,
        value_mask=states & learned,
        old_logprobs=scored.logprobs,
        ref_logprobs=scored.ref_logprobs,
        old_values=values,
        rewards=rewards,
        advantages=advantages,
        returns=returns,
    )


def sequence_advantages(
    rewards: Float[Tensor, " B"],
    settings: AdvantageSettings,
    seen: RunningMoments,
    *,
    sum_over_ranks: Callable[[Tensor], Tensor],
) -> Float[Tensor, " B"]:
    """Return one advantage per response from its whole reward, the KL penalty included."""
    group_size = settings.samples_per_prompt
    if settings.advantage == "rloo":
        return leave_one_out(rewards, group_size=group_size)
    if settings.advantage == "grpo":
        return group_normalized(rewards, group_size=group_size)
    moments = sum_over_ranks(moments_of(rewards))
    if settings.baseline == "running":
        others = torch.tensor([seen.count, seen.total, seen.squares], dtype=torch.float64, device=rewards.device)
    else:
        own = torch.stack([torch.ones_like(rewards), rewards, rewards.square()]).double()
        others = moments.unsqueeze(1) - own
    seen.add(moments)
    return baselined(rewards, others)


def minibatches(experience: Experience, *, minibatch_size: int, generator: torch.Generator) -> Iterator[Experience]:
    """Yield the rollout in a new random order, ``minibatch_size`` sequences for each optimizer step, every row once."""
    order = torch.randperm(len(experience), generator=generator)
    for rows in order.split(minibatch_size):
        yield experience.rows(rows)


class Sequences(Protocol):
    """Anything with prompts, padded on the left, and behind them responses, padded on the right, in one tensor."""

    @property
    def tokens(self) -> Tensor:
        """(B, T) ids."""

    @property
    def attention_mask(self) -> Tensor:
        """(B, T) bool."""

    @property
    def response_mask(self) -> Tensor:
        """(B, R) bool."""


@dataclass(frozen=True)
class MicroBatch:
    """Some of the sequences, each from its first real token on: rows are padded at their ends alone."""

    rows: Int[Tensor, " M"]
    """Which of the sequences they are."""
    tokens: Int[Tensor, "M T"]
    """Ids; on padding any."""
    attention_mask: Bool[Tensor, "M T"]
    response_starts: Int[Tensor, " M"]
    """Where in its row a response begins."""
    response_mask: Bool[Tensor, "M R"]


def micro_batches(
    sequences: Sequences, *, micro_batch_size: int, micro_batch_tokens: int | None = None
) -> Iterator[MicroBatch]:
    """Yield the sequences in parts of about equal length, as wide as the longest.

    No part has more than ``micro_batch_size`` rows, and none of several rows more than ``micro_batch_tokens`` tokens,
    padding included.
    """
    total = sequences.tokens.shape[1]
    prompt_width = total - sequences.response_mask.shape[1]
    prompts, lengths = sequences.attention_mask[:, :prompt_width].sum(dim=1), sequences.attention_mask.sum(dim=1)
    order = lengths.argsort(stable=True)
    for rows in order.split(_sizes(lengths[order].tolist(), micro_batch_size, micro_batch_tokens)):
        own = lengths[rows].unsqueeze(1)
        place = torch.arange(int(own.max()), device=rows.device)
        columns = place + (prompt_width - prompts[rows]).unsqueeze(1)
        # Not that of the response mask, which may leave a response out.
        longest = int((lengths - prompts)[rows].max())
        yield MicroBatch(
            rows,
            sequences.tokens[rows].gather(1, columns.clamp(max=total - 1)),
            place < own,
            prompts[rows],
            sequences.response_mask[rows, :longest],
        )


def _sizes(lengths: list[int], most_rows: int, most_tokens: int | None) -> list[int]:
    """Return how many of the sequences, whose lengths rise, are in each part."""
    sizes: list[int] = []
    for length in lengths:
        fits = sizes and sizes[-1] < most_rows and (most_tokens is None or (sizes[-1] + 1) * length <= most_tokens)
        if fits:
            sizes[-1] += 1
        else:
            sizes.append(1)
    return sizes


def trimmed_micro_batches(
    experience: Experience, *, micro_batch_size: int, micro_batch_tokens: int | None = None
) -> Iterator[Experience]:
    """Yield the experience in micro-batches as `micro_batches` does, with all that belongs to their tokens."""
    for micro_batch in micro_batches(
        experience, micro_batch_size=micro_batch_size, micro_batch_tokens=micro_batch_tokens
    ):
        part = experience.rows(micro_batch.rows)
        length = micro_batch.response_mask.shape[1]
        yield replace(
            part,
            tokens=micro_batch.tokens,
            attention_mask=micro_batch.attention_mask,
            response_starts=micro_batch.response_starts,
            response_mask=micro_batch.response_mask,
            value_mask=part.value_mask[:, : length + 1],
            old_logprobs=part.old_logprobs[:, :length],
            ref_logprobs=part.ref_logprobs[:, :length],
            old_values=part.old_values[:, : length + 1],
            rewards=part.rewards[:, : length + 1],
            advantages=part.advantages[:, :length],
            returns=part.returns[:, : length + 1],
        )
