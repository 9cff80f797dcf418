"""The critic: a transformer body with a scalar head at every position."""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Self

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from rlhf_lightning.functional.masking import position_ids
from rlhf_lightning.functional.precision import at_least_float32
from rlhf_lightning.networks.lora import LoRA, add_adapter, has_adapter, train_adapter
from rlhf_lightning.networks.scalar_head import init_scalar_head, keep_fine, scalar_head
from rlhf_lightning.networks.unpadded import last_states

Copy = Callable[[nn.Module], nn.Module]
"""How a body is copied: `deepcopy`, or onto the same backbone."""


class Critic(nn.Module):
    """Value of every state: what the rest of the response is expected to be worth (B, T)."""

    def __init__(self, backbone: nn.Module, head: nn.Linear) -> None:
        """Take a body that returns ``last_hidden_state`` and a linear layer with one output."""
        super().__init__()
        self.backbone = backbone
        self.head = head

    @classmethod
    def from_reward_model(cls, reward_model: Any, *, copy: Copy = deepcopy, lora: LoRA | None = None) -> Self:
        """Copy the reward model's body and head (Stiennon et al. 2020; Ouyang et al. 2022); see `train_weights`."""
        return cls(copy(reward_model.base_model), deepcopy(scalar_head(reward_model))).train_weights(lora)

    @classmethod
    def from_policy(
        cls,
        policy: Any,
        generator: torch.Generator | None = None,
        *,
        copy: Copy = deepcopy,
        lora: LoRA | None = None,
    ) -> Self:
        """Copy the policy's body under a new head: where the reward is a function or reads other tokens."""
        return cls(copy(policy.base_model), new_value_head(policy, generator)).train_weights(lora)

    def train_weights(self, lora: LoRA | None = None) -> Self:
        """Train head and body, of a body with an adapter that alone; with ``lora`` a body without gets a new one."""
        if lora is not None and not has_adapter(self.backbone):
            add_adapter(self.backbone, lora)
        train_adapter(self.backbone)
        self.head.requires_grad_(True)
        keep_fine(self.head)
        return self

    def forward(
        self, tokens: Int[Tensor, "B T"], attention_mask: Bool[Tensor, "B T"], read: Bool[Tensor, "B T"] | None = None
    ) -> Float[Tensor, "B T"]:
        """Return the value of the state after each token, in at least float32.

        Those that are not ``read`` mean nothing; None reads all.
        """
        positions = position_ids(attention_mask)
        hidden = last_states(self.backbone, tokens, attention_mask, position_ids=positions, read=read)
        # A copy: FSDP2 hangs its hooks on the output, which a view could lose.
        return at_least_float32(self.head(hidden).squeeze(-1).clone())


class TrunkCritic(nn.Module):
    """Values from the policy's own last hidden states (Schulman et al. 2017, eq. 9): a head, and no body of its own.

    The value loss then trains the policy's body too. Where the policy has just read the same tokens its states are
    taken from there, so that policy and critic cost one forward.
    """

    def __init__(self, policy: Any, head: nn.Linear) -> None:
        """Take the policy, whose weights stay its own, and a linear layer with one output."""
        super().__init__()
        keep_fine(head)
        self.head = head
        # In a tuple: not a submodule, so that the policy is registered, moved and saved once.
        self._policy = (policy,)
        self._read: _Read | None = None
        policy.base_model.register_forward_hook(self._keep, with_kwargs=True)

    def forward(
        self, tokens: Int[Tensor, "B T"], attention_mask: Bool[Tensor, "B T"], read: Bool[Tensor, "B T"] | None = None
    ) -> Float[Tensor, "B T"]:
        """Return the value of the state after each token, in at least float32.

        Those that are not ``read`` mean nothing; None reads all.
        """
        before, self._read = self._read, None
        known = before is not None and before.is_of(tokens, attention_mask, read)
        hidden = before.hidden if before is not None and known else self._states(tokens, attention_mask, read)
        return self.value_of(hidden)

    def _states(self, tokens: Tensor, attention_mask: Tensor, read: Tensor | None) -> Tensor:
        from rlhf_lightning.networks.sharding import waits_for_others

        (policy,), positions = self._policy, position_ids(attention_mask)
        if waits_for_others(policy):
            # What lies in parts is gathered where the whole policy is called.
            inputs = {"attention_mask": attention_mask.long(), "position_ids": positions, "use_cache": False}
            policy(input_ids=tokens, logits_to_keep=1, **inputs)
            assert self._read is not None
            hidden = self._read.hidden
        else:
            hidden = last_states(policy.base_model, tokens, attention_mask, position_ids=positions, read=read)
        self._read = None
        return hidden

    def value_of(self, hidden: Float[Tensor, "*N H"]) -> Float[Tensor, "*N"]:
        """Return the values of states that the policy's body has made, in at least float32."""
        # A copy: FSDP2 hangs its hooks on the output, which a view could lose.
        return at_least_float32(self.head(hidden).squeeze(-1).clone())

    def _keep(self, body: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        # Not while sampling, where each step reads one token.
        if kwargs["use_cache"] is not False:
            return
        from rlhf_lightning.networks.last_block import states_being_read

        hidden, made = output.last_hidden_state, states_being_read()
        sequences = kwargs.get("sequences")
        if sequences is not None and sequences.padded is not None:
            tokens, mask = sequences.padded.tokens, sequences.padded.attention_mask
            hidden = sequences.padded.spread(hidden)
            made = None if made is None else sequences.padded.spread(made.unsqueeze(-1)).squeeze(-1)
        else:
            tokens, mask = args[0] if args else kwargs["input_ids"], kwargs["attention_mask"]
        self._read = _Read(tokens, mask, hidden, made, torch.is_grad_enabled())


@dataclass(frozen=True)
class _Read:
    """What the policy's body made of its last tokens."""

    tokens: Tensor
    attention_mask: Tensor
    hidden: Tensor
    made: Tensor | None
    """(B, T) bool, the states that mean something; None: all of real tokens."""
    with_gradient: bool

    def is_of(self, tokens: Tensor, attention_mask: Tensor, read: Tensor | None) -> bool:
        """Return whether these are the states of the same tokens, those among them that are to be read."""
        wanted = attention_mask if read is None else read & attention_mask
        return (
            self.tokens is tokens
            and (self.made is None or not (wanted & ~self.made).any())
            and self.with_gradient == torch.is_grad_enabled()
            and torch.equal(self.attention_mask.bool(), attention_mask)
        )


def new_value_head(policy: Any, generator: torch.Generator | None = None) -> nn.Linear:
    """Return a new scalar head for the policy's hidden states."""
    hidden_size = policy.config.get_text_config().hidden_size
    head = nn.Linear(hidden_size, 1, bias=False, dtype=policy.dtype, device=policy.device)
    init_scalar_head(head, generator)
    return head
