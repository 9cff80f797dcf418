"""Muon for the matrices of a network's blocks, and AdamW for all other weights, as one optimizer."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_lightning.functional.muon import directions

MOMENTUM = 0.95
"""Of Nesterov's momentum."""

LIKE_ADAMW = 0.2
"""The root mean square of a step of AdamW at a learning rate of 1 (Liu et al. 2025)."""


class MuonWithAdamW(torch.optim.Optimizer):
    """Steps along the orthogonal matrix nearest to the momentum of a matrix (Jordan et al. 2024); AdamW for the rest.

    A step of Muon is as large as one of AdamW at the same learning rate, lr * 0.2 * sqrt(max(rows, columns)) (Liu et
    al. 2025, equation 4), so both share the rate and its schedule. A matrix has one number of state for each of its
    own, its momentum, where AdamW has two.
    """

    def __init__(
        self, matrices: list[nn.Parameter], adamw: torch.optim.Optimizer, *, lr: float, weight_decay: float = 0.0
    ) -> None:
        """Take the weights of Muon, and the ``adamw`` of all others."""
        self._adamw = adamw
        super().__init__([{"params": matrices, "lr": lr, "weight_decay": weight_decay}, *adamw.param_groups], {})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step all weights that have a gradient; return what ``closure``, called before with gradients, returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        of_matrices, *others = self.param_groups
        self._step_matrices(of_matrices)
        # Not once and for all: a checkpoint that is loaded puts new ones in their place.
        self._adamw.param_groups, self._adamw.state = others, self.state
        self._adamw.step()
        return loss

    def _step_matrices(self, group: dict[str, Any]) -> None:
        rate, decay = group["lr"], group["weight_decay"]
        stepped = [weight for weight in group["params"] if weight.grad is not None]
        for weight, direction in directions(stepped, self._with_momentum):
            weight.mul_(1 - rate * decay).add_(direction, alpha=-rate * LIKE_ADAMW * max(weight.shape) ** 0.5)

    def _with_momentum(self, weight: nn.Parameter) -> Tensor:
        gradient = weight.grad
        assert gradient is not None
        state = self.state[weight]
        if not state:
            state["momentum"] = torch.zeros_like(gradient)
        momentum: Tensor = state["momentum"].lerp_(gradient, 1 - MOMENTUM)
        return gradient.lerp(momentum, MOMENTUM)
