"""Which weights have one row for each token, or one for a score."""

from typing import Any

from torch import nn


def embeddings_and_heads(module: nn.Module) -> list[nn.Parameter]:
    """Return the weights of embeddings, output layers and scalar heads, whose gradients are rare or large."""
    from transformers import PreTrainedModel

    layers: list[Any] = []
    for part in module.modules():
        if isinstance(part, nn.Embedding) or (isinstance(part, nn.Linear) and part.out_features == 1):
            layers.append(part)
        if isinstance(part, PreTrainedModel) and part.get_output_embeddings() is not None:
            layers.append(part.get_output_embeddings())
    return [weight for layer in layers for weight in layer.parameters()]
