"""The worker of peers.py that runs TRL, or `transformers` alone; it knows nothing of this project.

A turn is an epoch over the rows, of PPO a rollout with its updates, of sampling a call. The first is the check.
"""

import json
import logging
import sys
import tempfile
import warnings
from typing import Any

import torch
import transformers
from datasets import Dataset
from peers_turns import Turns, last, read
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback

PAD, EOS = 0, 1


def main() -> None:
    run = json.loads(sys.argv[1])
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    if not run.get("plain"):
        __import__("trl.experimental.ppo" if run["stage"] == "ppo" else "trl")
    turns = Turns()
    work = globals()[run["stage"]]
    with tempfile.TemporaryDirectory() as folder:
        if not run.get("is_checked"):
            work(turns, {**run, **run["first"], "check": True}, folder)
        work(turns, {**run, "check": False}, folder)


class TakesTurns(TrainerCallback):
    """Ends a turn with each epoch, or with each step where a step is a rollout."""

    def __init__(self, turns: Turns, *, amount: float, last: int, each_step: bool = False) -> None:
        self.turns, self.amount, self.left, self.each_step = turns, amount, last, each_step
        self.logged: dict[str, float] = {}

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.turns.begin()

    def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
        self.logged |= logs

    def on_step_end(self, *_: Any, **__: Any) -> None:
        if self.each_step:
            self.end_turn()

    def on_epoch_end(self, *_: Any, **__: Any) -> None:
        if not self.each_step:
            self.end_turn()

    def end_turn(self) -> None:
        self.turns.end(amount=self.amount, logged=self.logged)
        self.left -= 1
        if self.left:
            self.turns.begin()


def sft(turns: Turns, run: dict[str, Any], folder: str) -> None:
    rows = read(run, "sft")
    if run.get("sorted"):
        rows.sort(key=lambda row: len(row["ids"]))
    ids = [[*row["ids"], EOS] for row in rows]
    # The first token of a text has nothing to be predicted from, and a shift leaves it out.
    skipped = [row["prompt"] if run["responses_only"] else 0 for row in rows]
    labels = [[-100] * n + x[n:] for n, x in zip(skipped, ids, strict=True)]
    data = Dataset.from_dict({"input_ids": ids, "labels": labels})
    settings = common(run, folder) | {"train_sampling_strategy": "sequential" if run.get("sorted") else "random"}
    if run.get("plain"):
        kind: Any = transformers.Trainer
        arguments: Any = transformers.TrainingArguments(**settings)
    else:
        from trl import SFTConfig, SFTTrainer

        kind, arguments = SFTTrainer, SFTConfig(**settings, **run.get("settings", {}))
    tokenizer = AutoTokenizer.from_pretrained(run["folder"] + "/base")
    collate = transformers.DataCollatorForSeq2Seq(tokenizer) if run.get("plain") else None
    taking = TakesTurns(turns, amount=sum(map(len, ids)), last=last(run))
    kind(
        AutoModelForCausalLM.from_pretrained(run["folder"] + "/base"),
        arguments,
        data_collator=collate,
        train_dataset=data,
        processing_class=tokenizer,
        callbacks=[taking],
    ).train()


def reward(turns: Turns, run: dict[str, Any], folder: str) -> None:
    from trl import RewardConfig, RewardTrainer

    rows = read(run, "reward")
    if run.get("sorted"):
        rows.sort(key=lambda row: max(len(row["chosen"]), len(row["rejected"])))
    data = Dataset.from_dict(
        {f"{x}_ids": [[*row["prompt"], *row[x], EOS] for row in rows] for x in ("chosen", "rejected")}
    )
    settings = common(run, folder) | {"train_sampling_strategy": "sequential" if run.get("sorted") else "random"}
    RewardTrainer(
        AutoModelForSequenceClassification.from_pretrained(run["folder"] + "/reward"),
        RewardConfig(**settings),
        train_dataset=data,
        processing_class=AutoTokenizer.from_pretrained(run["folder"] + "/base"),
        callbacks=[TakesTurns(turns, amount=len(rows), last=last(run))],
    ).train()


def ppo(turns: Turns, run: dict[str, Any], folder: str) -> None:
    from peft import LoraConfig
    from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

    prompts = [row["ids"] for row in read(run, "ppo")]
    sample = ppo_trainer.batch_generation
    if run["check"]:
        ppo_trainer.batch_generation = given(read(run, "ppo"), run["new"])
    micro_batch = len(prompts) if run.get("whole") else run["micro_batch"]
    settings = common(run, folder) | {
        "per_device_train_batch_size": micro_batch,
        "gradient_accumulation_steps": len(prompts) // micro_batch,
        "num_ppo_epochs": run["epochs"],
        "total_episodes": last(run) * len(prompts),
        "response_length": run["new"],
        "stop_token": "eos",
        "temperature": 1.0,
        "num_sample_generations": 0,
        "local_rollout_forward_batch_size": len(prompts),
        "adam_epsilon": 1e-5,
    }
    reward_model, value_model = (
        AutoModelForSequenceClassification.from_pretrained(run["folder"] + "/reward") for _ in range(2)
    )
    lora = run.get("lora")
    reference = None if lora else AutoModelForCausalLM.from_pretrained(run["folder"] + "/base")
    PPOTrainer(
        PPOConfig(**settings),
        AutoTokenizer.from_pretrained(run["folder"] + "/base", padding_side="left"),
        AutoModelForCausalLM.from_pretrained(run["folder"] + "/base"),
        ref_model=reference,
        reward_model=reward_model,
        value_model=value_model,
        train_dataset=Dataset.from_dict({"input_ids": prompts}),
        callbacks=[TakesTurns(turns, amount=1, last=last(run), each_step=True)],
        peft_config=LoraConfig(task_type="CAUSAL_LM", **lora) if lora else None,
    ).train()
    ppo_trainer.batch_generation = sample


def given(rows: list[dict[str, Any]], new: int) -> Any:
    """Return what takes the place of sampling: the responses that stand in the data."""

    def batch_generation(model: Any, queries: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
        from trl.experimental.ppo.ppo_trainer import forward

        responses = {tuple(row["ids"]): row["response"] for row in rows}
        found = [responses[tuple(query[query != PAD].tolist())] for query in queries]
        padded = torch.tensor([x + [PAD] * (new - len(x)) for x in found])
        both = torch.cat([queries, padded], dim=1)
        with torch.no_grad():
            return both, forward(model, both, PAD).logits[:, queries.shape[1] - 1 : -1]

    return batch_generation


def sampling(turns: Turns, run: dict[str, Any], _: str) -> None:
    network = AutoModelForCausalLM.from_pretrained(run["folder"] + "/base").eval()
    prompts = torch.tensor([row["ids"] for row in read(run, "sampling")])
    draw: dict[str, Any] = {"do_sample": False} if run["check"] else {"do_sample": True, "top_k": 0}
    for _ in range(last(run)):
        turns.begin()
        found = network.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            max_new_tokens=run["new"],
            min_new_tokens=run["new"],
            pad_token_id=PAD,
            cache_implementation=run["cache"],
            **draw,
        )
        logged = {"tokens": found[:, prompts.shape[1] :].tolist()} if run["check"] else {}
        turns.end(amount=len(prompts) * run["new"], logged=logged)


def common(run: dict[str, Any], folder: str) -> dict[str, Any]:
    return {
        "output_dir": folder,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": run.get("gradient_checkpointing", False),
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_steps": 1 if run["check"] else 10,
        "learning_rate": run["learning_rate"],
        "lr_scheduler_type": "constant",
        "num_train_epochs": last(run),
        "per_device_train_batch_size": run["batch"],
    }


if __name__ == "__main__":
    main()
