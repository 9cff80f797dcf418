"""The critic: a transformer body with a scalar head at every position."""

from copy import deepcopy
from typing import Any, Self

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from rlhf_lightning.functional.masking import position_ids
from rlhf_lightning.functional.precision import at_least_float32
from rlhf_lightning.networks.scalar_head import init_scalar_head, scalar_head


class Critic(nn.Module):
    """Value of every state: what the rest of the response is expected to be worth (B, T)."""

    def __init__(self, backbone: nn.Module, head: nn.Linear) -> None:
        """Take a body that returns ``last_hidden_state`` and a linear layer with one output."""
        super().__init__()
        self.backbone = backbone
        self.head = head

    @classmethod
    def from_reward_model(cls, reward_model: Any) -> Self:
        """Copy the reward model's body and head (Stiennon et al. 2020; Ouyang et al. 2022)."""
        return cls(deepcopy(reward_model.base_model), deepcopy(scalar_head(reward_model))).requires_grad_(True)

    @classmethod
    def from_policy(cls, policy: Any, generator: torch.Generator | None = None) -> Self:
        """Copy the policy's body under a new head: where the reward is a function or reads other tokens."""
        head = nn.Linear(policy.config.get_text_config().hidden_size, 1, bias=False, dtype=policy.dtype)
        init_scalar_head(head, generator)
        return cls(deepcopy(policy.base_model), head).requires_grad_(True)

    def forward(self, tokens: Int[Tensor, "B T"], attention_mask: Bool[Tensor, "B T"]) -> Float[Tensor, "B T"]:
        """Return the value of the state after each token, in at least float32."""
        hidden = self.backbone(
            input_ids=tokens,
            attention_mask=attention_mask.long(),
            position_ids=position_ids(attention_mask),
            use_cache=False,
        ).last_hidden_state
        # A copy: FSDP2 hangs its hooks on the output, which a view could lose.
        return at_least_float32(self.head(hidden).squeeze(-1).clone())
