"""The middle of PPO, in order: generate a response, score it, and make experience of it."""

from rlhf_lightning.rollout.experience import estimate_advantages, micro_batches, minibatches
from rlhf_lightning.rollout.generate import Sampler, generate, sample_tokens
from rlhf_lightning.rollout.reward import (
    Ensemble,
    FunctionReward,
    ModelReward,
    Reward,
    Scores,
    WeightedSum,
    load_reward,
)
from rlhf_lightning.rollout.score import score_rollout

__all__ = [
    "Ensemble",
    "FunctionReward",
    "ModelReward",
    "Reward",
    "Sampler",
    "Scores",
    "WeightedSum",
    "estimate_advantages",
    "generate",
    "load_reward",
    "micro_batches",
    "minibatches",
    "sample_tokens",
    "score_rollout",
]
