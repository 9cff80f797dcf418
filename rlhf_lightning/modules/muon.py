"""Muon for the matrices of a network's blocks, and AdamW for all other weights, as one optimizer."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn


class MuonWithAdamW(torch.optim.Optimizer):
    """Steps along the orthogonal matrix nearest to the momentum of a matrix (Jordan et al. 2024); AdamW for the rest.

    A step of Muon is as large as one of AdamW at the same learning rate, lr * 0.2 * sqrt(max(rows, columns)) (Liu et
    al. 2025, equation 4), so both share the rate and its schedule. A matrix has one number of state for each of its
    own, its momentum, where AdamW has two.
    """

    def __init__(
        self,
        weights: Iterable[nn.Parameter],
        not_matrices: Iterable[nn.Parameter],
        *,
        lr: float,
        weight_decay: float = 0.0,
    ) -> None:
        """Take weights, of which ``not_matrices`` are stepped by AdamW although they have two dimensions."""
        by_adamw = {id(weight) for weight in not_matrices}
        weights = list(weights)
        matrices = [weight for weight in weights if weight.dim() == 2 and id(weight) not in by_adamw]
        others = [weight for weight in weights if weight.dim() != 2 or id(weight) in by_adamw]
        self._parts: list[torch.optim.Optimizer] = []
        if matrices:
            muon = torch.optim.Muon(matrices, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
            self._parts.append(muon)
        if others:
            self._parts.append(torch.optim.AdamW(others, lr=lr, weight_decay=weight_decay))
        super().__init__([group for part in self._parts for group in part.param_groups], {})

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step all weights that have a gradient; return what ``closure``, called before with gradients, returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part, group in zip(self._parts, self.param_groups, strict=True):
            # Not once and for all: a checkpoint that is loaded puts new ones in their place.
            part.param_groups, part.state = [group], self.state
            part.step()
        return loss
