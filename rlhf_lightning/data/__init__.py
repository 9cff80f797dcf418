"""From text to typed batches: one LightningDataModule for each stage."""

from rlhf_lightning.data.natural_instructions import read_natural_instructions
from rlhf_lightning.data.ppo import PPODataModule
from rlhf_lightning.data.reading import Row, read_rows
from rlhf_lightning.data.reward import RewardDataModule
from rlhf_lightning.data.sft import SFTDataModule

__all__ = [
    "PPODataModule",
    "RewardDataModule",
    "Row",
    "SFTDataModule",
    "read_natural_instructions",
    "read_rows",
]
