from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning import LightningDataModule, LightningModule, Trainer

from rlhf_lightning.modules import PPOModule, RewardModule, SFTModule
from rlhf_lightning.modules.language import LanguageModule


class Data(LightningDataModule):
    """Has a tokenizer, and no data."""

    def __init__(self, tokenizer: Any) -> None:
        super().__init__()
        self.tokenizer = tokenizer


def introduced(module: LightningModule, datamodule: LightningDataModule) -> LightningModule:
    """Do what the Trainer does before it asks either of them for anything."""
    trainer = Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False)
    trainer.datamodule = datamodule  # type: ignore[attr-defined]
    module.trainer = trainer
    module.setup("fit")
    module.configure_model()
    return module


@pytest.mark.parametrize(
    "make",
    [
        lambda network, **settings: SFTModule(network, **settings),
        lambda network, **settings: RewardModule(network, **settings),
        lambda network, **settings: PPOModule(network, reward=lambda prompts, responses: [0.0], **settings),
    ],
    ids=["sft", "reward", "ppo"],
)
def test_a_module_takes_the_datamodules_tokenizer_unless_it_was_given_one(
    make: Callable[..., LanguageModule], policy: Callable[..., Any], tokenizer: Any, make_tokenizer: Callable[..., Any]
) -> None:
    theirs = make_tokenizer(pad_token="<pad>", eos_token="<eos>")
    bare = make(policy())
    introduced(bare, Data(theirs))
    assert bare.tokenizer is theirs
    own = make(policy(), tokenizer=tokenizer)
    introduced(own, Data(theirs))
    assert own.tokenizer is tokenizer


def test_outside_of_a_process_group_the_sum_over_ranks_is_the_value(policy: Callable[..., Any], tokenizer: Any) -> None:
    module = SFTModule(policy())
    introduced(module, Data(tokenizer))
    x = torch.tensor([1.0, 2.0])
    total = module.sum_over_ranks(x)
    assert torch.equal(total, x)
    total += 1
    assert x.tolist() == [1.0, 2.0]
