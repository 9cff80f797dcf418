import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader

from rlhf_lightning.callbacks import History, SampleTable, ScoreMonitor
from rlhf_lightning.callbacks.rollouts import markdown_table
from rlhf_lightning.errors import InputError
from rlhf_lightning.types import ScoredRollout

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),
]


def rollout(step: int) -> ScoredRollout:
    ones = torch.ones(3, 2)
    return ScoredRollout(
        prompt_tokens=ones.long(),
        prompt_mask=ones.bool(),
        prompts=["a", "b", "c"],
        texts=["Q: a", "Q: b", "Q: c"],
        columns={"wanted": [1.0, 2.0, 3.0]},
        tokens=torch.ones(3, 4).long(),
        attention_mask=torch.ones(3, 4).bool(),
        response_mask=ones.bool(),
        ended=torch.ones(3).bool(),
        responses=[f"{step}", "two\nlines", "x | y"],
        logprobs=ones,
        ref_logprobs=ones,
        values=ones,
        scores=torch.tensor([0.5, 1.5, 2.5]),
    )


class Plain(LightningModule):
    """A module without rollouts, whose optimizer does nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer: Any = self.optimizers()
        optimizer.step()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


class Sampler(Plain):
    """A module that shows a rollout after each step."""

    def __init__(self) -> None:
        super().__init__()
        self.scored_rollout: ScoredRollout | None = None

    def training_step(self, batch: Any, batch_idx: int) -> None:
        super().training_step(batch, batch_idx)
        self.scored_rollout = rollout(self.trainer.global_step)


def fit(module: LightningModule, tmp_path: Path, *callbacks: Any, steps: int = 5, **settings: Any) -> Trainer:
    trainer = Trainer(
        max_steps=steps,
        accelerator="cpu",
        callbacks=list(callbacks),
        default_root_dir=tmp_path,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        **{"logger": False, **settings},
    )
    trainer.fit(module, DataLoader(range(steps), num_workers=0))
    return trainer


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


class TestSampleTable:
    def test_the_first_rollout_and_every_nth_one_are_shown(self, tmp_path: Path) -> None:
        fit(Sampler(), tmp_path, SampleTable(every_n_steps=2, num_samples=1))
        assert [row["step"] for row in rows(tmp_path / "samples.jsonl")] == [1, 2, 4]

    def test_a_row_holds_what_the_policy_read_and_said_and_its_score(self, tmp_path: Path) -> None:
        fit(Sampler(), tmp_path, SampleTable(every_n_steps=4, num_samples=2), steps=1)
        assert rows(tmp_path / "samples.jsonl") == [
            {"step": 1, "prompt": "Q: a", "response": "1", "score": 0.5},
            {"step": 1, "prompt": "Q: b", "response": "two\nlines", "score": 1.5},
        ]

    def test_samples_lie_beside_the_log(self, tmp_path: Path) -> None:
        logger = CSVLogger(tmp_path, name="logs", version=3)
        fit(Sampler(), tmp_path, SampleTable(), logger=logger, log_every_n_steps=1)
        assert (tmp_path / "logs" / "version_3" / "samples.jsonl").exists()

    def test_a_second_run_appends(self, tmp_path: Path) -> None:
        for _ in range(2):
            fit(Sampler(), tmp_path, SampleTable(every_n_steps=99, num_samples=1), steps=1)
        assert [row["step"] for row in rows(tmp_path / "samples.jsonl")] == [1, 1]

    def test_a_module_without_rollouts_is_left_alone(self, tmp_path: Path) -> None:
        fit(Plain(), tmp_path, SampleTable(), ScoreMonitor("judge_score", lambda prompts, responses: [0.0]))
        assert not (tmp_path / "samples.jsonl").exists()


@pytest.mark.parametrize("setting", [{"every_n_steps": 0}, {"num_samples": 0}])
def test_a_table_of_nothing_is_refused(setting: dict[str, int]) -> None:
    with pytest.raises(InputError, match=f"{next(iter(setting))}=0"):
        SampleTable(**setting)


def test_pipes_and_line_breaks_do_not_break_the_table() -> None:
    table = markdown_table([(1, "a | b", "two\nlines <b>", 0.5)])
    assert table.splitlines()[-1] == "| 1 | a \\| b | two<br>lines &lt;b> | 0.500 |"


def test_a_monitor_logs_its_mean_of_every_rollout(tmp_path: Path) -> None:
    seen: list[tuple[list[Any], list[str]]] = []

    def judge(prompts: list[Any], responses: list[str], wanted: list[float]) -> list[float]:
        seen.append((prompts, responses))
        return [value * len(seen) for value in wanted]

    history = History()
    fit(Sampler(), tmp_path, ScoreMonitor("judge_score", judge), history, steps=3)
    assert seen[0] == (["a", "b", "c"], ["1", "two\nlines", "x | y"])
    assert history.curves["ppo/judge_score"] == {"step": [1, 2, 3], "value": [2.0, 4.0, 6.0]}
