"""A report as a pipeline makes one, of invented numbers."""

import math
from typing import Any

import pytest

from rlhf_lightning.evaluation.reward_card import reward_card


def curve(*values: float) -> dict[str, list[float]]:
    return {"step": [float(i + 1) for i in range(len(values))], "value": list(values)}


@pytest.fixture
def report() -> dict[str, Any]:
    """All stages, judged by the world."""
    card = reward_card(
        [1.0, 2.0, -0.5, 0.2, 3.0],
        scores=[1.0, 2.0, 4.0],
        lengths=[3.0, 4.0, 9.0],
        length_differences=[1, 1, -1, 2, 0],
        best_scores=[0.25, 1.0],
    )
    return {
        "judge": "world",
        "seed": 3,
        "prompts": 200,
        "win_rate": {
            "pretrained": {"mean": 0.02, "low": 0.01, "high": 0.05},
            "sft": {"mean": 0.44, "low": 0.38, "high": 0.51},
            "ppo": {"mean": 0.84, "low": 0.78, "high": 0.89},
        },
        "judge_score": {"pretrained": 0.3, "sft": 4.1, "ppo": 5.9, "demonstrations": 4.4},
        "reward": {"accuracy": card.accuracy, "pairs": card.pairs, "card": card.as_dict(), "ceiling": 0.81234},
        "ppo": {"reference": "sft", "kl": 8.7, "score": {"before": 0.01, "after": 2.1}, "rollouts": 3},
        "seconds": {"pretrain": 60.2, "sft": 30.0, "ppo": 3700.0, "total": 3790.2},
        "throughput": {
            "sft": {
                "tokens_per_second": 12345.0,
                "flops_per_second": 3.2e12,
                "share_of_peak": 0.41,
                "seconds_step": 0.25,
                "share_step": 0.98,
                "share_waiting": 0.02,
            },
            "ppo": {
                "tokens_per_second": 987.0,
                "sampled_tokens_per_second": 1500.0,
                "seconds_step": 12.5,
                "share_step": 0.9,
                "share_waiting": 0.1,
                "share_sampling": 0.3,
                "share_scoring": 0.15,
                "share_updating": 0.4,
            },
        },
        "peak_memory_gb": 1.5,
        "curves": {
            "sft": {"sft/loss": curve(3.0, 2.0, 1.5), "sft/val_loss": curve(2.0)},
            "ppo": {
                "ppo/score": curve(0.0, 1.0, 2.0),
                "ppo/judge_score": curve(4.0, 5.0, 6.0),
                "ppo/kl": curve(0.0, 3.0, 8.0),
                "ppo/explained_variance": curve(math.nan, 0.1, 0.2),
            },
        },
        "samples": [
            {
                "prompt": "Explain the moon.",
                "responses": {"pretrained": "", "sft": "It is.", "ppo": "It is far.", "demonstrations": "Far away."},
                "scores": {"pretrained": 0.0, "sft": 1.0, "ppo": 2.25, "demonstrations": 1.75},
            }
        ],
        "versions": {"torch": "2.0", "python": "3.11.1"},
    }
