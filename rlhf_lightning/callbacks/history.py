"""The logged numbers of a run, kept for its report."""

from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

Curve = dict[str, list[float]]
"""``{"step": [...], "value": [...]}``"""


class History(Callback):
    """Keeps all that the module logs, whatever loggers there are and however seldom they write.

    It must stand behind callbacks that log, or it misses what they say of the same batch. It is part of checkpoints: a
    resumed run keeps its beginning.
    """

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []
        """One row a step: ``{"step": ..., "ppo/score": ..., ...}``."""
        self._sources: dict[str, str] = {}

    @property
    def curves(self) -> dict[str, Curve]:
        """The rows turned: ``{"ppo/score": {"step": [...], "value": [...]}}``."""
        curves: dict[str, Curve] = {name: {"step": [], "value": []} for name in self._sources}
        for row in self.rows:
            for name, value in row.items():
                if name != "step":
                    curves[name]["step"].append(row["step"])
                    curves[name]["value"].append(value)
        return curves

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Keep what this batch logged."""
        self._record(trainer, "training")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep what this validation logged."""
        if not trainer.sanity_checking:
            self._record(trainer, "validation")

    def state_dict(self) -> dict[str, Any]:
        """Return the rows as plain containers."""
        return {"rows": self.rows, "sources": self._sources}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from the rows of a checkpoint."""
        self.rows = list(state_dict["rows"])
        self._sources = dict(state_dict["sources"])

    def _record(self, trainer: Trainer, source: str) -> None:
        # The Trainer shows old numbers beside new ones: a name counts only where it first appeared.
        fresh = {
            name: float(value)
            for name, value in trainer.callback_metrics.items()
            if self._sources.setdefault(name, source) == source
        }
        step = trainer.global_step
        if not self.rows or self.rows[-1]["step"] != step:
            self.rows.append({"step": step})
        self.rows[-1] |= fresh
