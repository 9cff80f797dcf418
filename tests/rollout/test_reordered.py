from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from rlhf_lightning.networks.compiling import compile_blocks
from rlhf_lightning.rollout import reordered as own
from rlhf_lightning.rollout.generate import sample_tokens
from rlhf_lightning.rollout.reordered import reordered

TOKENS = torch.randint(2, 258, (3, 9), generator=torch.Generator().manual_seed(0))

needs_onednn = pytest.mark.skipif(not own._is_at_hand(), reason="needs a torch with oneDNN")


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
@pytest.mark.parametrize(("kind", "rounding"), [(torch.float32, 1e-5), (torch.bfloat16, 0.0)])
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
    with reordered(network, rows=3):
        second = logits(network)
    torch.testing.assert_close(second, logits(network), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(first, second)


@needs_onednn
def test_a_bias_is_added_and_states_of_another_type_are_cast_by_autocast() -> None:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(256, 256))
    states = torch.randn(2, 3, 256)
    with torch.no_grad(), reordered(layers, rows=6):
        assert kinds(layers) == ["_Reordered"]
        torch.testing.assert_close(layers(states), nn.functional.linear(states, layers[0].weight, layers[0].bias))
        with torch.autocast("cpu", torch.bfloat16):
            assert layers(states.bfloat16()).dtype == torch.bfloat16


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
def test_the_sampler_reads_reordered_weights(network: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    network.lm_head.register_forward_pre_hook(lambda *_: None)  # Watched: stays, and is where we look.
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
    assert seen[-2:] == [14, 14]
