"""What is said when a run ends early: what is kept, and the command that goes on from there."""

import os
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rlhf_lightning.errors import NotResumable

CTRL_C = 130
TERMINATED = 143


NOTHING_KEPT = "nothing had been finished that could be kept"


class Stopped(BaseException):
    """A run was stopped from outside; ``hint`` says what is kept and how to go on."""

    def __init__(self, hint: str, exit_code: int) -> None:
        super().__init__(hint)
        self.hint = hint
        self.exit_code = exit_code


@contextmanager
def resumable(hint: Callable[[], str | None]) -> Iterator[None]:
    """Say the text of ``hint`` when the block is stopped by Ctrl-C or by SIGTERM, or fails; None where nothing is kept.

    To an error other than `NotResumable` it is added as a note, which Python prints below the traceback.

    Lightning answers Ctrl-C with ``sys.exit(1)`` and SIGTERM with a subclass of ``SystemExit``: both lose the exit
    code that a shell expects. An inner ``resumable`` has the last word.
    """
    try:
        yield
    except KeyboardInterrupt as stop:
        raise Stopped(hint() or NOTHING_KEPT, CTRL_C) from stop
    except SystemExit as stop:
        if isinstance(stop.__context__, KeyboardInterrupt):
            raise Stopped(hint() or NOTHING_KEPT, CTRL_C) from stop
        if type(stop).__name__ == "SIGTERMException":
            if started_by_lightning():
                # Lightning kills all processes, with another exit code, when one that it started fails.
                sys.exit(0)
            raise Stopped(hint() or NOTHING_KEPT, TERMINATED) from stop
        raise
    except NotResumable:
        raise
    except Exception as error:
        if kept := hint():
            error.add_note(kept)
        raise


def started_by_lightning() -> bool:
    """Return whether Lightning started this process beside the one of the command, which speaks for all."""
    return os.environ.get("LOCAL_RANK", "0") != "0"


def this_command(*more: str) -> str:
    """Return the command line that repeats this job in the same output directory, with ``more`` overrides."""
    changed = {override.split("=")[0] for override in more}
    kept = [argument for argument in sys.argv[1:] if argument.split("=")[0] not in changed]
    return shlex.join(["rlhf", *kept, *more])
