"""Several roles on one backbone: networks of their own that hold the same frozen weights."""

from copy import deepcopy
from typing import Any, Literal, TypeVar

import torch
from torch import nn

from rlhf_lightning.errors import InputError
from rlhf_lightning.networks.adapters import Adapter, attach
from rlhf_lightning.networks.lora import adapter_weights, adds_nothing, has_adapter, remove_adapter
from rlhf_lightning.networks.quantizing import plain_config, quantized_layers
from rlhf_lightning.networks.scalar_head import keep_fine, scalar_head

Network = TypeVar("Network", bound=nn.Module)

Roles = Literal["separate", "shared"]
"""Whether policy, reference, critic and reward model are separate networks, or adapters on one backbone."""


def on_the_same_backbone(network: Network) -> Network:
    """Return a copy of the network with an adapter and a scalar head of its own; all other weights are the same ones.

    The copy is modules alone: it costs no memory of the backbone's size, quantised or not, and it needs no switch, so
    that roles can be read in any order, also inside of one backward.
    """
    own = {id(weight) for weight in adapter_weights(network).values()}
    own |= {
        id(w) for m in network.modules() if isinstance(m, nn.Linear) and m.out_features == 1 for w in m.parameters()
    }
    held = [x for x in (*network.parameters(), *network.buffers()) if id(x) not in own]
    for layer in quantized_layers(network):
        # What belongs to quantised weights and is no parameter: the scales, and in int8 the weights once more.
        held += [x for x in (*vars(layer).values(), *vars(vars(layer).get("state", layer)).values()) if _is_scale(x)]
    return deepcopy(network, {id(x): x for x in held})


def reference_of(policy: Network) -> Network:
    """Return the policy as it is now, on its backbone; an adapter that adds nothing is left off."""
    reference = on_the_same_backbone(policy)
    if adds_nothing(reference):
        remove_adapter(reference)
    return reference


def frozen(network: Network) -> Network:
    """Return the network, none of whose weights is trained any more."""
    return network.requires_grad_(False)


def have_one_backbone(one: Any, other: Any) -> bool:
    """Return whether two networks hold the same weights."""
    return one.get_input_embeddings().weight is other.get_input_embeddings().weight


def reward_model_on(policy: Any, adapter: Adapter) -> Any:
    """Return the reward model that was trained as this adapter, on the policy's backbone, frozen.

    Raises `InputError` where the adapter has no scalar head.
    """
    from transformers import AutoModelForSequenceClassification

    body = on_the_same_backbone(policy.base_model)
    if has_adapter(body):
        remove_adapter(body)
    config = plain_config(policy.config)
    config.num_labels = 1
    with torch.device("meta"):
        reward_model = AutoModelForSequenceClassification.from_config(config, dtype=policy.dtype)
    setattr(reward_model, reward_model.base_model_prefix, body)
    head = scalar_head(reward_model)
    head.to_empty(device=policy.device)
    # Before the adapter is read: its head has all of its bits.
    keep_fine(head)
    elsewhere = [name for name, weight in reward_model.named_parameters() if weight.is_meta]
    if elsewhere:
        raise InputError(f"network.roles=shared: {type(reward_model).__name__} has more than a head: {elsewhere}")
    if not attach(reward_model, adapter):
        raise InputError(
            f"{adapter.folder!r} is no reward model: its adapter has no scalar head; train one with RewardModule "
            "(`rlhf train module=reward`)"
        )
    return reward_model.requires_grad_(False)


def _is_scale(value: object) -> bool:
    return isinstance(value, torch.Tensor) or type(value).__name__ == "QuantState"
