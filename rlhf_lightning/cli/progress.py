"""A stage of the pipeline that was stopped within: its checkpoints, kept as long as they are of the same stage."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from rlhf_lightning.cli.checks import Config
from rlhf_lightning.cli.interrupts import started_by_lightning


@dataclass(frozen=True)
class Progress:
    """The checkpoints of stages that have begun and are not complete, a folder each below ``folder``.

    Processes that Lightning started beside the first one read them only.
    """

    folder: Path

    def of(self, stage: str) -> Path:
        """Return the folder of a stage."""
        return self.folder / stage

    def begin(self, stage: str, what: Config) -> None:
        """Keep the checkpoints of the stage where they were written for the same ``what``, and none of another stage.

        What follows a stage is made from what it writes: while the stage runs, nothing that follows is worth keeping.
        """
        if started_by_lightning():
            return
        label = self.of(stage) / "stage.json"
        others = [folder for folder in self.folder.glob("*") if folder != self.of(stage)]
        for folder in others if _holds(label, what) else [*others, self.of(stage)]:
            shutil.rmtree(folder, ignore_errors=True)
        self.of(stage).mkdir(parents=True, exist_ok=True)
        partial = label.with_suffix(".partial")
        partial.write_text(json.dumps(what), "utf-8")
        partial.replace(label)

    def end(self, stage: str) -> None:
        """Delete the checkpoints of a stage that is complete."""
        if not started_by_lightning():
            shutil.rmtree(self.of(stage), ignore_errors=True)
            if self.folder.is_dir() and not any(self.folder.iterdir()):
                self.folder.rmdir()


def _holds(label: Path, what: Config) -> bool:
    return label.exists() and json.loads(label.read_text("utf-8")) == what
