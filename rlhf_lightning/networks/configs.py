"""What the config of a `transformers` network says of its sizes, under whatever name it says it."""

from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Heads:
    """The attention heads of one layer."""

    number: int
    of_keys: int
    """Heads of keys and values, which several others may share."""
    width: int


def heads_of(network: nn.Module) -> list[Heads]:
    """Return the heads of every layer, which may differ from layer to layer."""
    config: Any = network.config
    text = config.get_text_config()
    return [_heads(text.per_layer_config[layer]) for layer in range(text.num_hidden_layers)]


def setting_of(config: Any, name: str) -> Any:
    """Return what the config has as ``name``, None where it has no such setting or leaves it open."""
    own_name = config.attribute_map.get(name, name)
    return vars(config).get(own_name)


def _heads(layer: Any) -> Heads:
    number = layer.num_attention_heads
    of_keys, width = setting_of(layer, "num_key_value_heads"), setting_of(layer, "head_dim")
    return Heads(number, of_keys or number, width or layer.hidden_size // number)
