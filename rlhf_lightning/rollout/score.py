"""From a rollout to a scored one: log-probabilities, values and scores, all without gradient."""

from dataclasses import fields
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from rlhf_lightning.functional.logprobs import gather_logprobs
from rlhf_lightning.functional.masking import position_ids
from rlhf_lightning.functional.rewards import value_mask
from rlhf_lightning.rollout.experience import micro_batches
from rlhf_lightning.rollout.reward import Reward
from rlhf_lightning.types import Rollout, ScoredRollout


def response_logits(
    policy: nn.Module, tokens: Int[Tensor, "B T"], attention_mask: Bool[Tensor, "B T"], *, length: int
) -> Float[Tensor, "B R V"]:
    """Return the logits that predict the last ``length`` tokens: those at the position before each of them."""
    network: Any = policy
    logits: Tensor = network(
        input_ids=tokens,
        attention_mask=attention_mask.long(),
        position_ids=position_ids(attention_mask),
        use_cache=False,
        logits_to_keep=length + 1,
    ).logits
    return logits[:, :-1]


def response_values(
    critic: nn.Module, tokens: Int[Tensor, "B T"], attention_mask: Bool[Tensor, "B T"], *, length: int
) -> Float[Tensor, "B R+1"]:
    """Return the values of the states before each of the last ``length`` tokens, and after the last.

    The value of the state before the token at t is read at t - 1.
    """
    values: Tensor = critic(tokens, attention_mask)
    return values[:, -length - 1 :]


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
) -> ScoredRollout:
    """Add what policy, reference, critic and reward say of the rollout; without a critic all values are 0.

    The reference is read at the same temperature as the policy, so that their KL is 0 while they are equal.
    Log-probabilities are 0 outside of the response mask, values outside of the states before and after its tokens.
    """
    sequences, longest = rollout.response_mask.shape
    device = rollout.tokens.device
    dtype = torch.promote_types(next(policy.parameters()).dtype, torch.float32)
    logprobs, ref_logprobs = (torch.zeros(sequences, longest, dtype=dtype, device=device) for _ in range(2))
    values = torch.zeros(sequences, longest + 1, dtype=dtype, device=device)
    for rows, tokens, attention_mask, response_mask in micro_batches(rollout, micro_batch_size=micro_batch_size):
        length = response_mask.shape[1]
        found = score_rows(
            tokens,
            attention_mask,
            response_mask,
            policy=policy,
            reference=reference,
            critic=critic,
            temperature=temperature,
        )
        logprobs[rows, :length], ref_logprobs[rows, :length] = found[:2]
        if critic is not None:
            values[rows, : length + 1] = found[2]
    scores = reward.scores(rollout)
    return ScoredRollout(
        **{each.name: getattr(rollout, each.name) for each in fields(Rollout)},
        logprobs=logprobs,
        ref_logprobs=ref_logprobs,
        values=values,
        scores=scores.total,
        score_parts=scores.parts,
    )


def score_rows(
    tokens: Int[Tensor, "B T"],
    attention_mask: Bool[Tensor, "B T"],
    response_mask: Bool[Tensor, "B R"],
    *,
    policy: nn.Module,
    reference: nn.Module,
    critic: nn.Module | None,
    temperature: float,
) -> list[Tensor]:
    """Return log-probabilities of policy and reference (B, R), and the critic's values (B, R + 1) where there is one.

    They are 0 where nothing counts. One network's logits are held at a time.
    """
    length = response_mask.shape[1]
    responses = tokens[:, -length:]
    found: list[Tensor] = []
    for network in (policy, reference):
        logits = response_logits(network, tokens, attention_mask, length=length)
        found.append(gather_logprobs(logits, responses, temperature=temperature).masked_fill(~response_mask, 0.0))
        del logits
    if critic is not None:
        states = value_mask(response_mask, after_end=True)
        found.append(response_values(critic, tokens, attention_mask, length=length).masked_fill(~states, 0.0))
    return found
