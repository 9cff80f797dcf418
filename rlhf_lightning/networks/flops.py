"""How many floating-point operations it takes to read tokens, by the sizes of a network alone.

Counted as by Kaplan et al. (2020, table 1) and Chowdhery et al. (2022, PaLM, appendix B): a weight of a matrix
multiplies and adds once a token, 2 operations in the forward; the backward takes as many for the gradient of what the
matrix read, and as many for that of its weights, which frozen ones do without: 6 N a token where all is trained, 4 N
for weights below adapters, 2 N without a backward. Attention over all T tokens of a sequence takes 4 T for each layer
and unit of its heads in the forward, 12 T with the backward. Nothing is counted that another implementation could leave
out: padding, what lies behind a token, activations that are made twice.
"""

from dataclasses import dataclass
from typing import Any, Self

from jaxtyping import Bool
from torch import Tensor, nn

from rlhf_lightning.networks.configs import heads_of


@dataclass(frozen=True)
class Reading:
    """How much is read: sums over the sequences of a batch, each () and a whole number."""

    tokens: Tensor
    """Real tokens."""
    squares: Tensor
    """Of the numbers of tokens of the sequences: what attention is proportional to."""
    predicted: Tensor
    """Tokens that the output layer predicts."""

    @classmethod
    def of(cls, attention_mask: Bool[Tensor, "B T"], predicted: Bool[Tensor, "B R"]) -> Self:
        """Return how much sequences with these real and these predicted tokens are."""
        lengths = attention_mask.sum(dim=1)
        return cls(lengths.sum(), lengths.square().sum(), predicted.sum())


@dataclass(frozen=True)
class Flops:
    """The sizes of a network that count: weights of matrices, and of them those that are trained."""

    weights: int
    """That every token passes."""
    trained_weights: int
    head: int
    """Of the output layer, which only some tokens pass."""
    trained_head: int
    attention: int
    """Units of all heads of all layers."""

    def forward(self, read: Reading) -> Tensor:
        """Return the operations of a forward."""
        return 2 * (self.weights * read.tokens + self.head * read.predicted) + 4 * self.attention * read.squares

    def training(self, read: Reading) -> Tensor:
        """Return the operations of a forward and its backward."""
        of_weights = 2 * (self.trained_weights * read.tokens + self.trained_head * read.predicted)
        return 2 * self.forward(read) + of_weights + 4 * self.attention * read.squares


def flops_of(network: nn.Module) -> Flops | None:
    """Return the sizes of a network.

    None where it has weights of two axes or more that are no linear layer's and no embedding's, as mixtures of experts
    and convolutions have: what they take does not follow from their sizes.
    """
    from transformers import PreTrainedModel
    from transformers.pytorch_utils import Conv1D

    models: Any = [part for part in network.modules() if isinstance(part, PreTrainedModel)]
    output = models[0].get_output_embeddings() if models else None
    counts = {"weights": 0, "trained_weights": 0, "head": 0, "trained_head": 0}
    for layer in network.modules():
        if isinstance(layer, nn.Linear | Conv1D):
            # Quantised weights, and those in shards, have another shape than their layer.
            size = layer.nf * layer.nx if isinstance(layer, Conv1D) else layer.in_features * layer.out_features
            name = "head" if layer is output else "weights"
            counts[name] += size
            counts[f"trained_{name}"] += size if layer.weight.requires_grad else 0
        elif not isinstance(layer, nn.Embedding) and any(p.dim() > 1 for p in layer.parameters(recurse=False)):
            return None
    attention = sum(heads.number * heads.width for heads in heads_of(models[0])) if models else 0
    return Flops(**counts, attention=attention)
