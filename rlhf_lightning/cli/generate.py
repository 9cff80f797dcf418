"""`rlhf generate`: sample responses of a policy."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from rlhf_lightning.cli.build import build
from rlhf_lightning.cli.checks import Config, check, plain
from rlhf_lightning.cli.console import quieten_libraries
from rlhf_lightning.errors import InputError
from rlhf_lightning.jsonl import write_rows

if TYPE_CHECKING:
    from rlhf_lightning.data.reading import Row

SAMPLING_KEYS = ["max_new_tokens", "temperature", "sampler", "batch_size", "prompt_template", "device"]
ROOT_KEYS = ["seed", "data_root", "output_dir", "network", "out", "prompt", "data", *SAMPLING_KEYS]


def run(config: DictConfig) -> None:
    """Write a row with prompt and response for each prompt; print the response to a single one."""
    settings = plain(config)
    check(settings, known=ROOT_KEYS)
    check_sampling(settings)
    if (settings["prompt"] is None) == (settings["data"]["path"] is None):
        raise InputError('one of prompt="..." and data.path=FILE is required, and not both')
    out = Path(settings["out"])
    _check_writable(out)
    rows = _rows(settings)
    quieten_libraries()
    responses = _responses(settings, rows)
    write_rows(out, [{**row.fields, "response": text} for row, text in zip(rows, responses, strict=True)])
    if settings["prompt"] is not None:
        print(shown(responses[0]))
    print(f"\n{len(responses)} response{'s are' if len(responses) > 1 else ' is'} in {out}")


def shown(response: str) -> str:
    """Return what is printed for a response; one without a character that can be seen is "(empty)"."""
    return response if response.strip() else "(empty)"


def check_sampling(settings: Config) -> None:
    """Raise `InputError` where a setting of sampling is out of its range."""
    for key in ("max_new_tokens", "batch_size"):
        if not isinstance(settings[key], int) or settings[key] < 1:
            raise InputError(f"{key}={settings[key]} must be a whole number, at least 1")
    temperature = settings["temperature"]
    if not isinstance(temperature, int | float) or temperature < 0:
        raise InputError(f"temperature={temperature} must be a number, 0 or more")
    if settings["sampler"] not in ("builtin", "transformers"):
        raise InputError(f"sampler={settings['sampler']} must be builtin or transformers")


def device_of(settings: Config) -> str:
    """Return the device to sample on: the one that is named, or the first GPU, or the CPU.

    Raises `InputError` where the named one is not there.
    """
    import torch

    name = str(settings["device"])
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    # Torch built without a device asserts; a wrong name or a missing driver is a RuntimeError.
    except (AssertionError, RuntimeError) as error:
        raise InputError(f"device={name} cannot be used here: {str(error).splitlines()[0]}") from error
    return name


def _check_writable(file: Path) -> None:
    """Raise `InputError` before anything is sampled where the responses could not be written."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"out={file}: its folder cannot be made: {error.strerror}") from error
    if file.is_dir() or not os.access(file if file.exists() else file.parent, os.W_OK):
        raise InputError(f"out={file} cannot be written: {'it is a folder' if file.is_dir() else 'no permission'}")


def _rows(settings: Config) -> "list[Row]":
    from rlhf_lightning.cli.prompts import read_prompts
    from rlhf_lightning.data.reading import Row

    if settings["prompt"] is not None:
        return [Row({"prompt": settings["prompt"]}, "prompt")]
    return read_prompts(settings["data"])


def _responses(settings: Config, rows: "list[Row]") -> list[str]:
    from rlhf_lightning.cli.prompts import prompt_batches
    from rlhf_lightning.evaluation.policies import answer
    from rlhf_lightning.networks import load_policy, load_tokenizer

    device = device_of(settings)
    network = build("network", settings["network"])
    tokenizer = load_tokenizer(network)
    policy: Any = load_policy(network)
    return answer(
        policy.to(device),
        tokenizer,
        prompt_batches(rows, policy, tokenizer, settings),
        max_new_tokens=settings["max_new_tokens"],
        temperature=settings["temperature"],
        seed=settings["seed"],
        sampler=settings["sampler"],
    ).responses
