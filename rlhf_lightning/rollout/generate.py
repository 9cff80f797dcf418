"""From prompts to a rollout: sampling from the policy, nothing but the temperature between its logits and the draw."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from rlhf_lightning.errors import InputError
from rlhf_lightning.functional.masking import position_ids, through_first
from rlhf_lightning.networks.sharding import largest_on_any_process, waits_for_others
from rlhf_lightning.rollout.cache import make_room
from rlhf_lightning.types import PromptBatch, Rollout

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BLOCK = 64
"""Neighbouring tokens of the vocabulary that are drawn from together."""
Watch = Callable[[int, Tensor, Tensor], None]
"""``watch(t, rows, logits)``: which rows draw their token t, and from which logits (rows, V)."""
STILL_FULL = 0.75
"""Share of rows still running below which the others are dropped: copying the cache costs about as much as a step."""


def generate(
    policy: nn.Module,
    batch: PromptBatch,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    max_new_tokens: int,
    temperature: float,
    stop_tokens: list[int],
    generator: torch.Generator,
    watch: Watch | None = None,
) -> Rollout:
    """Sample one response for each prompt.

    A response ends with its first stop token, which belongs to it, or after ``max_new_tokens``; the ids that were
    sampled are kept as they are and never decoded and encoded again.
    """
    stops = torch.tensor(stop_tokens, device=batch.prompt_tokens.device)
    response_tokens = sample_tokens(
        policy,
        batch.prompt_tokens,
        batch.prompt_mask,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        stop_tokens=stops,
        generator=generator,
        watch=watch,
    )
    response_mask = through_first(response_tokens, stops)
    response_tokens = response_tokens.masked_fill(~response_mask, _pad_token_id(tokenizer))
    is_stop = torch.isin(response_tokens, stops) & response_mask
    return Rollout(
        **vars(batch),
        tokens=torch.cat([batch.prompt_tokens, response_tokens], dim=1),
        attention_mask=torch.cat([batch.prompt_mask, response_mask], dim=1),
        response_mask=response_mask,
        ended=is_stop.any(dim=1),
        responses=decode(tokenizer, response_tokens, response_mask & ~is_stop),
    )


@torch.no_grad()
def sample_tokens(
    policy: nn.Module,
    prompt_tokens: Int[Tensor, "B P"],
    prompt_mask: Bool[Tensor, "B P"],
    *,
    max_new_tokens: int,
    temperature: float,
    stop_tokens: Int[Tensor, " S"],
    generator: torch.Generator,
    watch: Watch | None = None,
) -> Int[Tensor, "B R"]:
    """Sample until every row has a stop token or ``max_new_tokens`` are reached, so R may be smaller than that.

    Rows that have ended are dropped once they are a quarter of those that the network still runs on; what follows a
    stop token is that token again. Temperature 0 takes the most likely token. ``watch`` is shown every step.
    Where the policy's weights lie in parts on several processes, one that has sampled all of its rows goes on reading
    its first one, since every forward needs all processes.
    """
    network: Any = policy
    in_step = waits_for_others(policy)
    length = max_new_tokens
    rows = torch.arange(len(prompt_tokens), device=prompt_tokens.device)
    running = torch.ones_like(rows, dtype=torch.bool)
    response = prompt_tokens.new_zeros(len(rows), max_new_tokens)
    inputs, mask, cache = prompt_tokens, prompt_mask, None
    positions = position_ids(prompt_mask)
    for t in range(max_new_tokens):
        output = network(
            input_ids=inputs,
            attention_mask=mask.long(),
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        if cache is None:
            if "past_key_values" not in output:
                raise InputError(
                    f"{type(network).__name__} keeps no past_key_values, which sampling goes on from: "
                    "network.pretrained must name a network with attention, such as GPT-2 or Llama"
                )
            cache = output.past_key_values
            make_room(cache, max_new_tokens - 1)
        tokens = draw(output.logits[:, -1], temperature=temperature, generator=generator)
        if watch is not None and running.any():
            watch(t, rows[running], output.logits[running, -1])
        response[rows[running], t:] = tokens[running].unsqueeze(1)
        running = running & ~torch.isin(tokens, stop_tokens)
        left = int(running.sum())
        if left == 0:
            length = min(length, t + 1)
        if (largest_on_any_process(left, rows.device) if in_step else left) == 0:
            break
        if left <= STILL_FULL * len(rows):
            kept = running.nonzero().squeeze(1) if left else rows.new_zeros(1)
            cache.batch_select_indices(kept)
            rows, tokens, mask, positions, running = (x[kept] for x in (rows, tokens, mask, positions, running))
        inputs = tokens.unsqueeze(1)
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        positions = positions[:, -1:] + 1
    return response[:, :length]


def draw(logits: Float[Tensor, "B V"], *, temperature: float, generator: torch.Generator) -> Int[Tensor, " B"]:
    """Draw a token of each row from softmax(logits / temperature), in float32; temperature 0 takes the likeliest.

    Draws the block of neighbouring tokens first and then the token in it, each by inverting the distribution function:
    that needs two random numbers a row where `torch.multinomial` draws one for each token of the vocabulary.
    """
    if temperature == 0:
        return logits.argmax(dim=-1)
    blocks = blocks_of(logits, temperature=temperature)
    masses = blocks.sum(dim=2)
    if not masses.isfinite().all():
        raise InputError("the policy's logits are not finite: its weights hold NaN, or overflowed in this precision")
    block = _invert(masses, generator)
    token = _invert(blocks[torch.arange(len(blocks), device=blocks.device), block], generator)
    return block * BLOCK + token


def blocks_of(logits: Float[Tensor, "B V"], *, temperature: float) -> Float[Tensor, "B N K"]:
    """Return softmax(logits / temperature) in float32, cut into blocks of neighbouring tokens."""
    probabilities = torch.softmax(logits.float() / temperature, dim=-1)
    return nn.functional.pad(probabilities, (0, -logits.shape[1] % BLOCK)).unflatten(1, (-1, BLOCK))


def _invert(weights: Float[Tensor, "B N"], generator: torch.Generator) -> Int[Tensor, " B"]:
    """Draw an index of each row with probability in proportion to its weight; none without weight is drawn."""
    # In float64 a uniform number below 1 times the sum stays below the sum.
    cumulative = weights.double().cumsum(dim=1)
    uniform = torch.rand(len(weights), 1, dtype=torch.float64, device=weights.device, generator=generator)
    return torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True).squeeze(1)


def decode(tokenizer: "PreTrainedTokenizerBase", tokens: Int[Tensor, "B R"], mask: Bool[Tensor, "B R"]) -> list[str]:
    """Return the text of the kept tokens of each row, special tokens left out."""
    rows = [row[keep].tolist() for row, keep in zip(tokens.cpu(), mask.cpu(), strict=True)]
    return [str(tokenizer.decode(ids, skip_special_tokens=True)) for ids in rows]


def _pad_token_id(tokenizer: "PreTrainedTokenizerBase") -> int:
    pad: Any = tokenizer.pad_token_id
    return int(pad)
