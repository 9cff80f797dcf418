"""The worker of peers.py that runs this project.

A turn is an epoch over the rows, of PPO a rollout with its updates, of sampling a call. The first is the check.
"""

import json
import logging
import sys
import warnings
from typing import Any

import torch
from common import QUIET
from lightning import Callback, Trainer
from peers_turns import Turns, last, read

from rlhf_lightning import (
    PPODataModule,
    PPOModule,
    RewardDataModule,
    RewardModule,
    SFTDataModule,
    SFTModule,
)
from rlhf_lightning.callbacks.throughput import compute_dtype, matrix_peak
from rlhf_lightning.networks import LoRA, NetworkConfig, load_policy
from rlhf_lightning.rollout.generate import sample_tokens
from rlhf_lightning.types import PromptBatch, SampledRollout

PAD, EOS = 0, 1


def main() -> None:
    run = json.loads(sys.argv[1])
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    turns = Turns()
    work = globals()[run["stage"]]
    if not run.get("is_checked"):
        work(turns, {**run, **run["first"], "check": True})
    work(turns, {**run, "check": False})


class TakesTurns(Callback):
    """Ends a turn with each epoch; says of it how many operations it took, and how many a second a product reaches."""

    def __init__(self, turns: Turns, *, amount: float) -> None:
        self.turns, self.amount = turns, amount
        self.flops = 0.0

    def on_train_epoch_start(self, *_: Any) -> None:
        self.flops = 0.0
        self.turns.begin()

    def on_train_batch_end(self, trainer: Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.flops += float(module.work(batch).flops)

    def on_train_epoch_end(self, trainer: Trainer, module: Any) -> None:
        logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
        peak = matrix_peak(module.device, compute_dtype(trainer, module))
        self.turns.end(amount=self.amount, logged=logged, flops=self.flops, matrix_peak=peak)


def sft(turns: Turns, run: dict[str, Any]) -> None:
    rows = read(run, "sft")
    if run["responses_only"]:
        split = [(row["ids"][: row["prompt"]], row["ids"][row["prompt"] :]) for row in rows]
        data = [{"prompt": text(prompt), "response": text(response)} for prompt, response in split]
    else:
        data = [{"text": text(row["ids"])} for row in rows]
    module = SFTModule(run["folder"] + "/base", learning_rate=run["learning_rate"], lr_schedule="constant")
    batches = SFTDataModule(data, val_fraction=0, batch_size=run["batch"], group_by_length=run["group_by_length"])
    train(module, batches, turns, run, amount=sum(len(row["ids"]) + 1 for row in rows), gradient_clip_val=1.0)


def reward(turns: Turns, run: dict[str, Any]) -> None:
    rows = read(run, "reward")
    data = [{name: text(row[name]) for name in ("prompt", "chosen", "rejected")} for row in rows]
    module = RewardModule(
        run["folder"] + "/reward",
        learning_rate=run["learning_rate"],
        lr_schedule="constant",
        shift_scores=False,
        share_prompts=run.get("share_prompts", False),
    )
    batches = RewardDataModule(data, val_fraction=0, batch_size=run["batch"], group_by_length=run["group_by_length"])
    train(module, batches, turns, run, amount=len(rows), gradient_clip_val=1.0)


def ppo(turns: Turns, run: dict[str, Any]) -> None:
    rows = read(run, "ppo")
    shared = run.get("roles") == "shared"
    module = (Given if run["check"] else PPOModule)(
        NetworkConfig(run["folder"] + "/base", lora=LoRA(), roles="shared") if shared else run["folder"] + "/base",
        reward=run["folder"] + ("/reward_adapter" if shared else "/reward"),
        critic=run.get("critic", "separate"),
        ppo_epochs=run["epochs"],
        minibatch_size=len(rows),
        micro_batch_size=run["micro_batch"],
        max_new_tokens=run["new"],
        learning_rate=run["learning_rate"],
        critic_learning_rate=run["learning_rate"],
        lr_schedule="constant",
        missing_eos="subtract",
        missing_eos_penalty=0.0,
        max_grad_norm=1e9,
        # Given responses were not drawn.
        rescore=run["check"],
        preflight=False,
    )
    module.given = {tuple(row["ids"]): row["response"] for row in rows}
    batches = PPODataModule([{"prompt": text(row["ids"])} for row in rows], val_fraction=0, batch_size=len(rows))
    train(module, batches, turns, run, amount=1)


class Given(PPOModule):
    """Takes the responses that stand in the data in the place of sampled ones."""

    given: dict[tuple[int, ...], list[int]]

    def generate(self, batch: PromptBatch, draw: int) -> SampledRollout:
        prompts = zip(batch.prompt_tokens, batch.prompt_mask, strict=True)
        found = [self.given[tuple(tokens[mask].tolist())] for tokens, mask in prompts]
        longest = max(map(len, found))
        mask = torch.arange(longest) < torch.tensor([[len(x)] for x in found])
        tokens = torch.tensor([x + [PAD] * (longest - len(x)) for x in found])
        return SampledRollout(
            **vars(batch),
            tokens=torch.cat([batch.prompt_tokens, tokens], dim=1),
            attention_mask=torch.cat([batch.prompt_mask, mask], dim=1),
            response_mask=mask,
            ended=(tokens == EOS).any(dim=1),
            responses=[text(x[:-1]) for x in found],
            sampler_logprobs=torch.full(mask.shape, torch.nan, dtype=torch.float32),
        )


def sampling(turns: Turns, run: dict[str, Any]) -> None:
    network = load_policy(run["folder"] + "/base").eval()
    prompts = torch.tensor([row["ids"] for row in read(run, "sampling")])
    for _ in range(last(run)):
        turns.begin()
        found = sample_tokens(
            network,
            prompts,
            torch.ones_like(prompts, dtype=torch.bool),
            max_new_tokens=run["new"],
            temperature=0.0 if run["check"] else 1.0,
            stop_tokens=torch.tensor([], dtype=torch.long),
            generator=torch.Generator().manual_seed(0),
        )
        logged = {"tokens": found.tokens.tolist()} if run["check"] else {}
        turns.end(amount=found.tokens.numel(), logged=logged)


def train(module: Any, batches: Any, turns: Turns, run: dict[str, Any], *, amount: float, **settings: Any) -> None:
    Trainer(
        accelerator="cpu",
        max_epochs=last(run),
        **QUIET,
        precision=run.get("precision", "32-true"),
        callbacks=[TakesTurns(turns, amount=amount)],
        **settings,
    ).fit(module, batches)


def text(ids: list[int]) -> str:
    return " ".join(f"w{token - 2}" for token in ids)


if __name__ == "__main__":
    main()
