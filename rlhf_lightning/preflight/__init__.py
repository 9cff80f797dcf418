"""Looking at the user's own model, tokenizer, data and reward before a run is paid for."""

from rlhf_lightning.preflight.findings import Finding, of_all_processes, of_status, refusal, untouched
from rlhf_lightning.preflight.rounding import check_rounding
from rlhf_lightning.preflight.stages import check_ppo, check_reward, check_sft
from rlhf_lightning.preflight.strategies import check_ppo_strategy

__all__ = [
    "Finding",
    "check_ppo",
    "check_ppo_strategy",
    "check_reward",
    "check_rounding",
    "check_sft",
    "of_all_processes",
    "of_status",
    "refusal",
    "untouched",
]
