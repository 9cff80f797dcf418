import pytest

from rlhf_lightning.errors import InputError
from rlhf_lightning.preflight import check_ppo_strategy


@pytest.mark.parametrize(
    "strategy",
    [
        "auto",
        "ddp",
        "ddp_fork",
        "SingleDeviceStrategy",
        "DDPStrategy",
        "ModelParallelStrategy",
        "rlhf_lightning.modules.FSDP2Strategy",
    ],
)
def test_ppo_runs_on_one_device_under_ddp_and_under_fsdp2(strategy: str) -> None:
    check_ppo_strategy(strategy)


@pytest.mark.parametrize(
    ("strategy", "reason"),
    [
        ("fsdp", "gathers its weights only in the Trainer's own steps"),
        ("fsdp_cpu_offload", "gathers its weights only in the Trainer's own steps"),
        ("lightning.pytorch.strategies.FSDPStrategy", "gathers its weights only in the Trainer's own steps"),
        ("deepspeed_stage_2", "one backward"),
        ("deepspeed_stage_3_offload", "one backward"),
        ("DeepSpeedStrategy", "one backward"),
    ],
)
def test_ppo_refuses_fsdp_and_deepspeed_with_the_reason_and_another_way(strategy: str, reason: str) -> None:
    with pytest.raises(InputError, match=rf"strategy={strategy} cannot run PPO: .*{reason}.* Use trainer=fsdp2"):
        check_ppo_strategy(strategy)
