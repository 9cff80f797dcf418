from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, distributed
from torch.distributed.device_mesh import init_device_mesh
from transformers import MambaConfig, MambaForCausalLM

from rlhf_lightning.errors import InputError
from rlhf_lightning.networks.sharding import gathered, shard
from rlhf_lightning.types import PromptBatch

KINDS = ["llama", "gpt2", "mistral"]
NEVER: list[int] = []


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("whole", [False, True])
def test_processes_with_parts_of_the_policy_sample_as_alone_however_long_the_others_take(
    kind: str,
    whole: bool,
    policy: Callable[..., Any],
    prompts: Callable[..., PromptBatch],
    tokenizer: Any,
    processes: Callable[..., list[Any]],
    sample: Callable[..., Tensor],
) -> None:
    batch = prompts(pads=2)
    free = sample(policy(kind), batch, NEVER)
    # One process ends in its first step, the other runs to the end.
    stops = {0: free[:, 0].unique().tolist(), 1: NEVER}

    def work(rank: int) -> tuple[Tensor, int]:
        distributed.init_process_group("gloo")
        network = policy(kind)
        shard(network, init_device_mesh("cpu", (2,)))
        calls: list[int] = []
        with gathered(network) if whole else nullcontext():
            network.register_forward_pre_hook(lambda *_: calls.append(1))
            found = sample(network, batch, stops[rank])
        return found, len(calls)

    ranks = processes(2, work)
    for rank, (found, calls) in enumerate(ranks):
        assert torch.equal(found, sample(policy(kind), batch, stops[rank]))
        assert calls == (12 if rank == 1 or not whole else 1)
    assert [found.shape[1] for found, _ in ranks] == [1, 12]


def test_a_network_without_a_cache_of_keys_and_values_is_refused(
    prompts: Callable[..., PromptBatch], sample: Callable[..., Tensor]
) -> None:
    network = MambaForCausalLM(MambaConfig(hidden_size=16, state_size=4, num_hidden_layers=1, vocab_size=258))
    with pytest.raises(InputError, match=r"MambaForCausalLM keeps no past_key_values.*set sampler=transformers"):
        sample(network, prompts(), NEVER)
