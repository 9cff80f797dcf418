"""Networks: loading them from Hugging Face folders, adapters and bits, the scalar head, the critic, writing folders."""

from rlhf_lightning.networks.critic import Critic
from rlhf_lightning.networks.loading import (
    Model,
    NetworkConfig,
    load_policy,
    load_reward_model,
    load_tokenizer,
    max_positions,
    network_config,
    stop_token_ids,
)
from rlhf_lightning.networks.lora import LoRA, has_adapter
from rlhf_lightning.networks.quantizing import is_quantized
from rlhf_lightning.networks.saving import check_export, save_pretrained

__all__ = [
    "Critic",
    "LoRA",
    "Model",
    "NetworkConfig",
    "check_export",
    "has_adapter",
    "is_quantized",
    "load_policy",
    "load_reward_model",
    "load_tokenizer",
    "max_positions",
    "network_config",
    "save_pretrained",
    "stop_token_ids",
]
