"""How a worker of peers.py takes its turns: a line on standard input begins one, a line of JSON ends it."""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from common import begin_peak, peak


class Turns:
    """Measures CPU-seconds of the process from the beginning of a turn to its end; waiting costs none.

    To be made when all is imported and before a network is loaded: its memory is what is there before.
    """

    def __init__(self) -> None:
        # What libraries print goes to standard error.
        self._answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        self._before = begin_peak()
        self._start = 0.0

    def begin(self) -> None:
        """Wait for the next turn; exit where none comes."""
        if not sys.stdin.readline():
            raise SystemExit
        begin_peak()
        self._start = time.process_time()

    def end(self, **found: Any) -> None:
        """End the turn with what was found."""
        seconds = time.process_time() - self._start
        found |= {"seconds": seconds, "peak": peak(), "before": self._before}
        print(json.dumps(found), file=self._answers, flush=True)


def last(run: dict[str, Any]) -> int:
    """Return the number of turns: one of a check, else as many as come."""
    return 1 if run["check"] else 1000


def read(run: dict[str, Any], stage: str) -> list[dict[str, Any]]:
    """Return the rows; of a check those of one batch."""
    rows: list[dict[str, Any]] = json.loads((Path(run["folder"]) / f"{stage}.json").read_text())
    return rows[: run["batch"]] if run["check"] else rows
