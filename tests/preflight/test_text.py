from collections.abc import Callable
from typing import Any

import pytest
import torch
from tokenizers import normalizers

from rlhf_lightning.preflight.text import (
    check_chat_template,
    check_end_token,
    check_length,
    check_pad_token,
    check_round_trip,
)

TURN = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
QUESTION = [{"role": "user", "content": "Why?"}]

TOKENS = torch.tensor([[5, 6, 7, 1, 0], [5, 8, 1, 0, 0]])
MASK = TOKENS != 0
LEARNT = torch.tensor([[False, False, True, True, False], [False, True, True, False, False]])


def test_rows_that_end_with_a_learnt_end_token_are_right() -> None:
    assert check_end_token(TOKENS, MASK, LEARNT, stop_tokens=[1]).status == "ok"
    assert check_end_token(TOKENS, MASK, LEARNT, stop_tokens=[9, 1]).status == "ok"


def test_a_row_without_the_end_token_is_an_error() -> None:
    cut = MASK.clone()
    cut[0, 3] = False
    finding = check_end_token(TOKENS, cut, LEARNT & cut, stop_tokens=[1])
    assert (finding.status, finding.measured[:10]) == ("error", "1 of 2 row")
    assert check_end_token(TOKENS, MASK, LEARNT, stop_tokens=[9]).measured.startswith("2 of 2 rows")


def test_an_end_token_that_is_no_label_is_an_error() -> None:
    """As where labels are masked by a pad id that is the end token's."""
    assert check_end_token(TOKENS, MASK, LEARNT & (TOKENS != 1), stop_tokens=[1]).status == "error"


def test_a_pad_token_that_is_the_end_token_is_named(make_tokenizer: Callable[..., Any]) -> None:
    assert check_pad_token(make_tokenizer(), found_by_id=True).status == "ok"
    same = make_tokenizer(pad_token="<eos>")
    assert check_pad_token(same, found_by_id=False).status == "warning"
    assert check_pad_token(same, found_by_id=True).status == "error"
    assert "network.pad_token" in check_pad_token(same, found_by_id=True).remedy


def test_a_tokenizer_without_a_pad_token_is_an_error(make_tokenizer: Callable[..., Any]) -> None:
    tokenizer = make_tokenizer()
    tokenizer.pad_token = None
    assert check_pad_token(tokenizer, found_by_id=False).status == "error"


def test_a_generation_prompt_that_begins_the_training_form_is_right(tokenizer: Any) -> None:
    tokenizer.chat_template = TURN + "{% if add_generation_prompt %}<assistant>{% endif %}"
    assert check_chat_template(tokenizer, QUESTION).status == "ok"


def test_a_generation_prompt_that_is_no_prefix_is_named(tokenizer: Any) -> None:
    tokenizer.chat_template = TURN + "{% if add_generation_prompt %}<assistant>\n{% endif %}"
    finding = check_chat_template(tokenizer, QUESTION)
    assert finding.status == "error"
    assert "<assistant>\\n" in finding.measured
    # No row of the data needs the template.
    assert check_chat_template(tokenizer).status == "warning"


def test_a_template_that_refuses_the_rows_is_named(tokenizer: Any) -> None:
    tokenizer.chat_template = "{{ raise_exception('no system turns') }}"
    assert "no system turns" in check_chat_template(tokenizer, QUESTION).measured


def test_a_template_is_missed_only_where_rows_are_conversations(tokenizer: Any) -> None:
    assert check_chat_template(tokenizer).status == "ok"
    assert check_chat_template(tokenizer, QUESTION).status == "error"


def test_a_tokenizer_that_does_not_round_trip_is_noted(tokenizer: Any) -> None:
    assert check_round_trip(tokenizer, ["One", "two"]).status == "ok"
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    finding = check_round_trip(tokenizer, ["One", "two"])
    assert (finding.status, finding.measured) == ("note", "1 of 2 texts come back changed, as 'one'")
    assert "ids are kept" in finding.remedy


@pytest.mark.parametrize(
    ("room", "status", "dropped"),
    [(None, "ok", None), (9, "ok", "none of 3"), (5, "warning", "1 of 3"), (2, "error", "3 of 3")],
)
def test_rows_that_do_not_fit_are_counted(room: int | None, status: str, dropped: str | None) -> None:
    finding = check_length([3, 9, 5], room=room, reason="12 positions")
    assert finding.status == status
    assert dropped is None or finding.measured.startswith(dropped)
