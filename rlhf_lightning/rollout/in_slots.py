"""Sampling in slots: a response that has ended makes place for a prompt that waits."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from rlhf_lightning.functional.masking import position_ids
from rlhf_lightning.networks.last_block import reading_states
from rlhf_lightning.rollout.draw import require_finite
from rlhf_lightning.rollout.recording import recorder_of
from rlhf_lightning.rollout.slots import Slots

MOST_SLOTS = {"cpu": 768, "elsewhere": 512}
"""Responses that run at once; more wait until others have ended."""

READ_AT_ONCE = 4096
"""Tokens of prompts, padding included, in one forward."""

STILL_FULL = 0.75
"""Share of slots still running below which others are let in, or where nothing waits, the free ones are left out."""


def slots_of(rows: int, device: torch.device) -> int:
    """Return how many responses of a rollout run at once."""
    return min(rows, MOST_SLOTS["cpu" if device.type == "cpu" else "elsewhere"])


def sample_in_slots(
    policy: nn.Module,
    prompt_tokens: Int[Tensor, "B P"],
    prompt_mask: Bool[Tensor, "B P"],
    uniform: Float[Tensor, "B N 2"],
    *,
    temperature: float,
    stop_tokens: Int[Tensor, " S"],
    value_of: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Int[Tensor, "B N"], Float[Tensor, "B N"], Float[Tensor, "B N+1"] | None]:
    """Return up to N tokens a row, their log-probabilities, and values; behind a stop token they mean nothing.

    Neighbouring rows with the same prompt share its reading. ``value_of`` makes values (N,) of last hidden states
    (N, H): those that each token is drawn in, and the one after the last, for which a row stays a step longer. Values
    are None without it, and on a GPU, where steps are recorded.
    """
    one_by_one = prompt_tokens.device.type == "cpu"
    values = None if value_of is None or not one_by_one else _Values(value_of, uniform)
    sampling = _Sampling(policy, prompt_tokens, prompt_mask, uniform, temperature, stop_tokens, values)
    with nullcontext() if values is None else values.reading(policy):
        sampling.run()
    return sampling.response, sampling.logprobs, None if values is None else values.found


def read_prompts(policy: nn.Module, tokens: Int[Tensor, "B P"], mask: Bool[Tensor, "B P"]) -> Any:
    """Return what the network makes of prompts padded on the left: its cache, and the logits behind each (B, 1, V)."""
    network: Any = policy
    ends = torch.zeros_like(mask)
    ends[:, -1] = True
    with reading_states(network.base_model, ends):
        return network(
            input_ids=tokens,
            attention_mask=mask.long(),
            position_ids=position_ids(mask),
            use_cache=True,
            logits_to_keep=1,
        )


class _Values:
    """Values of the states behind the newest tokens, as the body makes these."""

    def __init__(self, value_of: Callable[[Tensor], Tensor], uniform: Tensor) -> None:
        self.value_of = value_of
        self.found = torch.zeros(len(uniform), uniform.shape[1] + 1, device=uniform.device)
        """(B, N + 1), in at least float32."""
        self.newest = torch.zeros(0)
        """Of the rows that were read last."""

    @contextmanager
    def reading(self, policy: Any) -> Iterator[None]:
        """Read a value of each row that the policy's body is called with in the block."""

        def keep(_: nn.Module, args: Any, output: Any) -> None:
            self.newest = self.value_of(output.last_hidden_state[:, -1])

        hook = policy.base_model.register_forward_hook(keep)
        try:
            yield
        finally:
            hook.remove()

    def take(self, rows: Sequence[int], drawn: Tensor, which: Tensor) -> None:
        """Keep the newest value ``which[i]`` as that of row ``rows[i]`` after ``drawn[i]`` tokens."""
        self.found = self.found.to(self.newest.dtype)
        self.found[torch.tensor(rows), drawn] = self.newest[which]


class _Sampling:
    """Which row of a rollout is in which slot, and which ones wait."""

    def __init__(
        self,
        policy: nn.Module,
        prompt_tokens: Tensor,
        prompt_mask: Tensor,
        uniform: Tensor,
        temperature: float,
        stop_tokens: Tensor,
        values: _Values | None,
    ) -> None:
        self.policy: Any = policy
        self.values = values
        self.prompt_tokens, self.prompt_mask, self.uniform = prompt_tokens, prompt_mask, uniform
        self.lengths: list[int] = prompt_mask.sum(dim=1).tolist()
        rows, self.longest = uniform.shape[:2]
        self.response = prompt_tokens.new_zeros(rows, self.longest)
        self.logprobs = torch.zeros(0)
        self.waiting = list(range(rows))
        self.occupants: list[int | None] = [None] * slots_of(rows, prompt_tokens.device)
        self.next = [0] * len(self.occupants)
        """Where the newest token of each slot stands while it runs."""
        self.was_running = torch.zeros(0, dtype=torch.bool)
        """Which slots were so before the last step: the others have no state left to be read."""
        self.recorder = recorder_of(policy, prompt_tokens.device)
        self.settings = {"temperature": temperature, "stop_tokens": stop_tokens}

    def run(self) -> None:
        """Sample until no row waits or runs."""
        while self.waiting or self._some_run():
            self._let_in()
            self._close_up()
            for _ in range(self.recorder.steps_unseen if self._some_run() else 0):
                self._step() if self.values is None else self._step_for(self.values)
            self._let_out()

    def _step(self) -> None:
        self.recorder.step(self.policy, self.slots, len(self.occupants), self._span())
        self.next = [place + 1 for place in self.next]

    def _step_for(self, values: _Values) -> None:
        self.was_running, drawn = (x[: len(self.occupants)].clone() for x in (self.slots.running, self.slots.drawn))
        self._step()
        slots, rows = zip(*((slot, row) for slot, row in enumerate(self.occupants) if row is not None), strict=True)
        values.take(rows, drawn[[*slots]], torch.tensor(slots))

    def _some_run(self) -> bool:
        return any(row is not None for row in self.occupants)

    def _span(self) -> int:
        """Return how many tokens the longest has that runs, the newest included."""
        return 1 + max(place for place, row in zip(self.next, self.occupants, strict=True) if row is not None)

    def _let_in(self) -> None:
        free = [slot for slot, row in enumerate(self.occupants) if row is None]
        # Reading prompts stops all others for its time.
        if len(self.occupants) - len(free) > STILL_FULL * len(self.occupants):
            return
        rows, self.waiting = self.waiting[: len(free)], self.waiting[len(free) :]
        # The longest first, for which room is made once.
        for part in reversed(list(self._readings(rows))):
            into, free = free[: len(part)], free[len(part) :]
            self._read(part, into)
        if rows and self.values is None:
            self._let_out()

    def _readings(self, rows: list[int]) -> Iterator[list[int]]:
        """Yield rows of about equal length, as many as are read at once."""
        part: list[int] = []
        for row in sorted(rows, key=lambda row: (self.lengths[row], row)):
            if part and self.lengths[row] * (len(part) + 1) > READ_AT_ONCE:
                yield part
                part = []
            part.append(row)
        if part:
            yield part

    def _read(self, of_rows: list[int], into: list[int]) -> None:
        """Read prompts into slots."""
        device = self.response.device
        rows, slots = torch.tensor(of_rows, device=device), torch.tensor(into, device=device)
        longest = self.lengths[of_rows[-1]]
        tokens, mask = self.prompt_tokens[rows, -longest:], self.prompt_mask[rows, -longest:]
        # Padding is told apart by a token that no vocabulary has.
        distinct, which = torch.unique_consecutive(tokens.masked_fill(~mask, -1), return_inverse=True, dim=0)
        real = distinct != -1
        output = read_prompts(self.policy, distinct.clamp(min=0), real)
        if not self.logprobs.numel():
            self._make_room(output.past_key_values)
        self.slots.let_in(
            slots,
            output.logits[:, -1][which],
            output.past_key_values,
            which,
            order=torch.argsort(~real, dim=1, stable=True),
            lengths=mask.sum(dim=1),
            uniform=self.uniform[rows],
        )
        if self.values is not None:
            self.values.take(of_rows, torch.zeros_like(which), which)
        for slot, row in zip(into, of_rows, strict=True):
            self.occupants[slot] = row
            self.next[slot] = self.lengths[row]

    def _make_room(self, like: Any) -> None:
        capacity = max(self.lengths) + self.longest
        self.slots: Slots = self.recorder.slots(
            self.policy, like, count=len(self.occupants), capacity=capacity, longest=self.longest, **self.settings
        )
        self.logprobs = self.slots.logprobs.new_zeros(self.response.shape)

    def _let_out(self) -> None:
        """Take the responses that have ended out of their slots."""
        require_finite(self.slots.finite)
        # The last state of a row is made in the step after the one in which it ended.
        kept = (self.slots.running if self.values is None else self.was_running)[: len(self.occupants)].tolist()
        ended = [
            (slot, row)
            for slot, (row, stays) in enumerate(zip(self.occupants, kept, strict=True))
            if row is not None and not stays
        ]
        if not ended:
            return
        slots, rows = (list(numbers) for numbers in zip(*ended, strict=True))
        self.response[rows] = self.slots.response[slots]
        self.logprobs[rows] = self.slots.logprobs[slots]
        # Each step writes into free slots, too: at a place that is there, however little room the others need.
        self.slots.positions[slots] = 0
        for slot in slots:
            self.occupants[slot] = None

    def _close_up(self) -> None:
        """Leave free slots out of the steps to come."""
        kept = [slot for slot, row in enumerate(self.occupants) if row is not None]
        if self.waiting or not kept or len(kept) > STILL_FULL * len(self.occupants):
            return
        kept = self.recorder.usual(kept, len(self.occupants))
        self.slots.move(torch.tensor(kept, device=self.response.device))
        self.occupants = [self.occupants[slot] for slot in kept]
        self.next = [self.next[slot] for slot in kept]
