"""What a device or strategy cannot do is refused before training, with what to take instead."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from lightning.pytorch.plugins.precision import BitsandbytesPrecision
from lightning.pytorch.strategies import ModelParallelStrategy

from rlhf_lightning.errors import InputError
from rlhf_lightning.modules import PPOModule, RewardModule, SFTModule
from rlhf_lightning.modules.hardware import SupervisedOptimizerName, check_hardware, has_same_state
from rlhf_lightning.networks import LoRA, NetworkConfig
from rlhf_lightning.types import PromptBatch, SFTBatch

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*have no `val_dataloader`.*"),
]

TOKENS = torch.tensor([[5, 9, 7, 30, 2, 1], [8, 4, 11, 12, 13, 1]])
ALL = torch.ones(2, 6, dtype=torch.bool)
BATCH = SFTBatch(tokens=TOKENS, attention_mask=ALL, loss_mask=ALL)


def test_the_state_of_an_optimizer_is_its_own_whether_paged_or_not() -> None:
    names = get_args(SupervisedOptimizerName)
    alike = {(one, other) for one in names for other in names if one < other and has_same_state(one, other)}
    assert alike == {("adamw_8bit", "paged_adamw_8bit")}
    assert all(has_same_state(name, name) for name in names)


def test_paged_moments_are_refused_on_a_cpu(tiny_model: Path, fit: Callable[..., Any], prompts: PromptBatch) -> None:
    for module in (
        SFTModule(str(tiny_model), optimizer="paged_adamw_8bit"),
        RewardModule(str(tiny_model), optimizer="paged_adamw_8bit"),
        PPOModule(str(tiny_model), reward=len, optimizer="paged_adamw_8bit"),
    ):
        with pytest.raises(InputError, match=r"no cpu to page from; use optimizer=adamw_8bit"):
            fit(module, [prompts], max_epochs=1)


def test_float16_weights_are_refused(tiny_model: Path, fit: Callable[..., Any]) -> None:
    with pytest.raises(InputError, match=r"precision=16-true: .* use 16-mixed, bf16-true or bf16-mixed"):
        fit(SFTModule(str(tiny_model)), [BATCH], max_epochs=1, precision="16-true")


def test_lightnings_own_quantisation_is_refused_with_ours(tiny_model: Path, trainer: Callable[..., Any]) -> None:
    # Where there is no CUDA device its Trainer cannot be made.
    made = trainer()
    made.strategy.precision_plugin = BitsandbytesPrecision("nf4", dtype=torch.float32)
    with pytest.raises(InputError, match=r"use network\.quantization=nf4 or int8"):
        check_hardware(made, SFTModule(str(tiny_model)))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"quantization": "int8", "lora": LoRA()}, r"network\.quantization: ModelParallelStrategy"),
        ({"roles": "shared", "lora": LoRA()}, r"network\.roles=shared: ModelParallelStrategy"),
        ({"compile": True}, r"network\.compile: ModelParallelStrategy"),
    ],
)
def test_shards_are_refused_for_what_cannot_be_cut(
    settings: dict[str, Any], said: str, tiny_model: Path, fit: Callable[..., Any], prompts: PromptBatch
) -> None:
    module = PPOModule(NetworkConfig(str(tiny_model), **settings), reward=len)
    with pytest.raises(InputError, match=said):
        fit(
            module,
            [prompts],
            max_epochs=1,
            strategy=ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=1),
        )


def test_weights_in_shards_are_not_moved_to_the_host(
    tiny_model: Path, fit: Callable[..., Any], prompts: PromptBatch
) -> None:
    module = PPOModule(str(tiny_model), reward=len, offload=True)
    strategy = ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=1)
    with pytest.raises(InputError, match=r"offload=True\): ModelParallelStrategy moves weights itself"):
        fit(module, [prompts], max_epochs=1, strategy=strategy)
