import math
from typing import Any

import pytest

from rlhf_lightning.data.formats import (
    Exchange,
    RawText,
    comparison,
    demonstration,
    group_of,
    opening_example,
    prompt_example,
)
from rlhf_lightning.data.reading import Row
from rlhf_lightning.errors import InputError


def row(**fields: Any) -> Row:
    return Row(fields, "rows.jsonl:7")


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


def exchange(prompt: Any, response: str) -> Exchange:
    return Exchange(prompt, response, "")


def test_a_demonstration_is_a_prompt_with_its_response() -> None:
    assert demonstration(row(prompt="a", response="b", other=1)) == exchange("a", "b")


def test_a_conversation_demonstrates_its_last_turn() -> None:
    turns = [user("a"), assistant("b"), user("c"), assistant("d")]
    assert demonstration(row(messages=turns)) == exchange(turns[:3], "d")


def test_a_response_to_a_conversation_may_be_text() -> None:
    assert demonstration(row(prompt=[user("a")], response="b")) == exchange([user("a")], "b")


def test_text_demonstrates_itself() -> None:
    assert demonstration(row(text="a")) == RawText("a", "")


def test_a_column_of_nulls_is_not_a_field() -> None:
    assert demonstration(row(prompt=None, response=None, messages=None, text="a")) == RawText("a", "")


def test_a_pair_ranks_the_chosen_response_first() -> None:
    assert comparison(row(prompt="a", chosen="b", rejected="c")).exchanges == (exchange("a", "b"), exchange("a", "c"))


def test_a_ranking_keeps_its_order() -> None:
    ranked = comparison(row(prompt="a", responses=["z", "y", "x"]))
    assert [one.response for one in ranked.exchanges] == ["z", "y", "x"]
    assert (ranked.ranks, ranked.ratings) == ((0, 1, 2), (0.0, 0.0, 0.0))


def test_ratings_say_the_order_whatever_that_of_the_responses_is() -> None:
    ranked = comparison(row(prompt="a", responses=["x", "z", "y"], ratings=[-1, 4.5, 2]))
    assert [one.response for one in ranked.exchanges] == ["z", "y", "x"]
    assert (ranked.ranks, ranked.ratings) == ((0, 1, 2), (5.5, 3.0, 0.0))


def test_responses_that_are_rated_alike_share_a_place() -> None:
    ranked = comparison(row(prompt="a", responses=["w", "x", "y", "z"], ratings=[1, 3, 1, 2]))
    assert [one.response for one in ranked.exchanges] == ["x", "z", "w", "y"]
    assert ranked.ranks == (0, 1, 2, 2)
    assert not ranked.all_tie
    assert comparison(row(prompt="a", responses=["x", "y"], ratings=[2, 2.0])).all_tie


def test_the_margin_of_a_pair_is_the_difference_of_its_ratings() -> None:
    assert comparison(row(prompt="a", chosen="b", rejected="c", margin=2)).ratings == (2.0, 0.0)
    even = comparison(row(prompt="a", chosen="b", rejected="c", margin=0))
    assert (even.ranks, even.ratings) == ((0, 1), (0.0, 0.0))


def test_large_ratings_keep_their_small_differences() -> None:
    ranked = comparison(row(prompt="a", responses=["x", "y"], ratings=[1e9 + 0.25, 1e9]))
    assert ranked.ratings == (0.25, 0.0)


@pytest.mark.parametrize("prompt", ["a", [user("a")]])
def test_the_assistants_turn_and_the_whole_conversation_are_the_same_comparison(prompt: Any) -> None:
    turns = comparison(row(prompt=prompt, chosen=[assistant("b")], rejected=[assistant("c")]))
    whole = comparison(row(prompt=prompt, chosen=[user("a"), assistant("b")], rejected=[user("a"), assistant("c")]))
    assert turns == whole
    assert whole.exchanges == (exchange([user("a")], "b"), exchange([user("a")], "c"))


def test_a_prompt_carries_all_other_columns() -> None:
    example = prompt_example(row(prompt="a", answer=5, group=None, responses=["taken"]))
    assert (example.prompt, example.columns) == ("a", {"answer": 5, "group": None})


def test_a_text_waits_for_its_opening_to_be_cut_and_carries_all_other_columns() -> None:
    example = opening_example(row(text="a b", answer=5))
    assert (example.prompt, example.columns) == ("a b", {"answer": 5})


@pytest.mark.parametrize(
    ("read", "fields", "rule"),
    [
        (demonstration, {"prompt": "a", "answer": "b"}, "needs prompt and response.*found answer, prompt"),
        (demonstration, {"response": "b"}, "needs prompt and response.*found response"),
        (demonstration, {"prompt": "a", "response": None}, "needs prompt and response.*found prompt"),
        (demonstration, {}, "found no field"),
        (demonstration, {"prompt": "", "response": "b"}, "prompt must not be empty; found ''"),
        (demonstration, {"prompt": "a \ud800", "response": "b"}, "prompt has a lone surrogate"),
        (demonstration, {"messages": [user("a"), assistant("\udc00")]}, r"messages\[1\]\.content has a lone surrogate"),
        (demonstration, {"prompt": "a", "response": " \n"}, "response must not be empty"),
        (demonstration, {"prompt": "a", "response": 5}, r"response must be text; found 5 \(int\)"),
        (demonstration, {"prompt": 5, "response": "b"}, r"prompt must be text; found 5 \(int\)"),
        (demonstration, {"text": ""}, "text must not be empty"),
        (demonstration, {"text": ["a"]}, "text must be text"),
        (demonstration, {"messages": []}, "messages must be text or a list of messages"),
        (demonstration, {"messages": "a"}, "messages must be text or a list of messages"),
        (demonstration, {"messages": [{"role": "user"}]}, r"messages\[0\] must be a message with role and content"),
        (demonstration, {"messages": [user("a"), assistant("")]}, r"messages\[1\]\.content must not be empty"),
        (demonstration, {"messages": [user("a")]}, "messages must end with a turn of the assistant; found 'user'"),
        (demonstration, {"messages": [assistant("a")]}, "must have a turn before the assistant's"),
        (comparison, {"prompt": "a", "chosen": "b"}, "needs prompt, chosen and rejected.*found chosen, prompt"),
        (comparison, {"chosen": "b", "rejected": "c"}, "needs prompt, chosen and rejected"),
        (comparison, {"prompt": "a", "chosen": "b", "rejected": ""}, "rejected must not be empty"),
        (comparison, {"prompt": "a", "chosen": "b", "rejected": 1}, "rejected must be text"),
        (comparison, {"prompt": "a", "chosen": "b", "rejected": "b"}, "chosen and rejected must differ"),
        (
            comparison,
            {"prompt": "a", "chosen": [assistant("b")], "rejected": [user("a"), assistant("b")]},
            "chosen and rejected must differ",
        ),
        (comparison, {"prompt": "a", "responses": ["b", "c", "b"]}, r"responses\[0\] and responses\[2\] must differ"),
        (comparison, {"prompt": "a", "responses": ["b"]}, "at least 2 to compare; found 1"),
        (comparison, {"prompt": "a", "responses": []}, "at least 2 to compare; found 0"),
        (comparison, {"prompt": "a", "responses": "bc"}, "responses must be a list"),
        (comparison, {"prompt": "a", "responses": ["b", ""]}, r"responses\[1\] must not be empty"),
        (comparison, {"prompt": "a", "responses": ["b", "c"], "ratings": [1]}, "list of 2 numbers.*; found "),
        (comparison, {"prompt": "a", "responses": ["b", "c"], "ratings": 5}, "list of 2 numbers.*; found 5"),
        (comparison, {"prompt": "a", "responses": ["b", "c"], "ratings": [1, "2"]}, r"ratings\[1\] must be a finite"),
        (comparison, {"prompt": "a", "responses": ["b", "c"], "ratings": [True, 2]}, r"ratings\[0\] must be a finite"),
        (comparison, {"prompt": "a", "responses": ["b", "c"], "ratings": [None, 2]}, r"ratings\[0\] must be a finite"),
        (comparison, {"prompt": "a", "responses": ["b", "c"], "ratings": [2, math.nan]}, r"ratings\[1\] .*found nan"),
        (comparison, {"prompt": "a", "responses": ["b", "c"], "ratings": [2, 10**400]}, r"ratings\[1\] must be"),
        (comparison, {"prompt": "a", "chosen": "b", "rejected": "c", "margin": "1"}, "margin must be a finite number"),
        (comparison, {"prompt": "a", "chosen": "b", "rejected": "c", "margin": math.inf}, "margin must be a finite"),
        (
            comparison,
            {"prompt": "a", "chosen": "b", "rejected": "c", "margin": -0.5},
            "must not be negative.*found -0.5",
        ),
        (comparison, {"prompt": "a", "chosen": [user("b")], "rejected": "c"}, "the whole conversation with the prompt"),
        (
            comparison,
            {"prompt": [user("a")], "chosen": [user("x"), assistant("b")], "rejected": "c"},
            "the whole conversation with the prompt",
        ),
        (prompt_example, {"text": "a"}, r"needs prompt .*data\.opening_tokens.*found text"),
        (prompt_example, {"prompt": " "}, "prompt must not be empty"),
        (prompt_example, {"prompt": [user("a"), assistant("b")]}, "must not end with a turn of the assistant"),
        (opening_example, {"prompt": "a"}, r"needs text \(data\.opening_tokens is set\); found prompt"),
    ],
)
def test_a_bad_row_is_an_error_with_its_place_the_rule_and_what_was_found(
    read: Any, fields: dict[str, Any], rule: str
) -> None:
    with pytest.raises(InputError, match=rf"^rows\.jsonl:7: .*{rule}"):
        read(row(**fields))


def test_rows_belong_together_by_group_then_by_what_is_asked() -> None:
    assert group_of(row(group=3, prompt="a")) == group_of(row(group=3, prompt="b"))
    assert group_of(row(group=3, prompt="a")) != group_of(row(group=4, prompt="a"))
    assert group_of(row(prompt="a", response="b")) == group_of(row(prompt="a", response="c"))
    assert group_of(row(messages=[user("a"), assistant("b")])) == group_of(row(messages=[user("a"), assistant("c")]))
    assert group_of(row(text="a")) != group_of(row(prompt="a"))
