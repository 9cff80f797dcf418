"""Whether tokenizer, templates and rows say what training takes them to say."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rlhf_lightning.functional.masking import last_index
from rlhf_lightning.preflight.findings import Finding, Status
from rlhf_lightning.types import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

GREETING: list[Message] = [{"role": "user", "content": "Hello, who are you?"}]


def check_end_token(tokens: Tensor, attention_mask: Tensor, learnt: Tensor, *, stop_tokens: Sequence[int]) -> Finding:
    """Check that each row (B, T) ends with a stop token, and that it is among the tokens that are learnt."""
    name = "end token"
    last = last_index(attention_mask)
    rows = torch.arange(len(tokens), device=tokens.device)
    stops = torch.tensor(list(stop_tokens), device=tokens.device)
    lacking = int((~(torch.isin(tokens[rows, last], stops) & learnt[rows, last])).sum())
    measured = (
        f"{lacking} of {len(tokens)} rows do not end with a learnt stop token ({', '.join(map(str, stop_tokens))})"
    )
    if not lacking:
        return Finding(name, "ok", f"all of {len(tokens)} rows end with a learnt stop token")
    return Finding(
        name,
        "error",
        measured,
        "a model that never learns to stop runs to max_new_tokens: let each response end with the tokenizer's "
        "eos_token (network.eos_token=...) and count it among the labels",
    )


def check_pad_token(tokenizer: "PreTrainedTokenizerBase", *, found_by_id: bool) -> Finding:
    """Check that padding cannot be taken for the end; ``found_by_id`` where a network looks for the pad id itself."""
    name = "pad token"
    pad: Any = tokenizer.pad_token_id
    measured = f"pad is {tokenizer.pad_token!r} ({pad}), the end token {tokenizer.eos_token!r}"
    if pad is None:
        return Finding(
            name, "error", "the tokenizer has no pad token", "name one, as in 'network.pad_token=\"<|pad|>\"'"
        )
    if pad != tokenizer.eos_token_id:
        return Finding(name, "ok", measured)
    status: Status = "error" if found_by_id else "warning"
    return Finding(
        name,
        status,
        f"the pad token is the end token {tokenizer.eos_token!r}",
        "name another with network.pad_token=...; masks here go by length, but other tools mask by id and then "
        "never learn the end",
    )


def check_chat_template(tokenizer: "PreTrainedTokenizerBase", conversation: Sequence[Message] | None = None) -> Finding:
    """Check that a conversation with its answer begins with the prompt that generation is given.

    ``conversation`` is one of the data's, None where the data has none: then a fault is only worth a warning.
    """
    name = "chat template"
    if tokenizer.chat_template is None:
        if conversation is None:
            return Finding(name, "ok", "none, and the rows are texts")
        return Finding(
            name,
            "error",
            "rows are conversations, the tokenizer has no template",
            "use text prompts, or a model whose tokenizer has one",
        )
    from jinja2 import TemplateError

    asked = list(conversation or GREETING)
    status: Status = "warning" if conversation is None else "error"
    try:
        prompt = _render(tokenizer, asked, add_generation_prompt=True)
        whole = _render(tokenizer, [*asked, {"role": "assistant", "content": "I am."}], add_generation_prompt=False)
    except TemplateError as error:
        return Finding(name, status, f"it refuses the messages: {error}", "change the rows, or the template")
    if whole.startswith(prompt):
        return Finding(name, "ok", f"the training form begins with the prompt of {len(prompt)} characters")
    return Finding(
        name,
        status,
        f"generation is given ...{prompt[-30:]!r}, which the training form does not begin with",
        "change tokenizer.chat_template so that add_generation_prompt=True writes what stands before an answer",
    )


def check_round_trip(tokenizer: "PreTrainedTokenizerBase", texts: Sequence[str]) -> Finding:
    """Say whether texts survive their tokens; it is no fault where not, since sampled ids are kept."""
    name = "round trip"
    changed = [text for text in texts if _decoded(tokenizer, text) != text]
    if not changed:
        return Finding(name, "ok", f"{len(texts)} of {len(texts)} texts come back from their ids")
    return Finding(
        name,
        "note",
        f"{len(changed)} of {len(texts)} texts come back changed, as {_decoded(tokenizer, changed[0])[:30]!r}",
        "nothing: sampled ids are kept as they are; but a reward function reads the decoded text",
    )


def check_length(lengths: Sequence[int], *, room: int | None, reason: str) -> Finding:
    """Say how many rows have more tokens than there is ``room`` for, and are dropped, and for what ``reason``."""
    name = "length"
    longest = max(lengths, default=0)
    if room is None:
        return Finding(name, "ok", f"the longest of {len(lengths)} rows has {longest} tokens; positions have no end")
    dropped = sum(length > room for length in lengths)
    limit = f"the longest has {longest} tokens, there is room for {room} ({reason})"
    if not dropped:
        return Finding(name, "ok", f"none of {len(lengths)} rows is dropped: {limit}")
    return Finding(
        name,
        "error" if dropped == len(lengths) else "warning",
        f"{dropped} of {len(lengths)} rows are dropped: {limit}",
        "shorten the rows, or leave them more room: what limits it stands in brackets",
    )


def _decoded(tokenizer: "PreTrainedTokenizerBase", text: str) -> str:
    ids: Any = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return str(tokenizer.decode(ids))


def _render(tokenizer: Any, messages: list[Message], *, add_generation_prompt: bool) -> str:
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt))
