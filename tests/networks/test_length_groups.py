"""Sequences of similar lengths attend together."""

import pytest
import torch

from rlhf_lightning.networks import length_groups
from rlhf_lightning.networks.length_groups import group_by_length


def test_similar_lengths_are_padded_together() -> None:
    lengths = torch.tensor([50] * 9 + [200, 100] * 8 + [49, 190])
    found = group_by_length(lengths)
    assert found.shapes == ((9, 200), (8, 100), (10, 50))
    assert lengths[found.order].tolist() == [200] * 8 + [190] + [100] * 8 + [50] * 9 + [49]
    assert torch.equal(found.padded[lengths == 190], torch.tensor([200]))
    assert found.sizes == [1800, 800, 500]


def test_every_token_has_a_number_of_its_own() -> None:
    lengths = torch.tensor([30, 300, 20, 290, 31])
    found = group_by_length(lengths)
    number, is_numbered = found.numbers(300)
    assert len(found.shapes) == 2
    assert (lengths <= found.padded).all()
    assert sorted(number[is_numbered].tolist()) == list(range(sum(found.sizes)))
    # Tokens of a sequence follow each other.
    assert (number[:, 1:] - number[:, :-1] == 1).all()
    # Groups follow each other, too.
    assert number[lengths >= 290, 0].max() < number[lengths < 290, 0].min()


@pytest.mark.parametrize("lengths", [[9, 3, 1], [500, 499, 410], [1], [60, 48, 59]])
def test_where_little_is_spared_the_order_is_kept(lengths: list[int]) -> None:
    found = group_by_length(torch.tensor(lengths))
    assert found.shapes == ((len(lengths), max(lengths)),)
    assert found.order.tolist() == list(range(len(lengths)))
    assert found.first.tolist() == [max(lengths) * i for i in range(len(lengths))]


def test_a_sequence_without_tokens_is_one_of_padding() -> None:
    found = group_by_length(torch.tensor([50, 0]))
    assert found.shapes == ((1, 50), (1, 1))


def test_elsewhere_all_are_in_one_group() -> None:
    lengths = torch.tensor([50, 50, 50, 5], device="meta")
    with pytest.MonkeyPatch.context() as patch:
        # No device but the CPU is here: a length that can be read, and no more.
        patch.setattr(torch.Tensor, "max", lambda _: 50)
        found = group_by_length(lengths)
    assert found.shapes == ((4, 50),)


def test_a_group_begins_where_it_spares_enough() -> None:
    """80 of 100 tokens are short enough; 100^2 - 80^2 = 3600 pairs are worth it, and 50^2 - 40^2 = 900 are not."""
    assert length_groups.WORTH < 3600
    assert [len(group_by_length(torch.tensor(x)).shapes) for x in ([100, 80], [100, 81], [50, 40])] == [2, 1, 1]
    assert group_by_length(torch.tensor([50, 40, 40, 40])).shapes == ((1, 50), (3, 40))
