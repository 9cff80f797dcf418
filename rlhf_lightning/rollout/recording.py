"""Steps of sampling as they are made on a device: one after the other on a CPU, as recorded CUDA graphs on a GPU."""

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import nn

from rlhf_lightning.functional.fused import can_compile
from rlhf_lightning.rollout.compiled import can_be_compiled, compiled_blocks
from rlhf_lightning.rollout.slots import Slots, use_kernel

log = logging.getLogger(__name__)

UNSEEN = 16
"""Steps on a GPU that the host does not wait for; up to so many less one are made in vain when all have ended."""

SPAN = 128
"""How far a recorded step looks is a multiple of this, so that not each length needs a recording."""

GROWS_BY = 16
"""Tokens by which the room of a slot on a CPU grows, or an eighth of those that it needs where that is more."""

SHRINKS_BELOW = 0.75
"""Share of the room of a slot on a CPU: where less would do, it becomes smaller."""

_recorders: "WeakKeyDictionary[nn.Module, Recorder]" = WeakKeyDictionary()


def recorder_of(policy: nn.Module, device: torch.device) -> "Stepper":
    """Return what makes the steps of a policy; recordings are kept as long as the policy is."""
    if device.type != "cuda":
        return OneByOne()
    return _recorders.setdefault(policy, Recorder())


class Stepper(Protocol):
    """Makes steps."""

    steps_unseen: int
    """How many are made before the host looks which responses have ended."""

    def slots(self, policy: nn.Module, like: Any, **sizes: Any) -> Slots:
        """Return slots of these sizes (`Slots`), with nothing in them, for a rollout of a policy."""

    def step(self, policy: nn.Module, slots: Slots, in_use: int, span: int) -> None:
        """Make a step (`Slots.step`)."""

    def usual(self, kept: list[int], in_use: int) -> list[int]:
        """Return the slots to be kept, and others until there are as many as steps are made for."""


class OneByOne:
    """Makes each step when it is asked for, with little more room in the slots than they need.

    A CPU reads states that lie one behind the other up to three times as fast as those with gaps between them.
    """

    steps_unseen = 1

    def slots(self, policy: nn.Module, like: Any, **sizes: Any) -> Slots:
        """Return new slots, with room for what has been read."""
        return Slots(like, room=like.get_seq_length(), **sizes)

    def step(self, policy: nn.Module, slots: Slots, in_use: int, span: int) -> None:
        """Make a step."""
        grain = max(GROWS_BY, span // 8)
        room = min(-(-span // grain) * grain, slots.capacity)
        if span > slots.room or room < SHRINKS_BELOW * slots.room:
            slots.resize(in_use, room)
        slots.step(policy, in_use, slots.room)

    def usual(self, kept: list[int], in_use: int) -> list[int]:
        """Return the slots that are kept."""
        return kept


class Recorder:
    """Records a step for each number of slots in use and each span, and plays it again: no time between its kernels."""

    steps_unseen = UNSEEN

    def __init__(self) -> None:
        """Start without recordings, and let one token attend by the kernel where that can be compiled."""
        if can_compile():
            use_kernel()
        self._slots: Slots | None = None
        self._made_for: Any = None
        self._recordings: dict[tuple[int, int], torch.cuda.CUDAGraph | None] = {}
        self._pool: Any = None
        self._can_record = True
        self._around_a_step: Callable[[nn.Module], AbstractContextManager[None]] = _as_it_is

    def slots(self, policy: nn.Module, like: Any, **sizes: Any) -> Slots:
        """Return the slots of the last rollout where these sizes fit in, so that its recordings are good for it."""
        made_for = _what_it_depends_on(policy)
        if made_for != self._made_for:
            self._forget()
            self._made_for, self._can_record = made_for, True
            self._around_a_step = compiled_blocks if can_be_compiled(policy) else _as_it_is
        if self._slots is None or not self._slots.fit(like, **sizes):
            self._forget()
            sizes["capacity"] = room_for(sizes["capacity"], device=sizes["stop_tokens"].device)
            self._slots = Slots(like, **sizes)
        self._slots.clear()
        return self._slots

    def step(self, policy: nn.Module, slots: Slots, in_use: int, span: int) -> None:
        """Make a step; the first of its kind as it is, the second is recorded, and from then on it is played."""
        span = min(_rounded(span), slots.capacity)
        kind = (in_use, span)
        if kind not in self._recordings:
            # What a kernel needs once for all is not made while recording.
            with self._around_a_step(policy):
                slots.step(policy, in_use, span)
            self._recordings[kind] = None
            return
        recording = self._recordings[kind]
        if recording is None and self._can_record:
            recording = self._record(policy, slots, in_use, span)
            self._recordings[kind] = recording
        if recording is None:
            slots.step(policy, in_use, span)
        else:
            recording.replay()

    def usual(self, kept: list[int], in_use: int) -> list[int]:
        """Fill up to half of the slots in use, to a quarter and so on."""
        number = in_use
        while number // 2 >= len(kept):
            number //= 2
        others = [slot for slot in range(in_use) if slot not in set(kept)]
        return kept + others[: number - len(kept)]

    def _forget(self) -> None:
        self._recordings.clear()
        # A pool of memory ends with the last recording that it served.
        self._pool = None

    def _record(self, policy: nn.Module, slots: Slots, in_use: int, span: int) -> torch.cuda.CUDAGraph | None:
        recording = torch.cuda.CUDAGraph()
        try:
            with self._around_a_step(policy), torch.cuda.graph(recording, pool=self._pool):
                slots.step(policy, in_use, span)
        except RuntimeError as error:
            # A network whose forward waits for the host, to see a number, cannot be recorded.
            log.warning("sampling is not recorded, and slower: %s", str(error).splitlines()[0])
            self._can_record = False
            return None
        self._pool = recording.pool()
        return recording


def room_for(length: int, *, device: torch.device) -> int:
    """Return how many tokens a slot has room for where the longest of a rollout has ``length``."""
    return _rounded(length) if device.type == "cuda" else length


def _as_it_is(policy: nn.Module) -> AbstractContextManager[None]:
    return nullcontext()


def _rounded(length: int) -> int:
    return -(-length // SPAN) * SPAN


def _what_it_depends_on(policy: nn.Module) -> Any:
    """Return what a recording has fixed: where the weights lie, and the type of the arithmetic."""
    kind = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else None
    return kind, tuple(weight.data_ptr() for weight in policy.parameters())
