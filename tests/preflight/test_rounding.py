import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Trainer
from torch.utils.data import DataLoader

from rlhf_lightning.modules import PPOModule, SFTModule
from rlhf_lightning.networks import LoRA, NetworkConfig, load_policy, load_reward_model
from rlhf_lightning.networks.scalar_head import scalar_head
from rlhf_lightning.preflight import check_ppo, check_rounding
from rlhf_lightning.types import PromptBatch, SFTBatch

RATE = 1e-5


def stood_still(network: torch.nn.Module) -> float:
    """Return the share of the weights that AdamW's first step, the largest that it takes, leaves as they were."""
    before = [p.detach().clone() for p in network.parameters()]
    for p in network.parameters():
        p.grad = torch.randn_like(p)
    torch.optim.AdamW(network.parameters(), lr=RATE, weight_decay=0.0).step()
    same = [(p == old).flatten() for p, old in zip(network.parameters(), before, strict=True)]
    return float(torch.cat(same).float().mean())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_share_of_weights_that_stand_still_is_that_of_a_real_step(
    dtype: torch.dtype, llama: Callable[..., Any]
) -> None:
    network = llama(initializer_range=0.02).to(dtype)
    finding = check_rounding({network: RATE})
    share = float(finding.measured.split("%")[0]) / 100
    assert share == pytest.approx(stood_still(network), abs=0.02)
    assert share > 0.1
    assert finding.status == "warning"
    assert "bf16-mixed" in finding.remedy
    assert "network=lora" in finding.remedy
    assert check_rounding({network: 0.1}).status == "note"


def test_weights_in_32_bits_and_a_float32_adapter_beside_16_bits_are_as_they_should_be(
    llama: Callable[..., Any], tiny_model: Path
) -> None:
    assert check_rounding({llama(): RATE}).status == "ok"
    whole, adapted = (
        load_policy(NetworkConfig(str(tiny_model), dtype="bfloat16", lora=lora)) for lora in (None, LoRA())
    )
    assert check_rounding({whole: RATE}).status == "warning"
    assert check_rounding({adapted: RATE}).status == "ok"


@pytest.mark.parametrize("lora", [None, LoRA()])
def test_a_reward_models_head_is_in_32_bits_beside_weights_in_16(lora: LoRA | None, tiny_model: Path) -> None:
    network = load_reward_model(NetworkConfig(str(tiny_model), dtype="bfloat16", lora=lora))
    assert network.dtype == torch.bfloat16
    assert scalar_head(network).weight.dtype == torch.float32
    assert check_rounding({network: RATE}).status == ("warning" if lora is None else "ok")
    tokens = torch.tensor([[5, 6, 7]])
    network(tokens).logits.sum().backward()
    assert scalar_head(network).weight.grad.dtype == torch.float32


def test_ppo_is_told_of_its_policy_and_of_its_critic(
    make: Callable[..., PPOModule], prompts: PromptBatch, faults: Callable[..., Any]
) -> None:
    module = make(critic_learning_rate=2e-6)
    assert "rounding of updates" not in faults(check_ppo(module, prompts))
    assert module.critic is not None
    module.critic.bfloat16()
    assert "learning_rate=2e-06" in check_rounding({module.critic: 2e-6}).measured
    module.policy.bfloat16()
    module.reference.bfloat16()
    assert "learning_rate=0.001, 2e-06" in faults(check_ppo(module, prompts))["rounding of updates"].measured


@pytest.mark.filterwarnings("ignore:.*does not have many workers.*", "ignore:.*have no `val_dataloader`.*")
@pytest.mark.parametrize(("precision", "said"), [("bf16-true", True), ("bf16-mixed", False)])
def test_fine_tuning_says_it_when_it_starts(
    precision: Any,
    said: bool,
    llama: Callable[..., Any],
    tokenizer: Any,
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
) -> None:
    tokens = torch.ones(2, 4, dtype=torch.long)
    batch = SFTBatch(tokens, tokens.bool(), torch.arange(4).expand(2, 4) > 0)
    loader: Any = DataLoader([batch], batch_size=None, collate_fn=lambda x: x)  # type: ignore[arg-type]
    trainer = Trainer(
        accelerator="cpu",
        precision=precision,
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    with caplog.at_level(logging.WARNING):
        trainer.fit(SFTModule(llama(initializer_range=0.02), tokenizer=tokenizer), loader)
    assert any("rounding of updates" in record.getMessage() for record in caplog.records) == said
