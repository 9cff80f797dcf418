"""What a rollout says of the policy that sampled it: means over the responses, or their tokens, of all processes."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from rlhf_lightning.functional.advantages import explained_variance
from rlhf_lightning.functional.kl import k1, k3
from rlhf_lightning.functional.masking import masked_moments, masked_sum
from rlhf_lightning.types import Experience, SampledRollout, ScoredRollout

SumOverRanks = Callable[[Tensor], Tensor]


def rollout_metrics(
    scored: ScoredRollout, experience: Experience, parts: Mapping[str, Tensor], *, sum_over_ranks: SumOverRanks
) -> dict[str, Tensor]:
    """Return the means of score, reward and its ``parts``, KL (nats a response and a token), length and ending.

    Scores, parts and reward are per response; the parts and ``kl_part`` add up to the reward.
    """
    mask = scored.response_mask
    lengths, scores = mask.sum(dim=1).double(), scored.scores.double()
    of_responses = {
        "score": scores,
        **{f"score_part/{name}": part for name, part in scored.score_parts.items()},
        **parts,
        "kl_part": experience.rewards.sum(dim=1) - sum(parts.values()),
        "reward": experience.rewards.sum(dim=1),
        "kl": masked_sum(k1(scored.logprobs, scored.ref_logprobs), mask),
        "kl_k3": masked_sum(k3(scored.logprobs, scored.ref_logprobs), mask),
        "response_length": lengths,
        "missing_eos": (~scored.ended).double(),
    }
    moments = {"scores": scores.square(), "lengths": lengths.square(), "both": scores * lengths}
    columns = [*of_responses.values(), *moments.values(), torch.ones_like(lengths)]
    totals = sum_over_ranks(torch.stack([column.double().sum() for column in columns]))
    means = dict(zip([*of_responses, *moments], totals / totals[-1], strict=False))
    squares, long_squares, both = (means.pop(name) for name in moments)
    score_variance = squares - means["score"].square()
    length_variance = long_squares - means["response_length"].square()
    means["score_std"] = score_variance.clamp(min=0.0).sqrt()
    means["score_length_correlation"] = _correlation(
        both - means["score"] * means["response_length"], score_variance, length_variance
    )
    means["kl_per_token"] = means["kl"] / means["response_length"]
    return {name: value.float() for name, value in means.items()}


def sampler_metrics(
    sampled: SampledRollout, scored: ScoredRollout, *, sum_over_ranks: SumOverRanks
) -> dict[str, Tensor]:
    """Return the mean over the response tokens of |log p of the sampler - log p of the trainer|, nats.

    It is rounding where both compute the same, and 0 where the trainer took the sampler's.
    """
    apart = (sampled.sampler_logprobs - scored.logprobs).abs()
    count, total, _ = sum_over_ranks(masked_moments(apart, scored.response_mask))
    return {"sampler_gap": (total / count).float()}


def critic_metrics(experience: Experience, *, sum_over_ranks: SumOverRanks) -> dict[str, Tensor]:
    """Return how much of the returns' variance the critic's values explained."""
    states = experience.value_mask
    errors = masked_moments(experience.returns - experience.old_values, states)
    returns = masked_moments(experience.returns, states)
    return {"explained_variance": explained_variance(sum_over_ranks(errors), sum_over_ranks(returns)).float()}


def _correlation(covariance: Tensor, one_variance: Tensor, other_variance: Tensor) -> Tensor:
    """Return Pearson's correlation, 0 where one of the two does not vary."""
    scale = (one_variance.clamp(min=0.0) * other_variance.clamp(min=0.0)).sqrt()
    return torch.where(scale > 1e-9, covariance / scale.clamp(min=1e-9), torch.zeros_like(scale))
