"""What the phases of a run hold beside weights, gradients and optimizer, each done once without numbers."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from rlhf_lightning.functional.masking import position_ids
from rlhf_lightning.preflight.allocations import PhaseMemory, allocated
from rlhf_lightning.rollout.cache import RoomyLayer, make_room
from rlhf_lightning.rollout.generate import blocks_of
from rlhf_lightning.rollout.reward import ModelReward
from rlhf_lightning.rollout.score import score_rows
from rlhf_lightning.types import Experience

Losses = Callable[[Experience], dict[str, Tensor]]


class Roles(Protocol):
    """The networks of PPO, and what is read and differentiated in turn."""

    @property
    def policy(self) -> nn.Module:
        """The policy."""

    @property
    def reference(self) -> nn.Module:
        """The frozen reference."""

    @property
    def critic(self) -> nn.Module | None:
        """The critic, None where there is none."""

    @property
    def passes(self) -> Sequence[Losses]:
        """What an update makes of a micro-batch, each of them followed by a backward."""

    temperature: float


def vocabulary_of(network: nn.Module) -> int:
    """Return how many tokens a language model knows."""
    config: Any = network.config
    return int(config.get_text_config().vocab_size)


def sampling_memory(
    policy: nn.Module, device: torch.device, *, sequences: int, prompt: int, new: int, temperature: float
) -> PhaseMemory:
    """Return what it takes to read so many prompts, to make room for the new tokens, and to sample the last of them."""
    network: Any = policy
    mask = _padded(sequences, prompt + new, device)
    tokens = torch.zeros(sequences, prompt, dtype=torch.long, device=device)
    cache_size = 0

    @torch.no_grad()
    def read(inputs: Tensor, mask: Tensor, cache: Any) -> Any:
        output = network(
            input_ids=inputs,
            attention_mask=mask.long(),
            position_ids=position_ids(mask)[:, -inputs.shape[1] :],
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        blocks_of(output.logits[:, -1], temperature=temperature or 1.0)
        return output.past_key_values

    def work() -> None:
        nonlocal cache_size
        cache = read(tokens, mask[:, :prompt], None)
        make_room(cache, new - 1)
        layers = [layer for layer in getattr(cache, "layers", []) if isinstance(layer, RoomyLayer)]
        cache_size = sum(layer.nbytes for layer in layers)
        if new > 1:
            for layer in layers:
                layer.fill(prompt + new - 2)
            read(tokens[:, :1], mask[:, : prompt + new - 1], cache)

    found = allocated(work, [policy], device, vocabulary=vocabulary_of(policy))
    return replace(found, activations=max(0, found.activations - cache_size), cache=cache_size)


def scoring_memory(
    run: Roles, rewards: Sequence[ModelReward], device: torch.device, *, rows: int, length: int, new: int
) -> PhaseMemory:
    """Return what it takes to read so many rows of prompt and response by policy, reference and critic, or a reward."""
    vocabulary = vocabulary_of(run.policy)
    tokens, mask = torch.zeros(rows, length, dtype=torch.long, device=device), _padded(rows, length, device)

    @torch.no_grad()
    def score() -> None:
        score_rows(
            tokens,
            mask,
            mask[:, -new:],
            policy=run.policy,
            reference=run.reference,
            critic=run.critic,
            temperature=run.temperature,
        )

    networks = [run.policy, run.reference, *([] if run.critic is None else [run.critic])]
    found = [allocated(score, networks, device, vocabulary=vocabulary)]
    for reward in rewards:
        size = (min(rows, reward.micro_batch_size), length)
        ids = torch.zeros(size, dtype=torch.long, device=device)

        @torch.no_grad()
        def judge(reward: ModelReward = reward, ids: Tensor = ids) -> None:
            reward.logits(ids, torch.ones_like(ids, dtype=torch.bool))

        found.append(allocated(judge, [reward.reward_model], device))
    return max(found, key=lambda phase: phase.total)


def updating_memory(
    run: Roles, device: torch.device, *, rows: int, length: int, new: int, accumulates: bool
) -> PhaseMemory:
    """Return what forward and backward of a micro-batch of so many rows hold.

    Where it ``accumulates``, the gradients of the micro-batches before are there from the beginning.
    """
    experience = blank_experience(device, rows=rows, length=length, new=new)
    networks = [run.policy, *([] if run.critic is None else [run.critic])]
    return allocated(
        lambda: forward_and_backward(run.passes, experience),
        networks,
        device,
        vocabulary=vocabulary_of(run.policy),
        gradients=accumulates,
    )


def forward_and_backward(passes: Sequence[Losses], experience: Experience) -> None:
    """Read a micro-batch and add the gradient of all that is to be minimised to the weights', one pass at a time."""
    for losses in passes:
        quantities = losses(experience)
        terms = [x.sum() for x in quantities.values() if x.requires_grad]
        sum(terms[1:], start=terms[0]).backward()


def blank_experience(device: torch.device, *, rows: int, length: int, new: int) -> Experience:
    """Return rows of the longest size of which nothing is learned."""
    mask = _padded(rows, length, device)
    tokens, states = torch.zeros(rows, new, device=device), torch.zeros(rows, new + 1, device=device)
    return Experience(
        tokens=torch.zeros(rows, length, dtype=torch.long, device=device),
        attention_mask=mask,
        response_mask=mask[:, -new:],
        value_mask=torch.ones_like(states, dtype=torch.bool),
        old_logprobs=tokens,
        ref_logprobs=tokens,
        old_values=states,
        rewards=states,
        advantages=tokens,
        returns=states,
    )


def _padded(rows: int, length: int, device: torch.device) -> Tensor:
    """Return a mask as most rollouts have it: the first row is shorter, so that attention needs a mask of its own."""
    mask = torch.ones(rows, length, dtype=torch.bool, device=device)
    mask[0, 0] = rows == 1
    return mask
