"""The order in which training reads its rows: a function of seed, epoch and rank, and of nothing else."""

from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import DistributedSampler

WINDOW = 16
"""How many batches are sorted by length together."""


class EpochSampler(DistributedSampler[int]):
    """A new order of the rows in each epoch, cut so that every rank gets the same number of them.

    With ``lengths``, each batch holds rows of similar length, on all ranks at once, and batches come in random order.
    What one epoch leaves out (fewer rows than there are ranks) differs from epoch to epoch. To go on in the middle of
    an epoch, set ``epoch`` and ``position``.
    """

    # A DistributedSampler, because Lightning replaces any other one in distributed runs unless told not to.

    def __init__(
        self,
        size: int,
        *,
        batch_size: int,
        seed: int = 0,
        num_replicas: int = 1,
        rank: int = 0,
        lengths: Sequence[int] | None = None,
    ) -> None:
        """Take the number of rows, and the batch size of one rank."""
        super().__init__(range(size), num_replicas, rank, seed=seed, drop_last=True)  # type: ignore[arg-type]
        self.size = size
        self.batch_size = batch_size
        self.lengths = None if lengths is None else np.asarray(lengths)
        self.position = 0
        """How many rows of this rank the next iteration leaves out; each iteration sets it back to 0."""

    def __iter__(self) -> Iterator[int]:
        """Yield this rank's rows of the epoch."""
        start, self.position = self.position, 0
        return iter(self.order()[start:])

    def __len__(self) -> int:
        """Return how many rows this rank has in a whole epoch."""
        return self.size // self.num_replicas

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, as Lightning does before each; another one than the present starts at its first row."""
        if epoch != self.epoch:
            self.position = 0
        super().set_epoch(epoch)

    def order(self) -> list[int]:
        """Return this rank's rows of the epoch in the order in which they are read."""
        noise = np.random.default_rng([self.seed, self.epoch])
        order = noise.permutation(self.size)[: len(self) * self.num_replicas]
        if self.lengths is not None:
            order = self._by_length(order, self.lengths, noise)
        return [int(row) for row in order[self.rank :: self.num_replicas]]

    def _by_length(self, order: np.ndarray, lengths: np.ndarray, noise: np.random.Generator) -> np.ndarray:
        """Sort within windows, then shuffle the batches; an incomplete one stays at the end."""
        batch = self.batch_size * self.num_replicas
        whole = len(order) // batch * batch
        windows = [order[i : min(i + WINDOW * batch, whole)] for i in range(0, whole, WINDOW * batch)]
        ordered = [window[np.argsort(lengths[window], kind="stable")] for window in windows]
        batches = np.concatenate([*ordered, order[:0]]).reshape(-1, batch)
        return np.concatenate([noise.permutation(batches).reshape(-1), order[whole:]])
