"""How far the losses of 20 updates move by each of the ways to save work, from one seed.

`python tests/benchmarks/same_losses.py` trains a small Llama by each stage as the package does by itself, and again
with one way to save work left out, or put in where it is a setting. It prints a JSON line for each: the largest
difference of the 20 losses over the loss. "Other rounding" is the measure beside which these stand: nothing is left
out, and one weight is another number in its last place.
"""

import argparse
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import torch
from common import QUIET, word_tokenizer
from lightning import Callback, Trainer
from peft.tuners.lora import Linear
from torch import nn
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from rlhf_lightning.data.collating import RankedSequences, comparison_batch, sft_batch
from rlhf_lightning.data.tokenizing import TokenSequence
from rlhf_lightning.modules import PPOModule, RewardModule, SFTModule
from rlhf_lightning.networks import LoRA, by_sequence, last_block, length_groups, predictions, scores
from rlhf_lightning.networks.adapted_linear import AdaptedLinear
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

Way = tuple[dict[str, Any], Callable[[Any], Any]]
"""Settings of the module, and the block in which it trains, given the networks that it trains."""


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for stage, ways in ((sft, SFT), (reward, REWARD), (ppo, PPO), (adapters, ADAPTERS)):
        expected = stage({}, nullcontext)
        assert len(expected) == UPDATES
        for name, (settings, block) in {"other rounding": OTHER_ROUNDING, **ways}.items():
            found = stage(settings, block)
            moved = max(abs(one - other) / abs(other) for one, other in zip(found, expected, strict=True))
            line = {"stage": stage.__name__, "way": name, "largest_move": float(f"{moved:.1e}")}
            ends = {"first_loss": round(expected[0], 4), "last_loss": round(expected[-1], 4)}
            print(json.dumps(line | ends), flush=True)
            # One that computed the same numbers would have changed nothing.
            assert 0 < moved < LARGEST_MOVE, line


def sft(settings: dict[str, Any], block: Callable[[Any], Any]) -> list[float]:
    batches = [
        sft_batch([TokenSequence(ids, len(ids) // 2) for ids in texts(ROWS, seed)], pad_token_id=0)
        for seed in range(UPDATES)
    ]
    module = SFTModule(network(LlamaForCausalLM), learning_rate=1e-3, **settings)
    return losses(module, batches, block(module.network), "sft/loss")


def reward(settings: dict[str, Any], block: Callable[[Any], Any]) -> list[float]:
    batches = []
    for seed in range(UPDATES):
        rows = [torch.cat([prompt[:8], ids[8:]]) for prompt, ids in in_pairs(texts(ROWS, seed))]
        sequences = [TokenSequence(ids, 8) for ids in rows]
        pairs = [RankedSequences(sequences[i : i + 2], ranks=[0, 1], ratings=[0.0, 0.0]) for i in range(0, ROWS, 2)]
        batches.append(comparison_batch(pairs, pad_token_id=0))
    scorer = network(LlamaForSequenceClassification, num_labels=1)
    tokenizer = word_tokenizer(VOCABULARY)
    module = RewardModule(scorer, tokenizer=tokenizer, learning_rate=1e-4, shift_scores=False, **settings)
    return losses(module, batches, block(module.network), "reward/loss")


def ppo(settings: dict[str, Any], block: Callable[[Any], Any], policy: nn.Module | None = None) -> list[float]:
    module = Losses(
        policy or network(LlamaForCausalLM),
        reward=lambda prompts, responses: [float(len(set(response.split()))) for response in responses],
        tokenizer=word_tokenizer(VOCABULARY),
        minibatch_size=ROWS,
        ppo_epochs=EPOCHS,
        max_new_tokens=32,
        learning_rate=1e-4,
        critic_learning_rate=1e-4,
        preflight=False,
        **{"rescore": False, "micro_batch_size": ROWS, **settings},
    )
    prompts = [ids[: len(ids) // 2] for ids in texts(ROWS, 0)]
    longest = max(map(len, prompts))
    tokens = torch.stack([nn.functional.pad(ids, (longest - len(ids), 0)) for ids in prompts])
    said = [" ".join(f"w{i - 2}" for i in ids) for ids in prompts]
    batch = PromptBatch(tokens, tokens != 0, list(said), said, {})
    losses(module, [batch] * (UPDATES // EPOCHS), block(module.policy), "ppo/kl")
    return module.found


def adapters(settings: dict[str, Any], block: Callable[[Any], Any]) -> list[float]:
    policy = network(LlamaForCausalLM)
    add_adapter(policy, LoRA())
    train_adapter(policy)
    return ppo({"critic": "shared_trunk", **settings}, block, policy)


class Losses(PPOModule):
    """Keeps the loss of each update: what a rollout logs is the mean of its updates."""

    def _accumulate_gradients(self, minibatch: Any) -> dict[str, torch.Tensor]:
        means = super()._accumulate_gradients(minibatch)
        self.found = [*getattr(self, "found", []), float(means["policy_loss"] + means["value_loss"])]
        return means


def network(kind: Any, **more: Any) -> Any:
    torch.manual_seed(0)
    made = kind(LlamaConfig(**SIZE, vocab_size=VOCABULARY, pad_token_id=0, eos_token_id=1, **more))
    return made.eval()


def texts(count: int, seed: int) -> list[torch.Tensor]:
    noise = torch.Generator().manual_seed(seed)
    lengths = torch.randint(LONGEST // 4, LONGEST + 1, (count,), generator=noise).tolist()
    return [torch.randint(2, 2 + WORDS, (length,), generator=noise) for length in lengths]


def in_pairs(rows: Sequence[torch.Tensor]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield each of them, the first of its pair beside it."""
    for i, row in enumerate(rows):
        yield rows[i - i % 2], row


def losses(module: Any, batches: list[Any], block: Any, name: str) -> list[float]:
    logged = Logged(name)
    trainer = Trainer(accelerator="cpu", devices=1, max_epochs=1, callbacks=[logged], **QUIET)
    loader: Any = DataLoader(batches, batch_size=None, collate_fn=lambda batch: batch)  # type: ignore[arg-type]
    torch.manual_seed(0)
    with block:
        trainer.fit(module, loader)
    return logged.found


class Logged(Callback):
    """What was logged under a name after each step."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.found: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self.found.append(float(trainer.callback_metrics[self.name]))


def without(*replaced: tuple[Any, str, Any]) -> Callable[[Any], Any]:
    """Return a block in which parts of the package are others."""

    @contextmanager
    def block(_: Any) -> Iterator[None]:
        with ExitStack() as stack:
            for owner, name, other in replaced:
                stack.enter_context(patch.object(owner, name, other))
            yield

    return block


def after(change: Callable[[Any], None]) -> Callable[[Any], Any]:
    """Return a block before which the network is changed."""

    @contextmanager
    def block(network: Any) -> Iterator[None]:
        change(network)
        yield

    return block


@torch.no_grad()
def round_otherwise(network: Any) -> None:
    weight = network.get_input_embeddings().weight
    weight[2, 0] = torch.nextafter(weight[2, 0], torch.tensor(torch.inf))


def with_layers_of_peft(network: Any) -> None:
    for layer in network.modules():
        if isinstance(layer, AdaptedLinear):
            layer.__class__ = Linear


def unfused(groups: Any, *, fused: Any, **settings: Any) -> torch.optim.Optimizer:
    return ADAMW(groups, **settings)


def nothing(*_: Any, **__: Any) -> None:
    return None


OTHER_ROUNDING: Way = ({}, after(round_otherwise))
OUTPUT_LAYER = (predictions, "plain_head", nothing)
LAST_BLOCK = (last_block, "_part_by_token", nothing)
SHORT = (by_sequence, "LONGEST", 0)
GROUPS = (length_groups, "WORTH", 10**9)
ADAMW = torch.optim.AdamW
NETWORKS: dict[str, Way] = {
    "last block at all states": ({}, without(LAST_BLOCK)),
    "padding read": ({}, lambda _: reading_padding()),
    "attention of torch": ({}, without(SHORT)),
    "sequences of all lengths together": ({}, without(GROUPS)),
    "gradient checkpointing": ({}, after(checkpoint_blocks)),
    "compiled": ({}, after(compile_blocks)),
    "AdamW step by step": ({}, without((torch.optim, "AdamW", unfused))),
}
SFT: dict[str, Way] = {"logits everywhere": ({}, without(OUTPUT_LAYER)), **NETWORKS}
REWARD: dict[str, Way] = {
    "scalar head everywhere": ({}, without((scores, "plain_scalar_head", nothing))),
    **NETWORKS,
    "shared prompts": ({"share_prompts": True}, nullcontext),
}
PPO: dict[str, Way] = {
    "logits everywhere": ({}, without(OUTPUT_LAYER)),
    **NETWORKS,
    "policy scored again": ({"rescore": True}, nullcontext),
    "2 sequences in a backward": ({"micro_batch_size": 2}, nullcontext),
    "128 tokens in a backward": ({"micro_batch_tokens": 128}, nullcontext),
    "weights in their own order": ({}, without((reordered, "_is_at_hand", lambda: False))),
}
ADAPTERS: dict[str, Way] = {
    "adapters by peft": ({}, after(with_layers_of_peft)),
    "policy and critic scored again": ({"rescore": True}, nullcontext),
}


if __name__ == "__main__":
    main()
