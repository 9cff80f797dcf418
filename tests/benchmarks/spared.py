"""CPU-seconds of a network's forward and backward with work that nobody needs, and without it.

`python tests/benchmarks/spared.py` prints a JSON line for each kind of work and size, after a check that both ways
find the same: medians of alternating runs of one thread, in seconds of its own CPU time. Scores read one state of each
sequence, responses those of their half (`last_block`); adapters are added by `peft`'s layers, and in place
(`adapted_linear`). Short sequences attend by torch's attention, padded to the longest of them, and by our own in groups
of similar lengths (`short_attention`, `length_groups`). Norms, positions and gates are those of `transformers`, and
take few passes over memory (`few_passes`).
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import torch
from common import with_layers_of_peft
from torch import Tensor
from transformers import LlamaConfig, LlamaModel

from rlhf_lightning.networks import LoRA, by_sequence, few_passes, length_groups
from rlhf_lightning.networks.adapted_linear import lighten
from rlhf_lightning.networks.lora import add_adapter, train_adapter
from rlhf_lightning.networks.unpadded import last_states

SIZES = {
    "world": {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4},
    "a": {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 6, "num_attention_heads": 8},
}


class Body(LlamaModel):
    def get_output_embeddings(self) -> None:
        return None


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--sizes", nargs="*", default=[*SIZES])
    parser.add_argument("--repeats", type=int, default=9)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for size in arguments.sizes:
        for name, (before, after) in works(SIZES[size]).items():
            line = {"work": name, "size": size} | compare(before, after, arguments.repeats)
            print(json.dumps(line), flush=True)


def works(size: dict[str, Any]) -> dict[str, tuple[Callable[[], float], Callable[[], float]]]:
    """Return what is measured, both ways."""
    torch.manual_seed(0)
    body, adapted = (Body(LlamaConfig(**size, vocab_size=1024)).eval() for _ in range(2))
    add_adapter(adapted, LoRA())
    train_adapter(adapted)
    tokens, lengths = torch.randint(2, 1024, (16, 96)), torch.randint(48, 96, (16, 1))
    place = torch.arange(96)
    mask = place < lengths
    ends, responses = place == lengths - 1, mask & (place >= lengths // 2)

    short = (torch.randint(2, 1024, (64, 60)), torch.arange(60) < torch.randint(12, 61, (64, 1)))

    def work(
        network: Any,
        kept: Tensor,
        read: Tensor | None,
        using: Any = nullcontext,
        given: tuple[Tensor, Tensor] = (tokens, mask),
    ) -> Callable[[], float]:
        def once() -> float:
            network.zero_grad()
            with using(network):
                loss = last_states(network, *given, read=read)[kept].square().mean()
                loss.backward()
            return float(loss.detach())

        return once

    return {
        "scores": (work(body, ends, None), work(body, ends, ends)),
        "responses": (work(body, responses, None), work(body, responses, responses)),
        "adapters": (work(adapted, mask, None, by_peft), work(adapted, mask, None)),
        "short sequences": (
            work(body, short[1], None, with_attention_of_torch, given=short),
            work(body, short[1], None, given=short),
        ),
        "few passes": (work(body, mask, None, in_many_passes), work(body, mask, None)),
        "few passes, adapters": (work(adapted, mask, None, in_many_passes), work(adapted, mask, None)),
    }


@contextmanager
def by_peft(network: Any) -> Iterator[None]:
    with_layers_of_peft(network)
    yield
    lighten(network)


@contextmanager
def with_attention_of_torch(_: Any) -> Iterator[None]:
    with patch.object(by_sequence, "LONGEST", 0), patch.object(length_groups, "WORTH", 10**9):
        yield


@contextmanager
def in_many_passes(_: Any) -> Iterator[None]:
    with patch.object(few_passes, "is_checkpointed", lambda _: True):
        yield


def compare(before: Callable[[], float], after: Callable[[], float], repeats: int) -> dict[str, float]:
    """Return the medians of both ways."""
    one, other = before(), after()
    assert abs(one - other) < 1e-4 * abs(one), (one, other)
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(repeats):
        for way, taken in zip((before, after), seconds, strict=True):
            start = time.process_time()
            for _ in range(3):
                way()
            taken.append((time.process_time() - start) / 3)
    whole, spared = (statistics.median(taken) for taken in seconds)
    return {"whole": round(whole, 4), "spared": round(spared, 4), "ratio": round(whole / spared, 3)}


if __name__ == "__main__":
    main()
