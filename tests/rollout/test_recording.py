"""Recorded steps on a CUDA device against steps that are made one by one on a CPU."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf_lightning.functional.masking import position_ids
from rlhf_lightning.rollout.generate import sample_tokens
from rlhf_lightning.rollout.recording import OneByOne, Recorder, recorder_of
from rlhf_lightning.types import PromptBatch

# Of the compiler, about float32 on GPUs that could do with less.
pytestmark = pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores")

on_a_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]
MANY = [[5, 9, 7, 30, 2], [8, 4], [40, 41, 42], [77], [60, 61, 62, 63], [9, 9, 9], [12, 13], [8, 4], [91, 33, 21, 7]]


@pytest.fixture
def sample_on(sample: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """``sample_on(device, network, prompts, stops, **settings)``: `sample` there, of longer responses."""

    def run(device: str, network: Any, batch: PromptBatch, stops: list[int], **settings: Any) -> Tensor:
        return sample(network.to(device), batch, stops, **{"seed": 3, "max_new_tokens": 40, **settings}).cpu()

    return run


def test_a_cpu_makes_each_step_when_it_is_asked_for(policy: Callable[..., Any]) -> None:
    assert isinstance(recorder_of(policy(), torch.device("cpu")), OneByOne)


def test_slots_that_are_left_out_are_a_half_of_those_in_use_or_a_quarter() -> None:
    assert Recorder().usual([1, 6], 8) == [1, 6]
    assert Recorder().usual([1, 6, 7], 8) == [1, 6, 7, 0]
    assert Recorder().usual([0, 1, 2, 4, 6], 8) == [0, 1, 2, 4, 6, 3, 5, 7]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=on_a_gpu)])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_greedy_responses_are_those_of_transformers_on_each_device(
    kind: str,
    device: str,
    policy: Callable[..., Any],
    prompts: Callable[..., PromptBatch],
    sample_on: Callable[..., Tensor],
) -> None:
    network, batch = policy(kind).double(), prompts(MANY)
    expected = network.generate(
        batch.prompt_tokens,
        attention_mask=batch.prompt_mask.long(),
        do_sample=False,
        max_new_tokens=40,
        eos_token_id=None,
        pad_token_id=0,
    )[:, 5:]
    # Twice: the second rollout plays what the first has recorded.
    for _ in range(2):
        assert torch.equal(sample_on(device, network, batch, [], temperature=0.0), expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
class TestRecordings:
    """What only a GPU can show."""

    @pytest.mark.parametrize("slots", [2, 4, 256])
    def test_responses_depend_on_the_noise_alone(
        self,
        slots: int,
        policy: Callable[..., Any],
        prompts: Callable[..., PromptBatch],
        monkeypatch: pytest.MonkeyPatch,
        sample_on: Callable[..., Tensor],
    ) -> None:
        network, batch = policy().double(), prompts(MANY)
        stops = sample_on("cuda", network, batch, [])[:, 3:20].flatten().unique()[:9].tolist()
        expected = sample_on("cuda", network, batch, stops)
        monkeypatch.setattr("rlhf_lightning.rollout.in_slots.MOST_SLOTS", {"elsewhere": slots})
        for _ in range(2):
            assert torch.equal(sample_on("cuda", network, batch, stops), expected)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_log_probabilities_of_joined_layers_and_own_kernel_are_those_of_a_forward(
        self, dtype: torch.dtype, policy: Callable[..., Any], prompts: Callable[..., PromptBatch]
    ) -> None:
        network, batch = policy().to("cuda", dtype), prompts(MANY)
        tokens, mask = batch.prompt_tokens.cuda(), batch.prompt_mask.cuda()
        none = torch.zeros(0, dtype=torch.long, device="cuda")
        for seed in range(2):
            noise = torch.Generator("cuda").manual_seed(seed)
            found = sample_tokens(
                network, tokens, mask, max_new_tokens=140, temperature=1.0, stop_tokens=none, generator=noise
            )
            both, whole = torch.cat([tokens, found.tokens], 1), torch.nn.functional.pad(mask, (0, 140), value=True)
            with torch.no_grad():
                logits = network(both, attention_mask=whole.long(), position_ids=position_ids(whole)).logits
            logprobs = logits[:, 4:-1].float().log_softmax(-1).gather(2, found.tokens.unsqueeze(2)).squeeze(2)
            error = (found.logprobs - logprobs).abs().max()
            assert error < (1e-4 if dtype == torch.float32 else 0.1)

    def test_recordings_are_used_again_and_see_new_weights(
        self, policy: Callable[..., Any], prompts: Callable[..., PromptBatch], sample_on: Callable[..., Tensor]
    ) -> None:
        network, batch = policy().double().cuda(), prompts(MANY)
        first = sample_on("cuda", network, batch, [], temperature=0.0)
        recorder: Any = recorder_of(network, torch.device("cuda"))
        recorded = dict(recorder._recordings)
        assert all(recorded.values())
        with torch.no_grad():
            for weight in network.parameters():
                weight.add_(0.1 * torch.randn_like(weight))
        second = sample_on("cuda", network, batch, [], temperature=0.0)
        assert recorder._recordings == recorded
        assert not torch.equal(first, second)
        assert torch.equal(second, sample_on("cuda", policy().double().cuda(), batch, [], temperature=0.0)) is False
        expected = network.generate(
            batch.prompt_tokens.cuda(),
            attention_mask=batch.prompt_mask.long().cuda(),
            do_sample=False,
            max_new_tokens=40,
            eos_token_id=None,
            pad_token_id=0,
        )[:, 5:]
        assert torch.equal(second, expected.cpu())

    def test_weights_that_have_moved_are_recorded_again(
        self, policy: Callable[..., Any], prompts: Callable[..., PromptBatch], sample_on: Callable[..., Tensor]
    ) -> None:
        network, batch = policy().double().cuda(), prompts(MANY)
        first = sample_on("cuda", network, batch, [], temperature=0.0)
        with torch.no_grad():
            for weight in network.parameters():
                weight.data = (weight + 0.1 * torch.randn_like(weight)).clone()
        assert not torch.equal(sample_on("cuda", network, batch, [], temperature=0.0), first)
