"""Padded sequences give the same states whether or not their padding is read."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import GPT2Config, GPT2Model, LlamaConfig, LlamaModel

from rlhf_lightning.functional.masking import position_ids
from rlhf_lightning.networks import by_sequence, length_groups
from rlhf_lightning.networks.by_sequence import attends_by_sequence
from rlhf_lightning.networks.unpadded import last_states, one_row, reading_padding

SIZES: dict[str, Any] = {"vocab_size": 60, "initializer_range": 0.3}


def gpt2() -> Any:
    torch.manual_seed(0)
    return GPT2Model(GPT2Config(**SIZES, n_embd=32, n_layer=2, n_head=4)).eval().double()


def llama(**more: Any) -> Any:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {**SIZES, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
    return LlamaModel(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, **more)).double()


def sequences(lefts: list[int], lengths: list[int], *, right: int) -> tuple[Tensor, Tensor]:
    width = max(left + length for left, length in zip(lefts, lengths, strict=True)) + right
    mask = torch.zeros(len(lengths), width, dtype=torch.bool)
    for row, (left, length) in enumerate(zip(lefts, lengths, strict=True)):
        mask[row, left : left + length] = True
    torch.manual_seed(1)
    return torch.randint(2, 60, mask.shape).where(mask, 0), mask


@settings(deadline=None, max_examples=40)
@given(
    rows=st.lists(st.tuples(st.integers(0, 4), st.integers(1, 7)), min_size=1, max_size=5),
    right=st.integers(0, 2),
    in_groups=st.booleans(),
)
# Llama's norms are computed in float32 whatever the network is in.
@pytest.mark.parametrize(("make", "rounding"), [(gpt2, 1e-9), (llama, 1e-4)])
def test_states_and_gradients_are_those_of_padded_sequences(
    make: Callable[[], Any], rounding: float, rows: list[tuple[int, int]], right: int, in_groups: bool
) -> None:
    tokens, mask = sequences([left for left, _ in rows], [length for _, length in rows], right=right)
    found = []
    for padded in (False, True):
        network = make()
        if padded:
            with reading_padding():
                states = last_states(network, tokens, mask, position_ids=position_ids(mask))
        else:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(length_groups, "WORTH", 1 if in_groups else length_groups.WORTH)
                states = last_states(network, tokens, mask, position_ids=position_ids(mask))
        assert states.shape == (*tokens.shape, 32)
        real = states[mask]
        (real * torch.linspace(-1, 1, real.numel()).double().view_as(real)).sum().backward()
        found.append([real.detach(), *(p.grad for p in network.parameters() if p.grad is not None)])
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, rtol=rounding, atol=rounding)


def tokens_read(network: Any) -> list[int]:
    read: list[int] = []
    network.register_forward_pre_hook(lambda _, __, inputs: read.append(inputs["input_ids"].numel()), with_kwargs=True)
    return read


def test_no_padding_is_read_but_where_it_is_asked_for_or_cannot_be_left_out() -> None:
    tokens, mask = sequences([2, 0, 1], [3, 5, 2], right=1)
    network, cannot = llama(), llama(attn_implementation="eager")
    read, read_by_another = tokens_read(network), tokens_read(cannot)
    last_states(network, tokens, mask)
    with reading_padding():
        last_states(network, tokens, mask)
    last_states(network, tokens[1:2, :5], mask[1:2, :5])
    last_states(cannot, tokens, mask)
    assert not attends_by_sequence(cannot)
    assert read == [10, 18, 5]
    assert read_by_another == [18]


@pytest.mark.parametrize(("multiplies", "shape"), [(True, (1, 10)), (False, (2, 5))])
@pytest.mark.parametrize("mixed", [True, False])
def test_sequences_without_padding_attend_by_sequence_in_bfloat16(
    mixed: bool, multiplies: bool, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(by_sequence, "multiplies_bfloat16", lambda: multiplies)
    tokens, mask = sequences([0, 0], [5, 5], right=0)
    network = llama().to(torch.float32 if mixed else torch.bfloat16)
    shapes: list[tuple[int, ...]] = []
    network.register_forward_pre_hook(lambda _, __, told: shapes.append(told["input_ids"].shape), with_kwargs=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        found = last_states(network, tokens, mask)
    assert shapes == [shape]
    with reading_padding():
        expected = last_states(network.float(), tokens, mask)
    error = torch.linalg.vector_norm(found - expected) / torch.linalg.vector_norm(expected)
    assert 1e-4 < error < 0.03


def test_a_network_that_keeps_to_itself_what_it_is_told_reads_padding() -> None:
    tokens, mask = sequences([2, 0, 1], [3, 5, 2], right=1)
    network = llama()
    with reading_padding():
        expected = last_states(network, tokens, mask)
    layer = network.layers[1].self_attn
    layer.forward = lambda *args, sequences=None, plain=layer.forward, **inputs: plain(*args, **inputs)
    read = tokens_read(network)
    for _ in range(2):
        torch.testing.assert_close(last_states(network, tokens, mask)[mask], expected[mask])
    assert read == [10, 18, 18]
    assert not attends_by_sequence(network)


def test_the_states_of_padding_are_nothing_and_get_no_gradient() -> None:
    tokens, mask = sequences([2, 0], [3, 5], right=1)
    network = llama()
    states = last_states(network, tokens, mask)
    assert not states[~mask].any()
    states[~mask].sum().backward()
    assert not any(weight.grad.any() for weight in network.parameters() if weight.grad is not None)


def test_a_row_says_where_its_sequences_stand() -> None:
    found = one_row(torch.tensor([2, 3, 1]))
    assert found.groups.shapes == ((3, 3),)
    assert found.places[found.tokens].tolist() == list(range(6))
    assert found.tokens.tolist() == [0, 1, 3, 4, 5, 6]
    assert found.not_kept.tolist() == [2, 7, 8]
