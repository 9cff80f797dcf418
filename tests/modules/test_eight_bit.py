"""Moments in 8 bits on the CPU: which weights have them, that they learn, and that a resumed run is exact."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_lightning.modules import PPOModule, SFTModule
from rlhf_lightning.modules.eight_bit import AdamW8bit
from rlhf_lightning.modules.language import embeddings_and_heads
from rlhf_lightning.networks import LoRA, NetworkConfig
from rlhf_lightning.types import PromptBatch, SFTBatch

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*have no `val_dataloader`.*"),
]

TOKENS = torch.tensor([[5, 9, 7, 30, 2, 1], [8, 4, 11, 12, 13, 1]])
ALL = torch.ones(2, 6, dtype=torch.bool)
BATCH = SFTBatch(tokens=TOKENS, attention_mask=ALL, loss_mask=ALL)


def state_types(module: Any) -> dict[str, torch.dtype]:
    optimizer: Any = module.trainer.optimizers[0]
    return {n: optimizer.state[p]["state1"].dtype for n, p in module.named_parameters() if p in optimizer.state}


def test_embeddings_and_heads_keep_32_bits_and_large_layers_have_8(wide_model: Path, fit: Callable[..., Any]) -> None:
    module = SFTModule(str(wide_model), optimizer="adamw_8bit", learning_rate=1e-3)
    logged = fit(module, [BATCH], max_epochs=6)
    assert logged["sft/loss"][-1] < 0.8 * logged["sft/loss"][0]
    types = state_types(module)
    assert types["policy.model.embed_tokens.weight"] == types["policy.lm_head.weight"] == torch.float32
    assert types["policy.model.layers.0.self_attn.q_proj.weight"] == torch.uint8
    # Below 4,096 weights there is nothing to save.
    assert types["policy.model.norm.weight"] == torch.float32


def test_the_step_is_that_of_adamw_up_to_the_rounding_of_the_moments() -> None:
    weights = [torch.nn.Parameter(torch.randn(64, 128, generator=torch.Generator().manual_seed(0))) for _ in range(2)]
    ours: Any = AdamW8bit([{"params": [weights[0]]}], [], lr=1e-2, eps=1e-8, weight_decay=0.1)
    reference = torch.optim.AdamW([weights[1]], lr=1e-2, eps=1e-8, weight_decay=0.1)
    for seed in range(5):
        for weight in weights:
            weight.grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed))
        ours.step()
        reference.step()
    moved = (weights[1] - torch.randn(64, 128, generator=torch.Generator().manual_seed(0))).abs().mean()
    assert 0 < float((weights[0] - weights[1]).detach().abs().mean()) < 0.05 * float(moved.detach())


def test_a_weight_that_is_whole_is_stepped_as_by_adamw() -> None:
    weights = [torch.nn.Parameter(torch.randn(64, 128, generator=torch.Generator().manual_seed(0))) for _ in range(2)]
    ours: Any = AdamW8bit([{"params": [weights[0]]}], [weights[0]], lr=1e-2)
    reference = torch.optim.AdamW([weights[1]], lr=1e-2, weight_decay=0.0)
    for seed in range(5):
        for weight in weights:
            weight.grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed))
        ours.step()
        reference.step()
    torch.testing.assert_close(weights[0], weights[1])


def test_the_state_is_restored_exactly() -> None:
    def run(steps: range, weight: torch.nn.Parameter, optimizer: Any) -> None:
        for seed in steps:
            weight.grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed))
            optimizer.step()

    whole = torch.nn.Parameter(torch.ones(64, 128))
    optimizer: Any = AdamW8bit([{"params": [whole]}], [], lr=1e-2)
    run(range(3), whole, optimizer)
    resumed = torch.nn.Parameter(whole.detach().clone())
    other: Any = AdamW8bit([{"params": [resumed]}], [], lr=1e-2)
    other.load_state_dict(optimizer.state_dict())
    run(range(3, 6), whole, optimizer)
    run(range(3, 6), resumed, other)
    assert torch.equal(whole, resumed)


@pytest.mark.parametrize("quantization", ["int8", "nf4"])
def test_ppo_with_adapters_on_a_quantised_backbone_steps_8_bit_moments(
    quantization: str, wide_model: Path, prompts: PromptBatch, fit: Callable[..., Any]
) -> None:
    # r = 64 gives matrices of 4,096 weights and more.
    network = NetworkConfig(str(wide_model), quantization=quantization, lora=LoRA(r=64), roles="shared")
    module = PPOModule(
        network,
        reward=lambda prompts, responses: [float(len(r)) for r in responses],
        optimizer="adamw_8bit",
        minibatch_size=6,
        max_new_tokens=6,
        learning_rate=1e-3,
        critic_learning_rate=1e-3,
    )
    logged = fit(module, [prompts], max_epochs=3)
    assert logged["ppo/kl"][0] == 0.0
    assert abs(logged["ppo/kl"][2]) > 1e-4
    types = state_types(module)
    assert {d for n, d in types.items() if ".lora_" in n} == {torch.uint8}
    assert types["critic.head.weight"] == torch.float32


def test_embeddings_and_heads_are_found_in_policy_and_critic(tiny_model: Path) -> None:
    module = PPOModule(str(tiny_model), reward=len)
    names = {id(p): n for n, p in module.named_parameters()}
    found = {names[id(p)] for p in embeddings_and_heads(module)}
    assert {"policy.lm_head.weight", "policy.model.embed_tokens.weight", "critic.head.weight"} <= found
    assert not [name for name in found if "layers" in name]
