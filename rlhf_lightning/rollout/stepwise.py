"""Sampling with the cache that the network makes: for any network, also one whose processes must keep step."""

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from rlhf_lightning.errors import InputError
from rlhf_lightning.functional.masking import position_ids
from rlhf_lightning.functional.precision import at_least_float32
from rlhf_lightning.networks.sharding import largest_on_any_process, waits_for_others
from rlhf_lightning.rollout.draw import draw, require_finite

STILL_FULL = 0.75
"""Share of rows still running below which the others are dropped: copying the cache costs about as much as a step."""


def sample_stepwise(
    policy: nn.Module,
    prompt_tokens: Int[Tensor, "B P"],
    prompt_mask: Bool[Tensor, "B P"],
    uniform: Float[Tensor, "B N 2"],
    *,
    temperature: float,
    stop_tokens: Int[Tensor, " S"],
) -> tuple[Int[Tensor, "B N"], Float[Tensor, "B N"]]:
    """Return up to N tokens a row, and their log-probabilities; after a stop token there are zeros.

    Rows that have ended are dropped once they are a quarter of those that the network still runs on. Where the policy's
    weights lie in parts on several processes, one that has sampled all of its rows goes on reading its first one, since
    every forward needs all processes.
    """
    network: Any = policy
    in_step = waits_for_others(policy)
    rows = torch.arange(len(prompt_tokens), device=prompt_tokens.device)
    running = torch.ones_like(rows, dtype=torch.bool)
    response = prompt_tokens.new_zeros(uniform.shape[:2])
    of_response = torch.zeros(0, device=rows.device)
    inputs, mask, cache = prompt_tokens, prompt_mask, None
    positions = position_ids(prompt_mask)
    for t in range(uniform.shape[1]):
        output = network(
            input_ids=inputs,
            attention_mask=mask.long(),
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        if cache is None and "past_key_values" not in vars(output):
            raise InputError(
                f"{type(network).__name__} keeps no past_key_values, which sampling goes on from: "
                "set sampler=transformers (module.sampler), or name a network with attention, such as GPT-2 or Llama"
            )
        cache = output.past_key_values
        logits = output.logits[:, -1]
        tokens, logprobs, finite = draw(logits, uniform[rows, t], temperature=temperature)
        require_finite(finite)
        if t == 0:
            of_response = torch.zeros(response.shape, dtype=at_least_float32(logits[:0]).dtype, device=rows.device)
        response[rows[running], t] = tokens[running]
        of_response[rows[running], t] = logprobs[running]
        running = running & ~torch.isin(tokens, stop_tokens)
        left = int(running.sum())
        if (largest_on_any_process(left, rows.device) if in_step else left) == 0:
            break
        if left <= STILL_FULL * len(rows):
            kept = running.nonzero().squeeze(1) if left else rows.new_zeros(1)
            cache.batch_select_indices(kept)
            rows, tokens, mask, positions, running = (x[kept] for x in (rows, tokens, mask, positions, running))
        inputs = tokens.unsqueeze(1)
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        positions = positions[:, -1:] + 1
    return response, of_response
