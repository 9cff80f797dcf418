"""Tiny networks with rotary (Llama) and absolute (GPT-2) positions, a tokenizer of bytes, and a small Trainer."""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch.utils.data import DataLoader
from transformers import (
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

from rlhf_lightning.modules import PPOModule
from rlhf_lightning.rollout.metrics import critic_metrics, rollout_metrics
from rlhf_lightning.rollout.shaping import RunningMoments, moments_of
from rlhf_lightning.types import Experience, PromptBatch, Rollout, ScoredRollout

VOCABULARY = 258
PATIENCE = 30
"""Seconds that processes wait for each other."""
# A wide initialisation: with the usual one all outputs are about equal, and a mistake would not show.
LLAMA: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "eos_token_id": 1,
}
GPT2: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "n_embd": 16,
    "n_layer": 2,
    "n_head": 2,
    "n_positions": 64,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
    "tie_word_embeddings": False,
}
LANGUAGE_MODELS = {"llama": (LlamaConfig, LLAMA, LlamaForCausalLM), "gpt2": (GPT2Config, GPT2, GPT2LMHeadModel)}
CLASSIFIERS = {
    "llama": (LlamaConfig, LLAMA, LlamaForSequenceClassification),
    "gpt2": (GPT2Config, GPT2, GPT2ForSequenceClassification),
}


def build(config_class: Any, settings: dict[str, Any], model_class: Any, seed: int = 0, **more: Any) -> Any:
    torch.manual_seed(seed)
    return model_class(config_class(**{**settings, "bos_token_id": None, **more})).eval()


@pytest.fixture
def policy() -> Callable[..., Any]:
    """``policy("llama" or "gpt2", **settings of the config)``."""
    return lambda kind="llama", **settings: build(*LANGUAGE_MODELS[kind], **settings)


@pytest.fixture
def classifier() -> Callable[..., Any]:
    """A reward model: the same with one label in place of the vocabulary."""
    return lambda kind="llama", **settings: build(*CLASSIFIERS[kind], **{"num_labels": 1, **settings})


def byte_tokenizer(**special_tokens: str) -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(["<pad>", "<eos>", *alphabet])}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special_tokens)


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """Pad 0, end 1, bytes from 2."""
    return byte_tokenizer(pad_token="<pad>", eos_token="<eos>")


@pytest.fixture
def make_tokenizer() -> Callable[..., PreTrainedTokenizerFast]:
    """Another tokenizer object over the same bytes."""
    return byte_tokenizer


class Recorder(Callback):
    """What was logged after every training step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self.steps.append({name: float(value) for name, value in trainer.callback_metrics.items()})

    def __getitem__(self, name: str) -> list[float]:
        return [step[name] for step in self.steps]


@pytest.fixture
def recorder() -> type[Recorder]:
    """A callback that keeps what was logged after every training step."""
    return Recorder


@pytest.fixture
def trainer(tmp_path: Path) -> Callable[..., Trainer]:
    """A Trainer on one CPU process that writes nothing, with the settings given."""

    def make(**settings: Any) -> Trainer:
        quiet = {
            "accelerator": "cpu",
            "devices": 1,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "use_distributed_sampler": False,
            "num_sanity_val_steps": 0,
            "default_root_dir": tmp_path,
        }
        if settings.get("strategy") == "ddp_fork":
            # A process that waits for another one in vain is to fail.
            settings["strategy"] = DDPStrategy(start_method="fork", timeout=timedelta(seconds=PATIENCE))
        return Trainer(**{**quiet, **settings})

    return make


@pytest.fixture
def fit(trainer: Callable[..., Trainer]) -> Callable[..., Recorder]:
    """Fit a module on typed batches and return what it logged."""

    def run(module: LightningModule, batches: list[Any], *, val: list[Any] | None = None, **settings: Any) -> Recorder:
        recorder = Recorder()
        callbacks = [recorder, *settings.pop("callbacks", [])]
        ckpt_path = settings.pop("ckpt_path", None)
        trainer(callbacks=callbacks, **settings).fit(module, loader(batches), val and loader(val), ckpt_path=ckpt_path)
        return recorder

    return run


@pytest.fixture
def validate(trainer: Callable[..., Trainer]) -> Callable[..., dict[str, float]]:
    """Validate a module on typed batches and return its metrics."""

    def run(module: LightningModule, batches: list[Any]) -> dict[str, float]:
        (metrics,) = trainer().validate(module, loader(batches), verbose=False)
        return dict(metrics)

    return run


def loader(batches: list[Any]) -> DataLoader[Any]:
    return DataLoader(batches, batch_size=None, collate_fn=lambda batch: batch)  # type: ignore[arg-type]


@pytest.fixture
def make_loader() -> Callable[[list[Any]], DataLoader[Any]]:
    """A DataLoader that yields the given batches."""
    return loader


@pytest.fixture
def weights() -> Callable[[torch.nn.Module], dict[str, torch.Tensor]]:
    """A copy of all weights of a network."""
    return lambda network: {name: value.detach().clone() for name, value in network.state_dict().items()}


@pytest.fixture
def prompts() -> PromptBatch:
    """Six prompts of uneven length."""
    rows = [[50, 90, 70, 30, 20], [80, 40], [40, 41, 42], [77], [60, 61, 62, 63], [33, 34]]
    width = max(map(len, rows))
    texts = byte_tokenizer().batch_decode(rows)
    return PromptBatch(
        prompt_tokens=torch.tensor([[0] * (width - len(row)) + row for row in rows]),
        prompt_mask=torch.tensor([[False] * (width - len(row)) + [True] * len(row) for row in rows]),
        prompts=list(texts),
        texts=list(texts),
        columns={},
    )


STOPS = list(range(1, 258, 5))
"""A fifth of the vocabulary ends a response, so that responses are of uneven length, and some do not end."""


class Alone(PPOModule):
    """A PPO module in one process without a Trainer; what it accumulates stays in the weights' ``grad``."""

    trainer = SimpleNamespace(world_size=1, strategy=None, global_step=0)  # type: ignore[assignment]
    _optimizer = SimpleNamespace(zero_grad=lambda: None)  # type: ignore[assignment]

    def sum_over_ranks(self, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    def manual_backward(self, loss: torch.Tensor, *_: Any, **__: Any) -> None:
        loss.backward()


@dataclass
class Worked:
    """What a rollout says and does: logged numbers, the experience, and the gradient of one update on all of it."""

    metrics: dict[str, float]
    experience: Experience
    gradients: dict[str, torch.Tensor]


class Bench:
    """A float64 module without a Trainer whose policy and critic have moved since they sampled and valued a rollout."""

    def __init__(self, module: Alone) -> None:
        # Llama computes its norms in float32 whatever it is given; GPT-2 is float64 throughout.
        self.module = module.double()
        self.sampled_with = self._weights()
        moved = torch.Generator().manual_seed(7)
        self.updated = {
            name: w if name.startswith("reference") else w + 0.02 * torch.randn(w.shape, generator=moved).to(w)
            for name, w in self.sampled_with.items()
        }
        for weight in module.reference.parameters():
            weight += 0.05 * torch.randn(weight.shape, generator=moved).to(weight)

    def _weights(self) -> dict[str, torch.Tensor]:
        return {name: weight.detach().clone() for name, weight in self.module.state_dict().items()}

    def rollout(self, prompts: PromptBatch) -> Rollout:
        self.module.load_state_dict(self.sampled_with)
        return self.module.generate(self.module.with_samples(prompts), 0)

    def score(self, rollout: Rollout) -> ScoredRollout:
        self.module.load_state_dict(self.sampled_with)
        return self.module.score(rollout)

    def work(self, scored: ScoredRollout, seen: list[float] | None = None) -> Worked:
        """Estimate advantages and the gradient of an update on all of the rollout; ``seen`` are rewards before it."""
        module = self.module
        module.load_state_dict(self.updated)
        module.zero_grad()
        module.seen_scores, module.seen_rewards = RunningMoments(), RunningMoments()
        if seen is not None:
            module.seen_rewards.add(moments_of(torch.tensor(seen)))
        parts = module.shaping(scored, module.seen_scores, sum_over_ranks=module.sum_over_ranks)
        experience = module.experience(scored, parts)
        metrics = rollout_metrics(scored, experience, parts, sum_over_ranks=module.sum_over_ranks)
        if module.critic is not None:
            metrics |= critic_metrics(experience, sum_over_ranks=module.sum_over_ranks)
        metrics |= module._accumulate_gradients(experience)
        return Worked({name: float(x) for name, x in metrics.items()}, experience, self.gradients())

    def gradients(self) -> dict[str, torch.Tensor]:
        roles = {"policy": self.module.policy} | ({} if self.module.critic is None else {"critic": self.module.critic})
        return {
            f"{role}.{name}": p.grad.clone()
            for role, network in roles.items()
            for name, p in network.named_parameters()
            if p.grad is not None
        }


def share_of_low_bytes(prompts: list[str], responses: list[str], **columns: Any) -> list[float]:
    return [sum(ord(c) < 128 for c in text) / max(1, len(text)) for text in responses]


@pytest.fixture
def bench(policy: Callable[..., Any], tokenizer: PreTrainedTokenizerFast) -> Callable[..., Bench]:
    """A bench around a PPO module with the settings given."""

    def make(**settings: Any) -> Bench:
        network = policy("gpt2")
        network.generation_config.eos_token_id = STOPS
        defaults = {"reward": share_of_low_bytes, "tokenizer": tokenizer, "micro_batch_size": 4, "max_new_tokens": 6}
        defaults["preflight"] = False  # the policy is pulled away from the reference on purpose
        return Bench(Alone(network, **{**defaults, **settings}))

    return make
