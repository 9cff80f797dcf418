from collections.abc import Callable
from typing import Any
from weakref import ref

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from rlhf_lightning.rollout import joined as own
from rlhf_lightning.rollout.generate import fast_weights
from rlhf_lightning.rollout.joined import joined

TOKENS = torch.randint(2, 258, (3, 9), generator=torch.Generator().manual_seed(0))


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(4, 6), nn.Linear(4, 6)


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of the weights of all products that are made."""
    shapes: list[tuple[int, ...]] = []
    linear = nn.functional.linear

    def noted(states: Any, weight: Any, bias: Any = None) -> Any:
        shapes.append(tuple(weight.shape))
        return linear(states, weight, bias)

    monkeypatch.setattr(nn.functional, "linear", noted)
    return shapes


def test_a_network_says_the_same_with_four_products_in_a_block_for_seven(
    policy: Callable[..., Any], products: list[tuple[int, ...]]
) -> None:
    network = policy()
    names = dict(network.named_modules()).keys()
    with torch.no_grad():
        expected = network(TOKENS).logits
        before, products[:] = len(products), []
        with joined(network):
            found = network(TOKENS).logits
    torch.testing.assert_close(found, expected)
    assert (before, len(products)) == (7 * 2 + 1, 4 * 2 + 1)
    assert dict(network.named_modules()).keys() == names
    assert all(type(x) is nn.Linear for name, x in network.named_modules() if name.endswith("_proj"))


def test_weights_that_changed_are_read_anew_from_the_same_place(policy: Callable[..., Any]) -> None:
    network = policy()
    places = []
    for _ in range(2):
        with torch.no_grad():
            for weight in network.parameters():
                weight.add_(0.1)
            expected = network(TOKENS).logits
            with joined(network, keep=True):
                torch.testing.assert_close(network(TOKENS).logits, expected)
                places.append([weight.data_ptr() for weight in network.parameters()])
    assert places[0] == places[1]


def test_biases_are_joined_and_a_network_that_gives_its_layers_different_states_is_right() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q_proj, self.k_proj, self.v_proj = nn.Linear(4, 6), nn.Linear(4, 2), nn.Linear(4, 2)

        def forward(self, states: Any) -> Any:
            return self.q_proj(states), self.k_proj(states + 1), self.v_proj(states)

    attention, states = Attention(), torch.randn(3, 4)
    with torch.no_grad():
        expected = attention(states)
        with joined(attention):
            found = attention(states)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_layers_stay_as_they_are_where_they_are_large_or_not_alike(
    policy: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    network = policy()
    network.model.layers[0].mlp.up_proj.half()
    monkeypatch.setattr(
        own, "LARGEST", sum(getattr(network.model.layers[1].self_attn, f"{x}_proj").weight.nbytes for x in "qkv")
    )
    with joined(network):
        kinds = [type(block.self_attn.q_proj) for block in network.model.layers]
        others = [type(block.mlp.gate_proj) for block in network.model.layers]
    assert nn.Linear not in kinds
    # One of another type, and one too large.
    assert others == [nn.Linear, nn.Linear]


def test_layers_are_put_back_after_an_error(policy: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    network = policy()
    with pytest.raises(RuntimeError, match="on the way"), joined(network):
        raise RuntimeError("on the way")
    assert type(network.model.layers[0].self_attn.q_proj) is nn.Linear
    # In the middle of joining, too.
    parts, calls = own._parts, iter(range(100))

    def fail_at_the_third(*given: Any, **settings: Any) -> Any:
        if next(calls) == 2:
            raise RuntimeError("no memory")
        return parts(*given, **settings)

    monkeypatch.setattr(own, "_parts", fail_at_the_third)
    with pytest.raises(RuntimeError, match="no memory"), joined(network):
        pass
    assert next(calls) == 3
    assert all(type(x) is nn.Linear for name, x in network.named_modules() if name.endswith("_proj"))


def test_a_layer_that_somebody_watches_stays(policy: Callable[..., Any]) -> None:
    network, seen = policy(), []
    network.model.layers[0].self_attn.k_proj.register_forward_hook(lambda *_: seen.append("k"))
    with joined(network), torch.no_grad():
        network(TOKENS)
    assert seen == ["k"]


def test_nothing_of_a_rollout_is_kept_alive() -> None:
    gated, states = Gated(), torch.randn(2, 4)
    known = ref(states)
    with joined(gated, keep=True), torch.no_grad():
        gated.gate_proj(states)
    del states
    assert known() is None


def test_weights_of_another_shape_are_joined_anew() -> None:
    gated, states = Gated(), torch.randn(2, 4)
    for size in (6, 8):
        gated.up_proj = nn.Linear(4, size)
        with torch.no_grad(), joined(gated, keep=True):
            expected = nn.functional.linear(states, gated.up_proj.weight[-size:], gated.up_proj.bias[-size:])
            gated.gate_proj(states)
            torch.testing.assert_close(gated.up_proj(states), expected)


@pytest.mark.parametrize("keep", [True, False])
def test_a_copy_without_numbers_as_an_estimate_makes_is_kept_only_where_it_is_asked_for(keep: bool) -> None:
    with FakeTensorMode(), torch.device("cuda"):
        gated = Gated()
        with fast_weights(gated, rows=3, keep=keep):
            assert type(gated.gate_proj) is own._First
    assert (gated in own._kept) == keep
