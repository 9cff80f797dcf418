"""Muon for the matrices of a network's blocks, and AdamW for all other weights, as one optimizer.

Torch's own goes through matrices one by one in bfloat16; on a CPU, and where matrices are small, those of one shape
together take a small part of that time.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

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


def by_kind(
    weights: Iterable[nn.Parameter], not_matrices: Iterable[nn.Parameter]
) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Return the weights of Muon, and all others: ``not_matrices``, and what has not two dimensions."""
    others = {id(weight) for weight in not_matrices}
    kinds: tuple[list[nn.Parameter], list[nn.Parameter]] = [], []
    for weight in weights:
        kinds[weight.dim() != 2 or id(weight) in others].append(weight)
    return kinds


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
