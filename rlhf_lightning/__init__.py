"""Alignment by human feedback as components for PyTorch Lightning."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlhf_lightning.data import PPODataModule, RewardDataModule, SFTDataModule
    from rlhf_lightning.errors import InputError
    from rlhf_lightning.evaluation.validation_reward import ValidationReward
    from rlhf_lightning.modules import FSDP2Strategy, PPOModule, RewardModule, SFTModule
    from rlhf_lightning.networks import LoRA, NetworkConfig
    from rlhf_lightning.rollout import Ensemble, WeightedSum

__all__ = [
    "Ensemble",
    "FSDP2Strategy",
    "InputError",
    "LoRA",
    "NetworkConfig",
    "PPODataModule",
    "PPOModule",
    "RewardDataModule",
    "RewardModule",
    "SFTDataModule",
    "SFTModule",
    "ValidationReward",
    "WeightedSum",
]

# The names are imported at their first use (PEP 562): `rlhf --help` must not wait for torch.
_HOMES = {
    "Ensemble": "rollout",
    "FSDP2Strategy": "modules",
    "InputError": "errors",
    "LoRA": "networks",
    "NetworkConfig": "networks",
    "PPODataModule": "data",
    "PPOModule": "modules",
    "RewardDataModule": "data",
    "RewardModule": "modules",
    "SFTDataModule": "data",
    "SFTModule": "modules",
    "ValidationReward": "evaluation.validation_reward",
    "WeightedSum": "rollout",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
