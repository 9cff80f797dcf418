"""Data for the reward model."""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from rlhf_lightning.data.collating import RankedSequences, comparison_batch
from rlhf_lightning.data.datamodule import Limit, TextDataModule, position_limit, setting_limit, tightest
from rlhf_lightning.data.formats import comparison
from rlhf_lightning.data.reading import Row, Source
from rlhf_lightning.data.tokenizing import Encoder, require_token
from rlhf_lightning.errors import InputError
from rlhf_lightning.types import ComparisonBatch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class RewardDataModule(TextDataModule[RankedSequences]):
    """Comparisons as `ComparisonBatch`: rows ``{prompt, chosen, rejected}`` or ``{prompt, responses}``, the best first.

    Rows with ``responses`` may have ``ratings`` and rows with ``chosen`` a ``margin``: see `comparison`. A row of which
    one response with its prompt is longer than ``max_length`` or the model's positions is dropped, and counted; so is
    one whose responses are all rated alike. The arguments are those of `SFTDataModule`; ``batch_size`` counts prompts.
    """

    def __init__(
        self,
        path: Source,
        *,
        val_path: Source | None = None,
        split: str = "train",
        val_split: str | None = None,
        val_fraction: float = 0.05,
        batch_size: int = 8,
        tokenizer: "PreTrainedTokenizerBase | None" = None,
        prompt_template: str = "{prompt}",
        max_length: int | None = None,
        group_by_length: bool = True,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__(
            path,
            val_path=val_path,
            split=split,
            val_split=val_split,
            val_fraction=val_fraction,
            batch_size=batch_size,
            tokenizer=tokenizer,
            prompt_template=prompt_template,
            group_by_length=group_by_length,
            drop_incomplete_batch=False,
            seed=seed,
            num_workers=num_workers,
        )
        self.max_length = setting_limit("max_length", max_length)

    def limit(self) -> Limit | None:
        """Return the smaller of ``max_length`` and the model's positions."""
        return tightest(self.max_length, position_limit(self.max_positions()))

    def items(self, row: Row, encoder: Encoder, limit: Limit | None) -> list[RankedSequences]:
        """Return the tokenised responses of a row; none where all of them tie."""
        found = comparison(row)
        if found.all_tie:
            return []
        return [RankedSequences(encoder.exchanges(found.exchanges), found.ranks, found.ratings)]

    def rule(self, limit: Limit | None) -> str:
        """Return in words what a row must fulfil not to be dropped."""
        rules = [super().rule(limit)] if limit else []
        return ", ".join([*rules, "a row must have two responses that are not rated alike"])

    def collate(self, pad_token_id: int) -> Callable[[list[RankedSequences]], ComparisonBatch]:
        """Return `comparison_batch` with the padding."""
        return partial(comparison_batch, pad_token_id=pad_token_id)

    def check_tokenizer(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        """Raise `InputError` where padding looks like an end token: a classifier finds the last token by the pad id."""
        if require_token(tokenizer, "pad") == require_token(tokenizer, "eos"):
            raise InputError(
                f"the pad token of a reward model must not be its end token {tokenizer.eos_token!r}: name another with "
                "network.pad_token=..., in Python NetworkConfig(..., pad_token=...)"
            )
