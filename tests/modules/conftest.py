"""Tiny networks with rotary (Llama) and absolute (GPT-2) positions, a tokenizer of bytes, and a small Trainer."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback, LightningModule, Trainer
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

from rlhf_lightning.types import PromptBatch

VOCABULARY = 258
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
