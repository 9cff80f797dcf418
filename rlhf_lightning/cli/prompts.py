"""The rows of `rlhf generate` and `rlhf evaluate`, in the order of their file and in the tokens of a model."""

from itertools import islice
from typing import TYPE_CHECKING, Any

from torch import nn

from rlhf_lightning.cli.checks import Config
from rlhf_lightning.data import (
    PPODataModule,
    RewardDataModule,
    Row,
    SFTDataModule,
    read_natural_instructions,
    read_rows,
)
from rlhf_lightning.errors import InputError
from rlhf_lightning.networks import max_positions
from rlhf_lightning.types import ComparisonBatch, PromptBatch, SFTBatch

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
    rows: list[Row], policy: nn.Module, tokenizer: "PreTrainedTokenizerBase", settings: Config
) -> list[PromptBatch]:
    """Return the rows as batches of at most ``batch_size`` prompts, in their order.

    Raises `InputError` where a prompt and ``max_new_tokens`` need more positions than the policy has.
    """
    batches: list[PromptBatch] = _all_batches(PPODataModule, rows, tokenizer, settings)
    positions = max_positions(policy)
    longest = max(batch.prompt_tokens.shape[1] for batch in batches)
    if positions is not None and longest + settings["max_new_tokens"] > positions:
        raise InputError(
            f"the longest prompt has {longest} tokens; with max_new_tokens={settings['max_new_tokens']} that is more "
            f"than the policy's {positions} positions"
        )
    return batches


def response_batches(
    rows: list[Row], policy: nn.Module, tokenizer: "PreTrainedTokenizerBase", settings: Config
) -> list[SFTBatch]:
    """Return the rows with their responses as batches; what the policy has no positions for is dropped, and counted."""
    return _all_batches(SFTDataModule, rows, tokenizer, settings, max_length=max_positions(policy))


def comparison_batches(tokenizer: "PreTrainedTokenizerBase", settings: Config) -> list[ComparisonBatch]:
    """Return the comparisons of ``reward_data.path`` as batches of at most ``batch_size`` prompts, in their order."""
    rows = read_rows(settings["reward_data"]["path"], split="test", setting="reward_data.path")
    return _all_batches(RewardDataModule, rows, tokenizer, settings)


def _all_batches(
    data_module: type[PPODataModule | RewardDataModule | SFTDataModule],
    rows: list[Row],
    tokenizer: "PreTrainedTokenizerBase",
    settings: Config,
    **more: Any,
) -> list[Any]:
    # Validation is what a DataModule reads whole and in order.
    data = data_module(
        rows,
        val_path=rows,
        tokenizer=tokenizer,
        prompt_template=settings["prompt_template"],
        batch_size=settings["batch_size"],
        **more,
    )
    data.setup("validate")
    return list(data.val_dataloader())
