import json
from pathlib import Path
from typing import Any

import pytest

from rlhf_lightning.cli.prompts import comparison_batches, prompt_batches, read_prompts, response_batches
from rlhf_lightning.errors import InputError
from rlhf_lightning.networks import load_policy, load_tokenizer

SETTINGS: dict[str, Any] = {"prompt_template": "{prompt}\n", "batch_size": 2, "max_new_tokens": 4}


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    made = [{"prompt": f"Say {'x' * i}.", "response": f"{i}!", "topic": i} for i in range(5)]
    path.write_text("".join(json.dumps(row) + "\n" for row in made), encoding="utf-8")
    return path


def data(path: Path | None, **more: Any) -> dict[str, Any]:
    return {"path": path and str(path), "format": "rows", "examples": 0, "split": "test", "limit": None, **more}


def test_rows_are_read_in_order_up_to_the_limit(rows: Path) -> None:
    assert [row.fields["topic"] for row in read_prompts(data(rows))] == [0, 1, 2, 3, 4]
    assert [row.fields["topic"] for row in read_prompts(data(rows, limit=2))] == [0, 1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"path": None}, "data.path is required"), ({"format": "csv"}, "data.format=csv must be rows or natural")],
)
def test_what_cannot_be_read_is_named(changes: dict[str, Any], message: str, rows: Path) -> None:
    with pytest.raises(InputError, match=message):
        read_prompts({**data(rows), **changes})


def test_prompts_keep_their_order_and_columns_in_batches(rows: Path, tiny_model: Path) -> None:
    batches = prompt_batches(read_prompts(data(rows)), load_policy(tiny_model), load_tokenizer(tiny_model), SETTINGS)
    assert [len(batch) for batch in batches] == [2, 2, 1]
    assert [topic for batch in batches for topic in batch.columns["topic"]] == [0, 1, 2, 3, 4]
    assert batches[0].texts[0] == "Say .\n"


def test_a_prompt_that_leaves_no_room_for_its_response_is_refused(rows: Path, tiny_model: Path) -> None:
    policy = load_policy(tiny_model)
    settings = {**SETTINGS, "max_new_tokens": policy.config.max_position_embeddings}
    with pytest.raises(InputError, match=r"the longest prompt has .* positions"):
        prompt_batches(read_prompts(data(rows)), policy, load_tokenizer(tiny_model), settings)


def test_responses_are_what_counts(rows: Path, tiny_model: Path) -> None:
    tokenizer = load_tokenizer(tiny_model)
    batches = response_batches(read_prompts(data(rows)), load_policy(tiny_model), tokenizer, SETTINGS)
    counted = [tokenizer.decode(ids[mask]) for b in batches for ids, mask in zip(b.tokens, b.loss_mask, strict=True)]
    assert [text.removesuffix(tokenizer.eos_token) for text in counted] == [f"{i}!" for i in range(5)]


def test_comparisons_come_in_batches_of_prompts(tmp_path: Path, tiny_model: Path) -> None:
    path = tmp_path / "comparisons.jsonl"
    made = [{"prompt": "Say.", "responses": ["a", "b", "c"]}, {"prompt": "Say.", "chosen": "a", "rejected": "b"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in made * 2), encoding="utf-8")
    settings = {**SETTINGS, "reward_data": {"path": str(path)}}
    batches = comparison_batches(load_tokenizer(tiny_model), settings)
    assert [len(batch) for batch in batches] == [5, 5]
    assert batches[0].ranks.tolist() == [0, 1, 2, 0, 1]


def test_a_row_that_is_no_comparison_is_named_by_file_and_line(rows: Path, tiny_model: Path) -> None:
    settings = {**SETTINGS, "reward_data": {"path": str(rows)}}
    with pytest.raises(InputError, match=r"rows\.jsonl:1: a row needs prompt, chosen and rejected"):
        comparison_batches(load_tokenizer(tiny_model), settings)
