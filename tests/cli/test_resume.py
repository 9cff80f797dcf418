"""Runs of the command that were stopped or killed and go on equal those that were not, bit for bit."""

import csv
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_lightning.callbacks import AtomicCheckpointIO, checkpoints
from rlhf_lightning.callbacks.checkpoint_file import fault
from rlhf_lightning.cli.application import run_verb
from rlhf_lightning.cli.train import same_wandb_run

HELPERS = """
import random, time
from pathlib import Path
from lightning.pytorch.callbacks import Callback

class StopAt(Callback):
    def __init__(self, step):
        self.step = step
    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.step:
            raise ZeroDivisionError

class Slow(Callback):
    def on_train_batch_end(self, *_):
        Path("trained").touch()
        time.sleep(0.1)

def noisy_score(prompts, responses, **columns):
    return [len(response) / 10 + random.random() for response in responses]
"""
STAGES = {
    "sft": ["data.group_by_length=true"],
    "reward": ["module.share_prompts=true", "module.shift_scores=true"],
    "ppo": [
        "module.reward=helpers.py:noisy_score",
        "module.minibatch_size=4",
        "module.max_new_tokens=4",
        "module.ema_decay=0.9",
        "module.adaptive_kl_target=0.1",
        "module.normalize_scores=shift_and_scale",
        "module.preflight=false",
    ],
}
TWO_PROCESSES = ["trainer.strategy=ddp_fork", "trainer.devices=2"]


@pytest.fixture
def network(tmp_path: Path, tiny_model: Path) -> Path:
    """A GPT-2 with dropout beside the tokenizer of the tiny model."""
    from transformers import GPT2Config, GPT2LMHeadModel

    from rlhf_lightning.networks import load_tokenizer

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=258,
        n_embd=32,
        n_layer=2,
        n_head=2,
        n_positions=64,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
    assert config.resid_pdrop > 0
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "network")
    load_tokenizer(str(tiny_model)).save_pretrained(tmp_path / "network")
    return tmp_path / "network"


@pytest.fixture
def arguments(network: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """``arguments(stage, output_dir, *more)``: 2 epochs of 8 batches, validation and checkpoint after every 3."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "argv", ["rlhf"])
    Path("helpers.py").write_text(HELPERS, encoding="utf-8")
    rows: dict[str, list[dict[str, str]]] = {"sft": [], "reward": [], "ppo": []}
    for i in range(40):
        prompt = {"prompt": f"Say {i}."}
        rows["sft"].append(prompt | {"response": "!" * (i % 7 + 1) + str(i)})
        rows["reward"].append(prompt | {"chosen": "!" * (i % 7 + 1) + str(i), "rejected": "?" * (i % 5 + 1)})
        rows["ppo"].append(prompt)
    for stage, found in rows.items():
        Path(f"{stage}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found), encoding="utf-8")

    def make(stage: str, output_dir: str, *more: str) -> list[str]:
        return [
            f"module={stage}",
            f"network.pretrained={network}",
            f"data.path={stage}.jsonl",
            f"output_dir={output_dir}",
            "data.batch_size=4",
            "data.val_fraction=0.2",
            "trainer=cpu",
            "trainer.max_epochs=2",
            "trainer.val_check_interval=3",
            "trainer.log_every_n_steps=1",
            "trainer.enable_progress_bar=false",
            "callbacks.progress=null",
            "callbacks.checkpoint.every_n_train_steps=3",
            "module.learning_rate=0.01",
            *STAGES[stage],
            *more,
        ]

    return make


def rows(output_dir: str) -> dict[Any, dict[str, str]]:
    """Return the rows of all logs of a run but those of times; of what was logged twice, the later ones."""
    found: dict[Any, dict[str, str]] = {}
    for log in sorted(Path(output_dir, "logs").glob("version_*/metrics.csv")):
        with log.open(encoding="utf-8") as file:
            for row in csv.DictReader(file):
                values = {name: value for name, value in row.items() if value != ""}
                if any(name.startswith("throughput/") for name in values):
                    continue
                found[row["step"], row["epoch"], tuple(sorted(values))] = values
    return found


def assert_same(one: Any, other: Any, path: str = "") -> None:
    if isinstance(one, dict):
        assert one.keys() == other.keys(), path
        for key in one:
            assert_same(one[key], other[key], f"{path}.{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), path
        for i, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_same(a, b, f"{path}[{i}]")
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other), path
    else:
        assert one == other, path


def assert_same_runs(one: str, other: str) -> None:
    """Compare the exported models, every logged value, and all that the last checkpoints hold."""
    files = [Path(folder, "model", "model.safetensors").read_bytes() for folder in (one, other)]
    assert files[0] == files[1]
    assert rows(one) == rows(other)
    states = [torch.load(f"{folder}/checkpoints/last.ckpt", weights_only=True) for folder in (one, other)]
    for state in states:
        # Which files there were before differs with the steps at which a run was stopped.
        del state["callbacks"]["ResumeCheckpoint"]
    assert_same(*states)


@pytest.mark.parametrize(
    ("stage", "stop", "more"),
    [
        ("sft", 5, ["data.num_workers=1"]),
        ("sft", 8, ["trainer.accumulate_grad_batches=2", "trainer.max_epochs=4"]),
        ("reward", 10, []),
        ("ppo", 7, []),
        ("sft", 4, TWO_PROCESSES),
        ("reward", 4, TWO_PROCESSES),
        ("ppo", 4, TWO_PROCESSES),
    ],
)
def test_a_run_that_stopped_and_goes_on_equals_the_one_that_did_not(
    stage: str, stop: int, more: list[str], arguments: Callable[..., list[str]]
) -> None:
    assert run_verb("train", arguments(stage, "whole", *more)) == 0
    stopping = ["+callbacks.stop._target_=helpers.StopAt", f"+callbacks.stop.step={stop}"]
    # In processes that were forked, the error comes as another one.
    with pytest.raises((ZeroDivisionError, Exception)):
        run_verb("train", arguments(stage, "half", *more, *stopping))
    kept = [path.name for path in checkpoints(Path("half/checkpoints"))]
    assert kept[0] == f"step-{(stop - 1) // 3 * 3}.ckpt"
    assert run_verb("train", arguments(stage, "half", *more, "ckpt_path=last")) == 0
    assert_same_runs("whole", "half")


def test_auto_begins_where_there_is_no_checkpoint_and_goes_on_where_there_is(
    arguments: Callable[..., list[str]],
) -> None:
    command = arguments("sft", "out", "ckpt_path=auto", "trainer.limit_val_batches=0")
    assert run_verb("train", [*command, "trainer.max_epochs=1"]) == 0
    assert run_verb("train", command) == 0
    assert [Path(f"out/logs/version_{version}").is_dir() for version in (0, 1)] == [True, True]
    steps = [int(step) for step, _, _ in rows("out")]
    assert steps == list(range(16))


def test_a_damaged_checkpoint_is_reported_and_passed_over_for_the_one_before(
    arguments: Callable[..., list[str]], capfd: pytest.CaptureFixture[str]
) -> None:
    assert run_verb("train", arguments("sft", "whole")) == 0
    stopping = ["+callbacks.stop._target_=helpers.StopAt", "+callbacks.stop.step=8"]
    with pytest.raises(ZeroDivisionError):
        run_verb("train", arguments("sft", "half", *stopping))
    newest = Path("half/checkpoints/step-6.ckpt")
    newest.write_bytes(newest.read_bytes()[:-1000])
    assert run_verb("train", arguments("sft", "half", f"ckpt_path={newest}")) == 2
    assert run_verb("train", arguments("sft", "half", "ckpt_path=last")) == 0
    assert "step-6.ckpt is passed over: torn" in capfd.readouterr().out
    assert_same_runs("whole", "half")


def test_a_resumed_run_has_the_id_that_the_first_one_had_at_weights_and_biases(
    arguments: Callable[..., list[str]],
) -> None:
    offline = ["logger=wandb", "logger.offline=true", "trainer.limit_val_batches=0"]
    assert run_verb("train", arguments("sft", "out", *offline, "trainer.max_epochs=1")) == 0
    assert run_verb("train", arguments("sft", "out", *offline, "ckpt_path=last")) == 0
    # offline-run-TIME-ID, and a number behind it where two begin within a second.
    ids = [folder.name.split("-")[3] for folder in Path("out/wandb").glob("offline-run-*")]
    assert len(ids) == 2
    assert len(set(ids)) == 1
    node = {"_target_": "lightning.pytorch.loggers.WandbLogger", "project": "p"}
    found = same_wandb_run({"mine": node, "csv": {"_target_": "x.CSVLogger"}}, "out/checkpoints/last.ckpt")
    assert found == {"mine": {**node, "id": ids[0], "resume": "allow"}, "csv": {"_target_": "x.CSVLogger"}}


def forked(function: Callable[[], int]) -> int:
    """Start the function in a process group of its own, with all that is imported already; return its id."""
    process = os.fork()
    if process == 0:
        os.setpgid(0, 0)
        silence = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silence, 1)
        os.dup2(silence, 2)
        # No process here touches CUDA, whether it is there or not: nothing of it could break in a fork of a fork.
        torch.cuda._is_in_bad_fork = lambda: False  # type: ignore[assignment]
        try:
            os._exit(function())
        except BaseException:
            os._exit(1)
    # Here, too: it may be killed before it has done so itself.
    os.setpgid(process, process)
    return process


def ended(process: int) -> None:
    """Wait for a process, which must end well."""
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0


def killed(process: int) -> bool:
    """Kill a process by SIGKILL; False where it had ended well by then."""
    os.killpg(process, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    assert code in (0, -signal.SIGKILL)
    return code != 0


def newest_step(output_dir: str) -> int:
    """Return the step of the newest checkpoint of a run, 0 without one."""
    names = [path.stem for path in Path(output_dir, "checkpoints").glob("step-*.ckpt")]
    return max((int(name.partition("-")[2]) for name in names), default=0)


def wait_for_step(process: int, output_dir: str, step: int) -> None:
    """Wait until a run has written the checkpoint of a step, or of a later one; it must not end before."""
    while newest_step(output_dir) < step:
        assert os.waitpid(process, os.WNOHANG) == (0, 0)
        time.sleep(0.001)


@pytest.mark.proof
@pytest.mark.parametrize(
    ("stage", "more"),
    [(stage, more) for more in ([], TWO_PROCESSES) for stage in ("sft", "reward", "ppo")],
)
def test_runs_that_are_killed_at_random_moments_go_on_bit_for_bit(
    stage: str, more: list[str], arguments: Callable[..., list[str]]
) -> None:
    # Checkpoints at every step: many of the kills meet one that is being written.
    more = [*more, "callbacks.checkpoint.every_n_train_steps=1"]
    ended(forked(lambda: run_verb("train", arguments(stage, "whole", *more))))
    last, noise, kills = newest_step("whole"), random.Random(f"{stage} {len(more)}"), 0
    # Two runs of each of the six kinds are twelve, and each is killed twice: once in either half of its steps.
    for name in ("killed0", "killed1"):
        command = arguments(stage, name, *more, "ckpt_path=auto")
        for low, high in ((0.0, 0.45), (0.45, 0.8)):
            process = forked(lambda command=command: run_verb("train", command))
            wait_for_step(process, name, round(noise.uniform(low, high) * last))
            time.sleep(noise.uniform(0.0, 0.05))
            kills += killed(process)
        ended(forked(lambda command=command: run_verb("train", command)))
        assert_same_runs("whole", name)
    assert kills >= 3


@pytest.mark.proof
def test_no_file_is_corrupted_in_two_hundred_kills_of_the_writer(tmp_path: Path) -> None:
    """Kill a process that does nothing but write checkpoints, at moments within the writing of one."""
    path = tmp_path / "checkpoints" / "step-1.ckpt"

    def write() -> int:
        for step in range(10**9):
            AtomicCheckpointIO().save_checkpoint({"step": step, "weights": torch.full((200_000,), float(step))}, path)
        return 0

    noise = random.Random(0)
    left_over = 0
    for _ in range(200):
        process = forked(write)
        time.sleep(noise.uniform(0.01, 0.12))
        assert killed(process)
        for found in checkpoints(path.parent):
            assert fault(found) is None
            state = AtomicCheckpointIO().load_checkpoint(found)
            assert bool((state["weights"] == state["step"]).all())
        left_over += path.with_name("step-1.ckpt.partial").exists()
    assert left_over > 20  # so many of the kills met the writing itself


@pytest.mark.proof
@pytest.mark.parametrize("trainer", ["cpu", "ddp_cpu"])
def test_a_run_that_is_terminated_and_requeued_with_the_same_command_goes_on_bit_for_bit(
    trainer: str, arguments: Callable[..., list[str]]
) -> None:
    slow = "+callbacks.slow._target_=helpers.Slow"

    def command(output_dir: str, *more: str) -> list[str]:
        program = [sys.executable, "-m", "rlhf_lightning.cli.main", "train"]
        return [*program, *arguments("ppo", output_dir, f"trainer={trainer}", *more)]

    subprocess.run(command("whole"), check=True, capture_output=True)
    requeued = command("half", "ckpt_path=auto", slow, "callbacks.checkpoint.every_n_train_steps=1000")
    with subprocess.Popen(requeued, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        while process.poll() is None and not Path("trained").exists():
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=300)
    assert process.returncode == 143, errors
    assert "Traceback" not in errors
    assert "the last checkpoint is" in errors
    assert len(list(Path("half/checkpoints").glob("step-*.ckpt"))) == 1
    subprocess.run(requeued, check=True, capture_output=True)
    assert_same_runs("whole", "half")
