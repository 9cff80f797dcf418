import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import LightningModule, Trainer
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf_lightning.data import PPODataModule, SFTDataModule
from rlhf_lightning.errors import InputError
from rlhf_lightning.types import PromptBatch

# Lightning 2.6 under torch 2.15 uses what torch deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")

ROWS = [{"prompt": "x" * i, "answer": i} for i in range(1, 31)]


class Generator(LightningModule):
    """Has the limits of a policy, and remembers the prompts."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, max_positions: int, max_new_tokens: int) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.max_positions = max_positions
        self.max_new_tokens = max_new_tokens
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.read: list[Any] = []

    def training_step(self, batch: PromptBatch, batch_idx: int) -> Tensor:
        self.read += batch.prompts
        return self.weight * 0

    def validation_step(self, batch: PromptBatch, batch_idx: int) -> None:
        pass

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(module: LightningModule, data: PPODataModule) -> None:
    Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(module, data)


def ready(rows: Any, **settings: Any) -> PPODataModule:
    data = PPODataModule(rows, **settings)
    data.setup("fit")
    return data


def test_a_prompt_is_what_fine_tuning_puts_before_the_response(tokenizer: PreTrainedTokenizerBase) -> None:
    rows = [{"prompt": f"What is {i}?", "response": "A number."} for i in range(5)]
    settings: dict[str, Any] = {"tokenizer": tokenizer, "prompt_template": "Q: {prompt}\nA: ", "val_fraction": 0}
    demonstrations = SFTDataModule(rows, **settings)
    demonstrations.setup("fit")
    for prompt, sequence in zip(
        ready(rows, batch_size=1, **settings).train_items, demonstrations.train_items, strict=True
    ):
        assert torch.equal(prompt.tokens, sequence.tokens[: sequence.prompt_length])


def test_a_batch_holds_the_prompts_in_three_forms_and_the_columns(tokenizer: PreTrainedTokenizerBase) -> None:
    data = ready(ROWS[:2], tokenizer=tokenizer, prompt_template="Q: {prompt}", batch_size=2, val_fraction=0)
    batch = next(iter(data.train_dataloader()))
    for i, prompt in enumerate(batch.prompts):
        assert batch.texts[i] == f"Q: {prompt}"
        assert tokenizer.decode(batch.prompt_tokens[i][batch.prompt_mask[i]]) == f"<bos>Q: {prompt}"
        assert batch.columns == {"answer": [len(p) for p in batch.prompts]}
    assert batch.prompt_mask[:, -1].all()


def test_a_conversation_reaches_the_reward_function_as_it_stands_in_the_data(
    chat_tokenizer: PreTrainedTokenizerBase,
) -> None:
    turns = [{"role": "user", "content": "hi"}]
    batch = next(iter(ready([{"prompt": turns}], tokenizer=chat_tokenizer, batch_size=1).train_dataloader()))
    assert batch.prompts == [turns]
    assert batch.texts == ["<|user|>hi<eos>\n<|assistant|>"]


def test_a_column_that_a_row_lacks_holds_none(tokenizer: PreTrainedTokenizerBase) -> None:
    rows = [{"prompt": "a", "x": 1}, {"prompt": "b", "y": 2}]
    batch = next(iter(ready(rows, tokenizer=tokenizer, batch_size=2, val_fraction=0).train_dataloader()))
    found = dict(zip(batch.prompts, zip(batch.columns["x"], batch.columns["y"], strict=True), strict=True))
    assert found == {"a": (1, None), "b": (None, 2)}


def test_training_drops_the_incomplete_batch_and_validation_keeps_all(tokenizer: PreTrainedTokenizerBase) -> None:
    data = ready(ROWS, val_path=ROWS[:10], tokenizer=tokenizer, batch_size=8)
    assert [len(batch) for batch in data.train_dataloader()] == [8, 8, 8]
    loader: Any = data.val_dataloader()
    assert [len(batch) for batch in loader] == [8, 2]


def test_fewer_prompts_than_a_batch_are_an_error(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(InputError, match=r"data\.batch_size=8 needs at least 8 training rows.*there are 7"):
        ready(ROWS[:7], tokenizer=tokenizer, batch_size=8, val_fraction=0)


def test_prompts_that_leave_no_room_for_the_response_are_dropped_and_counted(
    tokenizer: PreTrainedTokenizerBase, caplog: pytest.LogCaptureFixture
) -> None:
    module = Generator(tokenizer, max_positions=20, max_new_tokens=9)
    with caplog.at_level(logging.WARNING, logger="rlhf_lightning.data"):
        fit(module, PPODataModule(ROWS, batch_size=10, val_fraction=0))
    # The begin token and ten letters are the 11 tokens that are left.
    assert sorted(map(len, module.read)) == list(range(1, 11))
    assert "20 of 30 training rows are dropped: a row may have at most 11 tokens" in caplog.text
    assert "the model's 20 positions - max_new_tokens=9" in caplog.text


def test_prompts_that_are_all_too_long_are_an_error(tokenizer: PreTrainedTokenizerBase) -> None:
    module = Generator(tokenizer, max_positions=20, max_new_tokens=19)
    with pytest.raises(InputError, match=r"30 of 30 training rows are dropped.*max_new_tokens=19.*none is left"):
        fit(module, PPODataModule(ROWS, val_fraction=0))


def test_a_longest_prompt_can_be_set(tokenizer: PreTrainedTokenizerBase) -> None:
    data = ready(ROWS, tokenizer=tokenizer, max_prompt_length=9, val_fraction=0, batch_size=8)
    assert max(map(len, data.train_items)) == 9


def test_openings_of_texts_are_prompts_and_shorter_texts_are_dropped(
    tokenizer: PreTrainedTokenizerBase, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{"text": "abcdef", "id": 1}, {"text": "abc", "id": 2}, {"text": "abcd", "id": 3}]
    with caplog.at_level(logging.WARNING, logger="rlhf_lightning.data"):
        data = ready(rows, tokenizer=tokenizer, opening_tokens=4, batch_size=2, val_fraction=0)
    batch = next(iter(data.train_dataloader()))
    assert batch.prompts == ["abcd", "abcd"]
    assert sorted(batch.columns["id"]) == [1, 3]
    assert "1 of 3 training rows are dropped: a text must have at least data.opening_tokens=4 tokens" in caplog.text


def test_rows_come_in_a_new_order_in_each_epoch(tokenizer: PreTrainedTokenizerBase) -> None:
    loader = ready(ROWS, tokenizer=tokenizer, batch_size=5, val_fraction=0).train_dataloader()
    orders = []
    for epoch in (0, 1):
        loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
        orders.append([prompt for batch in loader for prompt in batch.prompts])
    assert orders[0] != orders[1]
    assert sorted(orders[0]) == sorted(orders[1]) == sorted(row["prompt"] for row in ROWS)


def test_real_openings_begin_their_stories(stories_tokenizer: PreTrainedTokenizerBase, real_data: Path) -> None:
    path = real_data / "text" / "tinystories" / "stories.jsonl"
    data = ready(path, tokenizer=stories_tokenizer, opening_tokens=12)
    stories = [str(row.fields["text"]) for row in data.train_rows]
    for item, story in zip(data.train_items, stories, strict=True):
        assert story.startswith(str(item.example.prompt))
        assert len(item) == 13
