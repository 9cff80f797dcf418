import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertLMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from rlhf_lightning.errors import InputError
from rlhf_lightning.networks import (
    NetworkConfig,
    load_policy,
    load_reward_model,
    load_tokenizer,
    max_positions,
    stop_token_ids,
)

TOKENS = torch.tensor([[5, 9, 7, 30, 2]])


@pytest.fixture
def folder(tmp_path: Path, policy: Callable[..., Any], tokenizer: Any) -> Path:
    policy().save_pretrained(tmp_path / "policy")
    tokenizer.save_pretrained(tmp_path / "policy")
    return tmp_path / "policy"


@pytest.fixture
def reward_folder(tmp_path: Path, classifier: Callable[..., Any], tokenizer: Any) -> Path:
    classifier().save_pretrained(tmp_path / "reward")
    tokenizer.save_pretrained(tmp_path / "reward")
    return tmp_path / "reward"


@pytest.mark.parametrize("load", [load_policy, load_reward_model, load_tokenizer])
def test_a_folder_that_does_not_exist_is_named_with_its_setting(load: Callable[..., Any], tmp_path: Path) -> None:
    missing = tmp_path / "missing"
    with pytest.raises(InputError, match=rf"network\.pretrained='{missing}' cannot be loaded as"):
        load(missing)


@pytest.mark.parametrize("load", [load_policy, load_reward_model, load_tokenizer])
def test_a_folder_without_a_network_is_an_input_error(load: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("nothing")
    with pytest.raises(InputError, match=r"network\.pretrained="):
        load(tmp_path)


def test_a_folder_its_name_and_its_settings_load_the_same(folder: Path) -> None:
    expected = AutoModelForCausalLM.from_pretrained(folder)(TOKENS).logits
    for model in (folder, str(folder), NetworkConfig(str(folder))):
        torch.testing.assert_close(load_policy(model)(TOKENS).logits, expected)


def test_a_network_that_the_user_holds_is_used_itself(policy: Callable[..., Any]) -> None:
    network = policy()
    assert load_policy(network) is network


def test_a_checkpoint_in_bfloat16_is_trained_in_float32_unless_asked_for(
    tmp_path: Path, policy: Callable[..., Any], tokenizer: Any
) -> None:
    policy().bfloat16().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert {p.dtype for p in load_policy(tmp_path).parameters()} == {torch.float32}
    assert {p.dtype for p in load_reward_model(tmp_path).parameters()} == {torch.float32}
    asked = load_policy(NetworkConfig(str(tmp_path), dtype="bfloat16"))
    assert {p.dtype for p in asked.parameters()} == {torch.bfloat16}


def test_the_attention_that_was_asked_for_is_used(folder: Path) -> None:
    network = load_policy(NetworkConfig(str(folder), attn_implementation="eager"))
    assert network.config._attn_implementation == "eager"


def test_a_missing_padding_and_end_token_are_added_and_the_embeddings_grow(bare_folder: Path) -> None:
    network = NetworkConfig(str(bare_folder), pad_token="[PAD]", eos_token="[END]")
    tokenizer = load_tokenizer(network)
    assert sorted([tokenizer.pad_token_id, tokenizer.eos_token_id]) == [258, 259]
    policy = load_policy(network)
    assert policy.get_input_embeddings().num_embeddings == 260
    tokens = torch.tensor([[258, 259, 5]])
    assert policy(tokens).logits.shape == (1, 3, 260)
    reward_model = load_reward_model(network)
    assert reward_model.config.pad_token_id == tokenizer.pad_token_id
    assert reward_model(tokens).logits.shape == (1, 1)


def test_growing_the_embeddings_keeps_the_old_rows(bare_folder: Path) -> None:
    old = AutoModelForCausalLM.from_pretrained(bare_folder).get_input_embeddings().weight
    new = load_policy(NetworkConfig(str(bare_folder), pad_token="[PAD]")).get_input_embeddings().weight
    assert new.shape[0] == old.shape[0] + 1
    assert torch.equal(new[: len(old)], old)


def test_a_token_of_the_vocabulary_is_not_added_again(bare_folder: Path) -> None:
    network = NetworkConfig(str(bare_folder), pad_token="<pad>", eos_token="<eos>")
    assert (load_tokenizer(network).pad_token_id, load_tokenizer(network).eos_token_id) == (0, 1)
    assert load_policy(network).get_input_embeddings().num_embeddings == 258


def test_a_response_ends_with_the_tokenizers_end_token_and_those_of_the_generation_config(
    folder: Path, bare_folder: Path
) -> None:
    policy = load_policy(folder)
    assert stop_token_ids(policy, load_tokenizer(folder)) == [1]
    policy.generation_config.eos_token_id = [7, 1, 5]
    assert stop_token_ids(policy, load_tokenizer(folder)) == [1, 5, 7]
    policy.generation_config.eos_token_id = None
    assert stop_token_ids(policy, load_tokenizer(folder)) == [1]
    other = NetworkConfig(str(bare_folder), eos_token="[END]")
    assert 258 in stop_token_ids(load_policy(other), load_tokenizer(other))


@pytest.mark.parametrize(("kind", "positions"), [("llama", 99), ("gpt2", 64)])
def test_the_number_of_positions_is_found_under_either_name(
    kind: str, positions: int, policy: Callable[..., Any]
) -> None:
    settings = {"max_position_embeddings": 99} if kind == "llama" else {}
    assert max_positions(policy(kind, **settings)) == positions


@pytest.mark.parametrize("padding", [0, 1, 5])
def test_rows_of_a_table_that_stand_for_no_position_are_none(padding: int) -> None:
    config = RobertaConfig(
        vocab_size=30,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        max_position_embeddings=20,
        pad_token_id=padding,
    )
    network = RobertaForSequenceClassification(config).eval()
    longest = max_positions(network)
    assert longest == 19 - padding
    network(input_ids=torch.full((1, longest), 7))
    with pytest.raises((IndexError, RuntimeError)):
        network(input_ids=torch.full((1, longest + 1), 7))


def test_a_language_model_gets_a_new_head_of_the_generator_on_its_own_body(folder: Path) -> None:
    body = AutoModelForCausalLM.from_pretrained(folder).model.state_dict()
    one, same, other = (load_reward_model(folder, generator=torch.Generator().manual_seed(s)) for s in (0, 0, 1))
    assert torch.equal(one.score.weight, same.score.weight)
    assert not torch.equal(one.score.weight, other.score.weight)
    for name, weight in one.model.state_dict().items():
        assert torch.equal(weight, body[name]), name


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_held_language_model_becomes_a_classifier_on_a_copy_of_its_body(
    kind: str, policy: Callable[..., Any]
) -> None:
    network = policy(kind)
    reward_model = load_reward_model(network, generator=torch.Generator().manual_seed(0))
    assert type(reward_model).__name__.endswith("ForSequenceClassification")
    assert not reward_model.training
    for name, weight in network.base_model.state_dict().items():
        own = reward_model.base_model.state_dict()[name]
        assert torch.equal(own, weight), name
        assert own.data_ptr() != weight.data_ptr()


def test_a_reward_model_keeps_its_trained_head(reward_folder: Path) -> None:
    plain = AutoModelForSequenceClassification.from_pretrained(reward_folder)
    for seed in (0, 1):
        loaded = load_reward_model(reward_folder, generator=torch.Generator().manual_seed(seed))
        torch.testing.assert_close(loaded(TOKENS).logits, plain(TOKENS).logits)


def test_a_held_classifier_with_one_label_is_used_itself(classifier: Callable[..., Any]) -> None:
    network = classifier()
    assert load_reward_model(network) is network


def test_a_held_classifier_with_two_labels_is_refused(classifier: Callable[..., Any]) -> None:
    with pytest.raises(InputError, match="one label"):
        load_reward_model(classifier(num_labels=2))


def test_a_folder_with_two_labels_is_refused_as_a_reward_model(
    tmp_path: Path, classifier: Callable[..., Any], tokenizer: Any
) -> None:
    classifier(num_labels=2).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(InputError):
        load_reward_model(tmp_path)


def test_a_reward_model_is_refused_as_a_policy(reward_folder: Path) -> None:
    with pytest.raises(InputError, match="AutoModelForCausalLM"):
        load_policy(reward_folder)


def test_a_reward_model_with_tied_embeddings_is_refused_as_a_policy(
    tmp_path: Path, classifier: Callable[..., Any], tokenizer: Any
) -> None:
    classifier(tie_word_embeddings=True).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="is a reward model"):
        load_policy(tmp_path)


def test_a_tokenizer_is_that_of_the_folder(folder: Path) -> None:
    assert load_tokenizer(folder)("ab").input_ids == AutoTokenizer.from_pretrained(folder)("ab").input_ids


def changed(file: Path, **settings: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text("utf-8")) | settings), encoding="utf-8")


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (lambda folder: (folder / "model.safetensors").unlink(), "no file named model.safetensors"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b""), "header too small"),
        (
            lambda folder: (folder / "model.safetensors").write_bytes(
                (folder / "model.safetensors").read_bytes()[:-100]
            ),
            "not fully covered",
        ),
        (lambda folder: (folder / "config.json").write_text("{not json"), "not a valid JSON file"),
        (lambda folder: (folder / "config.json").write_text("[1]"), "config.json|must be a mapping|list indices"),
        (lambda folder: changed(folder / "config.json", hidden_size=17), "hidden size \\(17\\) is not a multiple"),
        (lambda folder: changed(folder / "config.json", hidden_size=32), "other sizes than its config.json says"),
        (lambda folder: changed(folder / "config.json", hidden_size="big"), "expected int, got str"),
        (lambda folder: changed(folder / "config.json", model_type="none"), "model type `none`"),
        (lambda folder: (folder / "tokenizer.json").write_text("{x"), "Expecting property name"),
    ],
)
def test_what_is_broken_in_a_folder_is_said(fault: Callable[[Path], Any], said: str, folder: Path) -> None:
    fault(folder)
    with pytest.raises(
        InputError, match=rf"network\.pretrained='{folder}' .*: the folder is broken.*({said})"
    ) as error:
        load_policy(folder)
    assert len(str(error.value)) < 700


def test_an_encoder_is_no_policy(folder: Path) -> None:
    settings: dict[str, Any] = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 258,
        "initializer_range": 0.3,
    }
    for is_decoder in (False, True):
        network = BertLMHeadModel(BertConfig(**settings, intermediate_size=32, is_decoder=is_decoder))
        network.save_pretrained(folder)
        if is_decoder:
            load_policy(folder)
            continue
        with pytest.raises(InputError, match=r"is an encoder \(BertLMHeadModel"):
            load_policy(folder)
        load_reward_model(folder)
    # Its config says that it is no decoder, but it is one.
    GPTNeoXForCausalLM(GPTNeoXConfig(**settings, intermediate_size=32)).save_pretrained(folder)
    assert load_policy(folder).config.is_decoder is False


def test_a_type_that_weights_cannot_have_is_refused() -> None:
    wrong: Any = "fp32"
    with pytest.raises(InputError, match=r"network\.dtype='fp32' must be one of float32, bfloat16, float16"):
        NetworkConfig("folder", dtype=wrong)
