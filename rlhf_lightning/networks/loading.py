"""From a Hugging Face folder or hub name, or a network that the user holds, to policy, reward model and tokenizer."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

import torch
from torch import nn

from rlhf_lightning.errors import InputError
from rlhf_lightning.networks.adapters import Adapter, attach, check_same_shape, read_adapter, same_network
from rlhf_lightning.networks.checkpointing import checkpoint_blocks
from rlhf_lightning.networks.compiling import compile_blocks
from rlhf_lightning.networks.configs import setting_of
from rlhf_lightning.networks.lora import LoRA, add_adapter, merge_adapter
from rlhf_lightning.networks.quantizing import (
    Quantization,
    check_blocks,
    compute_alike_in_both_modes,
    is_quantized,
    quantization_settings,
)
from rlhf_lightning.networks.roles import Roles, reward_model_on
from rlhf_lightning.networks.scalar_head import HeadInit, init_scalar_head, keep_fine, scalar_head

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)

REASON = 300
"""Characters of a library's own words that are passed on."""


DType = Literal["float32", "bfloat16", "float16"]
"""Types that weights are trained in."""


@dataclass(frozen=True)
class NetworkConfig:
    """Which pre-trained network to load, and how."""

    pretrained: str
    """Hugging Face folder or hub name."""
    dtype: DType = "float32"
    """Type of the weights in memory; mixed precision is the Trainer's matter."""
    attn_implementation: str | None = None
    """"sdpa", "eager", "flash_attention_2" ...; the library chooses where it is not given."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    pad_token: str | None = None
    """Padding token of a tokenizer that has none; added to the vocabulary if it is not in it."""
    eos_token: str | None = None
    """End token of a tokenizer that has none, or another one than its own."""
    lora: LoRA | None = None
    """Train an adapter and freeze all else; None trains everything. A mapping of its settings will do."""
    quantization: Quantization = "none"
    """Bits of the frozen linear layers: "none", "int8" or "nf4"; trained with ``lora`` only."""
    gradient_checkpointing: bool = False
    """Make activations again in the backward instead of keeping them: less memory, a third more work."""
    compile: bool = False
    """Run the blocks compiled (`torch.compile`) where whole sequences are read; the first batch waits for that."""
    roles: Roles = "separate"
    """In PPO: four "separate" networks, or adapters on one "shared" backbone, which needs ``lora``."""

    def __post_init__(self) -> None:
        """Check the settings; raises `InputError`."""
        lora: object = self.lora
        if isinstance(lora, Mapping):
            object.__setattr__(self, "lora", LoRA(**lora))
        choices = {"dtype": get_args(DType), "quantization": get_args(Quantization), "roles": get_args(Roles)}
        for name, allowed in choices.items():
            if (value := vars(self)[name]) not in allowed:
                raise InputError(f"network.{name}={value!r} must be one of {', '.join(allowed)}")
        if self.roles == "shared" and self.lora is None:
            raise InputError(
                "network.roles=shared needs network.lora (network=lora): without adapters all roles would be one"
            )


Model = str | Path | NetworkConfig | nn.Module
"""A folder or hub name, the same with settings, or a network that the user already holds."""


def load_policy(model: Model) -> "PreTrainedModel":
    """Return the causal language model, its embeddings grown to the tokenizer where a token was added.

    With ``lora`` it has an adapter, and all else is frozen: a new one, or that of an adapter folder. Without, the
    adapter of such a folder is merged into its base. Raises `InputError` where the folder or name holds no causal
    language model, or is broken.
    """
    from transformers import AutoModelForCausalLM

    if isinstance(model, nn.Module):
        return cast("PreTrainedModel", model)
    network, adapter = _with_base(network_config(model))
    policy, loading = _from_pretrained(AutoModelForCausalLM, network, output_loading_info=True)
    if loading["missing_keys"]:
        raise InputError(
            f"network.pretrained={network.pretrained!r} cannot be loaded as AutoModelForCausalLM: its weights "
            f"{sorted(loading['missing_keys'])} are missing, as in a reward model or an encoder"
        )
    if any(name.endswith("ForSequenceClassification") for name in policy.config.architectures or ()):
        # With tied embeddings no weight is missing.
        raise InputError(
            f"network.pretrained={network.pretrained!r} is a reward model ({policy.config.architectures[0]}), not a "
            "language model: its states were trained to be scored"
        )
    _check_causal(policy, network)
    _fit_vocabulary(policy, load_tokenizer(model), network)
    _adapt(policy, network, adapter)
    _prepare(policy, network)
    if adapter is not None:
        _take_over_generation_config(policy, adapter)
    return cast("PreTrainedModel", policy)


def load_reward_model(
    model: Model,
    *,
    generator: torch.Generator | None = None,
    head_init: HeadInit = "unit",
    trained: bool = False,
    backbone: nn.Module | None = None,
) -> "PreTrainedModel":
    """Return a sequence classifier with one label, its scalar head new where ``model`` is a language model.

    A new head is drawn with ``generator`` as `init_scalar_head` says. Adapters are treated as in `load_policy`; a
    reward model that was trained as an adapter on the network ``backbone`` uses its weights and loads none. Raises
    `InputError` where there is no classifier, and where a ``trained`` one is wanted and the folder has no head.
    """
    from transformers import AutoModelForSequenceClassification

    if isinstance(model, nn.Module):
        return _as_reward_model(model, generator, head_init)
    network, adapter = _with_base(network_config(model))
    tokenizer = load_tokenizer(model)
    if backbone is not None and _is_on(adapter, network_config(model), backbone):
        assert adapter is not None
        reward_model = reward_model_on(backbone, adapter)
        reward_model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
        return cast("PreTrainedModel", reward_model)
    reward_model, loading = _from_pretrained(
        AutoModelForSequenceClassification, network, num_labels=1, output_loading_info=True
    )
    _fit_vocabulary(reward_model, tokenizer, network)
    reward_model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    head = scalar_head(reward_model)
    keep_fine(head)
    head_is_there = _adapt(reward_model, network, adapter) or not loading["missing_keys"]
    if not head_is_there and trained:
        raise InputError(
            f"{network.pretrained!r} is no reward model: its weights {sorted(loading['missing_keys'])} are missing, as "
            "in a language model; train one with RewardModule (`rlhf train module=reward`)"
        )
    if not head_is_there:
        init_scalar_head(head, generator, head_init=head_init)
    head.requires_grad_(True)
    _prepare(reward_model, network)
    return cast("PreTrainedModel", reward_model)


def _prepare(model: nn.Module, network: NetworkConfig) -> None:
    """Let the blocks work as the settings say."""
    if network.compile:
        compile_blocks(model)
    # Around what is compiled.
    if network.gradient_checkpointing:
        checkpoint_blocks(model)


def load_tokenizer(model: str | Path | NetworkConfig) -> "PreTrainedTokenizerBase":
    """Return the tokenizer of the folder or hub name with the pad and end token of the settings."""
    from transformers import AutoTokenizer

    network = network_config(model)
    try:
        tokenizer = AutoTokenizer.from_pretrained(network.pretrained, revision=network.revision)
    except Exception as error:
        raise _not_loadable(network, "tokenizer", error) from error
    tokens = {"pad_token": network.pad_token, "eos_token": network.eos_token}
    tokenizer.add_special_tokens({name: token for name, token in tokens.items() if token is not None})
    return cast("PreTrainedTokenizerBase", tokenizer)


def network_config(model: str | Path | NetworkConfig) -> NetworkConfig:
    """Return ``model`` as settings."""
    return model if isinstance(model, NetworkConfig) else NetworkConfig(str(model))


def max_positions(model: nn.Module) -> int | None:
    """Return the longest sequence that the network's positions allow, None where they have no end."""
    config: Any = model.config
    # Only architectures with a table or a trained range of positions have it.
    positions: int | None = setting_of(config.get_text_config(), "max_position_embeddings")
    if positions is None:
        return None
    tables = [part for name, part in model.named_modules() if name.endswith("position_embeddings")]
    paddings = [t.padding_idx for t in tables if isinstance(t, nn.Embedding) and t.padding_idx is not None]
    # RoBERTa and its kin have rows up to that of padding which stand for no position.
    return positions - max((padding + 1 for padding in paddings), default=0)


def stop_token_ids(policy: nn.Module, tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Return the ids that end a response: the tokenizer's end token and those of the generation config."""
    generation_config: Any = policy.generation_config
    configured = generation_config.eos_token_id
    ids = configured if isinstance(configured, list) else [configured]
    return sorted({int(i) for i in [tokenizer.eos_token_id, *ids] if i is not None})


def _with_base(network: NetworkConfig) -> tuple[NetworkConfig, Adapter | None]:
    """Return what is to be loaded, and the adapter to be put into it where the settings name an adapter."""
    adapter = read_adapter(network.pretrained, network.revision)
    if adapter is None:
        return network, None
    return replace(network, pretrained=adapter.base, revision=adapter.config.revision), adapter


def _adapt(model: "PreTrainedModel", network: NetworkConfig, adapter: Adapter | None) -> bool:
    """Add the adapter, or merge it where none is trained; return whether it brought a scalar head."""
    check_blocks(model)
    compute_alike_in_both_modes(model)
    if adapter is None:
        if network.lora is not None:
            add_adapter(model, network.lora)
        return False
    if network.lora is not None:
        check_same_shape(model, adapter, network.lora)
    has_head = attach(model, adapter, dropout=0.0 if network.lora is None else network.lora.dropout)
    if network.lora is None and not is_quantized(model):
        merge_adapter(model)
        model.requires_grad_(True)
    return has_head


def _is_on(adapter: Adapter | None, network: NetworkConfig, backbone: nn.Module) -> bool:
    """Return whether this reward model can use the weights of ``backbone``; say so where it cannot."""
    body: Any = backbone
    if adapter is not None and same_network(adapter.base, body.name_or_path):
        return True
    base = "no adapter" if adapter is None else f"an adapter on {adapter.base!r}"
    log.warning(
        "network.roles=shared: the reward model %r is %s, the policy stands on %r: it gets a backbone of its own",
        network.pretrained,
        base,
        body.name_or_path,
    )
    return False


def _take_over_generation_config(policy: Any, adapter: Adapter) -> None:
    from transformers import GenerationConfig

    if (Path(adapter.folder) / "generation_config.json").is_file():
        policy.generation_config = GenerationConfig.from_pretrained(adapter.folder)


def _from_pretrained(auto_class: Any, network: NetworkConfig, **settings: Any) -> Any:
    dtype = getattr(torch, network.dtype)
    settings |= quantization_settings(network.quantization, dtype)
    if network.attn_implementation is not None:
        settings["attn_implementation"] = network.attn_implementation
    try:
        # The checkpoint's own dtype is never taken over: bfloat16 weights would train in bfloat16 without a word.
        return auto_class.from_pretrained(network.pretrained, dtype=dtype, revision=network.revision, **settings)
    # A broken file raises whatever comes first; only the user can mend it.
    except Exception as error:
        raise _not_loadable(network, auto_class.__name__, error) from error


def _not_loadable(network: NetworkConfig, what: str, error: Exception) -> InputError:
    why = "it is neither a Hugging Face folder nor a hub name that can be reached"
    if Path(network.pretrained).is_dir():
        why = "the folder is broken, not whole, or of another kind"
    reason = " ".join(str(error).split())
    if "ignore_mismatched_sizes" in reason:
        reason = "its weights have other sizes than its config.json says"
    return InputError(
        f"network.pretrained={network.pretrained!r} cannot be loaded as {what}: {why} "
        f"({type(error).__name__}: {reason[:REASON]}{'...' if len(reason) > REASON else ''})"
    )


def _check_causal(policy: Any, network: NetworkConfig) -> None:
    """Raise `InputError` where a token is predicted from those behind it: fine-tuning would learn to copy."""
    # A config says this in families that have encoders; some of them have only decoders.
    if vars(policy.config).get("is_decoder") is not False:
        return
    with torch.no_grad():
        one, other = policy(input_ids=torch.tensor([[2, 2], [2, 3]], device=policy.device)).logits[:, 0].float()
    if not torch.allclose(one, other, atol=1e-3):
        raise InputError(
            f"network.pretrained={network.pretrained!r} is an encoder ({type(policy).__name__} with is_decoder=false "
            "in its config.json), which reads the tokens that it is to predict: take a decoder, such as GPT-2 or "
            "Llama; an encoder can be a reward model (module=reward)"
        )


def _fit_vocabulary(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", network: NetworkConfig) -> None:
    embeddings: Any = model.get_input_embeddings()
    if len(tokenizer) > embeddings.num_embeddings:
        if network.lora is not None or network.quantization != "none":
            raise InputError(
                f"network.pad_token={network.pad_token!r}, network.eos_token={network.eos_token!r}: a token that is "
                "new to the vocabulary has an embedding that network.lora would neither train nor save; name one that "
                "the tokenizer has"
            )
        model.resize_token_embeddings(len(tokenizer))


def _as_reward_model(model: nn.Module, generator: torch.Generator | None, head_init: HeadInit) -> "PreTrainedModel":
    """Return the network itself if it is a classifier with one label, else a classifier on a copy of its body."""
    from transformers import AutoModelForSequenceClassification
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES

    language_model: Any = model
    if type(model).__name__ in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES.values():
        scalar_head(model)
        return cast("PreTrainedModel", model)
    config = type(language_model.config)(**{**language_model.config.to_dict(), "num_labels": 1})
    reward_model = AutoModelForSequenceClassification.from_config(config, dtype=language_model.dtype)
    reward_model.base_model.load_state_dict(language_model.base_model.state_dict())
    reward_model.eval()
    init_scalar_head(scalar_head(reward_model), generator, head_init=head_init)
    return cast("PreTrainedModel", reward_model)
