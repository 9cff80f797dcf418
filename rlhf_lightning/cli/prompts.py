"""The rows of `rlhf generate` and `rlhf evaluate`, in the order of their file and in the tokens of a model."""

from itertools import islice
from typing import TYPE_CHECKING, Any

from rlhf_lightning.cli.checks import Config
from rlhf_lightning.data import PPODataModule, RewardDataModule, Row, read_natural_instructions, read_rows
from rlhf_lightning.errors import InputError
from rlhf_lightning.types import ComparisonBatch, PromptBatch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def read_prompts(data: Config) -> list[Row]:
    """Return the first ``data.limit`` rows that ``data.path`` names; raises `InputError` if there are none."""
    if data["path"] is None:
        raise InputError("data.path is required (a .jsonl file with rows {prompt}): pass data.path=FILE")
    if data["format"] == "natural_instructions":
        rows = read_natural_instructions(data["path"], examples=data["examples"], split=data["split"])
    elif data["format"] == "rows":
        rows = read_rows(data["path"], split=data["split"])
    else:
        raise InputError(f"data.format={data['format']} must be rows or natural_instructions")
    return list(islice(rows, data["limit"]))


def prompt_batches(
    rows: list[Row], tokenizer: "PreTrainedTokenizerBase", *, prompt_template: str, batch_size: int
) -> list[PromptBatch]:
    """Return the rows as batches of at most ``batch_size`` prompts, in their order."""
    fields = [row.fields for row in rows]
    return _all_batches(
        PPODataModule(
            fields, val_path=fields, tokenizer=tokenizer, prompt_template=prompt_template, batch_size=batch_size
        )
    )


def comparison_batches(
    path: str, tokenizer: "PreTrainedTokenizerBase", *, prompt_template: str, batch_size: int
) -> list[ComparisonBatch]:
    """Return the comparisons of a file as batches of at most ``batch_size`` prompts, in their order."""
    fields = [row.fields for row in read_rows(path, split="test", setting="reward_data.path")]
    return _all_batches(
        RewardDataModule(
            fields, val_path=fields, tokenizer=tokenizer, prompt_template=prompt_template, batch_size=batch_size
        )
    )


def _all_batches(data: PPODataModule | RewardDataModule) -> list[Any]:
    data.setup("validate")
    return list(data.val_dataloader())
