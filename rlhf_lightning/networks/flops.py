"""How many floating-point operations it takes to read tokens, by the sizes of a network alone.

Counted as by Kaplan et al. (2020, table 1) and Chowdhery et al. (2022, PaLM, appendix B): a weight of a matrix
multiplies and adds once a token, 2 operations in the forward; the backward takes as many for the gradient of what the
matrix read, and as many for that of its weights, which frozen ones do without: 6 N a token where all is trained, 4 N
for weights below adapters, 2 N without a backward. Attention over all T tokens of a sequence takes 4 T for each layer
and unit of its heads in the forward, 12 T with the backward. Nothing is counted that another implementation could leave
out: padding, what lies behind a token, the end of the last block where no state is read, activations that are made
twice.
"""

from dataclasses import dataclass
from typing import Any, Self

from jaxtyping import Bool
from torch import Tensor, nn

from rlhf_lightning.networks.configs import heads_of
from rlhf_lightning.networks.last_block import feed_forward


@dataclass(frozen=True)
class Reading:
    """How much is read: sums over the sequences of a batch, each () and a whole number."""

    tokens: Tensor
    """Real tokens."""
    squares: Tensor
    """Of the numbers of tokens of the sequences: what attention is proportional to."""
    predicted: Tensor
    """Tokens that the output layer predicts."""
    read: Tensor
    """Last hidden states that are read."""

    @classmethod
    def of(
        cls, attention_mask: Bool[Tensor, "B T"], predicted: Bool[Tensor, "B R"], *, ends_are_read: bool = False
    ) -> Self:
        """Return how much sequences with these real and these predicted tokens are.

        One state is read for each predicted token, and for a score that at the end of each sequence.
        """
        lengths, tokens = attention_mask.sum(dim=1), predicted.sum()
        return cls(lengths.sum(), lengths.square().sum(), tokens, tokens + len(lengths) * ends_are_read)


@dataclass(frozen=True)
class Flops:
    """The sizes of a network that count: weights of matrices, and of them those that are trained."""

    weights: int
    """That every token passes."""
    trained_weights: int
    last: int
    """Of the last block behind its attention, which the states pass that are read."""
    trained_last: int
    head: int
    """Of the output layer, which only some tokens pass."""
    trained_head: int
    attention: int
    """Units of all heads of all layers."""

    def forward(self, read: Reading) -> Tensor:
        """Return the operations of a forward."""
        of_weights = self.weights * read.tokens + self.last * read.read + self.head * read.predicted
        return 2 * of_weights + 4 * self.attention * read.squares

    def training(self, read: Reading) -> Tensor:
        """Return the operations of a forward and its backward."""
        of_weights = self.trained_weights * read.tokens + self.trained_last * read.read
        of_weights = of_weights + self.trained_head * read.predicted
        return 2 * (self.forward(read) + of_weights) + 4 * self.attention * read.squares


def flops_of(network: nn.Module) -> Flops | None:
    """Return the sizes of a network.

    None where it has weights of two axes or more that are no linear layer's and no embedding's, as mixtures of experts
    and convolutions have: what they take does not follow from their sizes.
    """
    from transformers import PreTrainedModel
    from transformers.pytorch_utils import Conv1D

    models: Any = [part for part in network.modules() if isinstance(part, PreTrainedModel)]
    output = models[0].get_output_embeddings() if models else None
    last = feed_forward(models[0].base_model) if models else None
    inside = set() if last is None else set(last.modules())
    counts = {f"{part}{name}": 0 for name in ("weights", "last", "head") for part in ("", "trained_")}
    for layer in network.modules():
        if isinstance(layer, nn.Linear | Conv1D):
            # Quantised weights, and those in shards, have another shape than their layer.
            size = layer.nf * layer.nx if isinstance(layer, Conv1D) else layer.in_features * layer.out_features
            name = "head" if layer is output else "last" if layer in inside else "weights"
            counts[name] += size
            counts[f"trained_{name}"] += size if layer.weight.requires_grad else 0
        elif not isinstance(layer, nn.Embedding) and any(p.dim() > 1 for p in layer.parameters(recurse=False)):
            return None
    attention = sum(heads.number * heads.width for heads in heads_of(models[0])) if models else 0
    return Flops(**counts, attention=attention)
