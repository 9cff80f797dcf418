"""How long things take, heard from what Lightning and the modules tell the Trainer's profiler."""

import time
from collections.abc import Iterable

import torch
from lightning.pytorch.profilers import Profiler

WAITING, STEP = "waiting", "step"

OF_LIGHTNING = {"[_TrainingEpochLoop].train_dataloader_next": WAITING, "run_training_batch": STEP}
"""What Lightning says when it fetches a batch and trains on it, and how it is called here."""

Moment = float | torch.cuda.Event
"""On CUDA one in the order of the device's work, elsewhere one of the host's clock in seconds."""


class Stopwatch:
    """Seconds of waiting for data, of training steps, and of the phases that a step is said to have.

    Whatever profiler there is hears all as before. On CUDA the device is not waited for until `read` is called: its
    time is measured, and that of the host only while the device has nothing to do.
    """

    def __init__(self, profiler: Profiler, phases: Iterable[str], device: torch.device) -> None:
        """Begin to listen; phases are called what the profiler is told, and count within steps alone."""
        self._profiler = profiler
        self._device = device
        self._names = OF_LIGHTNING | {phase: phase for phase in phases}
        self._begun: dict[str, Moment] = {}
        self._intervals: list[tuple[str, Moment, Moment]] = []
        start, stop = profiler.start, profiler.stop

        def heard_start(action_name: str) -> None:
            start(action_name)
            self._begin(self._names.get(action_name))

        def heard_stop(action_name: str) -> None:
            self._end(self._names.get(action_name))
            stop(action_name)

        profiler.start, profiler.stop = heard_start, heard_stop  # type: ignore[method-assign]

    def close(self) -> None:
        """Listen no more."""
        # The methods of its class come to light again.
        vars(self._profiler).pop("start", None)
        vars(self._profiler).pop("stop", None)

    def read(self) -> dict[str, float]:
        """Return the seconds of everything that has ended since the last call, by name, and forget it."""
        found = dict.fromkeys(self._names.values(), 0.0)
        for name, begun, ended in self._intervals:
            found[name] += seconds_between(begun, ended)
        self._intervals.clear()
        return found

    def _begin(self, name: str | None) -> None:
        # Validation has phases, too.
        if name is not None and (name in (WAITING, STEP) or STEP in self._begun):
            self._begun[name] = now(self._device)

    def _end(self, name: str | None) -> None:
        if name is not None and name in self._begun:
            self._intervals.append((name, self._begun.pop(name), now(self._device)))


def now(device: torch.device) -> Moment:
    """Return this moment; on CUDA that at which the device has done what it was given until now."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def seconds_between(begun: Moment, ended: Moment) -> float:
    """Return the seconds between two moments of one device; on CUDA it waits for the second one."""
    if isinstance(begun, float) or isinstance(ended, float):
        assert isinstance(begun, float)
        assert isinstance(ended, float)
        return ended - begun
    ended.synchronize()
    milliseconds: float = begun.elapsed_time(ended)
    return milliseconds / 1000
