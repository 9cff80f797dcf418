"""A reward model says the same of sequences whether or not their padding is read."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
)

from rlhf_lightning.networks import LoRA, NetworkConfig, is_quantized, load_reward_model
from rlhf_lightning.networks.scores import scores_and_states, sequence_scores
from rlhf_lightning.networks.unpadded import reading_padding

SIZES: dict[str, Any] = {"vocab_size": 60, "initializer_range": 0.3, "num_labels": 1, "pad_token_id": 0}
SMALL: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
TOKENS = torch.tensor([[5, 9, 7, 30, 2, 1, 0], [8, 4, 1, 0, 0, 0, 0], [40, 41, 42, 1, 0, 0, 0]])
MASK = TOKENS != 0


def gpt2() -> Any:
    torch.manual_seed(0)
    config = GPT2Config(**SIZES, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=1)
    return GPT2ForSequenceClassification(config).eval().double()


def llama(**more: Any) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(**{**SIZES, **SMALL, "num_key_value_heads": 2, **more})
    return LlamaForSequenceClassification(config).eval().double()


def padded(rows: list[list[int]], *, more: int) -> tuple[Tensor, Tensor]:
    width = max(map(len, rows)) + more
    tokens = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    return tokens, torch.tensor([[True] * len(row) + [False] * (width - len(row)) for row in rows])


def tokens_read(part: Any) -> list[int]:
    """How many tokens a network or its body reads in each call from now on."""
    read: list[int] = []
    part.register_forward_pre_hook(
        lambda _, args, kwargs: read.append((*args, kwargs.get("input_ids"))[0].numel()), with_kwargs=True
    )
    return read


def with_gradients(network: Any, tokens: Tensor, mask: Tensor) -> list[Tensor]:
    """Scores, states of real tokens, and the gradient of something that is made of all of them."""
    scores, states = scores_and_states(network, tokens, mask)
    real = states[mask]
    of_states = (real * torch.linspace(-1, 1, real.numel()).double().view_as(real)).sum()
    ((scores * torch.arange(1, len(scores) + 1)).sum() + of_states).backward()
    return [scores.detach(), real.detach(), *(p.grad for p in network.parameters() if p.grad is not None)]


# A padding id among the tokens is read as `transformers` reads it, behind the last other one too.
row = st.tuples(st.integers(1, 3), st.lists(st.integers(0, 3), max_size=6)).map(lambda tokens: [tokens[0], *tokens[1]])


@settings(deadline=None, max_examples=25)
@given(rows=st.lists(row, min_size=1, max_size=5), more=st.integers(0, 2))
# Scores are float32, and so are Llama's norms, whatever the network is in.
@pytest.mark.parametrize(("make", "rounding"), [(gpt2, 1e-6), (llama, 1e-4)])
def test_scores_states_and_gradients_are_those_of_padded_sequences(
    make: Callable[[], Any], rounding: float, rows: list[list[int]], more: int
) -> None:
    tokens, mask = padded(rows, more=more)
    found = with_gradients(make(), tokens, mask)
    with reading_padding():
        expected = with_gradients(make(), tokens, mask)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=rounding, atol=rounding)
    assert torch.equal(sequence_scores(make(), tokens, mask), found[0])


def test_no_padding_is_read_and_the_head_reads_the_ends_alone() -> None:
    network = llama()
    sequence_scores(network, TOKENS, MASK)  # which looks at the network, once
    read, shapes = tokens_read(network.model), []
    network.score.register_forward_pre_hook(lambda _, inputs: shapes.append(inputs[0].shape))
    sequence_scores(network, TOKENS, MASK)
    scores_and_states(network, TOKENS, MASK)
    with reading_padding():
        sequence_scores(network, TOKENS, MASK)
    assert read == [13, 13, 21]
    assert shapes == [(3, 32), (3, 32), (3, 7, 32)]


def test_a_network_that_keeps_to_itself_what_it_is_told_reads_padding() -> None:
    network = llama()
    with reading_padding():
        expected = sequence_scores(network, TOKENS, MASK)
    layer = network.model.layers[1].self_attn
    layer.forward = lambda *args, sequences=None, plain=layer.forward, **inputs: plain(*args, **inputs)
    sequence_scores(network, TOKENS, MASK)
    read = tokens_read(network.model)
    torch.testing.assert_close(sequence_scores(network, TOKENS, MASK), expected)
    assert read == [21]


def bert() -> Any:
    torch.manual_seed(0)
    return BertForSequenceClassification(BertConfig(**SIZES, **SMALL)).eval()


@pytest.mark.parametrize("make", [bert, lambda: llama(attn_implementation="eager"), lambda: watched(llama())])
def test_encoders_and_what_cannot_leave_padding_out_or_is_waited_for_are_called_as_they_are(
    make: Callable[[], Any],
) -> None:
    network = make()
    inputs = {"input_ids": TOKENS, "attention_mask": MASK.long()}
    expected = network(**inputs, output_hidden_states=True)
    read = tokens_read(network)
    scores, states = scores_and_states(network, TOKENS, MASK)
    assert torch.equal(scores, expected.logits.squeeze(-1).float())
    assert torch.equal(states, expected.hidden_states[-1])
    assert torch.equal(sequence_scores(network, TOKENS, MASK), scores)
    assert read == [21, 21]


def watched(network: Any) -> Any:
    network.register_forward_hook(lambda *_: None)
    return network


@pytest.mark.parametrize("quantization", ["int8", "nf4"])
def test_a_quantised_network_with_an_adapter_scores_alike(quantization: str, wide_model: Path) -> None:
    config = NetworkConfig(str(wide_model), quantization=quantization, lora=LoRA(r=4))
    network = load_reward_model(config, generator=torch.Generator().manual_seed(0))
    assert is_quantized(network)
    with torch.no_grad():
        sequence_scores(network, TOKENS, MASK)  # which looks at the network, once
        read = tokens_read(network.base_model)
        found = sequence_scores(network, TOKENS, MASK)
        with reading_padding():
            expected = sequence_scores(network, TOKENS, MASK)
    assert read == [13, 21]
    torch.testing.assert_close(found, expected)
