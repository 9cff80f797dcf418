"""What is said when memory runs out: in which phase, what was estimated, and which settings help."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from rlhf_lightning.errors import InputError
from rlhf_lightning.preflight.memory import Estimate, by_role_and_phase

ON_CPU = ("can't allocate memory", "not enough memory")
"""How torch says it of a CPU, which has no error of its own for it."""


@contextmanager
def naming_phase(phase: str, estimate: Callable[[], Estimate], *, helps: str) -> Iterator[None]:
    """Raise `InputError` with the phase, the estimate and the settings that help where the block runs out of memory."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        reason = str(error).strip().splitlines()[0]
        lines = "\n".join(f"  {line}" for line in by_role_and_phase(estimate()))
        raise InputError(
            f"out of memory while {phase}: {reason}\nestimate\n{lines}\nwhat helps: {helps}, a smaller network, "
            "network=lora with network.dtype=bfloat16, or a larger device"
        ) from error


def is_out_of_memory(error: RuntimeError) -> bool:
    """Return whether torch could not have the memory that it asked for."""
    return isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in ON_CPU)
