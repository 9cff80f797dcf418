"""Whether one linear layer is all that follows a network's body: then it can be computed where it is read alone."""

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel

from rlhf_lightning.networks.compiling import uncompiled
from rlhf_lightning.networks.scalar_head import scalar_head, scored_tokens
from rlhf_lightning.networks.sharding import is_sharded

_found_plain: "WeakKeyDictionary[nn.Module, dict[bool, bool]]" = WeakKeyDictionary()
"""Of each network, whether its output layer is all that follows its body: called without positions, and with them."""

_found_plain_scorer: "WeakKeyDictionary[nn.Module, bool]" = WeakKeyDictionary()
"""The same of each reward model and its scalar head."""


def plain_head(network: nn.Module, *, takes_positions: bool = True) -> nn.Linear | None:
    """Return the output layer where logits are that linear layer of the last hidden states, and it is whole and plain.

    None where the network scales or caps its logits or changes what its body reads, where the layer is quantised or has
    an adapter, where somebody's hooks wait for the call of either, and where weights lie in parts on several processes.
    """
    if not _has_whole_body(network):
        return None
    model: Any = network
    head: Any = model.get_output_embeddings()
    if not _is_whole_and_linear(head) or is_watched(head):
        return None
    found = _found_plain.setdefault(network, {})
    if takes_positions not in found:
        token = torch.zeros(1, 2, dtype=torch.long, device=head.weight.device)
        inputs = {"input_ids": token, "attention_mask": token + 1}
        if takes_positions:
            inputs["position_ids"] = torch.arange(2, device=token.device).unsqueeze(0)
        # Large, so that what caps or scales them shows.
        made = torch.linspace(-100, 100, 2 * head.out_features, device=token.device).view(1, 2, -1)
        found[takes_positions] = _is_all(network, head, inputs, made=made, logits=made, use_cache=False)
    return head if found[takes_positions] else None


def plain_scalar_head(reward_model: nn.Module) -> nn.Linear | None:
    """Return the scalar head where a score is that linear layer of the last hidden state at `scored_tokens`.

    None in the cases of `plain_head`, and where the score is read elsewhere or of more than one state, as in BERT.
    """
    if not _has_whole_body(reward_model):
        return None
    head = scalar_head(reward_model)
    model: Any = reward_model
    padding: int | None = model.config.get_text_config().pad_token_id
    if padding is None or not _is_whole_and_linear(head):
        return None
    if reward_model not in _found_plain_scorer:
        token = int(padding == 0)
        # Padding behind, and its id among the tokens that count, before the last other one and after it.
        tokens = torch.tensor([[padding, token, padding], [token, padding, padding]], device=head.weight.device)
        attention_mask = torch.ones_like(tokens)
        attention_mask[:, -1] = 0
        made = torch.linspace(-100, 100, tokens.numel(), device=tokens.device).view(*tokens.shape, 1)
        ends = scored_tokens(reward_model, tokens, attention_mask.bool())
        logits = made[torch.arange(len(tokens), device=tokens.device), ends]
        inputs = {"input_ids": tokens, "attention_mask": attention_mask}
        _found_plain_scorer[reward_model] = _is_all(reward_model, head, inputs, made=made, logits=logits)
    return head if _found_plain_scorer[reward_model] else None


def _has_whole_body(network: nn.Module) -> bool:
    """Return whether the network is one of the library's around a body, called by nobody but the caller, and whole."""
    from transformers import PreTrainedModel

    if not isinstance(network, PreTrainedModel) or network.base_model is network or is_sharded(network):
        return False
    return not is_watched(network) and not _is_wrapped(network)


def _is_whole_and_linear(head: Any) -> bool:
    # Of no subclass: quantised layers, adapters and FSDP2 make such.
    return type(head) is nn.Linear and head.weight.shape == (head.out_features, head.in_features)


def is_watched(part: nn.Module) -> bool:
    """Return whether more happens at a call than the class says."""
    return bool("forward" in vars(part) or part._forward_hooks or part._forward_pre_hooks)


def _is_wrapped(network: nn.Module) -> bool:
    return any(isinstance(part, FullyShardedDataParallel) for part in network.modules())


@torch.no_grad()
def _is_all(
    network: Any, head: nn.Linear, inputs: dict[str, Tensor], *, made: Tensor, logits: Tensor, **told: Any
) -> bool:
    """Return whether body and layer are given what the network and the body make, and no more is made of the layer's.

    Where the layer ``made`` numbers, the network must return those in ``logits``; it is ``told`` more than its body.
    """
    seen: dict[str, Any] = {}

    def of_body(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        seen["given"] = [id(x) for x in (*args, *kwargs.values())]
        seen["states"] = output.last_hidden_state

    def of_head(_: nn.Module, read: tuple[Tensor], __: Tensor) -> Tensor:
        seen["read"] = read[0]
        return made

    hooks = [
        network.base_model.register_forward_hook(of_body, with_kwargs=True),
        head.register_forward_hook(of_head),
    ]
    try:
        # Dropout may be on: nothing is to be drawn from the noise of the training.
        with torch.random.fork_rng(devices=[made.device] if made.is_cuda else []), uncompiled():
            found = network(**inputs, **told).logits
    finally:
        for hook in hooks:
            hook.remove()
    # A network may call parts of its body in its place (OPT).
    if not {"given", "read"} <= seen.keys():
        return False
    is_given = all(id(x) in seen["given"] for x in inputs.values())
    # A head that is kept fine reads states of 16 bits in 32.
    states = seen["states"].to(seen["read"].dtype)
    return is_given and torch.equal(found, logits) and torch.equal(seen["read"], states)
