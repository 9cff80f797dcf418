"""`rlhf pipeline`: fine-tuning, reward model, PPO and the report, each stage reading the folder of the one before."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from rlhf_lightning.cli.build import build, check_exists
from rlhf_lightning.cli.checks import Config, check, plain
from rlhf_lightning.cli.interrupts import resumable
from rlhf_lightning.cli.stages import Records, run_stage
from rlhf_lightning.cli.train import ROOT_KEYS as TRAIN_KEYS
from rlhf_lightning.cli.train import build_trainer, log_settings
from rlhf_lightning.errors import InputError

if TYPE_CHECKING:
    from lightning import LightningDataModule, LightningModule, Trainer
    from lightning.pytorch.callbacks import Callback

ROOT_KEYS = [*TRAIN_KEYS, "world", "evaluate"]


def run(config: DictConfig) -> None:
    """Run what is not complete yet, and say where everything is."""
    settings = plain(config)
    check(settings, known=ROOT_KEYS)
    pipeline = Pipeline(settings)
    with resumable(lambda: f"finished stages are kept in {pipeline.folder}; the same command goes on after them"):
        pipeline.run()


class Pipeline:
    """The stages in order, on the user's files or, where ``world`` is set, on the embedded world."""

    def __init__(self, settings: Config) -> None:
        """Check where model and data come from before anything is run."""
        self.settings = settings
        self.folder = Path(settings["output_dir"])
        self.records = Records(self.folder / "stages")
        self.done: dict[str, Config] = {}
        if settings["world"] is None:
            check_sources(settings)

    def run(self) -> None:
        """Run the stages, each skipped where it is complete, and write the report."""
        if self.settings["world"] is not None:
            self._make_world()
        base = self._pretrain()
        policy = self._fine_tune(base)
        reward = self._train_reward(policy)
        self._ppo(policy, reward)
        self._evaluate({"pretrained": base, "sft": policy, "ppo": str(self.folder / "ppo")}, reward)

    def _make_world(self) -> None:
        from rlhf_lightning.world.story import write_world

        world, data = self.settings["world"], self.folder / "data"
        self._stage("world", {"world": world}, lambda: write_world(self.folder, seed=self.settings["seed"], **world))
        paths = {
            "pretrain": {"path": str(data / "text.jsonl")},
            "sft": {"path": str(data / "demonstrations.jsonl")},
            "reward": {"path": str(data / "comparisons.jsonl"), "val_path": str(data / "comparisons_held_out.jsonl")},
            "ppo": {"path": str(data / "prompts.jsonl"), "val_path": str(data / "held_out.jsonl")},
        }
        for stage, path in paths.items():
            self.settings["data"][stage] |= path

    def _pretrain(self) -> str:
        """Return what fine-tuning starts from: a network made and pre-trained here, or the one that was given."""
        if self.settings["world"] is None:
            return str(self.settings["network"]["pretrained"])
        return self._train("pretrain", str(self.folder / "initial"))

    def _fine_tune(self, base: str) -> str:
        if self.settings["data"]["sft"]["path"] is None:
            return _skipped("sft", "data.sft.path is not set", base)
        return self._train("sft", base)

    def _train_reward(self, policy: str) -> Any:
        """Return the reward that PPO maximises: the one that was given, or the model trained here."""
        if self.settings["data"]["reward"]["path"] is None:
            return _skipped("reward", "data.reward.path is not set", self.settings["module"]["ppo"]["reward"])
        if self.settings["world"] is not None:
            self._compare(policy)
        return self._train("reward", policy)

    def _compare(self, policy: str) -> None:
        """Let the world's judge rank what the fine-tuned policy samples."""
        from rlhf_lightning.world.story import write_comparisons

        world = self.settings["world"]
        self._stage(
            "comparisons",
            {"world": world},
            lambda: write_comparisons(
                self.folder / "data", policy, self._sampling(), seed=self.settings["seed"], **world
            ),
        )

    def _ppo(self, policy: str, reward: Any) -> None:
        self.settings["module"]["ppo"]["reward"] = reward
        callbacks: Callable[[], list[Callback]] = list
        if self.settings["world"] is not None:
            from rlhf_lightning.callbacks import ScoreMonitor
            from rlhf_lightning.world import Judge

            # For the report's curve alone: nothing of the judge reaches the updates.
            def callbacks() -> "list[Callback]":
                return [ScoreMonitor("judge_score", Judge().score)]

        self._train("ppo", policy, callbacks=callbacks)

    def _train(self, stage: str, model: str, *, callbacks: "Callable[[], list[Callback]]" = list) -> str:
        """Train one stage from the folder ``model`` and return the folder that it writes."""
        network = {**self.settings["network"], "pretrained": model}
        settings = {
            "seed": self.settings["seed"],
            "module": {**self.settings["module"][stage], "model": network},
            "data": self.settings["data"][stage],
            "trainer": self.settings["trainer"][stage],
        }
        self._stage(stage, settings, lambda: train(self.settings | settings, stage, self.folder, callbacks()))
        return str(self.folder / stage)

    def _evaluate(self, policies: dict[str, str], reward: Any) -> None:
        """Let the judge, or else the reward, compare the policies on held-out prompts, and write the report."""
        settings = {
            "seed": self.settings["seed"],
            "evaluate": self.settings["evaluate"],
            "sampling": self._sampling(),
            "data": self.settings["data"]["ppo"],
        }
        self._stage("evaluate", settings, lambda: self._gather(policies, reward))
        self._report()

    def _gather(self, policies: dict[str, str], reward: Any) -> Config:
        from rlhf_lightning.evaluation.evidence import gather_answers, measure_reward
        from rlhf_lightning.modules import RewardModule
        from rlhf_lightning.world import Judge

        judge = None if self.settings["world"] is None else Judge().score
        sampling, seed = self._sampling(), self.settings["seed"]
        found = gather_answers(policies, self._held_out_prompts, reward=reward, judge=judge, seed=seed, **sampling)
        if "reward" in self.done:
            model = RewardModule(reward)
            data = build("data.reward", self.settings["data"]["reward"], tokenizer=model.tokenizer)
            data.setup("validate")
            found["reward_card"] = measure_reward(model, data.val_dataloader()).as_dict()
        return found

    def _held_out_prompts(self, tokenizer: Any, max_length: int | None) -> list[Any]:
        """Return PPO's validation prompts, the first ``evaluate.prompts`` of them in whole batches."""
        data = build("data.ppo", self.settings["data"]["ppo"], tokenizer=tokenizer, max_prompt_length=max_length)
        data.setup("validate")
        count = self.settings["evaluate"]["prompts"]
        return list(data.val_dataloader())[: -(-count // data.batch_size)]

    def _report(self) -> None:
        from rlhf_lightning.evaluation.report import write_report
        from rlhf_lightning.evaluation.summary import summarise

        report = summarise(
            self.done,
            seed=self.settings["seed"],
            judge="reward model" if self.settings["world"] is None else "world",
            samples=self.settings["evaluate"]["samples"],
        )
        page = write_report(report, self.folder)
        say(self.folder, page, report)

    def _sampling(self) -> Config:
        """Return how responses are sampled outside of training: as PPO samples them."""
        ppo = self.settings["module"]["ppo"]
        return {"max_new_tokens": ppo["max_new_tokens"], "temperature": ppo["temperature"]}

    def _stage(self, name: str, settings: Config, body: Callable[[], Config]) -> None:
        self.done[name] = run_stage(self.records, name, settings, body)


def train(settings: Config, stage: str, folder: Path, callbacks: "list[Callback]") -> Config:
    """Train the stage, write its Hugging Face folder, and return what was measured."""
    from lightning import seed_everything

    from rlhf_lightning.callbacks import History

    # Each stage starts from the seed, so that skipping the ones before does not change it.
    seed_everything(settings["seed"], workers=True, verbose=False)
    module: LightningModule = build(f"module.{stage}", settings["module"])
    data: LightningDataModule = build(f"data.{stage}", settings["data"])
    history = History()
    trainer = build_trainer(stage_settings(settings, stage, folder))
    trainer.callbacks.extend([*callbacks, history])
    log_settings(trainer, settings)
    trainer.fit(module, datamodule=data)
    return {
        "steps": trainer.global_step,
        "metrics": {name: float(value) for name, value in trainer.callback_metrics.items()},
        "curves": history.curves,
    }


def stage_settings(settings: Config, stage: str, folder: Path) -> Config:
    """Return the settings with the callbacks and loggers of one stage: each exports to, and logs to, its own folder."""
    export = {"_target_": "rlhf_lightning.callbacks.HuggingFaceExport", "dirpath": str(folder / stage)}
    logger = settings["logger"]
    if logger is not None and "_target_" in logger:
        name = stage if logger["name"] in (None, "logs") else f"{logger['name']}-{stage}"
        logger = {**logger, "name": name, "save_dir": str(folder / "logs")}
    return {**settings, "callbacks": {**settings["callbacks"], "export": export}, "logger": logger}


def check_sources(settings: Config) -> None:
    """Raise `InputError` where the user's files or network are not all named, or not there."""
    if settings["network"]["pretrained"] is None:
        raise InputError(
            "network.pretrained is required (a Hugging Face folder or hub name) when the pipeline runs on your files; "
            "without any data.*.path and network.pretrained it runs on the embedded world"
        )
    if settings["data"]["ppo"]["path"] is None:
        raise InputError("data.ppo.path is required (prompts, a .jsonl file): PPO is what the pipeline is for")
    if settings["data"]["reward"]["path"] is None and settings["module"]["ppo"]["reward"] is None:
        raise InputError(
            "a reward is required: pass data.reward.path=COMPARISONS to train one, or module.ppo.reward=FOLDER or "
            "file.py:function"
        )


def say(folder: Path, page: Path, report: Config) -> None:
    """Print where everything is, the figures, and one sample before and after."""
    from rich.console import Console

    console = Console(highlight=False)
    sample = report["samples"][0]
    lines = [
        "",
        *(f"{name:<22} {folder / name}" for name in ("pretrain", "sft", "reward", "ppo") if (folder / name).exists()),
        f"{'report':<22} {page}",
        "",
        *(
            f"win rate against demonstrations, {name:<11} {rate['mean']:.1%} ({rate['low']:.1%} to {rate['high']:.1%})"
            for name, rate in report["win_rate"].items()
        ),
        "",
        f"prompt      {sample['prompt']}",
        *(f"{name:<11} {text}" for name, text in sample["responses"].items() if name in ("sft", "ppo")),
    ]
    console.print("\n".join(lines), markup=False, soft_wrap=True)


def _skipped(stage: str, why: str, value: Any) -> Any:
    print(f"\n=== {stage}: left out, {why}", flush=True)
    return value
