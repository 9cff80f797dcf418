"""Attention by sequences gives states and gradients of a mask over rows."""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2Model,
    LlamaConfig,
    LlamaModel,
    MistralConfig,
    MistralModel,
)

from rlhf_lightning.networks import by_sequence, length_groups
from rlhf_lightning.networks.by_sequence import BY_SEQUENCE, attend_by_sequence, attends_by_sequence
from rlhf_lightning.networks.checkpointing import checkpoint_blocks
from rlhf_lightning.networks.packing import Packed, last_hidden_state, pack, reading
from rlhf_lightning.networks.shared_prompts import share_prompts

SMALL: dict[str, Any] = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
}


def llama(attn_implementation: str = "sdpa") -> Any:
    torch.manual_seed(0)
    return LlamaModel._from_config(LlamaConfig(**SMALL, attn_implementation=attn_implementation)).double()


def gpt2(attn_implementation: str = "sdpa") -> Any:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 60, "n_embd": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.3}
    return GPT2Model._from_config(GPT2Config(**sizes, attn_implementation=attn_implementation)).eval().double()


def padded(lengths: list[int]) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    rows = [torch.randint(2, 60, (length,)) for length in lengths]
    tokens = torch.stack([pad(row, (0, max(lengths) + 2 - len(row))) for row in rows])
    return tokens, tokens > 0


def prompts() -> tuple[Tensor, Tensor, Tensor]:
    """Two prompts of 3 and 4 tokens with 3 and 2 responses, of which one begins as another does."""
    tokens, mask = padded([8, 5, 9, 7, 6])
    tokens[1:3, :3] = tokens[0, :3]
    tokens[4, :4] = tokens[3, :4]
    tokens[2, 3] = tokens[1, 3]
    return tokens, mask, torch.tensor([0, 0, 0, 1, 1])


PACKED: dict[str, Callable[[], Packed]] = {
    "rows": lambda: pack(*padded([7, 3, 5, 1, 2])),
    "one row": lambda: pack(*padded([7, 3, 5, 1, 2]), in_one_row=True),
    "prompts": lambda: share_prompts(*prompts()),
    "prompts in one row": lambda: share_prompts(*prompts(), packing=True),
    "one sequence": lambda: pack(*padded([4])),
    "one token": lambda: pack(*padded([1])),
}


@pytest.fixture(params=["together", "in groups", "of torch", "in groups of torch", "both ways"], autouse=True)
def groups(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let sequences as short as these attend in groups, too, and by torch's attention."""
    if request.param in ("in groups", "in groups of torch", "both ways"):
        monkeypatch.setattr(length_groups, "WORTH", 1)
    if request.param in ("of torch", "in groups of torch"):
        monkeypatch.setattr(by_sequence, "LONGEST", 0)
    if request.param == "both ways":
        monkeypatch.setattr(by_sequence, "LONGEST", 4)


# Llama's norms are computed in float32 whatever the network is in.
@pytest.mark.parametrize(("make", "rounding"), [(gpt2, 1e-10), (llama, 1e-5)])
@pytest.mark.parametrize("kind", PACKED)
def test_states_and_gradients_are_those_under_a_mask(kind: str, make: Callable[..., Any], rounding: float) -> None:
    packed = PACKED[kind]()
    networks = [make(), make("eager")]
    assert [attends_by_sequence(network) for network in networks] == [True, False]
    found = []
    for network in networks:
        states = last_hidden_state(network, packed)[packed.rows, packed.columns][packed.kept]
        # Each number has a weight of its own in what is differentiated.
        (states * torch.linspace(-1, 1, states.numel()).double().view_as(states)).sum().backward()
        found.append([states.detach(), *(weight.grad for weight in network.parameters() if weight.grad is not None)])
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, rtol=10 * rounding, atol=rounding)


def test_what_fills_up_a_row_gets_no_gradient() -> None:
    packed = pack(*padded([5, 4, 2]))
    network = llama()
    embedded = network.embed_tokens(packed.tokens).detach().requires_grad_()
    with reading(network, packed) as told:
        states = network(inputs_embeds=embedded, use_cache=False, **told).last_hidden_state
    states[packed.rows, packed.columns][packed.kept].square().sum().backward()
    fill = packed.arranged(packed.kept) == 0
    assert fill.any()
    assert not embedded.grad[fill].any()
    assert embedded.grad[~fill].abs().sum(dim=-1).min() > 0


def test_rows_of_no_sequences_are_read_as_they_are() -> None:
    states = torch.randn(2, 1, 3, 4, dtype=torch.float64)
    found, _ = attend_by_sequence(torch.nn.Module(), states, states, states, None)
    first, _ = attend_by_sequence(torch.nn.Module(), *[states[:, :, :2]] * 3, None)
    torch.testing.assert_close(found[:, :2], first)


def test_networks_that_see_otherwise_keep_their_masks() -> None:
    windows = MistralModel(MistralConfig(**SMALL, sliding_window=3))
    both_ways = BertModel(BertConfig(vocab_size=60, hidden_size=32, num_hidden_layers=1, num_attention_heads=2))
    checkpointed = deepcopy(llama())
    checkpoint_blocks(checkpointed)
    for network in (windows, both_ways, checkpointed, torch.nn.Linear(2, 2)):
        assert not attends_by_sequence(network)


def test_the_network_attends_so_within_the_block_alone() -> None:
    network = llama()
    with reading(network, pack(*padded([2, 3]))) as told:
        assert network.config._attn_implementation == BY_SEQUENCE
        assert told["attention_mask"] is None
    assert network.config._attn_implementation == "sdpa"


def test_attention_of_16_bits_is_computed_in_float32_on_a_cpu() -> None:
    torch.manual_seed(0)
    told = pack(*padded([7, 3, 5]), in_one_row=True)
    with reading(llama(), told) as how:
        sequences = how["sequences"]
    half = [torch.randn(1, 4, 15, 8, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
    whole = [states.detach().float().requires_grad_() for states in half]
    weights = torch.randn(1, 15, 4, 8).bfloat16()
    expected, _ = attend_by_sequence(torch.nn.Module(), *whole, None, sequences=sequences)
    with torch.autocast("cpu", torch.bfloat16):
        found, _ = attend_by_sequence(torch.nn.Module(), *half, None, sequences=sequences)
        assert found.dtype == torch.bfloat16
        assert torch.equal(found, expected.bfloat16())
        # PPO's backward, too, is within.
        (found * weights).sum().backward()
    (expected * weights).sum().backward()
    for one, other in zip(half, whole, strict=True):
        assert torch.equal(one.grad, other.grad.bfloat16())


def test_dropout_of_attention_is_that_of_torch() -> None:
    torch.manual_seed(0)
    with reading(llama(), pack(*padded([3, 2]), in_one_row=True)) as how:
        sequences = how["sequences"]
    states = [torch.randn(1, 4, 5, 8) for _ in range(3)]
    found, _ = attend_by_sequence(torch.nn.Module(), *states, None, sequences=sequences, dropout=0.9)
    whole, _ = attend_by_sequence(torch.nn.Module(), *states, None, sequences=sequences)
    # Of the first token nothing but its own value is read: whole, or dropped.
    assert not torch.allclose(found, whole)
    assert set((found[0, 0] / whole[0, 0]).round(decimals=3).unique().tolist()) <= {0.0, 10.0}
