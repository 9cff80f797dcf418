"""One run at a time in an output directory."""

import fcntl
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from rlhf_lightning.errors import InputError

log = logging.getLogger(__name__)

LOCK = ".lock"
"""The file in ``output_dir``; it stays there and means nothing while no process holds it."""

PATIENCE = 6.0
"""Seconds to wait for the lock: the workers of a killed run's loaders notice within 5 seconds, and hold it with it."""

RANKS = ("RANK", "LOCAL_RANK", "SLURM_PROCID", "NODE_RANK", "GROUP_RANK")
"""Where torchrun, SLURM and Lightning say which of the processes of a run this one is."""


@contextmanager
def only_run_in(output_dir: str) -> Iterator[None]:
    """Keep other runs out of ``output_dir`` for the length of a block; raises `InputError` where one is in it.

    The operating system holds the lock, so that of a run that was killed nothing is left. The first process of a run
    takes it for all; those that it forks hold it with it, and keep others out as long as one of them lives.
    """
    if any(os.environ.get(name, "0") != "0" for name in RANKS):
        yield
        return
    path = Path(output_dir, LOCK)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+", encoding="utf-8") as file:
        try:
            _take(file, time.monotonic() + PATIENCE)
        except BlockingIOError:
            file.seek(0)
            raise InputError(
                f"output_dir={output_dir} is in use by another run ({file.read()}): pass another output_dir, or wait "
                "until it has ended; two runs would overwrite each other's files"
            ) from None
        except OSError as error:
            log.warning("%s cannot be locked (%s): nothing keeps a second run out", path, error.strerror)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield


def _take(file: IO[str], until: float) -> None:
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > until:
                raise
            time.sleep(0.1)
        else:
            return
