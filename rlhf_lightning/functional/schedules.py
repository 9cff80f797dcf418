"""Learning-rate schedules as functions of the step."""

import math
from collections.abc import Callable
from typing import Literal

Schedule = Literal["constant", "linear", "cosine"]


def learning_rate_factor(
    step: int,
    total_steps: float,
    *,
    schedule: Schedule,
    warmup_steps: int = 0,
    warmup_from: float = 0.0,
    floor: float = 0.0,
) -> float:
    """Return what the learning rate is multiplied by at ``step`` (from 0): a linear warm-up, then the schedule.

    The warm-up is at ``warmup_from`` at step 0 and at 1 at ``warmup_steps``; from 0 it has taken the first of its equal
    steps at step 0. "linear" and "cosine" reach ``floor`` at ``total_steps``; "constant" stays at 1. ``total_steps``
    may be infinite.
    """
    if step < warmup_steps:
        # A step at a learning rate of 0 would learn nothing.
        risen = step / warmup_steps if warmup_from else (step + 1) / (warmup_steps + 1)
        return warmup_from + (1 - warmup_from) * risen
    done = min(1.0, (step - warmup_steps) / max(1.0, total_steps - warmup_steps))
    return floor + (1 - floor) * _SHAPES[schedule](done)


_SHAPES: dict[str, Callable[[float], float]] = {
    "constant": lambda done: 1.0,
    "linear": lambda done: 1.0 - done,
    "cosine": lambda done: 0.5 * (1 + math.cos(math.pi * done)),
}
