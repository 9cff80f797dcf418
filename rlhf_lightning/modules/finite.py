"""Updates whose loss or gradient is not finite: skipped, reported and kept in a file; too many in a row end the run."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning import Trainer
from lightning.pytorch.plugins.precision import FSDPPrecision, MixedPrecision
from lightning.pytorch.strategies import DeepSpeedStrategy
from safetensors import SafetensorError
from torch import Tensor

from rlhf_lightning.errors import InputError
from rlhf_lightning.modules.batch_file import write_records
from rlhf_lightning.types import Record

if TYPE_CHECKING:
    from rlhf_lightning.modules.language import LanguageModule

log = logging.getLogger(__name__)

FOLDER = "bad_updates"
"""Where the batches lie, in the Trainer's ``default_root_dir``."""

SMALLEST_SCALE = 1.0
"""Above this loss scale a gradient that is not finite is an overflow (16-mixed); from it down, the gradient's own."""


class BadUpdates:
    """Watches the optimizer steps of a module and makes those of a loss or gradient that is not finite do nothing.

    Weights, optimizer and schedule stay as they are; all processes decide alike. A gradient that overflowed under the
    loss scale of 16-mixed is skipped as well, and is not bad: the next step has a smaller scale.
    """

    def __init__(self, limit: int) -> None:
        """Take how many bad updates in a row end the run; raises `InputError` where that is below 1."""
        if not isinstance(limit, int) or limit < 1:
            raise InputError(f"max_bad_updates={limit} must be a whole number, 1 or more")
        self.limit = limit
        self.in_a_row = 0
        self.skipped = 0
        """Updates since the beginning that did nothing, overflows among them."""
        self.last_was_skipped = False
        self.records: list[Record] = []
        """What the next update is made from."""
        self.losses: list[Tensor] = []
        """Its losses so far."""

    def judge(
        self, module: "LanguageModule", optimizer: torch.optim.Optimizer, norms: Sequence[Tensor], *, update: int
    ) -> None:
        """Take the gradients away where one of these norms of theirs, or a loss since the last call, is not finite.

        An optimizer leaves weights without a gradient, and what it keeps about them, as they are. Raises `InputError`
        on all processes for the last bad update that is allowed in a row.
        """
        trainer = module.trainer
        records, self.records = self.records, []
        losses, self.losses = self.losses, []
        own = torch.zeros(2, trainer.world_size, device=module.device)
        own[0, trainer.global_rank] = not all_finite(losses)
        own[1, trainer.global_rank] = not all_finite(norms)
        bad_losses, bad_norms = (module.sum_over_ranks(own) > 0).tolist()
        self.last_was_skipped = any(bad_losses) or any(bad_norms)
        if not self.last_was_skipped:
            self.in_a_row = 0
            return
        optimizer.zero_grad()
        self.skipped += 1
        scale = loss_scale(trainer)
        if not any(bad_losses) and scale is not None and scale > SMALLEST_SCALE:
            log.info("update %d is skipped: its gradient overflowed at a loss scale of %g", update, scale)
            return
        self.in_a_row += 1
        what = _what(bad_losses)
        # Where every loss is finite, any process may have the cause.
        guilty = bad_losses if any(bad_losses) else bad_norms
        files = [_file(trainer, module.stage, update, rank) for rank, bad in enumerate(guilty) if bad]
        if guilty[trainer.global_rank]:
            _keep(records, _file(trainer, module.stage, update, trainer.global_rank), update=update, what=what)
        self._report(trainer, update, what, files)

    def state_dict(self) -> dict[str, int]:
        """Return what a run that goes on needs to know."""
        return {"in_a_row": self.in_a_row, "skipped": self.skipped}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from what `state_dict` returned."""
        self.in_a_row, self.skipped = state["in_a_row"], state["skipped"]

    def _report(self, trainer: Trainer, update: int, what: str, files: list[Path]) -> None:
        kept = f"its batch is in {', '.join(map(str, files))}; replay={files[0]} in the same command looks into it"
        if isinstance(trainer.strategy, DeepSpeedStrategy):
            # Its optimizer has the gradients already.
            raise InputError(f"update {update}: {what}, which DeepSpeed cannot skip; {kept}")
        if self.in_a_row >= self.limit:
            raise InputError(
                f"max_bad_updates={self.limit}: this many updates in a row were not finite, the last was update "
                f"{update}: {what}; weights and checkpoints are those before them; {kept}"
            )
        if trainer.is_global_zero:
            log.warning(
                "update %d is skipped: %s (%d in a row, max_bad_updates=%d ends the run); %s",
                update,
                what,
                self.in_a_row,
                self.limit,
                kept,
            )


def all_finite(numbers: Sequence[Tensor]) -> bool:
    """Return whether all of these scalars are finite."""
    return not numbers or bool(torch.stack(list(numbers)).isfinite().all())


def loss_scale(trainer: Trainer) -> float | None:
    """Return by how much 16-mixed multiplies losses now; None under other precisions."""
    plugin = trainer.precision_plugin
    if not isinstance(plugin, MixedPrecision | FSDPPrecision) or plugin.scaler is None:
        return None
    return float(plugin.scaler.get_scale())


def _what(bad_losses: list[bool]) -> str:
    if not any(bad_losses):
        return "the gradient is not finite"
    ranks = ", ".join(str(rank) for rank, bad in enumerate(bad_losses) if bad)
    return "the loss is not finite" + (f" in process {ranks}" if len(bad_losses) > 1 else "")


def _file(trainer: Trainer, stage: str, update: int, rank: int) -> Path:
    return Path(trainer.default_root_dir, FOLDER, f"{stage}-{update}-process-{rank}.safetensors")


def _keep(records: list[Any], path: Path, *, update: int, what: str) -> None:
    try:
        write_records(records, path, {"update": str(update), "what": what})
    except (OSError, SafetensorError) as error:
        # A full disk: the update is skipped all the same.
        log.warning("%s cannot be written: %s", path, error)
