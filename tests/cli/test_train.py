import csv
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ProgressBar
from omegaconf import OmegaConf

from rlhf_lightning.cli.application import run_verb
from rlhf_lightning.cli.train import build_trainer, checkpoint
from rlhf_lightning.errors import InputError

REWARDS = """
def length(prompts, responses, scale=1.0, **columns):
    assert set(columns) == {"topic"}
    return [scale * len(response) for response in responses]
"""
QUIET = ["trainer=cpu", "callbacks.progress=null", "trainer.enable_progress_bar=false", "trainer.log_every_n_steps=1"]

SMALL_PPO = ["module=ppo", "data.path=prompts.jsonl", "module.reward=my_rewards:length", "data.batch_size=4"]
SMALL_PPO += ["module.minibatch_size=4", "module.max_new_tokens=6"]


@pytest.fixture(autouse=True)
def in_an_empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "argv", ["rlhf"])
    Path("my_rewards.py").write_text(REWARDS, encoding="utf-8")
    rows = [{"prompt": f"Say {i}.", "response": f"{i}!", "topic": "numbers"} for i in range(16)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    prompts = [{"prompt": row["prompt"], "topic": row["topic"]} for row in rows]
    Path("prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts), encoding="utf-8")


def logged(output_dir: str, version: int = 0) -> set[str]:
    """Return the names of the columns of a run's log."""
    with Path(output_dir, "logs", f"version_{version}", "metrics.csv").open(encoding="utf-8") as file:
        return set(next(csv.reader(file)))


def test_fine_tuning_writes_model_log_checkpoint_and_config(
    tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    arguments = [f"network.pretrained={tiny_model}", "data.path=rows.jsonl", "output_dir=out", *QUIET]
    assert run_verb("train", arguments) == 0
    AutoModelForCausalLM.from_pretrained("out/model")
    AutoTokenizer.from_pretrained("out/model")
    assert {"sft/loss", "sft/val_loss"} <= logged("out")
    assert checkpoint("last", "out") is not None
    composed = OmegaConf.load("out/.hydra/config.yaml")
    assert composed.network.pretrained == str(tiny_model)
    assert str(Path("out").absolute()) in capsys.readouterr().out


@pytest.mark.parametrize(
    ("module", "given", "expected"),
    [("SFTModule", None, 10), ("RewardModule", None, 10), ("PPOModule", None, 1), ("PPOModule", 7, 7)],
)
def test_rows_of_the_log_are_ten_steps_apart_or_a_rollout_unless_it_is_said(
    module: str, given: int | None, expected: int
) -> None:
    settings = {
        "module": {"_target_": f"rlhf_lightning.modules.{module}"},
        "trainer": {"_target_": "lightning.Trainer", "accelerator": "cpu", "log_every_n_steps": given},
        "callbacks": {},
        "logger": None,
    }
    assert build_trainer(settings).log_every_n_steps == expected  # type: ignore[attr-defined]


def test_resumed_run_goes_on_from_the_last_checkpoint_and_keeps_the_first_log(tiny_model: Path) -> None:
    arguments = [f"network.pretrained={tiny_model}", "data.path=rows.jsonl", "output_dir=out", *QUIET]
    assert run_verb("train", [*arguments, "trainer.max_epochs=1"]) == 0
    before = Path("out/logs/version_0/metrics.csv").read_text(encoding="utf-8")
    assert run_verb("train", [*arguments, "trainer.max_epochs=2", "ckpt_path=last"]) == 0
    assert Path("out/logs/version_0/metrics.csv").read_text(encoding="utf-8") == before
    with Path("out/logs/version_1/metrics.csv").open(encoding="utf-8") as file:
        epochs = {row["epoch"] for row in csv.DictReader(file)}
    assert epochs == {"1"}


def test_callbacks_and_logger_may_be_null(tiny_model: Path) -> None:
    arguments = [f"network.pretrained={tiny_model}", "data.path=rows.jsonl", "output_dir=out", "trainer=cpu"]
    assert run_verb("train", [*arguments, "callbacks=null", "logger=null", "+trainer.enable_checkpointing=false"]) == 0
    assert not Path("out/model").exists()
    assert not Path("out/logs").exists()


def test_reward_function_of_a_config_is_called_with_its_settings(tiny_model: Path) -> None:
    def mean_score(scale: float) -> float:
        output_dir = f"out{scale}"
        reward = f"{{_target_: my_rewards.length, scale: {scale}}}"
        assert run_verb("train", [*ppo, f"module.reward={reward}", f"output_dir={output_dir}"]) == 0
        with Path(output_dir, "logs/version_0/metrics.csv").open(encoding="utf-8") as file:
            return float(next(row["ppo/score"] for row in csv.DictReader(file) if row["ppo/score"]))

    ppo = [
        "module=ppo",
        f"network.pretrained={tiny_model}",
        "data.path=prompts.jsonl",
        "module.minibatch_size=4",
        "module.max_new_tokens=4",
        "trainer.max_steps=1",
        "data.batch_size=4",
        *QUIET,
    ]
    assert mean_score(2.0) == pytest.approx(2 * mean_score(1.0))


def test_sweep_gives_each_job_its_own_directory(tiny_model: Path) -> None:
    arguments = [f"network.pretrained={tiny_model}", "data.path=rows.jsonl", "output_dir=sweep", *QUIET]
    assert run_verb("train", [*arguments, "module.learning_rate=0.0,0.1", "-m"]) == 0
    for job in ("0", "1"):
        assert Path("sweep", job, "model", "model.safetensors").exists()
    weights = [Path("sweep", job, "model", "model.safetensors").read_bytes() for job in ("0", "1")]
    assert weights[0] != weights[1]


def without_an_account(home: Path) -> dict[str, str]:
    """Return an environment in which W&B has no setting, knows no account and reaches no network."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    nowhere = dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"), "http://127.0.0.1:9")
    return kept | nowhere | {"HOME": str(home), "NETRC": str(home / "netrc")}


@pytest.mark.proof
def test_offline_run_of_wandb_needs_no_account_and_holds_names_config_metrics_and_samples(
    tiny_model: Path, tmp_path: Path, wandb_records: Callable[[Path], list[Any]]
) -> None:
    arguments = [
        "module=ppo",
        f"network.pretrained={tiny_model}",
        "data.path=prompts.jsonl",
        "data.batch_size=4",
        "module.reward=my_rewards.py:length",
        "module.minibatch_size=4",
        "module.max_new_tokens=4",
        "module.beta=0.125",
        "trainer.max_steps=2",
        "logger=wandb",
        "logger.offline=true",
        "logger.project=alignment",
        "logger.entity=lab",
        "logger.name=first",
        "logger.tags=[tiny,numbers]",
        "output_dir=out",
        *QUIET,
    ]
    command = [sys.executable, "-m", "rlhf_lightning.cli.main", "train", *arguments]
    result = subprocess.run(command, env=without_an_account(tmp_path), capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    (folder,) = Path("out").glob("wandb/offline-run-*")
    records = wandb_records(folder)
    (run,) = (record.run for record in records if record.WhichOneof("record_type") == "run")
    assert (run.project, run.entity, run.display_name) == ("alignment", "lab", "first")
    assert set(run.tags) == {"tiny", "numbers"}
    settings = [item for record in records for item in [*record.config.update, *record.run.config.update]]
    config = {item.key: json.loads(item.value_json) for item in settings if not item.key.startswith("_")}
    assert config["module"]["beta"] == 0.125
    logged_names = {item.key or "/".join(item.nested_key) for record in records for item in record.history.item}
    assert {"ppo/score", "ppo/kl", "samples/path"} <= logged_names
    (table,) = folder.glob("files/media/table/samples*.table.json")
    samples = json.loads(table.read_text(encoding="utf-8"))
    assert {"prompt", "response", "score"} <= set(samples["columns"])
    assert samples["data"]


def test_wandb_without_an_account_is_an_input_error(tiny_model: Path, tmp_path: Path) -> None:
    # In a process of its own: wandb reads its settings once.
    command = [sys.executable, "-m", "rlhf_lightning.cli.main", "train", f"network.pretrained={tiny_model}"]
    result = subprocess.run(
        [*command, "data.path=rows.jsonl", "logger=wandb", *QUIET],
        env=without_an_account(tmp_path),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    assert "logger.offline=true" in result.stderr


def test_run_logged_by_tensorboard_holds_metrics_and_config(tiny_model: Path) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    arguments = [f"network.pretrained={tiny_model}", "data.path=rows.jsonl", "module.learning_rate=0.125", *QUIET]
    assert run_verb("train", [*arguments, "logger=tensorboard", "output_dir=out"]) == 0
    folder = Path("out/logs/version_0")
    found = events.EventAccumulator(str(folder)).Reload()
    assert {"sft/loss", "sft/val_loss"} <= set(found.Tags()["scalars"])
    assert OmegaConf.load(folder / "hparams.yaml").module.learning_rate == 0.125


@pytest.mark.usefixtures("without_tensorboard")
def test_tensorboard_that_is_not_installed_is_an_input_error_that_names_the_extra(
    tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [f"network.pretrained={tiny_model}", "data.path=rows.jsonl", "output_dir=out", *QUIET]
    assert run_verb("train", [*arguments, "logger=tensorboard"]) == 2
    assert "pip install rlhf-lightning[tensorboard]" in capsys.readouterr().err


def test_setting_that_the_trainer_refuses_is_an_input_error(
    tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [f"network.pretrained={tiny_model}", "data.path=rows.jsonl", *QUIET, "trainer.max_epochs=-7"]
    assert run_verb("train", arguments) == 2
    assert "trainer" in capsys.readouterr().err


def ppo_that_fails_after(rollouts: int, tiny_model: Path) -> list[str]:
    """Return the command of a run of 12 rollouts whose reward function raises after some of them."""
    Path("failing.py").write_text(
        "calls = []\n"
        "def reward(prompts, responses, **columns):\n"
        "    calls.append(1)\n"
        f"    assert len(calls) <= {rollouts}, 'out of order'\n"
        "    return [0.0 for _ in responses]\n",
        encoding="utf-8",
    )
    return [
        "module=ppo",
        f"network.pretrained={tiny_model}",
        "data.path=prompts.jsonl",
        "data.batch_size=8",
        "data.val_fraction=0",
        "module.reward=failing.py:reward",
        "module.minibatch_size=8",
        "module.max_new_tokens=2",
        "trainer.max_epochs=null",
        "trainer.max_steps=12",
        "logger=none",
        "output_dir=out",
        *QUIET,
    ]


def test_run_of_few_rollouts_that_fails_has_kept_some_and_says_how_to_go_on(
    tiny_model: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run_verb("train", ppo_that_fails_after(11, tiny_model)) == 2
    said = capfd.readouterr().err
    assert "reward function reward raised AssertionError: out of order" in said
    assert "Using ModelCheckpoint with manual optimization" not in said
    last = checkpoint("last", "out")
    assert last is not None
    assert f"the last checkpoint is {Path(last).absolute()}" in said
    (command,) = [line.split() for line in said.splitlines() if line.startswith("  rlhf train")]
    assert "module=ppo" in command
    assert command[-1] == "ckpt_path=last"
    assert run_verb("train", [*ppo_that_fails_after(2, tiny_model), "ckpt_path=last"]) == 0  # 2 rollouts were left


def test_run_that_fails_before_anything_was_kept_speaks_of_no_checkpoint(
    tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_verb("train", ppo_that_fails_after(1, tiny_model)) == 2
    assert "checkpoint" not in capsys.readouterr().err


def test_checkpoint_whose_link_leads_to_nothing_is_passed_over(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    (folder / "last.ckpt").symlink_to("step-10.ckpt")
    assert checkpoint("auto", str(tmp_path)) is None
    torch.save({}, folder / "step-20.ckpt")
    assert checkpoint("auto", str(tmp_path)) == str(folder / "step-20.ckpt")


def test_a_run_that_trains_nothing_says_so_and_what_the_trainer_refuses_is_one_line(
    tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [f"network.pretrained={tiny_model}", "data.path=rows.jsonl", "output_dir=out", *QUIET]
    assert run_verb("train", [*arguments, "+trainer.limit_train_batches=0"]) == 0
    assert "0 steps (nothing was trained: " in capsys.readouterr().out
    for wrong in ("+trainer.limit_train_batches=0.01", "trainer.val_check_interval=1000"):
        assert run_verb("train", [*arguments, wrong]) == 2
        assert wrong.partition("=")[0].partition("trainer.")[2] in capsys.readouterr().err


def test_a_checkpoint_that_does_not_fit_is_not_what_to_go_on_with(
    tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [f"network.pretrained={tiny_model}", "data.path=rows.jsonl", "output_dir=out", *QUIET]
    assert run_verb("train", arguments) == 0
    capsys.readouterr()
    assert run_verb("train", [*arguments, "ckpt_path=last", "module.optimizer=muon"]) == 2
    said = capsys.readouterr().err
    assert "pass module.optimizer=adamw" in said
    assert "go on with" not in said


def test_weights_alone_are_not_what_a_run_goes_on_from(tmp_path: Path) -> None:
    torch.save({"state_dict": {"weight": torch.ones(2)}}, tmp_path / "weights.ckpt")
    with pytest.raises(InputError, match=r"weights\.ckpt is no checkpoint of a training run.*network\.pretrained"):
        checkpoint(str(tmp_path / "weights.ckpt"), "out")


@pytest.mark.parametrize(
    ("signal_", "exit_code"), [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.proof)]
)
def test_stopped_run_says_what_is_kept_and_how_to_go_on(
    signal_: signal.Signals, exit_code: int, tiny_model: Path, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "rlhf_lightning.cli.main", "train", f"network.pretrained={tiny_model}"]
    more = ["data.path=rows.jsonl", "output_dir=out", *QUIET, "logger=none", "trainer.max_epochs=100000"]
    every_step = ["callbacks.checkpoint.every_n_train_steps=1"]
    # A suite that was started in the background ignores SIGINT, and so would the run.
    signal.signal(signal_, signal.SIG_DFL if signal_ == signal.SIGTERM else signal.default_int_handler)
    with subprocess.Popen(
        [*command, *more, *every_step], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ
    ) as process:
        deadline = time.monotonic() + 300
        while not Path("out/checkpoints/last.ckpt").exists():
            if process.poll() is not None or time.monotonic() > deadline:
                process.kill()
                pytest.fail(process.communicate()[1])
            time.sleep(0.1)
        process.send_signal(signal_)
        try:
            _, errors = process.communicate(timeout=60)
        finally:
            # Else one that went on would be waited for until its last epoch.
            process.kill()
    assert process.returncode == exit_code
    assert "Traceback" not in errors
    assert "the last checkpoint is" in errors
    assert "ckpt_path=last" in errors
    assert not Path("out/model").exists()


@pytest.mark.parametrize("strategy", ["fsdp", "deepspeed_2", "deepspeed_3"])
def test_ppo_refuses_a_strategy_before_anything_is_loaded(strategy: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "module=ppo",
        "network.pretrained=nowhere",
        "data.path=prompts.jsonl",
        "module.reward=my_rewards:length",
    ]
    assert run_verb("train", [*arguments, f"trainer={strategy}", "output_dir=out"]) == 2
    said = capsys.readouterr().err
    assert "cannot run PPO: " in said
    assert "Use trainer=fsdp2" in said


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is not None, reason="DeepSpeed is installed")
def test_deepspeed_that_is_not_installed_is_said_before_anything_is_loaded(
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = ["network.pretrained=nowhere", "data.path=rows.jsonl", "trainer=deepspeed_2", "trainer.accelerator=cpu"]
    assert run_verb("train", [*arguments, "trainer.devices=1", "output_dir=out", "callbacks=null"]) == 2
    assert "you must have DeepSpeed installed" in capsys.readouterr().err


@pytest.mark.proof
def test_the_same_ppo_run_on_two_processes_with_a_part_of_the_weights_each(tiny_model: Path) -> None:
    from transformers import AutoModelForCausalLM

    arguments = [*SMALL_PPO, f"network.pretrained={tiny_model}", "output_dir=out", *QUIET, "trainer=fsdp2_cpu"]
    program = [sys.executable, "-m", "rlhf_lightning.cli.main", "train"]
    for more in (["trainer.max_steps=1"], ["trainer.max_steps=2", "ckpt_path=last"]):
        subprocess.run([*program, *arguments, *more], check=True, timeout=300)
    assert len(list(Path("out/checkpoints/last.ckpt").glob("*.distcp"))) == 2
    before, after = (AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in (tiny_model, "out/model"))
    assert any(not before[name].equal(after[name]) for name in before)


def by_torchrun(node: int, port: int) -> tuple[list[str], dict[str, str]]:
    """The command of one of two nodes with a process each, and what is in its environment."""
    command = ["torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d"]
    command += [f"--rdzv-endpoint=localhost:{port}", "-m", "rlhf_lightning.cli.main", "train"]
    return [*command, "trainer=fsdp2_cpu", "trainer.num_nodes=2", "trainer.devices=1"], {}


def by_slurm(node: int, port: int) -> tuple[list[str], dict[str, str]]:
    """The same as a task of a job of Slurm, of which there is here what srun puts into the environment."""
    names = {"JOB_ID": 7, "JOB_NAME": "rlhf", "NNODES": 2, "NTASKS": 2, "NTASKS_PER_NODE": 1, "NODELIST": "localhost"}
    names |= {"NODEID": node, "PROCID": node, "LOCALID": 0}
    command = ["rlhf_lightning.cli.main", "train", "trainer=slurm", "trainer.accelerator=cpu"]
    slurm = {f"SLURM_{name}": str(value) for name, value in names.items()} | {"MASTER_PORT": str(port)}
    return [*command, "trainer.precision=32-true"], slurm


@pytest.mark.proof
@pytest.mark.parametrize("start", [by_torchrun, by_slurm])
def test_two_nodes_train_as_two_processes_of_one(
    start: Callable[[int, int], tuple[list[str], dict[str, str]]], tiny_model: Path, port: int
) -> None:
    arguments = [*SMALL_PPO, f"network.pretrained={tiny_model}", "trainer.max_steps=2", *QUIET[1:]]

    def run(*commands: tuple[list[str], dict[str, str]], folder: str) -> bytes:
        started = [
            subprocess.Popen(
                [sys.executable, "-m", *command, *arguments, f"output_dir={folder}"], env=os.environ | environment
            )
            for command, environment in commands
        ]
        try:
            assert [process.wait(timeout=300) for process in started] == [0] * len(started)
        finally:
            for process in started:
                process.kill()
                process.wait()
        assert len(list(Path(folder, "checkpoints/last.ckpt").glob("*.distcp"))) == 2
        return Path(folder, "model/model.safetensors").read_bytes()

    one = run((["rlhf_lightning.cli.main", "train", "trainer=fsdp2_cpu"], {}), folder="one")
    assert run(*(start(node, port) for node in range(2)), folder="two") == one


@pytest.mark.parametrize(("progress", "enabled", "bars"), [(True, True, 1), (False, True, 0), (True, False, 0)])
def test_a_bar_is_shown_where_nothing_turns_it_off(progress: bool, enabled: bool, bars: int) -> None:
    settings = {
        "module": {"_target_": "rlhf_lightning.modules.SFTModule"},
        "trainer": {"_target_": "lightning.Trainer", "accelerator": "cpu", "enable_progress_bar": enabled},
        "callbacks": {"progress": {"_target_": "rlhf_lightning.callbacks.ProgressBar"} if progress else None},
        "logger": None,
    }
    callbacks = build_trainer(settings).callbacks  # type: ignore[attr-defined]
    assert len([callback for callback in callbacks if isinstance(callback, ProgressBar)]) == bars
