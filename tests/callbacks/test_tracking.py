import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger

from rlhf_lightning.callbacks import log_figures, log_headline
from rlhf_lightning.callbacks.rollouts import log_samples
from rlhf_lightning.callbacks.tracking import leaves
from rlhf_lightning.evaluation.figures import win_rate_figure
from rlhf_lightning.evaluation.win_rate import Interval

ROWS = [(7, "Explain the moon.", "It is far.", 1.25)]


def entries(record: Any) -> dict[str, Any]:
    """The items of a record, nested ones by their dotted path."""
    return {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record}


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An offline run with config, metrics, a table and a figure in it, finished."""
    folder = tmp_path_factory.mktemp("wandb")
    logger = WandbLogger(project="aligned", name="first", save_dir=folder, offline=True, tags=["tiny"])
    logger.log_hyperparams({"seed": 3, "module": {"beta": 0.05}})
    logger.log_metrics({"ppo/score": 1.5}, step=7)
    log_samples(logger, ROWS, step=7)
    log_headline([logger], {"win_rate": {"ppo": {"mean": 0.8}}}, step=8)
    log_figures([logger], {"win_rate": win_rate_figure({"ppo": Interval(0.8, 0.7, 0.9)})}, step=8)
    logger.experiment.finish()
    (found,) = (folder / "wandb").glob("offline-run-*")
    return found


@pytest.fixture(scope="module")
def records(run_folder: Path, wandb_records: Callable[[Path], list[Any]]) -> list[Any]:
    return wandb_records(run_folder)


@pytest.fixture(scope="module")
def history(records: list[Any]) -> list[dict[str, Any]]:
    return [entries(record.history.item) for record in records if record.WhichOneof("record_type") == "history"]


def test_an_offline_run_holds_its_name_and_tags(records: list[Any]) -> None:
    (run,) = (record.run for record in records if record.WhichOneof("record_type") == "run")
    assert (run.project, run.display_name, list(run.tags)) == ("aligned", "first", ["tiny"])


def test_an_offline_run_holds_the_config(records: list[Any]) -> None:
    config: dict[str, Any] = {}
    for record in records:
        kind = record.WhichOneof("record_type")
        if kind in ("run", "config"):
            config |= entries((record.run.config if kind == "run" else record.config).update)
    assert config["seed"] == 3
    assert config["module"] == {"beta": 0.05} or config["module/beta"] == 0.05


def test_an_offline_run_holds_the_metrics_at_their_step(history: list[dict[str, Any]]) -> None:
    (row,) = (row for row in history if "ppo/score" in row)
    assert row["ppo/score"] == 1.5
    assert row["trainer/global_step"] == 7
    assert any(row.get("report/win_rate/ppo/mean") == 0.8 for row in history)


def test_an_offline_run_holds_the_table_of_samples(history: list[dict[str, Any]], run_folder: Path) -> None:
    (files,) = (file_of(row, "samples", run_folder) for row in history if mentions(row, "samples"))
    table = json.loads(files.read_text())
    assert table["columns"] == ["step", "prompt", "response", "score"]
    assert table["data"] == [list(ROWS[0])]


def test_an_offline_run_holds_the_figures(run_folder: Path) -> None:
    (image,) = (run_folder / "files" / "media" / "images" / "report").glob("win_rate_*.png")
    assert image.read_bytes().startswith(b"\x89PNG")


def mentions(row: dict[str, Any], key: str) -> bool:
    return any(name == key or name.startswith(f"{key}.") for name in row)


def file_of(row: dict[str, Any], key: str, run_folder: Path) -> Path:
    path = row[key]["path"] if key in row else row[f"{key}.path"]
    return run_folder / "files" / str(path)


def test_tensorboard_gets_samples_and_figures(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = TensorBoardLogger(tmp_path, name=None, version="")
    log_samples(logger, ROWS, step=7)
    log_figures([logger], {"win_rate": win_rate_figure({"ppo": Interval(0.8, 0.7, 0.9)})}, step=8)
    logger.finalize("success")
    events = EventAccumulator(str(tmp_path)).Reload()
    assert events.Tags()["images"] == ["report/win_rate"]
    text = events.Tensors("samples/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "| 7 | Explain the moon. | It is far. | 1.250 |" in text


def test_a_logger_without_pictures_is_passed_by(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, name=None, version="")
    log_figures([logger], {"win_rate": win_rate_figure({"ppo": Interval(0.8, 0.7, 0.9)})})
    log_headline([logger], {"ppo": {"kl": 4.0}}, step=2)
    logger.finalize("success")
    assert (tmp_path / "metrics.csv").read_text().split() == ["report/ppo/kl,step", "4.0,2"]


def test_only_single_numbers_of_the_report_are_headlines() -> None:
    report = {
        "ppo": {"kl": 4, "score": {"after": 1.5}},
        "judge": "world",
        "samples": [1.0],
        "curves": {"x": [2.0]},
        "ok": True,
    }
    assert leaves(report) == {"ppo/kl": 4.0, "ppo/score/after": 1.5}


def test_the_headline_is_in_the_csv_file(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    log_headline([logger], {"win_rate": {"ppo": {"mean": 0.8}}})
    assert "report/win_rate/ppo/mean" in (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()[0]
