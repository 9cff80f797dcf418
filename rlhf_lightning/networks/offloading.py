"""Frozen networks whose weights wait on the host while nobody reads them."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class HostWeights:
    """The weights of frozen networks on the host, from where they are copied to a device for the length of a block."""

    def __init__(self) -> None:
        """Begin without any."""
        self._on_host: dict[nn.Parameter, Tensor] = {}
        self._in_use = False

    @contextmanager
    def on(self, device: torch.device, networks: Sequence[nn.Module]) -> Iterator[None]:
        """Hold the networks' weights on the device in the block, and on the host after it.

        They must not change: what is on the host is written once. On a CPU, and inside of another such block, nothing
        moves.
        """
        weights = [weight for network in networks for weight in network.parameters()]
        if device.type == "cpu" or self._in_use:
            yield
            return
        for weight in weights:
            if weight in self._on_host:
                weight.data = self._on_host[weight].to(device, non_blocking=True)
        self._in_use = True
        try:
            yield
        finally:
            self._in_use = False
            for weight in weights:
                if weight not in self._on_host:
                    copy = weight.data.cpu()
                    self._on_host[weight] = copy.pin_memory() if device.type == "cuda" else copy
                weight.data = self._on_host[weight]
