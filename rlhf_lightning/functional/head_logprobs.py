"""Log-probabilities from last hidden states and output layer: (tokens x vocabulary) is never whole in memory.

The logits of a few positions at a time are made, used and forgotten. What the backward needs of them is the softmax,
which is kept where it is small and made again elsewhere (Liger's fused loss, Hsu et al. 2024, is the same idea).
"""

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from rlhf_lightning.functional.precision import at_least_float32

CHUNK_BYTES = {"cpu": 2**22, "cuda": 2**27}
"""Size of the logits that are worked on at a time: on a CPU they stay in its cache."""
FEWEST_POSITIONS = 64
"""Below these a matrix product is slow."""
KEPT_BYTES = 2**27
"""Size of all softmaxes that are kept from forward to backward."""


def head_logprobs(
    hidden: Float[Tensor, "N H"],
    weight: Float[Tensor, "V H"],
    bias: Float[Tensor, " V"] | None,
    tokens: Int[Tensor, " N"],
    *,
    temperature: float = 1.0,
) -> Float[Tensor, " N"]:
    """Return log p(token) in nats under (weight hidden + bias) / temperature, in at least float32."""
    operands = _operands(hidden, weight, bias)
    logprobs: Tensor = _Logprobs.apply(*operands, tokens, temperature, False, torch.is_grad_enabled())[0]
    return logprobs


def head_logprobs_and_entropy(
    hidden: Float[Tensor, "N H"],
    weight: Float[Tensor, "V H"],
    bias: Float[Tensor, " V"] | None,
    tokens: Int[Tensor, " N"],
    *,
    temperature: float = 1.0,
) -> tuple[Float[Tensor, " N"], Float[Tensor, " N"]]:
    """Return `head_logprobs` and the entropy of the same distributions in nats; detach what needs no gradient."""
    logprobs, entropies = _Logprobs.apply(
        *_operands(hidden, weight, bias), tokens, temperature, True, torch.is_grad_enabled()
    )
    return logprobs, entropies


def total_logprob(
    hidden: Float[Tensor, "N H"],
    weight: Float[Tensor, "V H"],
    bias: Float[Tensor, " V"] | None,
    tokens: Int[Tensor, " N"],
) -> Float[Tensor, ""]:
    """Return the sum of log p(token) in nats; its gradient is found beside it, so that no logits are made twice."""
    total: Tensor = _TotalLogprob.apply(*_operands(hidden, weight, bias), tokens, torch.is_grad_enabled())
    return total


class _Logprobs(torch.autograd.Function):
    """Log-probability of each token, and entropy of each distribution where it is asked for, else 0."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        tokens: Tensor,
        temperature: float,
        with_entropy: bool,
        with_gradient: bool,
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        logprobs, entropies = (at_least_float32(hidden.new_zeros(len(tokens))) for _ in range(2))
        kept: list[Tensor] = []
        room = KEPT_BYTES if with_gradient else 0
        with torch.autocast(hidden.device.type, enabled=False):
            for rows in _chunks(hidden, weight):
                logits = _logits(hidden[rows], weight, bias, temperature)
                logprobs[rows], softmax, log_total = _normalised(logits, tokens[rows])
                if with_entropy:
                    entropies[rows] = log_total - logits.mul_(softmax).sum(dim=1)
                room -= softmax.nbytes
                if room >= 0:
                    kept.append(softmax)
        if with_gradient:
            ctx.save_for_backward(hidden, weight, bias, tokens, entropies, *kept)
            ctx.temperature = temperature
        return logprobs, entropies

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_logprobs: Tensor | None, of_entropies: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, tokens, entropies, *kept = ctx.saved_tensors
        gradients = _Gradients(ctx, hidden, weight, bias)
        with torch.autocast(hidden.device.type, enabled=False):
            for i, rows in enumerate(_chunks(hidden, weight)):
                made_again = i >= len(kept)
                softmax = _logits(hidden[rows], weight, bias, ctx.temperature).softmax(1) if made_again else kept[i]
                of_logits = torch.zeros_like(softmax)
                if of_logprobs is not None:
                    of_logits = _through_logprobs(softmax, tokens[rows], of_logprobs[rows])
                if of_entropies is not None:
                    # dH / dz = -p (log p + H)
                    slope = torch.xlogy(softmax, softmax).addcmul_(softmax, entropies[rows].unsqueeze(1))
                    of_logits -= slope.mul_(of_entropies[rows].unsqueeze(1))
                gradients.add(rows, of_logits.div_(ctx.temperature))
        return *gradients.found(), None, None, None, None


class _TotalLogprob(torch.autograd.Function):
    """Sum of the log-probabilities; all of its gradient but a factor is known in the forward."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, tokens: Tensor, with_gradient: bool
    ) -> Tensor:
        total = at_least_float32(hidden.new_zeros(()))
        gradients = _Gradients(ctx, hidden, weight, bias) if with_gradient else None
        with torch.autocast(hidden.device.type, enabled=False):
            for rows in _chunks(hidden, weight):
                logprobs, softmax, _ = _normalised(_logits(hidden[rows], weight, bias, 1.0), tokens[rows])
                total += logprobs.sum()
                if gradients is not None:
                    gradients.add(rows, _through_logprobs(softmax, tokens[rows], torch.ones_like(logprobs)))
        if gradients is not None:
            ctx.save_for_backward(*gradients.found())
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_total: Tensor) -> tuple[Tensor | None, ...]:
        found = [None if x is None else (x * of_total).to(x.dtype) for x in ctx.saved_tensors]
        return *found, None, None


class _Gradients:
    """The gradients of a linear layer's input, weight and bias, of those that are wanted, added up over chunks."""

    def __init__(self, ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
        self.hidden, self.weight, self.bias = hidden, weight, bias
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        self.of_hidden = torch.empty_like(hidden) if wants_hidden else None
        # Sums over all positions: in half precision small parts would be lost.
        self.of_weight = torch.zeros_like(at_least_float32(weight.detach())) if wants_weight else None
        self.of_bias = None if bias is None or not wants_bias else torch.zeros_like(at_least_float32(bias.detach()))

    def add(self, rows: slice, of_logits: Tensor) -> None:
        """Take the gradient of the logits of some positions."""
        if self.of_bias is not None:
            self.of_bias += of_logits.sum(dim=0)
        of_logits = of_logits.to(self.weight.dtype)
        if self.of_hidden is not None:
            torch.mm(of_logits, self.weight, out=self.of_hidden[rows])
        if self.of_weight is None:
            return
        if self.of_weight.dtype == of_logits.dtype:
            self.of_weight.addmm_(of_logits.T, self.hidden[rows])
        else:
            self.of_weight += of_logits.T @ self.hidden[rows]

    def found(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Return the three, None for what is not wanted, each in the type of what it belongs to."""
        of_weight = None if self.of_weight is None else self.of_weight.to(self.weight.dtype)
        of_bias = None if self.of_bias is None or self.bias is None else self.of_bias.to(self.bias.dtype)
        return self.of_hidden, of_weight, of_bias


def _operands(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the three in the type that autocast would take for a linear layer."""
    kind = hidden.device.type
    if not torch.is_autocast_enabled(kind) or hidden.dtype == torch.float64:
        return hidden, weight, bias
    dtype = torch.get_autocast_dtype(kind)
    return hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)


def _chunks(hidden: Tensor, weight: Tensor) -> Iterator[slice]:
    """Yield the positions whose logits are made at a time."""
    item = torch.promote_types(weight.dtype, torch.float32).itemsize
    fitting = CHUNK_BYTES["cpu" if hidden.device.type == "cpu" else "cuda"] // (len(weight) * item)
    size = max(FEWEST_POSITIONS, fitting)
    for start in range(0, len(hidden), size):
        yield slice(start, min(start + size, len(hidden)))


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: float) -> Tensor:
    logits = at_least_float32(torch.nn.functional.linear(hidden, weight, bias))
    return logits if temperature == 1 else logits.div_(temperature)


def _normalised(logits: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return log p(token) and softmax, and the logarithm of its divisor; the maxima are taken off the logits given."""
    logits.sub_(logits.amax(dim=1, keepdim=True))
    softmax = logits.exp()
    total = softmax.sum(dim=1)
    log_total = total.log()
    logprobs = logits.gather(1, tokens.unsqueeze(1)).squeeze(1) - log_total
    return logprobs, softmax.div_(total.unsqueeze(1)), log_total


def _through_logprobs(softmax: Tensor, tokens: Tensor, of_logprobs: Tensor) -> Tensor:
    """Return the gradient of the logits: that of each log-probability times (one-hot - softmax)."""
    of_logits = softmax * -of_logprobs.unsqueeze(1)
    return of_logits.scatter_add_(1, tokens.unsqueeze(1), of_logprobs.unsqueeze(1))
