"""CPU-seconds of forward and backward with logits everywhere, and with the output layer where it counts, in chunks.

`python tests/benchmarks/output_layer.py` prints a JSON line for each kind of work: medians of alternating runs of one
thread, in seconds of its own CPU time, after a check that both find the same loss.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

from rlhf_lightning.functional.logprobs import entropy, gather_logprobs
from rlhf_lightning.functional.losses import clipped_policy_loss
from rlhf_lightning.functional.masking import position_ids
from rlhf_lightning.modules.language import sft_predictions
from rlhf_lightning.rollout.score import response_predictions, spread
from rlhf_lightning.types import SFTBatch

SIZES = {
    "a": {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 6, "vocab_size": 4096},
    "b": {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8, "vocab_size": 8192},
}
RESPONSE = 64


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", choices=SIZES, default="a")
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    network = LlamaForCausalLM(LlamaConfig(**SIZES[arguments.size], num_attention_heads=8)).eval()
    for name, work in works(network).items():
        print(json.dumps({"work": name, "size": arguments.size} | compare(work, arguments.repeats)), flush=True)


def works(network: Any) -> dict[str, Callable[..., float]]:
    """Return what is measured: fine-tuning on texts and on demonstrations, and PPO's update and scoring."""
    vocabulary = network.config.vocab_size
    lengths = torch.randint(96, 160, (8, 1))
    place, tokens = torch.arange(160).expand(8, 160), torch.randint(2, vocabulary, (8, 160))
    mask = place < lengths
    text = SFTBatch(tokens, mask, mask & (place > 0))
    demonstration = SFTBatch(tokens, mask, mask & (place >= lengths // 2))
    responses = torch.arange(RESPONSE) < torch.randint(8, RESPONSE + 1, (8, 1))
    rollout = torch.cat([torch.ones(8, 48).bool(), responses], dim=1)
    ids = torch.randint(2, vocabulary, rollout.shape)
    advantages = torch.randn(8, RESPONSE)

    def fine_tune(batch: SFTBatch, *, everywhere: bool) -> float:
        network.zero_grad()
        if everywhere:
            logits = network(input_ids=batch.tokens, attention_mask=batch.attention_mask.long(), use_cache=False).logits
            kept = batch.loss_mask[:, 1:]
            total = cross_entropy(logits[:, :-1][kept], batch.tokens[:, 1:][kept], reduction="sum")
        else:
            total = -sft_predictions(network, batch).total_logprob()
        loss = total / batch.loss_mask.sum()
        loss.backward()
        return float(loss.detach())

    def logits_everywhere() -> Tensor:
        """Those that predict each place of the responses, padding too."""
        logits: Tensor = network(
            input_ids=ids,
            attention_mask=rollout.long(),
            position_ids=position_ids(rollout),
            use_cache=False,
            logits_to_keep=RESPONSE + 1,
        ).logits
        return logits[:, :-1]

    def read(*, everywhere: bool) -> tuple[Tensor, Tensor]:
        if not everywhere:
            predicted = response_predictions(network, ids, rollout, torch.full((8,), 48), responses)
            found = predicted.logprobs_and_entropy(entropy_gradient=False)
            return spread(found[0], responses), spread(found[1], responses)
        logits = logits_everywhere()
        logprobs = gather_logprobs(logits, ids[:, -RESPONSE:]).masked_fill(~responses, 0.0)
        return logprobs, entropy(logits.detach()).masked_fill(~responses, 0.0)

    def update(*, everywhere: bool) -> float:
        network.zero_grad()
        logprobs, entropies = read(everywhere=everywhere)
        loss = clipped_policy_loss(logprobs, logprobs.detach(), advantages * responses, clip_range=0.2).sum()
        (loss / responses.sum()).backward()
        return float(loss.detach() + entropies.sum())

    @torch.no_grad()
    def score(*, everywhere: bool) -> float:
        if everywhere:
            logits = logits_everywhere()
            return float(gather_logprobs(logits, ids[:, -RESPONSE:]).masked_fill(~responses, 0.0).sum())
        return float(response_predictions(network, ids, rollout, torch.full((8,), 48), responses).logprobs().sum())

    return {
        "fine-tuning, texts": partial(fine_tune, text),
        "fine-tuning, responses": partial(fine_tune, demonstration),
        "PPO, a micro-batch's update": update,
        "PPO, a micro-batch's scoring": score,
    }


def compare(work: Callable[..., float], repeats: int) -> dict[str, float]:
    """Return the medians of both ways."""
    before, after = (work(everywhere=way) for way in (True, False))
    assert abs(before - after) < 1e-4 * abs(before), (before, after)
    seconds: dict[bool, list[float]] = {True: [], False: []}
    for _ in range(repeats):
        for way in seconds:
            seconds[way].append(timed(partial(work, everywhere=way)))
    everywhere, counted = (statistics.median(seconds[way]) for way in (True, False))
    return {
        "everywhere": round(everywhere, 4),
        "where it counts": round(counted, 4),
        "ratio": round(everywhere / counted, 3),
    }


def timed(work: Callable[[], float]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


if __name__ == "__main__":
    main()
