"""Log-probabilities and entropies, in float32 also of half precision; float64 stays."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rlhf_lightning.functional.precision import at_least_float32


def gather_logprobs(
    logits: Float[Tensor, "B R V"], tokens: Int[Tensor, "B R"], *, temperature: float = 1.0
) -> Float[Tensor, "B R"]:
    """Return log p(token) in nats under logits / temperature; ``logits[:, t]`` are those that predict token t."""
    scaled = at_least_float32(logits) / temperature
    return -torch.nn.functional.cross_entropy(scaled.flatten(0, 1), tokens.flatten(), reduction="none").view(
        tokens.shape
    )


def entropy(logits: Float[Tensor, "B R V"], *, temperature: float = 1.0) -> Float[Tensor, "B R"]:
    """Return the entropy of softmax(logits / temperature) in nats; log V for uniform logits."""
    logprobs = torch.log_softmax(at_least_float32(logits) / temperature, dim=-1)
    return -(logprobs.exp() * logprobs).sum(dim=-1)
