import pytest

from rlhf_lightning.data.sampling import WINDOW, EpochSampler

LENGTHS = [(7 * i) % 50 for i in range(103)]


def batches(sampler: EpochSampler) -> list[list[int]]:
    rows = list(sampler)
    return [rows[i : i + sampler.batch_size] for i in range(0, len(rows), sampler.batch_size)]


@pytest.mark.parametrize("lengths", [None, LENGTHS])
def test_an_epoch_reads_every_row_once(lengths: list[int] | None) -> None:
    sampler = EpochSampler(103, batch_size=4, lengths=lengths)
    assert sorted(sampler) == list(range(103))
    assert len(sampler) == 103


@pytest.mark.parametrize("lengths", [None, LENGTHS])
def test_the_order_is_a_function_of_seed_and_epoch(lengths: list[int] | None) -> None:
    def order(seed: int, epoch: int) -> list[int]:
        sampler = EpochSampler(103, batch_size=4, seed=seed, lengths=lengths)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert order(0, 1) == order(0, 1)
    assert len({tuple(order(seed, epoch)) for seed in (0, 1) for epoch in (0, 1)}) == 4


@pytest.mark.parametrize("lengths", [None, LENGTHS])
@pytest.mark.parametrize("replicas", [2, 3, 4])
def test_ranks_share_no_row_and_get_equally_many(lengths: list[int] | None, replicas: int) -> None:
    parts = [
        list(EpochSampler(103, batch_size=4, num_replicas=replicas, rank=rank, lengths=lengths))
        for rank in range(replicas)
    ]
    assert {len(part) for part in parts} == {103 // replicas}
    rows = [row for part in parts for row in part]
    assert len(set(rows)) == len(rows)


def test_what_ranks_leave_out_differs_from_epoch_to_epoch() -> None:
    left_out = set()
    for epoch in range(60):
        parts = [EpochSampler(5, batch_size=1, num_replicas=2, rank=rank) for rank in (0, 1)]
        for part in parts:
            part.set_epoch(epoch)
        left_out |= set(range(5)) - {row for part in parts for row in part}
    assert left_out == set(range(5))


def test_grouping_by_length_makes_batches_of_similar_length() -> None:
    def padding(lengths: list[int] | None) -> int:
        made = batches(EpochSampler(103, batch_size=4, lengths=lengths))
        return sum(max(LENGTHS[row] for row in batch) - LENGTHS[row] for batch in made for row in batch)

    assert padding(LENGTHS) < padding(None) / 4


def test_grouping_by_length_does_not_order_the_batches_by_length() -> None:
    one_window = EpochSampler(WINDOW * 4, batch_size=4, lengths=LENGTHS[: WINDOW * 4])
    longest = [max(LENGTHS[row] for row in batch) for batch in batches(one_window)]
    assert longest not in (sorted(longest), sorted(longest, reverse=True))


def test_ranks_get_batches_of_similar_length_at_the_same_time() -> None:
    parts = [batches(EpochSampler(96, batch_size=4, num_replicas=2, rank=rank, lengths=LENGTHS)) for rank in (0, 1)]
    means = [[sum(LENGTHS[row] for row in batch) / 4 for batch in part] for part in parts]
    assert max(abs(a - b) for a, b in zip(*means, strict=True)) < 4


@pytest.mark.parametrize("lengths", [None, LENGTHS])
def test_an_epoch_can_be_continued_in_the_middle(lengths: list[int] | None) -> None:
    whole = EpochSampler(103, batch_size=4, lengths=lengths)
    whole.set_epoch(3)
    resumed = EpochSampler(103, batch_size=4, lengths=lengths)
    resumed.epoch, resumed.position = 3, 40
    resumed.set_epoch(3)
    assert list(resumed) == list(whole)[40:]
    assert list(resumed) == list(whole)


def test_another_epoch_begins_at_its_first_row() -> None:
    sampler = EpochSampler(103, batch_size=4)
    sampler.position = 40
    sampler.set_epoch(1)
    assert len(list(sampler)) == 103
