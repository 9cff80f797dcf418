import jaxtyping
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rlhf_lightning.functional.masking import (
    center_and_scale,
    last_index,
    masked_moments,
    masked_sum,
    position_ids,
    sum_to_go,
    through_first,
    variance,
)

STOPS = torch.tensor([7, 9])
numbers = st.floats(-100, 100, width=32)
rows = st.lists(st.lists(st.tuples(numbers, st.booleans()), min_size=4, max_size=4), min_size=1, max_size=4)


def values_and_mask(table: list[list[tuple[float, bool]]]) -> tuple[Tensor, Tensor]:
    values = torch.tensor([[value for value, _ in row] for row in table])
    mask = torch.tensor([[keep for _, keep in row] for row in table])
    mask[0, 0] = True
    return values, mask


def test_shapes_and_types_of_signatures_are_checked_in_these_tests() -> None:
    with pytest.raises(jaxtyping.TypeCheckError):
        position_ids(torch.ones(2, 3))
    with pytest.raises(jaxtyping.TypeCheckError):
        masked_sum(torch.ones(2, 3), torch.ones(2, 4, dtype=torch.bool))


def test_positions_count_real_tokens_from_zero_whatever_stands_to_their_left() -> None:
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [0, 1, 1, 0, 0]]).bool()
    assert position_ids(mask)[0, 2:].tolist() == [0, 1, 2]
    assert position_ids(mask)[1].tolist() == [0, 1, 2, 3, 4]
    assert position_ids(mask)[2, 1:3].tolist() == [0, 1]
    assert (position_ids(mask) >= 0).all()


def test_a_row_of_padding_has_valid_positions() -> None:
    assert position_ids(torch.zeros(1, 3, dtype=torch.bool)).tolist() == [[0, 0, 0]]


@pytest.mark.parametrize(
    ("tokens", "kept"),
    [
        ([1, 2, 7, 4, 5], [1, 1, 1, 0, 0]),  # the stop token itself counts
        ([1, 2, 3, 4, 5], [1, 1, 1, 1, 1]),  # never stopped
        ([7, 7, 7, 7, 7], [1, 0, 0, 0, 0]),  # stopped at once
        ([1, 9, 2, 7, 5], [1, 1, 0, 0, 0]),  # either of two stop tokens; the second one found does not count
        ([0, 0, 0, 0, 0], [1, 1, 1, 1, 1]),  # padding that is no stop token is a token like others
    ],
)
def test_a_response_goes_through_its_first_stop_token(tokens: list[int], kept: list[int]) -> None:
    assert through_first(torch.tensor([tokens]), STOPS).tolist() == [[bool(k) for k in kept]]


def test_without_stop_tokens_everything_counts() -> None:
    assert through_first(torch.tensor([[1, 7, 9]]), torch.tensor([], dtype=torch.long)).all()


@given(st.lists(st.lists(st.integers(0, 9), min_size=5, max_size=5), min_size=1, max_size=5))
def test_the_mask_through_the_first_stop_is_what_a_loop_finds(tokens: list[list[int]]) -> None:
    expected = []
    for row in tokens:
        end = next((i for i, token in enumerate(row) if token in (7, 9)), len(row))
        expected.append([i <= end for i in range(len(row))])
    assert through_first(torch.tensor(tokens), STOPS).tolist() == expected


def test_the_last_index_is_that_of_the_last_true_position() -> None:
    mask = torch.tensor([[1, 0, 0], [0, 1, 1], [1, 1, 0], [1, 0, 1]]).bool()
    assert last_index(mask).tolist() == [0, 2, 1, 2]


def test_sums_see_only_what_the_mask_keeps() -> None:
    x = torch.tensor([[1.0, 2.0, float("nan")], [5.0, float("inf"), 9.0]])
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]]).bool()
    assert masked_sum(x, mask).tolist() == [3.0, 5.0]


def test_the_sum_to_go_by_hand() -> None:
    x = torch.tensor([[1.0, 2.0, 4.0, float("nan")], [8.0, float("inf"), 16.0, 32.0]])
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 1, 1]]).bool()
    assert sum_to_go(x, mask).tolist() == [[7.0, 6.0, 4.0, 0.0], [56.0, 0.0, 48.0, 32.0]]


@given(rows)
def test_the_sum_to_go_starts_with_the_whole_and_ends_with_the_last(table: list[list[tuple[float, bool]]]) -> None:
    x, mask = values_and_mask(table)
    found = sum_to_go(x.double(), mask)
    for row in range(len(x)):
        kept = [t for t in range(4) if mask[row, t]]
        for t in range(4):
            expected = sum(x[row, later].double().item() for later in kept if later >= t) if mask[row, t] else 0.0
            assert found[row, t].item() == pytest.approx(expected, abs=1e-9)


@given(rows)
def test_the_variance_of_the_moments_is_the_population_variance(table: list[list[tuple[float, bool]]]) -> None:
    x, mask = values_and_mask(table)
    torch.testing.assert_close(
        variance(masked_moments(x, mask)), x[mask].double().var(correction=0), rtol=1e-6, atol=1e-6
    )


@given(rows, rows)
def test_moments_of_the_parts_add_up_to_moments_of_the_whole(
    one: list[list[tuple[float, bool]]], other: list[list[tuple[float, bool]]]
) -> None:
    (x, x_mask), (y, y_mask) = values_and_mask(one), values_and_mask(other)
    whole = masked_moments(torch.cat([x, y]), torch.cat([x_mask, y_mask]))
    torch.testing.assert_close(masked_moments(x, x_mask) + masked_moments(y, y_mask), whole)


def test_centred_and_scaled_values_have_mean_0_and_variance_1_over_the_mask() -> None:
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(0)) * 30 + 1000
    mask = torch.rand(4, 6, generator=torch.Generator().manual_seed(1)) < 0.6
    scaled = center_and_scale(x, mask, masked_moments(x, mask))
    assert scaled[mask].mean().item() == pytest.approx(0.0, abs=1e-5)
    assert scaled[mask].var(correction=0).item() == pytest.approx(1.0, abs=1e-5)
    assert (scaled[~mask] == 0).all()
    assert scaled.dtype == x.dtype


def test_centring_and_scaling_is_blind_to_shift_scale_and_masked_values() -> None:
    x = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]]).bool()
    other = (3 * x + 7).masked_fill(~mask, float("inf"))
    expected = center_and_scale(x, mask, masked_moments(x, mask))
    torch.testing.assert_close(center_and_scale(other, mask, masked_moments(other, mask)), expected)


def test_a_part_is_scaled_by_the_moments_of_the_whole() -> None:
    x, mask = torch.tensor([[1.0, 3.0], [5.0, 7.0]]), torch.ones(2, 2, dtype=torch.bool)
    whole = center_and_scale(x, mask, masked_moments(x, mask))
    part = center_and_scale(x[:1], mask[:1], masked_moments(x, mask))
    torch.testing.assert_close(part, whole[:1])


@pytest.mark.parametrize("x", [[[4.0, 100.0]], [[0.1, 100.0]]])
def test_a_single_value_becomes_0_and_not_nan(x: list[list[float]]) -> None:
    mask = torch.tensor([[True, False]])
    values = torch.tensor(x)
    assert center_and_scale(values, mask, masked_moments(values, mask)).tolist() == [[0.0, 0.0]]


def test_equal_values_stay_finite_and_small() -> None:
    x, mask = torch.full((5, 7), 0.1), torch.ones(5, 7, dtype=torch.bool)
    assert center_and_scale(x, mask, masked_moments(x, mask)).abs().max() < 1e-3
