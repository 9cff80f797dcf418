"""The estimate of memory against the peak of real runs, as the allocator of the CPU saw it."""

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Trainer
from torch.profiler import profile
from torch.utils.data import DataLoader
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from rlhf_lightning.modules import PPOModule, RewardModule, SFTModule
from rlhf_lightning.networks import LoRA, NetworkConfig
from rlhf_lightning.preflight.memory import Estimate, check_memory
from rlhf_lightning.preflight.phases import ppo_memory, sampling_memory, supervised_memory
from rlhf_lightning.rollout.generate import sample_tokens
from rlhf_lightning.types import ComparisonBatch, PromptBatch, SFTBatch

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*have no `val_dataloader`.*"),
]

CPU = torch.device("cpu")
OFF = 0.05
"""By how much of the measured peak an estimate may be off."""
SIZES: dict[str, dict[str, int]] = {
    "wide vocabulary": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 4096},
    "deep": {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "vocab_size": 512},
    "wide": {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 2, "vocab_size": 2048},
}
OTHERS = {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": None}
BATCH, PROMPT, NEW = 8, 32, 8


@pytest.fixture(params=["wide vocabulary", *(pytest.param(name, marks=pytest.mark.proof) for name in ("deep", "wide"))])
def config(request: pytest.FixtureRequest) -> LlamaConfig:
    """A network of one of three sizes that never ends a response: its rollouts have full length."""
    return LlamaConfig(**SIZES[request.param], **OTHERS, eos_token_id=1)  # type: ignore[arg-type]


def quiet(**settings: Any) -> Trainer:
    return Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
    )


def measured(module: Any, batch: Any, trainer: Trainer) -> int:
    """Return the largest number of bytes of weights and all that was allocated beside them in training."""
    batches: Any = DataLoader([batch] * 2 * trainer.accumulate_grad_batches, batch_size=None, collate_fn=lambda x: x)  # type: ignore[arg-type]
    there = sum(p.nbytes for p in module.parameters())
    return there + peak_of(lambda: trainer.fit(module, batches))


def peak_of(work: Callable[[], Any]) -> int:
    """Return the largest number of bytes that was allocated in a piece of work."""
    # What is forgotten while it is measured would be taken off.
    gc.collect()
    with profile(profile_memory=True) as profiler:
        work()
    now = peak = 0
    for event in profiler.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak


def len_of(prompts: list[str], responses: list[str]) -> list[float]:
    return [float(len(response)) for response in responses]


def ppo_estimate(module: PPOModule) -> Estimate:
    return ppo_memory(module, CPU, sequences=BATCH, prompt_length=PROMPT)


def prompts(config: LlamaConfig) -> PromptBatch:
    tokens = torch.randint(2, config.vocab_size, (BATCH, PROMPT), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(tokens, dtype=torch.bool)
    mask[::2, 0] = False
    texts = ["a"] * BATCH
    return PromptBatch(tokens, mask, prompts=texts, texts=texts, columns={})


def sequences(config: LlamaConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids and a mask whose rows are padded on the right."""
    length = PROMPT + NEW
    tokens = torch.randint(2, config.vocab_size, (BATCH, length), generator=torch.Generator().manual_seed(0))
    mask = torch.arange(length) < length - torch.arange(BATCH).unsqueeze(1)
    return tokens, mask


@pytest.mark.parametrize(
    ("kind", "sampler"), [("sliding", "builtin"), ("sliding", "transformers"), ("llama", "transformers")]
)
def test_sampling_with_a_cache_of_the_networks_own_takes_what_was_estimated(kind: str, sampler: Any) -> None:
    sizes: dict[str, Any] = {**SIZES["wide vocabulary"], **OTHERS, "head_dim": 64, "eos_token_id": 1}
    torch.manual_seed(0)
    if kind == "sliding":
        network: Any = MistralForCausalLM(MistralConfig(**sizes, sliding_window=48)).eval()
    else:
        network = LlamaForCausalLM(LlamaConfig(**sizes)).eval()
    batch, new = prompts(network.config), 120
    estimate, _ = sampling_memory(
        network, CPU, sequences=BATCH, prompt=PROMPT, new=new, temperature=1.0, sampler=sampler
    )

    def sample() -> None:
        noise = torch.Generator().manual_seed(0)
        stops = torch.zeros(0, dtype=torch.long)
        sample_tokens(
            network,
            batch.prompt_tokens,
            batch.prompt_mask,
            max_new_tokens=new,
            temperature=1.0,
            stop_tokens=stops,
            generator=noise,
            sampler=sampler,
        )

    assert peak_of(sample) == pytest.approx(estimate.total, rel=0.15)


@pytest.mark.parametrize(("accumulate", "optimizer"), [(1, "adamw"), (2, "adamw_8bit"), (1, "muon")])
def test_fine_tuning_takes_what_was_estimated(
    config: LlamaConfig, accumulate: int, optimizer: Any, tokenizer: Any
) -> None:
    tokens, mask = sequences(config)
    batch = SFTBatch(tokens, mask, mask & (torch.arange(PROMPT + NEW) >= PROMPT))
    module = SFTModule(LlamaForCausalLM(config), tokenizer=tokenizer, optimizer=optimizer)
    module.trainer = trainer = quiet(accumulate_grad_batches=accumulate)
    estimate = supervised_memory(module, batch)
    assert estimate.peak == pytest.approx(measured(module, batch, trainer), rel=OFF)


def test_a_step_of_muon_takes_what_was_estimated(tokenizer: Any) -> None:
    config = LlamaConfig(**SIZES["wide"], **OTHERS)  # type: ignore[arg-type]
    few = torch.ones(1, 4, dtype=torch.long)
    batch = SFTBatch(few, few.bool(), few.bool())
    module = SFTModule(LlamaForCausalLM(config), tokenizer=tokenizer, optimizer="muon")
    module.trainer = trainer = quiet()
    estimate = supervised_memory(module, batch)
    assert estimate.work["stepping"].total > 2 * estimate.work["updating"].total
    assert estimate.peak == pytest.approx(measured(module, batch, trainer), rel=OFF)


def test_a_reward_model_takes_what_was_estimated(config: LlamaConfig, tokenizer: Any) -> None:
    tokens, mask = sequences(config)
    pairs = torch.arange(BATCH)
    batch = ComparisonBatch(tokens, mask, mask, pairs // 2, pairs % 2, torch.zeros(BATCH))
    config.num_labels = 1
    module = RewardModule(LlamaForSequenceClassification(config), tokenizer=tokenizer, shift_scores=False)
    module.trainer = trainer = quiet()
    estimate = supervised_memory(module, batch)
    assert estimate.peak == pytest.approx(measured(module, batch, trainer), rel=OFF)


@pytest.mark.parametrize("roles", ["separate", "shared_trunk", "shared"])
def test_ppo_takes_what_was_estimated(config: LlamaConfig, roles: str, tokenizer: Any, tmp_path: Path) -> None:
    policy: Any = LlamaForCausalLM(config)
    if roles == "shared":
        policy.save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)
        policy = NetworkConfig(str(tmp_path), lora=LoRA(r=4), roles="shared")
    module = PPOModule(
        policy,
        reward=len_of,
        tokenizer=tokenizer,
        critic="shared_trunk" if roles == "shared_trunk" else "separate",
        minibatch_size=BATCH,
        micro_batch_size=8 if config.num_hidden_layers == 2 else 3,
        ppo_epochs=1,
        max_new_tokens=NEW,
        preflight=False,
    )
    module.policy.generation_config.eos_token_id = 1
    estimate = ppo_estimate(module)
    assert estimate.peak == pytest.approx(measured(module, prompts(config), quiet()), rel=OFF)


def test_an_update_holds_one_network_at_a_time(tokenizer: Any) -> None:
    config = LlamaConfig(**SIZES["deep"], **OTHERS)  # type: ignore[arg-type]

    class InOneBackward(PPOModule):
        @property
        def passes(self) -> list[Any]:
            return [self.losses]

    apart, together = (
        ppo_estimate(
            module_class(LlamaForCausalLM(config), reward=len_of, tokenizer=tokenizer, max_new_tokens=NEW)
        ).work["updating"]
        for module_class in (PPOModule, InOneBackward)
    )
    # The critic's body is the policy's.
    assert apart.activations < 0.6 * together.activations


def test_work_that_is_decided_by_what_is_computed_is_not_known(config: LlamaConfig, tokenizer: Any) -> None:
    class Deciding(LlamaForCausalLM):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output = super().forward(*args, **kwargs)
            return output if output.logits.isfinite().all() else None

    module = PPOModule(Deciding(config), reward=len_of, tokenizer=tokenizer, max_new_tokens=NEW)
    estimate = ppo_estimate(module)
    assert estimate.work == {}
    assert "cannot be read without numbers" in check_memory(estimate, free=2**60).measured
    assert check_memory(estimate, free=2**60).status == "note"


def test_a_network_without_keys_and_values_is_not_known_and_trains(tokenizer: Any, tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"vocab_size": 300, "hidden_size": 16, "num_hidden_layers": 2}
    network = MambaForCausalLM(MambaConfig(**sizes, pad_token_id=0, bos_token_id=None, eos_token_id=1))
    module = PPOModule(
        network,
        reward=len_of,
        tokenizer=tokenizer,
        sampler="transformers",
        critic="shared_trunk",
        minibatch_size=BATCH,
        micro_batch_size=BATCH,
        max_new_tokens=NEW,
    )
    estimate = ppo_estimate(module)
    assert estimate.work == {}
    assert "keeps states of its own" in check_memory(estimate, free=2**60).measured
    before = {name: weight.clone() for name, weight in network.named_parameters()}
    texts = ["a"] * BATCH
    tokens = torch.randint(2, 300, (BATCH, PROMPT))
    batch = PromptBatch(tokens, torch.ones_like(tokens, dtype=torch.bool), prompts=texts, texts=texts, columns={})
    quiet(default_root_dir=tmp_path).fit(module, DataLoader([batch], batch_size=None, collate_fn=lambda x: x))  # type: ignore[arg-type]
    assert any(not torch.equal(weight, before[name]) for name, weight in network.named_parameters())


def test_an_estimate_leaves_nothing_behind(config: LlamaConfig, tokenizer: Any) -> None:
    module = PPOModule(LlamaForCausalLM(config), reward=len_of, tokenizer=tokenizer, max_new_tokens=NEW)
    before = {name: (id(p), p.detach().clone()) for name, p in [*module.named_parameters(), *module.named_buffers()]}
    state = torch.random.get_rng_state()
    ppo_estimate(module)
    for name, p in [*module.named_parameters(), *module.named_buffers()]:
        assert id(p) == before[name][0]
        assert torch.equal(p, before[name][1])
        assert p.grad is None
    assert torch.equal(torch.random.get_rng_state(), state)
