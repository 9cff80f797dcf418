"""From one score per response to one reward per token."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rlhf_lightning.functional.masking import last_index


def missing_eos_part(
    scores: Float[Tensor, " B"], ended: Bool[Tensor, " B"], *, penalty: float, replace: bool
) -> Float[Tensor, " B"]:
    """Return what a response without an end token adds to its score: 0 for one that has ended.

    With ``replace`` the sum is -penalty, whatever the response says (Huang et al. 2024, detail 23); otherwise the
    penalty is taken off.
    """
    change = -penalty - scores if replace else torch.full_like(scores, -penalty)
    return change.masked_fill(ended, 0.0)


def repeated_share(tokens: Int[Tensor, "B R"], mask: Bool[Tensor, "B R"], *, length: int = 4) -> Float[Tensor, " B"]:
    """Return the share of a response's runs of ``length`` tokens that stood in it before, 0 to 1; 0 without a run."""
    shares = [_repeated(row[kept].tolist(), length) for row, kept in zip(tokens.cpu(), mask.cpu(), strict=True)]
    return torch.tensor(shares, dtype=torch.float32, device=tokens.device)


def value_mask(response_mask: Bool[Tensor, "B R"], *, after_end: bool) -> Bool[Tensor, "B R+1"]:
    """Return which states have a value: that before each response token, with ``after_end`` also the last one."""
    mask = torch.cat([response_mask, torch.zeros_like(response_mask[:, :1])], dim=1)
    return mask.scatter(1, last_index(mask).unsqueeze(1) + 1, True) if after_end else mask


def token_rewards(
    scores: Float[Tensor, " B"],
    kl: Float[Tensor, "B R"],
    response_mask: Bool[Tensor, "B R"],
    states: Bool[Tensor, "B R+1"],
    *,
    beta: float,
) -> Float[Tensor, "B R+1"]:
    """Return -beta * kl at every response token, and the score on top at the last of ``states`` (`value_mask`).

    Summed over a response this is R(x, y) - beta * log(p_RL / p_FT) (Ouyang et al. 2022, eq. 2).
    """
    penalties = (-beta * kl).masked_fill(~response_mask, 0.0)
    rewards = torch.cat([penalties, torch.zeros_like(penalties[:, :1])], dim=1)
    return rewards.scatter_add(1, last_index(states).unsqueeze(1), scores.unsqueeze(1).to(rewards.dtype))


def _repeated(ids: list[int], length: int) -> float:
    runs = list(zip(*(ids[start:] for start in range(length)), strict=False))
    return 1 - len(set(runs)) / len(runs) if runs else 0.0
