"""Gradients of float16, which Lightning scales: on a CPU, where it does not offer that by itself."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor

from rlhf_lightning.modules import PPOModule
from rlhf_lightning.types import Experience, PromptBatch

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*have no `val_dataloader`.*"),
]
LIMIT = 0.05


class Watching(PPOModule):
    """Keeps the norms of policy and critic before and after they are clipped; overflows at one update."""

    overflow = -1

    def on_fit_start(self) -> None:
        super().on_fit_start()
        self.norms: list[tuple[list[float], list[float]]] = []

    def configure_optimizers(self) -> torch.optim.Optimizer:
        # A fused step, which the package uses on CPUs only, would take the scale off by itself, after clipping.
        groups = super().configure_optimizers().param_groups
        chosen = [{"params": group["params"], "lr": group["lr"]} for group in groups]
        return torch.optim.AdamW(chosen, eps=1e-5, weight_decay=0.0)

    def _accumulate_gradients(self, minibatch: Experience) -> dict[str, Tensor]:
        metrics = super()._accumulate_gradients(minibatch)
        if len(self.norms) == self.overflow:
            next(iter(self.policy.parameters())).grad.fill_(torch.inf)
        return metrics

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        before = self._norms(optimizer)
        super().on_before_optimizer_step(optimizer)
        self.norms.append((before, self._norms(optimizer)))

    def _norms(self, optimizer: torch.optim.Optimizer) -> list[float]:
        return [
            torch.cat([p.new_zeros(1) if p.grad is None else p.grad.flatten() for p in group["params"]]).norm().item()
            for group in optimizer.param_groups
        ]


@pytest.fixture
def make(policy: Callable[..., Any], tokenizer: Any) -> Callable[..., Watching]:
    def build(**settings: Any) -> Watching:
        return Watching(
            policy(),
            reward=lambda prompts, responses: [float(len(text)) for text in responses],
            tokenizer=tokenizer,
            minibatch_size=6,
            max_new_tokens=6,
            max_grad_norm=LIMIT,
            preflight=False,
            learning_rate=1e-3,
            critic_learning_rate=1e-3,
            **settings,
        )

    return build


def scaled() -> MixedPrecision:
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**10))


def test_gradients_are_clipped_after_their_scale_is_taken_off(
    make: Callable[..., Watching], prompts: PromptBatch, fit: Callable[..., Any]
) -> None:
    full, half = make(ppo_epochs=1), make(ppo_epochs=1)
    fit(full, [prompts], max_steps=1)
    fit(half, [prompts], max_steps=1, plugins=[scaled()])
    (before, after), (expected, _) = half.norms[0], full.norms[0]
    assert before == pytest.approx(expected, rel=0.1)
    assert min(before) > LIMIT
    assert after == pytest.approx([LIMIT, LIMIT], rel=1e-3)


def test_an_update_whose_gradient_overflowed_moves_no_weight(
    make: Callable[..., Watching], prompts: PromptBatch, fit: Callable[..., Any]
) -> None:
    module = make(ppo_epochs=1)
    module.overflow = 0
    before = [p.detach().clone() for p in module.parameters()]
    plugin = scaled()
    fit(module, [prompts], max_steps=1, plugins=[plugin])
    assert all(torch.equal(p, old) for p, old in zip(module.parameters(), before, strict=True))
    assert plugin.scaler.get_scale() == 2.0**9
