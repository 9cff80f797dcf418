from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from rlhf_lightning.errors import InputError
from rlhf_lightning.world.corpus import raw_text
from rlhf_lightning.world.instructions import all_instructions, split
from rlhf_lightning.world.network import build_network, build_tokenizer
from rlhf_lightning.world.topics import facts

TEXTS = [row["text"] for row in raw_text(1000, split(0)[0], seed=0)]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer(TEXTS)


def test_every_text_is_decoded_to_what_was_encoded(tokenizer: PreTrainedTokenizerFast) -> None:
    for text in [*facts(), *(one.text for one in all_instructions()), "A line.\nÄ  word , 木 !\n"]:
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_a_text_begins_with_the_begin_token_and_does_not_end_with_the_end_token(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    plain = tokenizer("Rain", add_special_tokens=False)["input_ids"]
    assert tokenizer("Rain")["input_ids"] == [tokenizer.bos_token_id, *plain]


def test_the_special_tokens_come_first_and_are_distinct(tokenizer: PreTrainedTokenizerFast) -> None:
    assert (tokenizer.pad_token, tokenizer.eos_token, tokenizer.bos_token) == ("<|pad|>", "<|end|>", "<|begin|>")
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id) == (0, 1, 2)


def test_the_vocabulary_has_the_size_that_was_asked_for(tokenizer: PreTrainedTokenizerFast) -> None:
    assert len(tokenizer) == 1024
    assert len(build_tokenizer(TEXTS, vocab_size=300)) == 300


def test_a_vocabulary_without_room_for_the_bytes_is_refused() -> None:
    with pytest.raises(InputError, match="vocab_size=258 must be at least 259"):
        build_tokenizer(TEXTS, vocab_size=258)


def test_the_same_texts_give_the_same_tokenizer(tokenizer: PreTrainedTokenizerFast) -> None:
    assert build_tokenizer(TEXTS).backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()


def test_the_seed_alone_decides_the_weights(tokenizer: PreTrainedTokenizerFast) -> None:
    torch.manual_seed(7)
    before = torch.get_rng_state()
    first = build_network(tokenizer, hidden_size=16, layers=1, heads=2, seed=0).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(8)
    again = build_network(tokenizer, hidden_size=16, layers=1, heads=2, seed=0).state_dict()
    other = build_network(tokenizer, hidden_size=16, layers=1, heads=2, seed=1).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["model.embed_tokens.weight"], other["model.embed_tokens.weight"])


def test_the_settings_give_the_shape(tokenizer: PreTrainedTokenizerFast) -> None:
    config = build_network(tokenizer, hidden_size=32, layers=3, heads=4, seed=0).config
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (32, 3, 4)
    assert (config.vocab_size, config.max_position_embeddings) == (1024, tokenizer.model_max_length)


def test_heads_that_cannot_share_the_hidden_size_are_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(InputError, match="hidden_size=20 must be a multiple of 2 \\* heads=8"):
        build_network(tokenizer, hidden_size=20, layers=1, heads=4, seed=0)


def test_the_saved_folder_loads_as_any_hugging_face_folder(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    network = build_network(tokenizer, hidden_size=16, layers=1, heads=2, seed=0).eval()
    network.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    loaded_tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    text = "Explain rain to a child in one sentence.\n"
    assert loaded_tokenizer(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert (loaded_tokenizer.pad_token_id, loaded_tokenizer.eos_token_id) == (0, 1)
    tokens = loaded_tokenizer(text, return_tensors="pt")
    with torch.no_grad():
        torch.testing.assert_close(loaded(**tokens).logits, network(**tokens).logits)
    for config in (loaded.config, loaded.generation_config):
        assert (config.pad_token_id, config.eos_token_id, config.bos_token_id) == (0, 1, 2)
    assert (loaded.generation_config.do_sample, loaded.generation_config.top_k) == (True, 0)
