"""How fast a run is, and where its time goes."""

import math
from collections import defaultdict
from collections.abc import Mapping
from functools import cache
from itertools import pairwise
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from rlhf_lightning.callbacks.stopwatch import STEP, WAITING, Stopwatch, now, seconds_between
from rlhf_lightning.types import Work

SAMPLING = "sampling"

LARGEST = 8192
"""Rows of the largest matrices that are multiplied to find the peak: 400 MB in 16 bits, before the first batch."""

PATIENCE = 0.03
"""Seconds that one of these products may take."""


@runtime_checkable
class MeasuredModule(Protocol):
    """A module that says what a batch was, and tells ``trainer.profiler`` of the phases of its steps."""

    phases: ClassVar[tuple[str, ...]]
    """What the profiler is told."""

    def work(self, batch: Any) -> Work:
        """Return what the training step that has just ended did."""


class Throughput(Callback):
    """Logs real tokens and operations a second, their share of the device's peak, and where the seconds go.

    It is done whenever the Trainer logs, under ``throughput/``, of the batches since the last time: `figures` says
    what. Tokens and operations are those of all processes, the peak is what they measure together when training starts,
    and seconds are means over them. The numbers go to the loggers alone, and into no checkpoint.

    Modules that are not measured are left alone.
    """

    def __init__(self) -> None:
        self._stopwatch: Stopwatch | None = None
        self._work: list[Work] = []
        self._logged_at = 0
        self._peak = 0.0
        self._processes = 1
        self._run: dict[str, float] = defaultdict(float)

    @property
    def summary(self) -> dict[str, float]:
        """The figures of all batches since training began or was resumed; empty where there were none."""
        return figures(self._run, peak=self._peak, processes=self._processes) if self._run else {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the peak, and start the clock."""
        if not isinstance(pl_module, MeasuredModule):
            return
        self._work = []
        self._run.clear()
        self._logged_at, self._processes = trainer.global_step, trainer.world_size
        device = trainer.strategy.root_device
        own = matrix_peak(device, compute_dtype(trainer, pl_module))
        self._peak = _sum_over_ranks({"peak": own}, trainer)["peak"]
        profiler = trainer.profiler  # type: ignore[attr-defined]
        self._stopwatch = Stopwatch(profiler, pl_module.phases, device)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Note what the batch was, and log where the Trainer does."""
        if not isinstance(pl_module, MeasuredModule):
            return
        self._work.append(pl_module.work(batch))
        step, every = trainer.global_step, trainer.log_every_n_steps  # type: ignore[attr-defined]
        # Batches that wait for the others of their optimizer step do not move it.
        if not every or step % every or step == self._logged_at:
            return
        self._logged_at = step
        found = figures(self._sums(trainer), peak=self._peak, processes=self._processes)
        row = {f"throughput/{name}": value for name, value in found.items()} | {"epoch": trainer.current_epoch}
        for logger in trainer.loggers:
            # As Lightning counts the steps of its rows, from 0.
            logger.log_metrics(row, step=step - 1)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Add the batches since the last log to the run's, and stop the clock."""
        if self._work:
            self._sums(trainer)
        self._stop()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Stop the clock."""
        self._stop()

    def _stop(self) -> None:
        if self._stopwatch is not None:
            self._stopwatch.close()
            self._stopwatch = None

    def _sums(self, trainer: Trainer) -> dict[str, float]:
        """Return what was noted since the last call, summed over batches and processes."""
        assert self._stopwatch is not None
        own = {f"seconds_{name}": seconds for name, seconds in self._stopwatch.read().items()}
        own["batches"] = float(len(self._work))
        for name in ("tokens", "flops", "sampled_tokens"):
            counts = [vars(work)[name] for work in self._work]
            if None not in counts:
                own[name] = math.fsum(float(count) for count in counts)
        self._work = []
        found = _sum_over_ranks(own, trainer)
        for name, value in found.items():
            self._run[name] += value
        return found


def figures(sums: Mapping[str, float], *, peak: float, processes: int) -> dict[str, float]:
    """Return what is logged, from sums over batches and processes and the ``peak`` of all processes.

    ``tokens_per_second`` and, where the operations are known, ``flops_per_second`` and ``share_of_peak``, of the time
    of steps and of waiting for data; validation, checkpoints and callbacks are beside it. Where responses are sampled,
    ``sampled_tokens_per_second`` of the time of sampling. ``seconds_step``, ``seconds_waiting`` and those of each phase
    are of a batch; each has its ``share_...`` of step and waiting together.
    """
    seconds = {name: x for name, x in sums.items() if name.startswith("seconds_")}
    whole = seconds[f"seconds_{STEP}"] + seconds[f"seconds_{WAITING}"]
    found = {"tokens_per_second": processes * sums["tokens"] / whole}
    if "sampled_tokens" in sums:
        found["sampled_tokens_per_second"] = processes * sums["sampled_tokens"] / seconds[f"seconds_{SAMPLING}"]
    if "flops" in sums:
        found["flops_per_second"] = processes * sums["flops"] / whole
        found["share_of_peak"] = found["flops_per_second"] / peak
    found |= {name: x / sums["batches"] for name, x in seconds.items()}
    return found | {name.replace("seconds", "share"): x / whole for name, x in seconds.items()}


def compute_dtype(trainer: Trainer, module: LightningModule) -> torch.dtype:
    """Return the type of the run's matrix products."""
    held = next(weight.dtype for weight in module.parameters() if weight.is_floating_point())
    one = torch.ones(1, 1, dtype=held, device=trainer.strategy.root_device)
    with trainer.precision_plugin.train_step_context():
        return (one @ one).dtype


@cache
def matrix_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Return the operations a second of the fastest product of two square matrices, measured once in a process.

    It takes some tenths of a second at most. The matrices grow until the next product would take too long.
    """
    generator = torch.Generator(device).manual_seed(0)
    size, best = 256, 0.0
    while True:
        # Random numbers, since a chip is faster on zeros.
        one, other = (torch.randn(size, size, dtype=dtype, device=device, generator=generator) for _ in range(2))
        moments = [now(device)]
        for _ in range(4):
            _ = one @ other
            moments.append(now(device))
        took = min(seconds_between(*pair) for pair in pairwise(moments))
        best = max(best, 2 * size**3 / took)
        if size == LARGEST or 8 * took > PATIENCE:
            return best
        size *= 2


def _sum_over_ranks(own: Mapping[str, float], trainer: Trainer) -> dict[str, float]:
    if trainer.world_size == 1:
        return dict(own)
    values = torch.tensor(list(own.values()), dtype=torch.float64, device=trainer.strategy.root_device)
    total: Any = trainer.strategy.reduce(values, reduce_op="sum")
    return dict(zip(own, total.tolist(), strict=True))
