"""A few short responses, sampled as a rollout is."""

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from rlhf_lightning.rollout.generate import Sampler, generate
from rlhf_lightning.types import PromptBatch, SampledRollout

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROWS = 8
TWICE = 4
"""Of the prompts, so many are answered once more: does the reward tell responses to the same prompt apart?"""
TOKENS = 16


@dataclass(frozen=True)
class Probe:
    """A small rollout, and how long sampling it took."""

    rollout: SampledRollout
    seconds: float


def sample_probe(
    policy: nn.Module,
    batch: PromptBatch,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    max_new_tokens: int,
    temperature: float,
    stop_tokens: list[int],
    sampler: Sampler = "builtin",
) -> Probe:
    """Sample at most `TOKENS` tokens after `ROWS` prompts from all over the batch, with noise of its own.

    `TWICE` of them stand at the end once more, with a second response.
    """
    once = _evenly(len(batch), ROWS)
    rows = torch.cat([once, once[_evenly(len(once), TWICE)]])
    start = time.perf_counter()
    rollout = generate(
        policy,
        batch.rows(rows),
        tokenizer,
        max_new_tokens=min(TOKENS, max_new_tokens),
        temperature=temperature,
        stop_tokens=stop_tokens,
        generator=torch.Generator(device=batch.prompt_tokens.device).manual_seed(0),
        sampler=sampler,
    )
    seconds = time.perf_counter() - start
    return Probe(rollout, seconds)


def _evenly(length: int, number: int) -> Tensor:
    return torch.linspace(0, length - 1, min(number, length), dtype=torch.float32).long()
