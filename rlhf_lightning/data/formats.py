"""From rows to typed examples; what a row may look like is decided here, row by row."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rlhf_lightning.data.reading import Row
from rlhf_lightning.errors import InputError
from rlhf_lightning.types import Message, Prompt

LARGEST = 1e38
"""Of the numbers that a row may bring: what float32 can hold."""

HALF_A_CHARACTER = re.compile("[\\ud800-\\udfff]")
"""What JSON can write, and no tokenizer can read: a surrogate of UTF-16 alone."""


@dataclass(frozen=True)
class Exchange:
    """A prompt and one response to it; a conversation is split before its last turn."""

    prompt: Prompt
    response: str
    origin: str = field(compare=False)


@dataclass(frozen=True)
class RawText:
    """Text of which every token is learnt."""

    text: str
    origin: str = field(compare=False)


Demonstration = Exchange | RawText


@dataclass(frozen=True)
class Comparison:
    """Responses to one prompt, the best first, no two alike."""

    exchanges: tuple[Exchange, ...]
    ranks: tuple[int, ...]
    """The place of each, counted from 0; equal where two are rated alike."""
    ratings: tuple[float, ...]
    """How far each is rated above the worst, 0 where nobody rated: a pair's margin is the difference of its two."""
    origin: str = field(compare=False)

    @property
    def all_tie(self) -> bool:
        """Whether no response is better than another: there is nothing to learn."""
        return max(self.ranks) == 0


@dataclass(frozen=True)
class PromptExample:
    """A prompt that waits for a response, and what else its row holds."""

    prompt: Prompt
    columns: Mapping[str, Any]
    origin: str = field(compare=False)


def demonstration(row: Row) -> Demonstration:
    """Return what ``{prompt, response}``, ``{messages}`` or ``{text}`` demonstrates."""
    found = _present(row)
    if {"prompt", "response"} <= found:
        return _exchange(row, "response", row.fields["response"])
    if "messages" in found:
        turns = _turns(row, "messages", row.fields["messages"])
        return _split(turns, row, "messages")
    if "text" in found:
        return RawText(_text(row, "text", row.fields["text"]), row.origin)
    raise _lacks(row, "prompt and response, or messages, or text")


def comparison(row: Row) -> Comparison:
    """Return the ranking of ``{prompt, chosen, rejected}`` or ``{prompt, responses: [best, ..., worst]}``.

    The first may have a ``margin``, by how much the chosen response is better. The second may have ``ratings``, a
    number for each response: these then say the order, and equal ones are a tie. Raises `InputError` where a row is
    otherwise.
    """
    found = _present(row)
    if {"prompt", "chosen", "rejected"} <= found:
        responses = [(name, row.fields[name]) for name in ("chosen", "rejected")]
        ranks, ratings = [0, 1], [_margin(row) if "margin" in found else 0.0, 0.0]
    elif {"prompt", "responses"} <= found:
        responses = _ranked(row)
        ranks, ratings = list(range(len(responses))), [0.0] * len(responses)
        if "ratings" in found:
            responses, ratings = _best_first(responses, _ratings(row, len(responses)))
            ranks = [sorted(set(ratings), reverse=True).index(rating) for rating in ratings]
            # Their differences are all that counts, and float32 holds those of large numbers badly.
            ratings = [rating - ratings[-1] for rating in ratings]
    else:
        raise _lacks(row, "prompt, chosen and rejected, or prompt and responses")
    exchanges = tuple(_exchange(row, name, response) for name, response in responses)
    for i, one in enumerate(exchanges):
        for j in range(i):
            if exchanges[j] == one:
                raise InputError(f"{row.origin}: {responses[j][0]} and {responses[i][0]} must differ; they are equal")
    return Comparison(exchanges, tuple(ranks), tuple(ratings), row.origin)


def prompt_example(row: Row) -> PromptExample:
    """Return the prompt of ``{prompt}``, a text or messages, with all other columns."""
    if "prompt" not in _present(row):
        raise _lacks(row, "prompt (or text, where data.opening_tokens says how much of it is the prompt)")
    return PromptExample(_prompt(row), _other_columns(row, "prompt"), row.origin)


def opening_example(row: Row) -> PromptExample:
    """Return the text of ``{text}``, whose opening is to become the prompt, with all other columns."""
    if "text" not in _present(row):
        raise _lacks(row, "text (data.opening_tokens is set)")
    return PromptExample(_text(row, "text", row.fields["text"]), _other_columns(row, "text"), row.origin)


def group_of(row: Row) -> str:
    """Return what rows have in common that must not stand on both sides of a split: ``group``, else what is asked."""
    fields = {name: row.fields[name] for name in _present(row)}
    return json.dumps(["group", fields["group"]], default=str) if "group" in fields else asked(row)


def asked(row: Row) -> str:
    """Return what the response of a row answers."""
    fields = {name: row.fields[name] for name in _present(row)}
    for name in ("prompt", "text"):
        if name in fields:
            return json.dumps([name, fields[name]], default=str, sort_keys=True)
    if isinstance(messages := fields.get("messages"), Sequence):
        return json.dumps(["messages", list(messages[:-1])], default=str, sort_keys=True)
    return row.origin


def _present(row: Row) -> set[str]:
    # Parquet and the hub write null where a row does not have a column.
    return {name for name, value in row.fields.items() if value is not None}


def _lacks(row: Row, needed: str) -> InputError:
    return InputError(f"{row.origin}: a row needs {needed}; found {', '.join(sorted(_present(row))) or 'no field'}")


def _other_columns(row: Row, taken: str) -> dict[str, Any]:
    # A reward function is called with prompts=..., responses=... and the columns: these names are taken.
    return {name: value for name, value in row.fields.items() if name not in (taken, "prompts", "responses")}


def _text(row: Row, name: str, value: object) -> str:
    if not isinstance(value, str):
        raise InputError(f"{row.origin}: {name} must be text; found {value!r} ({type(value).__name__})")
    if not value.strip():
        raise InputError(f"{row.origin}: {name} must not be empty; found {value!r}")
    if HALF_A_CHARACTER.search(value):
        raise InputError(f"{row.origin}: {name} has a lone surrogate, which is no character; found {value!r}")
    return value


def _turns(row: Row, name: str, value: object) -> list[Message]:
    """Return the messages of a field, with a role and a content each."""
    if not isinstance(value, list | tuple) or not value:
        raise InputError(f"{row.origin}: {name} must be text or a list of messages; found {value!r}")
    turns: list[Message] = []
    for i, turn in enumerate(value):
        if not isinstance(turn, Mapping) or not {"role", "content"} <= {k for k, v in turn.items() if v is not None}:
            raise InputError(f"{row.origin}: {name}[{i}] must be a message with role and content")
        for part in ("role", "content"):
            _text(row, f"{name}[{i}].{part}", turn[part])
        turns.append({k: v for k, v in turn.items() if v is not None})
    return turns


def _prompt(row: Row) -> Prompt:
    prompt = row.fields["prompt"]
    if not isinstance(prompt, list | tuple):
        return _text(row, "prompt", prompt)
    turns = _turns(row, "prompt", prompt)
    if turns[-1]["role"] == "assistant":
        raise InputError(f"{row.origin}: prompt must not end with a turn of the assistant: that is a response")
    return turns


def _ranked(row: Row) -> list[tuple[str, Any]]:
    responses = row.fields["responses"]
    if not isinstance(responses, list | tuple):
        raise InputError(f"{row.origin}: responses must be a list, the best first; found {responses!r}")
    if len(responses) < 2:
        raise InputError(f"{row.origin}: responses must hold at least 2 to compare; found {len(responses)}")
    return [(f"responses[{i}]", response) for i, response in enumerate(responses)]


def _ratings(row: Row, responses: int) -> list[float]:
    ratings = row.fields["ratings"]
    if not isinstance(ratings, list | tuple) or len(ratings) != responses:
        raise InputError(
            f"{row.origin}: ratings must be a list of {responses} numbers, one for each of responses; found {ratings!r}"
        )
    return [_finite(row, f"ratings[{i}]", rating) for i, rating in enumerate(ratings)]


def _best_first(responses: list[tuple[str, Any]], ratings: list[float]) -> tuple[list[tuple[str, Any]], list[float]]:
    order = sorted(range(len(ratings)), key=lambda i: -ratings[i])
    return [responses[i] for i in order], [ratings[i] for i in order]


def _margin(row: Row) -> float:
    margin = _finite(row, "margin", row.fields["margin"])
    if margin < 0:
        raise InputError(
            f"{row.origin}: margin must not be negative: the chosen response is the better; found {margin}"
        )
    return margin


def _finite(row: Row, name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < LARGEST:
        raise InputError(f"{row.origin}: {name} must be a finite number; found {value!r}")
    return float(value)


def _exchange(row: Row, name: str, response: object) -> Exchange:
    """Return the prompt with a response that is a text, the turns that follow the prompt, or the whole conversation."""
    prompt = _prompt(row)
    if isinstance(response, str) or not isinstance(response, list | tuple):
        return Exchange(prompt, _text(row, name, response), row.origin)
    return _split(_conversation(prompt, _turns(row, name, response), row, name), row, name)


def _conversation(prompt: Prompt, turns: list[Message], row: Row, name: str) -> list[Message]:
    if turns[0]["role"] == "assistant":
        asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        return [*asked, *turns]
    if isinstance(prompt, str):
        repeats_prompt = any(turn["content"] == prompt for turn in turns)
    else:
        repeats_prompt = turns[: len(prompt)] == list(prompt)
    if not repeats_prompt:
        raise InputError(
            f"{row.origin}: {name} must be the turns after the prompt, from the assistant's on, or the whole "
            "conversation with the prompt in it"
        )
    return turns


def _split(turns: list[Message], row: Row, name: str) -> Exchange:
    if turns[-1]["role"] != "assistant":
        raise InputError(f"{row.origin}: {name} must end with a turn of the assistant; found {turns[-1]['role']!r}")
    if len(turns) < 2:
        raise InputError(f"{row.origin}: {name} must have a turn before the assistant's; found one turn")
    return Exchange(turns[:-1], turns[-1]["content"], row.origin)
