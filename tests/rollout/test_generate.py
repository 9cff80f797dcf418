from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf_lightning.errors import InputError
from rlhf_lightning.rollout.generate import generate, sample_tokens
from rlhf_lightning.rollout.score import response_predictions, spread
from rlhf_lightning.types import PromptBatch, SampledRollout

KINDS = ["llama", "gpt2", "mistral"]
"""The last one sees four tokens back, so that its cache forgets: it is sampled from step by step."""
NEVER: list[int] = []


def respond(policy: Any, batch: PromptBatch, tokenizer: Any, stops: list[int], **settings: Any) -> SampledRollout:
    return generate(
        policy,
        batch,
        tokenizer,
        stop_tokens=stops,
        generator=torch.Generator().manual_seed(0),
        **{"max_new_tokens": 12, "temperature": 1.0, **settings},
    )


def seen_in(tokens: Tensor, count: int) -> list[int]:
    """Tokens that appear in the middle of a response: stopping at them ends rows at different places."""
    return tokens[:, 2:9].flatten().unique()[:count].tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_the_likeliest_tokens_are_those_of_transformers_generate(
    kind: str, policy: Callable[..., Any], prompts: Callable[..., PromptBatch], sample: Callable[..., Tensor]
) -> None:
    network, batch = policy(kind), prompts(pads=2)
    expected = network.generate(
        batch.prompt_tokens,
        attention_mask=batch.prompt_mask.long(),
        do_sample=False,
        max_new_tokens=12,
        eos_token_id=None,
        pad_token_id=0,
    )[:, batch.prompt_tokens.shape[1] :]
    assert torch.equal(sample(network, batch, NEVER, temperature=0.0), expected)
    # The rows differ from each other, or equality would say little.
    assert len(expected.unique(dim=0)) == len(expected)


@pytest.mark.parametrize("kind", KINDS)
def test_the_likeliest_tokens_with_ended_rows_are_those_of_transformers_generate(
    kind: str,
    policy: Callable[..., Any],
    prompts: Callable[..., PromptBatch],
    tokenizer: Any,
    sample: Callable[..., Tensor],
) -> None:
    network, batch = policy(kind), prompts()
    free = sample(network, batch, NEVER, temperature=0.0)
    stops = [int(free[0, 3]), int(free[1, 6])]
    expected = network.generate(
        batch.prompt_tokens,
        attention_mask=batch.prompt_mask.long(),
        do_sample=False,
        max_new_tokens=12,
        eos_token_id=stops,
        pad_token_id=0,
    )
    assert torch.equal(respond(network, batch, tokenizer, stops, temperature=0.0).tokens, expected)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("sampler", ["builtin", "transformers"])
def test_what_the_generation_config_of_the_network_says_of_sampling_changes_no_token(
    sampler: str,
    temperature: float,
    policy: Callable[..., Any],
    prompts: Callable[..., PromptBatch],
    sample: Callable[..., Tensor],
) -> None:
    network = policy()
    settings = {"temperature": temperature, "sampler": sampler}
    drawn = sample(network, prompts(), [0], **settings)
    said = {"top_k": 1, "top_p": 0.01, "temperature": 0.01, "repetition_penalty": 9.0, "no_repeat_ngram_size": 1}
    network.generation_config.update(do_sample=True, suppress_tokens=drawn[0].tolist(), **said)
    assert torch.equal(sample(network, prompts(), [0], **settings), drawn)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_tokens_are_drawn_from_the_softmax_of_the_logits_over_temperature(
    temperature: float, policy: Callable[..., Any], sample: Callable[..., Tensor]
) -> None:
    network, count = policy("llama", vocab_size=12), 6000
    prompt = torch.tensor([[5, 9, 7]])
    with torch.no_grad():
        probabilities = torch.softmax(network(prompt).logits[0, -1].double() / temperature, dim=0)
    batch = PromptBatch(prompt.repeat(count, 1), torch.ones(count, 3, dtype=torch.bool), [], [], {})
    tokens = sample(network, batch, NEVER, max_new_tokens=1, temperature=temperature).flatten()
    expected = count * probabilities
    common = expected >= 5
    seen = tokens.bincount(minlength=12).double()
    chi_square = ((seen - expected).square() / expected)[common].sum().item()
    # 99.9 % of the chi-square distribution with eleven degrees of freedom; fewer have a lower bound.
    assert common.sum() >= 5
    assert chi_square < 31.26


def test_the_same_seed_gives_the_same_tokens_and_another_one_others(
    policy: Callable[..., Any], prompts: Callable[..., PromptBatch], sample: Callable[..., Tensor]
) -> None:
    network, batch = policy(), prompts()
    first = sample(network, batch, NEVER, seed=7)
    torch.manual_seed(123)  # the global random state has no part in it
    assert torch.equal(sample(network, batch, NEVER, seed=7), first)
    assert not torch.equal(sample(network, batch, NEVER, seed=8), first)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_padding_cannot_change_the_response(
    kind: str,
    temperature: float,
    policy: Callable[..., Any],
    prompts: Callable[..., PromptBatch],
    sample: Callable[..., Tensor],
) -> None:
    network = policy(kind)
    expected = sample(network, prompts(), NEVER, temperature=temperature)
    assert torch.equal(sample(network, prompts(pads=7), NEVER, temperature=temperature), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_the_other_prompts_of_the_batch_cannot_change_the_likeliest_response(
    kind: str, policy: Callable[..., Any], prompts: Callable[..., PromptBatch], sample: Callable[..., Tensor]
) -> None:
    network = policy(kind)
    together = sample(network, prompts(), NEVER, temperature=0.0)
    alone = sample(network, prompts([[8, 4]]), NEVER, temperature=0.0)
    assert torch.equal(together[1], alone[0])


@pytest.mark.parametrize("kind", KINDS)
def test_leaving_ended_rows_out_changes_nothing_for_the_others(
    kind: str, policy: Callable[..., Any], prompts: Callable[..., PromptBatch], sample: Callable[..., Tensor]
) -> None:
    network = policy(kind)
    batch = prompts([[5, 9, 7, 30, 2], [8, 4], [40, 41, 42], [77], [60, 61, 62, 63]])
    free = sample(network, batch, NEVER, temperature=0.0)
    stops = [int(free[1, 2]), int(free[0, 5])]
    stopped = sample(network, batch, stops, temperature=0.0)
    ends = []
    for free_row, row in zip(free.tolist(), stopped.tolist(), strict=True):
        end = next((i for i, token in enumerate(free_row) if token in stops), len(free_row) - 1)
        ends.append(end)
        assert row[: end + 1] == free_row[: end + 1]
        assert set(row[end + 1 :]) <= {row[end]}
    assert len(set(ends)) > 2


def test_sampling_goes_on_only_until_every_row_has_ended(
    policy: Callable[..., Any], prompts: Callable[..., PromptBatch], sample: Callable[..., Tensor]
) -> None:
    calls: list[int] = []
    network = policy()
    network.register_forward_pre_hook(lambda _, __, kwargs: calls.append(len(kwargs["input_ids"])), with_kwargs=True)
    everything = list(range(258))
    assert sample(network, prompts(), everything).shape == (3, 1)
    assert calls == [3]


def test_the_network_runs_on_the_rows_that_have_not_ended(
    policy: Callable[..., Any], prompts: Callable[..., PromptBatch], sample: Callable[..., Tensor]
) -> None:
    network, calls = policy(), []
    network.register_forward_pre_hook(lambda _, __, kwargs: calls.append(len(kwargs["input_ids"])), with_kwargs=True)
    free = sample(network, prompts(), NEVER, temperature=0.0)
    calls.clear()
    stops = seen_in(free, 2)
    stopped = sample(network, prompts(), stops, temperature=0.0)
    running = [3] + [
        sum(not set(row[: t + 1]) & set(stops) for row in stopped.tolist()) for t in range(stopped.shape[1] - 1)
    ]
    assert calls == running


def test_ids_after_the_first_end_token_are_padding_outside_of_the_mask(
    policy: Callable[..., Any], prompts: Callable[..., PromptBatch], tokenizer: Any
) -> None:
    network = policy()
    free = respond(network, prompts(), tokenizer, NEVER, temperature=0.0).response_tokens
    stops = [int(free[0, 3]), int(free[2, 6])]
    found = respond(network, prompts(), tokenizer, stops, temperature=0.0)
    for row, mask, ended in zip(
        found.response_tokens.tolist(), found.response_mask.tolist(), found.ended.tolist(), strict=True
    ):
        stop = [i for i, token in enumerate(row) if token in stops]
        length = stop[0] + 1 if stop else len(row)
        assert mask == [i < length for i in range(len(row))]
        assert set(row[length:]) <= {tokenizer.pad_token_id}
        assert ended == bool(stop)
    assert found.ended[0]
    assert found.ended[2]
    assert torch.equal(found.attention_mask[:, 5:], found.response_mask)
    assert torch.equal(found.tokens[:, :5], prompts().prompt_tokens)


def test_a_response_without_an_end_token_counts_whole_and_has_not_ended(
    policy: Callable[..., Any], prompts: Callable[..., PromptBatch], tokenizer: Any
) -> None:
    found = respond(policy(), prompts(), tokenizer, NEVER, max_new_tokens=4)
    assert found.response_mask.all()
    assert found.response_mask.shape == (3, 4)
    assert not found.ended.any()


def test_an_end_token_as_the_last_possible_token_ends_the_response(
    policy: Callable[..., Any], prompts: Callable[..., PromptBatch], tokenizer: Any
) -> None:
    free = respond(policy(), prompts([[5, 9]]), tokenizer, NEVER, temperature=0.0, max_new_tokens=1)
    stop = free.response_tokens[0, 0].item()
    found = respond(policy(), prompts([[5, 9]]), tokenizer, [stop], temperature=0.0, max_new_tokens=1)
    assert found.ended.tolist() == [True]
    assert found.response_mask.tolist() == [[True]]


def test_the_text_of_a_response_has_neither_padding_nor_the_end_token(
    policy: Callable[..., Any], prompts: Callable[..., PromptBatch], tokenizer: Any
) -> None:
    free = respond(policy(), prompts(), tokenizer, NEVER, temperature=0.0)
    stop = int(free.response_tokens[0, 4])
    found = respond(policy(), prompts(), tokenizer, [stop], temperature=0.0)
    for row, text in zip(found.response_tokens.tolist(), found.responses, strict=True):
        kept = row[: row.index(stop)] if stop in row else row
        assert text == tokenizer.decode(kept, skip_special_tokens=True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probabilities_found_afterwards_are_those_of_the_sampler(
    kind: str,
    temperature: float,
    policy: Callable[..., Any],
    prompts: Callable[..., PromptBatch],
    tokenizer: Any,
    sample: Callable[..., Tensor],
) -> None:
    """One forward over the whole sequence finds what step after step with a cache found."""
    network, batch = policy(kind), prompts(pads=1)
    stops = seen_in(sample(network, batch, NEVER, temperature=temperature), 2)
    found = respond(network, batch, tokenizer, stops, temperature=temperature)
    predicted = response_predictions(
        network, found.tokens, found.attention_mask, found.response_starts, found.response_mask
    )
    expected = spread(predicted.logprobs(temperature=temperature), found.response_mask)
    torch.testing.assert_close(found.sampler_logprobs, expected, rtol=1e-4, atol=1e-4, check_dtype=False)
    assert expected[found.response_mask].std() > 0.5
    assert not found.response_mask.all()


@pytest.mark.parametrize("kind", KINDS)
def test_the_likeliest_tokens_are_certain(
    kind: str, policy: Callable[..., Any], prompts: Callable[..., PromptBatch], tokenizer: Any
) -> None:
    assert (respond(policy(kind), prompts(), tokenizer, NEVER, temperature=0.0).sampler_logprobs == 0).all()


def test_logits_that_are_not_finite_are_an_input_error(
    policy: Callable[..., Any], prompts: Callable[..., PromptBatch], sample: Callable[..., Tensor]
) -> None:
    for kind in KINDS:
        network = policy(kind)
        with torch.no_grad():
            next(network.parameters()).fill_(torch.nan)
        with pytest.raises(InputError, match="logits are not finite"):
            sample(network, prompts(), NEVER)


@pytest.mark.parametrize("sampler", ["builtin", "transformers"])
def test_sampling_is_without_dropout_and_leaves_the_mode_and_the_settings_of_the_network(
    sampler: str, policy: Callable[..., Any], prompts: Callable[..., PromptBatch], sample: Callable[..., Tensor]
) -> None:
    network = policy("gpt2", resid_pdrop=0.5, embd_pdrop=0.5)
    expected = sample(network, prompts(), [0], sampler=sampler)
    # One block is in training mode, as after a callback that trained a part.
    network.transformer.h[1].train()
    before = [(name, part.training) for name, part in network.named_modules()], network.config.to_dict()
    tokens = sample(network, prompts(), [0], sampler=sampler)
    assert torch.equal(tokens, expected)
    assert ([(name, part.training) for name, part in network.named_modules()], network.config.to_dict()) == before
    assert not tokens.requires_grad
    assert all(p.grad is None for p in network.parameters())


def test_what_is_sampled_in_inference_mode_can_be_changed_after_it(
    policy: Callable[..., Any], prompts: Callable[..., PromptBatch]
) -> None:
    batch, noise = prompts([[5, 9], [7, 8]]), torch.Generator()
    with torch.inference_mode():
        found = sample_tokens(
            policy(),
            batch.prompt_tokens,
            batch.prompt_mask,
            max_new_tokens=3,
            temperature=1.0,
            stop_tokens=torch.tensor([1]),
            generator=noise,
        )
        assert not torch.is_grad_enabled()
    # As slots and copies are that are kept for the next rollout.
    found.logprobs.add_(1.0)
    assert not found.logprobs.requires_grad
