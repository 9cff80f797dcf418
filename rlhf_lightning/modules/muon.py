"""Muon for the matrices of a network's blocks, and AdamW for all other weights, as one optimizer.

Torch's own goes through matrices one by one in bfloat16; on a CPU, and where matrices are small, those of one shape
together take a small part of that time.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from rlhf_lightning.modules.hardware import can_be_fused

MOMENTUM = 0.95
"""Of Nesterov's momentum."""

ITERATIONS = 5
POLYNOMIAL = (3.4445, -4.7750, 2.0315)
"""Of s, s^3 and s^5: Newton and Schulz's iteration brings singular values between .7 and 1.2 soonest with them (Jordan
et al. 2024)."""

LIKE_ADAMW = 0.2
"""The root mean square of a step of AdamW at a learning rate of 1 (Liu et al. 2025)."""

TOGETHER = 2**26
"""Bytes of matrices that are made orthogonal at a time."""


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
        settings: dict[str, Any] = {"lr": lr, "weight_decay": weight_decay}
        fused = can_be_fused(others) or None
        self._adamw = torch.optim.AdamW(others, fused=fused, **settings) if others else None
        groups: list[dict[str, Any]] = [] if self._adamw is None else self._adamw.param_groups
        super().__init__([{"params": matrices, **settings}, *groups], {})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step all weights that have a gradient; return what ``closure``, called before with gradients, returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        of_matrices, *others = self.param_groups
        self._step_matrices(of_matrices)
        if self._adamw is not None:
            # Not once and for all: a checkpoint that is loaded puts new ones in their place.
            self._adamw.param_groups, self._adamw.state = others, self.state
            self._adamw.step()
        return loss

    def _step_matrices(self, group: dict[str, Any]) -> None:
        rate, decay = group["lr"], group["weight_decay"]
        for together in _alike(weight for weight in group["params"] if weight.grad is not None):
            found = nearest_orthogonal(torch.stack([_wide(self._with_momentum(weight)) for weight in together]))
            size = rate * LIKE_ADAMW * max(together[0].shape) ** 0.5
            for weight, direction in zip(together, found, strict=True):
                _wide(weight).mul_(1 - rate * decay).add_(direction, alpha=-size)

    def _with_momentum(self, weight: nn.Parameter) -> Tensor:
        gradient = weight.grad
        assert gradient is not None
        state = self.state[weight]
        if not state:
            state["momentum"] = torch.zeros_like(gradient)
        momentum: Tensor = state["momentum"].lerp_(gradient, 1 - MOMENTUM)
        return gradient.lerp(momentum, MOMENTUM)


def nearest_orthogonal(matrices: Float[Tensor, "N R C"]) -> Float[Tensor, "N R C"]:
    """Return about U V' of each matrix U S V', with no more rows than columns: all its singular values near 1.

    In float32 on a CPU, in bfloat16 elsewhere, which is as good. A matrix of zeros stays one.
    """
    of_s, of_s3, of_s5 = POLYNOMIAL
    found = matrices.to(torch.float32 if matrices.device.type == "cpu" else torch.bfloat16)
    # By more than the largest singular value of each.
    found = found / found.norm(dim=(1, 2), keepdim=True).clamp(min=torch.finfo(found.dtype).tiny)
    for _ in range(ITERATIONS):
        squares = found @ found.mT
        factor = torch.baddbmm(squares, squares, squares, beta=of_s3, alpha=of_s5)
        found = torch.baddbmm(found, factor, found, beta=of_s)
    return found


def _alike(weights: Iterable[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Yield weights that are of one shape, or that transposed, of one type and device, as many as go together."""
    alike: dict[Any, list[nn.Parameter]] = {}
    for weight in weights:
        alike.setdefault((_wide(weight).shape, weight.dtype, weight.device), []).append(weight)
    for found in alike.values():
        number = max(1, TOGETHER // found[0].nbytes)
        yield from (found[first : first + number] for first in range(0, len(found), number))


def _wide(matrix: Tensor) -> Tensor:
    return matrix if len(matrix) <= matrix.shape[1] else matrix.T
