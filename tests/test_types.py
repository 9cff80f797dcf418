from dataclasses import FrozenInstanceError

import pytest
import torch

from rlhf_lightning.types import ComparisonBatch, PromptBatch, Rollout, ScoredRollout, SFTBatch


@pytest.fixture
def rollout() -> Rollout:
    return Rollout(
        prompt_tokens=torch.arange(6).view(3, 2),
        prompt_mask=torch.ones(3, 2, dtype=torch.bool),
        prompts=["a", "b", "c"],
        texts=["Q a", "Q b", "Q c"],
        columns={"wanted": [1, 2, 3], "name": ["x", "y", "z"]},
        tokens=torch.arange(15).view(3, 5),
        attention_mask=torch.ones(3, 5, dtype=torch.bool),
        response_mask=torch.ones(3, 3, dtype=torch.bool),
        ended=torch.tensor([True, False, True]),
        responses=["A", "B", "C"],
    )


def test_rows_picks_the_same_sequences_everywhere_in_the_order_asked_for(rollout: Rollout) -> None:
    picked = rollout.rows(torch.tensor([2, 0]))
    assert isinstance(picked, Rollout)
    assert picked.prompt_tokens.tolist() == [[4, 5], [0, 1]]
    assert picked.ended.tolist() == [True, True]
    assert picked.prompts == ["c", "a"]
    assert picked.responses == ["C", "A"]
    assert picked.columns == {"wanted": [3, 1], "name": ["z", "x"]}


def test_the_length_counts_sequences(rollout: Rollout) -> None:
    assert len(rollout) == 3
    assert len(rollout.rows(torch.tensor([1]))) == 1


def test_response_tokens_are_the_last_columns(rollout: Rollout) -> None:
    assert rollout.response_tokens.tolist() == [[2, 3, 4], [7, 8, 9], [12, 13, 14]]


def test_moving_takes_every_tensor_along_and_leaves_the_rest(rollout: Rollout) -> None:
    moved = rollout.to("meta")
    tensors = [value for value in vars(moved).values() if isinstance(value, torch.Tensor)]
    assert len(tensors) == 6
    assert all(tensor.device.type == "meta" for tensor in tensors)
    assert moved.columns == rollout.columns
    assert rollout.tokens.device.type == "cpu"


def test_tensors_inside_of_a_mapping_are_picked_and_moved_too(rollout: Rollout) -> None:
    zeros = torch.zeros(3, 3)
    scored = ScoredRollout(
        **vars(rollout),
        logprobs=zeros,
        ref_logprobs=zeros,
        values=zeros,
        scores=zeros[:, 0],
        score_parts={"a": torch.arange(3.0), "b": torch.arange(3.0, 6.0)},
    )
    picked = scored.rows(torch.tensor([2, 0])).score_parts
    assert {name: part.tolist() for name, part in picked.items()} == {"a": [2.0, 0.0], "b": [5.0, 3.0]}
    assert {part.device.type for part in scored.to("meta").score_parts.values()} == {"meta"}


def test_a_record_cannot_be_changed(rollout: Rollout) -> None:
    with pytest.raises(FrozenInstanceError):
        rollout.tokens = torch.zeros(1)  # type: ignore[misc]


def test_a_rollout_is_made_of_its_prompts(rollout: Rollout) -> None:
    assert isinstance(rollout, PromptBatch)


def test_a_comparison_batch_counts_responses() -> None:
    ones = torch.ones(4, 2)
    batch = ComparisonBatch(
        ones.long(), ones.bool(), ones.bool(), torch.tensor([0, 0, 0, 1]), torch.tensor([0, 1, 2, 0]), torch.zeros(4)
    )
    assert len(batch) == 4


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_pinned_record_is_the_same_record_for_a_device() -> None:
    mask = torch.ones(2, 3, dtype=torch.bool)
    batch = SFTBatch(tokens=torch.arange(6).reshape(2, 3), attention_mask=mask, loss_mask=mask)
    pinned = batch.pin_memory()
    assert pinned.tokens.is_pinned()
    assert torch.equal(pinned.to("cuda").to("cpu").tokens, batch.tokens)
