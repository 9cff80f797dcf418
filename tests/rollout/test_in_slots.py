from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf_lightning.networks.critic import TrunkCritic, new_value_head
from rlhf_lightning.rollout.generate import Sampled
from rlhf_lightning.rollout.in_slots import slots_of
from rlhf_lightning.rollout.score import response_values
from rlhf_lightning.rollout.slots import Slots
from rlhf_lightning.types import PromptBatch

MANY = [[5, 9, 7, 30, 2], [8, 4], [40, 41, 42], [77], [60, 61, 62, 63], [9, 9, 9], [12, 13], [8, 4], [91, 33, 21, 7]]
NEVER: list[int] = []


def seen_in(tokens: Tensor, count: int) -> list[int]:
    """Tokens that appear in the middle of a response: stopping at them ends rows at different places."""
    return tokens[:, 2:9].flatten().unique()[:count].tolist()


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_prompts_that_wait_for_a_slot_get_the_response_that_they_would_get_at_once(
    kind: str,
    temperature: float,
    policy: Callable[..., Any],
    prompts: Callable[..., PromptBatch],
    monkeypatch: pytest.MonkeyPatch,
    sample: Callable[..., Tensor],
) -> None:
    network, batch = policy(kind), prompts(MANY, pads=2)
    stops = seen_in(sample(network, batch, NEVER, temperature=temperature), 6)
    expected = sample(network, batch, stops, temperature=temperature)
    lengths = [next((i for i, t in enumerate(row) if t in stops), 99) for row in expected.tolist()]
    assert len(set(lengths)) > 3
    for slots, at_once, grows_by in ((1, 4096, 16), (2, 4096, 1), (4, 5, 2), (5, 1, 1)):
        monkeypatch.setattr("rlhf_lightning.rollout.in_slots.MOST_SLOTS", {"cpu": slots})
        monkeypatch.setattr("rlhf_lightning.rollout.in_slots.READ_AT_ONCE", at_once)
        monkeypatch.setattr("rlhf_lightning.rollout.recording.GROWS_BY", grows_by)
        assert torch.equal(sample(network, batch, stops, temperature=temperature), expected)


@pytest.fixture
def rooms(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Collects of each step how many tokens the longest running response has, and the room of a slot."""
    seen: list[tuple[int, int]] = []
    step, resize = Slots.step, Slots.resize

    def watched_step(slots: Slots, network: Any, in_use: int, span: int) -> None:
        keys = slots.layers[0].all_keys
        assert span == slots.room == keys.shape[2]
        assert len(keys) >= in_use
        assert keys.is_contiguous()
        seen.append((int(slots.positions[slots.running].max()) + 1, span))
        step(slots, network, in_use, span)

    def watched_resize(slots: Slots, in_use: int, room: int) -> None:
        # What has the size already is not copied.
        assert room != slots.room
        resize(slots, in_use, room)

    monkeypatch.setattr(Slots, "step", watched_step)
    monkeypatch.setattr(Slots, "resize", watched_resize)
    return seen


def test_on_a_cpu_slots_have_room_for_little_more_than_they_hold(
    policy: Callable[..., Any],
    prompts: Callable[..., PromptBatch],
    monkeypatch: pytest.MonkeyPatch,
    sample: Any,
    rooms: list[tuple[int, int]],
) -> None:
    """It follows the longest response, up and down, and never passes the longest that can be: 21."""
    monkeypatch.setattr("rlhf_lightning.rollout.recording.GROWS_BY", 6)
    monkeypatch.setattr("rlhf_lightning.rollout.in_slots.MOST_SLOTS", {"cpu": 2})
    # Twelve tokens behind a prompt of nine, and then behind a prompt of one.
    sample(policy(), prompts([[7] * 9, [7] * 9, [8], [8]]), NEVER)
    assert [room for _, room in rooms] == [12] * 3 + [18] * 6 + [21] * 2 + [6] * 5 + [12] * 6
    assert all(needed <= room for needed, room in rooms)


def test_a_prompt_that_waited_gets_more_room_than_there_was(
    policy: Callable[..., Any],
    prompts: Callable[..., PromptBatch],
    monkeypatch: pytest.MonkeyPatch,
    sample: Callable[..., Tensor],
) -> None:
    network, batch = policy(), prompts([[8], [7] * 30])
    expected = sample(network, batch, NEVER)
    monkeypatch.setattr("rlhf_lightning.rollout.in_slots.MOST_SLOTS", {"cpu": 1})
    assert torch.equal(sample(network, batch, NEVER), expected)


def that_ends_at_once(
    network: Any, sample: Callable[..., Tensor], prompts: Callable[..., PromptBatch], *, length: int
) -> tuple[list[int], int, list[int]]:
    """Return a prompt with the first token of its response, which is not in the response to [8], and that response."""
    many = [[8], *([token] * length for token in range(40, 120))]
    found = sample(network, prompts(many), NEVER, temperature=0.0).tolist()
    prompt, first = next((prompt, row[0]) for prompt, row in zip(many, found, strict=True) if row[0] not in found[0])
    return prompt, first, found[0]


def test_slots_that_stay_free_need_no_room(
    policy: Callable[..., Any],
    prompts: Callable[..., PromptBatch],
    monkeypatch: pytest.MonkeyPatch,
    sample: Callable[..., Tensor],
    rooms: list[tuple[int, int]],
) -> None:
    """One of eight ends early, which is too few to let others in, and seven more follow the seven that run."""
    monkeypatch.setattr("rlhf_lightning.rollout.in_slots.MOST_SLOTS", {"cpu": 8})
    monkeypatch.setattr("rlhf_lightning.rollout.recording.GROWS_BY", 1)
    network = policy()
    ending, stop, others = that_ends_at_once(network, sample, prompts, length=1)
    rooms.clear()
    found = sample(network, prompts([[8]] * 7 + [ending] + [[8]] * 7), [stop], temperature=0.0).tolist()
    assert [row for row in found if row[0] != stop] == [others] * 14
    assert len(rooms) == 22
    assert all(room <= needed / 0.75 + 1 for needed, room in rooms)


def test_a_slot_that_is_free_writes_where_there_is_room(
    policy: Callable[..., Any],
    prompts: Callable[..., PromptBatch],
    monkeypatch: pytest.MonkeyPatch,
    sample: Callable[..., Tensor],
) -> None:
    """One response behind a long prompt ends at once; the others need less room than it had."""
    monkeypatch.setattr("rlhf_lightning.rollout.recording.GROWS_BY", 1)
    network = policy()
    ending, stop, others = that_ends_at_once(network, sample, prompts, length=30)
    assert sample(network, prompts([[8]] * 4 + [ending]), [stop], temperature=0.0)[:4].tolist() == [others] * 4


@pytest.mark.parametrize(("device", "most"), [("cpu", 768), ("cuda", 512), ("mps", 512)])
def test_a_cpu_runs_more_responses_at_once(device: str, most: int) -> None:
    assert [slots_of(rows, torch.device(device)) for rows in (3, 9999)] == [3, most]


def test_no_more_rows_than_there_are_slots_run_at_once(
    policy: Callable[..., Any],
    prompts: Callable[..., PromptBatch],
    monkeypatch: pytest.MonkeyPatch,
    sample: Callable[..., Tensor],
) -> None:
    network, calls = policy(), []
    monkeypatch.setattr("rlhf_lightning.rollout.in_slots.MOST_SLOTS", {"cpu": 4})
    network.register_forward_pre_hook(lambda _, __, kwargs: calls.append(len(kwargs["input_ids"])), with_kwargs=True)
    sample(network, prompts(MANY), NEVER)
    # Three readings of prompts, each followed by eleven steps: 4, 4 and 1 of the nine.
    assert calls == [*[4] * 12, *[4] * 12, *[1] * 12]


def test_neighbouring_rows_with_one_prompt_share_its_reading(
    policy: Callable[..., Any], prompts: Callable[..., PromptBatch], sample: Callable[..., Tensor]
) -> None:
    network, calls = policy(), []
    rows = [[8, 4], [8, 4], [8, 4], [40, 41, 42], [40, 41, 42], [4]]
    apart = sample(network, prompts(rows), NEVER)
    network.register_forward_pre_hook(lambda _, __, kwargs: calls.append(len(kwargs["input_ids"])), with_kwargs=True)
    assert torch.equal(sample(network, prompts(rows), NEVER), apart)
    assert calls == [3] + [6] * 11
    assert len(apart[:3].unique(dim=0)) == 3


def test_the_noise_of_a_row_is_its_own(
    policy: Callable[..., Any], prompts: Callable[..., PromptBatch], sample: Callable[..., Tensor]
) -> None:
    """What others sample, and whether they have ended, cannot change a response."""
    network = policy()
    together = sample(network, prompts(MANY), NEVER)
    stops = seen_in(together, 4)
    stopped = sample(network, prompts(MANY), stops)
    for free, row in zip(together.tolist(), stopped.tolist(), strict=True):
        end = next((i for i, token in enumerate(free) if token in stops), len(row) - 1)
        assert row[: end + 1] == free[: end + 1]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("slots", [2, 4, 768])
def test_values_of_the_steps_are_those_of_the_whole_sequences(
    kind: str,
    slots: int,
    policy: Callable[..., Any],
    prompts: Callable[..., PromptBatch],
    monkeypatch: pytest.MonkeyPatch,
    sampled: Callable[..., Sampled],
) -> None:
    network, batch = policy(kind), prompts([*MANY, [91, 33, 21, 7]], pads=2)
    # Some end with their first token, some later, some not.
    drawn = sampled(network, batch, NEVER).tokens
    stops = [*seen_in(drawn, 4), int(drawn[3, 0])]
    monkeypatch.setattr("rlhf_lightning.rollout.in_slots.MOST_SLOTS", {"cpu": slots})
    critic = TrunkCritic(network, new_value_head(network, torch.Generator().manual_seed(1)))
    found, without = sampled(network, batch, stops, value_of=critic.value_of), sampled(network, batch, stops)
    assert torch.equal(found.tokens, without.tokens)
    assert found.values is not None
    assert without.values is None
    lengths = []
    for row, (prompt, mask) in enumerate(zip(batch.prompt_tokens, batch.prompt_mask, strict=True)):
        response = found.tokens[row].tolist()
        end = next((i + 1 for i, token in enumerate(response) if token in stops), len(response))
        tokens = torch.tensor([[*prompt[mask].tolist(), *response[:end]]])
        start = torch.tensor([int(mask.sum())])
        expected = response_values(critic, tokens, torch.ones_like(tokens).bool(), start, length=end)[0]
        torch.testing.assert_close(found.values[row, : end + 1], expected, rtol=0, atol=1e-5)
        assert expected.unique().numel() == end + 1
        torch.testing.assert_close(found.logprobs[row, :end], without.logprobs[row, :end], rtol=0, atol=1e-5)
        lengths.append(end)
    assert {1, 12} < set(lengths)


def test_a_sampler_that_sees_no_states_finds_no_values(
    policy: Callable[..., Any], prompts: Callable[..., PromptBatch], sampled: Callable[..., Sampled]
) -> None:
    for kind, sampler in (("llama", "transformers"), ("mistral", "builtin")):
        network = policy(kind)
        value_of = TrunkCritic(network, new_value_head(network)).value_of
        assert sampled(network, prompts(MANY), NEVER, sampler=sampler, value_of=value_of).values is None
