import json
import multiprocessing
import os
import signal
import sys
from pathlib import Path

import pytest

from rlhf_lightning.cli import lock
from rlhf_lightning.cli.application import run_verb
from rlhf_lightning.cli.lock import only_run_in
from rlhf_lightning.errors import InputError


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(lock, "PATIENCE", 0.2)
    monkeypatch.setattr(sys, "argv", ["rlhf"])
    monkeypatch.chdir(tmp_path)


def hold_and_say(connection: "multiprocessing.connection.Connection") -> None:
    with only_run_in("out"):
        connection.send("held")
        connection.recv()


def test_a_second_run_is_kept_out_as_long_as_the_first_lives_and_no_longer() -> None:
    fork = multiprocessing.get_context("fork")
    here, there = fork.Pipe()
    first = fork.Process(target=hold_and_say, args=(there,))
    first.start()
    assert here.recv() == "held"
    with (
        pytest.raises(InputError, match=rf"output_dir=out is in use by another run \(process {first.pid} on "),
        only_run_in("out"),
    ):
        pass
    with only_run_in("other"):
        pass
    assert first.pid is not None
    # Nothing of a run that is killed keeps the next one out.
    os.kill(first.pid, signal.SIGKILL)
    first.join()
    for _ in range(2):
        with only_run_in("out"):
            pass


def test_a_fork_of_a_run_that_was_killed_keeps_others_out_while_it_lives() -> None:
    with only_run_in("out"):
        child = os.fork()
        if child == 0:
            signal.pause()
    with pytest.raises(InputError, match="in use"), only_run_in("out"):
        pass
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with only_run_in("out"):
        pass


@pytest.mark.parametrize("name", ["LOCAL_RANK", "RANK", "SLURM_PROCID", "NODE_RANK"])
def test_only_the_first_process_of_a_run_takes_the_lock(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with only_run_in("out"):
        monkeypatch.setenv(name, "1")
        with only_run_in("out"):
            pass
        monkeypatch.setenv(name, "0")
        with pytest.raises(InputError, match="in use"), only_run_in("out"):
            pass


@pytest.mark.parametrize("verb", ["train", "pipeline"])
def test_train_and_pipeline_do_not_touch_the_files_of_a_run_that_is_at_work(
    verb: str, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prompt": f"Say {i}.", "response": f"{i}!"} for i in range(16)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    train = [f"network.pretrained={tiny_model}", "data.path=rows.jsonl", "trainer=cpu", "trainer.max_steps=1"]
    arguments = ["output_dir=out", *(train if verb == "train" else [])]
    with only_run_in(str(Path("out").absolute())):
        assert run_verb(verb, arguments) == 2
    assert "in use by another run" in capsys.readouterr().err
    assert {path.name for path in Path("out").iterdir()} == {".hydra", ".lock"}
    if verb == "train":
        assert run_verb(verb, arguments) == 0
        assert ".lock" not in capsys.readouterr().out
