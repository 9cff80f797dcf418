"""What a check says: what was measured, whether that is right, and what to change."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import distributed, nn

from rlhf_lightning.errors import InputError
from rlhf_lightning.random_states import random_state, set_random_state

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


def of_all_processes(findings: Sequence[Finding]) -> list[list[Finding]]:
    """Return the findings of each process, by rank; all processes must call it."""
    own = list(findings)
    if not distributed.is_available() or not distributed.is_initialized():
        return [own]
    found = [own] * distributed.get_world_size()
    distributed.all_gather_object(found, own)
    return found


def refusal(findings: Sequence[Sequence[Finding]], *, off: str) -> InputError:
    """Return the error that lists the errors of each process with their remedies; ``off`` says how to train anyway.

    What all processes found alike is said without their ranks.
    """
    ranks: dict[str, list[int]] = {}
    for rank, found in enumerate(findings):
        for finding in of_status(found, "error"):
            ranks.setdefault(str(finding), []).append(rank)
    lines = [
        f"  {finding}" if len(where) == len(findings) else f"  on rank {', '.join(map(str, where))}: {finding}"
        for finding, where in ranks.items()
    ]
    return InputError("\n".join([f"preflight found {len(lines)} error(s) before the first update:", *lines, off]))


@contextmanager
def untouched(modules: Iterable[nn.Module], device: torch.device) -> Iterator[None]:
    """Run a block without gradients, then put the random states and the mode of each module back."""
    modes = [(part, part.training) for part in modules]
    states = random_state(device)
    try:
        with torch.no_grad():
            yield
    finally:
        set_random_state(states, device)
        for part, training in modes:
            part.training = training
