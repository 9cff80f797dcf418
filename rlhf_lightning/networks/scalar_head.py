"""The linear map from the last hidden state to one number."""

from collections.abc import Callable
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from rlhf_lightning.errors import InputError
from rlhf_lightning.functional.dtensors import laid_out_as
from rlhf_lightning.functional.masking import last_index

HeadInit = Literal["unit", "small"]
"""How the weights of a new head are drawn; see `init_scalar_head`."""


def scalar_head(reward_model: nn.Module) -> nn.Linear:
    """Return the linear layer with one output of a classifier; raises `InputError` where there is not exactly one."""
    # An adapter of rank 1 has such layers too.
    layers = [layer for name, layer in reward_model.named_modules() if ".lora_" not in name]
    heads = [layer for layer in layers if isinstance(layer, nn.Linear) and layer.out_features == 1]
    if len(heads) != 1:
        raise InputError(
            f"a reward model is a sequence classifier with one label; {type(reward_model).__name__} has {len(heads)} "
            "linear layers with one output"
        )
    return heads[0]


def scored_tokens(
    reward_model: nn.Module, tokens: Int[Tensor, "B T"], attention_mask: Bool[Tensor, "B T"]
) -> Int[Tensor, " B"]:
    """Return where `transformers` reads a score: at the last token whose id is not that of padding in the config."""
    model: Any = reward_model
    return last_index(attention_mask & (tokens != model.config.get_text_config().pad_token_id))


@torch.no_grad()
def init_scalar_head(
    head: nn.Linear, generator: torch.Generator | None = None, *, head_init: HeadInit = "unit"
) -> None:
    """Draw the weights of a head on d features from a normal distribution around 0; a bias becomes 0.

    "unit" has standard deviation 1/sqrt(d + 1), so that scores of states of unit size have about unit spread: as
    OpenAI's summarize_from_feedback (Stiennon et al. 2020) and its reproduction (Huang et al. 2024) do it. "small" has
    1/(d + 1), as OpenRLHF does: scores begin close together, and the loss at log 2. Raises `InputError` for another.
    """
    stds = {"unit": (head.in_features + 1) ** -0.5, "small": 1 / (head.in_features + 1)}
    if head_init not in stds:
        raise InputError(f"head_init={head_init!r} must be one of {', '.join(stds)}")
    std = stds[head_init]
    head.weight.copy_(torch.randn(head.weight.shape, generator=generator) * std)
    if head.bias is not None:
        head.bias.zero_()


def keep_fine(head: nn.Linear) -> None:
    """Hold the weights of a head in 32 bits at least, and let it read states of any precision.

    In 16 bits most steps of a usual learning rate would be rounded away (`preflight.rounding`).
    """
    if head.weight.element_size() < 4:
        head.float().register_forward_pre_hook(_read_as_weights)


def _read_as_weights(head: nn.Module, states: tuple[Tensor]) -> Tensor:
    return states[0].to(next(head.parameters()).dtype)


class HiddenMoments:
    """Count, mean and covariance of last hidden states, gathered over batches and ranks in float64."""

    def __init__(self, hidden_size: int, device: torch.device) -> None:
        """Start from nothing seen."""
        self.count = torch.zeros((), dtype=torch.float64, device=device)
        self.total = torch.zeros(hidden_size, dtype=torch.float64, device=device)
        self.outer = torch.zeros(hidden_size, hidden_size, dtype=torch.float64, device=device)

    def update(self, hidden: Float[Tensor, "B H"]) -> None:
        """Add the states of a batch."""
        hidden = hidden.double()
        self.count += len(hidden)
        self.total += hidden.sum(dim=0)
        self.outer += hidden.T @ hidden

    def sum_up(self, sum_over_ranks: Callable[[Tensor], Tensor]) -> None:
        """Replace what this process saw by what all saw."""
        self.count, self.total, self.outer = (sum_over_ranks(x) for x in (self.count, self.total, self.outer))

    @property
    def mean(self) -> Float[Tensor, " H"]:
        """The mean state."""
        return self.total / self.count

    @property
    def covariance(self) -> Float[Tensor, "H H"]:
        """The covariance of the states."""
        return self.outer / self.count - torch.outer(self.mean, self.mean)


@torch.no_grad()
def shift_scores(
    head: nn.Linear,
    shift: float,
    *,
    mean: Float[Tensor, " H"],
    covariance: Float[Tensor, "H H"],
    ridge: float = 1e-4,
) -> float:
    """Add ``shift`` to the scores by changing the head alone; return the standard deviation of what else it adds.

    With a bias the shift is exact. Most language models' classifiers have none: there the head moves by
    shift * M^-1 mean / (mean' M^-1 mean), M the slightly regularised ``covariance`` of the hidden states. Of all moves
    whose effect at ``mean`` is exactly the shift this varies least over the states; it is next to constant because last
    hidden states have much in common, and constant where a layer norm with a bias precedes the head.
    """
    bias: Tensor | None = head.bias
    if bias is not None:
        bias += shift
        return 0.0
    scale = covariance.diagonal().mean().clamp(min=1e-12)
    identity = torch.eye(len(covariance), dtype=covariance.dtype, device=covariance.device)
    direction = torch.linalg.solve(covariance + ridge * scale * identity, mean)
    move = shift * direction / (mean @ direction)
    head.weight += laid_out_as(move.view_as(head.weight), head.weight)
    return float((move @ covariance @ move).clamp(min=0.0).sqrt())
