"""How far the losses of 20 updates move by each of the ways to save work, from one seed.

`python tests/benchmarks/same_losses.py` trains a small Llama by each stage as the package does by itself, and again
with one way to save work left out, or put in where it is a setting. It prints a JSON line for each: the largest
difference of the 20 losses, over the largest of them. "Other rounding" is the measure beside which these stand: nothing
is left out, and one weight is another number in its last place. PPO's losses are the policy's and the critic's.
"""

import argparse
import json
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
from common import QUIET, with_layers_of_peft, word_tokenizer
from lightning import Callback, LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from rlhf_lightning.data.collating import RankedSequences, comparison_batch, sft_batch
from rlhf_lightning.data.tokenizing import TokenSequence
from rlhf_lightning.modules import PPOModule, RewardModule, SFTModule
from rlhf_lightning.networks import LoRA, by_sequence, few_passes, last_block, length_groups, predictions
from rlhf_lightning.networks.checkpointing import checkpoint_blocks
from rlhf_lightning.networks.compiling import compile_blocks
from rlhf_lightning.networks.lora import add_adapter, train_adapter
from rlhf_lightning.networks.unpadded import reading_padding
from rlhf_lightning.rollout import reordered
from rlhf_lightning.types import PromptBatch

UPDATES, EPOCHS = 20, 4
LARGEST_MOVE = 1e-4
VOCABULARY, WORDS = 512, 40
"""Of which the data has so many words: the loss falls while they are learnt."""
SIZE: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 4, "num_attention_heads": 4}
ROWS, LONGEST = 8, 96

Losses = dict[str, list[float]]
"""Of each kind of loss that of each update, and of each weight its sum at the end."""

WEIGHTS = "weights"


def unchanged(_: nn.Module) -> None:
    return None


@dataclass(frozen=True)
class Way:
    """A way to train."""

    settings: dict[str, Any] = field(default_factory=dict)
    """Of the module."""
    change: Callable[[nn.Module], object] = unchanged
    """Done to the network before the module is made of it."""
    block: Callable[[], AbstractContextManager[object]] = nullcontext
    """In which it trains."""
    beside: "Way | None" = None
    """What it is compared with; None: the package by itself."""


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for stage, ways in ((sft, SFT), (reward, REWARD), (ppo, PPO), (adapters, ADAPTERS)):
        by_itself = stage(Way())
        assert by_itself == stage(Way()), "numbers move by themselves"
        for name, way in {"other rounding": Way(change=round_otherwise), **ways}.items():
            found, expected = stage(way), stage(way.beside) if way.beside else by_itself
            moves = {kind: moved(found[kind], expected[kind]) for kind in expected if kind != WEIGHTS}
            print(json.dumps({"stage": stage.__name__, "way": name} | moves), flush=True)
            assert max(moves.values()) < LARGEST_MOVE, moves
            # To run blocks again is the one way that computes the very same numbers; losses may be equal by chance.
            assert found[WEIGHTS] != expected[WEIGHTS] or way.change is checkpoint_blocks, "nothing was left out"


def moved(found: list[float], expected: list[float]) -> float:
    assert len(found) == len(expected) == UPDATES
    largest = max(abs(one - other) for one, other in zip(found, expected, strict=True))
    return float(f"{largest / max(map(abs, expected)):.1e}")


def sft(way: Way) -> Losses:
    batches = [
        sft_batch([TokenSequence(ids, len(ids) // 2) for ids in texts(ROWS, seed)], pad_token_id=0)
        for seed in range(UPDATES)
    ]
    module = SFTModule(llama(LlamaForCausalLM, way), learning_rate=1e-3, **way.settings)
    return logged(module, batches, way, "sft/loss")


def reward(way: Way) -> Losses:
    batches = []
    for seed in range(UPDATES):
        rows = texts(ROWS, seed)
        # The two of a pair have one prompt.
        sequences = [TokenSequence(torch.cat([rows[i - i % 2][:8], row[8:]]), 8) for i, row in enumerate(rows)]
        pairs = [RankedSequences(sequences[i : i + 2], ranks=[0, 1], ratings=[0.0, 0.0]) for i in range(0, ROWS, 2)]
        batches.append(comparison_batch(pairs, pad_token_id=0))
    module = RewardModule(
        llama(LlamaForSequenceClassification, way, num_labels=1),
        tokenizer=word_tokenizer(VOCABULARY),
        learning_rate=1e-4,
        shift_scores=False,
        **way.settings,
    )
    return logged(module, batches, way, "reward/loss")


def ppo(way: Way) -> Losses:
    return by_ppo(llama(LlamaForCausalLM, way), way)


def adapters(way: Way) -> Losses:
    policy = llama(LlamaForCausalLM, Way())
    add_adapter(policy, LoRA())
    train_adapter(policy)
    way.change(policy)
    return by_ppo(policy, way, critic="shared_trunk")


def by_ppo(policy: nn.Module, way: Way, **settings: Any) -> Losses:
    module = UpdateByUpdate(
        policy,
        reward=lambda prompts, responses: [float(len(set(response.split()))) for response in responses],
        tokenizer=word_tokenizer(VOCABULARY),
        minibatch_size=ROWS,
        ppo_epochs=EPOCHS,
        max_new_tokens=32,
        # Responses seldom end.
        missing_eos="subtract",
        missing_eos_penalty=0.0,
        learning_rate=1e-4,
        critic_learning_rate=1e-4,
        preflight=False,
        **settings,
        **way.settings,
    )
    prompts = [ids[: len(ids) // 2] for ids in texts(ROWS, 0)]
    longest = max(map(len, prompts))
    tokens = torch.stack([nn.functional.pad(ids, (longest - len(ids), 0)) for ids in prompts])
    said = [" ".join(f"w{i - 2}" for i in ids) for ids in prompts]
    train(module, [PromptBatch(tokens, tokens != 0, list(said), said, {})] * (UPDATES // EPOCHS), way)
    return {**module.losses_of_updates, WEIGHTS: sums(module)}


def sums(module: LightningModule) -> list[float]:
    return [float(weight.detach().double().sum()) for weight in module.parameters()]


class UpdateByUpdate(PPOModule):
    """Keeps the losses of each update: what a rollout logs is the mean of its updates."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.losses_of_updates: Losses = {"policy_loss": [], "value_loss": []}

    def _accumulate_gradients(self, minibatch: Any) -> dict[str, torch.Tensor]:
        means = super()._accumulate_gradients(minibatch)
        for name, losses in self.losses_of_updates.items():
            losses.append(float(means[name]))
        return means


def llama(kind: Any, way: Way, **more: Any) -> Any:
    torch.manual_seed(0)
    made = kind(LlamaConfig(**SIZE, vocab_size=VOCABULARY, pad_token_id=0, eos_token_id=1, **more)).eval()
    way.change(made)
    return made


def texts(count: int, seed: int) -> list[torch.Tensor]:
    noise = torch.Generator().manual_seed(seed)
    lengths = torch.randint(LONGEST // 4, LONGEST + 1, (count,), generator=noise).tolist()
    return [torch.randint(2, 2 + WORDS, (length,), generator=noise) for length in lengths]


def train(module: LightningModule, batches: list[Any], way: Way, *callbacks: Callback) -> None:
    trainer = Trainer(accelerator="cpu", devices=1, max_epochs=1, callbacks=[*callbacks], **QUIET)
    loader: Any = DataLoader(batches, batch_size=None, collate_fn=lambda batch: batch)  # type: ignore[arg-type]
    torch.manual_seed(0)
    with way.block():
        trainer.fit(module, loader)


def logged(module: LightningModule, batches: list[Any], way: Way, name: str) -> Losses:
    log = Logged(name)
    train(module, batches, way, log)
    return {"loss": log.found, WEIGHTS: sums(module)}


class Logged(Callback):
    """What was logged under a name after each step."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.found: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self.found.append(float(trainer.callback_metrics[self.name]))


def without(owner: Any, name: str, other: Any = lambda *_, **__: None) -> Callable[[], AbstractContextManager[object]]:
    """Return the block in which a part of the package is another one."""
    return lambda: patch.object(owner, name, other)


@contextmanager
def reading_all() -> Iterator[None]:
    """What is left where blocks are compiled, or run again in the backward: all is read, operation by operation."""
    with reading_padding(), NOT_THE_LAST_BLOCK(), IN_MANY_PASSES():
        yield


@torch.no_grad()
def round_otherwise(network: Any) -> None:
    weight = network.get_input_embeddings().weight
    weight[2, 0] = torch.nextafter(weight[2, 0], torch.tensor(torch.inf))


ADAMW = torch.optim.AdamW


def unfused(groups: Any, *, fused: Any, **settings: Any) -> torch.optim.Optimizer:
    return ADAMW(groups, **settings)


NOT_THE_LAST_BLOCK = without(last_block, "_part_by_token")
IN_MANY_PASSES = without(few_passes, "is_checkpointed", lambda _: True)
READING_ALL = Way(block=reading_all)
NOT_SCORED_AGAIN = Way({"rescore": False})
OF_ANY_STAGE = {
    "padding read": Way(block=reading_padding),
    "last block at all states": Way(block=NOT_THE_LAST_BLOCK),
    "norms, gates and positions of transformers": Way(block=IN_MANY_PASSES),
    "attention of torch": Way(block=without(by_sequence, "LONGEST", 0)),
    "sequences of all lengths together": Way(block=without(length_groups, "WORTH", 10**9)),
    "AdamW step by step": Way(block=without(torch.optim, "AdamW", unfused)),
    "gradient checkpointing, beside all read": Way(change=checkpoint_blocks, beside=READING_ALL),
    "compiled, beside all read": Way(change=compile_blocks, beside=READING_ALL),
}
LOGITS = {"logits everywhere": Way(block=without(predictions, "plain_head"))}
SFT = {**LOGITS, **OF_ANY_STAGE}
REWARD = {**OF_ANY_STAGE, "shared prompts": Way({"share_prompts": True})}
PPO = {
    **LOGITS,
    **OF_ANY_STAGE,
    "2 sequences in a backward": Way({"micro_batch_size": 2}),
    "128 tokens in a backward": Way({"micro_batch_tokens": 128}),
    "policy not scored again": NOT_SCORED_AGAIN,
    "sampler's weights in their own order, beside that": Way(
        {"rescore": False}, block=without(reordered, "_is_at_hand", lambda: False), beside=NOT_SCORED_AGAIN
    ),
}
ADAPTERS = {
    "adapters by peft": Way(change=with_layers_of_peft),
    "policy and critic not scored again": NOT_SCORED_AGAIN,
}


if __name__ == "__main__":
    main()
