"""Low-rank adapters (Hu et al. 2021) inside of a network's linear layers, by `peft`: added, taken off, merged."""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rlhf_lightning.errors import InputError, check_number
from rlhf_lightning.functional.precision import at_least_float32
from rlhf_lightning.networks.quantizing import dequantized

if TYPE_CHECKING:
    from peft import LoraConfig

ADAPTER = "default"
"""The name of a network's adapter in `peft`: each network has one at most."""

SEED = 0
"""Of a new adapter's weights, so that they depend on nothing that was drawn before."""


@dataclass(frozen=True)
class LoRA:
    """An adapter: W x becomes W x + (alpha / r) B A x with W frozen, A (r, in) random and B (out, r) zero at first."""

    r: int = 16
    """Rank."""
    alpha: float = 32.0
    """Scale of what the adapter adds, before it is divided by r."""
    dropout: float = 0.0
    """Of what the adapter reads, in fine-tuning; reward models and PPO are trained without dropout."""
    targets: Sequence[str] | None = None
    """Linear layers by the end of their names, as "q_proj"; None: all inside of the blocks."""
    rslora: bool = False
    """Divide alpha by sqrt(r) and not by r (Kalajdzievski 2023)."""

    def __post_init__(self) -> None:
        """Check the ranges; raises `InputError`."""
        for name in ("r", "alpha", "dropout"):
            check_number(f"network.lora.{name}", vars(self)[name], whole=name == "r")
        if self.r < 1:
            raise InputError(f"network.lora.r={self.r} must be at least 1")
        if self.alpha <= 0:
            raise InputError(f"network.lora.alpha={self.alpha} must be above 0")
        if not 0 <= self.dropout < 1:
            raise InputError(f"network.lora.dropout={self.dropout} must lie in [0, 1)")


def linear_layers(network: nn.Module) -> list[str]:
    """Return the names of the linear layers that an adapter can change: all but the output layer and a scalar head."""
    from transformers.pytorch_utils import Conv1D

    language_model: Any = network
    output = language_model.get_output_embeddings()
    return [
        name
        for name, layer in network.named_modules()
        if isinstance(layer, Conv1D) or (isinstance(layer, nn.Linear) and layer.out_features > 1)
        if layer is not output and ".lora_" not in name
    ]


def target_layers(network: nn.Module, targets: Sequence[str] | None) -> list[str]:
    """Return the last part of the names of all layers that ``targets`` mean, in alphabetical order.

    Raises `InputError` for a target that no linear layer is called by, or without any.
    """
    layers = linear_layers(network)
    ends = sorted({name.rpartition(".")[2] for name in layers})
    if targets is None:
        return ends
    unknown = [t for t in targets if not any(name == t or name.endswith(f".{t}") for name in layers)]
    if unknown or not targets or isinstance(targets, str):
        raise InputError(
            f"network.lora.targets={targets if isinstance(targets, str) else list(targets)} must be a list of linear "
            f"layers of {type(network).__name__}: {', '.join(ends)}" + (f"; not {unknown[0]!r}" if unknown else "")
        )
    return sorted(set(targets))


def add_adapter(network: nn.Module, lora: LoRA) -> None:
    """Put a new adapter, which adds nothing yet, into the network; all else is frozen."""
    from peft import LoraConfig

    layers = target_layers(network, lora.targets)
    inject(
        network,
        LoraConfig(
            r=lora.r,
            lora_alpha=lora.alpha,  # type: ignore[arg-type,unused-ignore]
            lora_dropout=lora.dropout,
            target_modules=layers,
            use_rslora=lora.rslora,
            fan_in_fan_out=_fan_in_fan_out(network, layers),
        ),
    )


def inject(network: nn.Module, config: "LoraConfig") -> None:
    """Put adapters of this configuration into the network; all else is frozen, and a half-precision one is float32."""
    from peft import inject_adapter_in_model

    from rlhf_lightning.networks.adapted_linear import lighten

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        inject_adapter_in_model(config, network, ADAPTER)
    for weight in adapter_weights(network).values():
        weight.data = at_least_float32(weight.data)
    lighten(network)
    network.eval()


def adapter_weights(network: nn.Module) -> dict[str, nn.Parameter]:
    """Return the adapter's weights by their names in the network; empty where it has none."""
    return {name: weight for name, weight in network.named_parameters() if ".lora_" in name}


def has_adapter(network: nn.Module) -> bool:
    """Return whether there is an adapter in the network."""
    return bool(adapter_weights(network))


def adds_nothing(network: nn.Module) -> bool:
    """Return whether the adapter is new: B is zero in all layers, so that the network is what it was before."""
    return not any(weight.any() for name, weight in adapter_weights(network).items() if ".lora_B." in name)


def remove_adapter(network: nn.Module) -> None:
    """Take the adapter out of the network."""
    for parent, name, layer in list(adapted_layers(network)):
        setattr(parent, name, layer.base_layer)
    # `peft` keeps it where it was told to add the adapter.
    vars(network).pop("peft_config", None)


@torch.no_grad()
def merge_adapter(network: nn.Module) -> None:
    """Add the adapter to the weights, which must not be quantised, and take it out of the network."""
    for _, _, layer in adapted_layers(network):
        layer.base_layer.weight += layer.get_delta_weight(ADAPTER).to(layer.base_layer.weight)
    remove_adapter(network)


@torch.no_grad()
def merged_weights(network: Any) -> dict[str, Tensor]:
    """Return the state of the network as if it had neither adapter nor quantised weights; what is equal is shared."""
    adapted = {id(layer.base_layer): layer for _, _, layer in adapted_layers(network)}
    state: dict[str, Tensor] = {}
    for path, layer in network.named_modules():
        if ".lora_" in path:
            continue
        # A layer with an adapter holds the plain one as its base_layer.
        name = path.removesuffix(".base_layer")
        tensors = {**dict(layer.named_parameters(recurse=False)), **_persistent_buffers(layer)}
        for key, tensor in tensors.items():
            value = dequantized(layer, network.dtype) if key == "weight" else tensor.detach()
            if key == "weight" and id(layer) in adapted:
                delta = adapted[id(layer)].get_delta_weight(ADAPTER)
                value = (value + delta).to(value.dtype)
            state[f"{name}.{key}".removeprefix(".")] = value
    return state


def train_adapter(network: nn.Module) -> None:
    """Train all of the network, or where it has an adapter that alone."""
    adapter = adapter_weights(network)
    for name, weight in network.named_parameters():
        weight.requires_grad_(not adapter or name in adapter)


def _fan_in_fan_out(network: nn.Module, targets: Sequence[str]) -> bool:
    """Return whether the layers hold their weights as (in, out), as those of GPT-2 do."""
    from transformers.pytorch_utils import Conv1D

    return any(
        isinstance(layer, Conv1D) and any(name == t or name.endswith(f".{t}") for t in targets)
        for name, layer in network.named_modules()
    )


def adapted_layers(network: nn.Module) -> Iterator[tuple[nn.Module, str, Any]]:
    """Yield each layer with an adapter, its parent, and its name there."""
    if "peft" not in sys.modules:
        # Its import takes seconds, and without it there is no such layer.
        return
    from peft.tuners.lora import LoraLayer

    for parent in network.modules():
        for name, layer in parent.named_children():
            if isinstance(layer, LoraLayer):
                yield parent, name, layer


def _persistent_buffers(layer: nn.Module) -> dict[str, Tensor]:
    transient = layer._non_persistent_buffers_set
    return {name: buffer for name, buffer in layer.named_buffers(recurse=False) if name not in transient}
