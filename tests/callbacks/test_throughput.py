import csv
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

from rlhf_lightning.callbacks import Throughput
from rlhf_lightning.callbacks.throughput import LARGEST, compute_dtype, figures, matrix_peak
from rlhf_lightning.data import PPODataModule, RewardDataModule, SFTDataModule
from rlhf_lightning.modules import PPOModule, RewardModule, SFTModule
from rlhf_lightning.networks import NetworkConfig, load_reward_model
from rlhf_lightning.networks.flops import Reading
from rlhf_lightning.types import Experience, PromptBatch, Rollout, ScoredRollout

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*have no `val_dataloader`.*"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),
]

PHASES = ("sampling", "scoring", "updating")
PROMPTS = [f"Say {'a' * (i % 3)}." for i in range(8)]
RESPONSES = ["!" * (i % 5 + 1) for i in range(8)]
# The tokenizer has a token for each byte, and the end token follows a response.
LENGTHS = [len(prompt) + len(response) + 1 for prompt, response in zip(PROMPTS, RESPONSES, strict=True)]


def demonstrations(**settings: Any) -> SFTDataModule:
    rows = [{"prompt": p, "response": r} for p, r in zip(PROMPTS, RESPONSES, strict=True)]
    return SFTDataModule(rows, **{"batch_size": 4, "val_fraction": 0.0, **settings})


def prompts(**settings: Any) -> PPODataModule:
    return PPODataModule([{"prompt": p} for p in PROMPTS], **{"batch_size": 4, "val_fraction": 0.0, **settings})


def longer(prompts: list[Any], responses: list[str], **columns: Any) -> list[float]:
    return [float(len(response)) for response in responses]


SMALL: dict[str, Any] = {
    "reward": longer,
    "minibatch_size": 2,
    "ppo_epochs": 2,
    "max_new_tokens": 8,
    "preflight": False,
}


def fit(module: LightningModule, data: Any, folder: Path, *callbacks: Callback, **settings: Any) -> Throughput:
    throughput = Throughput()
    trainer = Trainer(
        accelerator="cpu",
        callbacks=[throughput, *callbacks],
        default_root_dir=folder,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        use_distributed_sampler=False,
        **{"max_epochs": 1, "devices": 1, "logger": CSVLogger(folder), "log_every_n_steps": 1, **settings},
    )
    trainer.fit(module, datamodule=data)
    return throughput


def logged(folder: Path) -> list[dict[str, float]]:
    """Return the rows of the log that hold throughput, without the name of the group."""
    (log,) = folder.glob("lightning_logs/version_*/metrics.csv")
    with log.open(encoding="utf-8") as file:
        found = [{name: float(x) for name, x in row.items() if x} for row in csv.DictReader(file)]
    return [
        {name.removeprefix("throughput/"): value for name, value in row.items()}
        for row in found
        if "throughput/tokens_per_second" in row
    ]


def seconds_of_a_batch(row: dict[str, float]) -> float:
    return row["seconds_step"] + row["seconds_waiting"]


class Watch(Callback):
    """Keeps the batches, the rollouts, and how long the steps took, by its own clock."""

    def __init__(self) -> None:
        self.rollouts: list[Rollout] = []
        self.batches: list[Any] = []
        self.seconds: list[float] = []

    def on_train_batch_start(self, *_: Any) -> None:
        self.begun = time.perf_counter()

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.seconds.append(time.perf_counter() - self.begun)
        self.batches.append(batch)
        if isinstance(batch, PromptBatch):
            self.rollouts.append(pl_module.scored_rollout)


# What is counted ---------------------------------------------------------------


@pytest.mark.parametrize(("every", "steps"), [(1, [0, 1]), (2, [1])])
def test_fine_tuning_counts_the_tokens_of_its_texts_and_no_padding(
    tiny_model: Path, tmp_path: Path, every: int, steps: list[int]
) -> None:
    watch = Watch()
    throughput = fit(SFTModule(str(tiny_model)), demonstrations(), tmp_path, watch, log_every_n_steps=every)
    rows = logged(tmp_path)
    assert [(row["step"], row["epoch"]) for row in rows] == [(step, 0) for step in steps]
    tokens = [row["tokens_per_second"] * every * seconds_of_a_batch(row) for row in rows]
    held = [float(batch.attention_mask.sum()) for batch in watch.batches]
    assert any(not batch.attention_mask.all() for batch in watch.batches)
    assert tokens == pytest.approx(held if every == 1 else [sum(held)], rel=1e-12)
    assert sum(tokens) == pytest.approx(sum(LENGTHS), rel=1e-12)
    whole = throughput.summary
    assert whole["tokens_per_second"] * 2 * seconds_of_a_batch(whole) == pytest.approx(sum(LENGTHS), rel=1e-12)


def test_a_reward_model_counts_each_response_with_its_prompt(tiny_model: Path, tmp_path: Path) -> None:
    rows = [{"prompt": p, "chosen": r, "rejected": "???"} for p, r in zip(PROMPTS, RESPONSES, strict=True)]
    data = RewardDataModule(rows, batch_size=4, val_fraction=0.0)
    whole = fit(RewardModule(str(tiny_model)), data, tmp_path).summary
    tokens = sum(LENGTHS) + sum(len(prompt) + len("???") + 1 for prompt in PROMPTS)
    assert whole["tokens_per_second"] * 2 * seconds_of_a_batch(whole) == pytest.approx(tokens, rel=1e-12)
    assert 0 < whole["share_of_peak"] < 1


def test_ppo_counts_its_rollouts_and_of_the_time_of_sampling_the_responses(tiny_model: Path, tmp_path: Path) -> None:
    watch = Watch()
    fit(PPOModule(str(tiny_model), **SMALL), prompts(), tmp_path, watch)
    rows = logged(tmp_path)
    assert [row["step"] for row in rows] == [0, 1]
    for row, rollout in zip(rows, watch.rollouts, strict=True):
        tokens, sampled = float(rollout.attention_mask.sum()), float(rollout.response_mask.sum())
        assert not rollout.attention_mask.all()
        assert row["tokens_per_second"] * seconds_of_a_batch(row) == pytest.approx(tokens, rel=1e-12)
        assert row["sampled_tokens_per_second"] * row["seconds_sampling"] == pytest.approx(sampled, rel=1e-12)


def test_batches_of_one_optimizer_step_are_counted_together(tiny_model: Path, tmp_path: Path) -> None:
    data = demonstrations(batch_size=2)
    fit(SFTModule(str(tiny_model)), data, tmp_path, accumulate_grad_batches=2)
    rows = logged(tmp_path)
    assert [row["step"] for row in rows] == [0, 1]
    tokens = sum(row["tokens_per_second"] * 2 * seconds_of_a_batch(row) for row in rows)
    assert tokens == pytest.approx(sum(LENGTHS), rel=1e-12)


def test_two_processes_count_the_tokens_of_both(
    tiny_model: Path, tmp_path: Path, processes: Callable[..., list[Any]]
) -> None:
    def work(rank: int) -> dict[str, float]:
        module = SFTModule(str(tiny_model))
        parallel = {"devices": 2, "strategy": DDPStrategy(), "logger": False}
        return fit(module, demonstrations(batch_size=2), tmp_path, **parallel).summary

    first, second = processes(2, work)
    assert first == second
    tokens = first["tokens_per_second"] * 2 * seconds_of_a_batch(first)
    assert tokens == pytest.approx(sum(LENGTHS), rel=1e-12)
    alone = fit(SFTModule(str(tiny_model)), demonstrations(), tmp_path, logger=False).summary
    # The operations are the same ones, and the peaks of two processes are added.
    flops = [found["flops_per_second"] * seconds_of_a_batch(found) for found in (first, alone)]
    assert flops[0] == pytest.approx(flops[1], rel=1e-12)


def test_weights_and_biases_has_them_in_its_history(
    tiny_model: Path, tmp_path: Path, wandb_records: Callable[[Path], list[Any]]
) -> None:
    logger = WandbLogger(project="fast", save_dir=tmp_path, offline=True)
    whole = fit(SFTModule(str(tiny_model)), demonstrations(), tmp_path, logger=logger, log_every_n_steps=2).summary
    logger.experiment.finish()
    (run,) = (tmp_path / "wandb").glob("offline-run-*")
    records = [record.history.item for record in wandb_records(run) if record.WhichOneof("record_type") == "history"]
    rows = [{item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in row} for row in records]
    (row,) = [row for row in rows if "throughput/tokens_per_second" in row]
    assert row["trainer/global_step"] == 1
    assert {name: row[f"throughput/{name}"] for name in whole} == whole


# Operations ---------------------------------------------------------------------


def counter_of_flops() -> FlopCounterMode:
    def added(_: Any, one: Any, other: Any, **__: Any) -> int:
        return 2 * int(one[0] * one[1] * other[1])

    # In the backward of the output layer; torch counts only the product that is not added in place.
    return FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: added})


class Counting(PPOModule):
    """Has torch count what scoring and updating take."""

    scoring = updating = 0

    def score(self, rollout: Rollout, **known: Any) -> ScoredRollout:
        with counter_of_flops() as counter:
            scored = super().score(rollout, **known)
        self.scoring = counter.get_total_flops()
        return scored

    def update(self, experience: Experience) -> dict[str, Tensor]:
        with counter_of_flops() as counter:
            metrics = super().update(experience)
        self.updating = counter.get_total_flops()
        return metrics


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"critic": "shared_trunk"},
        {"rescore": False},
        {"rescore": False, "critic": "shared_trunk"},
        {"rescore": False, "critic": "shared_trunk", "sampler": "transformers"},
        {"advantage": "rloo", "samples_per_prompt": 2},
        {"target_kl": 1e-12},
    ],
)
def test_the_operations_of_ppo_are_those_of_the_networks_that_read(
    wide_model: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    # In matrix products, which torch counts; one sequence at a time, without padding.
    network = NetworkConfig(str(wide_model), attn_implementation="eager")
    changed = {"micro_batch_size": 1, "reward": load_reward_model(network), "learning_rate": 1e-2}
    module = Counting(network, **{**SMALL, **changed, **settings})
    # In the first rollout policies are tried for what their output layer is.
    fit(module, prompts(), tmp_path, logger=False, max_steps=2)
    assert module.flops is not None
    rollout = module.scored_rollout
    assert rollout is not None
    reading = Reading.of(rollout.attention_mask, rollout.response_mask, ends_are_read=True)
    sampling = module.flops[0][0].forward(reading)
    flops = module.work(rollout).flops
    assert flops is not None
    assert float(flops - sampling) == pytest.approx(module.scoring + module.updating, rel=2e-3)


def test_texts_beside_the_rollouts_are_counted(tiny_model: Path, tmp_path: Path) -> None:
    module = PPOModule(str(tiny_model), **SMALL, ptx_coef=1.0, ptx_data=demonstrations(batch_size=8))
    whole = fit(module, prompts(), tmp_path, logger=False, max_steps=1).summary
    rollout = module.scored_rollout
    assert rollout is not None
    # 2 passes of 2 minibatches, and a batch of all texts with each.
    tokens = float(rollout.attention_mask.sum()) + 4 * sum(LENGTHS)
    assert whole["tokens_per_second"] * seconds_of_a_batch(whole) == pytest.approx(tokens, rel=1e-12)
    read = module.work(rollout).flops
    module._texts = []
    without = module.work(rollout).flops
    assert read is not None
    assert without is not None
    assert module.flops is not None
    text = torch.tensor(LENGTHS)
    # Of a demonstration the response is predicted, with its end token.
    predicted = torch.tensor(sum(len(response) + 1 for response in RESPONSES))
    reading = Reading(text.sum(), text.square().sum(), predicted, predicted)
    assert float(read - without) == pytest.approx(4 * float(module.flops[0][0].training(reading)), rel=1e-5)


def test_what_is_not_known_is_left_out(tiny_model: Path, tmp_path: Path) -> None:
    module = SFTModule(str(tiny_model))
    module.policy.model.layers[0].mlp.register_parameter("experts", torch.nn.Parameter(torch.zeros(2, 3, 4)))
    whole = fit(module, demonstrations(), tmp_path, logger=False).summary
    assert "tokens_per_second" in whole
    assert not {"flops_per_second", "share_of_peak"} & whole.keys()


def test_the_peak_is_that_of_the_products_of_the_run(tiny_model: Path, tmp_path: Path) -> None:
    cpu = torch.device("cpu")
    begun = time.process_time()
    peak = matrix_peak.__wrapped__(cpu, torch.float32)
    assert time.process_time() - begun < 1
    one = torch.randn(512, 512)
    seconds = []
    for _ in range(5):
        begun = time.process_time()
        one @ one
        seconds.append(time.process_time() - begun)
    assert peak == pytest.approx(2 * 512**3 / min(seconds), rel=0.7)
    assert LARGEST == 8192


@pytest.mark.parametrize(
    ("precision", "dtype"), [("32-true", torch.float32), ("bf16-mixed", torch.bfloat16), ("64-true", torch.float64)]
)
def test_the_type_of_the_products_is_that_of_the_precision(
    tiny_model: Path, tmp_path: Path, precision: Any, dtype: torch.dtype
) -> None:
    found: list[torch.dtype] = []

    class Look(Callback):
        def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            found.append(compute_dtype(trainer, pl_module))

    fit(SFTModule(str(tiny_model)), demonstrations(), tmp_path, Look(), logger=False, precision=precision, max_steps=1)
    assert found == [dtype]


def test_noise_is_drawn_from_nothing_that_training_draws_from(tiny_model: Path, tmp_path: Path) -> None:
    matrix_peak.cache_clear()
    before = torch.get_rng_state()
    matrix_peak(torch.device("cpu"), torch.float32)
    assert torch.equal(torch.get_rng_state(), before)


# Where the time goes --------------------------------------------------------------


def test_phases_add_up_to_the_step_and_the_shares_to_one(tiny_model: Path, tmp_path: Path) -> None:
    watch = Watch()
    module = PPOModule(str(tiny_model), **{**SMALL, "max_new_tokens": 48, "ppo_epochs": 16, "minibatch_size": 1})
    fit(module, prompts(), tmp_path, watch)
    for row, seconds in zip(logged(tmp_path), watch.seconds, strict=True):
        assert all(row[f"seconds_{phase}"] > 0 for phase in PHASES)
        phases = sum(row[f"seconds_{phase}"] for phase in PHASES)
        # The first step does beside them what is done once in a process.
        assert (0.93 if row["step"] else 0.7) * row["seconds_step"] < phases < row["seconds_step"]
        # By another clock: that of the step, and of what is around it.
        assert 0.8 * seconds < row["seconds_step"] < seconds
        assert row["share_step"] + row["share_waiting"] == pytest.approx(1, rel=1e-9)
        assert row["share_sampling"] == pytest.approx(row["seconds_sampling"] / seconds_of_a_batch(row), rel=1e-9)


class Slow(SFTDataModule):
    """Takes a while over each batch."""

    def train_dataloader(self) -> Any:
        return SlowBatches(super().train_dataloader())


class SlowBatches:
    def __init__(self, batches: DataLoader[Any]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Any:
        for batch in self.batches:
            time.sleep(0.2)
            yield batch


def test_waiting_for_data_is_seen(tiny_model: Path, tmp_path: Path) -> None:
    rows = [{"prompt": p, "response": r} for p, r in zip(PROMPTS, RESPONSES, strict=True)]
    whole = fit(SFTModule(str(tiny_model)), Slow(rows, batch_size=4, val_fraction=0.0), tmp_path, logger=False).summary
    assert whole["seconds_waiting"] >= 0.2
    assert whole["share_waiting"] == pytest.approx(whole["seconds_waiting"] / seconds_of_a_batch(whole), rel=1e-9)


def test_validation_and_callbacks_are_not_in_it(tiny_model: Path, tmp_path: Path) -> None:
    class Busy(Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            time.sleep(0.2)

        def on_validation_start(self, *_: Any) -> None:
            time.sleep(0.2)

    watch = Watch()
    module = PPOModule(str(tiny_model), **SMALL)
    data = prompts(batch_size=2, val_fraction=0.5)
    whole = fit(module, data, tmp_path, watch, Busy(), logger=False, val_check_interval=1).summary
    assert "ppo/val_score" in module.trainer.callback_metrics
    assert seconds_of_a_batch(whole) < sum(watch.seconds) / len(watch.seconds) - 0.15
    phases = sum(whole[f"seconds_{phase}"] for phase in PHASES)
    assert phases < whole["seconds_step"]


# The run that is measured ----------------------------------------------------------


def test_nothing_of_it_is_a_metric_of_the_module_or_part_of_a_checkpoint(tiny_model: Path, tmp_path: Path) -> None:
    module = SFTModule(str(tiny_model))
    throughput = fit(module, demonstrations(), tmp_path)
    assert not [name for name in module.trainer.callback_metrics if "throughput" in name]
    assert throughput.state_dict() == {}


def test_the_profiler_of_the_trainer_is_given_back_also_after_an_error(tiny_model: Path, tmp_path: Path) -> None:
    class Stop(Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            raise ZeroDivisionError

    module = SFTModule(str(tiny_model))
    with pytest.raises(ZeroDivisionError):
        fit(module, demonstrations(), tmp_path, Stop(), logger=False)
    assert not {"start", "stop"} & set(vars(module.trainer.profiler))  # type: ignore[attr-defined]


class Plain(LightningModule):
    """A module that does not say what its batches are."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return (self.weight * batch.float()).sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(range(4))  # type: ignore[arg-type]


def test_a_module_that_is_not_measured_is_left_alone(tmp_path: Path) -> None:
    assert fit(Plain(), None, tmp_path, logger=False).summary == {}


def test_the_figures_are_those_of_all_processes() -> None:
    sums = {"seconds_waiting": 1.0, "seconds_step": 7.0, "seconds_sampling": 4.0, "batches": 4.0}
    sums |= {"tokens": 80.0, "sampled_tokens": 20.0, "flops": 400.0}
    # Two processes took four seconds for two batches each.
    assert figures(sums, peak=200.0, processes=2) == {
        "tokens_per_second": 20.0,
        "sampled_tokens_per_second": 10.0,
        "flops_per_second": 100.0,
        "share_of_peak": 0.5,
        "seconds_waiting": 0.25,
        "seconds_step": 1.75,
        "seconds_sampling": 1.0,
        "share_waiting": 0.125,
        "share_step": 0.875,
        "share_sampling": 0.5,
    }
