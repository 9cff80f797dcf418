import pytest
import torch
from torch import nn

from rlhf_lightning.networks.offloading import HostWeights


def test_on_a_cpu_nothing_moves() -> None:
    layer = nn.Linear(2, 2)
    place = layer.weight.data_ptr()
    host = HostWeights()
    with host.on(torch.device("cpu"), [layer]):
        assert layer.weight.data_ptr() == place
    assert layer.weight.data_ptr() == place


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_weights_are_on_the_device_in_the_block_and_on_the_host_after_it() -> None:
    device, host = torch.device("cuda", torch.cuda.current_device()), HostWeights()
    before = torch.cuda.memory_allocated()
    layer = nn.Linear(1024, 1024, bias=False, device=device).requires_grad_(False)
    expected = layer.weight.sum()
    for _ in range(2):
        with host.on(device, [layer]):
            with host.on(device, [layer]):
                assert layer.weight.is_cuda
            assert torch.equal(layer.weight.sum(), expected)
        assert not layer.weight.is_cuda
        assert layer.weight.is_pinned()
        assert torch.cuda.memory_allocated() < before + layer.weight.nbytes
    with pytest.raises(ZeroDivisionError), host.on(device, [layer]):
        1 / 0  # noqa: B018
    assert not layer.weight.is_cuda
