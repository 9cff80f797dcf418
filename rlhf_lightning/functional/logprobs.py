"""Log-probabilities and entropies, always in float32."""

import torch
from jaxtyping import Float, Int
from torch import Tensor


def gather_logprobs(
    logits: Float[Tensor, "B R V"], tokens: Int[Tensor, "B R"], *, temperature: float = 1.0
) -> Float[Tensor, "B R"]:
    """Return log p(token) in nats under logits / temperature; ``logits[:, t]`` are those that predict token t."""
    scaled = logits.float() / temperature
    return -torch.nn.functional.cross_entropy(scaled.flatten(0, 1), tokens.flatten(), reduction="none").view(
        tokens.shape
    )


def entropy(logits: Float[Tensor, "B R V"], *, temperature: float = 1.0) -> Float[Tensor, "B R"]:
    """Return the entropy of softmax(logits / temperature) in nats; log V for uniform logits."""
    logprobs = torch.log_softmax(logits.float() / temperature, dim=-1)
    return -(logprobs.exp() * logprobs).sum(dim=-1)
