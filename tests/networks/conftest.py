"""Tiny networks with rotary (Llama) and absolute (GPT-2) positions, and a tokenizer of one token per byte."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedTokenizerFast,
)

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
OTHER_FAMILIES = {
    "gemma": (Gemma2Config, {**LLAMA, "num_key_value_heads": 2, "head_dim": 8}, Gemma2ForCausalLM),
    "cohere": (CohereConfig, LLAMA, CohereForCausalLM),
    # It calls parts of its body in its place.
    "opt": (OPTConfig, {**LLAMA, "ffn_dim": 32, "word_embed_proj_dim": 16, "init_std": 0.3}, OPTForCausalLM),
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


@pytest.fixture
def other_family() -> Callable[..., Any]:
    """``other_family("gemma", "cohere" or "opt", **settings of the config)``: logits may be more than a layer's."""
    return lambda kind, **settings: build(*OTHER_FAMILIES[kind], **settings)


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
def bare_folder(tmp_path: Path, policy: Callable[..., Any]) -> Path:
    """A language model whose tokenizer knows neither a padding nor an end token."""
    folder = tmp_path / "bare"
    policy("llama").save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder
