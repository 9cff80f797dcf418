from collections.abc import Callable
from typing import Any

import torch

from rlhf_lightning.functional.logprobs import gather_logprobs
from rlhf_lightning.preflight.probe import ROWS, TOKENS, TWICE, sample_probe
from rlhf_lightning.types import PromptBatch

# A fifth of the vocabulary ends a response, so that rows leave the batch at different steps.
STOPS = list(range(1, 258, 5))


def test_the_samplers_logprobs_are_those_of_each_row_decoded_alone(
    llama: Callable[..., Any], prompts: PromptBatch, tokenizer: Any
) -> None:
    policy = llama()
    probe = sample_probe(policy, prompts, tokenizer, max_new_tokens=8, temperature=0.5, stop_tokens=STOPS)
    mask = probe.rollout.response_mask
    assert len(set(mask.sum(dim=1).tolist())) > 1
    for row in range(len(prompts)):
        ids = probe.rollout.tokens[row][probe.rollout.attention_mask[row]].unsqueeze(0)
        with torch.no_grad():
            logits = policy(ids).logits[:, :-1]
        expected = gather_logprobs(logits, ids[:, 1:], temperature=0.5)[0, -int(mask[row].sum()) :]
        torch.testing.assert_close(probe.rollout.sampler_logprobs[row][mask[row]], expected, rtol=0, atol=1e-5)
    assert (probe.rollout.sampler_logprobs[~mask] == 0).all()


def test_a_probe_is_small_and_from_all_over_the_batch(
    llama: Callable[..., Any], prompts: PromptBatch, tokenizer: Any
) -> None:
    many = prompts.rows(torch.arange(60) % 6)
    probe = sample_probe(llama(), many, tokenizer, max_new_tokens=100, temperature=1.0, stop_tokens=[])
    assert probe.rollout.response_mask.shape == (ROWS + TWICE, TOKENS)
    assert probe.rollout.prompts[-1] == many.prompts[-1]


def test_some_prompts_have_two_responses(llama: Callable[..., Any], prompts: PromptBatch, tokenizer: Any) -> None:
    settings: Any = {"max_new_tokens": 6, "temperature": 1.0, "stop_tokens": [1]}
    rollout = sample_probe(llama(), prompts, tokenizer, **settings).rollout
    assert rollout.prompts == [*prompts.prompts, *[prompts.prompts[row] for row in (0, 1, 3, 5)]]
    for row, again in ((0, 6), (1, 7), (3, 8), (5, 9)):
        assert rollout.responses[row] != rollout.responses[again]
    alone = sample_probe(llama(), prompts.rows(torch.tensor([2])), tokenizer, **settings).rollout
    assert alone.prompts == ["c", "c"]


def test_no_hook_is_left_on_the_policy(llama: Callable[..., Any], prompts: PromptBatch, tokenizer: Any) -> None:
    policy = llama()
    sample_probe(policy, prompts, tokenizer, max_new_tokens=2, temperature=1.0, stop_tokens=[1])
    assert not policy._forward_hooks
