"""Sequences in groups of similar lengths, each padded to the longest of its group.

    a a a a a a    c c c .
    b b b b b .    d d . .

Attention takes as long for padding as for tokens, with the square of the length.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

SHORTER = 0.8
"""Of the longest of a group, how long a sequence is at most that begins another one."""
WORTH = 2048
"""Pairs of tokens of which attention must be spared by another group: a call for it takes as long as some thousand."""


@dataclass(frozen=True)
class LengthGroups:
    """B sequences in groups; their tokens, and what pads them, are numbered one sequence after the other."""

    shapes: tuple[tuple[int, int], ...]
    """Of each group the number of sequences and the length to which they are padded."""
    order: Int[Tensor, " B"]
    """The sequences, group by group."""
    first: Int[Tensor, " B"]
    """The number of the first token of each sequence."""
    padded: Int[Tensor, " B"]
    """The length to which each sequence is padded."""

    @property
    def sizes(self) -> list[int]:
        """How many numbers each group has."""
        return [number * length for number, length in self.shapes]

    def numbers(self, length: int) -> tuple[Int[Tensor, "B T"], Bool[Tensor, "B T"]]:
        """Return the numbers of the tokens of sequences of a length, and which of them have one."""
        time = torch.arange(length, device=self.first.device)
        return self.first.unsqueeze(1) + time, time < self.padded.unsqueeze(1)

    def by_number(self, values: Int[Tensor, "B T"]) -> Int[Tensor, " M"]:
        """Return what belongs to tokens and padding in the order of their M numbers; none may be longer than T."""
        number, is_numbered = self.numbers(values.shape[1])
        found = values.new_empty(sum(self.sizes))
        found[number[is_numbered]] = values[is_numbered]
        return found


def group_by_length(lengths: Int[Tensor, " B"]) -> LengthGroups:
    """Return groups in which attention computes little padding; one, in the given order, where several spare nothing.

    One as well on other devices than a CPU, where many small calls take longer than padding.
    """
    device = lengths.device
    shapes = [(len(lengths), int(lengths.max()))]
    order = torch.arange(len(lengths), device=device)
    if device.type == "cpu":
        descending, sorted_order = lengths.sort(descending=True, stable=True)
        several = _shapes(descending.tolist())
        if len(several) > 1:
            shapes, order = several, sorted_order
    padded = torch.tensor([length for number, length in shapes for _ in range(number)], device=device)
    # Both of them by place in the order, and brought into that of the sequences.
    first = torch.empty_like(padded).index_copy_(0, order, padded.cumsum(0) - padded)
    return LengthGroups(tuple(shapes), order, first, torch.empty_like(padded).index_copy_(0, order, padded))


def _shapes(descending: Sequence[int]) -> list[tuple[int, int]]:
    """Return numbers and longest lengths of groups; a new one begins where those to come are enough shorter."""
    starts = [0]
    for place, length in enumerate(descending):
        longest = descending[starts[-1]]
        spared = (len(descending) - place) * (longest**2 - length**2)
        if length <= SHORTER * longest and spared >= WORTH:
            starts.append(place)
    ends = [*starts[1:], len(descending)]
    # A sequence without tokens is one of padding.
    return [(end - start, max(1, descending[start])) for start, end in zip(starts, ends, strict=True)]
