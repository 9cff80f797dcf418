"""A stage of the pipeline: run once, recorded when it is complete, skipped when it is met again."""

import hashlib
import json
import resource
import sys
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from rlhf_lightning.cli.checks import Config
from rlhf_lightning.cli.progress import Progress
from rlhf_lightning.errors import NotResumable

OF_STAGES = ("module", "data", "trainer")
"""Groups of settings that each stage has of its own."""


@dataclass(frozen=True)
class Records:
    """The records of complete stages, one JSON file each below ``folder``."""

    folder: Path

    def path(self, stage: str) -> Path:
        """Return where the record of a stage lies."""
        return self.folder / f"{stage}.json"

    def read(self, stage: str) -> Config | None:
        """Return the record of a complete stage, None where the stage is not complete."""
        path = self.path(stage)
        return cast(Config, json.loads(path.read_text("utf-8"))) if path.exists() else None

    def keep_only(self, stages: Collection[str]) -> None:
        """Forget all other stages."""
        for path in self.folder.glob("*.json"):
            if path.stem not in stages:
                path.unlink()

    def write(self, stage: str, record: Config) -> None:
        """Write the record whole or not at all."""
        self.folder.mkdir(parents=True, exist_ok=True)
        partial = self.path(stage).with_suffix(".partial")
        partial.write_text(json.dumps(record, indent=1), "utf-8")
        partial.replace(self.path(stage))


def run_stage(
    records: Records,
    stage: str,
    settings: Config,
    body: Callable[[], Config],
    *,
    outputs: Sequence[Path],
    before: Collection[str],
    inputs: Sequence[Path] = (),
    progress: Progress | None = None,
) -> Config:
    """Return the record of a stage: the stored one, or that of running ``body``, whose result is its ``result``.

    A stage is complete while its record and all its ``outputs``, with every file that it left in them, are there, and
    none of the files that it read, its ``inputs``, holds anything else by now. Otherwise only the stages ``before`` it
    stay complete, since the others were made from what it wrote. Raises `NotResumable` where it was completed with
    other settings: nothing of another run is mixed in silently. ``progress`` holds what a stage keeps while it runs,
    for the next time if it is stopped.
    """
    # As it will be read back: tuples are lists there.
    settings = json.loads(json.dumps(settings))
    contents = {str(path): digest(path) for path in inputs}
    stored = records.read(stage)
    if stored is not None:
        _check_same(records, stage, stored["settings"], settings)
        # Records of earlier versions name no files.
        written = [*outputs, *map(Path, stored.get("files", []))]
        reasons = [f"{path} is gone" for path in written if not path.exists()]
        reasons += [f"{path} has changed" for path in contents if stored["inputs"].get(path) != contents[path]]
        if not reasons:
            print(f"\n=== {stage}: complete already, skipped", flush=True)
            if progress is not None:
                progress.end(stage)
            return stored
        print(f"\n=== {stage}: {reasons[0]}, so it and what follows run again", flush=True)
        records.keep_only(before)
    else:
        print(f"\n=== {stage}", flush=True)
    if progress is not None:
        progress.begin(stage, {"settings": settings, "inputs": contents})
    start = time.perf_counter()
    result = body()
    record = {
        "stage": stage,
        "seconds": round(time.perf_counter() - start, 2),
        "peak_memory_gb": peak_memory_gb(),
        "settings": settings,
        "inputs": contents,
        "files": [str(file) for file in files_in(outputs)],
        "result": result,
    }
    records.write(stage, record)
    if progress is not None:
        progress.end(stage)
    return record


def files_in(outputs: Sequence[Path]) -> list[Path]:
    """Return the files among the outputs and below those that are folders, in order."""
    return sorted(file for path in outputs for file in (path, *path.rglob("*")) if file.is_file())


def digest(file: Path) -> str:
    """Return a hash of what the file holds: its time would also change with a copy or a checkout."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "blake2b").hexdigest()[:32]


def peak_memory_gb() -> float:
    """Return the largest resident memory that this process has had, in GB of 10^9 bytes."""
    # Linux counts in units of 1024 bytes, macOS in bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9, 2)


def _check_same(records: Records, stage: str, stored: Config, settings: Config) -> None:
    before, now = flat(stored), flat(settings)
    changed = [key for key in sorted(before.keys() | now.keys()) if before.get(key) != now.get(key)]
    if changed:
        lines = "\n".join(
            f"  {_typed(key, stage)}: was {before.get(key)!r}, is now {now.get(key)!r}" for key in changed
        )
        raise NotResumable(
            f"{records.path(stage)}: this stage was completed with other settings\n{lines}\n"
            f"choose another output_dir, or delete {records.folder} to run all stages again"
        )


def _typed(key: str, stage: str) -> str:
    """Return the name by which a setting of the stage is passed; evaluation reads PPO's data."""
    group, _, rest = key.partition(".")
    return f"{group}.{'ppo' if stage == 'evaluate' else stage}.{rest}" if group in OF_STAGES else key


def flat(settings: Any, path: str = "") -> dict[str, Any]:
    """Return the leaves of nested settings by their dotted names."""
    if not isinstance(settings, dict):
        return {path: settings}
    return {
        name: leaf for key, value in settings.items() for name, leaf in flat(value, f"{path}.{key}".lstrip(".")).items()
    }
