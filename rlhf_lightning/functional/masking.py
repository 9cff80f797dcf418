"""What counts: masks, and statistics over what they keep."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def position_ids(attention_mask: Bool[Tensor, "B T"]) -> Int[Tensor, "B T"]:
    """Return the position of every token among the real ones, 0 on padding to the left of the first."""
    return (attention_mask.long().cumsum(dim=1) - 1).clamp(min=0)


def through_first(tokens: Int[Tensor, "B R"], stop_tokens: Int[Tensor, " S"]) -> Bool[Tensor, "B R"]:
    """Return true from the first token through the first stop token, which itself counts; nothing after it does."""
    stops = torch.isin(tokens, stop_tokens)
    stops_before = stops.long().cumsum(dim=1) - stops.long()
    return stops_before == 0


def last_index(mask: Bool[Tensor, "B T"]) -> Int[Tensor, " B"]:
    """Return the index of the last true position of each row; every row must have one."""
    positions = torch.arange(mask.shape[1], device=mask.device)
    return positions.where(mask, -1).amax(dim=1)


def masked_sum(x: Float[Tensor, "B R"], mask: Bool[Tensor, "B R"]) -> Float[Tensor, " B"]:
    """Return the sum of the kept values of each row."""
    return x.masked_fill(~mask, 0.0).sum(dim=1)


def sum_to_go(x: Float[Tensor, "B R"], mask: Bool[Tensor, "B R"]) -> Float[Tensor, "B R"]:
    """Return at each kept position the sum of the kept values from there on; 0 elsewhere."""
    kept = x.masked_fill(~mask, 0.0)
    return kept.flip(1).cumsum(dim=1).flip(1).masked_fill(~mask, 0.0)


def masked_moments(x: Float[Tensor, "B R"], mask: Bool[Tensor, "B R"]) -> Float[Tensor, "3"]:
    """Return count, sum and sum of squares of the kept values in float64, which add up over ranks."""
    kept = x.masked_fill(~mask, 0.0).double()
    return torch.stack([mask.sum().double(), kept.sum(), kept.square().sum()])


def variance(moments: Float[Tensor, "3"]) -> Float[Tensor, ""]:
    """Return the biased variance, 0 and not NaN for a single value and for none, from count, sum and sum of squares."""
    count, total, squares = moments.unbind()
    count = count.clamp(min=1.0)
    return (squares / count - (total / count).square()).clamp(min=0.0)


def center_and_scale(
    x: Float[Tensor, "B R"], mask: Bool[Tensor, "B R"], moments: Float[Tensor, "3"], *, eps: float = 1e-8
) -> Float[Tensor, "B R"]:
    """Return the kept values with the mean of ``moments`` taken off and divided by its standard deviation.

    ``moments`` are those of `masked_moments`, added up over all that is to share one scale (all ranks of a rollout).
    """
    count, total, _ = moments.unbind()
    scaled = (x.double() - total / count) / (variance(moments).sqrt() + eps)
    return scaled.to(x.dtype).masked_fill(~mask, 0.0)
