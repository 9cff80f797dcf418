"""The critic: a transformer body with a scalar head at every position."""

from collections.abc import Callable
from copy import deepcopy
from typing import Any, Self

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from rlhf_lightning.functional.masking import position_ids
from rlhf_lightning.functional.precision import at_least_float32
from rlhf_lightning.networks.lora import LoRA, add_adapter, has_adapter, train_adapter
from rlhf_lightning.networks.scalar_head import init_scalar_head, scalar_head

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
        return self

    def forward(self, tokens: Int[Tensor, "B T"], attention_mask: Bool[Tensor, "B T"]) -> Float[Tensor, "B T"]:
        """Return the value of the state after each token, in at least float32."""
        hidden = self.backbone(
            input_ids=tokens,
            attention_mask=attention_mask.long(),
            position_ids=position_ids(attention_mask),
            use_cache=False,
        ).last_hidden_state
        return at_least_float32(self.head(hidden).squeeze(-1))


def new_value_head(policy: Any, generator: torch.Generator | None = None) -> nn.Linear:
    """Return a new scalar head for the policy's hidden states."""
    hidden_size = policy.config.get_text_config().hidden_size
    head = nn.Linear(hidden_size, 1, bias=False, dtype=policy.dtype, device=policy.device)
    init_scalar_head(head, generator)
    return head
