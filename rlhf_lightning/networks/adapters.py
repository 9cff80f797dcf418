"""Adapter folders, as `peft` writes and reads them: a base by name, and what was trained beside it."""

from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rlhf_lightning.errors import InputError
from rlhf_lightning.networks.lora import ADAPTER, LoRA, adapter_weights, inject, target_layers
from rlhf_lightning.networks.scalar_head import scalar_head

if TYPE_CHECKING:
    from peft import LoraConfig

PREFIX = "base_model.model."
"""What `peft` writes before each name."""

WEIGHTS = "adapter_model.safetensors"


@dataclass(frozen=True)
class Adapter:
    """What an adapter folder holds."""

    folder: str
    config: "LoraConfig"
    weights: dict[str, Tensor]
    """By their names in the folder."""

    @property
    def base(self) -> str:
        """Folder or hub name of the network that the adapter was trained in."""
        return str(self.config.base_model_name_or_path)


def read_adapter(pretrained: str, revision: str | None = None) -> Adapter | None:
    """Return the adapter in a folder or under a hub name, None where no adapter is there.

    Raises `InputError` where it is no plain LoRA adapter in a safetensors file.
    """
    from transformers.utils.hub import cached_file
    from transformers.utils.peft_utils import find_adapter_config_file

    try:
        found = find_adapter_config_file(pretrained, revision=revision)
    except (OSError, ValueError):
        return None
    if found is None:
        return None
    from peft import PeftConfig
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        config: Any = PeftConfig.from_pretrained(pretrained, revision=revision)
    except (TypeError, ValueError) as error:
        raise InputError(f"{pretrained!r} has a broken adapter_config.json ({error})") from error
    if str(config.peft_type.value) != "LORA" or config.use_dora or config.bias != "none":
        raise InputError(f"{pretrained!r} holds an adapter of another kind than plain LoRA (no DoRA, no biases)")
    try:
        file = str(cached_file(pretrained, WEIGHTS, revision=revision))
    except OSError as error:
        raise InputError(f"{pretrained!r} has no {WEIGHTS}; other files of weights are not opened") from error
    try:
        return Adapter(pretrained, config, load_file(file))
    except SafetensorError as error:
        raise InputError(f"{file} is broken, or was not copied whole ({error})") from error


def check_same_shape(network: nn.Module, adapter: Adapter, lora: LoRA) -> None:
    """Raise `InputError` where the settings ask for another adapter than the folder holds."""
    config = adapter.config
    there = {
        "r": config.r,
        "alpha": float(config.lora_alpha),
        "targets": sorted(config.target_modules or []),
        "rslora": config.use_rslora,
    }
    asked = {
        "r": lora.r,
        "alpha": float(lora.alpha),
        "targets": target_layers(network, lora.targets),
        "rslora": lora.rslora,
    }
    for name, value in asked.items():
        if there[name] != value:
            raise InputError(
                f"network.lora.{name}={value}: the adapter in {adapter.folder!r}, which training goes on from, has "
                f"{there[name]}; set it to that, or export a merged folder (callbacks.export.export=merged)"
            )


@torch.no_grad()
def attach(network: nn.Module, adapter: Adapter, *, dropout: float = 0.0) -> bool:
    """Put the adapter into the network, all else frozen; return whether its scalar head was there as well.

    Raises `InputError` where the adapter does not fit.
    """
    config: Any = deepcopy(adapter.config)
    config.lora_dropout, config.modules_to_save, config.inference_mode = dropout, None, False
    inject(network, config)
    weights = {_name_in_folder(name): weight for name, weight in adapter_weights(network).items()}
    heads = _heads(network)
    missing = sorted(weights.keys() - adapter.weights.keys())
    unknown = sorted(adapter.weights.keys() - weights.keys() - heads.keys())
    # The head of a reward model is of no use in a language model.
    if missing or (unknown and heads):
        raise InputError(
            f"the adapter in {adapter.folder!r} does not fit {type(network).__name__}: missing {missing[:3]}, unknown "
            f"{unknown[:3]}"
        )
    for name, weight in {**weights, **heads}.items():
        if name in adapter.weights:
            weight.copy_(adapter.weights[name])
    return bool(heads.keys() & adapter.weights.keys())


def save_adapter(network: nn.Module, folder: str | Path) -> None:
    """Write the adapter, and the scalar head of a classifier, as a `peft` folder."""
    from safetensors.torch import save_file

    language_model: Any = network
    heads = _heads(network)
    config: Any = deepcopy(language_model.peft_config[ADAPTER])
    base = str(language_model.name_or_path)
    config.base_model_name_or_path = str(Path(base).resolve()) if Path(base).is_dir() else base
    config.task_type = "SEQ_CLS" if heads else "CAUSAL_LM"
    config.modules_to_save = [name.removeprefix(PREFIX).removesuffix(".weight") for name in heads] or None
    config.inference_mode = True
    weights = {_name_in_folder(name): weight for name, weight in adapter_weights(network).items()} | heads
    Path(folder).mkdir(parents=True, exist_ok=True)
    save_file({name: w.detach().cpu().contiguous() for name, w in weights.items()}, Path(folder) / WEIGHTS)
    config.save_pretrained(folder)


def same_network(one: str, other: str) -> bool:
    """Return whether two folders or hub names are the same."""
    if Path(one).is_dir() and Path(other).is_dir():
        return Path(one).resolve() == Path(other).resolve()
    return one == other


def _heads(network: nn.Module) -> dict[str, nn.Parameter]:
    """Return the weights of the scalar head by their names in the folder; empty where the network is no classifier."""
    if "ForSequenceClassification" not in type(network).__name__:
        return {}
    head = scalar_head(network)
    (path,) = [name for name, layer in network.named_modules() if layer is head]
    return {f"{PREFIX}{path}.{name}": weight for name, weight in head.named_parameters()}


def _name_in_folder(name: str) -> str:
    return PREFIX + name.replace(f".{ADAPTER}.", ".")
