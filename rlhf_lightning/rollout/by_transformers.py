"""Sampling by `transformers`' own `generate`: for networks that only it knows how to go on with."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from rlhf_lightning.errors import InputError
from rlhf_lightning.functional.precision import at_least_float32
from rlhf_lightning.networks.sharding import waits_for_others
from rlhf_lightning.rollout.draw import NOT_FINITE


def sample_by_transformers(
    policy: nn.Module,
    prompt_tokens: Int[Tensor, "B P"],
    prompt_mask: Bool[Tensor, "B P"],
    *,
    max_new_tokens: int,
    temperature: float,
    stop_tokens: Int[Tensor, " S"],
    generator: torch.Generator,
) -> tuple[Int[Tensor, "B N"], Float[Tensor, "B N"]]:
    """Return up to N = ``max_new_tokens`` tokens a row, and their log-probabilities.

    What stands after a stop token means nothing. What the network's generation config says of sampling is left aside.
    The tokens depend on the generator, and other than those of the built-in sampler also on the other rows. Raises
    `InputError` where weights lie in parts on several processes, which would have to keep step.
    """
    if waits_for_others(policy):
        raise InputError(
            "sampler=transformers needs whole weights, and here they lie in parts on several processes; set "
            "sampler=builtin, or gather_weights=always"
        )
    network: Any = policy
    follower, stops = _Follower(temperature), stop_tokens.tolist()
    config = GenerationConfig(
        do_sample=temperature > 0,
        top_k=0,
        top_p=1.0,
        temperature=1.0,
        max_new_tokens=max_new_tokens,
        eos_token_id=stops or None,
        pad_token_id=stops[0] if stops else 0,
    )
    device = prompt_tokens.device
    # `generate` draws from the global generator alone.
    seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
    with torch.random.fork_rng([device] if device.type == "cuda" else []), _generation_config(network, config):
        torch.manual_seed(seed)
        whole = network.generate(
            prompt_tokens,
            attention_mask=prompt_mask.long(),
            generation_config=config,
            logits_processor=LogitsProcessorList([follower]),
        )
    drawn = whole[:, prompt_tokens.shape[1] :]
    response = prompt_tokens.new_zeros(len(drawn), max_new_tokens)
    response[:, : drawn.shape[1]] = drawn
    found = follower.logprobs(whole)
    logprobs = found.new_zeros(response.shape)
    logprobs[:, : drawn.shape[1]] = found
    return response, logprobs


class _Follower(LogitsProcessor):
    """Divides logits by the temperature, and keeps the log-probability of what is drawn from them.

    Of each token it is known at the next step, so that nothing is held of the vocabulary but the newest.
    """

    def __init__(self, temperature: float) -> None:
        """Take the temperature; at 0 the likeliest tokens are taken, for certain."""
        self.temperature = temperature
        self.newest = torch.zeros(0)
        self.found: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return the logits (B, V) that a token is drawn from."""
        if not scores.isfinite().all():
            raise InputError(NOT_FINITE)
        self._keep(input_ids)
        scores = at_least_float32(scores)
        if self.temperature > 0:
            scores = scores / self.temperature
        self.newest = torch.log_softmax(scores, dim=-1)
        return scores

    def logprobs(self, whole: Tensor) -> Tensor:
        """Return those (B, N) of all tokens drawn, which stand at the end of ``whole``."""
        self._keep(whole)
        found = torch.stack(self.found, dim=1)
        return found if self.temperature > 0 else torch.zeros_like(found)

    def _keep(self, input_ids: Tensor) -> None:
        if self.newest.numel():
            self.found.append(self.newest.gather(1, input_ids[:, -1:]).squeeze(1))


@contextmanager
def _generation_config(network: Any, config: GenerationConfig) -> Iterator[None]:
    """Give the network a generation config in the block: `generate` fills up from its own what another leaves out."""
    before = network.generation_config
    network.generation_config = config
    try:
        yield
    finally:
        network.generation_config = before
