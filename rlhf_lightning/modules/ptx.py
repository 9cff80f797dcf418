"""The stream of pretraining batches beside PPO's rollouts (Ouyang et al. 2022, appendix C.4)."""

from collections.abc import Iterator
from itertools import chain, islice
from typing import Any

from lightning import LightningDataModule, Trainer
from torch.utils.data import DistributedSampler

from rlhf_lightning.errors import InputError
from rlhf_lightning.types import SFTBatch


class BatchStream:
    """Endless training batches of a DataModule, epoch after epoch; ``drawn`` is the place in it, and can be set."""

    def __init__(self, data: LightningDataModule, trainer: Trainer) -> None:
        """Set the DataModule up for the Trainer; raises `InputError` where it has no batch."""
        self.data = data
        data.trainer = trainer
        data.prepare_data()
        data.setup("fit")
        self.loader: Any = data.train_dataloader()
        if len(self.loader) == 0:
            raise InputError("ptx_data has no training batch")
        self.drawn = 0
        self._batches: Iterator[SFTBatch] = iter(())
        self._next = -1

    def __next__(self) -> SFTBatch:
        """Return the batch at ``drawn``, and count it; raises `InputError` where it is not one of texts."""
        if self._next != self.drawn:
            self._batches = self._from(self.drawn)
        self.drawn += 1
        self._next = self.drawn
        batch = next(self._batches)
        if not isinstance(batch, SFTBatch):
            raise InputError(
                f"ptx_data must be an SFTDataModule; {type(self.data).__name__} makes {type(batch).__name__}"
            )
        return batch

    def put_back(self, batch: SFTBatch) -> None:
        """Return this batch the next time, in place of the one that is due."""
        self._batches = chain((batch,), self._from(self.drawn + 1))
        self._next = self.drawn

    def _from(self, drawn: int) -> Iterator[SFTBatch]:
        epoch, position = divmod(drawn, len(self.loader))
        while True:
            if isinstance(self.loader.sampler, DistributedSampler):
                self.loader.sampler.set_epoch(epoch)
            yield from islice(self.loader, position, None)
            epoch, position = epoch + 1, 0
