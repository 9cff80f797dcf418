"""The hand-off between stages: a Hugging Face folder that `transformers` alone can load."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from rlhf_lightning.networks.loading import stop_token_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def save_pretrained(
    model: nn.Module,
    tokenizer: "PreTrainedTokenizerBase",
    folder: str | Path,
    *,
    state: dict[str, Any] | None = None,
) -> None:
    """Write config, safetensors, tokenizer and generation config; pad and end ids are those of the tokenizer.

    ``state`` are the weights where the network itself does not hold all of them.
    """
    network: Any = model
    network.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    if network.can_generate():
        network.generation_config.pad_token_id = tokenizer.pad_token_id
        network.generation_config.eos_token_id = stop_token_ids(network, tokenizer)
    network.save_pretrained(folder, state_dict=state)
    tokenizer.save_pretrained(folder)
