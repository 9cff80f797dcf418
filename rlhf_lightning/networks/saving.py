"""The hand-off between stages: a Hugging Face folder that `transformers` alone can load, or an adapter for `peft`."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import torch
from torch import nn

from rlhf_lightning.errors import InputError
from rlhf_lightning.functional.dtensors import is_finite
from rlhf_lightning.networks.adapters import save_adapter
from rlhf_lightning.networks.loading import stop_token_ids
from rlhf_lightning.networks.lora import has_adapter, merged_weights
from rlhf_lightning.networks.quantizing import is_quantized, plain_config
from rlhf_lightning.types import Export

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def save_pretrained(
    model: nn.Module,
    tokenizer: "PreTrainedTokenizerBase",
    folder: str | Path,
    *,
    export: Export = "merged",
    state: dict[str, Any] | None = None,
) -> None:
    """Write config, safetensors, tokenizer and generation config; pad and end ids are those of the tokenizer.

    "merged" writes a folder that `transformers` alone loads: adapters are added to the weights, and quantised weights
    written as plain ones. "adapter" writes the adapter, with the scalar head of a reward model, as a `peft` folder.
    ``state`` are the weights where the network itself does not hold all of them. Raises `InputError` for "adapter"
    where the network has none, and where a weight is not finite.
    """
    network: Any = model
    _check_finite(network, state)
    network.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    if network.can_generate():
        network.generation_config.pad_token_id = tokenizer.pad_token_id
        network.generation_config.eos_token_id = stop_token_ids(network, tokenizer)
    if export == "adapter":
        check_export(network, export)
        save_adapter(network, folder)
        if network.can_generate():
            network.generation_config.save_pretrained(folder)
    elif has_adapter(network) or is_quantized(network):
        plain_network(network).save_pretrained(folder)
    else:
        network.save_pretrained(folder, state_dict=state)
    tokenizer.save_pretrained(folder)


def check_export(model: nn.Module, export: Export) -> None:
    """Raise `InputError` where the network cannot be exported like that."""
    if export not in get_args(Export):
        raise InputError(f"export={export!r} must be one of {', '.join(get_args(Export))}")
    if export == "adapter" and not has_adapter(model):
        raise InputError("export=adapter needs a network with an adapter: set network.lora (network=lora)")


def plain_network(network: Any) -> Any:
    """Return the network with its adapter merged and nothing quantised; weights that are equal are shared."""
    with torch.device("meta"):
        plain = type(network)._from_config(plain_config(network.config), dtype=network.dtype)
    plain.load_state_dict(merged_weights(network), assign=True)
    plain.tie_weights()
    if network.can_generate():
        plain.generation_config = network.generation_config
    return plain


def _check_finite(network: nn.Module, state: dict[str, Any] | None) -> None:
    weights = network.named_parameters() if state is None else state.items()
    for name, weight in weights:
        if not is_finite(weight):
            raise InputError(
                f"the network is not written: its weight {name} is not finite, the training went astray (a lower "
                "learning rate, a smaller max_grad_norm?)"
            )
