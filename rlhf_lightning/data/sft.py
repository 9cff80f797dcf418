"""Data for fine-tuning and pre-training."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from rlhf_lightning.data.collating import sft_batch
from rlhf_lightning.data.datamodule import Limit, TextDataModule, position_limit, setting_limit, tightest
from rlhf_lightning.data.formats import RawText, demonstration
from rlhf_lightning.data.natural_instructions import read_natural_instructions
from rlhf_lightning.data.reading import Row, Source, read_rows
from rlhf_lightning.data.tokenizing import Encoder, TokenSequence, blocks
from rlhf_lightning.errors import InputError
from rlhf_lightning.types import SFTBatch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Format = Literal["rows", "natural_instructions"]


class SFTDataModule(TextDataModule[TokenSequence]):
    """Demonstrations as `SFTBatch`: rows ``{prompt, response}``, ``{messages}`` or ``{text}``.

    Of the first two the response with its end token is learnt, of a text every token but the first. A row longer than
    ``max_length`` or the model's positions is dropped, and counted; a text is cut into blocks instead.

    Args:
        path: a file (.jsonl, .json, .csv, .parquet), a folder with ``<split>.*`` files, a name on the hub, or rows.
        val_path: where the validation rows are; without it and without ``val_split`` they are split off.
        split: the file of a folder, or the split of a hub data set, to train on.
        val_split: the same to validate on; a file ``validation.*`` in a folder is found without it.
        val_fraction: share of the groups to split off for validation; a group is the rows with an equal ``group``, or
            where there is no such column, with an equal prompt or text.
        batch_size: rows of one process in one batch.
        tokenizer: the module's where not given.
        prompt_template: what surrounds a text prompt; conversations use the tokenizer's chat template.
        max_length: the most tokens of a row.
        format: ``natural_instructions`` reads a task of Super-NaturalInstructions in its original schema.
        examples: how many positive examples of such a task stand in each prompt.
        group_by_length: make batches of rows of similar length, which saves padding.
        seed: of the split and of the order.
        num_workers: processes that make batches; rows are tokenised in `setup`, so 0 is nearly always right.
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
        format: Format = "rows",
        examples: int = 2,
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
        self.format = format
        self.examples = examples

    def limit(self) -> Limit | None:
        """Return the smaller of ``max_length`` and the model's positions."""
        return tightest(self.max_length, position_limit(self.max_positions()))

    def items(self, row: Row, encoder: Encoder, limit: Limit | None) -> list[TokenSequence]:
        """Return the tokenised demonstration, or the blocks of a text."""
        example = demonstration(row)
        if not isinstance(example, RawText):
            return [encoder.exchange(example)]
        sequence = encoder.text(example)
        return blocks(sequence, len(sequence) if limit is None else limit.tokens)

    def collate(self, pad_token_id: int) -> Callable[[list[TokenSequence]], SFTBatch]:
        """Return `sft_batch` with the padding."""
        return partial(sft_batch, pad_token_id=pad_token_id)

    def read(self, path: Source, *, split: str, setting: str) -> list[Row]:
        """Return the rows of a source in the chosen format."""
        if self.format == "rows":
            return read_rows(path, split=split, setting=setting)
        if not isinstance(path, str | Path):
            raise InputError(f"{setting} must be a file or a folder where data.format={self.format}")
        return read_natural_instructions(path, examples=self.examples, split=split, setting=setting)
