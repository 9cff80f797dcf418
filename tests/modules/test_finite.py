"""NaN from real networks: an embedding that is NaN spoils the batches with its token, and no others."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback, LightningModule
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn

from rlhf_lightning.errors import InputError
from rlhf_lightning.functional.kl import adapted_beta
from rlhf_lightning.modules import PPOModule, RewardModule, SFTModule
from rlhf_lightning.modules.batch_file import read_records
from rlhf_lightning.modules.finite import BadUpdates
from rlhf_lightning.types import ComparisonBatch, Experience, PromptBatch, ScoredRollout, SFTBatch

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*have no `val_dataloader`.*"),
]

POISON = 200
"""The token whose embedding is NaN."""


def poisoned(network: Any) -> Any:
    embedding = next(part for part in network.modules() if isinstance(part, nn.Embedding))
    with torch.no_grad():
        embedding.weight[POISON] = torch.nan
    return network


def tokens_of(first: int, *, poison: bool) -> Tensor:
    tokens = torch.arange(first, first + 12).reshape(2, 6)
    tokens[1, 2] = POISON if poison else first
    return tokens


def texts(first: int, *, poison: bool = False) -> SFTBatch:
    mask = torch.ones(2, 6, dtype=torch.bool)
    loss_mask = mask.clone()
    loss_mask[:, 0] = False
    return SFTBatch(tokens=tokens_of(first, poison=poison), attention_mask=mask, loss_mask=loss_mask)


def pair(first: int, *, poison: bool = False) -> ComparisonBatch:
    mask = torch.ones(2, 6, dtype=torch.bool)
    return ComparisonBatch(
        tokens=tokens_of(first, poison=poison),
        attention_mask=mask,
        response_mask=mask & (torch.arange(6) > 1),
        prompt_index=torch.zeros(2, dtype=torch.long),
        ranks=torch.arange(2),
        ratings=torch.zeros(2),
    )


Stage = tuple[Callable[..., LightningModule], Callable[..., Any]]
"""Makes the module, and a batch of it that begins with a token."""


@pytest.fixture(params=["sft", "reward"])
def stage(
    request: pytest.FixtureRequest, policy: Callable[..., Any], classifier: Callable[..., Any], tokenizer: Any
) -> Stage:
    # The schedule is in its warm-up, so that every step of it shows in the weights.
    settings: dict[str, Any] = {"learning_rate": 1e-2, "warmup_steps": 50, "tokenizer": tokenizer}
    if request.param == "sft":
        return lambda **more: SFTModule(poisoned(policy()), **settings, **more), texts
    return lambda **more: RewardModule(poisoned(classifier()), shift_scores=False, **settings, **more), pair


def assert_same(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    for name, weight in first.items():
        torch.testing.assert_close(second[name], weight, rtol=0, atol=0, equal_nan=True, msg=name)


def test_a_bad_update_changes_nothing_and_is_reported_with_its_batch(
    stage: Stage,
    fit: Callable[..., Any],
    weights: Callable[..., Any],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    make, batch = stage
    with_it, without = make(), make()
    fit(with_it, [batch(10), batch(30, poison=True), batch(50)], max_epochs=1)
    (said,) = [record.message for record in caplog.records if record.levelname == "WARNING"]
    fit(without, [batch(10), batch(50)], max_epochs=1)
    # Weights, moments and schedule: each of them would move the last step.
    assert_same(weights(without), weights(with_it))
    (file,) = (tmp_path / "bad_updates").iterdir()
    assert "update 1 is skipped: the loss is not finite (1 in a row, max_bad_updates=3 ends the run)" in said
    assert str(file) in said
    (kept,), notes = read_records(file)
    assert_same(vars(batch(30, poison=True)), vars(kept))
    assert notes == {"update": "1", "what": "the loss is not finite"}


def test_as_many_bad_updates_in_a_row_as_allowed_end_the_run(
    stage: Stage, fit: Callable[..., Any], weights: Callable[..., Any], tmp_path: Path
) -> None:
    make, batch = stage
    good, bad = batch(10), batch(30, poison=True)
    fit(make(max_bad_updates=2), [bad, good, bad, good], max_epochs=1)
    module = make(max_bad_updates=2)
    before = weights(module)
    with pytest.raises(InputError, match=r"max_bad_updates=2: .*in a row.*update 1: the loss is not finite.*replay="):
        fit(module, [bad, bad, good], max_epochs=1)
    assert_same(before, weights(module))


def test_a_run_that_goes_on_counts_on(
    policy: Callable[..., Any], trainer: Callable[..., Any], make_loader: Callable[..., Any], tmp_path: Path
) -> None:
    bad = [texts(10, poison=True)]
    first = trainer(max_epochs=1)
    first.fit(SFTModule(poisoned(policy()), max_bad_updates=2), make_loader(bad))
    first.save_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(InputError, match="max_bad_updates=2"):
        trainer(max_epochs=2).fit(
            SFTModule(poisoned(policy()), max_bad_updates=2), make_loader(bad), ckpt_path=tmp_path / "a.ckpt"
        )


def test_all_batches_of_an_accumulated_update_are_kept(
    policy: Callable[..., Any], fit: Callable[..., Any], tmp_path: Path
) -> None:
    batches = [texts(10), texts(30, poison=True), texts(50), texts(70)]
    fit(SFTModule(poisoned(policy())), batches, max_epochs=1, accumulate_grad_batches=2)
    (file,) = (tmp_path / "bad_updates").iterdir()
    kept, _ = read_records(file)
    assert [int(record.tokens[0, 0]) for record in kept] == [10, 30]  # type: ignore[attr-defined]


def test_a_gradient_alone_makes_an_update_bad(
    policy: Callable[..., Any], fit: Callable[..., Any], weights: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    module = SFTModule(policy(), learning_rate=1e-2)
    before = weights(module)
    module.policy.get_input_embeddings().weight.register_hook(lambda gradient: gradient * torch.inf)
    fit(module, [texts(10)], max_steps=1)
    assert "the gradient is not finite" in caplog.text
    assert_same(before, weights(module))


@pytest.mark.parametrize("limit", [0, -1, 1.5])
def test_a_limit_that_is_no_number_of_updates_is_refused(limit: Any) -> None:
    with pytest.raises(InputError, match=f"max_bad_updates={limit} must be a whole number, 1 or more"):
        BadUpdates(limit)


def test_nothing_is_lost_where_the_file_cannot_be_written(
    policy: Callable[..., Any], fit: Callable[..., Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "bad_updates").write_text("in the way", encoding="utf-8")
    fit(SFTModule(poisoned(policy())), [texts(10, poison=True), texts(30)], max_epochs=1)
    assert "cannot be written" in caplog.text


# PPO -------------------------------------------------------------------------


class States(Callback):
    """What stands before each rollout, and after the last."""

    def __init__(self) -> None:
        self.found: list[dict[str, Any]] = []

    def _note(self, module: Any) -> None:
        optimizer = module._optimizer
        moments = {f"{kind}.{i}": x.clone() for i, s in enumerate(optimizer.state.values()) for kind, x in s.items()}
        weights = {name: x.clone() for name, x in module.state_dict().items()}
        self.found.append({"tensors": weights | moments, "beta": module.beta, "updates": module.updates})

    def on_train_batch_start(self, trainer: Any, module: Any, *_: Any) -> None:
        self._note(module)

    def on_train_end(self, trainer: Any, module: Any) -> None:
        self._note(module)


class Rates(PPOModule):
    """Keeps the learning rate of every update."""

    def configure_model(self) -> None:
        super().configure_model()
        self.rates: list[float] = []

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.rates.append(optimizer.param_groups[0]["lr"])
        super().on_before_optimizer_step(optimizer)


def low_bytes(prompts: list[str], responses: list[str], **columns: Any) -> list[float]:
    return [sum(ord(c) < 128 for c in text) / max(1, len(text)) for text in responses]


PPO: dict[str, Any] = {
    "reward": low_bytes,
    "preflight": False,
    "max_new_tokens": 5,
    "minibatch_size": 3,
    "micro_batch_size": 2,
    "ppo_epochs": 1,
    "seed": 1,
    "learning_rate": 1e-3,
    "warmup_steps": 100,
    "adaptive_kl_target": 1e-3,
    "adaptive_kl_horizon": 100.0,
    "ema_decay": 0.5,
}


def test_a_rollout_whose_values_are_not_finite_is_skipped_and_moves_neither_schedule_nor_kl_control(
    policy: Callable[..., Any], tokenizer: Any, prompts: PromptBatch, fit: Callable[..., Any], tmp_path: Path
) -> None:
    module = Rates(policy(), tokenizer=tokenizer, **PPO)
    poisoned(module.critic)
    spoilt = replace(prompts, prompt_tokens=prompts.prompt_tokens.clone())
    spoilt.prompt_tokens[0, -1] = POISON
    states = States()
    logged = fit(module, [prompts, spoilt, prompts], max_epochs=1, callbacks=[states])
    first, before, after, last = states.found
    assert_same(before["tensors"], after["tensors"])
    assert before["beta"] == after["beta"]
    # What an update that is made moves.
    assert first["beta"] != before["beta"] != last["beta"]
    name = "ema.lm_head.weight"
    assert not torch.equal(first["tensors"][name], before["tensors"][name])
    # Two updates a rollout: the warm-up goes on with its third step in the third rollout.
    expected = [1e-3 * (step + 1) / 201 for step in (0, 1, 2, 2, 2, 3)]
    assert module.rates == pytest.approx(expected)
    assert logged["ppo/updates"] == [2, 4, 6]
    files = sorted(path.name for path in (tmp_path / "bad_updates").iterdir())
    assert files == ["ppo-2-process-0.safetensors", "ppo-3-process-0.safetensors"]
    (kept,), _ = read_records(tmp_path / "bad_updates" / files[0])
    assert isinstance(kept, Experience)
    assert len(kept) == 3


def test_a_bad_update_among_good_ones_counts_for_its_share_of_the_kl_control(
    policy: Callable[..., Any], tokenizer: Any, prompts: PromptBatch, fit: Callable[..., Any]
) -> None:
    class OneReturn(PPOModule):
        def experience(self, scored: ScoredRollout, parts: dict[str, Tensor]) -> Experience:
            found = super().experience(scored, parts)
            found.returns[0] = torch.nan
            return found

    module = OneReturn(policy(), tokenizer=tokenizer, **{**PPO, "beta": 1.0})
    logged = fit(module, [prompts], max_steps=1)
    # The other update is what is logged, and half of the six responses steer beta.
    assert logged["ppo/value_loss"][0] < float("inf")
    kl = logged["ppo/kl"][0]
    assert module.beta == pytest.approx(adapted_beta(1.0, kl, target=1e-3, horizon=100.0, episodes=3))
    assert module.beta != 1.0


def test_bad_updates_end_a_ppo_run_within_its_rollout(
    policy: Callable[..., Any],
    tokenizer: Any,
    prompts: PromptBatch,
    fit: Callable[..., Any],
    weights: Callable[..., Any],
) -> None:
    module = PPOModule(policy(), tokenizer=tokenizer, **{**PPO, "ppo_epochs": 4})
    for weight in module.critic.parameters():  # type: ignore[union-attr]
        torch.nn.init.constant_(weight, torch.nan)
    before = weights(module)
    with pytest.raises(InputError, match=r"max_bad_updates=3: .*update 2: the loss is not finite"):
        fit(module, [prompts], max_steps=1)
    assert_same(before, weights(module))


# Several processes -----------------------------------------------------------


def test_what_is_not_finite_on_one_process_is_skipped_on_both(
    stage: Stage, trainer: Callable[..., Any], make_loader: Callable[..., Any], tmp_path: Path
) -> None:
    make, batch = stage
    parts = {
        1: [[batch(10), batch(50)]],
        2: [[batch(10), batch(30), batch(50)], [batch(10), batch(30, poison=True), batch(50)]],
    }

    class Parts(Callback):
        def on_train_end(self, trainer: Any, module: Any) -> None:
            torch.save(module.state_dict(), tmp_path / f"{trainer.world_size}-{trainer.global_rank}.pt")

    for settings in ({}, {"strategy": "ddp_fork", "devices": 2}):
        module = make()
        module.train_dataloader = lambda module=module: make_loader(
            parts[module.trainer.world_size][module.global_rank]
        )
        trainer(max_epochs=1, callbacks=[Parts()], **settings).fit(module)
    one, first, second = (torch.load(tmp_path / f"{name}.pt") for name in ("1-0", "2-0", "2-1"))
    for name, weight in one.items():
        torch.testing.assert_close(first[name], weight, rtol=1e-4, atol=1e-6, equal_nan=True)
    assert_same(first, second)
    # The process with the cause has it.
    (kept,) = (path.name for path in (tmp_path / "bad_updates").iterdir())
    assert kept == f"{module.stage}-1-process-1.safetensors"


def test_a_ppo_rollout_that_is_not_finite_on_one_process_is_skipped_on_both(
    policy: Callable[..., Any],
    tokenizer: Any,
    prompts: PromptBatch,
    trainer: Callable[..., Any],
    make_loader: Callable[..., Any],
    tmp_path: Path,
) -> None:
    spoilt = replace(prompts, prompt_tokens=prompts.prompt_tokens.clone())
    spoilt.prompt_tokens[:, -1] = POISON

    class Kept(Callback):
        def on_train_batch_start(self, trainer: Any, module: Any, _: Any, index: int) -> None:
            self.keep(module, index)

        def on_train_end(self, trainer: Any, module: Any) -> None:
            self.keep(module, 3)

        def keep(self, module: Any, index: int) -> None:
            known = {"beta": torch.tensor(module.beta), **module.state_dict()}
            torch.save(known, tmp_path / f"{index}-{module.global_rank}.pt")

    class Parts(PPOModule):
        def train_dataloader(self) -> Any:
            return make_loader([prompts, spoilt if self.global_rank else prompts, prompts])

    module = Parts(policy(), tokenizer=tokenizer, **PPO)
    poisoned(module.critic)
    trainer(max_epochs=1, callbacks=[Kept()], strategy="ddp_fork", devices=2).fit(module)
    found = [[torch.load(tmp_path / f"{i}-{rank}.pt") for i in range(4)] for rank in range(2)]
    for one, other in zip(*found, strict=True):
        assert_same(one, other)
    # The second rollout did nothing, the others something.
    start, before, after, end = found[0]
    assert_same(before, after)
    assert start["beta"] != before["beta"] != end["beta"]
    # Advantages are whitened over both, so that both have a loss to keep.
    files = sorted(path.name for path in (tmp_path / "bad_updates").iterdir())
    assert files == [f"ppo-{update}-process-{rank}.safetensors" for update in (2, 3) for rank in (0, 1)]


# Overflow under 16-mixed -----------------------------------------------------


@pytest.fixture
def half() -> Callable[[float], MixedPrecision]:
    """16-mixed on the CPU, which Lightning offers on CUDA only, at a loss scale."""
    return lambda scale: MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=scale))


def test_an_overflow_is_skipped_without_moving_the_schedule_and_is_not_bad(
    policy: Callable[..., Any], fit: Callable[..., Any], weights: Callable[..., Any], half: Any, tmp_path: Path
) -> None:
    module = SFTModule(policy(), learning_rate=1e-2, max_bad_updates=1, lr_schedule="linear")
    before = weights(module)
    plugin = half(2.0**40)
    fit(module, [texts(10), texts(30)], max_epochs=1, plugins=[plugin])
    assert_same(before, weights(module))
    assert module.trainer.lr_scheduler_configs[0].scheduler.last_epoch == 0  # type: ignore[union-attr]
    assert module.bad_updates.state_dict() == {"in_a_row": 0, "skipped": 2}
    assert plugin.scaler.get_scale() == 2.0**38
    assert not (tmp_path / "bad_updates").exists()
    fit(module, [texts(10), texts(30)], max_epochs=1, plugins=[half(2.0**4)])
    assert module.bad_updates.skipped == 2
    assert module.trainer.lr_scheduler_configs[0].scheduler.last_epoch == 2  # type: ignore[union-attr]


def test_an_overflow_in_ppo_moves_neither_schedule_nor_kl_control(
    policy: Callable[..., Any], tokenizer: Any, prompts: PromptBatch, fit: Callable[..., Any], half: Any
) -> None:
    module = Rates(policy(), tokenizer=tokenizer, **{**PPO, "max_bad_updates": 1})
    states = States()
    fit(module, [prompts] * 2, max_epochs=1, plugins=[half(2.0**40)], callbacks=[states])
    before, _, after = states.found
    assert_same(before["tensors"], after["tensors"])
    assert before["beta"] == after["beta"]
    assert module.rates == pytest.approx([1e-3 / 201] * 4)


def test_at_the_smallest_scale_a_gradient_that_is_not_finite_is_bad(
    policy: Callable[..., Any], fit: Callable[..., Any], half: Any
) -> None:
    def module() -> SFTModule:
        found = SFTModule(policy(), max_bad_updates=1)
        found.policy.get_input_embeddings().weight.register_hook(lambda gradient: gradient * torch.inf)
        return found

    fit(module(), [texts(10)], max_steps=1, plugins=[half(2.0)])
    with pytest.raises(InputError, match="the gradient is not finite"):
        fit(module(), [texts(10)], max_steps=1, plugins=[half(1.0)])
