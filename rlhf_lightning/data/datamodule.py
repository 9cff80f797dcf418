"""What the three stages share: reading, splitting, the tokenizer, the limits, and the loaders."""

import logging
import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterable, Sized
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar, runtime_checkable

import torch
from lightning import LightningDataModule
from torch.utils.data import DataLoader, DistributedSampler, Sampler

from rlhf_lightning.data.formats import asked, group_of
from rlhf_lightning.data.reading import Row, Source, file_of_split, read_rows
from rlhf_lightning.data.sampling import EpochSampler
from rlhf_lightning.data.tokenizing import Encoder, require_token
from rlhf_lightning.errors import InputError, check_number, check_seed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger("rlhf_lightning.data")

Item = TypeVar("Item", bound=Sized)


@runtime_checkable
class KnowsTokenizer(Protocol):
    """A LightningModule that brings its network's tokenizer."""

    tokenizer: "PreTrainedTokenizerBase | None"


@runtime_checkable
class KnowsPositions(Protocol):
    """A LightningModule that says how long a sequence its network can read, None for any length."""

    max_positions: int | None


@runtime_checkable
class KnowsResponseLength(Protocol):
    """A LightningModule that generates."""

    max_new_tokens: int


@dataclass(frozen=True)
class Limit:
    """The most tokens that a row may have, and why."""

    tokens: int
    reason: str


class TextDataModule(LightningDataModule, Generic[Item]):
    """Reads rows, splits off a validation part, tokenises, and makes the loaders; a stage says what a row becomes.

    After `setup`, ``train_rows`` and ``val_rows`` are the rows of both parts as they were read.
    """

    tokenizer: "PreTrainedTokenizerBase | None"

    def __init__(
        self,
        path: Source,
        *,
        val_path: Source | None,
        split: str,
        val_split: str | None,
        val_fraction: float,
        batch_size: int,
        tokenizer: "PreTrainedTokenizerBase | None",
        prompt_template: str,
        group_by_length: bool,
        drop_incomplete_batch: bool,
        seed: int,
        num_workers: int,
    ) -> None:
        """Take the settings; raises `InputError` where one is out of its range."""
        super().__init__()
        check_seed("data.seed", seed)
        check_number("data.val_fraction", val_fraction)
        for name, value in {"batch_size": batch_size, "num_workers": num_workers}.items():
            check_number(f"data.{name}", value, whole=True)
        if isinstance(tokenizer, str | Path):
            raise InputError(f"tokenizer={tokenizer!r} must be a tokenizer and not its name")
        if num_workers < 0:
            raise InputError(f"data.num_workers={num_workers} must not be negative")
        if batch_size < 1:
            raise InputError(f"data.batch_size={batch_size} must be at least 1")
        if not 0 <= val_fraction < 1:
            raise InputError(f"data.val_fraction={val_fraction} must lie in [0, 1)")
        self.path = path
        self.val_path = val_path
        self.split = split
        self.val_split = val_split
        self.val_fraction = val_fraction
        self.batch_size = batch_size
        self.tokenizer = tokenizer
        self.prompt_template = prompt_template
        self.group_by_length = group_by_length
        self.drop_incomplete_batch = drop_incomplete_batch
        self.seed = seed
        self.num_workers = num_workers
        self.train_rows: list[Row] = []
        self.val_rows: list[Row] = []
        self.train_items: list[Item] = []
        self.val_items: list[Item] = []
        self._given_tokenizer = tokenizer
        self._train_made_for: tuple[object, ...] | None = None
        self._val_made_for: tuple[object, ...] | None = None
        self._begin_at = {"epoch": 0, "position": 0}

    def setup(self, stage: str) -> None:
        """Read and tokenise, unless it was done before with the same tokenizer and limit."""
        self.tokenizer = self._module_tokenizer() if self._given_tokenizer is None else self._given_tokenizer
        self._tokenize(self.tokenizer, self.limit(), stage)
        if stage == "fit":
            self.check_whole_batch(len(self.train_items) // self._ranks()["num_replicas"])

    def train_dataloader(self) -> "DataLoader[Any]":
        """Return the training rows in an order that is new in each epoch."""
        lengths = [len(item) for item in self.train_items] if self.group_by_length else None
        sampler = EpochSampler(
            len(self.train_items), batch_size=self.batch_size, seed=self.seed, lengths=lengths, **self._ranks()
        )
        # Before the loader is iterated: its workers read ahead.
        sampler.epoch, sampler.position = self._begin_at["epoch"], self._begin_at["position"]
        self._begin_at = {"epoch": 0, "position": 0}
        return self._loader(self.train_items, sampler, drop_last=self.drop_incomplete_batch)

    def val_dataloader(self) -> "DataLoader[Any] | list[Any]":
        """Return the validation rows in their order, or no loader where there are none."""
        if not self.val_items:
            # Lightning asks whether an empty list was meant: it was.
            warnings.filterwarnings("ignore", message=".*Total length of `list` across ranks is zero.*")
            return []
        rows: Any = range(len(self.val_items))
        ranks = self._ranks()
        sampler: Sampler[int] = DistributedSampler(rows, ranks["num_replicas"], ranks["rank"], shuffle=False)
        return self._loader(self.val_items, sampler, drop_last=False)

    def state_dict(self) -> dict[str, Any]:
        """Return the place in the training rows: the epoch, and how many rows of it this process has trained on."""
        if self.trainer is None:
            return {}
        loop = self.trainer.fit_loop
        epochs, batches = loop.epoch_progress.current, loop.epoch_loop.batch_progress.current
        # All that count as done while hooks run after the batch.
        done: int = batches.state_dict()["processed"]
        if done >= self.trainer.num_training_batches:
            return {"epoch": epochs.ready, "position": 0}
        return {"epoch": max(0, epochs.ready - 1), "position": done * self.batch_size}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Begin the next training loader at the place of a checkpoint."""
        self._begin_at = {"epoch": state_dict["epoch"], "position": state_dict["position"]}
        # Lightning looks only at the loader, which is resumable by its sampler.
        warnings.filterwarnings("ignore", message=".*your dataloader is not resumable.*")
        if self.trainer is not None:
            # Strategies that load checkpoints late have made the loader already: it is made again.
            self.trainer.fit_loop._combined_loader = None

    @abstractmethod
    def items(self, row: Row, encoder: Encoder, limit: Limit | None) -> list[Item]:
        """Return what a row becomes: one item, or none where it is not to be used."""

    @abstractmethod
    def collate(self, pad_token_id: int) -> Callable[[list[Item]], Any]:
        """Return the function that makes a batch of items; it travels to the workers."""

    def group(self, row: Row) -> str:
        """Return what rows share that must not stand on both sides of a split."""
        return group_of(row)

    @abstractmethod
    def limit(self) -> Limit | None:
        """Return how long an item may be."""

    def check_tokenizer(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        """Raise `InputError` where the stage cannot work with the tokenizer."""

    def read(self, path: Source, *, split: str, setting: str) -> list[Row]:
        """Return the rows of a source."""
        return read_rows(path, split=split, setting=setting)

    def parts(self, setting: str = "data") -> tuple[list[Row], list[Row]]:
        """Return the rows of training and of validation; ``setting`` is what messages call the settings of the data."""
        rows = self.read(self.path, split=self.split, setting=f"{setting}.path")
        if self.val_path is not None:
            return rows, self.read(self.val_path, split=self.val_split or self.split, setting=f"{setting}.val_path")
        self._check_splits()
        val_split = self.val_split or self._validation_file()
        if val_split is not None:
            return rows, self.read(self.path, split=val_split, setting=f"{setting}.path")
        return split_by_group(rows, self.val_fraction, seed=self.seed, group=self.group)

    def check_whole_batch(self, rows: int, setting: str = "data") -> None:
        """Raise `InputError` where so many training rows of one process make no batch."""
        needed = self.batch_size if self.drop_incomplete_batch else 1
        if rows < needed:
            raise InputError(
                f"{setting}.batch_size={self.batch_size} needs at least {needed} training rows for each process; "
                f"there are {rows}"
            )

    def max_positions(self) -> int | None:
        """Return the number of positions of the network that is trained; None without a Trainer or without a limit."""
        module = self._module()
        return module.max_positions if isinstance(module, KnowsPositions) else None

    def max_new_tokens(self) -> int:
        """Return how many tokens the module generates after a prompt; 0 without a Trainer."""
        module = self._module()
        return module.max_new_tokens if isinstance(module, KnowsResponseLength) else 0

    @property
    def pad_token_id(self) -> int:
        """The id that fills up batches; masks go by length, so it may also be a real token's."""
        if self.tokenizer is None:
            raise InputError(f"{type(self).__name__} has no tokenizer before setup()")
        return require_token(self.tokenizer, "pad")

    def _module(self) -> object:
        return None if self.trainer is None else self.trainer.lightning_module

    def _module_tokenizer(self) -> "PreTrainedTokenizerBase":
        module = self._module()
        if isinstance(module, KnowsTokenizer) and module.tokenizer is not None:
            return module.tokenizer
        raise InputError(
            f"{type(self).__name__} needs a tokenizer: pass tokenizer=..., or give the module a model folder or name, "
            "whose tokenizer it then brings"
        )

    def _tokenize(self, tokenizer: "PreTrainedTokenizerBase", limit: Limit | None, stage: str) -> None:
        """Make the items that the stage needs: validation alone does not pay for the training rows."""
        self.check_tokenizer(tokenizer)
        if not self.train_rows:
            self.train_rows, self.val_rows = self.parts()
        encoder = Encoder(tokenizer, prompt_template=self.prompt_template)
        if stage == "fit" and self._train_made_for != (tokenizer, limit):
            self.train_items = self._kept(self.train_rows, encoder, limit, "training")
            self._train_made_for = (tokenizer, limit)
        if self._val_made_for != (tokenizer, limit):
            self.val_items = self._kept(self.val_rows, encoder, limit, "validation")
            self._val_made_for = (tokenizer, limit)

    def _check_splits(self) -> None:
        """Raise `InputError` where another split of a file or of rows is wanted: they have only one."""
        one = not isinstance(self.path, str | Path) or Path(self.path).expanduser().is_file()
        what = self.path if isinstance(self.path, str | Path) else "rows"
        neither = f"names a file in a folder or a split on the hub, and data.path={what} is neither"
        if self.val_split is not None and one:
            raise InputError(
                f"data.val_split={self.val_split} {neither}: pass data.val_path, or data.val_fraction to hold rows out"
            )
        if self.split != "train" and one:
            raise InputError(f"data.split={self.split} {neither}: leave it out, all rows are read")

    def _validation_file(self) -> str | None:
        """Return the split ``validation`` where the path is a folder that holds one."""
        if not isinstance(self.path, str | Path) or not (folder := Path(self.path).expanduser()).is_dir():
            return None
        return None if file_of_split(folder, "validation") is None else "validation"

    def _kept(self, rows: Iterable[Row], encoder: Encoder, limit: Limit | None, part: str) -> list[Item]:
        """Return the items within the limit; says how many rows were dropped, raises `InputError` if all were."""
        made = [self.items(row, encoder, limit) for row in rows]
        fitting = [[item for item in items if limit is None or len(item) <= limit.tokens] for items in made]
        kept = [item for items in fitting for item in items]
        dropped = sum(not items for items in fitting)
        if dropped == 0:
            return kept
        message = f"{dropped} of {len(made)} {part} rows are dropped: {self.rule(limit)}"
        if not kept:
            longest = max((len(item) for items in made for item in items), default=0)
            raise InputError(f"{message}; none is left (the longest has {longest} tokens)")
        if self._ranks()["rank"] == 0:
            log.warning("%s", message)
        return kept

    def rule(self, limit: Limit | None) -> str:
        """Return in words what a row must fulfil not to be dropped."""
        return "" if limit is None else f"a row may have at most {limit.tokens} tokens ({limit.reason})"

    def _ranks(self) -> dict[str, int]:
        # The strategy knows best: under tensor parallelism several processes read the same rows.
        found = None if self.trainer is None else self.trainer.distributed_sampler_kwargs
        return {"num_replicas": 1, "rank": 0} if found is None else found

    def _loader(self, items: list[Item], sampler: "Sampler[int]", *, drop_last: bool) -> "DataLoader[Any]":
        # The rows are in memory and tokenised: more workers would not make anything faster.
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        return DataLoader(
            items,  # type: ignore[arg-type]
            batch_size=self.batch_size,
            sampler=sampler,
            drop_last=drop_last,
            collate_fn=self.collate(self.pad_token_id),
            num_workers=self.num_workers,
            pin_memory=self.trainer is not None and self.trainer.strategy.root_device.type == "cuda",
            # Otherwise each iteration draws from the global noise, and a resumed run would go on differently.
            generator=torch.Generator().manual_seed(self.seed),
        )


def split_by_group(
    rows: list[Row], fraction: float, *, seed: int, group: Callable[[Row], str] = group_of
) -> tuple[list[Row], list[Row]]:
    """Return training and validation rows, both in their order; rows of one group stay together.

    The validation part has ``fraction`` of the groups, and at least one as long as one is left for training. Groups are
    drawn by a hash of what is asked, so that files with the same prompts hold out the same ones; where the files differ
    in a few, so may what they hold out.
    """
    groups = [group(row) for row in rows]
    drawn: dict[str, bytes] = {}
    for name, row in zip(groups, rows, strict=True):
        # By what is asked, so that a group of one file and the prompts of another are drawn alike.
        draw = blake2b(f"{seed} {asked(row)}".encode()).digest()
        drawn[name] = min(draw, drawn.get(name, draw))
    size = min(max(1, round(fraction * len(drawn))), len(drawn) - 1) if fraction > 0 else 0
    held_out = set(sorted(drawn, key=lambda name: drawn[name])[:size])
    train = [row for name, row in zip(groups, rows, strict=True) if name not in held_out]
    return train, [row for name, row in zip(groups, rows, strict=True) if name in held_out]


def tightest(*limits: Limit | None) -> Limit | None:
    """Return the smallest of the limits that there are."""
    return min((limit for limit in limits if limit is not None), key=lambda limit: limit.tokens, default=None)


def setting_limit(name: str, tokens: int | None) -> Limit | None:
    """Return the limit that a setting sets; raises `InputError` where it leaves room for nothing."""
    if tokens is None:
        return None
    check_number(f"data.{name}", tokens, whole=True)
    if tokens < 2:
        raise InputError(f"data.{name}={tokens} must be at least 2")
    return Limit(tokens, f"data.{name}={tokens}")


def position_limit(positions: int | None, max_new_tokens: int = 0) -> Limit | None:
    """Return the limit that the network's positions set, less what is to be generated."""
    if positions is None:
        return None
    if max_new_tokens:
        room = positions - max_new_tokens
        return Limit(room, f"the model's {positions} positions - max_new_tokens={max_new_tokens}")
    return Limit(positions, f"the model has {positions} positions")
