"""A few short responses, sampled as a rollout is, with the log-probabilities that the sampler itself saw."""

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from rlhf_lightning.functional.logprobs import gather_logprobs
from rlhf_lightning.functional.precision import at_least_float32
from rlhf_lightning.rollout.generate import generate
from rlhf_lightning.types import PromptBatch, Rollout

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROWS = 8
TWICE = 4
"""Of the prompts, so many are answered once more: does the reward tell responses to the same prompt apart?"""
TOKENS = 16


@dataclass(frozen=True)
class Probe:
    """A small rollout, and what sampling it was like."""

    rollout: Rollout
    sampler_logprobs: Tensor
    """(B, R) log-probabilities of the response tokens, from step-by-step decoding with the cache; 0 after the end."""
    seconds: float


def sample_probe(
    policy: nn.Module,
    batch: PromptBatch,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    max_new_tokens: int,
    temperature: float,
    stop_tokens: list[int],
) -> Probe:
    """Sample at most `TOKENS` tokens after `ROWS` prompts from all over the batch, with noise of its own.

    `TWICE` of them stand at the end once more, with a second response.
    """
    once = _evenly(len(batch), ROWS)
    rows = torch.cat([once, once[_evenly(len(once), TWICE)]])
    steps: list[tuple[Tensor, Tensor]] = []
    start = time.perf_counter()
    rollout = generate(
        policy,
        batch.rows(rows),
        tokenizer,
        max_new_tokens=min(TOKENS, max_new_tokens),
        temperature=temperature,
        stop_tokens=stop_tokens,
        generator=torch.Generator(device=batch.prompt_tokens.device).manual_seed(0),
        watch=lambda _, drawing, logits: steps.append((drawing, logits)),
    )
    seconds = time.perf_counter() - start
    return Probe(rollout, _sampler_logprobs(rollout, steps, temperature), seconds)


def _evenly(length: int, number: int) -> Tensor:
    return torch.linspace(0, length - 1, min(number, length), dtype=torch.float32).long()


def _sampler_logprobs(rollout: Rollout, steps: list[tuple[Tensor, Tensor]], temperature: float) -> Tensor:
    dtype = at_least_float32(steps[0][1]).dtype
    logprobs = torch.zeros(rollout.response_mask.shape, dtype=dtype, device=rollout.tokens.device)
    for t, (rows, logits) in enumerate(steps):
        tokens = rollout.response_tokens[rows, t : t + 1]
        logprobs[rows, t] = gather_logprobs(logits.unsqueeze(1), tokens, temperature=temperature).squeeze(1)
    return logprobs
