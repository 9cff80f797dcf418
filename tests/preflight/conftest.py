"""A healthy run of PPO on tiny networks: each test breaks one thing of it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

from rlhf_lightning.modules import PPOModule
from rlhf_lightning.preflight import Finding
from rlhf_lightning.types import PromptBatch

VOCABULARY = 258
# Wide weights: with the usual ones all outputs are about equal, and a fault would not show.
LLAMA: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": None,
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
    "bos_token_id": None,
    "eos_token_id": 1,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
}


@pytest.fixture
def llama() -> Callable[..., Any]:
    """``llama(model_class, **settings)``: rotary positions."""

    def build(model_class: Any = LlamaForCausalLM, **settings: Any) -> Any:
        torch.manual_seed(0)
        return model_class(LlamaConfig(**{**LLAMA, **settings})).eval()

    return build


@pytest.fixture
def gpt2() -> Callable[..., Any]:
    """``gpt2(model_class, **settings)``: absolute positions."""

    def build(model_class: Any = GPT2LMHeadModel, **settings: Any) -> Any:
        torch.manual_seed(0)
        return model_class(GPT2Config(**{**GPT2, **settings})).eval()

    return build


@pytest.fixture
def classifier(llama: Callable[..., Any]) -> Callable[..., Any]:
    """``classifier(model_class)``: a reward model."""
    return lambda model_class=LlamaForSequenceClassification: llama(model_class, num_labels=1)


def byte_tokenizer(**special_tokens: str) -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(["<pad>", "<eos>", *alphabet])}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, **{"pad_token": "<pad>", "eos_token": "<eos>", **special_tokens}
    )


@pytest.fixture
def make_tokenizer() -> Callable[..., PreTrainedTokenizerFast]:
    """A tokenizer of one token per byte, pad 0 and end 1 unless told otherwise."""
    return byte_tokenizer


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """Pad 0, end 1, bytes from 2."""
    return byte_tokenizer()


@pytest.fixture
def prompts(tokenizer: PreTrainedTokenizerFast) -> PromptBatch:
    """Six prompts of uneven length."""
    texts = ["Say a.", "Say bb, please.", "c", "What is d?", "Ee", "Fff!"]
    rows = [tokenizer(text)["input_ids"] for text in texts]
    width = max(map(len, rows))
    return PromptBatch(
        prompt_tokens=torch.tensor([[0] * (width - len(row)) + row for row in rows]),
        prompt_mask=torch.tensor([[False] * (width - len(row)) + [True] * len(row) for row in rows]),
        prompts=list(texts),
        texts=list(texts),
        columns={},
    )


def low_bytes(prompts: list[str], responses: list[str], **columns: Any) -> list[float]:
    """A reward that differs between responses."""
    return [sum(ord(c) < 128 for c in text) / max(1, len(text)) for text in responses]


@pytest.fixture
def make(llama: Callable[..., Any], tokenizer: Any) -> Callable[..., PPOModule]:
    """``make(policy, module_class, **settings)``: a healthy PPO module unless what is given is not."""

    def build(policy: Any = None, module_class: Any = PPOModule, **settings: Any) -> PPOModule:
        healthy = {
            "reward": low_bytes,
            "tokenizer": tokenizer,
            "minibatch_size": 3,
            "micro_batch_size": 2,
            "learning_rate": 1e-3,
            "critic_learning_rate": 1e-3,
            "max_new_tokens": 6,
        }
        module: PPOModule = module_class(llama() if policy is None else policy, **{**healthy, **settings})
        return module

    return build


@pytest.fixture
def faults() -> Callable[[list[Finding]], dict[str, Finding]]:
    """What is not right, by name; each says so in one line, with what to change."""

    def find(findings: list[Finding]) -> dict[str, Finding]:
        found = {f.name: f for f in findings if f.status in ("warning", "error")}
        for finding in found.values():
            assert finding.measured
            assert finding.remedy, finding.name
            assert str(finding) == f"{finding.name}: {finding.measured} -> {finding.remedy}"
            assert len(str(finding).splitlines()) == 1, finding.name
        return found

    return find
