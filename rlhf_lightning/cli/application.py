"""One run of a verb: Hydra composes the config and calls the verb's function; every error ends here."""

import importlib
import os
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.errors import InstantiationException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from rlhf_lightning.cli.interrupts import CTRL_C, NOTHING_KEPT, Stopped
from rlhf_lightning.cli.suggestions import CONFIG_PATH, NOT_COMPOSED, explain
from rlhf_lightning.errors import InputError

INPUT_ERROR = 2

SOURCES = re.compile(r"experiment=|network\.pretrained=|data\.\w+\.path=")
"""The overrides that say what the pipeline works on; without any of them it plays the embedded world."""


class _Refusal(BaseException):
    """Carries an `InputError` out of a job; Hydra would print a line of its own above an ordinary exception."""


def run_verb(verb: str, arguments: Sequence[str]) -> int:
    """Run ``rlhf verb arguments`` and return its exit code.

    Raises what is neither the user's to mend nor a signal: that is a bug, and its traceback is needed.
    """
    command = [sys.argv[0], verb, *arguments]
    flags, overrides = _split(arguments)
    if verb == "pipeline" and not any(SOURCES.match(override) for override in overrides):
        overrides = ["experiment=world", *overrides]
    started = False

    def job(config: DictConfig) -> Any:
        nonlocal started
        started = True
        sys.argv = _command_of_this_job(command[0], verb, flags)
        _set_output_dir(config)
        try:
            return importlib.import_module(f"rlhf_lightning.cli.{verb}").run(config)
        except Exception as error:
            refusal = _input_error(error)
            if refusal is None:
                raise
            raise _Refusal("\n".join([str(refusal), *_notes(error)])) from error

    # Hydra hides tracebacks and exits by itself unless told otherwise.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    sys.argv = [f"{Path(command[0]).name} {verb}", *flags, *overrides]
    try:
        hydra.main(version_base="1.3", config_path=CONFIG_PATH, config_name=verb)(job)()
    except _Refusal as refusal:
        return _say(str(refusal), INPUT_ERROR)
    except (Stopped, KeyboardInterrupt) as stop:
        hint = stop.hint if isinstance(stop, Stopped) else NOTHING_KEPT
        return _say(f"\nstopped: {hint}", stop.exit_code if isinstance(stop, Stopped) else CTRL_C)
    except NOT_COMPOSED as error:
        if started:
            raise
        return _say(explain(error, verb, flags, overrides), INPUT_ERROR)
    except OSError as error:
        if started:
            raise
        return _say(f"output_dir: nothing can be written there ({error})", INPUT_ERROR)
    finally:
        sys.argv = command
    return 0


def _say(message: str, exit_code: int) -> int:
    print(message, file=sys.stderr)
    return exit_code


def _split(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return Hydra's flags and the overrides, so that flags may stand anywhere on the line."""
    overrides: list[str] = get_args_parser().parse_intermixed_args(list(arguments)).overrides
    flags = list(arguments)
    for override in overrides:
        flags.remove(override)
    return flags, [_readable(override) for override in overrides]


def _readable(override: str) -> str:
    """Return an override as Hydra can take it: a prompt in quotation marks, callbacks or logger of null as none."""
    key, _, value = override.partition("=")
    if key in ("callbacks", "logger") and value == "null":
        return f"{key}=none"
    text = key == "prompt" and value not in ("", "null") and value[0] not in "'\""
    return f"prompt={in_quotes(value)}" if text else override


def _command_of_this_job(program: str, verb: str, flags: Sequence[str]) -> list[str]:
    """Return the command line that repeats this job alone, in the same directory: what Lightning starts ranks with."""
    job = HydraConfig.get()
    not_swept = [flag for flag in flags if flag not in ("-m", "--multirun")]
    # As they were typed: an interpolation in them means the job's config, and not Hydra's.
    typed: Any = OmegaConf.to_container(job.overrides.task, resolve=False)
    overrides = [o for o in typed if not o.startswith("output_dir=")]
    return [program, verb, *not_swept, *overrides, f"output_dir={quoted(job.runtime.output_dir)}"]


def quoted(value: str) -> str:
    """Return ``value`` as one text in the grammar of Hydra's overrides."""
    return value if re.fullmatch(r"[\w./:-]+", value) else in_quotes(value)


def in_quotes(value: str) -> str:
    """Return ``value`` between quotation marks, which make a text also of a number, true or null."""
    # Backslashes count only in front of a quotation mark.
    escaped = re.sub(r"(\\*)('|$)", lambda found: found[1] * 2 + ("\\'" if found[2] else ""), value)
    return f"'{escaped}'"


def _set_output_dir(config: DictConfig) -> None:
    """Point ``output_dir`` at the absolute directory of this job, in a sweep its own subdirectory."""
    config.output_dir = HydraConfig.get().runtime.output_dir


def _input_error(error: BaseException) -> InputError | None:
    """Return the `InputError` that an exception is or was raised from; constructors' errors come wrapped by Hydra."""
    for cause in _causes(error):
        if isinstance(cause, InputError):
            return cause
        if not isinstance(cause, InstantiationException | OmegaConfBaseException):
            return None
    return None


def _notes(error: BaseException) -> list[str]:
    """Return what was added to an exception: how to go on."""
    notes: list[str] = vars(error).get("__notes__", [])
    return notes


def _causes(error: BaseException) -> Iterator[BaseException]:
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__
