"""Data for PPO."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from rlhf_lightning.data.collating import prompt_batch
from rlhf_lightning.data.datamodule import Limit, TextDataModule, position_limit, setting_limit, tightest
from rlhf_lightning.data.formats import opening_example, prompt_example
from rlhf_lightning.data.reading import Row, Source
from rlhf_lightning.data.tokenizing import Encoder, TokenizedPrompt
from rlhf_lightning.errors import InputError
from rlhf_lightning.types import PromptBatch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class PPODataModule(TextDataModule[TokenizedPrompt]):
    """Prompts as `PromptBatch`: rows ``{prompt}``, or ``{text}`` of which the opening is the prompt.

    All other columns reach a reward function, but for those named as its own arguments, ``prompts`` and ``responses``;
    a row that lacks a column that others have holds None there. A prompt longer than ``max_prompt_length`` or than the
    model's positions minus the module's ``max_new_tokens`` is dropped, and counted. Training
    leaves out what does not fill a batch, another part in each epoch; validation keeps all.

    Args:
        path: as in `SFTDataModule`, like all arguments that are not named here.
        batch_size: prompts of one rollout of one process.
        max_prompt_length: the most tokens of a prompt.
        opening_tokens: how many tokens of ``text`` are the prompt; shorter texts are dropped, and counted.
    """

    def __init__(
        self,
        path: Source,
        *,
        val_path: Source | None = None,
        split: str = "train",
        val_split: str | None = None,
        val_fraction: float = 0.05,
        batch_size: int = 64,
        tokenizer: "PreTrainedTokenizerBase | None" = None,
        prompt_template: str = "{prompt}",
        max_prompt_length: int | None = None,
        opening_tokens: int | None = None,
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
            # A rollout of prompts of one length would see only one kind of prompt.
            group_by_length=False,
            drop_incomplete_batch=True,
            seed=seed,
            num_workers=num_workers,
        )
        if opening_tokens is not None and opening_tokens < 1:
            raise InputError(f"data.opening_tokens={opening_tokens} must be at least 1")
        self.max_prompt_length = setting_limit("max_prompt_length", max_prompt_length)
        self.opening_tokens = opening_tokens

    def limit(self) -> Limit | None:
        """Return the smaller of ``max_prompt_length`` and what the model's positions leave for the prompt."""
        return tightest(self.max_prompt_length, position_limit(self.max_positions(), self.max_new_tokens()))

    def rule(self, limit: Limit | None) -> str:
        """Return in words what a row must fulfil not to be dropped."""
        text = f"a text must have at least data.opening_tokens={self.opening_tokens} tokens"
        rules = [super().rule(limit)] if limit else []
        return ", ".join([*rules, text] if self.opening_tokens else rules)

    def items(self, row: Row, encoder: Encoder, limit: Limit | None) -> list[TokenizedPrompt]:
        """Return the tokenised prompt; none for a text that is shorter than its opening."""
        if self.opening_tokens is None:
            return [encoder.prompt(prompt_example(row))]
        example = opening_example(row)
        opening = encoder.opening(str(example.prompt), self.opening_tokens)
        return [] if opening is None else [encoder.prompt(replace(example, prompt=opening))]

    def group(self, row: Row) -> str:
        """Return the opening where that is the prompt: different texts can begin alike."""
        if self.opening_tokens is None or self.tokenizer is None:
            return super().group(row)
        encoder = Encoder(self.tokenizer, prompt_template=self.prompt_template)
        return str(encoder.opening(str(opening_example(row).prompt), self.opening_tokens))

    def collate(self, pad_token_id: int) -> Callable[[list[TokenizedPrompt]], PromptBatch]:
        """Return `prompt_batch` with the padding and the columns."""
        items = [*self.train_items, *self.val_items]
        columns = list(dict.fromkeys(name for item in items for name in item.example.columns))
        return partial(prompt_batch, pad_token_id=pad_token_id, columns=columns)
