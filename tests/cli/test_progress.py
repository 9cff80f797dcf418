from pathlib import Path

import pytest

from rlhf_lightning.cli.progress import Progress

WHAT = {"settings": {"seed": 1}, "inputs": {"rows.jsonl": "abc"}}


@pytest.fixture
def progress(tmp_path: Path) -> Progress:
    """The stage sft has begun and kept a checkpoint."""
    progress = Progress(tmp_path / "checkpoints")
    progress.begin("sft", WHAT)
    (progress.of("sft") / "step-1.ckpt").touch()
    return progress


def kept(progress: Progress) -> list[str]:
    return sorted(path.name for path in progress.folder.glob("*/*.ckpt"))


def test_what_a_stage_kept_is_there_when_it_begins_again(progress: Progress) -> None:
    progress.begin("sft", WHAT)
    assert kept(progress) == ["step-1.ckpt"]


@pytest.mark.parametrize("change", [{"settings": {"seed": 2}}, {"inputs": {"rows.jsonl": "abd"}}])
def test_with_other_settings_or_rows_a_stage_begins_anew(change: dict[str, dict[str, str]], progress: Progress) -> None:
    progress.begin("sft", {**WHAT, **change})
    assert kept(progress) == []


def test_without_its_label_nothing_is_believed(progress: Progress) -> None:
    (progress.of("sft") / "stage.json").unlink()
    progress.begin("sft", WHAT)
    assert kept(progress) == []


def test_another_stage_that_begins_leaves_nothing_of_those_made_from_other_networks(progress: Progress) -> None:
    progress.begin("pretrain", WHAT)
    assert kept(progress) == []


def test_nothing_is_left_of_a_stage_that_is_complete(progress: Progress) -> None:
    progress.end("sft")
    assert not progress.folder.exists()
    progress.end("sft")


def test_processes_beside_the_first_one_change_nothing(progress: Progress, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    progress.begin("ppo", WHAT)
    progress.end("sft")
    assert kept(progress) == ["step-1.ckpt"]
