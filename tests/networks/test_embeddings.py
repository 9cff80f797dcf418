from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from rlhf_lightning.networks.embeddings import embeddings_and_heads


@pytest.mark.parametrize("tied", [True, False])
def test_they_are_embeddings_output_layer_and_scalar_heads(tied: bool, policy: Callable[..., Any]) -> None:
    network = policy("llama", tie_word_embeddings=tied)
    both = nn.ModuleList([network, nn.Linear(4, 1)])
    found = {id(weight) for weight in embeddings_and_heads(both)}
    expected = [network.get_input_embeddings().weight, network.get_output_embeddings().weight, *both[1].parameters()]
    assert found == {id(weight) for weight in expected}
    assert len(found) == (3 if tied else 4)
    assert torch.equal(network.get_input_embeddings().weight, network.get_output_embeddings().weight) == tied
