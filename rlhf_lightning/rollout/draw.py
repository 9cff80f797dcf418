"""The draw of a token from the policy's logits: nothing but the temperature lies between them."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from rlhf_lightning.errors import InputError
from rlhf_lightning.functional.fused import fused
from rlhf_lightning.functional.precision import at_least_float32

BLOCK = 64
"""Neighbouring tokens of the vocabulary that are drawn from together."""

NOT_FINITE = "the policy's logits are not finite: its weights hold NaN, or overflowed in this precision"


def noise(rows: int, tokens: int, generator: torch.Generator) -> Float[Tensor, "rows tokens 2"]:
    """Draw what decides the tokens of each row: two numbers from [0, 1) for each, which other rows cannot change."""
    return torch.rand(rows, tokens, 2, dtype=torch.float64, device=generator.device, generator=generator)


@fused
def draw(
    logits: Float[Tensor, "B V"], uniform: Float[Tensor, "B 2"], *, temperature: float
) -> tuple[Int[Tensor, " B"], Float[Tensor, " B"], Bool[Tensor, ""]]:
    """Draw a token of each row from softmax(logits / temperature); temperature 0 takes the likeliest.

    Returns the tokens, their log-probabilities in nats, and whether all logits were finite, which `require_finite`
    asks where that costs no wait for the device. Finds the block of neighbouring tokens first and then the token in
    it, each by inverting the distribution function: `torch.multinomial` needs a random number for each token of the
    vocabulary.
    """
    if temperature == 0:
        tokens = logits.argmax(dim=-1)
        certain = torch.zeros_like(tokens, dtype=at_least_float32(logits[:0]).dtype)
        return tokens, certain, torch.ones((), dtype=torch.bool, device=logits.device)
    # Not `log_softmax`: each pass over all logits takes a good part of the time that a small network needs.
    scaled = at_least_float32(logits)
    scaled = scaled if temperature == 1 else scaled / temperature
    largest = scaled.amax(dim=1, keepdim=True)
    weights = (scaled - largest).exp_()
    if filling := -logits.shape[1] % BLOCK:
        weights = nn.functional.pad(weights, (0, filling))
    blocks = weights.unflatten(1, (-1, BLOCK))
    masses = blocks.sum(dim=2)
    block = _invert(masses, uniform[:, :1])
    token = _invert(blocks[torch.arange(len(blocks), device=blocks.device), block], uniform[:, 1:])
    tokens = (block * BLOCK + token).clamp(max=logits.shape[1] - 1)
    logprobs = (scaled.gather(1, tokens.unsqueeze(1)) - largest).squeeze(1) - masses.sum(dim=1).log()
    return tokens, logprobs, masses.isfinite().all()


def require_finite(finite: Tensor) -> None:
    """Raise `InputError` where logits were not finite."""
    if not finite:
        raise InputError(NOT_FINITE)


def _invert(weights: Float[Tensor, "B N"], uniform: Float[Tensor, "B 1"]) -> Int[Tensor, " B"]:
    """Return the index of each row below whose sum of weights ``uniform`` of all lies; none without weight is drawn."""
    # In float64 a uniform number below 1 times the sum stays below the sum.
    cumulative = weights.double().cumsum(dim=1)
    found = torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True).squeeze(1)
    # NaN is found behind the last.
    return found.clamp(max=weights.shape[1] - 1)
