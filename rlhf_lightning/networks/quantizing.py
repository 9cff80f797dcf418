"""Frozen backbones in 8 or 4 bits, by `bitsandbytes` through `transformers`."""

import os
from copy import deepcopy
from typing import Any, Literal

import torch
from torch import Tensor, nn

from rlhf_lightning.errors import InputError

Quantization = Literal["none", "int8", "nf4"]
"""Bits of the frozen linear layers: as network.dtype says; 8 (LLM.int8, Dettmers et al. 2022); 4 (QLoRA, 2023)."""

BLOCK = 64
"""Weights that share a scale in 4 bits."""


def quantization_settings(quantization: Quantization, dtype: torch.dtype) -> dict[str, Any]:
    """Return what `from_pretrained` needs to load the linear layers of the blocks in so many bits.

    Embeddings, norms, output layer and scalar head stay in ``dtype``, in which the layers also compute.
    """
    if quantization == "none":
        return {}
    from transformers import BitsAndBytesConfig

    if quantization == "int8":
        # No outliers are kept apart: which columns they are depends on the batch, and with it the log-probabilities.
        config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)
    else:
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    # Where Lightning puts this process; quantised weights are not moved afterwards.
    device = f"cuda:{int(os.environ.get('LOCAL_RANK', '0'))}" if torch.cuda.is_available() else "cpu"
    return {"quantization_config": config, "device_map": {"": device}}


def check_blocks(network: nn.Module) -> None:
    """Raise `InputError` for rows that are no multiple of a block of nf4, which `bitsandbytes` reads wrongly on a CPU.

    With AVX-512 it takes the scale of another block for what crosses a row's end (0.50.2). Other CPUs refuse them, too:
    what a run can be must not depend on which of them it finds.
    """
    layers: Any = network.named_modules()
    for name, layer in layers:
        on_cpu = is_quantized_layer(layer) and type(layer.weight).__name__ == "Params4bit" and not layer.weight.is_cuda
        if on_cpu and layer.in_features % BLOCK:
            raise InputError(
                f"network.quantization=nf4 on a CPU needs linear layers whose inputs are multiples of {BLOCK}, and "
                f"{name} reads {layer.in_features}; use network.quantization=int8"
            )


def is_quantized(network: nn.Module) -> bool:
    """Return whether a linear layer of the network has quantised weights."""
    return any(type(weight).__name__ in ("Int8Params", "Params4bit") for weight in network.parameters())


def compute_alike_in_both_modes(network: nn.Module) -> None:
    """Make quantised layers compute in evaluation as they do in training.

    On a CPU `bitsandbytes` has another arithmetic for evaluation: nf4 repacks the weights and rounds to bfloat16, int8
    rounds the activations too. Sampling, scoring and updates would not see one policy, and the repacked weights let no
    gradient through.
    """
    for layer in quantized_layers(network):
        if hasattr(layer, "init_8bit_state") and layer.weight.CB is not None:
            # Else done in the first forward, which moves the weights from the parameter to this one layer.
            layer.init_8bit_state()
        layer.register_forward_pre_hook(_in_training_mode)


def quantized_layers(network: nn.Module) -> list[Any]:
    """Return the layers with quantised weights."""
    return [layer for layer in network.modules() if is_quantized_layer(layer)]


def is_quantized_layer(layer: nn.Module) -> bool:
    """Return whether the layer itself holds quantised weights."""
    return any(type(weight).__name__ in ("Int8Params", "Params4bit") for weight in layer.parameters(recurse=False))


def dequantized(layer: nn.Module, dtype: torch.dtype) -> Tensor:
    """Return a layer's weight, a quantised one in ``dtype`` as its forward reads it."""
    held: Any = layer
    weight: Tensor = held.weight
    whole: Tensor
    if not is_quantized_layer(layer):
        return weight.detach()
    if type(weight).__name__ == "Int8Params":
        whole = held.state.CB.to(dtype).mul_(held.state.SCB.unsqueeze(1).mul(1.0 / 127.0))
        return whole
    from bitsandbytes.functional import dequantize_4bit

    whole = dequantize_4bit(weight.data, held.weight.quant_state).to(dtype)
    return whole


def plain_config(config: Any) -> Any:
    """Return a copy of a network's config that says nothing of quantised weights."""
    config = deepcopy(config)
    for name in ("quantization_config", "_is_quantized", "_pre_quantization_dtype"):
        if name in vars(config):
            delattr(config, name)
    return config


def _in_training_mode(layer: nn.Module, inputs: Any) -> None:
    layer.training = True
