"""What a language model says of chosen tokens: its output layer is computed where it is read, and nowhere else."""

from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel

from rlhf_lightning.functional.head_logprobs import head_logprobs, head_logprobs_and_entropy, total_logprob
from rlhf_lightning.functional.logprobs import entropy, gather_logprobs
from rlhf_lightning.functional.precision import at_least_float32
from rlhf_lightning.networks.compiling import uncompiled
from rlhf_lightning.networks.sharding import is_sharded
from rlhf_lightning.networks.unpadded import last_states

_found_plain: "WeakKeyDictionary[nn.Module, dict[bool, bool]]" = WeakKeyDictionary()
"""Of each network, whether its output layer is all that follows its body: called without positions, and with them."""


@dataclass(frozen=True)
class Predictions:
    """What predicts N tokens: the last hidden states before them and the output layer, or the logits themselves."""

    tokens: Int[Tensor, " N"]
    states: Float[Tensor, "N H"] | None
    """What the output layer reads; None where it is more than a linear layer, or not whole."""
    head: nn.Linear | None
    given_logits: Float[Tensor, "N V"] | None
    """In place of states and head."""

    def logits(self) -> Float[Tensor, "N V"]:
        """Return the logits in at least float32."""
        if self.given_logits is not None:
            return self.given_logits
        assert self.head is not None
        return at_least_float32(self.head(self.states))

    def logprobs(self, *, temperature: float = 1.0) -> Float[Tensor, " N"]:
        """Return the log-probability of each token at the temperature, in nats."""
        if self.given_logits is not None:
            return gather_logprobs(self.given_logits.unsqueeze(0), self.tokens.unsqueeze(0), temperature=temperature)[0]
        return head_logprobs(*self._operands(), self.tokens, temperature=temperature)

    def logprobs_and_entropy(
        self, *, temperature: float = 1.0, entropy_gradient: bool = True
    ) -> tuple[Float[Tensor, " N"], Float[Tensor, " N"]]:
        """Return `logprobs` and the entropies of the same distributions in nats."""
        if self.given_logits is None:
            logprobs, entropies = head_logprobs_and_entropy(*self._operands(), self.tokens, temperature=temperature)
            return logprobs, entropies if entropy_gradient else entropies.detach()
        logits = self.given_logits if entropy_gradient else self.given_logits.detach()
        return self.logprobs(temperature=temperature), entropy(logits.unsqueeze(0), temperature=temperature)[0]

    def total_logprob(self) -> Float[Tensor, ""]:
        """Return the sum of the log-probabilities in nats."""
        return self.logprobs().sum() if self.given_logits is not None else total_logprob(*self._operands(), self.tokens)

    def _operands(self) -> tuple[Tensor, Tensor, Tensor | None]:
        assert self.head is not None
        assert self.states is not None
        return self.states, self.head.weight, self.head.bias


def predictions(
    network: nn.Module,
    tokens: Int[Tensor, "B T"],
    attention_mask: Bool[Tensor, "B T"] | None,
    counted: Bool[Tensor, "B T"],
    *,
    position_ids: Int[Tensor, "B T"] | None = None,
    longest: int | None = None,
    **more: Any,
) -> Predictions:
    """Return what predicts the tokens that are counted, row by row; the first of a row must not be.

    The mask is None where a row holds several sequences, whose ``position_ids`` begin anew; ``more`` is what the
    network is told besides. Where the output layer is no plain linear layer the network makes logits for all tokens, or
    for the last ``longest`` ones, which must then hold all that are counted.
    """
    model: Any = network
    inputs: dict[str, Any] = {"input_ids": tokens, "use_cache": False, **more}
    inputs["attention_mask"] = None if attention_mask is None else attention_mask.long()
    if position_ids is not None:
        inputs["position_ids"] = position_ids
    # The token at t is predicted by the state at t - 1.
    row, column = counted[:, 1:].nonzero(as_tuple=True)
    chosen = tokens[row, column + 1]
    head = plain_head(network, takes_positions=position_ids is not None)
    if head is None:
        if longest is not None:
            inputs["logits_to_keep"] = longest + 1
        logits: Tensor = model(**inputs).logits
        left_out = tokens.shape[1] - logits.shape[1]
        return Predictions(chosen, None, None, at_least_float32(logits[row, column - left_out]))
    if attention_mask is None or more:
        hidden: Tensor = model.base_model(**inputs).last_hidden_state
    else:
        hidden = last_states(model.base_model, tokens, attention_mask, position_ids=position_ids)
    # By numbers of rows: the backward of a choice by mask adds up number by number.
    states = hidden.flatten(0, 1).index_select(0, row * tokens.shape[1] + column)
    return Predictions(chosen, states, head, None)


def plain_head(network: nn.Module, *, takes_positions: bool = True) -> nn.Linear | None:
    """Return the output layer where logits are that linear layer of the last hidden states, and it is whole and plain.

    None where the network scales or caps its logits or changes what its body reads, where the layer is quantised or has
    an adapter, where somebody's hooks wait for the call of either, and where weights lie in parts on several processes.
    """
    from transformers import PreTrainedModel

    if not isinstance(network, PreTrainedModel) or network.base_model is network or is_sharded(network):
        return None
    head: Any = network.get_output_embeddings()
    # Of no subclass: quantised layers, adapters and FSDP2 make such.
    if type(head) is not nn.Linear or head.weight.shape != (head.out_features, head.in_features):
        return None
    if _is_watched(head) or _is_watched(network) or _is_wrapped(network):
        return None
    found = _found_plain.setdefault(network, {})
    if takes_positions not in found:
        found[takes_positions] = _is_all(network, head, takes_positions=takes_positions)
    return head if found[takes_positions] else None


def _is_watched(part: nn.Module) -> bool:
    """Return whether more happens at a call than the class says."""
    return bool("forward" in vars(part) or part._forward_hooks or part._forward_pre_hooks)


def _is_wrapped(network: nn.Module) -> bool:
    return any(isinstance(part, FullyShardedDataParallel) for part in network.modules())


@torch.no_grad()
def _is_all(network: Any, head: nn.Linear, *, takes_positions: bool) -> bool:
    """Return whether body and layer are given what the network and the body make, and the layer's output is all."""
    seen: dict[str, Any] = {}
    # Large, so that what caps or scales them shows.
    made = torch.linspace(-100, 100, 2 * head.out_features, device=head.weight.device).view(1, 2, -1)

    def of_body(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        seen["given"] = [id(x) for x in (*args, *kwargs.values())]
        seen["states"] = output.last_hidden_state

    def of_head(_: nn.Module, inputs: tuple[Tensor], __: Tensor) -> Tensor:
        seen["read"] = inputs[0]
        return made

    token = torch.zeros(1, 2, dtype=torch.long, device=head.weight.device)
    inputs = {"input_ids": token, "attention_mask": token + 1}
    if takes_positions:
        inputs["position_ids"] = torch.arange(2, device=token.device).unsqueeze(0)
    hooks = [
        network.base_model.register_forward_hook(of_body, with_kwargs=True),
        head.register_forward_hook(of_head),
    ]
    try:
        # Dropout may be on: nothing is to be drawn from the noise of the training.
        with torch.random.fork_rng(devices=[token.device] if token.is_cuda else []), uncompiled():
            logits = network(**inputs, use_cache=False).logits
    finally:
        for hook in hooks:
            hook.remove()
    # A network may call parts of its body in its place (OPT).
    if not {"given", "read"} <= seen.keys():
        return False
    is_given = all(id(x) in seen["given"] for x in inputs.values())
    return is_given and torch.equal(logits, made) and torch.equal(seen["read"], seen["states"])
