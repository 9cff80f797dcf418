from typing import Any

import pytest
from torch import nn

from rlhf_lightning.networks.modes import evaluating


def test_each_part_gets_its_own_mode_back() -> None:
    network: Any = nn.Sequential(nn.Dropout(), nn.Sequential(nn.Dropout(), nn.Dropout()))
    network[1].eval()
    network[1][0].train()
    before = [part.training for part in network.modules()]
    with evaluating(network):
        assert not any(part.training for part in network.modules())
    assert [part.training for part in network.modules()] == before
    with pytest.raises(RuntimeError, match="stop"), evaluating(network):
        raise RuntimeError("stop")
    assert [part.training for part in network.modules()] == before
