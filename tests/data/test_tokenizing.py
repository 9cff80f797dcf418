from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from rlhf_lightning.data.formats import Exchange, PromptExample, RawText
from rlhf_lightning.data.tokenizing import Encoder, TokenSequence, blocks
from rlhf_lightning.errors import InputError

PAD, BOS, EOS = 0, 1, 2
CONVERSATION = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "yo"},
    {"role": "user", "content": "so"},
]


def exchange(prompt: Any, response: str) -> Exchange:
    return Exchange(prompt, response, "rows.jsonl:7")


def prompt(value: Any) -> PromptExample:
    return PromptExample(value, {}, "rows.jsonl:7")


def ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def test_a_sequence_is_begin_prompt_response_end(tokenizer: PreTrainedTokenizerBase) -> None:
    sequence = Encoder(tokenizer).exchange(exchange("ab", "c"))
    assert sequence.tokens.tolist() == [BOS, *ids(tokenizer, "ab"), *ids(tokenizer, "c"), EOS]
    assert sequence.prompt_length == 3


@pytest.mark.parametrize("response", ["c", "c<eos>"])
def test_a_response_has_exactly_one_end_token(tokenizer: PreTrainedTokenizerBase, response: str) -> None:
    tokens = Encoder(tokenizer).exchange(exchange("a", response)).tokens.tolist()
    assert tokens[-1] == EOS
    assert tokens.count(EOS) == 1


def test_an_end_token_that_the_tokenizer_puts_after_a_prompt_is_left_out(tokenizer: PreTrainedTokenizerBase) -> None:
    from tokenizers import processors

    backend: Any = tokenizer
    backend.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", BOS), ("<eos>", EOS)]
    )
    assert tokenizer("ab")["input_ids"][-1] == EOS
    assert Encoder(tokenizer).prompt(prompt("ab")).tokens.tolist() == [BOS, *ids(tokenizer, "ab")]
    assert Encoder(tokenizer).text(RawText("ab", "")).tokens.tolist() == [BOS, *ids(tokenizer, "ab"), EOS]


@pytest.mark.parametrize("value", ["a {prompt} b", "{0} {x!r}", "%s"])
def test_braces_in_a_users_text_are_text(tokenizer: PreTrainedTokenizerBase, value: str) -> None:
    text = Encoder(tokenizer, prompt_template="Q: {prompt}\nA:").prompt(prompt(value)).text
    assert text == "Q: " + value + "\nA:"


@pytest.mark.parametrize("template", ["", "Q:", "{prompt} {prompt}", "{0}"])
def test_a_template_without_exactly_one_place_is_an_error(tokenizer: PreTrainedTokenizerBase, template: str) -> None:
    with pytest.raises(InputError, match=r"must contain \{prompt\} exactly once"):
        Encoder(tokenizer, prompt_template=template)


@pytest.mark.parametrize("value", ["Why?", CONVERSATION])
def test_the_prompt_in_training_is_the_prompt_in_generation(
    chat_tokenizer: PreTrainedTokenizerBase, value: Any
) -> None:
    encoder = Encoder(chat_tokenizer, prompt_template="Q: {prompt}\nA: ")
    sequence = encoder.exchange(exchange(value, "because"))
    generation = encoder.prompt(prompt(value)).tokens
    assert torch.equal(sequence.tokens[: sequence.prompt_length], generation)


def test_the_prompt_in_training_is_the_prompt_in_generation_with_a_real_tokenizer(
    stories_tokenizer: PreTrainedTokenizerBase,
) -> None:
    # Merges across the border would show here: "little" and " girl" are tokens of their own only if split there.
    encoder = Encoder(stories_tokenizer)
    sequence = encoder.exchange(exchange("Once there was a lit", "tle girl."))
    assert torch.equal(sequence.tokens[: sequence.prompt_length], encoder.prompt(prompt("Once there was a lit")).tokens)
    assert sequence.tokens[0] == stories_tokenizer.bos_token_id
    assert (sequence.tokens[1:] == stories_tokenizer.eos_token_id).sum() == 1


def test_a_conversation_is_learnt_from_its_generation_prompt_through_its_end_token(
    chat_tokenizer: PreTrainedTokenizerBase,
) -> None:
    sequence = Encoder(chat_tokenizer).exchange(exchange(CONVERSATION, "ok"))
    learnt = sequence.tokens[sequence.prompt_length :].tolist()
    assert learnt == [*ids(chat_tokenizer, "ok"), EOS]
    before = chat_tokenizer.decode(sequence.tokens[: sequence.prompt_length])
    assert before == "<|user|>hi<eos>\n<|assistant|>yo<eos>\n<|user|>so<eos>\n<|assistant|>"


def test_a_chat_template_that_writes_no_end_token_gets_one(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant] {% endif %}"
    )
    sequence = Encoder(tokenizer).exchange(exchange(CONVERSATION[:1], "ok"))
    assert sequence.tokens[sequence.prompt_length :].tolist() == [*ids(tokenizer, "ok\n"), EOS]


def test_a_chat_template_whose_conversation_does_not_begin_with_the_prompt_is_an_error(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    tokenizer.chat_template = (
        "{% if add_generation_prompt %}>{% endif %}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    )
    with pytest.raises(
        InputError, match=r"rows\.jsonl:7: the chat template must write a conversation so that it begins"
    ):
        Encoder(tokenizer).exchange(exchange(CONVERSATION, "ok"))


def test_messages_that_the_chat_template_refuses_are_an_error(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(
        InputError, match=r"rows\.jsonl:7: the chat template refuses the messages: roles must alternate"
    ):
        Encoder(tokenizer).prompt(prompt(CONVERSATION))


def test_messages_without_a_chat_template_are_an_error(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(InputError, match=r"rows\.jsonl:7: messages need a tokenizer with a chat template"):
        Encoder(tokenizer).exchange(exchange(CONVERSATION, "ok"))


def test_a_text_is_learnt_but_for_its_first_token(tokenizer: PreTrainedTokenizerBase) -> None:
    sequence = Encoder(tokenizer).text(RawText("abc", ""))
    assert sequence.tokens.tolist() == [BOS, *ids(tokenizer, "abc"), EOS]
    assert sequence.prompt_length == 1


@pytest.mark.parametrize("length", [2, 3, 4, 5, 9, 10, 11])
def test_blocks_predict_each_token_but_the_first_exactly_once(length: int) -> None:
    parts = blocks(TokenSequence(torch.arange(10), 1), length)
    assert torch.cat([part.tokens[part.prompt_length :] for part in parts]).tolist() == list(range(1, 10))
    assert max(len(part) for part in parts) <= length


def test_an_opening_is_what_its_tokens_spell(tokenizer: PreTrainedTokenizerBase) -> None:
    encoder = Encoder(tokenizer)
    assert encoder.opening("abcdef", 3) == "abc"
    assert encoder.opening("abc", 3) == "abc"
    assert encoder.opening("ab", 3) is None


def test_an_opening_never_ends_within_a_letter(tokenizer: PreTrainedTokenizerBase) -> None:
    assert len(ids(tokenizer, "ä")) == 2
    assert Encoder(tokenizer).opening("bäc", 2) == "bä"


@pytest.mark.parametrize(
    ("special_tokens", "rule"),
    [
        (
            {"eos_token": "<eos>"},
            r"no pad token: name a pad token with network\.pad_token=.*NetworkConfig\(.*pad_token=",
        ),
        (
            {"pad_token": "<pad>"},
            r"no end token: name an end token with network\.eos_token=.*NetworkConfig\(.*eos_token=",
        ),
    ],
)
def test_a_tokenizer_without_a_pad_or_an_end_token_is_an_error_that_names_the_remedy(
    make_tokenizer: Callable[..., PreTrainedTokenizerBase], special_tokens: dict[str, str], rule: str
) -> None:
    with pytest.raises(InputError, match=rule):
        Encoder(make_tokenizer(**special_tokens))


def test_gpt2_has_no_pad_token_until_it_is_given_one(real_data: Path) -> None:
    from transformers import GPT2TokenizerFast

    folder = real_data / "tokenizers" / "gpt2"
    gpt2 = GPT2TokenizerFast(vocab=str(folder / "vocab.json"), merges=str(folder / "merges.txt"))
    with pytest.raises(InputError, match=r"network\.pad_token="):
        Encoder(gpt2)
    gpt2.pad_token = gpt2.eos_token
    sequence = Encoder(gpt2).exchange(exchange("Hello", " world"))
    assert gpt2.decode(sequence.tokens) == "Hello world<|endoftext|>"
