from collections.abc import Callable
from typing import Any

import pytest
import torch

from rlhf_lightning.networks.checkpointing import checkpoint_blocks, is_checkpointed
from rlhf_lightning.networks.lora import LoRA, add_adapter
from rlhf_lightning.rollout.compiled import can_be_compiled, compiled_blocks
from rlhf_lightning.rollout.slots import Slots
from rlhf_lightning.types import PromptBatch


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_each_block_reads_and_writes_its_own_layer_of_the_cache(
    kind: str, policy: Callable[..., Any], prompts: Callable[..., PromptBatch]
) -> None:
    """What stands around the compiled code, without the compiler; with it `test_recording.py` runs on a GPU."""
    network, batch = policy(kind), prompts([[5, 9, 7], [8, 4, 6]])
    rows, noise = torch.arange(2), torch.zeros(2, 4, 2, dtype=torch.float64)

    @torch.no_grad()
    def sampled(compiled: bool) -> Slots:
        output = network(batch.prompt_tokens, use_cache=True)
        sizes = {"count": 2, "capacity": 8, "longest": 4, "temperature": 0.0, "stop_tokens": rows[:0]}
        slots = Slots(output.past_key_values, **sizes)
        more = {"order": torch.arange(3).repeat(2, 1), "lengths": rows * 0 + 3, "uniform": noise}
        slots.let_in(rows, output.logits[:, -1], output.past_key_values, rows, **more)
        for _ in range(3):
            if compiled:
                with torch.compiler.set_stance("force_eager"), compiled_blocks(network):
                    slots.step(network, 2, 8)
            else:
                slots.step(network, 2, 8)
        return slots

    with_blocks, plain = sampled(True), sampled(False)
    assert torch.equal(with_blocks.response, plain.response)
    for one, other in zip(with_blocks.layers, plain.layers, strict=True):
        assert torch.equal(one.all_keys, other.all_keys)
    assert not torch.equal(plain.layers[0].all_keys, plain.layers[1].all_keys)
    # Everything is as it was.
    assert [block.attn.layer_idx if kind == "gpt2" else block.self_attn.layer_idx for block in layers(network)] == [
        0,
        1,
    ]
    assert not any("forward" in vars(block) for block in layers(network))


def test_blocks_that_are_made_again_in_the_backward_are_so_after_a_rollout(policy: Callable[..., Any]) -> None:
    network = policy()
    checkpoint_blocks(network)
    with compiled_blocks(network):
        assert not is_checkpointed(network)
    assert is_checkpointed(network)


def layers(network: Any) -> Any:
    return network.base_model.h if hasattr(network.base_model, "h") else network.base_model.layers


def test_networks_with_adapters_are_not_compiled(policy: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    # This machine may have no Triton.
    monkeypatch.setattr("rlhf_lightning.rollout.compiled.can_compile", lambda: True)
    assert can_be_compiled(policy())
    assert can_be_compiled(policy("gpt2"))
    adapted = policy()
    add_adapter(adapted, LoRA(r=2))
    assert not can_be_compiled(adapted)
    assert not can_be_compiled(torch.nn.Linear(2, 2))
