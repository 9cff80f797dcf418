"""What a reward model says of whole sequences.

On a CPU its body reads no padding where that can be left out (`unpadded`), and makes the states alone that are read
(`last_block`), one of each sequence for its head. All others are called as they are: encoders such as BERT, networks
that lie in parts on several processes, and on a GPU all.
"""

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from rlhf_lightning.networks.plain_head import plain_scalar_head
from rlhf_lightning.networks.scalar_head import scored_tokens
from rlhf_lightning.networks.unpadded import last_states, leaves_something_out


def sequence_scores(
    reward_model: nn.Module, tokens: Int[Tensor, "B T"], attention_mask: Bool[Tensor, "B T"], **told: Any
) -> Float[Tensor, " B"]:
    """Return the score at the last real token of sequences padded on the right, in float32.

    A network that is called as it is, is ``told`` more than tokens and mask.
    """
    apart = _read_apart(reward_model, tokens, attention_mask, torch.zeros_like(attention_mask))
    if apart is not None:
        return apart[0]
    network: Any = reward_model
    logits: Tensor = network(input_ids=tokens, attention_mask=attention_mask.long(), **told).logits
    return logits.squeeze(-1).float()


def scores_and_states(
    reward_model: nn.Module,
    tokens: Int[Tensor, "B T"],
    attention_mask: Bool[Tensor, "B T"],
    *,
    read: Bool[Tensor, "B T"] | None = None,
) -> tuple[Float[Tensor, " B"], Float[Tensor, "B T H"]]:
    """Return `sequence_scores`, and the last hidden states; those that are not ``read`` mean nothing, nor padding's.

    None reads all.
    """
    apart = _read_apart(reward_model, tokens, attention_mask, read)
    if apart is not None:
        return apart
    network: Any = reward_model
    output = network(input_ids=tokens, attention_mask=attention_mask.long(), use_cache=False, output_hidden_states=True)
    return output.logits.squeeze(-1).float(), output.hidden_states[-1]


def _read_apart(
    reward_model: Any, tokens: Tensor, attention_mask: Tensor, read: Tensor | None
) -> tuple[Tensor, Tensor] | None:
    """Return scores and states, found by body and head one after the other; None where that spares nothing."""
    body = reward_model.base_model
    head = plain_scalar_head(reward_model) if leaves_something_out(body, attention_mask) else None
    if head is None:
        return None
    rows = torch.arange(len(tokens), device=tokens.device)
    ends = scored_tokens(reward_model, tokens, attention_mask)
    if read is not None:
        read = read.index_put((rows, ends), torch.ones_like(rows, dtype=torch.bool))
    states = last_states(body, tokens, attention_mask, read=read)
    return head(states[rows, ends]).squeeze(-1).float(), states
