"""PPO and its stages with adapters and bits, through a real Trainer on the CPU."""

import hashlib
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from transformers import AutoModelForCausalLM

from rlhf_lightning.errors import InputError
from rlhf_lightning.modules import PPOModule, RewardModule, SFTModule
from rlhf_lightning.networks import LoRA, NetworkConfig, load_policy, load_reward_model, load_tokenizer, save_pretrained
from rlhf_lightning.networks.lora import adapter_weights, has_adapter
from rlhf_lightning.networks.plain_head import plain_head
from rlhf_lightning.networks.quantizing import dequantized, is_quantized_layer
from rlhf_lightning.preflight.phases import ppo_memory
from rlhf_lightning.types import ComparisonBatch, PromptBatch, SFTBatch

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*have no `val_dataloader`.*"),
    pytest.mark.filterwarnings("ignore:.*no pre-optimization state was saved.*"),
]

BITS = ["none", "int8", "nf4"]
TOKENS = torch.tensor([[5, 9, 7, 30, 2, 1], [8, 4, 11, 12, 13, 1], [8, 4, 21, 22, 23, 1], [5, 9, 14, 13, 2, 1]])
ALL = torch.ones(4, 6, dtype=torch.bool)
DEMONSTRATIONS = SFTBatch(tokens=TOKENS, attention_mask=ALL, loss_mask=ALL)
Make = Callable[..., PPOModule]


def moved(network: Any, seed: int = 1) -> Any:
    generator = torch.Generator().manual_seed(seed)
    for weight in adapter_weights(network).values():
        weight.data += 0.05 * torch.randn(weight.shape, generator=generator)
    return network


def network_on(base: Path, **settings: Any) -> NetworkConfig:
    return NetworkConfig(str(base), **{"lora": LoRA(r=4), **settings})


@pytest.fixture(params=BITS)
def hand_off(request: pytest.FixtureRequest, wide_model: Path, tmp_path: Path) -> tuple[Path, Path, str]:
    """Adapter folders as fine-tuning and reward training leave them, and the bits of their base."""
    network = network_on(wide_model, quantization=request.param)
    tokenizer = load_tokenizer(wide_model)
    save_pretrained(moved(load_policy(network)), tokenizer, tmp_path / "sft", export="adapter")
    reward_model = moved(load_reward_model(network), seed=2)
    save_pretrained(reward_model, tokenizer, tmp_path / "reward", export="adapter")
    return tmp_path / "sft", tmp_path / "reward", request.param


def shared(sft: Path, reward: Any, quantization: str = "none", **settings: Any) -> PPOModule:
    network = network_on(sft, quantization=quantization, roles="shared")
    defaults = {
        "ppo_epochs": 2,
        "minibatch_size": 3,
        "micro_batch_size": 3,
        "learning_rate": 1e-3,
        "critic_learning_rate": 1e-3,
        "max_new_tokens": 6,
    }
    return PPOModule(network, reward=str(reward) if isinstance(reward, Path) else reward, **{**defaults, **settings})


def hashes(network: Any) -> dict[str, str]:
    """A hash of every frozen weight; of a quantised one as its forward reads it."""
    found = {}
    for name, layer in network.named_modules():
        for key, weight in layer.named_parameters(recurse=False):
            if not weight.requires_grad:
                value = dequantized(layer, torch.float32) if is_quantized_layer(layer) else weight
                found[f"{name}.{key}"] = hashlib.sha256(value.detach().numpy().tobytes()).hexdigest()
    return found


def test_all_four_roles_stand_on_one_backbone_and_take_over_their_adapters(hand_off: tuple[Path, Path, str]) -> None:
    sft, reward, quantization = hand_off
    module = shared(sft, reward, quantization)
    reward_model = module._reward.reward_model
    bodies = [module.policy, module.reference, reward_model, module.critic.backbone]
    backbone = {id(p) for p in module.policy.parameters() if not p.requires_grad}
    for body in bodies:
        assert backbone >= {
            id(p) for name, p in body.named_parameters() if ".lora_" not in name and "score" not in name
        }
        assert has_adapter(body)
    adapters = [adapter_weights(body) for body in bodies]
    assert len({id(p) for adapter in adapters for p in adapter.values()}) == 4 * 28
    for one, other in ((0, 1), (2, 3)):
        for a, b in zip(adapters[one].values(), adapters[other].values(), strict=True):
            assert torch.equal(a, b)
    assert torch.equal(module.critic.head.weight, reward_model.score.weight)


def test_the_estimate_of_memory_counts_a_shared_backbone_once(hand_off: tuple[Path, Path, str]) -> None:
    module = shared(*hand_off)
    roles = ppo_memory(module, torch.device("cpu"), sequences=6, prompt_length=5).roles
    # Each object once, in whichever role it is.
    assert sum(role.weights for role in roles.values()) == sum(p.nbytes for p in module.parameters())
    assert roles["policy"].weights > 5 * roles["reference"].weights


def test_at_the_start_the_reference_is_the_policy_bit_for_bit(
    hand_off: tuple[Path, Path, str], prompts: PromptBatch
) -> None:
    sft, reward, quantization = hand_off
    tuned = load_policy(network_on(sft, quantization=quantization))
    module = shared(sft, reward, quantization)
    scored = module.score(module.generate(prompts, 0))
    assert torch.equal(scored.logprobs, scored.ref_logprobs)
    for network in (module.policy, module.reference):
        assert torch.equal(network(TOKENS).logits, tuned(TOKENS).logits)


def test_a_run_starts_with_kl_0_and_ratio_1_and_touches_nothing_that_is_frozen(
    hand_off: tuple[Path, Path, str], prompts: PromptBatch, fit: Callable[..., Any], tmp_path: Path
) -> None:
    sft, reward, quantization = hand_off
    module = shared(sft, reward, quantization, ppo_epochs=1, minibatch_size=6, micro_batch_size=6, ema_decay=0.5)
    frozen = {role: hashes(getattr(module, role)) for role in ("policy", "reference", "reward", "critic")}
    trained = {
        role: {name: p.detach().clone() for name, p in getattr(module, role).named_parameters() if p.requires_grad}
        for role in ("policy", "critic")
    }
    checkpoint = ModelCheckpoint(tmp_path / "checkpoints", every_n_train_steps=1, enable_version_counter=False)
    logged = fit(module, [prompts], max_epochs=3, callbacks=[checkpoint], enable_checkpointing=True)
    assert logged["ppo/kl"][0] == 0.0
    assert logged["ppo/approx_kl"][0] == 0.0
    assert logged["ppo/ratio"][0] == 1.0
    assert abs(logged["ppo/kl"][2]) > 1e-4
    for role, before in frozen.items():
        assert hashes(getattr(module, role)) == before, role
        assert before
    for role, before in trained.items():
        assert before
        for name, p in getattr(module, role).named_parameters():
            if name in before:
                # With B = 0 nowhere, every weight of an adapter has a gradient.
                assert not torch.equal(p, before[name]), f"{role}.{name}"
    assert not torch.equal(*(next(iter(adapter_weights(x).values())) for x in (module.policy, module.ema)))
    _check_checkpoint(Path(checkpoint.best_model_path), module, shared(sft, reward, quantization, ema_decay=0.5))


def _check_checkpoint(file: Path, module: PPOModule, fresh: PPOModule) -> None:
    """It holds the trained weights and their Adam states and nothing of the backbone; loading it restores them."""
    content = torch.load(file, weights_only=True)
    names = content["state_dict"].keys()
    assert all(".lora_" in name or name == "critic.head.weight" for name in names)
    assert {name.partition(".")[0] for name in names} == {"policy", "critic", "ema"}
    adapter = sum(p.numel() for p in adapter_weights(module.policy).values())
    weights = 3 * adapter + 64
    states = 2 * (2 * adapter + 64)
    assert file.stat().st_size < 4 * (weights + states) + 100_000
    fresh.load_state_dict(content["state_dict"])
    for role in ("policy", "critic", "ema"):
        for one, other in zip(getattr(module, role).parameters(), getattr(fresh, role).parameters(), strict=True):
            assert torch.equal(one, other)
    with pytest.raises(InputError, match=r"missing \['critic\.head\.weight'\]"):
        fresh.load_state_dict({k: v for k, v in content["state_dict"].items() if k != "critic.head.weight"})


def test_a_merged_folder_is_a_backbone_too_with_a_reference_without_adapter(
    wide_model: Path, prompts: PromptBatch, fit: Callable[..., Any]
) -> None:
    module = shared(wide_model, lambda prompts, responses: [float(len(r)) for r in responses])
    assert not has_adapter(module.reference)
    assert module.critic is not None
    assert has_adapter(module.critic.backbone)
    logged = fit(module, [prompts], max_epochs=2)
    assert logged["ppo/kl"][0] == 0.0
    assert abs(logged["ppo/kl"][1]) > 0


def test_shared_and_separate_roles_learn_alike(
    wide_model: Path, tmp_path: Path, prompts: PromptBatch, fit: Callable[..., Any]
) -> None:
    def score(prompts: list[str], responses: list[str]) -> list[float]:
        return [sum(ord(c) < 128 for c in text) / max(1, len(text)) for text in responses]

    found = []
    for roles in ("separate", "shared"):
        network = network_on(wide_model, roles=roles)
        module = PPOModule(network, reward=score, minibatch_size=6, max_new_tokens=6, learning_rate=1e-3)
        found.append(fit(module, [prompts], max_epochs=3).steps)
    for one, other in zip(*found, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            assert other[name] == pytest.approx(one[name], rel=1e-4, abs=1e-5), name


class InOneBackward(PPOModule):
    """PPO whose policy and critic are read together, and differentiated in one backward."""

    @property
    def passes(self) -> list[Any]:
        return [self.losses]


@pytest.mark.parametrize("settings", [{"lora": None}, {}, {"roles": "shared"}], ids=["separate", "adapters", "shared"])
def test_a_backward_for_each_network_gives_the_weights_of_one_for_both_bit_for_bit(
    settings: dict[str, Any], wide_model: Path, prompts: PromptBatch, fit: Callable[..., Any]
) -> None:
    results = []
    for module_class in (PPOModule, InOneBackward):
        module = module_class(
            network_on(wide_model, **settings),
            reward=lambda prompts, responses: [float(len(r)) for r in responses],
            minibatch_size=6,
            micro_batch_size=4,
            max_new_tokens=6,
            learning_rate=1e-3,
            critic_learning_rate=1e-3,
            entropy_coef=0.01,
            kl_penalty="loss_k2",
        )
        logged = fit(module, [prompts], max_epochs=2).steps
        results.append((module.state_dict(), logged, len(module.passes)))
    (apart, apart_logged, two), (together, together_logged, one) = results
    assert (two, one) == (2, 1)
    assert apart_logged == together_logged
    assert all(torch.equal(value, together[name]) for name, value in apart.items())


@pytest.mark.parametrize(("looks_for_unused", "passes"), [(False, 2), (True, 1)])
def test_two_processes_have_one_gradient_whether_or_not_ddp_looks_for_unused_weights(
    looks_for_unused: bool,
    passes: int,
    wide_model: Path,
    prompts: PromptBatch,
    tmp_path: Path,
    trainer: Callable[..., Any],
    make_loader: Callable[..., Any],
) -> None:
    class Halves(PPOModule):
        def train_dataloader(self) -> Any:
            return make_loader([prompts.rows(torch.arange(6)[self.global_rank :: 2])] * 2)

        def on_train_end(self) -> None:
            found = (self.state_dict(), len(self.passes), self.updates)
            torch.save(found, tmp_path / f"{self.global_rank}.pt")

    module = Halves(
        network_on(wide_model, roles="shared"),
        reward=lambda prompts, responses: [float(len(r)) for r in responses],
        minibatch_size=3,
        micro_batch_size=2,
        max_new_tokens=6,
        learning_rate=1e-3,
        critic_learning_rate=1e-3,
    )
    started = {name: value.clone() for name, value in module.state_dict().items()}
    strategy = DDPStrategy(start_method="fork", timeout=timedelta(seconds=30), find_unused_parameters=looks_for_unused)
    trainer(max_epochs=1, strategy=strategy, devices=2).fit(module)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert first[1:] == second[1:] == (passes, 8)
    assert all(torch.equal(value, second[0][name]) for name, value in first[0].items())
    assert not [name for name, value in first[0].items() if torch.equal(value, started[name])]


def test_separate_roles_with_an_adapter_train_adapters_alone(hand_off: tuple[Path, Path, str]) -> None:
    sft, reward, quantization = hand_off
    module = PPOModule(network_on(sft, quantization=quantization), reward=str(reward))
    trained = [name for name, p in module.named_parameters() if p.requires_grad]
    assert {name.partition(".")[0] for name in trained} == {"policy", "critic"}
    assert all(".lora_" in name or name == "critic.head.weight" for name in trained)
    assert module.policy.lm_head.weight is not module.reference.lm_head.weight


@pytest.mark.parametrize("lora", [None, LoRA(r=4)])
def test_policy_and_critic_can_share_a_trunk_and_its_forwards(
    lora: LoRA | None, wide_model: Path, prompts: PromptBatch, fit: Callable[..., Any]
) -> None:
    network = NetworkConfig(str(wide_model), lora=lora, roles="shared" if lora else "separate")
    module = PPOModule(
        network,
        reward=lambda prompts, responses: [float(len(r)) for r in responses],
        critic="shared_trunk",
        minibatch_size=6,
        micro_batch_size=6,
        ppo_epochs=1,
        max_new_tokens=6,
        learning_rate=1e-3,
        critic_learning_rate=1e-2,
        preflight=False,
    )
    plain_head(module.policy)  # which reads two tokens to look at the network, once
    whole: list[int] = []
    module.policy.base_model.register_forward_hook(
        lambda _, args, kwargs, output: whole.append(1) if kwargs["use_cache"] is False else None, with_kwargs=True
    )
    head = module.critic.head.weight.detach().clone()
    logged = fit(module, [prompts], max_epochs=3)
    assert len(whole) == 3 * 2  # of each rollout: one that scores it, one that updates
    assert logged["ppo/ratio"][0] == 1.0
    assert logged["ppo/kl"][0] == 0.0
    assert not torch.equal(module.critic.head.weight, head)
    assert [name for name in module.state_dict() if name.startswith("critic.")] == ["critic.head.weight"]


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_two_processes_keep_one_set_of_adapters_and_touch_nothing_frozen(
    quantization: str,
    wide_model: Path,
    tmp_path: Path,
    prompts: PromptBatch,
    trainer: Callable[..., Any],
    make_loader: Callable[..., Any],
) -> None:
    class Halves(PPOModule):
        def train_dataloader(self) -> Any:
            return make_loader([prompts.rows(torch.arange(6)[self.global_rank :: 2])] * 2)

        def on_train_end(self) -> None:
            torch.save((self.state_dict(), hashes(self)), tmp_path / f"{self.global_rank}.pt")

    network = network_on(wide_model, quantization=quantization, roles="shared")
    module = Halves(
        network,
        reward=lambda prompts, responses: [float(len(r)) for r in responses],
        minibatch_size=3,
        max_new_tokens=6,
        learning_rate=1e-3,
        optimizer="adamw_8bit",
    )
    before = hashes(module)
    started = {name: value.clone() for name, value in module.state_dict().items()}
    trainer(max_epochs=1, strategy="ddp_fork", devices=2).fit(module)
    (first, untouched), (second, also_untouched) = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert untouched == also_untouched == before
    assert first.keys() == started.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not [name for name in first if torch.equal(first[name], started[name])]


# Fine-tuning and reward training ------------------------------------------------


@pytest.mark.parametrize("quantization", BITS)
def test_fine_tuning_trains_the_adapter_alone_and_exports_it_merged_and_by_itself(
    quantization: str, wide_model: Path, fit: Callable[..., Any], tmp_path: Path
) -> None:
    module = SFTModule(network_on(wide_model, quantization=quantization), learning_rate=1e-2)
    frozen = hashes(module.policy)
    checkpoint = ModelCheckpoint(tmp_path / "checkpoints", enable_version_counter=False)
    logged = fit(module, [DEMONSTRATIONS], max_epochs=8, callbacks=[checkpoint], enable_checkpointing=True)
    assert logged["sft/loss"][-1] < 0.8 * logged["sft/loss"][0]
    assert hashes(module.policy) == frozen
    content = torch.load(checkpoint.best_model_path, weights_only=True)
    assert content["state_dict"].keys() == {f"policy.{name}" for name in adapter_weights(module.policy)}
    module.save_pretrained(tmp_path / "merged")
    module.save_pretrained(tmp_path / "adapter", export="adapter")
    logits = module.policy.eval()(TOKENS).logits
    alone = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(alone(TOKENS).logits, logits, rtol=1e-4, atol=1e-4)
    taken_over = load_policy(network_on(tmp_path / "adapter", quantization=quantization))
    assert torch.equal(taken_over(TOKENS).logits, logits)
    again = SFTModule(network_on(wide_model, quantization=quantization))
    again.load_state_dict(content["state_dict"])
    assert torch.equal(again.policy.eval()(TOKENS).logits, logits)


@pytest.mark.parametrize("quantization", BITS)
def test_a_reward_model_trains_adapter_and_head_alone(
    quantization: str, wide_model: Path, fit: Callable[..., Any], tmp_path: Path
) -> None:
    batch = ComparisonBatch(
        tokens=TOKENS,
        attention_mask=ALL,
        response_mask=ALL,
        prompt_index=torch.tensor([0, 0, 1, 1]),
        ranks=torch.tensor([0, 1, 0, 1]),
        ratings=torch.zeros(4),
    )
    module = RewardModule(network_on(wide_model, quantization=quantization), learning_rate=1e-2)
    before = module.reward_model.score.weight.detach().clone()
    frozen = hashes(module.reward_model)
    logged = fit(module, [batch], max_epochs=8)
    assert logged["reward/loss"][-1] < 0.5 * logged["reward/loss"][0]
    assert hashes(module.reward_model) == frozen
    assert not torch.equal(module.reward_model.score.weight, before)
    names = {f"reward_model.{name}" for name in adapter_weights(module.reward_model)} | {"reward_model.score.weight"}
    assert module.state_dict().keys() == names
    module.save_pretrained(tmp_path / "merged")
    module.save_pretrained(tmp_path / "adapter", export="adapter")
    scores = module(TOKENS, ALL)
    for folder in ("merged", "adapter"):
        network = network_on(tmp_path / folder, quantization=quantization if folder == "adapter" else "none")
        found = load_reward_model(network, trained=True)(TOKENS).logits.squeeze(1)
        torch.testing.assert_close(found, scores, rtol=1e-4, atol=1e-4)


def test_a_trained_network_without_adapter_is_in_its_checkpoint_whole(wide_model: Path) -> None:
    module = SFTModule(str(wide_model))
    assert module.state_dict().keys() == {f"policy.{name}" for name in module.policy.state_dict()}


@pytest.mark.parametrize("make", [SFTModule, RewardModule, lambda model: PPOModule(model, reward=len)])
def test_quantised_weights_are_not_trained(make: Callable[[NetworkConfig], Any], wide_model: Path) -> None:
    with pytest.raises(InputError, match=r"network\.quantization=int8 needs network\.lora"):
        make(NetworkConfig(str(wide_model), quantization="int8"))


def test_the_dropout_of_fine_tuning_is_not_that_of_the_adapter(wide_model: Path) -> None:
    network = network_on(wide_model, lora=LoRA(r=4, dropout=0.25))
    with pytest.raises(InputError, match="has no dropout layers"):
        SFTModule(network, dropout=0.5)
