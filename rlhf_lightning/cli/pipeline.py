"""`rlhf pipeline`: fine-tuning, reward model, PPO and the report, each stage reading the folder of the one before."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from rlhf_lightning.cli.build import build, build_all
from rlhf_lightning.cli.checks import Config, check, plain
from rlhf_lightning.cli.console import quieten_libraries
from rlhf_lightning.cli.interrupts import resumable
from rlhf_lightning.cli.stages import Records, run_stage
from rlhf_lightning.cli.train import ROOT_KEYS as TRAIN_KEYS
from rlhf_lightning.cli.train import build_trainer, closing_loggers, log_settings
from rlhf_lightning.errors import InputError

if TYPE_CHECKING:
    from lightning import LightningDataModule, LightningModule
    from lightning.pytorch.callbacks import Callback

    from rlhf_lightning.networks import NetworkConfig
    from rlhf_lightning.types import RewardFunction

ROOT_KEYS = [*TRAIN_KEYS, "world", "evaluate"]

SAMPLING_BATCH = 512
"""Prompts that the world's policy answers at a time for the comparisons: small networks are fastest on many rows."""

WORLD_FILES = {
    "pretrain": {"path": "text.jsonl"},
    "sft": {"path": "demonstrations.jsonl"},
    "reward": {"path": "comparisons.jsonl", "val_path": "comparisons_held_out.jsonl"},
    "ppo": {"path": "prompts.jsonl", "val_path": "held_out.jsonl"},
}


def run(config: DictConfig) -> None:
    """Run what is not complete yet, and say where everything is."""
    settings = plain(config)
    wire(settings)
    check(settings, known=ROOT_KEYS)
    quieten_libraries()
    pipeline = Pipeline(settings)
    with resumable(lambda: f"finished stages are kept in {pipeline.folder}; the same command goes on after them"):
        pipeline.run()


def wire(settings: Config) -> None:
    """Fill in where each stage reads: the user's files or the world's, and the folder of the stage before.

    Raises `InputError` where the user's files or network are not all named, or with a ``ckpt_path``. A stage without a
    file is left out, and what follows reads what it would have read.
    """
    folder = Path(settings["output_dir"])
    data, module = settings["data"], settings["module"]
    if settings["world"] is not None:
        for stage, files in WORLD_FILES.items():
            data[stage] |= {name: str(folder / "data" / file) for name, file in files.items()}
        settings["network"]["pretrained"] = str(folder / "initial")
    _check_sources(settings)
    _check_held_out(settings)
    model = settings["network"]["pretrained"]
    for stage in ("pretrain", "sft", "reward", "ppo"):
        module[stage]["model"] = {**settings["network"], "pretrained": model}
        if data[stage]["path"] is None:
            del data[stage], module[stage]
        elif stage in ("pretrain", "sft"):
            model = str(folder / stage)
        elif stage == "reward":
            module["ppo"]["reward"] = str(folder / "reward")


def _check_sources(settings: Config) -> None:
    data = settings["data"]
    if settings["ckpt_path"] is not None:
        raise InputError(
            f"ckpt_path={settings['ckpt_path']}: the pipeline goes on after its last complete stage by itself when the "
            "same command is run again; ckpt_path is for `rlhf train`"
        )
    if settings["network"]["pretrained"] is None:
        raise InputError(
            "network.pretrained is required (a Hugging Face folder or hub name) when the pipeline runs on your files; "
            "with neither of them, `rlhf pipeline` runs on its embedded world"
        )
    if data["ppo"]["path"] is None:
        raise InputError("data.ppo.path is required (a .jsonl file with rows {prompt}): pass data.ppo.path=FILE")
    if data["reward"]["path"] is not None and settings["module"]["ppo"]["reward"] is not None:
        raise InputError(
            f"module.ppo.reward={settings['module']['ppo']['reward']!r} is not used where a reward model is trained: "
            f"PPO takes the one of data.reward.path={data['reward']['path']}; leave one of the two out"
        )
    if data["reward"]["path"] is None and settings["module"]["ppo"]["reward"] is None:
        raise InputError(
            "a reward is required: pass data.reward.path=FILE with comparisons to train one, or module.ppo.reward= a "
            "reward-model folder, a hub name, or file.py:function"
        )


def _check_held_out(settings: Config) -> None:
    for name in ("prompts", "samples"):
        if settings["evaluate"][name] < 1:
            raise InputError(f"evaluate.{name}={settings['evaluate'][name]} must be at least 1")
    for stage in ("reward", "ppo"):
        data = settings["data"][stage]
        if data["path"] is not None and not (data["val_fraction"] or data["val_path"] or data["val_split"]):
            raise InputError(
                f"data.{stage}.val_fraction=0 keeps nothing to evaluate on at the end: set it above 0, or pass "
                f"data.{stage}.val_path"
            )


class Pipeline:
    """The stages in order, each run once and skipped where it is complete."""

    def __init__(self, settings: Config) -> None:
        """Take settings that `wire` has filled in."""
        self.settings = settings
        self.folder = Path(settings["output_dir"])
        self.records = Records(self.folder / "stages")
        self.done: dict[str, Config] = {}
        self.evaluated_now = False

    def run(self) -> None:
        """Run the stages and write the report."""
        if self.settings["world"] is not None:
            self._make_world()
        for stage in ("pretrain", "sft", "reward", "ppo"):
            if stage not in self.settings["module"]:
                continue
            if stage == "reward" and self.settings["world"] is not None:
                self._compare()
            self._train(stage)
        self._evaluate()
        self._report()

    def _make_world(self) -> None:
        from rlhf_lightning.world.story import write_world

        world, seed = self.settings["world"], self.settings["seed"]
        self._stage(
            "world",
            {"world": world, "seed": seed},
            lambda: write_world(self.folder, seed=seed, **world),
            outputs=[self.folder / "data", self.folder / "initial"],
        )

    def _compare(self) -> None:
        """Let the world's judge rank what the fine-tuned policy samples."""
        from rlhf_lightning.world.story import write_comparisons

        world, seed = self.settings["world"], self.settings["seed"]
        policy = self.settings["module"]["reward"]["model"]["pretrained"]
        self._stage(
            "comparisons",
            {"world": world, "seed": seed, "sampling": self._sampling()},
            lambda: write_comparisons(self.folder / "data", self._sampler(policy), seed=seed, **world),
            outputs=[self.folder / "data" / file for file in WORLD_FILES["reward"].values()],
        )

    def _train(self, stage: str) -> None:
        """Train one stage into its folder."""
        settings = {name: self.settings[name][stage] for name in ("module", "data", "trainer")}
        settings["seed"] = self.settings["seed"]
        callbacks = self._onlookers() if stage == "ppo" else []
        self._stage(
            stage,
            settings,
            lambda: train(self.settings | settings, stage, self.folder, callbacks),
            outputs=[self.folder / stage],
        )

    def _onlookers(self) -> "list[Callback]":
        """Return the judge as a monitor of PPO, for the report's curve alone: nothing of it reaches the updates."""
        from rlhf_lightning.callbacks import ScoreMonitor

        judge = self._judge()
        return [] if judge is None else [ScoreMonitor("judge_score", judge)]

    def _judge(self) -> "RewardFunction | None":
        from rlhf_lightning.world import Judge

        return None if self.settings["world"] is None else Judge().score

    def _evaluate(self) -> None:
        settings = {
            "seed": self.settings["seed"],
            "evaluate": self.settings["evaluate"],
            "sampling": self._sampling(),
            "data": self.settings["data"]["ppo"],
        }
        self.evaluated_now = self.records.read("evaluate") is None
        self._stage("evaluate", settings, self._gather)

    def _gather(self) -> Config:
        """Let the judge and the reward compare the policies on held-out prompts, and measure the reward model."""
        from rlhf_lightning.evaluation.evidence import gather_answers, load_reward_module, measure_reward

        found = gather_answers(
            self._policies(),
            self._held_out_prompts,
            reward=self._reward(),
            judge=self._judge(),
            seed=self.settings["seed"],
            **self._sampling(),
        )
        if "reward" in self.settings["module"]:
            model = load_reward_module(self.folder / "reward")
            data = build("data.reward", self.settings["data"]["reward"], tokenizer=model.tokenizer)
            data.setup("validate")
            found["reward_card"] = measure_reward(model, data.val_dataloader()).as_dict()
        return found

    def _reward(self) -> Any:
        reward = self.settings["module"]["ppo"]["reward"]
        return build("module.ppo.reward", reward) if isinstance(reward, dict) else reward

    def _policies(self) -> "dict[str, NetworkConfig]":
        """Return the networks to compare: before fine-tuning, before PPO (which is PPO's reference), and after."""
        module = self.settings["module"]
        first, reference = next(iter(module.values()))["model"], module["ppo"]["model"]
        started = str(self.folder / "pretrain") if "pretrain" in module else first["pretrained"]
        nodes = {
            "pretrained": first | {"pretrained": started},
            "sft": reference,
            "ppo": reference | {"pretrained": str(self.folder / "ppo")},
        }
        if started == reference["pretrained"]:
            del nodes["pretrained"]
        return {name: build("network", node) for name, node in nodes.items()}

    def _held_out_prompts(self, tokenizer: Any, max_length: int | None) -> list[Any]:
        """Return PPO's validation prompts, whole batches until there are ``evaluate.prompts``."""
        batches = self._prompts({"max_prompt_length": max_length}, tokenizer)
        if not batches:
            raise InputError("data.ppo leaves no held-out prompt to compare the policies on")
        count = self.settings["evaluate"]["prompts"]
        return batches[: -(-count // self.settings["data"]["ppo"]["batch_size"])]

    def _sampler(self, policy: str) -> "Callable[[Sequence[Any], int], list[str]]":
        """Return the function that samples a response of the policy to the prompt of each row."""
        from rlhf_lightning.evaluation.policies import answer
        from rlhf_lightning.networks import load_policy, load_tokenizer

        def sample(rows: "Sequence[Any]", seed: int) -> list[str]:
            network, tokenizer = load_policy(policy), load_tokenizer(policy)
            batches = self._prompts({"batch_size": SAMPLING_BATCH}, tokenizer, rows=rows)
            return answer(network, tokenizer, batches, seed=seed, **self._sampling()).responses

        return sample

    def _prompts(self, changes: Config, tokenizer: Any, rows: "Sequence[Any] | None" = None) -> list[Any]:
        """Return the validation prompts of PPO's data, or those of other rows, with some of its settings changed."""
        data = build("data.ppo", self.settings["data"]["ppo"] | changes, tokenizer=tokenizer)
        if rows is not None:
            # Not through the config: Hydra walks through every value of a node, some milliseconds a row.
            data.path, data.val_path = rows[:1], rows
        data.setup("validate")
        return list(data.val_dataloader())

    def _sampling(self) -> Config:
        """Return how responses are sampled outside of training: as PPO samples them."""
        ppo = self.settings["module"]["ppo"]
        return {"max_new_tokens": ppo["max_new_tokens"], "temperature": ppo["temperature"]}

    def _stage(
        self, name: str, settings: Config, body: Callable[[], Config], *, outputs: "Sequence[Path]" = ()
    ) -> None:
        self.done[name] = run_stage(self.records, name, settings, body, outputs=outputs, before=self.done)

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
        if self.evaluated_now:
            self._track(report)
        say(self.folder, page, report)

    def _track(self, report: Config) -> None:
        """Send the report's numbers and figures to the loggers."""
        from rlhf_lightning.callbacks import log_figures, log_headline
        from rlhf_lightning.evaluation.report import report_figures

        nodes = stage_settings(self.settings, "report", self.folder)["logger"]
        loggers = build_all("logger", nodes).values()
        with closing_loggers(loggers):
            log_headline(loggers, report)
            log_figures(loggers, report_figures(report))


def train(settings: Config, stage: str, folder: Path, callbacks: "list[Callback]") -> Config:
    """Train the stage, write its Hugging Face folder, and return what was measured."""
    from lightning import seed_everything

    from rlhf_lightning.callbacks import History

    # Each stage starts from the seed, so that skipping the ones before does not change it.
    seed_everything(settings["seed"], workers=True, verbose=False)
    module: LightningModule = build(f"module.{stage}", settings["module"])
    data: LightningDataModule = build(f"data.{stage}", settings["data"])
    history = History()
    trainer = build_trainer(stage_settings(settings, stage, folder), [*callbacks, history])
    with closing_loggers(trainer.loggers):
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


def say(folder: Path, page: Path, report: Config) -> None:
    """Print where everything is, the figures, and one sample before and after."""
    from rich.console import Console

    sample = report["samples"][0]
    stages = [name for name in ("pretrain", "sft", "reward", "ppo") if (folder / name).exists()]
    rates = report["win_rate"].items()
    lines = [
        "",
        *(f"{name:<12}{folder / name}" for name in stages),
        f"{'report':<12}{page}",
        "",
        *(f"{name:<12}wins {rate['mean']:.0%} [{rate['low']:.0%}, {rate['high']:.0%}]" for name, rate in rates),
        "",
        f"{'prompt':<12}{sample['prompt']}",
        *(f"{name:<12}{sample['responses'][name]}" for name in ("sft", "ppo")),
    ]
    Console(highlight=False).print("\n".join(lines), markup=False, soft_wrap=True)
