from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import nn

from rlhf_lightning.networks.compiling import compile_blocks
from rlhf_lightning.networks.lora import LoRA, add_adapter
from rlhf_lightning.rollout import reordered as own
from rlhf_lightning.rollout.generate import sample_tokens
from rlhf_lightning.rollout.reordered import reordered

TOKENS = torch.randint(2, 258, (3, 9), generator=torch.Generator().manual_seed(0))

needs_onednn = pytest.mark.skipif(not own._is_at_hand(), reason="needs a torch with oneDNN")
needs_bfloat16 = pytest.mark.skipif(
    not own._is_at_hand() or not own._can_multiply(torch.bfloat16), reason="needs oneDNN and a CPU for bfloat16"
)


@pytest.fixture
def network(policy: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> Any:
    """A network of which all layers are large enough."""
    monkeypatch.setattr(own, "SMALLEST", 1)
    return policy()


def kinds(network: nn.Module) -> list[str]:
    return [type(x).__name__ for x in network.modules() if isinstance(x, nn.Linear | own._Reordered)]


def logits(network: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = network(TOKENS).logits
    return found


@needs_onednn
@pytest.mark.parametrize(
    ("kind", "rounding"), [(torch.float32, 1e-5), pytest.param(torch.bfloat16, 0.02, marks=needs_bfloat16)]
)
def test_a_network_says_the_same_in_the_block_and_is_as_it_was_behind_it(
    network: Any, kind: torch.dtype, rounding: float
) -> None:
    network = network.to(kind)
    before, expected = dict(network.state_dict()), logits(network)
    with reordered(network, rows=3):
        assert kinds(network) == ["_Reordered"] * 15
        torch.testing.assert_close(logits(network), expected, rtol=rounding, atol=rounding)
    assert kinds(network) == ["Linear"] * 15
    after = network.state_dict()
    assert list(after) == list(before)
    assert all(weight.data_ptr() == before[name].data_ptr() for name, weight in after.items())


@needs_onednn
def test_weights_that_changed_are_read_anew(network: Any) -> None:
    with reordered(network, rows=3):
        first = logits(network)
    with torch.no_grad():
        for weight in network.parameters():
            weight.mul_(1.5)
    fresh = deepcopy(network)
    with reordered(network, rows=3), reordered(fresh, rows=3):
        second = logits(network)
        assert torch.equal(second, logits(fresh))
    assert not torch.allclose(first, second)


@needs_onednn
def test_a_bias_is_added() -> None:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(256, 256))
    states = torch.randn(2, 3, 256)
    with torch.no_grad(), reordered(layers, rows=6):
        assert kinds(layers) == ["_Reordered"]
        torch.testing.assert_close(layers(states), nn.functional.linear(states, layers[0].weight, layers[0].bias))


@needs_bfloat16
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("states", [torch.float32, torch.bfloat16])
def test_autocast_decides_on_the_type(weights: torch.dtype, states: torch.dtype) -> None:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(256, 256)).to(weights)
    given = torch.randn(2, 3, 256, dtype=states)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = layers(given)
        with reordered(layers, rows=6):
            found = layers(given)
    assert found.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02)


def test_bfloat16_stays_where_the_cpu_has_no_products_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(own, "multiplies_bfloat16", lambda: False)
    layers = nn.Sequential(nn.Linear(256, 256)).bfloat16()
    with reordered(layers, rows=1):
        assert kinds(layers) == ["Linear"]


@needs_onednn
@pytest.mark.parametrize("where", ["in the block", "in the middle of copying"])
def test_after_an_error_the_layers_are_back(network: Any, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    def copied(layer: nn.Linear, rows: int) -> Any:
        made.append(layer)
        if where == "in the middle of copying" and len(made) == 3:
            raise MemoryError
        return nn.Identity()

    monkeypatch.setattr(own, "_Reordered", type("_Reordered", (), {"__new__": lambda _, *args: copied(*args)}))
    with pytest.raises(MemoryError), reordered(network, rows=1):
        raise MemoryError
    assert len(made) == (15 if where == "in the block" else 3)
    assert sum(type(x) is nn.Linear for x in network.modules()) == 15


@needs_onednn
def test_more_than_a_gigabyte_and_layers_with_adapters_stay(network: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    adapted = deepcopy(network)
    add_adapter(adapted, LoRA(r=2))
    with reordered(adapted, rows=1):
        # The output layer has none.
        assert kinds(adapted).count("_Reordered") == 1
    monkeypatch.setattr(own, "LARGEST", 1000)
    with reordered(network, rows=1):
        assert "_Reordered" not in kinds(network)


def test_what_would_not_gain_or_could_not_be_reordered_stays(policy: Callable[..., Any]) -> None:
    small, doubles, watched = policy(), nn.Sequential(nn.Linear(256, 256)).double(), nn.Sequential(nn.Linear(256, 256))
    watched[0].register_forward_hook(lambda *_: None)
    compiled = policy()
    compile_blocks(compiled)
    for kept in (small, doubles, watched, compiled):
        with reordered(kept, rows=1):
            assert "_Reordered" not in kinds(kept)


def test_nothing_is_reordered_where_onednn_is_switched_off(network: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    with reordered(network, rows=1):
        assert kinds(network) == ["Linear"] * 15


@needs_onednn
def test_the_sampler_reads_reordered_weights(network: Any) -> None:
    seen = []
    network.model.register_forward_pre_hook(lambda *_: seen.append(kinds(network).count("_Reordered")))
    sample_tokens(
        network,
        TOKENS,
        torch.ones_like(TOKENS, dtype=torch.bool),
        max_new_tokens=2,
        temperature=1.0,
        stop_tokens=torch.tensor([0]),
        generator=torch.Generator().manual_seed(0),
    )
    # The prompts and one step.
    assert seen[-2:] == [15, 15]
