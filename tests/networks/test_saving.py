from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, GenerationConfig

from rlhf_lightning.errors import InputError
from rlhf_lightning.networks import NetworkConfig, load_policy, load_tokenizer, save_pretrained

TOKENS = torch.tensor([[5, 9, 7, 30, 2], [8, 4, 0, 0, 0]])
KINDS = ["llama", "gpt2"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_policy_is_loaded_by_transformers_alone_with_equal_logits(
    kind: str, tmp_path: Path, policy: Callable[..., Any], tokenizer: Any
) -> None:
    network = policy(kind)
    save_pretrained(network, tokenizer, tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(TOKENS).logits, network(TOKENS).logits)
    assert AutoTokenizer.from_pretrained(tmp_path).get_vocab() == tokenizer.get_vocab()
    assert (tmp_path / "model.safetensors").is_file()


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_reward_model_is_loaded_by_transformers_alone_with_equal_scores(
    kind: str, tmp_path: Path, classifier: Callable[..., Any], tokenizer: Any
) -> None:
    network = classifier(kind)
    save_pretrained(network, tokenizer, tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(TOKENS).logits, network(TOKENS).logits)


def test_the_padding_token_is_that_of_the_tokenizer(
    tmp_path: Path, policy: Callable[..., Any], classifier: Callable[..., Any], tokenizer: Any
) -> None:
    save_pretrained(policy(pad_token_id=None), tokenizer, tmp_path / "policy")
    assert GenerationConfig.from_pretrained(tmp_path / "policy").pad_token_id == 0
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "policy").config.pad_token_id == 0
    save_pretrained(classifier(pad_token_id=None), tokenizer, tmp_path / "reward")
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward").config.pad_token_id == 0


def test_a_network_with_added_tokens_is_saved_whole_and_stops_at_its_end_token(
    bare_folder: Path, tmp_path: Path
) -> None:
    network = NetworkConfig(str(bare_folder), pad_token="[PAD]", eos_token="[END]")
    policy, tokenizer = load_policy(network), load_tokenizer(network)
    save_pretrained(policy, tokenizer, tmp_path / "saved")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    torch.testing.assert_close(loaded(TOKENS).logits, policy(TOKENS).logits)
    saved_tokenizer = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert (saved_tokenizer.pad_token, saved_tokenizer.eos_token) == ("[PAD]", "[END]")
    eos = GenerationConfig.from_pretrained(tmp_path / "saved").eos_token_id
    assert tokenizer.eos_token_id in (eos if isinstance(eos, list) else [eos])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_not_written(
    value: float, tmp_path: Path, policy: Callable[..., Any], tokenizer: Any
) -> None:
    network = policy()
    with torch.no_grad():
        network.model.norm.weight[0] = value
    with pytest.raises(InputError, match=r"its weight model\.norm\.weight is not finite"):
        save_pretrained(network, tokenizer, tmp_path / "model")
    assert not (tmp_path / "model").exists()
