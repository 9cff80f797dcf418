"""Tiny networks with rotary (Llama) and absolute (GPT-2) positions, a tokenizer of one token per byte, and prompts."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
)

from rlhf_lightning.rollout.generate import Sampled, sample_tokens
from rlhf_lightning.types import PromptBatch, Rollout

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
LANGUAGE_MODELS = {
    "llama": (LlamaConfig, {**LLAMA, "num_key_value_heads": 1}, LlamaForCausalLM),
    "gpt2": (GPT2Config, GPT2, GPT2LMHeadModel),
    "mistral": (MistralConfig, {**LLAMA, "num_key_value_heads": 1, "sliding_window": 4}, MistralForCausalLM),
}
CLASSIFIERS = {
    "llama": (LlamaConfig, LLAMA, LlamaForSequenceClassification),
    "gpt2": (GPT2Config, GPT2, GPT2ForSequenceClassification),
}


def build(config_class: Any, settings: dict[str, Any], model_class: Any, seed: int = 0, **more: Any) -> Any:
    torch.manual_seed(seed)
    return model_class(config_class(**{**settings, "bos_token_id": None, **more})).eval()


@pytest.fixture
def policy() -> Callable[..., Any]:
    """``policy("llama", "gpt2" or "mistral", **settings of the config)``."""
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


@pytest.fixture
def sampled() -> Callable[..., Sampled]:
    """``sampled(policy, prompts, stops, **settings)``: 12 tokens at temperature 1 unless it is told otherwise."""

    def run(policy: Any, batch: PromptBatch, stops: list[int], *, seed: int = 0, **settings: Any) -> Sampled:
        device = policy.device
        return sample_tokens(
            policy,
            batch.prompt_tokens.to(device),
            batch.prompt_mask.to(device),
            stop_tokens=torch.tensor(stops, dtype=torch.long, device=device),
            generator=torch.Generator(device).manual_seed(seed),
            **{"max_new_tokens": 12, "temperature": 1.0, **settings},
        )

    return run


@pytest.fixture
def sample(sampled: Callable[..., Sampled]) -> Callable[..., torch.Tensor]:
    """The tokens of `sampled`."""
    return lambda *args, **settings: sampled(*args, **settings).tokens


def left_padded(rows: list[list[int]], width: int) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[False] * (width - len(row)) + [True] * len(row) for row in rows])
    return tokens, mask


@pytest.fixture
def prompts() -> Callable[..., PromptBatch]:
    """Prompts of uneven length with ``pads`` columns of padding more than the longest needs."""

    def make(rows: list[list[int]] | None = None, *, pads: int = 0, **columns: list[Any]) -> PromptBatch:
        rows = rows or [[5, 9, 7, 30, 2], [8, 4], [40, 41, 42]]
        tokens, mask = left_padded(rows, max(map(len, rows)) + pads)
        texts = byte_tokenizer().batch_decode(rows)
        return PromptBatch(tokens, mask, list(texts), list(texts), columns)

    return make


@pytest.fixture
def rollout(prompts: Callable[..., PromptBatch]) -> Callable[..., Rollout]:
    """A rollout with the given prompt and response ids; one that holds the end token 1 has ended."""

    def make(
        prompt_rows: list[list[int]], response_rows: list[list[int]], *, left: int = 0, right: int = 0, **columns: Any
    ) -> Rollout:
        batch = prompts(prompt_rows, pads=left, **columns)
        width = max(map(len, response_rows)) + right
        response = torch.tensor([row + [0] * (width - len(row)) for row in response_rows])
        mask = torch.tensor([[True] * len(row) + [False] * (width - len(row)) for row in response_rows])
        return Rollout(
            **vars(batch),
            tokens=torch.cat([batch.prompt_tokens, response], dim=1),
            attention_mask=torch.cat([batch.prompt_mask, mask], dim=1),
            response_mask=mask,
            ended=torch.tensor([1 in row for row in response_rows]),
            responses=list(byte_tokenizer().batch_decode([[i for i in row if i > 1] for row in response_rows])),
        )

    return make
