"""Which of Lightning's strategies can run which stage."""

from rlhf_lightning.errors import InputError

REASONS = {
    "deepspeed": (
        "DeepSpeed wraps one model whose engine makes each update out of one backward, while a rollout of PPO is "
        "followed by several updates of two networks in manual optimisation"
    ),
    "fsdp": (
        "FSDP wraps the whole module as one and gathers its weights only in the Trainer's own steps, while PPO calls "
        "policy, reference, critic and reward model by themselves in manual optimisation"
    ),
}
"""By the beginning of a strategy's name."""


def check_ppo_strategy(strategy: str) -> None:
    """Raise `InputError` where PPO cannot run under a strategy: a name of Lightning's (``fsdp``) or that of a class."""
    name = strategy.rpartition(".")[2].lower()
    for beginning, reason in REASONS.items():
        if name.startswith(beginning) and not name.startswith("fsdp2"):
            raise InputError(
                f"strategy={strategy} cannot run PPO: {reason}. Use trainer=fsdp2, which shards all networks, or "
                "trainer=ddp where they fit on each device"
            )
