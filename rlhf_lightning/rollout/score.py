"""From a rollout to a scored one: log-probabilities, values and scores, all without gradient."""

from collections.abc import Sequence
from dataclasses import fields

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from rlhf_lightning.functional.masking import position_ids
from rlhf_lightning.functional.rewards import value_mask
from rlhf_lightning.networks.predictions import Predictions, predictions
from rlhf_lightning.rollout.experience import MicroBatch, micro_batches
from rlhf_lightning.rollout.reward import Reward
from rlhf_lightning.types import Rollout, ScoredRollout


def response_predictions(
    policy: nn.Module,
    tokens: Int[Tensor, "B T"],
    attention_mask: Bool[Tensor, "B T"],
    response_starts: Int[Tensor, " B"],
    response_mask: Bool[Tensor, "B R"],
) -> Predictions:
    """Return what predicts the response tokens that count, row by row; `spread` puts what is found to its place."""
    place = torch.arange(tokens.shape[1], device=tokens.device) - response_starts.unsqueeze(1)
    longest = response_mask.shape[1]
    counted = response_mask.gather(1, place.clamp(0, longest - 1)) & (place >= 0) & (place < longest)
    return predictions(
        policy,
        tokens,
        attention_mask,
        counted,
        position_ids=position_ids(attention_mask),
        longest=tokens.shape[1] - int(response_starts.min()),
        # A critic on the same trunk reads the states behind the tokens, too.
        read=place >= -1,
    )


def spread(found: Float[Tensor, " N"], response_mask: Bool[Tensor, "B R"]) -> Float[Tensor, "B R"]:
    """Return one number for each true place of the mask, row by row, at these places, and 0 at all others."""
    return found.new_zeros(response_mask.shape).masked_scatter(response_mask, found)


def response_values(
    critic: nn.Module,
    tokens: Int[Tensor, "B T"],
    attention_mask: Bool[Tensor, "B T"],
    response_starts: Int[Tensor, " B"],
    *,
    length: int,
) -> Float[Tensor, "B R+1"]:
    """Return the values of the states before each of ``length`` tokens of the responses, and after the last.

    The value of the state before the token at t is read at t - 1. Behind the end of a row that of its last column is
    repeated.
    """
    states = torch.arange(length + 1, device=tokens.device) + response_starts.unsqueeze(1) - 1
    states = states.clamp(max=tokens.shape[1] - 1)
    values: Tensor = critic(tokens, attention_mask, torch.zeros_like(attention_mask).scatter(1, states, True))
    return values.gather(1, states)


@torch.no_grad()
def score_rollout(
    rollout: Rollout,
    *,
    policy: nn.Module,
    reference: nn.Module,
    critic: nn.Module | None,
    reward: Reward,
    temperature: float,
    micro_batch_size: int,
    micro_batch_tokens: int | None = None,
    logprobs: Float[Tensor, "B R"] | None = None,
    values: Float[Tensor, "B R+1"] | None = None,
) -> ScoredRollout:
    """Add what policy, reference, critic and reward say of the rollout; without a critic all values are 0.

    The policy is not read where its ``logprobs`` are known already, nor the critic where the ``values`` are. The
    reference is read at the same temperature as the policy, so that their KL is 0 while they are equal.
    Log-probabilities are 0 outside of the response mask, values outside of the states before and after its tokens.
    """
    sequences, longest = rollout.response_mask.shape
    device = rollout.tokens.device
    dtype = torch.promote_types(next(policy.parameters()).dtype, torch.float32)
    networks = [reference] if logprobs is not None else [policy, reference]
    of_networks = [torch.zeros(sequences, longest, dtype=dtype, device=device) for _ in networks]
    of_states = value_mask(rollout.response_mask, after_end=True)
    known, critic = values, critic if values is None else None
    values = torch.zeros(of_states.shape, dtype=dtype, device=device) if known is None else known.where(of_states, 0.0)
    for part in micro_batches(rollout, micro_batch_size=micro_batch_size, micro_batch_tokens=micro_batch_tokens):
        length = part.response_mask.shape[1]
        found = score_rows(part, networks=networks, critic=critic, temperature=temperature)
        for of_network, of_rows in zip(of_networks, found, strict=False):
            of_network[part.rows, :length] = of_rows
        if critic is not None:
            values[part.rows, : length + 1] = found[-1]
    scores = reward.scores(rollout)
    return ScoredRollout(
        **{each.name: getattr(rollout, each.name) for each in fields(Rollout)},
        logprobs=of_networks[0] if logprobs is None else logprobs,
        ref_logprobs=of_networks[-1],
        values=values,
        scores=scores.total,
        score_parts=scores.parts,
    )


def score_rows(
    part: MicroBatch, *, networks: Sequence[nn.Module], critic: nn.Module | None, temperature: float
) -> list[Tensor]:
    """Return log-probabilities by each of the networks (B, R), and the critic's values (B, R + 1) where there is one.

    They are 0 where nothing counts. One network's logits are held at a time.
    """
    mask, starts = part.response_mask, part.response_starts
    found = [
        spread(
            response_predictions(network, part.tokens, part.attention_mask, starts, mask).logprobs(
                temperature=temperature
            ),
            mask,
        )
        for network in networks
    ]
    if critic is not None:
        values = response_values(critic, part.tokens, part.attention_mask, starts, length=mask.shape[1])
        found.append(values.masked_fill(~value_mask(mask, after_end=True), 0.0))
    return found
