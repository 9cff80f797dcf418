"""Advantages of actions over what the critic expected."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rlhf_lightning.functional.masking import variance


def gae(
    rewards: Float[Tensor, "B R"],
    values: Float[Tensor, "B R"],
    response_mask: Bool[Tensor, "B R"],
    *,
    gamma: float,
    lam: float,
) -> Float[Tensor, "B R"]:
    """Return the generalised advantage estimates (Schulman et al. 2016, eq. 16); 0 outside of the mask.

    A(t) = delta(t) + gamma * lam * A(t + 1) with delta(t) = r(t) + gamma * V(t + 1) - V(t). The value after the last
    response token is 0: a response is an episode that has ended.
    """
    values = values.masked_fill(~response_mask, 0.0)
    rewards = rewards.masked_fill(~response_mask, 0.0)
    advantages = torch.zeros_like(values)
    advantage = next_value = torch.zeros_like(values[:, 0])
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = (delta + gamma * lam * advantage).masked_fill(~response_mask[:, t], 0.0)
        advantages[:, t] = advantage
        next_value = values[:, t]
    return advantages


def explained_variance(error_moments: Float[Tensor, "3"], return_moments: Float[Tensor, "3"]) -> Float[Tensor, ""]:
    """Return 1 - Var(returns - values) / Var(returns): 1 for a perfect critic, 0 for a constant one.

    The arguments are `masked_moments` of returns - values and of the returns, added up over all ranks.
    """
    return 1 - variance(error_moments) / variance(return_moments).clamp(min=1e-12)
