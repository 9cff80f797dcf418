"""Advantages of actions over what the critic expected."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rlhf_lightning.functional.masking import variance


def gae(
    rewards: Float[Tensor, "B S"],
    values: Float[Tensor, "B S"],
    state_mask: Bool[Tensor, "B S"],
    *,
    gamma: float,
    lam: float,
) -> Float[Tensor, "B S"]:
    """Return the generalised advantage estimates (Schulman et al. 2016, eq. 16); 0 outside of the mask.

    A(t) = delta(t) + gamma * lam * A(t + 1) with delta(t) = r(t) + gamma * V(t + 1) - V(t). The value after the last
    state is 0: a response is an episode that has ended.
    """
    values = values.masked_fill(~state_mask, 0.0)
    advantages = torch.zeros_like(values)
    advantage = next_value = torch.zeros_like(values[:, 0])
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = (delta + gamma * lam * advantage).masked_fill(~state_mask[:, t], 0.0)
        advantages[:, t] = advantage
        next_value = values[:, t]
    return advantages


def leave_one_out(rewards: Float[Tensor, " B"], *, group_size: int) -> Float[Tensor, " B"]:
    """Return each reward less the mean of the others of its group (Ahmadian et al. 2024, eq. 7): RLOO.

    Groups are ``group_size`` neighbouring rows, the samples of one prompt. The baseline does not depend on the sample
    it is taken from, so that the gradient stays unbiased.
    """
    groups = rewards.reshape(-1, group_size)
    others = (groups.sum(dim=1, keepdim=True) - groups) / (group_size - 1)
    return (groups - others).flatten()


def group_normalized(rewards: Float[Tensor, " B"], *, group_size: int, eps: float = 1e-8) -> Float[Tensor, " B"]:
    """Return (reward - mean) / standard deviation within each group (Shao et al. 2024, sec. 4.1.2): GRPO.

    A group whose rewards are all alike teaches nothing: its advantages are 0.
    """
    # In float32 equal rewards differ from their mean by rounding, which would be blown up to a deviation of 1.
    groups = rewards.double().reshape(-1, group_size)
    centered = groups - groups.mean(dim=1, keepdim=True)
    return (centered / (groups.std(dim=1, keepdim=True, correction=0) + eps)).flatten().to(rewards)


def baselined(rewards: Float[Tensor, " B"], others: Float[Tensor, "3"] | Float[Tensor, "3 B"]) -> Float[Tensor, " B"]:
    """Return each reward less a mean (Williams 1992, sec. 4): that of other rewards, by their count and sum.

    ``others`` are the moments of rewards that do not depend on the sample, of all rows or of each; without any the
    baseline is 0.
    """
    count, total = others[0], others[1]
    return rewards - (total / count.clamp(min=1.0)).to(rewards)


def explained_variance(error_moments: Float[Tensor, "3"], return_moments: Float[Tensor, "3"]) -> Float[Tensor, ""]:
    """Return 1 - Var(returns - values) / Var(returns): 1 for a perfect critic, 0 for a constant one.

    The arguments are `masked_moments` of returns - values and of the returns, added up over all ranks.
    """
    return 1 - variance(error_moments) / variance(return_moments).clamp(min=1e-12)
