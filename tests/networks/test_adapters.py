"""Adapter folders: what `peft` reads, what this package takes over from one, and what it refuses."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rlhf_lightning.errors import InputError
from rlhf_lightning.networks import LoRA, NetworkConfig, load_policy, load_reward_model, load_tokenizer, save_pretrained
from rlhf_lightning.networks.adapters import read_adapter, same_network
from rlhf_lightning.networks.lora import adapter_weights, has_adapter
from rlhf_lightning.networks.scalar_head import scalar_head

TOKENS = torch.tensor([[5, 9, 7, 30, 2], [8, 4, 11, 12, 13]])


def moved(network: Any) -> Any:
    generator = torch.Generator().manual_seed(1)
    for weight in adapter_weights(network).values():
        weight.data += 0.1 * torch.randn(weight.shape, generator=generator)
    return network


@pytest.fixture
def adapted(tiny_model: Path, tmp_path: Path) -> tuple[Any, Path]:
    """A policy with an adapter that adds something, and its adapter folder."""
    network = moved(load_policy(NetworkConfig(str(tiny_model), lora=LoRA(r=4))))
    save_pretrained(network, load_tokenizer(tiny_model), tmp_path / "adapter", export="adapter")
    return network, tmp_path / "adapter"


@pytest.fixture
def scoring(tiny_model: Path, tmp_path: Path) -> tuple[Any, Path]:
    """The same of a reward model."""
    network = moved(load_reward_model(NetworkConfig(str(tiny_model), lora=LoRA(r=4))))
    save_pretrained(network, load_tokenizer(tiny_model), tmp_path / "scoring", export="adapter")
    return network, tmp_path / "scoring"


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # peft asks transformers for it
def test_peft_alone_reads_the_folder_of_a_policy(adapted: tuple[Any, Path], tiny_model: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    network, folder = adapted
    read = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), folder)
    torch.testing.assert_close(read(TOKENS).logits, network(TOKENS).logits)
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == str(tiny_model)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # peft asks transformers for it
def test_peft_alone_reads_the_folder_of_a_reward_model_with_its_head(
    scoring: tuple[Any, Path], tiny_model: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    network, folder = scoring
    base = AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=1)
    base.config.pad_token_id = 0
    torch.testing.assert_close(PeftModel.from_pretrained(base, folder)(TOKENS).logits, network(TOKENS).logits)


def test_the_folder_holds_the_adapter_and_no_backbone(scoring: tuple[Any, Path]) -> None:
    network, folder = scoring
    stored = load_file(folder / "adapter_model.safetensors")
    trained = [*adapter_weights(network).values(), scalar_head(network).weight]
    assert sum(x.numel() for x in stored.values()) == sum(x.numel() for x in trained)
    assert not (folder / "model.safetensors").exists()


def test_training_goes_on_with_the_adapter_of_a_folder(adapted: tuple[Any, Path]) -> None:
    network, folder = adapted
    loaded = load_policy(NetworkConfig(str(folder), lora=LoRA(r=4)))
    assert torch.equal(loaded(TOKENS).logits, network(TOKENS).logits)
    assert {name for name, p in loaded.named_parameters() if p.requires_grad} == adapter_weights(network).keys()


def test_without_lora_the_adapter_of_a_folder_is_merged_and_all_is_trained(adapted: tuple[Any, Path]) -> None:
    network, folder = adapted
    loaded = load_policy(str(folder))
    assert not has_adapter(loaded)
    assert all(p.requires_grad for p in loaded.parameters())
    torch.testing.assert_close(loaded(TOKENS).logits, network(TOKENS).logits)


def test_a_trained_reward_model_is_read_from_its_adapter_with_its_head(scoring: tuple[Any, Path]) -> None:
    network, folder = scoring
    for lora in (None, LoRA(r=4)):
        loaded = load_reward_model(NetworkConfig(str(folder), lora=lora), trained=True)
        torch.testing.assert_close(loaded(TOKENS).logits, network(TOKENS).logits)
        assert scalar_head(loaded).weight.requires_grad


def test_a_reward_model_starts_from_the_adapter_of_a_policy_with_a_new_head(adapted: tuple[Any, Path]) -> None:
    network, folder = adapted
    loaded = load_reward_model(NetworkConfig(str(folder), lora=LoRA(r=4)))
    assert all(torch.equal(p, adapter_weights(network)[name]) for name, p in adapter_weights(loaded).items())
    with pytest.raises(InputError, match="is no reward model"):
        load_reward_model(NetworkConfig(str(folder), lora=LoRA(r=4)), trained=True)


@pytest.mark.parametrize(
    ("lora", "said"),
    [
        (LoRA(r=8), r"network\.lora\.r=8.* has 4"),
        (LoRA(r=4, alpha=1.0), r"network\.lora\.alpha=1\.0.* has 32\.0"),
        (LoRA(r=4, targets=["q_proj"]), r"network\.lora\.targets=\['q_proj'\].* has \['down_proj'"),
        (LoRA(r=4, rslora=True), r"network\.lora\.rslora=True.* has False"),
    ],
)
def test_settings_of_another_adapter_than_the_folders_are_refused(
    lora: LoRA, said: str, adapted: tuple[Any, Path]
) -> None:
    with pytest.raises(InputError, match=said):
        load_policy(NetworkConfig(str(adapted[1]), lora=lora))


def test_an_adapter_of_another_kind_is_refused(adapted: tuple[Any, Path]) -> None:
    file = adapted[1] / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"use_dora": True}))
    with pytest.raises(InputError, match="another kind than plain LoRA"):
        load_policy(str(adapted[1]))


def test_weights_in_another_file_than_safetensors_are_not_opened(adapted: tuple[Any, Path]) -> None:
    (adapted[1] / "adapter_model.safetensors").rename(adapted[1] / "adapter_model.bin")
    with pytest.raises(InputError, match=r"has no adapter_model\.safetensors"):
        load_policy(str(adapted[1]))


def test_an_adapter_that_lacks_a_weight_is_refused(adapted: tuple[Any, Path]) -> None:
    from safetensors.torch import save_file

    file = adapted[1] / "adapter_model.safetensors"
    save_file(dict(list(load_file(file).items())[1:]), file)
    with pytest.raises(InputError, match="does not fit LlamaForCausalLM: missing"):
        load_policy(NetworkConfig(str(adapted[1]), lora=LoRA(r=4)))


def test_the_stop_tokens_travel_with_the_adapter(tiny_model: Path, tmp_path: Path) -> None:
    network = load_policy(NetworkConfig(str(tiny_model), lora=LoRA(r=4)))
    network.generation_config.eos_token_id = [1, 7]
    save_pretrained(network, load_tokenizer(tiny_model), tmp_path / "adapter", export="adapter")
    assert load_policy(str(tmp_path / "adapter")).generation_config.eos_token_id == [1, 7]


def test_a_token_that_is_new_to_the_vocabulary_is_refused_beside_an_adapter(bare_folder: Path) -> None:
    with pytest.raises(InputError, match=r"network\.pad_token='\[PAD\]'.*neither train nor save"):
        load_policy(NetworkConfig(str(bare_folder), pad_token="[PAD]", lora=LoRA(r=4)))


def test_a_folder_without_an_adapter_has_none(tiny_model: Path) -> None:
    assert read_adapter(str(tiny_model)) is None
    assert read_adapter("nobody/nothing") is None


def test_networks_are_the_same_by_place_or_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path)
    assert same_network("one", str(tmp_path / "one"))
    assert not same_network("one", "other")
    assert same_network("gpt2", "gpt2")
    assert not same_network("gpt2", "one")


def test_a_policy_of_another_architecture_keeps_its_layout(
    policy: Callable[..., Any], tokenizer: Any, tmp_path: Path
) -> None:
    save_pretrained(policy("gpt2"), tokenizer, tmp_path / "gpt2")
    network = moved(load_policy(NetworkConfig(str(tmp_path / "gpt2"), lora=LoRA(r=4))))
    for export in ("merged", "adapter"):
        save_pretrained(network, tokenizer, tmp_path / export, export=export)
        loaded = load_policy(str(tmp_path / export))
        torch.testing.assert_close(loaded(TOKENS).logits, network(TOKENS).logits, rtol=1e-4, atol=1e-4)


def test_an_adapter_of_rank_1_is_not_taken_for_a_head(tiny_model: Path, tmp_path: Path) -> None:
    network = moved(load_reward_model(NetworkConfig(str(tiny_model), lora=LoRA(r=1))))
    save_pretrained(network, load_tokenizer(tiny_model), tmp_path / "adapter", export="adapter")
    loaded = load_reward_model(NetworkConfig(str(tmp_path / "adapter"), lora=LoRA(r=1)), trained=True)
    assert torch.equal(loaded(TOKENS).logits, network(TOKENS).logits)


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "adapter_config.json"])
def test_a_broken_file_of_an_adapter_is_named(file: str, adapted: tuple[Any, Path]) -> None:
    _, folder = adapted
    (folder / file).write_bytes((folder / file).read_bytes()[:-100])
    with pytest.raises(InputError, match=file):
        load_policy(folder)
