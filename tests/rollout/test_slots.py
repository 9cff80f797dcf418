from typing import Any
from weakref import ref

import pytest
import torch
from transformers import DynamicCache

from rlhf_lightning.errors import InputError
from rlhf_lightning.rollout.slots import (
    Places,
    SlotLayer,
    Slots,
    attend_from_one_token,
    suits_kernel,
)


def filled(rows: int, length: int) -> Any:
    cache = DynamicCache()
    generator = torch.Generator().manual_seed(0)
    cache.update(*(torch.randn(rows, 2, length, 4, generator=generator) for _ in range(2)), 0)
    return cache


def test_a_slot_sees_its_own_token_and_all_before() -> None:
    places = Places(torch.tensor([0, 2, 9]), 2, 4)
    assert (places.mask(torch.float32) == 0)[:, 0, 0].tolist() == [
        [True, False, False, False],
        [True, True, True, False],
    ]


def test_prompts_are_written_from_the_first_place_on_and_new_states_to_their_own() -> None:
    cache = filled(2, 3)
    (layer,) = cache.layers
    slots = SlotLayer(layer, slots=4, capacity=6)
    # Row 0 is padded by a column; both prompts go to slots 3 and 1, the second one to slot 0 as well.
    order = torch.tensor([[1, 2, 0], [0, 1, 2]])
    slots.fill(torch.tensor([3, 1, 0]), layer, torch.tensor([0, 1, 1]), order)
    assert torch.equal(slots.all_keys[3, :, :2], layer.keys[0, :, 1:])
    assert torch.equal(slots.all_keys[1, :, :3], layer.keys[1])
    assert torch.equal(slots.all_values[0, :, :3], layer.values[1])
    slots.places = Places(torch.tensor([3, 3, 0, 2]), 4, 5)
    new = torch.full((4, 2, 1, 4), 7.0)
    keys, _ = slots.update(new, new)
    assert keys.shape == (4, 2, 5, 4)
    assert [(keys[slot, 0, :, 0] == 7).nonzero().flatten().tolist() for slot in range(4)] == [[3], [3], [0], [2]]
    slots.move(torch.tensor([1, 3]))
    assert torch.equal(slots.all_keys[1, :, :2], layer.keys[0, :, 1:])


@pytest.mark.parametrize("capacity", [2, 3, 7])
def test_room_is_made_larger_and_smaller_and_states_stay(capacity: int) -> None:
    (layer,) = filled(4, 3).layers
    slots = SlotLayer(layer, slots=4, capacity=3)
    slots.fill(torch.arange(4), layer, torch.arange(4), torch.arange(3).expand(4, 3))
    slots.resize(2, capacity)
    kept = min(capacity, 3)
    for ours, theirs in ((slots.all_keys, layer.keys), (slots.all_values, layer.values)):
        assert ours.shape == (2, 2, capacity, 4)
        assert ours.is_contiguous()
        assert torch.equal(ours[:, :, :kept], theirs[:2, :, :kept])
        # What nobody has written is multiplied by 0, and must be a number.
        assert not ours[:, :, kept:].any()


@pytest.mark.parametrize("heads", [2, 6])
def test_attention_from_one_token_is_that_of_transformers(heads: int) -> None:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    query, (key, value) = torch.randn(3, heads, 1, 4), (torch.randn(3, 2, 5, 4) for _ in range(2))
    module: Any = torch.nn.Module()
    module.num_key_value_groups = heads // 2
    mask = Places(torch.tensor([0, 2, 4]), 3, 5).mask(torch.float32)
    expected, _ = sdpa_attention_forward(module, query, key, value, mask, scaling=0.3)
    found, _ = attend_from_one_token(module, query, key, value, mask, scaling=0.3)
    torch.testing.assert_close(found, expected)


def test_a_cap_on_attention_is_refused() -> None:
    states = torch.zeros(1, 1, 1, 2)
    with pytest.raises(InputError, match="softcap=30"):
        attend_from_one_token(torch.nn.Module(), states, states, states, None, softcap=30.0)


def test_slots_fit_a_rollout_of_their_own_kind() -> None:
    cache = filled(2, 3)
    sizes: dict[str, Any] = {"count": 4, "longest": 5, "temperature": 1.0, "stop_tokens": torch.tensor([1])}
    slots = Slots(cache, capacity=8, **sizes)
    assert slots.fit(cache, capacity=8, **sizes)
    assert slots.fit(cache, capacity=6, **sizes)
    assert not slots.fit(cache, capacity=9, **sizes)
    for other in ({"count": 3}, {"longest": 4}, {"temperature": 0.5}, {"stop_tokens": torch.tensor([1, 2])}):
        assert not slots.fit(cache, capacity=8, **{**sizes, **other})
    with torch.autocast("cpu", torch.bfloat16):
        assert not slots.fit(cache, capacity=8, **sizes)
    assert slots.cache_bytes == 2 * 4 * 2 * 8 * 4 * 4


def test_a_cache_that_nobody_uses_is_gone_at_once() -> None:
    """Its layers are known by their own numbers to compiled blocks, and by nobody else."""
    slots = Slots(filled(1, 3), count=1, capacity=4, longest=1, temperature=1.0, stop_tokens=torch.tensor([1]))
    assert [alone.layers[0] for alone in slots.cache.alone] == slots.layers
    layer = ref(slots.layers[0])
    del slots
    assert layer() is None


@pytest.mark.parametrize(
    ("query", "value", "mask", "suits"),
    [
        ({}, {}, {}, True),
        ({"dtype": torch.float64}, {}, {}, False),
        # Latent attention has values of their own size, others a mask for each head, or one of true and false.
        ({}, {"size": 8}, {}, False),
        ({}, {}, {"size": 4}, False),
        ({}, {}, {"dtype": torch.bool}, False),
    ],
)
def test_the_kernel_is_for_one_mask_and_values_of_the_keys_size(query: Any, value: Any, mask: Any, suits: bool) -> None:
    tensors = (
        torch.zeros(2, 4, 1, 16, dtype=query.get("dtype", torch.float32)),
        torch.zeros(2, 2, 9, value.get("size", 16)),
        torch.zeros(2, mask.get("size", 1), 1, 9, dtype=mask.get("dtype", torch.float32)),
    )
    assert suits_kernel(*tensors) == suits
