"""Sequences in rows without padding are read as if each stood alone."""

from copy import deepcopy
from itertools import combinations
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import GPT2Config, GPT2Model, LlamaConfig, LlamaModel, MistralConfig, MistralModel

from rlhf_lightning.networks.packing import (
    Packed,
    first_fit,
    largest_move,
    last_hidden_state,
    pack,
    pack_for,
    reading,
    shortest_two,
    takes_lengths,
)

LENGTHS = st.lists(st.integers(1, 9), min_size=1, max_size=7)
VOCABULARY = 60
WIDE: dict[str, Any] = {"vocab_size": VOCABULARY, "initializer_range": 0.3, "bos_token_id": None, "eos_token_id": 1}
SMALL = {**WIDE, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
BODIES: dict[str, tuple[Any, Any]] = {
    "llama": (LlamaModel, LlamaConfig(**SMALL)),
    "gpt2": (GPT2Model, GPT2Config(**WIDE, n_embd=16, n_layer=2, n_head=2, n_positions=16)),
    "mistral": (MistralModel, MistralConfig(**SMALL, num_key_value_heads=2, sliding_window=3)),
}


def body(kind: str, attn_implementation: str = "sdpa") -> Any:
    model, config = BODIES[kind]
    torch.manual_seed(0)
    network = model(deepcopy(config)).double().eval()
    # Not by its setter, which would look for a kernel of FlashAttention.
    network.config._attn_implementation = attn_implementation
    return network


def sequences(lengths: list[int], *, pads: int = 0) -> tuple[Tensor, Tensor]:
    noise = torch.Generator().manual_seed(len(lengths))
    tokens = torch.randint(2, VOCABULARY, (len(lengths), max(lengths) + pads), generator=noise)
    mask = torch.arange(tokens.shape[1]) < torch.tensor(lengths).unsqueeze(1)
    return tokens.where(mask, 0), mask


def of_sequences(states: Tensor, packed: Packed) -> Tensor:
    return states[packed.rows, packed.columns]


@given(lengths=LENGTHS, more=st.integers(0, 5))
def test_first_fit_overfills_no_row_and_leaves_no_two_rows_that_fit_into_one(lengths: list[int], more: int) -> None:
    size = max(lengths) + more
    rows, starts = first_fit(lengths, size)
    filled = {
        row: sorted((starts[i], starts[i] + lengths[i]) for i in range(len(rows)) if rows[i] == row) for row in rows
    }
    assert sorted(filled) == list(range(len(filled)))
    for parts in filled.values():
        assert [begin for begin, _ in parts] == [0, *(end for _, end in parts[:-1])]
        assert parts[-1][1] <= size
    used = [parts[-1][1] for parts in filled.values()]
    assert all(one + other > size for one, other in combinations(used, 2))


def test_the_longest_come_first_and_fill_up_rows() -> None:
    assert first_fit([2, 6, 4, 3, 1, 2], 6) == ([1, 0, 1, 2, 2, 2], [4, 0, 0, 0, 5, 3])


@given(lengths=LENGTHS, pads=st.integers(0, 2), in_one_row=st.booleans())
def test_every_real_token_is_in_a_row_once_at_its_own_position(lengths: list[int], pads: int, in_one_row: bool) -> None:
    tokens, mask = sequences(lengths, pads=pads)
    packed = pack(tokens, mask, in_one_row=in_one_row)
    places = list(zip(packed.rows.expand_as(tokens)[mask].tolist(), packed.columns[mask].tolist(), strict=True))
    assert len(set(places)) == sum(lengths)
    assert torch.equal(of_sequences(packed.tokens, packed)[mask], tokens[mask])
    time = torch.arange(tokens.shape[1]).expand_as(tokens)
    assert torch.equal(of_sequences(packed.position_ids, packed)[mask], time[mask])
    fill = packed.arranged(mask) == 0
    assert fill.sum() == packed.tokens.numel() - sum(lengths)
    assert not packed.tokens[fill].any()
    assert packed.tokens.shape[1] == (sum(lengths) if in_one_row else max(lengths))
    if in_one_row:
        assert packed.tokens.tolist() == [tokens[mask].tolist()]


@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", BODIES)
@pytest.mark.parametrize("in_one_row", [False, True])
def test_hidden_states_are_those_of_each_sequence_alone(kind: str, attn_implementation: str, in_one_row: bool) -> None:
    network = body(kind, attn_implementation)
    tokens, mask = sequences([9, 2, 6, 1, 3, 5], pads=1)
    packed = pack(tokens, mask, in_one_row=in_one_row)
    assert len(packed.tokens) == (1 if in_one_row else 3)
    found = of_sequences(last_hidden_state(network, packed), packed)
    for row, length in enumerate(mask.sum(dim=1).tolist()):
        alone = network(input_ids=tokens[row : row + 1, :length], use_cache=False).last_hidden_state[0]
        # Norms are computed in float32 whatever the network is in.
        torch.testing.assert_close(found[row, :length], alone, rtol=1e-5, atol=1e-5)


@settings(deadline=None, max_examples=60)
@given(lengths=LENGTHS, data=st.data(), kind=st.sampled_from(sorted(BODIES)), in_one_row=st.booleans())
def test_no_token_reads_another_sequence(lengths: list[int], data: st.DataObject, kind: str, in_one_row: bool) -> None:
    network = body(kind)
    tokens, mask = sequences(lengths)
    changed = data.draw(st.integers(0, len(lengths) - 1))
    others = tokens.clone()
    others[changed] = (tokens[changed] + 7) % VOCABULARY
    before, after = (
        of_sequences(last_hidden_state(network, packed), packed)
        for packed in (pack(x.where(mask, 0), mask, in_one_row=in_one_row) for x in (tokens, others))
    )
    same = mask.clone()
    same[changed] = False
    torch.testing.assert_close(before[same], after[same], rtol=0, atol=1e-12)
    assert not torch.allclose(before[changed, 0], after[changed, 0])


def test_attention_that_takes_lengths_gets_one_row_and_where_each_sequence_ends(flash_by_lengths: str) -> None:
    network = body("llama", flash_by_lengths)
    tokens, mask = sequences([4, 2, 5])
    packed = pack_for(network, tokens, mask)
    assert packed.tokens.shape == (1, 11)
    with reading(network, packed) as told:
        assert told["attention_mask"] is None
    assert told["cu_seq_lens_q"].tolist() == told["cu_seq_lens_k"].tolist() == [0, 4, 6, 11]
    assert told["cu_seq_lens_q"].dtype == torch.int32
    assert told["max_length_q"] == told["max_length_k"] == 5
    plain = body("llama")
    expected = of_sequences(last_hidden_state(plain, pack_for(plain, tokens, mask)), pack_for(plain, tokens, mask))
    found = of_sequences(last_hidden_state(network, packed), packed)
    torch.testing.assert_close(found[mask], expected[mask], rtol=1e-5, atol=1e-5)


def test_only_flash_attention_takes_lengths(flash_by_lengths: str) -> None:
    networks = {name: body("llama", name) for name in ("sdpa", "eager", flash_by_lengths)}
    assert [takes_lengths(network) for network in networks.values()] == [False, False, True]
    packed = pack(*sequences([2, 3]), in_one_row=True)
    for name, network in networks.items():
        with reading(network, packed) as told:
            assert ("cu_seq_lens_q" in told) == (name == flash_by_lengths)


def test_the_two_shortest_come_the_shorter_one_first() -> None:
    _, mask = sequences([5, 3, 7, 2, 3])
    assert shortest_two(mask).tolist() == [3, 1]
    assert shortest_two(mask[:1]).tolist() == [0]


def test_a_network_may_move_by_the_rounding_of_what_it_computes_in() -> None:
    network = body("llama")
    float64, float32 = largest_move(network), largest_move(network.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = largest_move(network)
    assert float64 < float32 < mixed == largest_move(network.bfloat16())
