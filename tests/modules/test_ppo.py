import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from torch.multiprocessing import ProcessRaisedException
from transformers import PreTrainedTokenizerFast

from rlhf_lightning.data import SFTDataModule
from rlhf_lightning.errors import InputError
from rlhf_lightning.functional.kl import adapted_beta
from rlhf_lightning.modules import PPOModule
from rlhf_lightning.modules.ppo import seeded_generator
from rlhf_lightning.networks import save_pretrained
from rlhf_lightning.networks.unpadded import reading_padding
from rlhf_lightning.rollout import ModelReward, estimate_advantages
from rlhf_lightning.rollout.experience import trimmed_micro_batches
from rlhf_lightning.rollout.generate import sample_tokens
from rlhf_lightning.rollout.shaping import RunningMoments
from rlhf_lightning.types import Experience, PromptBatch, SampledRollout, ScoredRollout

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*have no `val_dataloader`.*"),
]

# A fifth of the vocabulary ends a response, so that responses are of uneven length, and some do not end.
STOPS = list(range(1, 258, 5))
Weights = dict[str, Tensor]


def share_of_low_bytes(prompts: list[str], responses: list[str], **columns: Any) -> list[float]:
    """A reward that differs between responses: the share of the lower half of the bytes."""
    return [sum(ord(c) < 128 for c in text) / max(1, len(text)) for text in responses]


class Watching(PPOModule):
    """Keeps the gradients, before and after they are clipped, and the learning rates of every update."""

    def setup(self, stage: str) -> None:
        super().setup(stage)
        self.raw: list[Weights] = []
        self.clipped: list[Weights] = []
        self.rates: list[list[float]] = []
        self.minibatches: list[Experience] = []

    def _gradients(self) -> Weights:
        trained = {"policy": self.policy} | ({} if self.critic is None else {"critic": self.critic})
        return {
            f"{role}.{name}": p.grad.clone()
            for role, network in trained.items()
            for name, p in network.named_parameters()
        }

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.raw.append(self._gradients())
        super().on_before_optimizer_step(optimizer)
        self.clipped.append(self._gradients())
        self.rates.append([group["lr"] for group in optimizer.param_groups])

    def _accumulate_gradients(self, minibatch: Experience) -> dict[str, Tensor]:
        self.minibatches.append(minibatch)
        return super()._accumulate_gradients(minibatch)


@pytest.fixture
def make(policy: Callable[..., Any], tokenizer: Any) -> Callable[..., Watching]:
    """A PPO module around a fresh policy, ``kind`` its architecture."""

    def build(kind: str = "llama", **settings: Any) -> Watching:
        network = policy(kind)
        network.generation_config.eos_token_id = STOPS
        defaults = {
            "reward": share_of_low_bytes,
            "tokenizer": tokenizer,
            "ppo_epochs": 2,
            "minibatch_size": 3,
            "micro_batch_size": 2,
            "learning_rate": 1e-3,
            "critic_learning_rate": 1e-3,
            "max_new_tokens": 6,
            # What it finds, it is tested for itself; here networks are pulled apart on purpose.
            "preflight": False,
        }
        return Watching(network, **{**defaults, **settings})

    return build


def experience_of(module: PPOModule, scored: ScoredRollout) -> Experience:
    parts = module.shaping(scored, RunningMoments(), sum_over_ranks=lambda x: x)
    return estimate_advantages(
        scored, sum(parts.values()), module.advantage_settings, RunningMoments(), sum_over_ranks=lambda x: x
    )


def norm(gradients: Weights, role: str) -> float:
    return torch.cat([g.flatten() for name, g in gradients.items() if name.startswith(role)]).norm().item()


def assert_close(found: Weights, expected: Weights, **tolerances: float) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, **tolerances)


def differ(one: Weights, other: Weights) -> bool:
    return any(not torch.equal(one[name], other[name]) for name in one)


# A fresh rollout -------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_on_its_own_fresh_rollout_the_ratio_is_1(
    kind: str, temperature: float, make: Callable[..., Watching], prompts: PromptBatch
) -> None:
    module = make(kind, temperature=temperature, micro_batch_size=2)
    experience = experience_of(module, module.score(module.generate(prompts, 0)))
    lengths = experience.response_mask.sum(dim=1).tolist()
    assert len(set(lengths)) > 1
    # The same sequences together as when they were scored: exact. In other company: up to rounding.
    for part in trimmed_micro_batches(experience, micro_batch_size=2):
        found = module.losses(part)
        assert (found["ratio"][part.response_mask] == 1).all()
        assert (found["approx_kl"] == 0).all()
        assert (found["clip_fraction"] == 0).all()
        assert torch.equal(found["policy_loss"][part.response_mask], -part.advantages[part.response_mask])
    for part in trimmed_micro_batches(experience, micro_batch_size=6):
        ratio = module.losses(part)["ratio"][part.response_mask]
        torch.testing.assert_close(ratio, torch.ones_like(ratio), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_kl_to_a_reference_that_is_still_equal_is_0_in_every_rollout(
    kind: str, make: Callable[..., Watching], prompts: PromptBatch
) -> None:
    module = make(kind)
    for draw in range(8):
        scored = module.score(module.generate(prompts, draw))
        assert all(map(torch.equal, module.policy.parameters(), module.reference.parameters()))
        # Equal weights; a matrix product of the CPU library may still differ in the last bit from call to call.
        torch.testing.assert_close(scored.logprobs, scored.ref_logprobs, rtol=0.0, atol=1e-6)


def test_the_first_rollout_logs_a_kl_of_0_and_the_next_one_does_not(
    make: Callable[..., Watching], prompts: PromptBatch, fit: Callable[..., Any]
) -> None:
    logged = fit(make(), [prompts], max_epochs=2)
    for name in ("ppo/kl", "ppo/kl_per_token", "ppo/kl_k3"):
        assert logged[name][0] == pytest.approx(0.0, abs=1e-5)
    assert abs(logged["ppo/kl"][1]) > 1e-3


def test_with_a_learning_rate_of_0_the_ratio_stays_1_and_no_weight_moves(
    make: Callable[..., Watching], prompts: PromptBatch, fit: Callable[..., Any], weights: Callable[..., Weights]
) -> None:
    module = make(learning_rate=0.0, critic_learning_rate=0.0, ppo_epochs=3)
    before = weights(module)
    logged = fit(module, [prompts], max_epochs=2)
    assert not differ(weights(module), before)
    assert max(logged["ppo/approx_kl"]) < 1e-10
    assert logged["ppo/clip_fraction"] == [0.0, 0.0]
    assert logged["ppo/ratio"] == pytest.approx([1.0, 1.0], abs=1e-5)
    assert logged["ppo/kl"] == pytest.approx([0.0, 0.0], abs=1e-5)


def test_dropout_of_the_networks_has_no_part(policy: Callable[..., Any], tokenizer: Any, prompts: PromptBatch) -> None:
    network = policy("gpt2", resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5).train()
    module = PPOModule(network, reward=share_of_low_bytes, tokenizer=tokenizer, max_new_tokens=4)
    experience = experience_of(module, module.score(module.generate(prompts, 0)))
    ratio = module.losses(experience)["ratio"]
    torch.testing.assert_close(ratio, torch.ones_like(ratio), rtol=0, atol=1e-5)


def test_the_rollout_depends_on_seed_and_step_alone(make: Callable[..., Watching], prompts: PromptBatch) -> None:
    first = make(seed=1).generate(prompts, 0).tokens
    torch.manual_seed(99)
    assert torch.equal(make(seed=1).generate(prompts, 0).tokens, first)
    assert not torch.equal(make(seed=2).generate(prompts, 0).tokens, first)
    assert not torch.equal(make(seed=1).generate(prompts, 1).tokens, first)


@pytest.mark.parametrize("critic", ["separate", "shared_trunk"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_without_rescoring_the_ratio_starts_from_what_tokens_were_drawn_with(
    critic: str,
    temperature: float,
    make: Callable[..., Watching],
    prompts: PromptBatch,
    fit: Callable[..., Any],
    weights: Callable[..., Weights],
) -> None:
    logged, moved, scored = [], [], []
    for rescore in (True, False):
        module = make("gpt2", rescore=rescore, critic=critic, temperature=temperature)
        logged.append(fit(module, [prompts], max_epochs=3))
        moved.append(weights(module))
        scored.append(module.scored_rollout)
    drawn = module.generate(prompts, 2)
    with torch.no_grad():
        module.policy.lm_head.weight.fill_(float("nan"))
    # The policy is not read: its scores are not even numbers by now.
    known = module.score(drawn, logprobs=drawn.sampler_logprobs)
    assert torch.equal(known.logprobs, drawn.sampler_logprobs)
    assert known.ref_logprobs.isfinite().all()
    read = module.score(drawn)
    assert read.logprobs[drawn.response_mask].isnan().all()
    # Nor is a critic on its trunk, whose values are those of the sampler's steps.
    assert (drawn.sampler_values is not None) == (critic == "shared_trunk")
    of_steps = module.score(drawn, logprobs=drawn.sampler_logprobs, values=drawn.sampler_values).values
    torch.testing.assert_close(of_steps, read.values, rtol=0, atol=1e-5)
    assert torch.equal(of_steps, read.values) == (critic != "shared_trunk")
    torch.testing.assert_close(scored[1].values, scored[0].values, rtol=0, atol=1e-5)
    assert torch.equal(scored[0].tokens, scored[1].tokens)
    torch.testing.assert_close(scored[1].logprobs, scored[0].logprobs, rtol=0, atol=1e-5)
    assert not torch.equal(scored[1].logprobs, scored[0].logprobs)
    assert_close(moved[1], moved[0], rtol=0, atol=1e-4)
    for name in ("ppo/kl", "ppo/policy_loss", "ppo/value_loss", "ppo/clip_fraction"):
        assert logged[1][name] == pytest.approx(logged[0][name], abs=1e-3)


def test_the_sampler_of_transformers_gives_rollouts_whose_first_ratio_is_1(
    make: Callable[..., Watching], prompts: PromptBatch, fit: Callable[..., Any]
) -> None:
    module = make(sampler="transformers", ppo_epochs=1, minibatch_size=len(prompts), preflight=True)
    logged = fit(module, [prompts], max_epochs=1)
    sampled = module.scored_rollout
    assert sampled is not None
    assert logged["ppo/ratio"] == pytest.approx([1.0])
    ours = make(ppo_epochs=1)
    fit(ours, [prompts], max_epochs=1)
    # Another loop draws other responses.
    assert ours.scored_rollout is not None
    assert ours.scored_rollout.responses != sampled.responses


def merging_tokenizer() -> PreTrainedTokenizerFast:
    """Letters and all pairs of them: a text is written with as few pairs as there are, whatever it was read from."""
    pairs = [("a", "a"), ("a", "b"), ("b", "a"), ("b", "b")]
    tokens = ["<pad>", "<eos>", "a", "b", *map("".join, pairs)]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges=pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def test_the_sampled_ids_reach_the_loss_where_the_tokenizer_would_write_their_text_with_others(
    policy: Callable[..., Any], fit: Callable[..., Any]
) -> None:
    rows = [[2, 3], [3, 2, 2], [4], [5, 2], [2], [3, 3, 3]]
    batch = PromptBatch(
        prompt_tokens=torch.tensor([[0] * (3 - len(row)) + row for row in rows]),
        prompt_mask=torch.tensor([[False] * (3 - len(row)) + [True] * len(row) for row in rows]),
        prompts=[""] * 6,
        texts=[""] * 6,
        columns={},
    )
    network, tokenizer = policy(vocab_size=8), merging_tokenizer()
    noise = seeded_generator(0, 0, 0)
    sampled = sample_tokens(
        network,
        batch.prompt_tokens,
        batch.prompt_mask,
        max_new_tokens=8,
        temperature=1.0,
        stop_tokens=torch.tensor([1]),
        generator=noise,
    ).tokens.tolist()
    responses = [row[: row.index(1) + 1] if 1 in row else row for row in sampled]
    written = [tokenizer(tokenizer.decode(ids)).input_ids for ids in responses]
    assert sum(one != other for one, other in zip(written, responses, strict=True)) >= 3
    read: list[dict[str, Tensor]] = []

    def keep(_: Any, __: Any, inputs: dict[str, Tensor]) -> None:
        if torch.is_grad_enabled():
            read.append(inputs)

    network.register_forward_pre_hook(keep, with_kwargs=True)
    module = PPOModule(
        network,
        reward=share_of_low_bytes,
        tokenizer=tokenizer,
        minibatch_size=3,
        micro_batch_size=2,
        max_new_tokens=8,
        preflight=False,
    )
    fit(module, [batch], max_steps=1)
    found = {
        tuple(ids[mask.bool()].tolist())
        for inputs in read
        for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)
    }
    assert found == {tuple(prompt + response) for prompt, response in zip(rows, responses, strict=True)}


def test_the_numbers_of_a_seeded_generator_are_mixed() -> None:
    draws = {
        torch.randint(2**62, (1,), generator=seeded_generator(*numbers)).item()
        for numbers in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 1, 1), (1, 1, 0), (0, 0, -1)]
    }
    assert len(draws) == 7


# The clock -------------------------------------------------------------------


@pytest.mark.parametrize(("ppo_epochs", "minibatch_size"), [(1, 6), (2, 3), (3, 2)])
def test_steps_of_the_trainer_are_rollouts_with_epochs_times_minibatches_updates_each(
    ppo_epochs: int,
    minibatch_size: int,
    make: Callable[..., Watching],
    prompts: PromptBatch,
    fit: Callable[..., Any],
) -> None:
    module = make(ppo_epochs=ppo_epochs, minibatch_size=minibatch_size)
    logged = fit(module, [prompts] * 5, max_steps=3)
    updates = ppo_epochs * 6 // minibatch_size
    assert module.trainer.global_step == 3
    assert len(logged.steps) == 3
    assert logged["ppo/updates"] == [updates, 2 * updates, 3 * updates]
    assert len(module.raw) == 3 * updates
    states = module.trainer.optimizers[0].state.values()
    assert {int(state["step"]) for state in states} == {3 * updates}


def test_every_row_of_a_rollout_is_used_once_an_epoch(
    make: Callable[..., Watching], prompts: PromptBatch, fit: Callable[..., Any]
) -> None:
    module = make(ppo_epochs=3, minibatch_size=2)
    fit(module, [prompts], max_steps=1)
    prompt_rows = sorted(prompts.prompt_tokens.tolist())
    epochs = [module.minibatches[i : i + 3] for i in (0, 3, 6)]
    orders = []
    for epoch in epochs:
        rows = torch.cat([minibatch.tokens[:, :5] for minibatch in epoch]).tolist()
        assert sorted(rows) == prompt_rows
        orders.append(rows)
    assert orders[0] != orders[1] or orders[1] != orders[2]


def test_minibatches_are_drawn_anew_for_every_rollout(
    make: Callable[..., Watching], prompts: PromptBatch, fit: Callable[..., Any]
) -> None:
    module = make(ppo_epochs=1, minibatch_size=1)
    fit(module, [prompts], max_epochs=4)
    order = [tuple(minibatch.tokens[0, :5].tolist()) for minibatch in module.minibatches]
    assert len({tuple(order[i : i + 6]) for i in (0, 6, 12, 18)}) > 1


def test_the_learning_rates_fall_linearly_to_0_over_all_updates(
    make: Callable[..., Watching], prompts: PromptBatch, fit: Callable[..., Any]
) -> None:
    module = make(learning_rate=1e-3, critic_learning_rate=4e-3)
    logged = fit(module, [prompts] * 3, max_steps=3)
    for update, rates in enumerate(module.rates):
        assert rates == pytest.approx([1e-3 * (1 - update / 12), 4e-3 * (1 - update / 12)])
    assert len(module.rates) == 12
    assert logged["ppo/learning_rate"] == pytest.approx([1e-3 * (1 - u / 12) for u in (3, 7, 11)])


def test_the_warm_up_counts_rollouts_not_updates(
    make: Callable[..., Watching], prompts: PromptBatch, fit: Callable[..., Any]
) -> None:
    module = make(learning_rate=1e-3, critic_learning_rate=4e-3, warmup_steps=2, lr_schedule="constant")
    fit(module, [prompts] * 3, max_steps=3)
    # Of the four updates a rollout, eight are in the first two rollouts.
    assert [policy for policy, _ in module.rates] == pytest.approx([1e-3 * min(1, (u + 1) / 9) for u in range(12)])


def test_the_warm_up_begins_at_its_share_of_both_learning_rates(
    make: Callable[..., Watching], prompts: PromptBatch, fit: Callable[..., Any]
) -> None:
    warmup = {"warmup_steps": 2, "warmup_from": 0.2, "lr_schedule": "constant"}
    module = make(learning_rate=1e-3, critic_learning_rate=4e-3, **warmup)
    fit(module, [prompts] * 3, max_steps=3)
    factors = [min(1.0, 0.2 + 0.1 * update) for update in range(12)]
    assert module.rates == [pytest.approx([1e-3 * factor, 4e-3 * factor]) for factor in factors]


# What is learned -------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_losses_and_gradients_do_not_depend_on_the_size_of_the_micro_batch(
    kind: str, make: Callable[..., Watching], prompts: PromptBatch, fit: Callable[..., Any]
) -> None:
    found = {}
    for size in (1, 2, 4, 6):
        module = make(kind, ppo_epochs=1, minibatch_size=6, micro_batch_size=size)
        found[size] = (fit(module, [prompts], max_steps=1).steps[0], module.raw[0])
        lengths = module.scored_rollout.response_mask.sum(dim=1)
        assert lengths.float().std() > 0.5
    for size in (1, 2, 4):
        assert_close(found[size][1], found[6][1], rtol=1e-3, atol=1e-5)
        assert found[size][0] == pytest.approx(found[6][0], rel=1e-4, abs=1e-5)


def test_a_budget_of_tokens_bounds_every_forward_and_changes_no_gradient(
    make: Callable[..., Watching], prompts: PromptBatch, fit: Callable[..., Any]
) -> None:
    found, shapes = {}, {}
    for tokens in (None, 24, 1):
        module = make(ppo_epochs=1, minibatch_size=6, micro_batch_size=6, micro_batch_tokens=tokens)
        shapes[tokens] = []
        for network in (module.reference, module.critic.backbone):
            network.register_forward_pre_hook(
                lambda _, __, kwargs, seen=shapes[tokens]: seen.append(tuple(kwargs["input_ids"].shape)),
                with_kwargs=True,
            )
        with reading_padding():
            found[tokens] = (fit(module, [prompts], max_steps=1).steps[0], module.raw[0])
    for tokens in (24, 1):
        assert_close(found[tokens][1], found[None][1], rtol=1e-4, atol=1e-6)
        assert found[tokens][0] == pytest.approx(found[None][0], rel=1e-4, abs=1e-5)
    assert max(rows for rows, _ in shapes[1]) == 1
    assert {rows for rows, _ in shapes[None]} == {6}
    assert max(rows * width for rows, width in shapes[24] if rows > 1) <= 24
    assert len({rows for rows, _ in shapes[24]}) > 1


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_gradient_of_the_first_update_is_the_policy_gradient_and_the_value_regression(
    kind: str, make: Callable[..., Watching], prompts: PromptBatch, fit: Callable[..., Any]
) -> None:
    """At ratio 1 nothing is clipped: sequence by sequence, without padding, in plain autograd."""
    module = make(kind, ppo_epochs=1, minibatch_size=6, value_coef=0.3, temperature=0.8)
    policy, critic = deepcopy(module.policy), deepcopy(module.critic)
    fit(module, [prompts], max_steps=1)
    scored = module.scored_rollout
    experience = experience_of(module, scored)
    loss, count, states = torch.zeros(()), scored.response_mask.sum(), experience.value_mask.sum()
    assert states == count + 6
    for row in range(6):
        tokens = scored.tokens[row][scored.attention_mask[row]].unsqueeze(0)
        length = int(scored.response_mask[row].sum())
        before = slice(tokens.shape[1] - length - 1, tokens.shape[1] - 1)
        logprobs = (policy(tokens).logits[0, before] / 0.8).log_softmax(-1)
        chosen = logprobs[torch.arange(length), tokens[0, -length:]]
        values = critic(tokens, torch.ones_like(tokens).bool())[0, -length - 1 :]
        loss = loss - (experience.advantages[row, :length] * chosen).sum() / count
        loss = loss + 0.3 * 0.5 * (values - experience.returns[row, : length + 1]).square().sum() / states
    loss.backward()
    networks = {"policy": policy, "critic": critic}
    expected = {f"{role}.{name}": p.grad for role, n in networks.items() for name, p in n.named_parameters()}
    assert_close(module.raw[0], expected, rtol=1e-3, atol=1e-4)


def test_only_policy_and_critic_are_changed(
    make: Callable[..., Watching],
    classifier: Callable[..., Any],
    prompts: PromptBatch,
    fit: Callable[..., Any],
    weights: Callable[..., Weights],
) -> None:
    module = make(reward=classifier(seed=3))
    before = weights(module)
    fit(module, [prompts], max_epochs=2)
    after = weights(module)
    changed = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"policy", "critic"}
    frozen = [*module.reference.parameters(), *module.reward.parameters()]
    assert all(p.grad is None and not p.requires_grad for p in frozen)


def test_a_policy_that_came_frozen_is_trained(
    policy: Callable[..., Any], tokenizer: Any, prompts: PromptBatch, fit: Callable[..., Any]
) -> None:
    network = policy().requires_grad_(False)
    module = PPOModule(
        network, reward=share_of_low_bytes, tokenizer=tokenizer, minibatch_size=6, max_new_tokens=4, learning_rate=1e-2
    )
    before = network.lm_head.weight.clone()
    fit(module, [prompts], max_steps=1)
    assert not torch.equal(network.lm_head.weight, before)


def test_every_update_starts_from_gradients_of_0(
    make: Callable[..., Watching], prompts: PromptBatch, fit: Callable[..., Any]
) -> None:
    # Nothing moves and the minibatch is the whole rollout: all updates have the same gradient.
    module = make(learning_rate=0.0, critic_learning_rate=0.0, ppo_epochs=3, minibatch_size=6)
    fit(module, [prompts], max_steps=1)
    assert_close(module.raw[1], module.raw[0], rtol=1e-3, atol=1e-5)
    assert_close(module.raw[2], module.raw[0], rtol=1e-3, atol=1e-5)


def test_the_optimizer_is_adam_without_weight_decay_and_with_the_eps_of_huang_et_al(
    make: Callable[..., Watching],
) -> None:
    settings = make().configure_optimizers().defaults
    assert (settings["betas"], settings["eps"], settings["weight_decay"]) == ((0.9, 0.999), 1e-5, 0.0)


def test_every_trained_weight_gets_a_gradient(
    make: Callable[..., Watching], classifier: Callable[..., Any], prompts: PromptBatch, fit: Callable[..., Any]
) -> None:
    module = make(reward=classifier())
    fit(module, [prompts], max_steps=1)
    assert [name for name, gradient in module.raw[0].items() if not gradient.any()] == []


def test_gradients_of_policy_and_critic_are_clipped_each_by_its_own_norm(
    make: Callable[..., Watching], prompts: PromptBatch, fit: Callable[..., Any]
) -> None:
    limit = 0.05
    module = make(max_grad_norm=limit, value_coef=100.0)
    logged = fit(module, [prompts], max_steps=1)
    for raw, clipped in zip(module.raw, module.clipped, strict=True):
        for role in ("policy", "critic"):
            before = norm(raw, role)
            assert before > limit
            assert norm(clipped, role) == pytest.approx(limit, rel=1e-3)
    means = [sum(norm(raw, role) for raw in module.raw) / len(module.raw) for role in ("policy", "critic")]
    assert [logged["ppo/policy_grad_norm"][0], logged["ppo/critic_grad_norm"][0]] == pytest.approx(means, rel=1e-3)


def test_small_gradients_are_left_alone(
    make: Callable[..., Watching], prompts: PromptBatch, fit: Callable[..., Any]
) -> None:
    module = make(max_grad_norm=1e6)
    fit(module, [prompts], max_steps=1)
    assert_close(module.clipped[0], module.raw[0])


def test_the_critic_comes_from_a_reward_model_that_reads_the_policys_tokens_else_from_the_policy(
    make: Callable[..., Watching], classifier: Callable[..., Any], make_tokenizer: Callable[..., Any]
) -> None:
    reward_model = classifier(seed=5)
    module = make(reward=reward_model)
    assert isinstance(module.reward, ModelReward)
    assert torch.equal(module.critic.backbone.embed_tokens.weight, reward_model.model.embed_tokens.weight)
    assert torch.equal(module.critic.head.weight, reward_model.score.weight)
    other = make_tokenizer(pad_token="<eos>", eos_token="<pad>")
    for settings in ({"reward": share_of_low_bytes}, {"reward": reward_model, "reward_tokenizer": other}):
        module = make(**settings)
        assert torch.equal(module.critic.backbone.embed_tokens.weight, module.policy.model.embed_tokens.weight)


def test_a_reward_that_can_be_had_is_had(
    make: Callable[..., Watching], prompts: PromptBatch, fit: Callable[..., Any]
) -> None:
    module = make(
        reward=lambda prompts, responses: [float(sum("a" <= c <= "z" for c in text)) for text in responses],
        learning_rate=1e-2,
        critic_learning_rate=1e-2,
        max_new_tokens=8,
        missing_eos="subtract",
        beta=0.01,
        ppo_epochs=4,
        minibatch_size=24,
        micro_batch_size=24,
        lr_schedule="constant",
    )
    module.policy.generation_config.eos_token_id = 1
    batch = prompts.rows(torch.arange(6).repeat(8))
    scores = fit(module, [batch], max_epochs=20)["ppo/score"]
    # A tenth of the tokens are letters, and eight are the most that can be had.
    assert scores[0] < 3
    assert sum(scores[-3:]) / 3 > 6


def test_a_rollout_of_which_nothing_ended_is_said_to_teach_nothing(
    make: Callable[..., Watching], prompts: PromptBatch, fit: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    for missing_eos, said in (("replace", 1), ("mask", 1), ("subtract", 0)):
        module = make(missing_eos=missing_eos)
        module.policy.generation_config.eos_token_id = None
        module.tokenizer.eos_token = "\u00ff"
        caplog.clear()
        fit(module, [prompts], max_steps=1)
        assert caplog.text.count("cut off at max_new_tokens=6") == said


@pytest.mark.parametrize("settings", [{}, {"loss_mean": "sequences"}, {"advantage": "rloo", "samples_per_prompt": 2}])
def test_responses_that_were_cut_off_can_be_left_out_of_the_loss(
    settings: dict[str, Any], make: Callable[..., Watching], prompts: PromptBatch, fit: Callable[..., Any]
) -> None:
    """The gradient and its means are those of the others alone; the rollout's numbers are those of all."""
    module = make(
        missing_eos="mask", ppo_epochs=1, minibatch_size=6 * settings.get("samples_per_prompt", 1), beta=0.3, **settings
    )
    before = deepcopy(module)
    logged = fit(module, [prompts], max_steps=1).steps[0]
    scored, whole = module.scored_rollout, module.minibatches[0]
    learned = whole.response_mask.any(dim=1)
    assert learned.sum() == scored.ended.sum() > 1
    assert not scored.ended.all()
    assert torch.equal(whole.value_mask.any(dim=1), learned)
    kept = whole.rows(learned.nonzero().squeeze(1))
    before.minibatches, before.raw, before.clipped, before.rates, before.micro_batch_size = [], [], [], [], 2

    class OfTheRest(Watching):
        def training_step(self, batch: PromptBatch, batch_idx: int) -> None:
            self.metrics = self._accumulate_gradients(kept)
            self.optimizers().step()

    before.__class__ = OfTheRest
    fit(before, [prompts], max_steps=1)
    assert_close(module.raw[0], before.raw[0], rtol=1e-3, atol=1e-5)
    found = {name: logged[f"ppo/{name}"] for name in before.metrics}
    assert found == pytest.approx({name: float(x) for name, x in before.metrics.items()}, rel=1e-3, abs=1e-5)
    assert logged["ppo/response_length"] == pytest.approx(scored.response_mask.sum(dim=1).float().mean().item())
    assert logged["ppo/score"] == pytest.approx(scored.scores.mean().item())
    assert logged["ppo/missing_eos_part"] == 0.0


@pytest.mark.parametrize("settings", [{}, {"loss_mean": "sequences", "kl_penalty": "loss_k1", "entropy_coef": 0.1}])
def test_where_all_that_would_be_learned_from_is_left_out_nothing_moves(
    settings: dict[str, Any],
    make: Callable[..., Watching],
    prompts: PromptBatch,
    fit: Callable[..., Any],
    weights: Callable[..., Weights],
) -> None:
    module = make(missing_eos="mask", **settings)
    module.policy.generation_config.eos_token_id = None
    module.tokenizer.eos_token = "\u00ff"
    before = weights(module)
    logged = fit(module, [prompts], max_steps=1).steps[0]
    assert logged["ppo/missing_eos"] == 1.0
    assert all(torch.isfinite(torch.tensor(list(logged.values()))))
    assert not any(gradient.any() for gradient in module.raw[0].values())
    assert not differ(weights(module), before)


KNOBS: list[dict[str, Any]] = [
    {"reward": lambda prompts, responses: [float(len(text)) for text in responses]},
    {"beta": 1.0},
    {"gamma": 0.5},
    {"lam": 0.3},
    {"clip_range": 0.01},
    {"value_clip_range": 0.001},
    {"value_coef": 1.0},
    {"ppo_epochs": 3},
    {"minibatch_size": 6},
    {"learning_rate": 5e-3},
    {"critic_learning_rate": 5e-3},
    {"lr_schedule": "constant"},
    {"lr_floor": 0.5},
    {"warmup_steps": 3},
    {"max_grad_norm": 1e-4},
    {"max_new_tokens": 3},
    {"temperature": 0.5},
    {"missing_eos_penalty": 5.0},
    {"missing_eos": "subtract"},
    {"missing_eos": "mask"},
    {"kl_penalty": "loss_k1", "beta": 1.0},
    {"kl_penalty": "loss_k2", "beta": 1.0},
    {"adaptive_kl_target": 0.01, "adaptive_kl_horizon": 10.0},
    {"adaptive_kl_horizon": 1.0, "adaptive_kl_target": 10000.0},
    {"normalize_scores": "scale"},
    {"normalize_scores": "scale_around_mean"},
    {"normalize_scores": "shift_and_scale"},
    {"score_clip": 0.1},
    {"length_penalty": 0.5},
    {"score_placement": "end_token"},
    {"advantage": "reinforce", "ppo_epochs": 1},
    {"samples_per_prompt": 2},
    {"loss_mean": "sequences"},
    {"entropy_coef": 0.5},
    {"target_kl": 1e-9},
    {"seed": 1},
]


@pytest.mark.parametrize("knob", KNOBS, ids=lambda knob: next(iter(knob)))
def test_every_setting_changes_what_is_learned(
    knob: dict[str, Any],
    make: Callable[..., Watching],
    prompts: PromptBatch,
    fit: Callable[..., Any],
    weights: Callable[..., Weights],
) -> None:
    rates = {"learning_rate": 1e-2, "critic_learning_rate": 1e-2}
    default, other = make(**rates), make(**{**rates, **knob})
    for module in (default, other):
        fit(module, [prompts], max_epochs=2)
    assert differ(weights(default), weights(other))


def test_the_size_of_the_micro_batch_bounds_the_rows_of_every_training_forward(
    make: Callable[..., Watching], classifier: Callable[..., Any], prompts: PromptBatch, fit: Callable[..., Any]
) -> None:
    for size in (1, 3):
        rows: list[int] = []
        module = make(micro_batch_size=size, reward=classifier())
        for network in (module.reference, module.critic.backbone, module.reward.reward_model):
            network.register_forward_pre_hook(
                lambda _, __, kwargs, rows=rows: rows.append(len(kwargs["input_ids"])), with_kwargs=True
            )
        fit(module, [prompts], max_steps=1)
        assert max(rows) == size


def test_the_same_seed_twice_gives_equal_weights(
    make: Callable[..., Watching], prompts: PromptBatch, fit: Callable[..., Any], weights: Callable[..., Weights]
) -> None:
    found = []
    for noise in (0, 1):
        module = make()
        torch.manual_seed(noise)  # what else the process draws has no part in it
        fit(module, [prompts], max_epochs=2)
        found.append(weights(module))
    assert not differ(*found)


# What is logged --------------------------------------------------------------


def test_what_is_logged_of_a_rollout_is_what_the_rollout_says(
    make: Callable[..., Watching], prompts: PromptBatch, fit: Callable[..., Any]
) -> None:
    module = make(learning_rate=1e-2, beta=0.3, missing_eos="subtract", missing_eos_penalty=2.0)
    logged = fit(module, [prompts], max_epochs=2).steps[1]
    scored = module.scored_rollout
    lengths = scored.response_mask.sum(dim=1).tolist()
    ratios = [(scored.logprobs - scored.ref_logprobs)[row, :length].double() for row, length in enumerate(lengths)]
    kl = sum(float(r.sum()) for r in ratios) / 6
    missing = sum(not ended for ended in scored.ended.tolist()) / 6
    assert 0 < missing < 1
    assert logged["ppo/score"] == pytest.approx(scored.scores.mean().item())
    assert logged["ppo/kl"] == pytest.approx(kl, rel=1e-4)
    assert logged["ppo/kl_per_token"] == pytest.approx(kl * 6 / sum(lengths), rel=1e-4)
    assert logged["ppo/kl_k3"] == pytest.approx(sum(float(((-r).exp() - 1 + r).sum()) for r in ratios) / 6, rel=1e-4)
    assert logged["ppo/response_length"] == pytest.approx(sum(lengths) / 6)
    assert logged["ppo/missing_eos"] == pytest.approx(missing)
    assert logged["ppo/reward"] == pytest.approx(scored.scores.mean().item() - 2.0 * missing - 0.3 * kl, rel=1e-4)
    experience = experience_of(module, scored)
    kept = experience.value_mask
    errors, returns = (experience.returns - experience.old_values)[kept], experience.returns[kept]
    explained = 1 - errors.var() / returns.var()
    assert logged["ppo/explained_variance"] == pytest.approx(explained.item(), rel=1e-3)


@pytest.mark.parametrize("rescore", [True, False])
def test_how_far_sampler_and_trainer_are_apart_is_logged_where_both_are_known(
    rescore: bool, make: Callable[..., Watching], prompts: PromptBatch, fit: Callable[..., Any]
) -> None:
    class Hasty(Watching):
        """Its sampler gives every token a nat too much."""

        def generate(self, batch: PromptBatch, draw: int) -> SampledRollout:
            drawn = super().generate(batch, draw)
            return replace(drawn, sampler_logprobs=drawn.sampler_logprobs + drawn.response_mask.float())

    module, hasty = make(rescore=rescore), make(rescore=rescore)
    hasty.__class__ = Hasty
    logged, of_hasty = (fit(each, [prompts], max_steps=1).steps[0] for each in (module, hasty))
    if rescore:
        assert 0 <= logged["ppo/sampler_gap"] < 1e-5
        assert of_hasty["ppo/sampler_gap"] == pytest.approx(1, abs=1e-5)
    else:
        assert not {"ppo/sampler_gap"} & (logged.keys() | of_hasty.keys())


def test_the_entropy_is_the_mean_over_response_tokens(
    make: Callable[..., Watching], prompts: PromptBatch, fit: Callable[..., Any]
) -> None:
    module = make(learning_rate=0.0, temperature=0.7, ppo_epochs=1, minibatch_size=6)
    logged = fit(module, [prompts], max_steps=1)
    scored, found = module.scored_rollout, []
    for row in range(6):
        tokens = scored.tokens[row][scored.attention_mask[row]].unsqueeze(0)
        length = int(scored.response_mask[row].sum())
        logits = module.policy(tokens).logits[0, -length - 1 : -1] / 0.7
        found.append(torch.distributions.Categorical(logits=logits).entropy())
    assert logged["ppo/entropy"] == pytest.approx([torch.cat(found).mean().item()], rel=1e-4)


def test_more_padding_changes_no_logged_number(
    make: Callable[..., Watching], prompts: PromptBatch, fit: Callable[..., Any]
) -> None:
    pads = torch.zeros(6, 10)
    wider = PromptBatch(
        **{
            **vars(prompts),
            "prompt_tokens": torch.cat([pads.long(), prompts.prompt_tokens], dim=1),
            "prompt_mask": torch.cat([pads.bool(), prompts.prompt_mask], dim=1),
        }
    )
    narrow_logged, wide_logged = (fit(make(), [batch], max_steps=1).steps[0] for batch in (prompts, wider))
    assert wide_logged == pytest.approx(narrow_logged, rel=1e-3, abs=1e-5)


def test_every_number_of_the_contract_is_logged(
    make: Callable[..., Watching], prompts: PromptBatch, fit: Callable[..., Any]
) -> None:
    logged = fit(make(), [prompts], max_steps=1, val=[prompts]).steps[0]
    names = [
        *("score", "kl", "kl_per_token", "reward", "entropy", "response_length", "missing_eos", "policy_loss"),
        *("value_loss", "clip_fraction", "value_clip_fraction", "approx_kl", "explained_variance"),
        *("learning_rate", "updates"),
    ]
    assert {f"ppo/{name}" for name in names} <= set(logged)


def test_validation_samples_the_same_responses_every_time_and_does_not_disturb_training(
    make: Callable[..., Watching],
    prompts: PromptBatch,
    fit: Callable[..., Any],
    validate: Callable[..., Any],
    weights: Callable[..., Weights],
) -> None:
    module = make()
    first, again = (validate(module, [prompts, prompts.rows(torch.tensor([0, 3]))]) for _ in range(2))
    assert first == again
    assert first["ppo/val_kl"] == pytest.approx(0.0, abs=1e-5)
    plain, validated = make(), make()
    fit(plain, [prompts], max_epochs=2)
    fit(validated, [prompts], max_epochs=2, val=[prompts])
    assert not differ(weights(plain), weights(validated))


# Without a critic ------------------------------------------------------------

ESTIMATORS: list[dict[str, Any]] = [
    {"advantage": "reinforce", "ppo_epochs": 1},
    {"advantage": "rloo", "samples_per_prompt": 2},
    {"advantage": "grpo", "samples_per_prompt": 2},
]


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=lambda estimator: estimator["advantage"])
def test_the_other_estimators_train_without_a_critic(
    estimator: dict[str, Any],
    make: Callable[..., Watching],
    classifier: Callable[..., Any],
    prompts: PromptBatch,
    fit: Callable[..., Any],
) -> None:
    module = make(**estimator, reward=classifier(seed=3))
    logged = fit(module, [prompts], max_epochs=2).steps[1]
    assert module.critic is None
    assert {name.split(".")[0] for name in module.state_dict()} == {"policy"}
    assert len(module.trainer.optimizers[0].param_groups) == 1
    critics = {"value_loss", "value_clip_fraction", "explained_variance", "critic_grad_norm"}
    assert not {f"ppo/{name}" for name in critics} & set(logged)
    assert {"ppo/policy_loss", "ppo/policy_grad_norm", "ppo/kl"} <= set(logged)
    assert differ(module.state_dict(), make(**estimator, reward=classifier(seed=3)).state_dict())


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=lambda estimator: estimator["advantage"])
def test_the_other_estimators_have_a_reward_that_can_be_had(
    estimator: dict[str, Any], make: Callable[..., Watching], prompts: PromptBatch, fit: Callable[..., Any]
) -> None:
    samples = estimator.get("samples_per_prompt", 1)
    module = make(
        reward=lambda prompts, responses: [float(sum("a" <= c <= "z" for c in text)) for text in responses],
        learning_rate=1e-2,
        max_new_tokens=8,
        missing_eos="subtract",
        beta=0.01,
        minibatch_size=24,
        micro_batch_size=24,
        lr_schedule="constant",
        **{"ppo_epochs": 4, **estimator},
    )
    module.policy.generation_config.eos_token_id = 1
    batch = prompts.rows(torch.arange(6).repeat(8 // samples if samples > 1 else 4))
    scores = fit(module, [batch], max_epochs=16)["ppo/score"]
    assert sum(scores[-3:]) / 3 > 2 * scores[0] > 0


def test_the_samples_of_a_prompt_are_neighbours_and_differ(
    make: Callable[..., Watching], prompts: PromptBatch, fit: Callable[..., Any]
) -> None:
    module = make(samples_per_prompt=4, minibatch_size=24, max_new_tokens=6)
    fit(module, [prompts], max_steps=1)
    scored = module.scored_rollout
    assert len(scored) == 24
    for prompt in range(6):
        rows = range(4 * prompt, 4 * prompt + 4)
        assert all(torch.equal(scored.prompt_tokens[row], prompts.prompt_tokens[prompt]) for row in rows)
        assert [scored.prompts[row] for row in rows] == [prompts.prompts[prompt]] * 4
        assert len({tuple(scored.response_tokens[row].tolist()) for row in rows}) == 4


def test_minibatches_must_divide_prompts_times_samples(
    make: Callable[..., Watching], prompts: PromptBatch, fit: Callable[..., Any]
) -> None:
    fit(make(samples_per_prompt=2, minibatch_size=4, ppo_epochs=1), [prompts], max_steps=1)
    with pytest.raises(
        InputError, match=r"minibatch_size=5 must divide the rollout of 12 .*samples_per_prompt\): 4 or 6 would"
    ):
        fit(make(samples_per_prompt=2, minibatch_size=5), [prompts], max_steps=1)


# What changes from rollout to rollout ------------------------------------------


def test_beta_follows_the_kl_of_the_rollouts_and_is_in_the_checkpoint(
    tmp_path: Path, make: Callable[..., Watching], prompts: PromptBatch, fit: Callable[..., Any]
) -> None:
    module = make(beta=0.1, adaptive_kl_target=0.5, adaptive_kl_horizon=30.0, learning_rate=3e-3, ppo_epochs=4)
    logged = fit(module, [prompts], max_epochs=6)
    beta, expected = 0.1, []
    for kl in logged["ppo/kl"]:
        expected.append(beta)  # what the rollout was made with
        beta *= 1 + min(max(kl / 0.5 - 1, -0.2), 0.2) * 6 / 30
    assert logged["ppo/beta"] == pytest.approx(expected, rel=1e-5)
    assert module.beta == pytest.approx(beta, rel=1e-5)
    assert expected[1] == pytest.approx(0.1 * 0.96)  # no KL yet: cheaper
    assert any(later > earlier for earlier, later in pairwise(expected))  # too much of it: dearer
    module.trainer.save_checkpoint(tmp_path / "some.ckpt")
    assert torch.load(tmp_path / "some.ckpt", weights_only=True)["ppo"]["beta"] == module.beta


@pytest.mark.parametrize("kl_penalty", ["reward", "loss_k1", "loss_k2"])
def test_an_adaptive_beta_keeps_the_kl_nearer_to_its_target(
    kl_penalty: str, make: Callable[..., Watching], prompts: PromptBatch, fit: Callable[..., Any]
) -> None:
    batch = prompts.rows(torch.arange(6).repeat(4))
    found = {}
    for target in (None, 0.01):
        module = make(
            kl_penalty=kl_penalty,
            adaptive_kl_target=target,
            adaptive_kl_horizon=50.0,
            beta=0.2,
            learning_rate=1e-3,
            minibatch_size=24,
            micro_batch_size=24,
            lr_schedule="constant",
        )
        found[target] = sum(fit(module, [batch], max_epochs=32)["ppo/kl_k3"][-4:]) / 4
    assert found[0.01] < 0.85 * found[None]


def test_a_policy_that_moved_too_far_is_not_updated_again_with_the_same_rollout(
    make: Callable[..., Watching], prompts: PromptBatch, fit: Callable[..., Any]
) -> None:
    free = make(ppo_epochs=4, learning_rate=1e-2)
    fit(free, [prompts], max_steps=1)
    moved: list[float] = []

    class Told(Watching):
        def _accumulate_gradients(self, minibatch: Experience) -> dict[str, Tensor]:
            metrics = super()._accumulate_gradients(minibatch)
            moved.append(float(metrics["approx_kl"]))
            return metrics

    module = make(ppo_epochs=4, learning_rate=1e-2, target_kl=1e-4)
    module.__class__ = Told
    logged = fit(module, [prompts] * 3, max_steps=3)
    ends = [int(updates) for updates in logged["ppo/updates"]]
    assert module.trainer.global_step == 3
    assert ends[-1] == len(module.raw) == len(moved) < 3 * 8
    for first, end in zip([0, *ends], ends, strict=False):
        of_rollout = moved[first:end]
        # The last one is the first that was too far, unless none was.
        assert all(kl <= 1e-4 for kl in of_rollout[:-1])
        assert of_rollout[-1] > 1e-4 or len(of_rollout) == 8
    assert ends[0] < 8
    # Until then nothing differs from a run without the limit.
    assert_close(module.raw[0], free.raw[0], rtol=1e-5, atol=1e-6)


def test_the_schedule_runs_over_the_planned_updates_whether_or_not_they_are_made(
    make: Callable[..., Watching], prompts: PromptBatch, fit: Callable[..., Any]
) -> None:
    module = make(target_kl=1e-12, learning_rate=1e-3)
    logged = fit(module, [prompts] * 3, max_steps=3)
    assert logged["ppo/updates"] == [2, 4, 6]  # the first is never too far
    assert [policy for policy, _ in module.rates] == pytest.approx(
        [1e-3 * (1 - update / 12) for update in (0, 1, 4, 5, 8, 9)]
    )


def test_the_moving_average_moves_once_a_rollout_and_is_what_is_exported(
    tmp_path: Path,
    make: Callable[..., Watching],
    prompts: PromptBatch,
    fit: Callable[..., Any],
    weights: Callable[..., Weights],
) -> None:
    from transformers import AutoModelForCausalLM

    snapshots: list[Weights] = []

    class Snapshots(Watching):
        def training_step(self, batch: PromptBatch, batch_idx: int) -> None:
            super().training_step(batch, batch_idx)
            snapshots.append(weights(self.policy))

    module = make(ema_decay=0.9, learning_rate=1e-2)
    module.__class__ = Snapshots
    expected = weights(module.policy)
    assert not differ(weights(module.ema), expected)
    fit(module, [prompts], max_epochs=3)
    for snapshot in snapshots:
        expected = {name: 0.9 * average + 0.1 * snapshot[name] for name, average in expected.items()}
    assert_close(weights(module.ema), expected, rtol=1e-5, atol=1e-6)
    assert differ(weights(module.ema), weights(module.policy))
    assert {name.split(".")[0] for name in module.state_dict()} == {"policy", "critic", "ema"}
    assert all(p.grad is None and not p.requires_grad for p in module.ema.parameters())
    module.save_pretrained(tmp_path)
    tokens = torch.tensor([[5, 9, 7]])
    exported = AutoModelForCausalLM.from_pretrained(tmp_path)(tokens).logits
    torch.testing.assert_close(exported, module.ema(tokens).logits)
    assert not torch.allclose(exported, module.policy(tokens).logits)


def test_the_moving_average_does_not_change_what_is_learned(
    make: Callable[..., Watching], prompts: PromptBatch, fit: Callable[..., Any], weights: Callable[..., Weights]
) -> None:
    plain, averaged = make(), make(ema_decay=0.5)
    for module in (plain, averaged):
        fit(module, [prompts], max_epochs=2)
    assert not differ(weights(plain.policy), weights(averaged.policy))


def test_the_repetition_penalty_reaches_the_reward(
    make: Callable[..., Watching], prompts: PromptBatch, fit: Callable[..., Any]
) -> None:
    module = make(repetition_penalty=2.0, max_new_tokens=12, learning_rate=0.0, critic_learning_rate=0.0)
    module.policy.generation_config.eos_token_id = 1
    with torch.no_grad():  # one token is all but certain, so that it is repeated
        module.policy.lm_head.weight[70] = module.policy.lm_head.weight[70] * 0 + 20 * module.policy.lm_head.weight[70]
    logged = fit(module, [prompts], max_steps=1).steps[0]
    parts = ("shaped_score", "missing_eos_part", "length_part", "repetition_part", "kl_part")
    assert logged["ppo/repetition_part"] < 0
    assert logged["ppo/reward"] == pytest.approx(sum(logged[f"ppo/{part}"] for part in parts), abs=1e-5)


def test_a_bonus_for_entropy_leaves_more_of_it(
    make: Callable[..., Watching], prompts: PromptBatch, fit: Callable[..., Any]
) -> None:
    found = []
    for entropy_coef in (0.0, 5.0):
        module = make(entropy_coef=entropy_coef, learning_rate=3e-3, ppo_epochs=4, lr_schedule="constant")
        found.append(fit(module, [prompts], max_epochs=4)["ppo/entropy"])
    assert found[0][0] == pytest.approx(found[1][0], rel=0.1)
    assert found[1][-1] > found[0][-1] + 0.1


# Checkpoints -----------------------------------------------------------------


REWARDS = ["function", "held classifier", "folder"]


@pytest.fixture
def rewards(tmp_path: Path, classifier: Callable[..., Any], tokenizer: Any) -> dict[str, Any]:
    """One of each kind of reward."""
    save_pretrained(classifier(seed=3), tokenizer, tmp_path / "reward")
    return dict(zip(REWARDS, (share_of_low_bytes, classifier(seed=3), tmp_path / "reward"), strict=True))


@pytest.mark.parametrize("reward", REWARDS)
def test_a_checkpoint_holds_policy_and_critic_and_no_frozen_weights(
    reward: str, rewards: dict[str, Any], make: Callable[..., Watching]
) -> None:
    assert {name.split(".")[0] for name in make(reward=rewards[reward]).state_dict()} == {"policy", "critic"}


@pytest.mark.parametrize("reward", REWARDS)
def test_a_run_goes_on_from_its_checkpoint_bit_for_bit(
    reward: str,
    rewards: dict[str, Any],
    tmp_path: Path,
    make: Callable[..., Watching],
    prompts: PromptBatch,
    fit: Callable[..., Any],
    weights: Callable[..., Weights],
) -> None:
    whole, half, resumed = (make(lr_schedule="constant", reward=rewards[reward]) for _ in range(3))
    fit(whole, [prompts], max_epochs=4)
    fit(half, [prompts], max_epochs=2)
    half.trainer.save_checkpoint(tmp_path / "half.ckpt")
    fit(resumed, [prompts], max_epochs=4, ckpt_path=tmp_path / "half.ckpt")
    assert resumed.trainer.global_step == 4
    assert not differ(weights(resumed), weights(whole))
    assert differ(weights(whole), weights(half))


EVERYTHING: dict[str, Any] = {
    "normalize_scores": "shift_and_scale",
    "score_clip": 2.0,
    "length_penalty": 0.01,
    "repetition_penalty": 0.1,
    "adaptive_kl_target": 0.05,
    "adaptive_kl_horizon": 20.0,
    "ema_decay": 0.9,
    "ptx_coef": 0.5,
    "entropy_coef": 0.01,
    "target_kl": 0.01,
    "loss_mean": "sequences",
    "lr_schedule": "constant",
    "learning_rate": 3e-3,
}


@pytest.mark.parametrize(
    "estimator",
    [
        {"advantage": "gae", "samples_per_prompt": 2},
        {"advantage": "reinforce", "baseline": "running", "ppo_epochs": 1, "kl_penalty": "loss_k1"},
        {"advantage": "grpo", "samples_per_prompt": 2, "kl_penalty": "loss_k2"},
    ],
    ids=lambda estimator: estimator["advantage"],
)
def test_with_everything_on_a_run_goes_on_from_its_checkpoint_bit_for_bit(
    estimator: dict[str, Any],
    tmp_path: Path,
    make: Callable[..., Watching],
    tokenizer: Any,
    prompts: PromptBatch,
    fit: Callable[..., Any],
    weights: Callable[..., Weights],
) -> None:
    def texts() -> SFTDataModule:
        rows = [{"text": "abcdefg"[i] * (2 + i % 3)} for i in range(7)]
        return SFTDataModule(rows, tokenizer=tokenizer, batch_size=2, val_fraction=0.0)

    whole, half, resumed = (make(**{**EVERYTHING, **estimator, "ptx_data": texts()}) for _ in range(3))
    fit(whole, [prompts], max_epochs=4)
    logged = fit(half, [prompts], max_epochs=2)
    half.trainer.save_checkpoint(tmp_path / "half.ckpt")
    torch.manual_seed(99)
    again = fit(resumed, [prompts], max_epochs=4, ckpt_path=tmp_path / "half.ckpt")
    assert not differ(weights(resumed), weights(whole))
    assert differ(weights(whole), weights(half))
    rewards = ["seen_rewards"] if estimator["advantage"] == "reinforce" else []
    for name in ("beta", "updates", "seen_scores", *rewards):
        assert getattr(resumed, name) == getattr(whole, name) != getattr(half, name), name
    assert again["ppo/beta"][0] == pytest.approx(half.beta)
    assert again["ppo/beta"][0] != logged["ppo/beta"][0]


@pytest.mark.parametrize("role", ["policy", "critic"])
def test_a_checkpoint_without_a_trained_weight_is_refused(role: str, make: Callable[..., Watching]) -> None:
    state = make().state_dict()
    name = next(name for name in state if name.startswith(role))
    del state[name]
    with pytest.raises(InputError, match=rf"missing \['{name}'\]"):
        make().load_state_dict(state)


def test_a_checkpoint_with_an_unknown_weight_is_refused(make: Callable[..., Watching]) -> None:
    with pytest.raises(InputError, match=r"unexpected \['policy\.other'\]"):
        make().load_state_dict({**make().state_dict(), "policy.other": torch.zeros(1)})


def test_the_export_is_the_policy(tmp_path: Path, make: Callable[..., Watching]) -> None:
    from transformers import AutoModelForCausalLM

    module, tokens = make(), torch.tensor([[5, 9, 7]])
    module.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(tokens).logits, module.policy(tokens).logits)


# What cannot work ------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gradient_clip_val": 0.5}, r"gradient_clip_val=0\.5.*max_grad_norm=0\.5"),
        ({"accumulate_grad_batches": 2}, r"accumulate_grad_batches=2.*minibatch_size=.*micro_batch_size="),
    ],
)
def test_settings_of_the_trainer_that_cannot_work_name_those_of_the_module(
    settings: dict[str, Any],
    message: str,
    make: Callable[..., Watching],
    prompts: PromptBatch,
    fit: Callable[..., Any],
) -> None:
    with pytest.raises(InputError, match=message):
        fit(make(), [prompts], max_steps=1, **settings)


def test_a_minibatch_that_does_not_divide_the_rollout_is_an_input_error(
    make: Callable[..., Watching], prompts: PromptBatch, fit: Callable[..., Any]
) -> None:
    with pytest.raises(InputError, match="minibatch_size=4 must divide the rollout of 6 sequences"):
        fit(make(minibatch_size=4), [prompts], max_steps=1)


def test_a_rollout_longer_than_the_policys_positions_is_an_input_error(
    make: Callable[..., Watching], prompts: PromptBatch
) -> None:
    assert make("gpt2", max_new_tokens=59).generate(prompts.rows(torch.tensor([0])), 0) is not None
    with pytest.raises(InputError, match=r"a prompt of 5 tokens and max_new_tokens=60 need 65 positions.* has 64"):
        make("gpt2", max_new_tokens=60).generate(prompts, 0)


# Several processes -----------------------------------------------------------


@pytest.mark.parametrize("micro_batch_size", [1, 3])
def test_two_processes_have_the_gradient_and_metrics_of_one_with_both_rollouts(
    micro_batch_size: int,
    tmp_path: Path,
    make: Callable[..., Watching],
    prompts: PromptBatch,
    trainer: Callable[..., Any],
    make_loader: Callable[..., Any],
) -> None:
    sampled = make()
    both = experience_of(sampled, sampled.score(sampled.generate(prompts, 0)))
    by_length = both.response_mask.sum(dim=1).argsort()
    # The short responses on one process and the long ones on the other: uneven numbers of tokens.
    parts = {1: [both], 2: [both.rows(by_length[:3]), both.rows(by_length[3:])]}
    assert parts[2][0].response_mask.sum() != parts[2][1].response_mask.sum()

    class Fixed(Watching):
        def training_step(self, batch: PromptBatch, batch_idx: int) -> None:
            size, rank = self.trainer.world_size, self.global_rank
            metrics = self._accumulate_gradients(parts[size][rank])
            self.optimizers().step()
            drawn = self.generate(batch, 0).tokens
            found = {"gradients": self.raw[0], "metrics": metrics, "weights": self.state_dict(), "drawn": drawn}
            torch.save(found, tmp_path / f"{size}-{rank}.pt")

    for settings in ({}, {"strategy": "ddp_fork", "devices": 2}):
        module = make(micro_batch_size=micro_batch_size)
        module.__class__ = Fixed
        trainer(max_steps=1, **settings).fit(module, make_loader([prompts]))
    one, first, second = (torch.load(tmp_path / f"{name}.pt") for name in ("1-0", "2-0", "2-1"))
    assert_close(first["gradients"], one["gradients"], rtol=1e-3, atol=1e-5)
    assert_close(first["gradients"], second["gradients"], rtol=0, atol=0)
    assert_close(first["metrics"], one["metrics"], rtol=1e-4, atol=1e-5)
    assert not differ(first["weights"], second["weights"])
    assert torch.equal(first["drawn"], one["drawn"])
    assert not torch.equal(first["drawn"], second["drawn"])


def test_two_processes_train_one_policy_on_one_scale_of_advantages_and_log_means_over_both(
    tmp_path: Path,
    make: Callable[..., Watching],
    prompts: PromptBatch,
    trainer: Callable[..., Any],
    make_loader: Callable[..., Any],
) -> None:
    class Saving(Watching):
        def update(self, experience: Experience) -> dict[str, Tensor]:
            self.advantages = experience.advantages[experience.response_mask]
            return super().update(experience)

        def training_step(self, batch: PromptBatch, batch_idx: int) -> None:
            super().training_step(batch, batch_idx)
            logged = {name: float(value) for name, value in self.trainer.callback_metrics.items()}
            found = {
                "weights": self.state_dict(),
                "logged": logged,
                "scores": self.scored_rollout.scores,
                "advantages": self.advantages,
            }
            torch.save(found, tmp_path / f"{self.global_rank}.pt")

    module = make()
    module.__class__ = Saving
    trainer(max_steps=2, strategy="ddp_fork", devices=2).fit(module, make_loader([prompts] * 2))
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert not differ(first["weights"], second["weights"])
    assert differ(first["weights"], make().state_dict())
    assert first["logged"] == pytest.approx(second["logged"])
    expected = torch.cat([first["scores"], second["scores"]]).mean().item()
    assert first["logged"]["ppo/score"] == pytest.approx(expected)
    advantages = torch.cat([first["advantages"], second["advantages"]])
    assert advantages.mean().item() == pytest.approx(0.0, abs=1e-5)
    assert advantages.var(correction=0).item() == pytest.approx(1.0, abs=1e-4)
    assert abs(first["advantages"].mean().item()) > 1e-3


def test_two_processes_stop_together_and_keep_one_average_one_beta_and_one_scale_of_scores(
    tmp_path: Path,
    make: Callable[..., Watching],
    prompts: PromptBatch,
    trainer: Callable[..., Any],
    make_loader: Callable[..., Any],
) -> None:
    class Saving(Watching):
        def setup(self, stage: str) -> None:
            super().setup(stage)
            self.own: list[float] = []
            self.kls: list[float] = []

        def training_step(self, batch: PromptBatch, batch_idx: int) -> None:
            # Rollouts of different length on the two processes.
            half = batch.rows(torch.arange(3) + 3 * self.global_rank)
            self.max_new_tokens = 2 + 6 * self.global_rank
            super().training_step(half, batch_idx)
            self.kls.append(float(self.trainer.callback_metrics["ppo/kl"]))

        def _accumulate_gradients(self, minibatch: Experience) -> dict[str, Tensor]:
            own = [(part, self.losses(part)) for part in trimmed_micro_batches(minibatch, micro_batch_size=8)]
            self.own += [found["approx_kl"][part.response_mask].mean().item() for part, found in own]
            return super()._accumulate_gradients(minibatch)

        def on_train_end(self) -> None:
            state = {"beta": self.beta, "updates": self.updates, "seen": vars(self.seen_scores)}
            found = {"own": self.own, "kls": self.kls, "state": state, "weights": self.state_dict()}
            torch.save(found | {"rollouts": self.trainer.global_step}, tmp_path / f"{self.global_rank}.pt")

    def run(target_kl: float | None) -> list[Any]:
        module = make(
            learning_rate=3e-3,
            ppo_epochs=4,
            minibatch_size=3,
            target_kl=target_kl,
            ema_decay=0.9,
            adaptive_kl_target=0.1,
            adaptive_kl_horizon=20.0,
            normalize_scores="shift_and_scale",
        )
        module.__class__ = Saving
        trainer(max_steps=2, strategy="ddp_fork", devices=2).fit(module, make_loader([prompts] * 2))
        return [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]

    # Before the second update one process is farther than the limit, and the other is not.
    limit = sum(rank["own"][1] for rank in run(None)) / 2
    first, second = run(limit)
    assert (first["own"][1] > limit) != (second["own"][1] > limit)
    assert first["rollouts"] == second["rollouts"] == 2
    assert first["state"] == second["state"]
    assert first["state"]["updates"] < 8
    assert first["state"]["seen"]["count"] == 12
    beta = make().beta
    for kl in first["kls"]:
        # The six responses of both processes are the episodes.
        beta = adapted_beta(beta, kl, target=0.1, horizon=20.0, episodes=6)
    assert first["state"]["beta"] == pytest.approx(beta, rel=1e-5)
    assert not differ(first["weights"], second["weights"])
    assert {name.split(".")[0] for name in first["weights"]} == {"policy", "critic", "ema"}


def test_an_error_that_preflight_finds_on_one_process_stops_both(
    tmp_path: Path,
    make: Callable[..., Watching],
    prompts: PromptBatch,
    trainer: Callable[..., Any],
    make_loader: Callable[..., Any],
) -> None:
    class OneAstray(Watching):
        def on_train_batch_start(self, batch: PromptBatch, batch_idx: int) -> None:
            if self.global_rank == 1:
                for weight in self.reference.parameters():
                    weight += 0.1
            try:
                super().on_train_batch_start(batch, batch_idx)
            except InputError as error:
                (tmp_path / f"{self.global_rank}.txt").write_text(str(error))
                # The first that leaves ends the other: it waits for its message.
                patience = time.monotonic() + 20
                while not (tmp_path / f"{1 - self.global_rank}.txt").exists() and time.monotonic() < patience:
                    time.sleep(0.05)
                raise

    module = make(preflight=True)
    module.__class__ = OneAstray
    with pytest.raises(ProcessRaisedException, match="preflight found"):
        trainer(max_steps=1, strategy="ddp_fork", devices=2).fit(module, make_loader([prompts]))
    healthy, astray = ((tmp_path / f"{rank}.txt").read_text() for rank in (0, 1))
    assert "KL to the reference" in astray
    assert "on rank 1: KL to the reference" in healthy
