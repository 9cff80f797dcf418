"""From one score per response to one reward per token."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rlhf_lightning.functional.masking import last_index


def subtract_missing_eos(
    scores: Float[Tensor, " B"], ended: Bool[Tensor, " B"], *, penalty: float
) -> Float[Tensor, " B"]:
    """Return the scores less ``penalty`` where the response has no end token (Huang et al. 2024 replace them)."""
    return torch.where(ended, scores, scores - penalty)


def token_rewards(
    scores: Float[Tensor, " B"], kl: Float[Tensor, "B R"], response_mask: Bool[Tensor, "B R"], *, beta: float
) -> Float[Tensor, "B R"]:
    """Return -beta * kl at every response token, and the score on top at the last one (Ouyang et al. 2022, eq. 2).

    Summed over a response this is R(x, y) - beta * log(p_RL / p_FT). The last token is the one that emitted the end.
    """
    rewards = (-beta * kl).masked_fill(~response_mask, 0.0)
    last = last_index(response_mask).unsqueeze(1)
    return rewards.scatter_add(1, last, scores.unsqueeze(1).to(rewards.dtype))
