"""Estimators of KL(policy || reference) from sampled tokens (Schulman 2020, Approximating KL divergence)."""

import math

from jaxtyping import Bool, Float
from torch import Tensor

from rlhf_lightning.functional.masking import sum_to_go


def k1(logprobs: Float[Tensor, "B R"], ref_logprobs: Float[Tensor, "B R"]) -> Float[Tensor, "B R"]:
    """Return log p - log p_ref: unbiased, may be negative. It goes into the reward: its gradient is 0 on average."""
    return logprobs - ref_logprobs


def k2(logprobs: Float[Tensor, "B R"], ref_logprobs: Float[Tensor, "B R"]) -> Float[Tensor, "B R"]:
    """Return (log p - log p_ref)^2 / 2: biased, but its gradient is that of KL(policy || reference).

    As a loss it counts each token by itself: a token does not answer for the KL of the later ones that it leads to.
    """
    return (logprobs - ref_logprobs).square() / 2


def k3(logprobs: Float[Tensor, "B R"], ref_logprobs: Float[Tensor, "B R"]) -> Float[Tensor, "B R"]:
    """Return p_ref/p - 1 - log(p_ref/p): unbiased, never negative. Its gradient is that of the other direction."""
    log_ratio = ref_logprobs - logprobs
    return log_ratio.exp() - 1 - log_ratio


def k1_weighted(
    logprobs: Float[Tensor, "B R"], ref_logprobs: Float[Tensor, "B R"], response_mask: Bool[Tensor, "B R"]
) -> Float[Tensor, "B R"]:
    """Return log p times the k1 that is still to come: its gradient is that of KL(policy || reference) of sequences.

    k1 itself has a gradient of 0 on average; as the weight of the score function, detached, it is the KL's (Williams
    1992). Earlier tokens answer for the later ones that they lead to.
    """
    to_go = sum_to_go(k1(logprobs, ref_logprobs).detach(), response_mask)
    return to_go * logprobs


def adapted_beta(beta: float, kl: float, *, target: float, horizon: float, episodes: float) -> float:
    """Return beta * (1 + clip(kl / target - 1, -0.2, 0.2) * episodes / horizon) (Ziegler et al. 2019, sec. 2.2).

    More episodes than the horizon count as the horizon: beta moves by at most a fifth, and keeps its sign. ``kl`` and
    ``target`` are nats a response, ``kl`` the mean of ``episodes`` responses. Raises `ValueError` for a ``kl`` that is
    not finite: a penalty of NaN would never recover.
    """
    if not math.isfinite(kl):
        raise ValueError(f"kl={kl} must be finite")
    error = min(max(kl / target - 1, -0.2), 0.2)
    return beta * (1 + error * min(1.0, episodes / horizon))
