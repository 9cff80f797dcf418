"""From prompts to a rollout: responses sampled token by token."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from rlhf_lightning.functional.masking import through_first
from rlhf_lightning.networks.attending import sees_all
from rlhf_lightning.networks.modes import evaluating
from rlhf_lightning.networks.sharding import is_sharded, waits_for_others
from rlhf_lightning.rollout.by_transformers import sample_by_transformers
from rlhf_lightning.rollout.draw import noise
from rlhf_lightning.rollout.in_slots import sample_in_slots, slots_of
from rlhf_lightning.rollout.joined import joined
from rlhf_lightning.rollout.reordered import reordered
from rlhf_lightning.rollout.stand_ins import stand_ins
from rlhf_lightning.rollout.stepwise import sample_stepwise
from rlhf_lightning.types import PromptBatch, SampledRollout

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Sampler = Literal["builtin", "transformers"]
"""The loops of this package, or `generate` of `transformers`."""


@dataclass(frozen=True)
class Sampled:
    """Tokens of responses as they were drawn."""

    tokens: Int[Tensor, "B R"]
    """What follows a stop token is that token again; R is the length of the longest response."""
    logprobs: Float[Tensor, "B R"]
    """Of each token when it was drawn, nats; what stands behind a stop token means nothing."""
    values: Float[Tensor, "B R+1"] | None = None
    """Of the states before each token and after the last, where they were asked for and found."""


def generate(
    policy: nn.Module,
    batch: PromptBatch,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    max_new_tokens: int,
    temperature: float,
    stop_tokens: list[int],
    generator: torch.Generator,
    sampler: Sampler = "builtin",
    value_of: Callable[[Tensor], Tensor] | None = None,
) -> SampledRollout:
    """Sample one response for each prompt.

    A response ends with its first stop token, which belongs to it, or after ``max_new_tokens``; the ids that were
    sampled are kept as they are and never decoded and encoded again. ``value_of`` is that of `sample_tokens`.
    """
    stops = torch.tensor(stop_tokens, device=batch.prompt_tokens.device)
    sampled = sample_tokens(
        policy,
        batch.prompt_tokens,
        batch.prompt_mask,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        stop_tokens=stops,
        generator=generator,
        sampler=sampler,
        value_of=value_of,
    )
    response_mask = through_first(sampled.tokens, stops)
    response_tokens = sampled.tokens.masked_fill(~response_mask, _pad_token_id(tokenizer))
    is_stop = torch.isin(response_tokens, stops) & response_mask
    return SampledRollout(
        **vars(batch),
        tokens=torch.cat([batch.prompt_tokens, response_tokens], dim=1),
        attention_mask=torch.cat([batch.prompt_mask, response_mask], dim=1),
        response_mask=response_mask,
        ended=is_stop.any(dim=1),
        responses=decode(tokenizer, response_tokens, response_mask & ~is_stop),
        sampler_logprobs=sampled.logprobs.masked_fill(~response_mask, 0.0),
        sampler_values=sampled.values,
    )


def sample_tokens(
    policy: nn.Module,
    prompt_tokens: Int[Tensor, "B P"],
    prompt_mask: Bool[Tensor, "B P"],
    *,
    max_new_tokens: int,
    temperature: float,
    stop_tokens: Int[Tensor, " S"],
    generator: torch.Generator,
    sampler: Sampler = "builtin",
    value_of: Callable[[Tensor], Tensor] | None = None,
) -> Sampled:
    """Sample until every row has a stop token or ``max_new_tokens`` are reached, so R may be smaller than that.

    All parts of the network are in evaluation mode meanwhile: dropout has no part in what is drawn.
    Temperature 0 takes the most likely token. With the built-in sampler the tokens of a row depend on the generator and
    on its place in the batch, not on the other rows. It samples from networks whose cache holds anything else than keys
    and values of all tokens, and from those whose weights lie in parts on several processes, step by step with the
    cache that they make; `sample_by_transformers` from all that `transformers` can generate with.

    With ``value_of`` the last hidden states (N, H) of the steps are made into values (N,), where the sampler sees them:
    the built-in one on a CPU, from a network that it does not sample from step by step.
    """
    settings: dict[str, Any] = {"temperature": temperature, "stop_tokens": stop_tokens}
    values = None
    on_a_gpu = prompt_tokens.is_cuda
    plain_layers = nullcontext() if is_sharded(policy) else stand_ins(policy, keep=on_a_gpu)
    # What is kept for the next rollout is changed in it, which tensors of inference mode may not be.
    with torch.inference_mode(False), torch.no_grad(), evaluating(policy), plain_layers:
        if sampler == "transformers":
            settings |= {"max_new_tokens": max_new_tokens, "generator": generator}
            tokens, logprobs = sample_by_transformers(policy, prompt_tokens, prompt_mask, **settings)
        else:
            uniform = noise(len(prompt_tokens), max_new_tokens, generator)
            if sees_all(policy) and not waits_for_others(policy):
                settings["value_of"] = value_of
                with fast_weights(policy, rows=len(prompt_tokens), keep=True):
                    tokens, logprobs, values = sample_in_slots(policy, prompt_tokens, prompt_mask, uniform, **settings)
            else:
                tokens, logprobs = sample_stepwise(policy, prompt_tokens, prompt_mask, uniform, **settings)
    # Up to the end of the longest response, and each ended one filled up.
    ended = torch.isin(tokens, stop_tokens)
    lengths = through_first(tokens, stop_tokens).sum(dim=1)
    last = tokens.gather(1, (lengths - 1).unsqueeze(1))
    behind = torch.arange(max_new_tokens, device=tokens.device) >= lengths.unsqueeze(1)
    tokens = torch.where(behind & ended.any(dim=1, keepdim=True), last, tokens)
    longest = int(lengths.max())
    return Sampled(tokens[:, :longest], logprobs[:, :longest], None if values is None else values[:, : longest + 1])


def fast_weights(policy: nn.Module, *, rows: int, keep: bool) -> AbstractContextManager[None]:
    """Return the block in which steps of so many rows read copies of the weights that are faster to read.

    With ``keep`` a GPU keeps the memory of the copies for the next block.
    """
    # Sharded weights are whole for the rollout only: a copy would outlive them.
    if is_sharded(policy):
        return nullcontext()
    device = next(policy.parameters()).device
    return joined(policy, keep=keep) if device.type == "cuda" else reordered(policy, rows=slots_of(rows, device))


def decode(tokenizer: "PreTrainedTokenizerBase", tokens: Int[Tensor, "B R"], mask: Bool[Tensor, "B R"]) -> list[str]:
    """Return the text of the kept tokens of each row, special tokens left out."""
    rows = [row[keep].tolist() for row, keep in zip(tokens.cpu(), mask.cpu(), strict=True)]
    return [str(tokenizer.decode(ids, skip_special_tokens=True)) for ids in rows]


def _pad_token_id(tokenizer: "PreTrainedTokenizerBase") -> int:
    pad: Any = tokenizer.pad_token_id
    return int(pad)
