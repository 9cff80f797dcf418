"""Every stage under every precision: what is compared and summed is float32, and weights are what was asked for."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_lightning.modules import PPOModule, RewardModule, SFTModule
from rlhf_lightning.networks import LoRA, NetworkConfig, load_reward_model, load_tokenizer, save_pretrained
from rlhf_lightning.types import ComparisonBatch, Experience, PromptBatch, ScoredRollout, SFTBatch

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*have no `val_dataloader`.*"),
]

PRECISIONS = [
    "32-true",
    "bf16-mixed",
    "bf16-true",
    pytest.param(
        "16-mixed", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]
    ),
]
TOKENS = torch.tensor([[5, 9, 7, 30, 2, 1], [8, 4, 11, 12, 13, 1], [8, 4, 21, 22, 23, 1], [5, 9, 14, 13, 2, 1]])
ALL = torch.ones(4, 6, dtype=torch.bool)
DEMONSTRATIONS = SFTBatch(tokens=TOKENS, attention_mask=ALL, loss_mask=ALL)
COMPARISONS = ComparisonBatch(
    tokens=TOKENS,
    attention_mask=ALL,
    response_mask=ALL,
    prompt_index=torch.tensor([0, 0, 1, 1]),
    ranks=torch.tensor([0, 1, 0, 1]),
    ratings=torch.tensor([0.3, 0.1, 0.3, 0.1]),
)


def device_of(precision: str) -> dict[str, Any]:
    return {"precision": precision, "accelerator": "gpu" if precision == "16-mixed" else "cpu"}


def weights_of(precision: str) -> torch.dtype:
    return torch.bfloat16 if precision == "bf16-true" else torch.float32


def types(network: Any) -> set[torch.dtype]:
    return {p.dtype for p in network.parameters()}


class Watched(PPOModule):
    """Keeps the records of its rollouts, and what its updates compute."""

    def on_fit_start(self) -> None:
        super().on_fit_start()
        self.scored: list[ScoredRollout] = []
        self.experiences: list[Experience] = []
        self.quantities: list[dict[str, torch.Tensor]] = []

    def score(self, rollout: Any, **known: Any) -> ScoredRollout:
        self.scored.append(super().score(rollout, **known))
        return self.scored[-1]

    def experience(self, scored: ScoredRollout, parts: Any) -> Experience:
        self.experiences.append(super().experience(scored, parts))
        return self.experiences[-1]

    def losses(self, experience: Experience) -> dict[str, torch.Tensor]:
        self.quantities.append(super().losses(experience))
        return self.quantities[-1]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_fine_tuning_learns(precision: str, wide_model: Path, fit: Callable[..., Any]) -> None:
    module = SFTModule(str(wide_model), learning_rate=3e-3)
    logged = fit(module, [DEMONSTRATIONS], val=[DEMONSTRATIONS], max_epochs=6, **device_of(precision))
    assert logged["sft/loss"][-1] < 0.7 * logged["sft/loss"][0]
    assert types(module.policy) == {weights_of(precision)}
    with torch.no_grad():
        assert module(DEMONSTRATIONS.to(module.device))[0].dtype == torch.float32
    assert module.val_loss.mean_value.dtype == torch.float32


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_reward_model_learns(precision: str, wide_model: Path, fit: Callable[..., Any]) -> None:
    module = RewardModule(str(wide_model), learning_rate=3e-3, margin_coef=0.5)
    logged = fit(module, [COMPARISONS], val=[COMPARISONS], max_epochs=6, **device_of(precision))
    assert logged["reward/loss"][-1] < 0.5 * logged["reward/loss"][0]
    assert types(module.reward_model) == {weights_of(precision)}
    assert module._read(COMPARISONS.to(module.device), None)[0].dtype == torch.float32


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(("kind", "batch"), [(SFTModule, DEMONSTRATIONS), (RewardModule, COMPARISONS)])
def test_gradients_are_clipped(
    kind: Any, batch: Any, precision: str, wide_model: Path, fit: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    norms: dict[float, list[torch.Tensor]] = {}
    configure = kind.configure_optimizers

    def configure_optimizers(module: Any) -> Any:
        found = configure(module)
        weights = [p for p in module.parameters() if p.requires_grad]

        def keep(*_: Any) -> None:
            norms[clip].append(torch.nn.utils.get_total_norm([p.grad for p in weights if p.grad is not None]))

        found["optimizer"].register_step_post_hook(keep)
        return found

    monkeypatch.setattr(kind, "configure_optimizers", configure_optimizers)
    for clip in (1e9, 1e-3):
        norms[clip] = []
        torch.manual_seed(0)
        fit(
            kind(str(wide_model)),
            [batch],
            max_epochs=8 if precision == "16-mixed" else 2,
            gradient_clip_val=clip,
            **device_of(precision),
        )
    # Steps whose gradients overflow are left out, and with them what follows a step.
    steps = [len(norms[clip]) for clip in norms]
    assert steps == [2, 2] or (precision == "16-mixed" and min(steps) >= 4)
    assert min(norms[1e9]) > 2e-3
    assert [float(norm) for norm in norms[1e-3]] == pytest.approx([1e-3] * steps[1], rel=0.02)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("roles", ["separate", "shared"])
def test_ppo_starts_from_kl_0_and_ratio_1_and_computes_in_float32(
    roles: str, precision: str, wide_model: Path, prompts: PromptBatch, fit: Callable[..., Any], tmp_path: Path
) -> None:
    lora = LoRA(r=4) if roles == "shared" else None
    reward_model = load_reward_model(NetworkConfig(str(wide_model), lora=lora))
    export = "adapter" if roles == "shared" else "merged"
    save_pretrained(reward_model, load_tokenizer(wide_model), tmp_path / "reward", export=export)
    module = Watched(
        NetworkConfig(str(wide_model), lora=lora, roles=roles),
        reward=str(tmp_path / "reward"),
        minibatch_size=6,
        micro_batch_size=6,
        ppo_epochs=1,
        max_new_tokens=6,
        learning_rate=1e-2,
        critic_learning_rate=1e-2,
    )
    before = {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}
    logged = fit(module, [prompts], max_epochs=2, **device_of(precision))
    assert logged["ppo/kl"][0] == 0.0
    assert logged["ppo/approx_kl"][0] == 0.0
    assert logged["ppo/ratio"][0] == 1.0
    for network in (module.policy, module.reference, module.critic, module.reward):
        assert types(network) == {weights_of(precision)}
    after = dict(module.named_parameters())
    assert not [n for n, p in before.items() if ".norm" not in n and torch.equal(p.to(after[n]).cpu(), after[n].cpu())]
    for record in (*module.scored, *module.experiences):
        tensors = [x for x in vars(record).values() if isinstance(x, torch.Tensor) and x.is_floating_point()]
        assert len(tensors) >= 4
        assert {x.dtype for x in tensors} == {torch.float32}
    for quantities in module.quantities:
        assert {x.dtype for x in quantities.values()} == {torch.float32}
    scores = {name for name in logged.steps[0] if name.startswith("ppo/")}
    assert {module.trainer.callback_metrics[name].dtype for name in scores} == {torch.float32}


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_a_reward_function_is_read_in_float32(
    precision: str, wide_model: Path, prompts: PromptBatch, fit: Callable[..., Any]
) -> None:
    # 257 has no bfloat16.
    module = Watched(str(wide_model), reward=lambda prompts, responses: [257.0] * len(responses), minibatch_size=6)
    fit(module, [prompts], max_epochs=1, precision=precision)
    assert module.scored[-1].scores.tolist() == [257.0] * 6
