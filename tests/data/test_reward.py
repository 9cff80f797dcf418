from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from rlhf_lightning.data import RewardDataModule
from rlhf_lightning.errors import InputError
from rlhf_lightning.types import ComparisonBatch

PAIR = {"prompt": "a", "chosen": "good", "rejected": "bad"}
RANKING = {"prompt": "b", "responses": ["best", "fair", "worst"]}


def texts(batch: ComparisonBatch, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    return [tokenizer.decode(row[mask]) for row, mask in zip(batch.tokens, batch.attention_mask, strict=True)]


def test_pairs_and_rankings_share_a_batch(tokenizer: PreTrainedTokenizerBase) -> None:
    data = RewardDataModule([PAIR, RANKING], tokenizer=tokenizer, val_fraction=0)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    found = set(zip(texts(batch, tokenizer), batch.ranks.tolist(), strict=True))
    assert found == {
        ("<bos>agood<eos>", 0),
        ("<bos>abad<eos>", 1),
        ("<bos>bbest<eos>", 0),
        ("<bos>bfair<eos>", 1),
        ("<bos>bworst<eos>", 2),
    }
    assert sorted(batch.prompt_index.bincount().tolist()) == [2, 3]
    assert batch.ratings.tolist() == [0.0] * 5


def test_ratings_and_margins_reach_the_batch(tokenizer: PreTrainedTokenizerBase) -> None:
    rows = [{**PAIR, "margin": 0.5}, {**RANKING, "ratings": [1, 3, 3]}]
    data = RewardDataModule(rows, tokenizer=tokenizer, val_fraction=0)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    found = set(zip(texts(batch, tokenizer), batch.ranks.tolist(), batch.ratings.tolist(), strict=True))
    assert found == {
        ("<bos>agood<eos>", 0, 0.5),
        ("<bos>abad<eos>", 1, 0.0),
        ("<bos>bfair<eos>", 0, 2.0),
        ("<bos>bworst<eos>", 0, 2.0),
        ("<bos>bbest<eos>", 1, 0.0),
    }


def test_a_prompt_of_which_all_responses_tie_is_dropped_and_counted(
    tokenizer: PreTrainedTokenizerBase, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [PAIR, {**RANKING, "ratings": [2, 2, 2]}]
    data = RewardDataModule(rows, tokenizer=tokenizer, val_fraction=0)
    data.setup("fit")
    assert len(data.train_items) == 1
    assert "1 of 2 training rows are dropped: a row must have two responses that are not rated alike" in caplog.text
    with pytest.raises(InputError, match=r"1 of 1 training rows are dropped.*rated alike; none is left"):
        RewardDataModule(rows[1:], tokenizer=tokenizer, val_fraction=0).setup("fit")


def test_the_batch_size_counts_prompts(tokenizer: PreTrainedTokenizerBase) -> None:
    rows = [{**RANKING, "prompt": str(i)} for i in range(10)]
    data = RewardDataModule(rows, tokenizer=tokenizer, batch_size=4, val_fraction=0)
    data.setup("fit")
    assert [len(batch) for batch in data.train_dataloader()] == [12, 12, 6]


def test_a_row_is_dropped_whole_where_one_response_is_too_long(tokenizer: PreTrainedTokenizerBase) -> None:
    rows = [PAIR, {**RANKING, "responses": ["best", "fair", "w" * 50]}]
    data = RewardDataModule(rows, tokenizer=tokenizer, max_length=20, val_fraction=0)
    data.setup("fit")
    assert texts(next(iter(data.train_dataloader())), tokenizer) == ["<bos>agood<eos>", "<bos>abad<eos>"]


def test_a_pad_token_that_is_the_end_token_is_an_error_that_names_the_remedy(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    tokenizer.pad_token = tokenizer.eos_token
    with pytest.raises(InputError, match=r"must not be its end token '<eos>'.*network\.pad_token="):
        RewardDataModule([PAIR], tokenizer=tokenizer).setup("fit")


@pytest.mark.parametrize("row", [{**PAIR, "rejected": "good"}, {**RANKING, "responses": ["best"]}, {"text": "a"},
     {**RANKING, "ratings": [1, 2]}, {**PAIR, "margin": -1}])  # fmt: skip
def test_a_bad_row_is_an_error_with_its_place(tokenizer: PreTrainedTokenizerBase, row: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"^row 1 of data\.path: "):
        RewardDataModule([PAIR, row], tokenizer=tokenizer, val_fraction=0).setup("fit")


def test_real_preferences_can_be_read(stories_tokenizer: PreTrainedTokenizerBase, real_data: Path) -> None:
    path = real_data / "preferences" / "hh_harmless" / "pairs.jsonl"
    data = RewardDataModule(path, tokenizer=stories_tokenizer, val_fraction=0)
    data.setup("fit")
    assert len(data.train_items) == 2308
    assert all(len(item.sequences) == 2 for item in data.train_items)
