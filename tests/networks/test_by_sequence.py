"""Attention by sequences gives states and gradients of a mask over rows."""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
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
    longest = {"of torch": 0, "in groups of torch": 0, "both ways": 4}.get(request.param)
    if longest is not None:
        monkeypatch.setattr(by_sequence, "LONGEST", longest)
        monkeypatch.setattr(by_sequence, "LONGEST_IN_BFLOAT16", longest)


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


@dataclass
class Attended:
    """What is attended to by states of one type, with the gradients of a weighted sum of it."""

    result: Tensor
    gradients: tuple[Tensor, ...]
    kept: set[torch.dtype]
    """The types of what is kept for the gradient."""


def attended(states: list[Tensor], *, autocast: bool) -> Attended:
    """Attend within sequences of 7, 3 and 5 tokens; autocast holds the backward, too, as it does PPO's."""
    with reading(llama(), pack(*padded([7, 3, 5]), in_one_row=True)) as how:
        sequences = how["sequences"]
    given = [x.clone().requires_grad_() for x in states]
    kept: set[torch.dtype] = set()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        with saved_tensors_hooks(lambda x: kept.add(x.dtype) or x, lambda x: x):
            result, _ = attend_by_sequence(torch.nn.Module(), *given, None, sequences=sequences)
        torch.manual_seed(3)
        weights = torch.randn(result.shape).bfloat16()
        gradients = torch.autograd.grad((result * weights).sum(), given)
    return Attended(result.detach(), gradients, kept)


def in_bfloat16() -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(1, 4, 15, 8, dtype=torch.bfloat16) for _ in range(3)]


def in_both_types(*, autocast: bool) -> tuple[Attended, Attended]:
    """What is attended to by states in bfloat16, and by the same in float32."""
    half = in_bfloat16()
    return attended(half, autocast=autocast), attended([x.float() for x in half], autocast=False)


@pytest.mark.parametrize("autocast", [True, False])
def test_bfloat16_is_attended_to_in_float32_where_a_cpu_does_not_multiply_it(
    autocast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(by_sequence, "multiplies_bfloat16", lambda: False)
    found, expected = in_both_types(autocast=autocast)
    assert found.result.dtype == torch.bfloat16
    assert torch.equal(found.result, expected.result.bfloat16())
    for one, other in zip(found.gradients, expected.gradients, strict=True):
        assert torch.equal(one, other.bfloat16())


@pytest.mark.parametrize("autocast", [True, False])
def test_bfloat16_is_attended_to_in_it_where_a_cpu_multiplies_it(
    autocast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(by_sequence, "multiplies_bfloat16", lambda: True)
    found, expected = in_both_types(autocast=autocast)
    assert found.result.dtype == torch.bfloat16
    # Torch's attention, whose gradient takes long in 16 bits, is given float32.
    assert (torch.float32 in found.kept) == (by_sequence.LONGEST_IN_BFLOAT16 < 7)
    for one, other in zip([found.result, *found.gradients], [expected.result, *expected.gradients], strict=True):
        assert torch.linalg.vector_norm(one - other) < 2**-7 * torch.linalg.vector_norm(other)


def test_states_in_float32_are_attended_to_in_bfloat16_under_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(by_sequence, "multiplies_bfloat16", lambda: True)
    torch.manual_seed(0)
    whole = [torch.randn(1, 4, 15, 8) for _ in range(3)]
    found = attended(whole, autocast=True)
    expected = attended([x.bfloat16() for x in whole], autocast=False)
    assert torch.equal(found.result, expected.result)
    for one, other in zip(found.gradients, expected.gradients, strict=True):
        assert one.dtype == torch.float32
        assert torch.equal(one, other.float())


@pytest.mark.parametrize("longest", [0, 7])
def test_how_long_a_short_sequence_is_depends_on_the_type(longest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(by_sequence, "multiplies_bfloat16", lambda: True)
    monkeypatch.setattr(by_sequence, "LONGEST", 7 - longest)
    monkeypatch.setattr(by_sequence, "LONGEST_IN_BFLOAT16", longest)
    called: list[torch.dtype] = []
    short = by_sequence.attend_short
    monkeypatch.setattr(by_sequence, "attend_short", lambda q, *x, **how: called.append(q.dtype) or short(q, *x, **how))
    attended(in_bfloat16(), autocast=False)
    attended([x.float() for x in in_bfloat16()], autocast=False)
    assert set(called) == {torch.bfloat16 if longest else torch.float32}


def test_autocast_leaves_float64_as_it_is() -> None:
    wide = [x.double() for x in in_bfloat16()]
    found, expected = attended(wide, autocast=True), attended(wide, autocast=False)
    assert found.result.dtype == torch.float64
    assert torch.equal(found.result, expected.result)


@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda",
            marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")],
        ),
    ],
)
def test_gradients_of_a_prompt_with_many_responses_lose_no_part_in_bfloat16(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(by_sequence, "multiplies_bfloat16", lambda: True)
    number = 512
    tokens, mask = (x.to(device) for x in padded([4] * number))
    tokens[:, :3] = tokens[0, :3]
    prompts = torch.zeros(number, dtype=torch.long, device=device)
    with reading(llama().to(device), share_prompts(tokens, mask, prompts, packing=True)) as how:
        sequences = how["sequences"]
    torch.manual_seed(0)
    places = sequences.tokens.numel()
    half = [torch.randn(1, 4, places, 8).bfloat16().to(device) for _ in range(3)]
    whole = [x.float() for x in half]
    # Of one sign: a sum of 512 that rounds after each part stands still before its end.
    weights = torch.rand(1, places, 4, 8).bfloat16().to(device)
    found = []
    for states in (half, whole):
        given = [x.clone().requires_grad_() for x in states]
        result, _ = attend_by_sequence(torch.nn.Module(), *given, None, sequences=sequences)
        gradients = torch.autograd.grad((result * weights).sum(), given)
        found.append([gradient[:, :, :3] for gradient in gradients])
    for ours, expected in zip(*found, strict=True):
        assert torch.linalg.vector_norm(ours - expected) < 2**-7 * torch.linalg.vector_norm(expected)


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
