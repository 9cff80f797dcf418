"""The largest micro-batch that fits: by the estimate first, then by trying it."""

import gc
import logging
from collections.abc import Callable, Iterable

import torch
from torch import nn

from rlhf_lightning.networks.sharding import largest_on_any_process
from rlhf_lightning.preflight.out_of_memory import is_out_of_memory

log = logging.getLogger(__name__)


def halvings(most: int) -> list[int]:
    """Return ``most`` and what remains of it by halving, down to 1."""
    return [most // 2**i for i in range(most.bit_length())]


def largest_by_estimate(needed: Callable[[int], int | None], *, most: int, free: int | None) -> int:
    """Return the first of the halvings whose need is not above ``free``, 1 if none is; ``most`` where one is unknown.

    ``needed`` gives bytes, None where they are not known.
    """
    for size in halvings(most):
        need = None if free is None else needed(size)
        if need is None or free is None or need <= free:
            return size
    return 1


def largest_by_trial(trial: Callable[[int], None], *, most: int, device: torch.device) -> int:
    """Return the first of the halvings with which ``trial`` does not run out of memory on any process.

    All processes must call it with the same ``most``. With 1, what it raises is raised.
    """
    for size in halvings(most):
        runs_out = _runs_out(trial, size)
        if runs_out:
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
        # Also the others, so that all have one size.
        if not largest_on_any_process(int(runs_out), device):
            return size
        log.info("a micro-batch of %d sequences does not fit", size)
    trial(1)
    return 1


def with_room_for(
    optimizer: int, networks: Iterable[nn.Module], work: Callable[[], None], device: torch.device
) -> None:
    """Do ``work`` beside as many bytes as the ``optimizer`` will take, and forget the gradients that it leaves."""
    moments = torch.empty(optimizer, dtype=torch.uint8, device=device)
    try:
        work()
    finally:
        del moments
        for network in networks:
            network.zero_grad()


def _runs_out(trial: Callable[[int], None], size: int) -> bool:
    try:
        trial(size)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return True
    return False
