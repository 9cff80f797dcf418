"""What the three DataModules share, shown on the one for fine-tuning."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf_lightning.data import SFTDataModule
from rlhf_lightning.data.datamodule import split_by_group
from rlhf_lightning.data.reading import Row
from rlhf_lightning.errors import InputError
from rlhf_lightning.jsonl import write_rows
from rlhf_lightning.types import SFTBatch

# Lightning 2.6 under torch 2.15 uses what torch deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")

ROWS = [{"prompt": f"Count to {i}.", "response": "-" * i} for i in range(1, 31)]


class Recorder(LightningModule):
    """Reads batches and remembers them."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None = None, max_positions: int | None = None) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.max_positions = max_positions
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.read: list[list[list[int]]] = []
        self.validated: list[list[int]] = []

    def on_train_epoch_start(self) -> None:
        self.read.append([])

    def training_step(self, batch: SFTBatch, batch_idx: int) -> Tensor:
        self.read[-1] += sequences(batch)
        return self.weight * batch.loss_mask.sum()

    def validation_step(self, batch: SFTBatch, batch_idx: int) -> None:
        self.validated += sequences(batch)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class NetworkWithoutTokenizer(LightningModule):
    """Somebody's module that knows nothing of this package."""


def sequences(batch: SFTBatch) -> list[list[int]]:
    return [tokens[mask].tolist() for tokens, mask in zip(batch.tokens, batch.attention_mask, strict=True)]


def trainer(**settings: Any) -> Trainer:
    return Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **settings,
    )


def test_the_trainer_brings_the_modules_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    module, data = Recorder(tokenizer), SFTDataModule(ROWS, val_fraction=0.2)
    trainer(max_epochs=1).fit(module, data)
    assert data.tokenizer is tokenizer
    assert (len(module.read[0]), len(module.validated)) == (24, 6)


def test_each_epoch_reads_every_training_row_once_in_a_new_order(tokenizer: PreTrainedTokenizerBase) -> None:
    module, data = Recorder(tokenizer), SFTDataModule(ROWS)
    trainer(max_epochs=3).fit(module, data)
    expected = sorted(item.tokens.tolist() for item in data.train_items)
    assert [sorted(epoch) for epoch in module.read] == [expected] * 3
    assert module.read[0] != module.read[1] != module.read[2]


def test_the_same_seed_reads_the_same_and_another_seed_does_not(tokenizer: PreTrainedTokenizerBase) -> None:
    def read(seed: int) -> list[list[list[int]]]:
        module = Recorder(tokenizer)
        trainer(max_epochs=2).fit(module, SFTDataModule(ROWS, seed=seed))
        return module.read

    assert read(0) == read(0)
    assert read(0) != read(1)


class Flat(Recorder):
    """Records the rows of all epochs in one list."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__(tokenizer)
        self.rows: list[list[int]] = []

    def training_step(self, batch: SFTBatch, batch_idx: int) -> Tensor:
        self.rows += sequences(batch)
        return self.weight * batch.loss_mask.sum()


class Late(SingleDeviceStrategy):
    """Loads checkpoints when the loaders are made already, as strategies with sharded weights do."""

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        return True

    def setup(self, trainer: Trainer) -> None:
        super().setup(trainer)
        assert trainer.estimated_stepping_batches  # as schedules ask for it


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("strategy", ["auto", "late"])
@pytest.mark.parametrize("group_by_length", [False, True])
def test_a_resumed_run_reads_on_at_the_row_where_it_stopped(
    num_workers: int, strategy: str, group_by_length: bool, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    def read(**settings: Any) -> list[list[int]]:
        ckpt_path = settings.pop("ckpt_path", None)
        module = Flat(tokenizer)
        data = SFTDataModule(
            ROWS, val_fraction=0, batch_size=8, num_workers=num_workers, group_by_length=group_by_length
        )
        fitting = Trainer(
            accelerator="cpu",
            strategy=Late() if strategy == "late" else strategy,
            callbacks=[ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1, filename="{step}")],
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            max_epochs=3,
            **settings,
        )
        fitting.fit(module, data, ckpt_path=ckpt_path, weights_only=True)
        return module.rows

    whole = read()
    assert len(whole) == 90  # 3 epochs of 8 + 8 + 8 + 6 rows
    for step in (1, 3, 4, 6, 8, 11) if num_workers == 0 else (6,):
        done = step // 4 * 30 + step % 4 * 8
        assert read(ckpt_path=tmp_path / f"step={step}.ckpt") == whole[done:], step


def test_workers_read_what_one_process_reads(tokenizer: PreTrainedTokenizerBase) -> None:
    def batches(num_workers: int) -> list[list[list[int]]]:
        data = SFTDataModule(ROWS, tokenizer=tokenizer, num_workers=num_workers)
        data.setup("fit")
        return [sequences(batch) for batch in data.train_dataloader()]

    assert batches(0) == batches(1)


def test_reading_leaves_the_global_noise_alone(tokenizer: PreTrainedTokenizerBase) -> None:
    data = SFTDataModule(ROWS, tokenizer=tokenizer)
    data.setup("fit")
    before = torch.get_rng_state()
    list(data.train_dataloader())
    assert torch.equal(torch.get_rng_state(), before)


def test_two_processes_share_no_row_and_lightning_leaves_the_sampler_alone(
    tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    def rows_of(rank: int) -> list[list[int]]:
        data = SFTDataModule(ROWS, tokenizer=tokenizer, val_fraction=0)
        ranks = {"num_replicas": 2, "rank": rank}
        monkeypatch.setattr(Trainer, "distributed_sampler_kwargs", property(lambda _: ranks))
        data.trainer = trainer()
        data.setup("fit")
        loader = data.train_dataloader()
        monkeypatch.setattr(type(data.trainer._accelerator_connector), "is_distributed", property(lambda _: True))
        assert not data.trainer._data_connector._requires_distributed_sampler(loader)
        return [row for batch in loader for row in sequences(batch)]

    first, second = rows_of(0), rows_of(1)
    assert len(first) == len(second) == 15
    assert len({tuple(row) for row in first + second}) == 30


@pytest.mark.parametrize("module", [None, Recorder(), NetworkWithoutTokenizer()])
def test_no_tokenizer_from_anywhere_is_an_error(module: LightningModule | None) -> None:
    data = SFTDataModule(ROWS)
    if module is not None:
        data.trainer = trainer()
        data.trainer.strategy.connect(module)
    with pytest.raises(InputError, match=r"SFTDataModule needs a tokenizer: pass tokenizer="):
        data.setup("fit")


def test_a_given_tokenizer_goes_before_the_modules(
    tokenizer: PreTrainedTokenizerBase, make_tokenizer: Callable[..., PreTrainedTokenizerBase]
) -> None:
    data = SFTDataModule(ROWS, tokenizer=tokenizer)
    trainer(max_epochs=1).fit(Recorder(make_tokenizer(pad_token="<pad>", eos_token="<eos>")), data)
    assert data.tokenizer is tokenizer


def test_another_module_brings_its_own_tokenizer(
    tokenizer: PreTrainedTokenizerBase, make_tokenizer: Callable[..., PreTrainedTokenizerBase]
) -> None:
    data = SFTDataModule(ROWS[:1], val_fraction=0)
    trainer(max_epochs=1).fit(Recorder(tokenizer), data)
    other = Recorder(make_tokenizer(pad_token="<eos>", eos_token="<pad>"))
    trainer(max_epochs=1).fit(other, data)
    assert [rows[-1] for rows in other.read[0]] == [0]


def test_rows_longer_than_the_models_positions_are_dropped_and_counted(
    tokenizer: PreTrainedTokenizerBase, caplog: pytest.LogCaptureFixture
) -> None:
    module, data = Recorder(tokenizer, max_positions=30), SFTDataModule(ROWS, val_fraction=0)
    with caplog.at_level(logging.WARNING, logger="rlhf_lightning.data"):
        trainer(max_epochs=1).fit(module, data)
    assert max(map(len, module.read[0])) == 30
    dropped = len(ROWS) - len(module.read[0])
    assert f"{dropped} of 30 training rows are dropped: a row may have at most 30 tokens" in caplog.text
    assert "the model has 30 positions" in caplog.text


@pytest.mark.parametrize(("max_length", "positions", "longest"), [(25, 40, 25), (40, 25, 25), (25, None, 25)])
def test_the_smaller_limit_counts(
    tokenizer: PreTrainedTokenizerBase, max_length: int, positions: int | None, longest: int
) -> None:
    module = Recorder(tokenizer, max_positions=positions)
    trainer(max_epochs=1).fit(module, SFTDataModule(ROWS, max_length=max_length))
    assert max(map(len, module.read[0])) == longest


def test_data_that_is_empty_after_dropping_is_an_error(tokenizer: PreTrainedTokenizerBase) -> None:
    data = SFTDataModule(ROWS, tokenizer=tokenizer, max_length=5, val_fraction=0)
    with pytest.raises(InputError, match=r"30 of 30 training rows are dropped: .*max_length=5.*none is left"):
        data.setup("fit")


@pytest.mark.parametrize("rows", [[], ()])
def test_no_rows_are_an_error(tokenizer: PreTrainedTokenizerBase, rows: Any) -> None:
    with pytest.raises(InputError, match=r"data\.path=.* has no rows"):
        SFTDataModule(rows, tokenizer=tokenizer).setup("fit")


@pytest.mark.parametrize(
    ("settings", "rule"),
    [
        ({"batch_size": 0}, r"data\.batch_size=0 must be at least 1"),
        ({"val_fraction": 1.0}, r"data\.val_fraction=1\.0 must lie in \[0, 1\)"),
        ({"val_fraction": -0.1}, r"data\.val_fraction=-0\.1 must lie in"),
        ({"batch_size": "8"}, r"data\.batch_size='8' must be a whole number"),
        ({"val_fraction": "0.1"}, r"data\.val_fraction='0\.1' must be a number"),
        ({"max_length": 8.5}, r"data\.max_length=8\.5 must be a whole number"),
        ({"num_workers": -1}, r"data\.num_workers=-1 must not be negative"),
        ({"seed": -1}, r"data\.seed=-1 must be a whole number from 0 to 4294967295"),
        ({"tokenizer": "gpt2"}, "tokenizer='gpt2' must be a tokenizer and not its name"),
        ({"max_length": 1}, r"data\.max_length=1 must be at least 2"),
    ],
)
def test_a_setting_out_of_its_range_is_an_error(settings: dict[str, Any], rule: str) -> None:
    with pytest.raises(InputError, match=rule):
        SFTDataModule(ROWS, **settings)


def test_a_bad_row_in_a_file_is_an_error_with_file_and_line(
    tokenizer: PreTrainedTokenizerBase, jsonl: Callable[..., Path]
) -> None:
    file = jsonl([*ROWS[:2], {"prompt": "a"}])
    with pytest.raises(InputError, match=r"rows\.jsonl:3: a row needs prompt and response"):
        SFTDataModule(file, tokenizer=tokenizer).setup("fit")


def test_validation_rows_come_from_their_own_file(
    tokenizer: PreTrainedTokenizerBase, jsonl: Callable[..., Path]
) -> None:
    data = SFTDataModule(jsonl(ROWS[:20]), val_path=jsonl(ROWS[20:], "val.jsonl"), tokenizer=tokenizer)
    data.setup("fit")
    assert [row.fields for row in data.train_rows] == ROWS[:20]
    assert [row.fields for row in data.val_rows] == ROWS[20:]


def test_validation_rows_come_from_the_folders_validation_file(
    tokenizer: PreTrainedTokenizerBase, jsonl: Callable[..., Path], tmp_path: Path
) -> None:
    for name, part in (("train", ROWS[:20]), ("validation", ROWS[20:25]), ("test", ROWS[25:])):
        jsonl(part, f"data/{name}.jsonl")
    for val_split, expected in ((None, ROWS[20:25]), ("test", ROWS[25:])):
        data = SFTDataModule(tmp_path / "data", val_split=val_split, tokenizer=tokenizer)
        data.setup("fit")
        assert [row.fields for row in data.train_rows] == ROWS[:20]
        assert [row.fields for row in data.val_rows] == expected


def test_without_validation_rows_there_is_no_validation(tokenizer: PreTrainedTokenizerBase) -> None:
    module = Recorder(tokenizer)
    trainer(max_epochs=1).fit(module, SFTDataModule(ROWS, val_fraction=0))
    assert module.validated == []


def test_validation_reads_its_rows_in_their_order(tokenizer: PreTrainedTokenizerBase) -> None:
    module, data = Recorder(tokenizer), SFTDataModule(ROWS, val_fraction=0.5)
    trainer().validate(module, data, verbose=False)
    assert module.validated == [item.tokens.tolist() for item in data.val_items]


def test_a_split_keeps_groups_together_and_loses_no_row() -> None:
    rows = [Row({"prompt": f"{i}", "group": i % 20}, str(i)) for i in range(100)]
    train, val = split_by_group(rows, 0.25, seed=0)
    assert {row.fields["group"] for row in train} & {row.fields["group"] for row in val} == set()
    assert len({row.fields["group"] for row in val}) == 5
    assert sorted([*train, *val], key=lambda row: int(row.origin)) == rows


def test_a_split_keeps_rows_with_an_equal_prompt_together() -> None:
    rows = [Row({"prompt": f"{i % 10}", "response": f"{i}"}, str(i)) for i in range(50)]
    train, val = split_by_group(rows, 0.3, seed=0)
    assert {row.fields["prompt"] for row in train} & {row.fields["prompt"] for row in val} == set()
    assert len(val) == 15


def test_files_with_the_same_prompts_hold_out_the_same_ones_with_and_without_groups() -> None:
    alone = [Row({"prompt": f"{i}"}, str(i)) for i in range(50)]
    grouped = [Row({"prompt": f"{i}", "group": f"g{i}"}, str(i)) for i in reversed(range(50))]
    held_out = [{row.fields["prompt"] for row in split_by_group(rows, 0.3, seed=0)[1]} for rows in (alone, grouped)]
    assert held_out[0] == held_out[1]
    assert len(held_out[0]) == 15


def test_a_split_is_a_function_of_its_seed() -> None:
    rows = [Row({"prompt": f"{i}"}, str(i)) for i in range(50)]
    assert split_by_group(rows, 0.3, seed=0) == split_by_group(rows, 0.3, seed=0)
    assert split_by_group(rows, 0.3, seed=0) != split_by_group(rows, 0.3, seed=1)


@pytest.mark.parametrize(("groups", "fraction", "held_out"), [(10, 0.05, 1), (1, 0.5, 0), (2, 0.99, 1), (10, 0.0, 0)])
def test_a_split_leaves_rows_on_both_sides_where_it_can(groups: int, fraction: float, held_out: int) -> None:
    rows = [Row({"prompt": f"{i}"}, str(i)) for i in range(groups)]
    assert len(split_by_group(rows, fraction, seed=0)[1]) == held_out


def test_no_group_of_real_preferences_is_on_both_sides(
    stories_tokenizer: PreTrainedTokenizerBase, real_data: Path
) -> None:
    from rlhf_lightning.data import RewardDataModule

    data = RewardDataModule(real_data / "preferences" / "polite" / "pairs.jsonl", tokenizer=stories_tokenizer)
    data.setup("fit")
    assert {row.fields["group"] for row in data.train_rows} & {row.fields["group"] for row in data.val_rows} == set()
    assert len(data.train_rows) + len(data.val_rows) == 1094


def test_one_file_has_no_other_split_to_validate_on(tmp_path: Path, tokenizer: Any) -> None:
    rows = [{"prompt": "a", "response": "b"}] * 4
    write_rows(tmp_path / "rows.jsonl", rows)
    for path in (tmp_path / "rows.jsonl", rows):
        data = SFTDataModule(path, val_split="validation", tokenizer=tokenizer)
        with pytest.raises(InputError, match=r"data\.val_split=validation names a file in a folder"):
            data.setup("fit")


def test_another_split_of_a_file_or_of_rows_is_refused(
    tokenizer: PreTrainedTokenizerBase, jsonl: Callable[..., Path]
) -> None:
    for path in (jsonl(ROWS), ROWS):
        with pytest.raises(InputError, match=r"data\.split=test names a file in a folder.*data\.path=.* is neither"):
            SFTDataModule(path, split="test", tokenizer=tokenizer).setup("fit")
