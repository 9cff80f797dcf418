"""What a check says: what was measured, whether that is right, and what to change."""

import random
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import nn

from rlhf_lightning.errors import InputError

Status = Literal["ok", "note", "warning", "error"]


@dataclass(frozen=True)
class Finding:
    """One line of a preflight: a note is worth knowing, a warning may be meant, an error spoils the training."""

    name: str
    status: Status
    measured: str
    remedy: str = ""

    def __str__(self) -> str:
        """Return the line that a log shows."""
        return f"{self.name}: {self.measured}" + (f" -> {self.remedy}" if self.remedy else "")


def of_status(findings: Sequence[Finding], status: Status) -> list[Finding]:
    """Return the findings of one status."""
    return [finding for finding in findings if finding.status == status]


def refusal(findings: Sequence[Finding], *, off: str) -> InputError:
    """Return the error that lists the findings with their remedies; ``off`` says how to train in spite of them."""
    found = [f"  {finding}" for finding in of_status(findings, "error")]
    lines = found or ["  on another process, whose message names it"]
    return InputError("\n".join([f"preflight found {len(lines)} error(s) before the first update:", *lines, off]))


@contextmanager
def untouched(modules: Iterable[nn.Module], device: torch.device) -> Iterator[None]:
    """Run a block without gradients, then put the random states and the mode of each module back."""
    modes = [(part, part.training) for part in modules]
    states = random.getstate(), np.random.get_state()
    devices = [device] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices), torch.no_grad():
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        for part, training in modes:
            part.training = training
