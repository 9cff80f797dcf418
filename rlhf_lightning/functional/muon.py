"""Which way Muon steps: along the orthogonal matrix that is nearest to a matrix (Jordan et al. 2024).

Torch's own Muon goes through matrices one by one in bfloat16; on a CPU, and where matrices are small, those of one
shape together take a small part of that time.
"""

from collections.abc import Callable, Iterable, Iterator

import torch
from jaxtyping import Float
from torch import Tensor, nn

ITERATIONS = 5
POLYNOMIAL = (3.4445, -4.7750, 2.0315)
"""Of s, s^3 and s^5: Newton and Schulz's iteration brings singular values between .7 and 1.2 soonest with them (Jordan
et al. 2024)."""

TOGETHER = 2**22
"""Bytes of matrices that are made orthogonal at a time, which takes some times their memory."""


def by_kind(
    weights: Iterable[nn.Parameter], not_matrices: Iterable[nn.Parameter]
) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Return the weights of Muon, and all others: ``not_matrices``, and what has not two dimensions."""
    others = {id(weight) for weight in not_matrices}
    kinds: tuple[list[nn.Parameter], list[nn.Parameter]] = [], []
    for weight in weights:
        kinds[weight.dim() != 2 or id(weight) in others].append(weight)
    return kinds


def directions(
    weights: Iterable[nn.Parameter], of_weight: Callable[[nn.Parameter], Tensor]
) -> Iterator[tuple[nn.Parameter, Tensor]]:
    """Yield matrices, those of one shape or that turned together, each with `nearest_orthogonal` of what is its own."""
    for together in _alike(weights):
        found = nearest_orthogonal(torch.stack([_wide(of_weight(weight)) for weight in together]))
        for weight, direction in zip(together, found, strict=True):
            yield weight, direction if _is_wide(weight) else direction.T


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
    """Yield weights that are of one shape, or that turned, of one type and device, as many as go together."""
    alike: dict[tuple[torch.Size, torch.dtype, torch.device], list[nn.Parameter]] = {}
    for weight in weights:
        alike.setdefault((_wide(weight).shape, weight.dtype, weight.device), []).append(weight)
    for found in alike.values():
        number = max(1, TOGETHER // found[0].nbytes)
        yield from (found[first : first + number] for first in range(0, len(found), number))


def _wide(matrix: Tensor) -> Tensor:
    return matrix if _is_wide(matrix) else matrix.T


def _is_wide(matrix: Tensor) -> bool:
    return matrix.shape[0] <= matrix.shape[1]
