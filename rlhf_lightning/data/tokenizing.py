"""From text to token ids: the template, the special tokens, and the border between prompt and response."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rlhf_lightning.data.formats import Exchange, PromptExample, RawText
from rlhf_lightning.errors import InputError
from rlhf_lightning.types import Message, Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PLACE = "{prompt}"


@dataclass(frozen=True)
class TokenSequence:
    """Token ids (T,), of which those from ``prompt_length`` on are learnt; it is at least 1."""

    tokens: Tensor
    prompt_length: int

    def __len__(self) -> int:
        """Return the number of tokens."""
        return len(self.tokens)


@dataclass(frozen=True)
class TokenizedPrompt:
    """A prompt as token ids (P,), as the policy reads it, and as it stands in the data."""

    tokens: Tensor
    text: str
    example: PromptExample

    def __len__(self) -> int:
        """Return the number of tokens."""
        return len(self.tokens)


class Encoder:
    """Turns examples into token ids.

    Prompt and response are tokenised apart, so that the prompt in training is token by token the prompt that the policy
    is given when it generates. Every response ends with exactly one end token.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", *, prompt_template: str = PLACE) -> None:
        """Raise `InputError` where the tokenizer lacks a pad or end token, or the template a place for the prompt."""
        require_token(tokenizer, "pad")
        require_token(tokenizer, "eos")
        if prompt_template.count(PLACE) != 1:
            raise InputError(f"prompt_template={prompt_template!r} must contain {PLACE} exactly once")
        self.tokenizer: Any = tokenizer
        self.prompt_template = prompt_template
        # The responses of a ranking follow each other: their prompt is tokenised once.
        self._ids = lru_cache(maxsize=1024)(self._tokenized)

    def exchange(self, example: Exchange) -> TokenSequence:
        """Return prompt and response, of which the response with its end token is learnt."""
        return self.exchanges([example])[0]

    def exchanges(self, examples: Sequence[Exchange]) -> list[TokenSequence]:
        """Return `exchange` of each, tokenised in one call."""
        prompts: list[list[int]] = []
        responses: list[str] = []
        for example in examples:
            prompt = self.prompt_text(example.prompt, example.origin)
            prompts.append(self._prompt_ids(example.prompt, prompt, example.origin))
            plain = isinstance(example.prompt, str)
            responses.append(example.response if plain else self._rendered_response(example, prompt))
        tokenized = self.tokenizer(responses, add_special_tokens=False, verbose=False)["input_ids"]
        return [
            TokenSequence(torch.tensor([*prompt, *self._ended(list(ids))]), len(prompt))
            for prompt, ids in zip(prompts, tokenized, strict=True)
        ]

    def text(self, example: RawText) -> TokenSequence:
        """Return the text with its end token; its first token has nothing to be predicted from."""
        ids = self._ended(self._tokenized(example.text, add_special_tokens=True))
        if len(ids) < 2:
            raise InputError(f"{example.origin}: the tokenizer makes no token of the text {example.text!r}")
        return TokenSequence(torch.tensor(ids), 1)

    def prompt(self, example: PromptExample) -> TokenizedPrompt:
        """Return the prompt ready for a response."""
        text = self.prompt_text(example.prompt, example.origin)
        ids = self._prompt_ids(example.prompt, text, example.origin)
        return TokenizedPrompt(torch.tensor(ids), text, example)

    def prompt_text(self, prompt: Prompt, origin: str) -> str:
        """Return the prompt as the policy reads it: a text in the prompt template, messages in the chat template."""
        if isinstance(prompt, str):
            # Not str.format: the user's text may hold braces.
            return self.prompt_template.replace(PLACE, prompt)
        return self._render(list(prompt), origin, add_generation_prompt=True)

    def opening(self, text: str, tokens: int) -> str | None:
        """Return the part of a text that its first ``tokens`` tokens spell, None where it has fewer."""
        if not self.tokenizer.is_fast:
            raise InputError("data.opening_tokens needs a tokenizer that knows the place of its tokens in the text")
        encoding = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ends = [end for _, end in encoding["offset_mapping"]]
        return text[: ends[tokens - 1]] if len(ends) >= tokens else None

    def _tokenized(self, text: str, *, add_special_tokens: bool) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)["input_ids"])

    def _prompt_ids(self, prompt: Prompt, text: str, origin: str) -> list[int]:
        # The chat template writes the special tokens itself.
        ids = self._ids(text, add_special_tokens=isinstance(prompt, str))
        if ids and ids[-1] == self.tokenizer.eos_token_id:
            ids = ids[:-1]
        if not ids:
            raise InputError(f"{origin}: the tokenizer makes no token of the prompt {text!r}")
        return ids

    def _ended(self, ids: list[int]) -> list[int]:
        eos: int = self.tokenizer.eos_token_id
        return ids if ids and ids[-1] == eos else [*ids, eos]

    def _rendered_response(self, example: Exchange, prompt: str) -> str:
        """Return what the chat template writes after the generation prompt."""
        last: Message = {"role": "assistant", "content": example.response}
        whole = self._render([*_messages(example.prompt), last], example.origin, add_generation_prompt=False)
        if not whole.startswith(prompt):
            raise InputError(
                f"{example.origin}: the chat template must write a conversation so that it begins with the prompt and "
                "its generation prompt (add_generation_prompt=True); this one does not"
            )
        response = whole[len(prompt) :]
        # Many templates write a line break after the end token, which no generation reaches.
        cut = response.rstrip()
        return cut if cut.endswith(str(self.tokenizer.eos_token)) else response

    def _render(self, messages: list[Message], origin: str, *, add_generation_prompt: bool) -> str:
        from jinja2 import TemplateError

        if self.tokenizer.chat_template is None:
            raise InputError(
                f"{origin}: messages need a tokenizer with a chat template; this one has none "
                "(use text prompts, or a model whose tokenizer has one)"
            )
        try:
            rendered: str = self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except TemplateError as error:
            raise InputError(f"{origin}: the chat template refuses the messages: {error}") from None
        return rendered


def require_token(tokenizer: "PreTrainedTokenizerBase", name: str) -> int:
    """Return the id of the pad or the end token; raises `InputError` where the tokenizer has none."""
    ids: dict[str, Any] = {"pad": tokenizer.pad_token_id, "eos": tokenizer.eos_token_id}
    if ids[name] is None:
        meaning = {"pad": "a pad token", "eos": "an end token"}[name]
        raise InputError(
            f"the tokenizer has no {meaning.split(' ', 1)[1]}: name {meaning} with network.{name}_token=..., "
            f"in Python NetworkConfig(..., {name}_token=...)"
        )
    return int(ids[name])


def blocks(sequence: TokenSequence, length: int) -> list[TokenSequence]:
    """Cut a text into sequences of at most ``length`` tokens, such that each token but the first is predicted once.

    A block begins with the last token of the one before it, which is there to predict from.
    """
    starts = range(0, len(sequence) - 1, length - 1)
    return [TokenSequence(sequence.tokens[start : start + length], 1) for start in starts]


def _messages(prompt: Prompt) -> list[Message]:
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
