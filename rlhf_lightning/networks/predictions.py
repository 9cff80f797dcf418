"""What a language model says of chosen tokens: its output layer is computed where it is read, and nowhere else."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from rlhf_lightning.functional.head_logprobs import head_logprobs, head_logprobs_and_entropy, total_logprob
from rlhf_lightning.functional.logprobs import entropy, gather_logprobs
from rlhf_lightning.functional.precision import at_least_float32
from rlhf_lightning.networks.few_passes import in_few_passes
from rlhf_lightning.networks.last_block import reading_states
from rlhf_lightning.networks.plain_head import plain_head
from rlhf_lightning.networks.unpadded import last_states


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
    read: Bool[Tensor, "B T"] | None = None,
    **more: Any,
) -> Predictions:
    """Return what predicts the tokens that are counted, row by row; the first of a row must not be.

    ``read`` are the states that somebody reads, those before counted tokens among them, which are all where it is None.

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
    if read is None:
        read = torch.zeros_like(counted)
        read[:, :-1] = counted[:, 1:]
    if attention_mask is None or more:
        with reading_states(model.base_model, read), in_few_passes(model.base_model):
            hidden: Tensor = model.base_model(**inputs).last_hidden_state
    else:
        hidden = last_states(model.base_model, tokens, attention_mask, position_ids=position_ids, read=read)
    # By numbers of rows: the backward of a choice by mask adds up number by number.
    states = hidden.flatten(0, 1).index_select(0, row * tokens.shape[1] + column)
    return Predictions(chosen, states, head, None)
