"""Log-probabilities from last hidden states and output layer: (tokens x vocabulary) is never whole in memory.

The logits of a few positions at a time are made, used and forgotten. What the backward needs of them is kept where it
is small and made again elsewhere (Liger's fused loss, Hsu et al. 2024, is the same idea). On a GPU two compiled kernels
read the logits as the product left them; elsewhere they are worked on in place, step by step.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from rlhf_lightning.functional.fused import can_be_fused, fused
from rlhf_lightning.functional.precision import at_least_float32

CHUNK_BYTES = {"cpu": 2**22, "cuda": 2**28}
"""Size of the logits that are worked on at a time: on a CPU they stay in its cache."""
FEWEST_POSITIONS = 64
"""Below these a matrix product is slow."""
KEPT_BYTES = 2**27
"""Size of all that is kept from forward to backward with an entry for each token of the vocabulary."""


def head_logprobs(
    hidden: Float[Tensor, "N H"],
    weight: Float[Tensor, "V H"],
    bias: Float[Tensor, " V"] | None,
    tokens: Int[Tensor, " N"],
    *,
    temperature: float = 1.0,
) -> Float[Tensor, " N"]:
    """Return log p(token) in nats under (weight hidden + bias) / temperature, in at least float32."""
    logprobs: Tensor = _Logprobs.apply(
        _as_read(hidden, hidden), weight, bias, tokens, temperature, False, torch.is_grad_enabled()
    )[0]
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
        _as_read(hidden, hidden), weight, bias, tokens, temperature, True, torch.is_grad_enabled()
    )
    return logprobs, entropies


def total_logprob(
    hidden: Float[Tensor, "N H"],
    weight: Float[Tensor, "V H"],
    bias: Float[Tensor, " V"] | None,
    tokens: Int[Tensor, " N"],
) -> Float[Tensor, ""]:
    """Return the sum of log p(token) in nats; its gradient is found beside it, so that no logits are made twice."""
    total: Tensor = _TotalLogprob.apply(_as_read(hidden, hidden), weight, bias, tokens, torch.is_grad_enabled())
    return total


class _Read(NamedTuple):
    """What the gradient of the logits (N, V) of some positions is made from."""

    kept: Tensor
    """(N, V) the softmax, or the logits where ``is_fused``."""
    is_fused: bool
    log_totals: Tensor
    """(N,) the logarithm of the sum of exp(logits / temperature)."""
    entropies: Tensor
    """(N,), or 0."""


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
        weight, bias = _layer_as_read(ctx, hidden, weight, bias)
        logprobs, entropies, log_totals = (at_least_float32(hidden.new_zeros(len(tokens))) for _ in range(3))
        kept: list[Tensor] = []
        are_fused: list[bool] = []
        room = KEPT_BYTES if with_gradient else 0
        with torch.autocast(hidden.device.type, enabled=False):
            for rows in _chunks(hidden, weight):
                logits = torch.nn.functional.linear(hidden[rows], weight, bias)
                logprobs[rows], read = _read(logits, tokens[rows], temperature, with_entropy)
                log_totals[rows], entropies[rows] = read.log_totals, read.entropies
                room -= read.kept.nbytes
                if room >= 0:
                    kept.append(read.kept)
                    are_fused.append(read.is_fused)
        if with_gradient:
            # A copy: what is returned gets a gradient, which a compiler would look for.
            ctx.save_for_backward(hidden, weight, bias, tokens, entropies.clone(), log_totals, *kept)
            ctx.temperature, ctx.are_fused = temperature, are_fused
        return logprobs, entropies

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_logprobs: Tensor | None, of_entropies: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, tokens, entropies, log_totals, *kept = ctx.saved_tensors
        gradients = _Gradients(ctx, hidden, weight, bias)
        with torch.autocast(hidden.device.type, enabled=False):
            for i, rows in enumerate(_chunks(hidden, weight)):
                if i < len(kept):
                    of_chunk, is_fused = kept[i], ctx.are_fused[i]
                else:
                    of_chunk = torch.nn.functional.linear(hidden[rows], weight, bias)
                    is_fused = can_be_fused(of_chunk)
                    of_chunk = of_chunk if is_fused else _scaled(of_chunk, ctx.temperature).softmax(1)
                read = _Read(of_chunk, is_fused, log_totals[rows], entropies[rows])
                outer = (None if x is None else x[rows] for x in (of_logprobs, of_entropies))
                gradients.add(rows, _slopes(read, tokens[rows], ctx.temperature, *outer))
        return *gradients.found(), None, None, None, None


class _TotalLogprob(torch.autograd.Function):
    """Sum of the log-probabilities; all of its gradient but a factor is known in the forward."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, tokens: Tensor, with_gradient: bool
    ) -> Tensor:
        weight, bias = _layer_as_read(ctx, hidden, weight, bias)
        total = at_least_float32(hidden.new_zeros(()))
        gradients = _Gradients(ctx, hidden, weight, bias) if with_gradient else None
        with torch.autocast(hidden.device.type, enabled=False):
            for rows in _chunks(hidden, weight):
                logits = torch.nn.functional.linear(hidden[rows], weight, bias)
                logprobs, read = _read(logits, tokens[rows], 1.0, False)
                total += logprobs.sum()
                if gradients is not None:
                    ones = torch.ones_like(logprobs)
                    gradients.add(rows, _slopes(read, tokens[rows], 1.0, ones, None))
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
        self.hidden, self.weight, self.kinds = hidden, weight, ctx.kinds
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        self.of_hidden = torch.empty_like(hidden) if wants_hidden else None
        self.of_weight = _sum_of(weight) if wants_weight else None
        self.of_bias = None if bias is None or not wants_bias else _sum_of(bias)

    def add(self, rows: slice, of_logits: Tensor) -> None:
        """Take the gradient of the logits of some positions."""
        if self.of_bias is not None:
            self.of_bias += of_logits.sum(dim=0, dtype=self.of_bias.dtype)
        of_logits = of_logits.to(self.weight.dtype)
        if self.of_hidden is not None:
            torch.mm(of_logits, self.weight, out=self.of_hidden[rows])
        if self.of_weight is None:
            return
        if self.of_weight.dtype == of_logits.dtype:
            self.of_weight.addmm_(of_logits.T, self.hidden[rows])
        elif of_logits.is_cuda:
            torch.addmm(
                self.of_weight, of_logits.T, self.hidden[rows], out_dtype=self.of_weight.dtype, out=self.of_weight
            )
        else:
            # Only the sum is float32: the product of a chunk is rounded here.
            self.of_weight += of_logits.T @ self.hidden[rows]

    def found(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Return the three, None for what is not wanted, each in the type of what was given."""
        found = zip((self.of_weight, self.of_bias), self.kinds, strict=True)
        of_weight, of_bias = (None if x is None else x.to(kind) for x, kind in found)
        return self.of_hidden, of_weight, of_bias


def _sum_of(weight: Tensor) -> Tensor:
    """Return a sum over all positions that is 0 yet, not in half precision: small parts would be lost."""
    return torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))


def _layer_as_read(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return the layer in the type in which autocast reads it; the context remembers the types of its gradients."""
    ctx.kinds = (weight.dtype, None if bias is None else bias.dtype)
    return _as_read(weight, hidden), None if bias is None else _as_read(bias, hidden)


def _as_read(operand: Tensor, hidden: Tensor) -> Tensor:
    """Return states or layer in the type that autocast would take for a linear layer of the states."""
    kind = hidden.device.type
    if not torch.is_autocast_enabled(kind) or hidden.dtype == torch.float64:
        return operand
    return operand.to(torch.get_autocast_dtype(kind))


def _chunks(hidden: Tensor, weight: Tensor) -> Iterator[slice]:
    """Yield the positions whose logits are made at a time."""
    item = torch.promote_types(weight.dtype, torch.float32).itemsize
    fitting = CHUNK_BYTES["cpu" if hidden.device.type == "cpu" else "cuda"] // (len(weight) * item)
    size = max(FEWEST_POSITIONS, fitting)
    for start in range(0, len(hidden), size):
        yield slice(start, min(start + size, len(hidden)))


def _scaled(logits: Tensor, temperature: float) -> Tensor:
    """Return logits / temperature in at least float32, in the same memory where it can be."""
    logits = at_least_float32(logits)
    return logits if temperature == 1 else logits.div_(temperature)


def _read(logits: Tensor, tokens: Tensor, temperature: float, with_entropy: bool) -> tuple[Tensor, _Read]:
    """Return the log-probabilities (N,), and what their gradient needs, of logits (N, V), which are used up."""
    if can_be_fused(logits):
        logprobs, entropies, log_totals = _fused_read(logits, tokens, temperature, with_entropy)
        return logprobs, _Read(logits, True, log_totals, entropies)
    logits = _scaled(logits, temperature)
    largest = logits.amax(dim=1, keepdim=True)
    logits.sub_(largest)
    softmax = logits.exp()
    total = softmax.sum(dim=1)
    log_total = total.log()
    logprobs = logits.gather(1, tokens.unsqueeze(1)).squeeze(1) - log_total
    softmax.div_(total.unsqueeze(1))
    entropies = log_total - logits.mul_(softmax).sum(dim=1) if with_entropy else torch.zeros_like(logprobs)
    return logprobs, _Read(softmax, False, log_total + largest.squeeze(1), entropies)


def _slopes(
    read: _Read, tokens: Tensor, temperature: float, of_logprobs: Tensor | None, of_entropies: Tensor | None
) -> Tensor:
    """Return the gradient of the logits: of each log-probability (one-hot - p), and dH / dz = -p (log p + H)."""
    if read.is_fused:
        return _fused_slopes(read.kept, read.log_totals, read.entropies, tokens, temperature, of_logprobs, of_entropies)
    softmax = read.kept
    slopes = torch.zeros_like(softmax) if of_logprobs is None else softmax * -of_logprobs.unsqueeze(1)
    if of_logprobs is not None:
        slopes.scatter_add_(1, tokens.unsqueeze(1), of_logprobs.unsqueeze(1))
    if of_entropies is not None:
        slope = torch.xlogy(softmax, softmax).addcmul_(softmax, read.entropies.unsqueeze(1))
        slopes -= slope.mul_(of_entropies.unsqueeze(1))
    return slopes if temperature == 1 else slopes.div_(temperature)


@fused
def _fused_read(
    logits: Tensor, tokens: Tensor, temperature: float, with_entropy: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """`_read`, without what has an entry for each token of the vocabulary."""
    scaled = at_least_float32(logits) / temperature
    log_totals = scaled.logsumexp(dim=1)
    logprobs = scaled.gather(1, tokens.unsqueeze(1)).squeeze(1) - log_totals
    entropies = torch.zeros_like(log_totals)
    if with_entropy:
        normal = scaled - log_totals.unsqueeze(1)
        entropies = -torch.where(normal.isinf(), 0, normal.exp() * normal).sum(dim=1)
    return logprobs, entropies, log_totals


@fused
def _fused_slopes(
    logits: Tensor,
    log_totals: Tensor,
    entropies: Tensor,
    tokens: Tensor,
    temperature: float,
    of_logprobs: Tensor | None,
    of_entropies: Tensor | None,
) -> Tensor:
    """`_slopes` from logits, in their type."""
    normal = at_least_float32(logits) / temperature - log_totals.unsqueeze(1)
    softmax = normal.exp()
    slopes = torch.zeros_like(softmax)
    if of_logprobs is not None:
        is_token = torch.arange(logits.shape[1], device=logits.device) == tokens.unsqueeze(1)
        slopes = (is_token.to(softmax.dtype) - softmax) * of_logprobs.unsqueeze(1)
    if of_entropies is not None:
        by_entropy = softmax * (normal + entropies.unsqueeze(1)) * of_entropies.unsqueeze(1)
        slopes = slopes - torch.where(normal.isinf(), 0, by_entropy)
    return (slopes / temperature).to(logits.dtype)
