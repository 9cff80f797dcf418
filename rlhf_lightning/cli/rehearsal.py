"""What is wrong with a stage of the pipeline, known before the stages ahead of it have run."""

from typing import TYPE_CHECKING, Any

from rlhf_lightning.cli.build import build
from rlhf_lightning.cli.checks import Config

if TYPE_CHECKING:
    from lightning import Trainer
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from rlhf_lightning.data.datamodule import TextDataModule


def rehearse(stage: str, settings: Config) -> "TextDataModule[Any]":
    """Build Trainer, data and module of a stage, the module around a network that is none; return the data.

    Raises `InputError` where one of them refuses its settings, or PPO those of the Trainer and the data.
    """
    trainer = bare_trainer(f"trainer.{stage}", settings["trainer"][stage])
    data: TextDataModule[Any] = build(f"data.{stage}", settings["data"][stage])
    node = {name: value for name, value in settings["module"][stage].items() if name not in ("model", "reward")}
    # Named only: what it is, is looked at by itself.
    reward = {"reward": "none"} if stage == "ppo" else {}
    module = build(f"module.{stage}", node, model=_smallest_network(), **reward)
    module.trainer = trainer
    module.configure_callbacks()
    if stage == "ppo":
        module.check_minibatches(data.batch_size)
    return data


def look_at_rows(stage: str, data: "TextDataModule[Any]", tokenizer: "PreTrainedTokenizerBase") -> None:
    """Read all rows of a stage, tokenise the first of each part, and count those of training.

    Raises `InputError` where one of them cannot be read, or where they are fewer than a batch that must be whole. Rows
    that will be dropped for their length still count here.
    """
    from rlhf_lightning.data.tokenizing import Encoder

    data.check_tokenizer(tokenizer)
    # Rows with the same opening are one group, and an opening is a number of tokens.
    data.tokenizer = tokenizer
    train_rows, val_rows = data.parts(f"data.{stage}")
    for row in [*train_rows[:1], *val_rows[:1]]:
        data.items(row, Encoder(tokenizer, prompt_template=data.prompt_template), None)
    data.check_whole_batch(len(train_rows), f"data.{stage}")


def bare_trainer(path: str, node: Config) -> "Trainer":
    """Return a Trainer of the settings that writes and shows nothing."""
    silent = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    trainer: Trainer = build(path, node, **dict.fromkeys(silent, False))
    return trainer


def _smallest_network() -> "nn.Module":
    from transformers import GPT2Config, GPT2LMHeadModel

    # Tied embeddings and dropout layers: nothing that a setting may ask of a network is missing.
    config = GPT2Config(
        vocab_size=4, n_embd=2, n_layer=1, n_head=1, n_positions=8, pad_token_id=0, bos_token_id=1, eos_token_id=1
    )
    config.num_labels = 1
    return GPT2LMHeadModel(config)
