"""The three stages as LightningModules: fine-tuning, reward model, PPO."""

from rlhf_lightning.modules.ppo import PPOModule
from rlhf_lightning.modules.reward import RewardModule
from rlhf_lightning.modules.sft import SFTModule
from rlhf_lightning.modules.sharding import FSDP2Strategy

__all__ = ["FSDP2Strategy", "PPOModule", "RewardModule", "SFTModule"]
