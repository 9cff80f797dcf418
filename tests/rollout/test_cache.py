from collections.abc import Callable
from typing import Any

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer, StaticLayer

from rlhf_lightning.rollout.cache import RoomyLayer, make_room

PROMPT = torch.tensor([[5, 9, 7], [8, 4, 3], [40, 41, 42]])
NEXT = torch.tensor([[11], [12], [13]])


def after_prompt(network: Any, room: int | None) -> Any:
    cache = network(PROMPT, use_cache=True).past_key_values
    if room is not None:
        make_room(cache, room)
    return cache


def test_steps_in_a_roomy_cache_have_the_logits_of_the_whole_sequence(policy: Callable[..., Any]) -> None:
    network = policy()
    cache, sequence = after_prompt(network, 2), PROMPT
    for step in (NEXT, NEXT + 1):
        found = network(step, past_key_values=cache, use_cache=True).logits[:, -1]
        sequence = torch.cat([sequence, step], dim=1)
        torch.testing.assert_close(found, network(sequence).logits[:, -1], rtol=1e-4, atol=1e-4)


def test_rows_that_are_selected_go_on_as_in_a_plain_cache(policy: Callable[..., Any]) -> None:
    network, kept = policy(), torch.tensor([0, 2])
    logits = []
    for room in (2, None):
        cache = after_prompt(network, room)
        network(NEXT, past_key_values=cache, use_cache=True)
        cache.batch_select_indices(kept)
        logits.append(network(NEXT[kept], past_key_values=cache, use_cache=True).logits)
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-5, atol=1e-5)


def test_a_step_copies_none_of_the_states_before(policy: Callable[..., Any]) -> None:
    network = policy()
    cache = after_prompt(network, 1)
    before = cache.layers[0].keys.data_ptr()
    network(NEXT, past_key_values=cache, use_cache=True)
    assert cache.layers[0].keys.data_ptr() == before
    assert cache.get_seq_length() == 4


def test_layers_of_another_kind_stay() -> None:
    cache = DynamicCache()
    cache.layers = [StaticLayer(8), DynamicLayer()]
    states = torch.zeros(1, 2, 3, 4)
    cache.layers[1].update(states, states)
    make_room(cache, 5)
    assert [type(layer) for layer in cache.layers] == [StaticLayer, RoomyLayer]


def test_a_cache_of_another_kind_stays_as_it_is() -> None:
    class States:
        """What a network without attention may remember."""

        def __init__(self) -> None:
            self.last = torch.zeros(1)

    cache = States()
    make_room(cache, 5)
    assert list(vars(cache)) == ["last"]
