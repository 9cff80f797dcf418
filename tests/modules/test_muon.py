"""Muon: which weights it steps, how far, that it learns beside AdamW, and that a resumed run is exact."""

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Trainer
from lightning.pytorch.strategies import ModelParallelStrategy

from rlhf_lightning.errors import InputError
from rlhf_lightning.functional import muon
from rlhf_lightning.functional.muon import by_kind
from rlhf_lightning.modules import PPOModule, RewardModule, SFTModule
from rlhf_lightning.modules.muon import MuonWithAdamW
from rlhf_lightning.networks import LoRA, NetworkConfig
from rlhf_lightning.types import SFTBatch

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*have no `val_dataloader`.*"),
]

TOKENS = torch.tensor([[5, 9, 7, 30, 2, 1], [8, 4, 11, 12, 13, 1]])
ALL = torch.ones(2, 6, dtype=torch.bool)
BATCH = SFTBatch(tokens=TOKENS, attention_mask=ALL, loss_mask=ALL)
NETWORK = {"matrix": (64, 96), "tall": (96, 32), "table": (40, 64), "gains": (64,), "experts": (3, 16, 8)}
"""Shapes of weights, of which the table is no matrix of a block."""


def weights(seed: int = 0) -> dict[str, torch.nn.Parameter]:
    noise = torch.Generator().manual_seed(seed)
    return {name: torch.nn.Parameter(torch.randn(shape, generator=noise)) for name, shape in NETWORK.items()}


def optimizer_of(network: dict[str, torch.nn.Parameter], **settings: float) -> MuonWithAdamW:
    settings = {"lr": 1e-2, "weight_decay": 0.0, **settings}
    matrices, others = by_kind(network.values(), [network["table"]])
    return MuonWithAdamW(matrices, torch.optim.AdamW(others, **settings), **settings)  # type: ignore[arg-type]


def step(network: dict[str, torch.nn.Parameter], *optimizers: Any, seed: int) -> None:
    for weight, gradient in zip(network.values(), weights(100 + seed).values(), strict=True):
        weight.grad = gradient.detach()
    for optimizer in optimizers:
        optimizer.step()


def test_matrices_are_stepped_by_muon_and_all_else_by_adamw_at_the_same_rate() -> None:
    ours, theirs = weights(), weights()
    optimizer = optimizer_of(ours, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: 1 / (1 + done))
    matrices = [theirs["matrix"], theirs["tall"]]
    others = [theirs[name] for name in ("table", "gains", "experts")]
    torchs = torch.optim.Muon(matrices, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    before = weights()
    adamw = torch.optim.AdamW(others, weight_decay=0.1)
    for number in range(4):
        for group in (*torchs.param_groups, *adamw.param_groups):
            group["lr"] = 1e-2 / (1 + number)
        step(ours, optimizer, seed=number)
        step(theirs, torchs, adamw, seed=number)
        schedule.step()
    for name, weight in ours.items():
        apart = float((weight - theirs[name]).detach().norm() / (theirs[name] - before[name]).detach().norm())
        # Torch makes matrices orthogonal in bfloat16.
        assert apart < (0.02 if name in ("matrix", "tall") else 1e-6), name


@pytest.mark.parametrize("name", ["matrix", "tall"])
def test_a_step_of_a_matrix_is_orthogonal_and_a_fifth_of_the_rate_in_each_number(name: str) -> None:
    network = weights()
    before = network[name].detach().clone()
    step(network, optimizer_of(network, lr=1e-2), seed=0)
    moved = network[name].detach() - before
    assert 0.15 < float(moved.square().mean().sqrt()) / 1e-2 < 0.25
    found = torch.linalg.svdvals(moved)
    given = torch.linalg.svdvals(weights(100)[name].detach())
    assert float(found.max() / found.min()) < 2 < float(given.max() / given.min())


def test_matrices_are_stepped_alike_alone_and_together(monkeypatch: Any) -> None:
    shapes = [(8, 24), (24, 8), (8, 24)]
    together, alone = ([torch.nn.Parameter(torch.zeros(shape)) for shape in shapes] for _ in range(2))
    for number, pair in enumerate(zip(together, alone, strict=True)):
        for weight in pair:
            weight.grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(number))
    nothing = torch.optim.AdamW([{"params": []}])
    MuonWithAdamW(together, nothing, lr=1.0).step()
    monkeypatch.setattr(muon, "TOGETHER", 1)
    MuonWithAdamW(alone, nothing, lr=1.0).step()
    for one, other in zip(together, alone, strict=True):
        assert one.any()
        torch.testing.assert_close(one, other, rtol=0, atol=2e-6)


def test_the_state_is_restored_exactly() -> None:
    whole = weights()
    optimizer = optimizer_of(whole)
    for number in range(3):
        step(whole, optimizer, seed=number)
    resumed = {name: torch.nn.Parameter(weight.detach().clone()) for name, weight in whole.items()}
    other = optimizer_of(resumed, lr=1.0)
    other.load_state_dict(deepcopy(optimizer.state_dict()))
    for number in range(3, 6):
        step(whole, optimizer, seed=number)
        step(resumed, other, seed=number)
    for name, weight in whole.items():
        assert torch.equal(weight, resumed[name]), name


def test_weights_without_a_gradient_stay() -> None:
    network = weights()
    optimizer = optimizer_of(network)
    step(network, optimizer, seed=0)
    before = {name: weight.detach().clone() for name, weight in network.items()}
    optimizer.zero_grad()
    optimizer.step()
    for name, weight in network.items():
        assert torch.equal(weight, before[name]), name


@pytest.mark.parametrize("name", ["matrix", "gains"])
def test_one_kind_of_weights_is_enough(name: str) -> None:
    weight = weights()[name]
    matrices, others = by_kind([weight], [])
    optimizer = MuonWithAdamW(matrices, torch.optim.AdamW([{"params": others}], fused=True), lr=1e-2)
    weight.grad = torch.ones_like(weight)
    before = weight.detach().clone()
    assert optimizer.step(lambda: 5.0 if torch.is_grad_enabled() else None) == 5.0
    assert not torch.equal(weight, before)


def test_fine_tuning_learns_and_embeddings_and_the_output_layer_have_moments_of_adamw(
    wide_model: Path, fit: Callable[..., Any]
) -> None:
    module = SFTModule(str(wide_model), optimizer="muon", learning_rate=1e-2)
    logged = fit(module, [BATCH], max_epochs=6)
    assert logged["sft/loss"][-1] < 0.5 * logged["sft/loss"][0]
    optimizer: Any = module.trainer.optimizers[0]
    states = {name: set(optimizer.state[weight]) for name, weight in module.named_parameters()}
    by_muon = {name for name, state in states.items() if state == {"momentum"}}
    assert by_muon == {name for name in states if ".layers." in name and "norm" not in name}
    assert by_muon
    assert all(states[name] == {"step", "exp_avg", "exp_avg_sq"} for name in states.keys() - by_muon)


def test_adapters_are_trained_as_well(wide_model: Path, fit: Callable[..., Any]) -> None:
    module = SFTModule(NetworkConfig(str(wide_model), lora=LoRA(r=4)), optimizer="muon", learning_rate=3e-2)
    logged = fit(module, [BATCH], max_epochs=8)
    assert logged["sft/loss"][-1] < 0.8 * logged["sft/loss"][0]


def test_a_resumed_run_goes_on_bit_for_bit(wide_model: Path, tmp_path: Path) -> None:
    def trained(steps: int, **fit: Any) -> tuple[SFTModule, Trainer]:
        module = SFTModule(str(wide_model), optimizer="muon", learning_rate=1e-2, lr_schedule="constant")
        quiet: dict[str, Any] = dict.fromkeys(("logger", "enable_progress_bar", "enable_checkpointing"), False)
        trainer = Trainer(accelerator="cpu", max_steps=steps, enable_model_summary=False, **quiet)
        trainer.fit(module, torch.utils.data.DataLoader([BATCH], batch_size=None), **fit)
        return module, trainer

    trained(3)[1].save_checkpoint(tmp_path / "half.ckpt")
    resumed, whole = trained(6, ckpt_path=tmp_path / "half.ckpt", weights_only=False)[0], trained(6)[0]
    for (name, weight), expected in zip(resumed.named_parameters(), whole.parameters(), strict=True):
        assert torch.equal(weight, expected), name


def test_shards_are_refused(wide_model: Path, fit: Callable[..., Any]) -> None:
    strategy = ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=1)
    with pytest.raises(InputError, match=r"module\.optimizer=muon: ModelParallelStrategy cuts weights into shards"):
        fit(SFTModule(str(wide_model), optimizer="muon"), [BATCH], max_epochs=1, strategy=strategy)


def test_it_is_for_fine_tuning_and_reward_models(tiny_model: Path) -> None:
    assert RewardModule(str(tiny_model), optimizer="muon").optimizer == "muon"
    said = (
        "optimizer=muon must be one of adamw, adamw_8bit, paged_adamw_8bit: Muon is for fine-tuning and reward models$"
    )
    with pytest.raises(InputError, match=said):
        PPOModule(str(tiny_model), reward=len, optimizer="muon")  # type: ignore[arg-type]
