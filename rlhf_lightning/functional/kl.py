"""Estimators of KL(policy || reference) from sampled tokens (Schulman 2020, Approximating KL divergence)."""

from jaxtyping import Float
from torch import Tensor


def k1(logprobs: Float[Tensor, "B R"], ref_logprobs: Float[Tensor, "B R"]) -> Float[Tensor, "B R"]:
    """Return log p - log p_ref: unbiased, may be negative. It goes into the reward: its gradient is 0 on average."""
    return logprobs - ref_logprobs


def k2(logprobs: Float[Tensor, "B R"], ref_logprobs: Float[Tensor, "B R"]) -> Float[Tensor, "B R"]:
    """Return (log p - log p_ref)^2 / 2: biased, but its gradient is that of KL(policy || reference)."""
    return (logprobs - ref_logprobs).square() / 2


def k3(logprobs: Float[Tensor, "B R"], ref_logprobs: Float[Tensor, "B R"]) -> Float[Tensor, "B R"]:
    """Return p_ref/p - 1 - log(p_ref/p): unbiased, never negative. Its gradient is that of the other direction."""
    log_ratio = ref_logprobs - logprobs
    return log_ratio.exp() - 1 - log_ratio
