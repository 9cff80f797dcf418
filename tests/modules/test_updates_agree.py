"""What saves work changes no result: the first 20 updates, one way and the other, from one seed."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from rlhf_lightning.modules import PPOModule, RewardModule, SFTModule
from rlhf_lightning.networks import predictions as output_layer
from rlhf_lightning.networks.by_sequence import attends_by_sequence
from rlhf_lightning.types import ComparisonBatch, PromptBatch, SFTBatch

pytestmark = [
    pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*have no `val_dataloader`.*"),
]

UPDATES = 20


@pytest.fixture
def whole_logits(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From the call on, networks make logits at all positions, as where their output layer is not plain."""
    return lambda: monkeypatch.setattr(output_layer, "plain_head", lambda *_, **__: None)


def demonstrations(count: int) -> list[SFTBatch]:
    noise, batches = torch.Generator().manual_seed(1), []
    for _ in range(count):
        lengths = torch.randint(6, 20, (4, 1), generator=noise)
        place = torch.arange(20).expand(4, 20)
        tokens = torch.randint(2, 258, (4, 20), generator=noise)
        mask = place < lengths
        batches.append(SFTBatch(tokens.where(mask, 0), mask, mask & (place >= lengths // 2)))
    return batches


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_fine_tuning_with_logits_where_they_count(
    kind: str, policy: Callable[..., Any], fit: Callable[..., Any], whole_logits: Callable[[], None]
) -> None:
    def losses() -> list[float]:
        return list(fit(SFTModule(policy(kind), learning_rate=1e-2), demonstrations(UPDATES), max_epochs=1)["sft/loss"])

    after = losses()
    whole_logits()
    assert len(after) == UPDATES
    assert min(after) < 0.9 * after[0]
    assert after == pytest.approx(losses(), rel=1e-4)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_fine_tuning_on_packed_sequences(
    kind: str, attention: str, policy: Callable[..., Any], fit: Callable[..., Any]
) -> None:
    def losses(*, packing: bool) -> list[float]:
        network = policy(kind)
        network.set_attn_implementation(attention)
        # In rows with a mask in blocks, where attention is not by sequence.
        assert attends_by_sequence(network) == (attention == "sdpa")
        module = SFTModule(network, learning_rate=1e-2, packing=packing)
        return list(fit(module, demonstrations(UPDATES), max_epochs=1)["sft/loss"])

    packed = losses(packing=True)
    assert len(packed) == UPDATES
    assert min(packed) < 0.9 * packed[0]
    assert packed == pytest.approx(losses(packing=False), rel=1e-4)


def comparisons(count: int) -> list[ComparisonBatch]:
    """Three prompts with two to four responses, of which some tie."""
    noise, batches = torch.Generator().manual_seed(2), []
    prompt_index = torch.tensor([0, 0, 1, 1, 1, 2, 2, 2, 2])
    for _ in range(count):
        lengths = torch.randint(5, 20, (9, 1), generator=noise)
        tokens = torch.randint(2, 258, (9, 20), generator=noise)
        place = torch.arange(20).expand(9, 20)
        # The prompt of a response is that of its neighbours.
        tokens = tokens.where(place > 2, prompt_index.unsqueeze(1) + 40)
        mask = place < lengths
        ranks = torch.tensor([0, 1, 0, 1, 1, 0, 1, 2, 3])
        ratings = 4.0 - ranks
        batches.append(ComparisonBatch(tokens.where(mask, 0), mask, mask & (place > 2), prompt_index, ranks, ratings))
    return batches


@pytest.mark.parametrize("share_prompts", [False, True])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_reward_model_on_packed_sequences(
    kind: str, share_prompts: bool, classifier: Callable[..., Any], tokenizer: Any, fit: Callable[..., Any]
) -> None:
    def losses(**settings: bool) -> list[float]:
        network = classifier(kind, tie_word_embeddings=True)
        module = RewardModule(
            network, tokenizer=tokenizer, learning_rate=1e-2, margin_coef=0.1, lm_coef=0.1, **settings
        )
        logged = fit(module, comparisons(UPDATES), max_epochs=1)
        return [*logged["reward/loss"], *logged["reward/lm_loss"]]

    packed = losses(packing=True, share_prompts=share_prompts)
    assert len(packed) == 2 * UPDATES
    assert packed == pytest.approx(losses(), rel=1e-3)


@pytest.mark.parametrize("settings", [{}, {"entropy_coef": 0.1, "temperature": 0.7, "advantage": "rloo"}])
def test_ppo_with_logits_where_they_count(
    settings: dict[str, Any],
    policy: Callable[..., Any],
    fit: Callable[..., Any],
    prompts: PromptBatch,
    tokenizer: Any,
    whole_logits: Callable[[], None],
) -> None:
    settings = {"samples_per_prompt": 2 if settings else 1, "minibatch_size": 6, **settings}

    def run() -> Any:
        module = PPOModule(
            policy(),
            reward=lambda prompts, responses: [float(text.count("a") + len(text) % 3) for text in responses],
            tokenizer=tokenizer,
            ppo_epochs=4 // settings["samples_per_prompt"],
            micro_batch_size=3,
            max_new_tokens=8,
            learning_rate=1e-3,
            preflight=False,
            **settings,
        )
        return fit(module, [prompts], max_epochs=UPDATES // 4)

    after = run()
    whole_logits()
    before = run()
    assert after["ppo/updates"][-1] == UPDATES
    for name in ("policy_loss", "entropy", "kl", "policy_grad_norm", "approx_kl", "score"):
        assert after[f"ppo/{name}"] == pytest.approx(before[f"ppo/{name}"], rel=1e-3, abs=1e-5), name
    assert after["ppo/kl"][-1] != after["ppo/kl"][0]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_ppo_with_frozen_networks_on_the_host(
    policy: Callable[..., Any],
    classifier: Callable[..., Any],
    fit: Callable[..., Any],
    prompts: PromptBatch,
    tokenizer: Any,
) -> None:
    def run(*, offload: bool) -> tuple[PPOModule, Any]:
        module = PPOModule(
            policy(),
            reward=classifier(),
            tokenizer=tokenizer,
            minibatch_size=6,
            max_new_tokens=8,
            learning_rate=1e-3,
            offload=offload,
        )
        frozen: list[str] = []
        module.policy.register_forward_pre_hook(lambda *_: frozen.append(module.reference.lm_head.weight.device.type))
        logged = fit(module, [prompts], max_epochs=UPDATES // 4, accelerator="gpu")
        assert ("cpu" in frozen) == offload
        return module, logged

    _, expected = run(offload=False)
    _, found = run(offload=True)
    for name in ("policy_loss", "value_loss", "kl", "score"):
        assert found[f"ppo/{name}"] == pytest.approx(expected[f"ppo/{name}"], rel=1e-4, abs=1e-6), name
