"""Estimators of KL(policy || reference) from tokens that the policy sampled (Schulman 2020, "Approximating KL divergence")."""

from jaxtyping import Float
from torch import Tensor


def k1(logprobs: Float[Tensor, "B R"], ref_logprobs: Float[Tensor, "B R"]) -> Float[Tensor, "B R"]:
    """Return log p - log p_ref: unbiased, may be negative. It belongs into the reward, detached: its own gradient is 0 on average."""
    return logprobs - ref_logprobs


def k2(logprobs: Float[Tensor, "B R"], ref_logprobs: Float[Tensor, "B R"]) -> Float[Tensor, "B R"]:
    """Return (log p - log p_ref)^2 / 2: biased, but its gradient is that of KL(policy || reference)."""
    return (logprobs - ref_logprobs).square() / 2


def k3(logprobs: Float[Tensor, "B R"], ref_logprobs: Float[Tensor, "B R"]) -> Float[Tensor, "B R"]:
    """Return p_ref/p - 1 - log(p_ref/p): unbiased and never negative. For logging: its gradient is that of the other direction."""
    log_ratio = ref_logprobs - logprobs
    return log_ratio.exp() - 1 - log_ratio
