"""What the phases of a run hold beside weights, gradients and optimizer, each done once without numbers."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from rlhf_lightning.functional.masking import position_ids
from rlhf_lightning.functional.muon import by_kind, directions
from rlhf_lightning.networks.attending import sees_all
from rlhf_lightning.networks.embeddings import embeddings_and_heads
from rlhf_lightning.networks.last_block import makes_some_states
from rlhf_lightning.networks.plain_head import plain_head, plain_scalar_head
from rlhf_lightning.networks.sharding import is_sharded
from rlhf_lightning.preflight.allocations import PhaseMemory, allocated
from rlhf_lightning.preflight.memory import Estimate, RoleMemory, cublas_bytes, role_memory
from rlhf_lightning.rollout.draw import draw
from rlhf_lightning.rollout.experience import MicroBatch
from rlhf_lightning.rollout.generate import Sampler, fast_weights
from rlhf_lightning.rollout.in_slots import READ_AT_ONCE, read_prompts, slots_of
from rlhf_lightning.rollout.recording import room_for
from rlhf_lightning.rollout.reward import ModelReward, Reward
from rlhf_lightning.rollout.score import score_rows
from rlhf_lightning.rollout.slots import Slots
from rlhf_lightning.rollout.stand_ins import stand_ins
from rlhf_lightning.types import ComparisonBatch, Experience, SFTBatch

Losses = Callable[[Experience], dict[str, Tensor]]


class PPONetworks(Protocol):
    """PPO, as far as its memory goes."""

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
    def ema(self) -> nn.Module | None:
        """The moving average of the policy, None where none is kept."""

    @property
    def reward(self) -> Reward | None:
        """The reward."""

    @property
    def passes(self) -> Sequence[Losses]:
        """What an update makes of a micro-batch, each of them followed by a backward."""

    @property
    def optimizer(self) -> str:
        """The name of the optimizer, as modules are given it."""

    minibatch_size: int
    micro_batch_size: int
    micro_batch_tokens: int | None
    max_new_tokens: int
    temperature: float
    sampler: Sampler
    ptx_coef: float


class Supervised(Protocol):
    """Fine-tuning or the training of a reward model, as far as its memory goes."""

    @property
    def network(self) -> nn.Module:
        """The network that is trained."""

    def differentiated(self, batch: Any) -> Tensor:
        """Return what a backward of a batch starts from."""

    def modules(self) -> Iterator[nn.Module]:
        """All submodules."""

    @property
    def accumulates(self) -> bool:
        """Whether a step has the gradients of several batches."""

    @property
    def optimizer(self) -> str:
        """The name of the optimizer, as modules are given it."""


def ppo_memory(run: PPONetworks, device: torch.device, *, sequences: int, prompt_length: int) -> Estimate:
    """Return what each role needs, and what each phase of a rollout of so many sequences needs beside them."""
    networks = {
        "policy": run.policy,
        "critic": run.critic,
        "reference": run.reference,
        "reward": run.reward,
        "average": run.ema,
    }
    held = {role: network for role, network in networks.items() if network is not None}
    roles = roles_memory(held, device, optimizer=run.optimizer)
    models = [] if run.reward is None else list(run.reward.models().values())
    for model in models:
        # What a score is made of, is seen from numbers, too.
        plain_scalar_head(model.reward_model)
    new = run.max_new_tokens
    length = prompt_length + new
    most = run.micro_batch_size if run.micro_batch_tokens is None else max(1, run.micro_batch_tokens // length)
    rows = min(run.micro_batch_size, most, run.minibatch_size)

    def work() -> dict[str, PhaseMemory]:
        sampling, kept = sampling_memory(
            run.policy,
            device,
            sequences=sequences,
            prompt=prompt_length,
            new=new,
            temperature=run.temperature,
            sampler=run.sampler,
        )
        phases = {
            "sampling": sampling,
            "scoring": scoring_memory(
                run, models, device, rows=min(run.micro_batch_size, most, sequences), length=length, new=new
            ),
            "updating": updating_memory(
                run,
                device,
                rows=rows,
                length=length,
                new=new,
                accumulates=rows < run.minibatch_size or run.ptx_coef > 0,
            ),
        }
        # Sampling is recorded on a stream of its own, and a backward has a thread of its own.
        libraries = {"sampling": 2, "scoring": 2, "updating": 3}
        return {
            name: replace(
                phase,
                kept=0 if name == "sampling" else kept,
                libraries=cublas_bytes(device, workspaces=libraries[name]),
            )
            for name, phase in phases.items()
        }

    return _estimate(roles, held.values(), work)


def supervised_memory(run: Supervised, batch: SFTBatch | ComparisonBatch) -> Estimate:
    """Return what the network needs, and what the work on a batch needs beside it."""
    device = batch.tokens.device
    roles = roles_memory({"network": run.network}, device, optimizer=run.optimizer)
    vocabulary = vocabulary_of(run.network)

    def work() -> dict[str, PhaseMemory]:
        update_once = partial(_update_once, run, batch)
        # The gradients of the step before are there until the forward is done.
        update = allocated(update_once, run.modules(), device, vocabulary=vocabulary, gradients=True)
        phases = {"updating": replace(update, libraries=cublas_bytes(device, workspaces=2))}
        if run.optimizer == "muon":
            phases["stepping"] = allocated(partial(_step_once, run.network), run.modules(), device, gradients=True)
        return phases

    if isinstance(batch, ComparisonBatch):
        # What a score is made of, is seen from numbers, too.
        plain_scalar_head(run.network)
    return _estimate(roles, [run.network], work)


@torch.no_grad()
def _step_once(network: nn.Module) -> None:
    """Find the directions of Muon; all else is stepped in place."""
    trained = [weight for weight in network.parameters() if weight.grad is not None]
    matrices, _ = by_kind(trained, embeddings_and_heads(network))
    for _ in directions(matrices, torch.empty_like):
        pass


def _update_once(run: Supervised, batch: Any) -> None:
    loss = run.differentiated(batch)
    if not run.accumulates:
        run.network.zero_grad()
    loss.backward()


def roles_memory(networks: Mapping[str, nn.Module], device: torch.device, *, optimizer: str) -> dict[str, RoleMemory]:
    """Return what each network needs; on a backbone that several hold, the first of them has its weights."""
    roles: dict[str, RoleMemory] = {}
    counted: set[nn.Parameter] = set()
    for role, network in networks.items():
        roles[role] = role_memory(
            [p for p in network.parameters() if p not in counted],
            device,
            optimizer=optimizer,
            special=embeddings_and_heads(network),
        )
        counted.update(network.parameters())
    return roles


def _estimate(
    roles: Mapping[str, RoleMemory], networks: Iterable[nn.Module], work: Callable[[], dict[str, PhaseMemory]]
) -> Estimate:
    networks = list(networks)
    if any(is_sharded(network) for network in networks):
        return Estimate(roles, {}, unknown="the weights lie in parts on several processes")
    # What the output layer is, and what follows the last attention, is seen from numbers, once for each network.
    for network, takes_positions in product(networks, (False, True)):
        plain_head(network, takes_positions=takes_positions)
    for part in (part for network in networks for part in network.modules()):
        if sees_all(part):
            makes_some_states(part)
    try:
        return Estimate(roles, work())
    except RuntimeError as error:
        # What an architecture decides by what it has computed cannot be decided without numbers.
        reason = str(error).strip().splitlines()[:1]
        return Estimate(roles, {}, unknown=f"the network cannot be read without numbers ({', '.join(reason)})")


def vocabulary_of(network: nn.Module) -> int:
    """Return how many tokens a language model knows."""
    config: Any = network.config
    return int(config.get_text_config().vocab_size)


def sampling_memory(
    policy: nn.Module,
    device: torch.device,
    *,
    sequences: int,
    prompt: int,
    new: int,
    temperature: float,
    sampler: Sampler = "builtin",
) -> tuple[PhaseMemory, int]:
    """Return what it takes to read so many prompts, to make room for the new tokens, and to sample the last of them.

    The number beside it is what a GPU keeps of it, in bytes. Where the network makes the cache itself, its layers
    of keys and values are filled up as by the tokens between the first and the last.
    """
    network: Any = policy
    in_slots = sampler == "builtin" and sees_all(policy)
    count = slots_of(sequences, device)
    at_once = min(count, max(1, READ_AT_ONCE // prompt)) if in_slots else sequences
    rows = torch.arange(at_once, device=device)
    mask = _padded(len(rows), prompt, device)
    tokens = torch.zeros(len(rows), prompt, dtype=torch.long, device=device)
    cache_size = kept = 0
    on_a_gpu = device.type == "cuda"

    def read(tokens: Tensor, mask: Tensor, positions: Tensor, cache: Any) -> Any:
        if in_slots:
            output = read_prompts(network, tokens, mask)
        else:
            inputs = {"input_ids": tokens, "attention_mask": mask.long(), "position_ids": positions}
            output = network(**inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)
            if not hasattr(output, "past_key_values"):
                raise RuntimeError("it keeps states of its own in the place of keys and values")
        # As much as the network's forward holds, so that it is gone when the next one begins.
        return output.past_key_values, output.logits[:, -1]

    @torch.no_grad()
    def work() -> None:
        nonlocal cache_size, kept
        known = {id(weight) for weight in policy.parameters()}
        with ExitStack() as stack:
            copies = [stand_ins(policy), *([fast_weights(policy, rows=count, keep=False)] if in_slots else [])]
            for copied in copies:
                stack.enter_context(copied)
                new_weights = [weight for weight in policy.parameters() if id(weight) not in known]
                known |= {id(weight) for weight in new_weights}
                kept += sum(weight.nbytes for weight in new_weights) if on_a_gpu else 0
            cache, logits = read(tokens, mask, position_ids(mask), None)
            if not in_slots:
                noise = torch.zeros(len(rows), 2, dtype=torch.float64, device=device)
                draw(logits, noise, temperature=temperature)
                between = max(0, new - 2)
                _fill_up(cache, between)
                seen = torch.cat([mask, mask[:, :1].expand(-1, between + 1)], dim=1)
                read(tokens[:, :1], seen, mask.sum(dim=1, keepdim=True) + between, cache)
                return
            slots = Slots(
                cache,
                count=count,
                capacity=room_for(prompt + new, device=device),
                longest=new,
                temperature=temperature,
                stop_tokens=torch.zeros(0, dtype=torch.long, device=device),
            )
            cache_size = slots.cache_bytes
            kept += slots.bytes if on_a_gpu else 0
            order, lengths = torch.argsort(~mask, dim=1, stable=True), mask.sum(dim=1)
            noise = torch.zeros(len(rows), new, 2, dtype=torch.float64, device=device)
            slots.let_in(rows, logits, cache, rows, order=order, lengths=lengths, uniform=noise)
            del cache, logits
            if new > 1:
                slots.step(policy, count, prompt + new)

    found = allocated(work, [policy], device, vocabulary=vocabulary_of(policy))
    return replace(found, activations=max(0, found.activations - cache_size), cache=cache_size), kept


def _fill_up(cache: Any, number: int) -> None:
    """Let a cache that a network made take so many more tokens, as far as it holds keys and values."""
    for layer in getattr(cache, "layers", ()):
        if not isinstance(layer, DynamicLayer) or layer.keys is None or layer.values is None:
            continue
        length = layer.keys.shape[2] + number
        if isinstance(layer, DynamicSlidingWindowLayer):
            layer.cumulative_length += number
            length = min(length, layer.sliding_window - 1)
        layer.keys, layer.values = (
            states.new_zeros(*states.shape[:2], length, states.shape[3]) for states in (layer.keys, layer.values)
        )


def scoring_memory(
    run: PPONetworks, rewards: Sequence[ModelReward], device: torch.device, *, rows: int, length: int, new: int
) -> PhaseMemory:
    """Return what it takes to read so many rows of prompt and response by policy, reference and critic, or a reward."""
    vocabulary = vocabulary_of(run.policy)
    mask = _padded(rows, length, device)
    part = MicroBatch(
        rows=torch.arange(rows, device=device),
        tokens=torch.zeros(rows, length, dtype=torch.long, device=device),
        attention_mask=mask,
        response_starts=torch.full((rows,), length - new, device=device),
        response_mask=mask[:, -new:],
    )

    @torch.no_grad()
    def score() -> None:
        score_rows(part, networks=[run.policy, run.reference], critic=run.critic, temperature=run.temperature)

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
    run: PPONetworks, device: torch.device, *, rows: int, length: int, new: int, accumulates: bool
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
        response_starts=torch.full((rows,), length - new, device=device),
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
