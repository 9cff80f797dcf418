"""Networks: loading them from Hugging Face folders, the scalar head, the critic, and writing folders back."""

from rlhf_lightning.networks.critic import Critic
from rlhf_lightning.networks.loading import (
    Model,
    NetworkConfig,
    load_policy,
    load_reward_model,
    load_tokenizer,
    max_positions,
    stop_token_ids,
)
from rlhf_lightning.networks.saving import save_pretrained

__all__ = [
    "Critic",
    "Model",
    "NetworkConfig",
    "load_policy",
    "load_reward_model",
    "load_tokenizer",
    "max_positions",
    "save_pretrained",
    "stop_token_ids",
]
