from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_lightning.cli.rehearsal import _smallest_network, bare_trainer, look_at_rows, rehearse
from rlhf_lightning.data import PPODataModule, SFTDataModule
from rlhf_lightning.errors import InputError
from rlhf_lightning.networks import load_tokenizer

TRAINER = {"_target_": "lightning.Trainer", "accelerator": "cpu"}


def stage(name: str, data: str, module: str, **settings: Any) -> dict[str, Any]:
    """Return the settings of a pipeline of one stage, with changes of its module."""
    return {
        "trainer": {name: TRAINER},
        "data": {name: {"_target_": f"rlhf_lightning.data.{data}", "path": "rows.jsonl", "batch_size": 4}},
        "module": {name: {"_target_": f"rlhf_lightning.modules.{module}", "model": "no/such/network", **settings}},
    }


@pytest.mark.parametrize(
    ("name", "data", "module"),
    [
        ("sft", "SFTDataModule", "SFTModule"),
        ("reward", "RewardDataModule", "RewardModule"),
        ("ppo", "PPODataModule", "PPOModule"),
    ],
)
def test_a_stage_is_rehearsed_without_its_network_and_its_rows(name: str, data: str, module: str) -> None:
    settings = {"reward": "no/such/reward", "minibatch_size": 2} if name == "ppo" else {}
    assert rehearse(name, stage(name, data, module, **settings)).batch_size == 4


def test_the_special_tokens_of_the_network_that_is_none_are_in_its_vocabulary() -> None:
    # Of others transformers warns.
    config: Any = _smallest_network().config
    assert all(
        0 <= token < config.vocab_size for token in (config.pad_token_id, config.bos_token_id, config.eos_token_id)
    )


def test_what_only_trainer_and_module_together_know_is_refused() -> None:
    settings = stage("ppo", "PPODataModule", "PPOModule", minibatch_size=4)
    settings["trainer"]["ppo"] = TRAINER | {"accumulate_grad_batches": 2}
    with pytest.raises(InputError, match=r"Trainer\(accumulate_grad_batches=2\)"):
        rehearse("ppo", settings)


def test_a_bare_trainer_has_the_device_of_its_settings_and_writes_nothing() -> None:
    trainer = bare_trainer("trainer", TRAINER | {"logger": True, "enable_checkpointing": True})
    assert trainer.strategy.root_device == torch.device("cpu")
    assert trainer.loggers == []
    assert trainer.checkpoint_callbacks == []


def test_every_row_is_read_and_the_first_one_understood(tiny_model: Path, tmp_path: Path) -> None:
    file, tokenizer = tmp_path / "rows.jsonl", load_tokenizer(tiny_model)
    file.write_text('{"prompt": "a"}\n{"prompt": "a", "response": "b"}\n')
    with pytest.raises(InputError, match=r"rows\.jsonl:1"):
        look_at_rows("sft", SFTDataModule(file), tokenizer)
    file.write_text('{"prompt": "a", "response": "b"}\n{"prompt": "a"\n')
    with pytest.raises(InputError, match=r"rows\.jsonl:2: malformed JSON"):
        look_at_rows("sft", SFTDataModule(file), tokenizer)
    file.write_text('{"prompt": "a", "response": "b"}\n')
    look_at_rows("sft", SFTDataModule(file), tokenizer)


def test_rows_that_are_held_out_do_not_fill_the_first_rollout(tiny_model: Path, tmp_path: Path) -> None:
    file, tokenizer = tmp_path / "prompts.jsonl", load_tokenizer(tiny_model)
    file.write_text("".join(f'{{"prompt": "{i}"}}\n' for i in range(8)))
    rule = "data.ppo.batch_size=8 needs at least 8 training rows for each process; there are 6"
    with pytest.raises(InputError, match=rule):
        look_at_rows("ppo", PPODataModule(file, batch_size=8, val_fraction=0.25), tokenizer)
    look_at_rows("ppo", PPODataModule(file, batch_size=6, val_fraction=0.25), tokenizer)
    look_at_rows("ppo", PPODataModule(file, batch_size=8, val_fraction=0.0), tokenizer)


def test_rows_are_counted_by_their_opening_where_that_is_the_prompt(tiny_model: Path, tmp_path: Path) -> None:
    file, tokenizer = tmp_path / "texts.jsonl", load_tokenizer(tiny_model)
    # Two openings of two bytes: one of them is held out, with all its rows.
    file.write_text("".join(f'{{"text": "{"ab" if i < 3 else "cd"}{i}"}}\n' for i in range(6)))
    data = PPODataModule(file, batch_size=4, val_fraction=0.05, opening_tokens=2)
    with pytest.raises(InputError, match="needs at least 4 training rows for each process; there are 3"):
        look_at_rows("ppo", data, tokenizer)
