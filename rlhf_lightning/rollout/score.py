"""From a rollout to a scored one: log-probabilities, values and scores, all without gradient."""

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from rlhf_lightning.functional.logprobs import gather_logprobs
from rlhf_lightning.functional.masking import position_ids
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
) -> Float[Tensor, "B R"]:
    """Return the value of the state before each of the last ``length`` tokens: the one at the position before it."""
    values: Tensor = critic(tokens, attention_mask)
    return values[:, -length - 1 : -1]


@torch.no_grad()
def score_rollout(
    rollout: Rollout,
    *,
    policy: nn.Module,
    reference: nn.Module,
    critic: nn.Module,
    reward: Reward,
    temperature: float,
    micro_batch_size: int,
) -> ScoredRollout:
    """Add what policy, reference, critic and reward say of the rollout.

    The reference is read at the same temperature as the policy, so that their KL is 0 while they are equal.
    Everything outside of the response mask is 0.
    """
    shape = rollout.response_mask.shape
    logprobs, ref_logprobs, values = (torch.zeros(shape, device=rollout.tokens.device) for _ in range(3))
    for rows, tokens, attention_mask, response_mask in micro_batches(rollout, micro_batch_size=micro_batch_size):
        length = response_mask.shape[1]
        responses = tokens[:, -length:]
        for network, store in ((policy, logprobs), (reference, ref_logprobs)):
            logits = response_logits(network, tokens, attention_mask, length=length)
            found = gather_logprobs(logits, responses, temperature=temperature)
            store[rows, :length] = found.masked_fill(~response_mask, 0.0)
        found_values = response_values(critic, tokens, attention_mask, length=length)
        values[rows, :length] = found_values.masked_fill(~response_mask, 0.0)
    scores = reward.scores(rollout)
    return ScoredRollout(
        **vars(rollout),
        logprobs=logprobs,
        ref_logprobs=ref_logprobs,
        values=values,
        scores=scores.total,
        score_parts=scores.parts,
    )
