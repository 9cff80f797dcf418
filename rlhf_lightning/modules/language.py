"""What the three stages share: a Hugging Face network with its tokenizer, and the way to write it back."""

import math
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import torch
from jaxtyping import Float, Int
from lightning import LightningModule
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins.precision import Precision
from torch import Tensor, distributed, nn
from torch.optim.lr_scheduler import LambdaLR

from rlhf_lightning.callbacks import ExactResume
from rlhf_lightning.errors import InputError
from rlhf_lightning.functional.precision import at_least_float32
from rlhf_lightning.functional.schedules import Schedule, learning_rate_factor
from rlhf_lightning.modules.sharding import check_mesh, gathered_state
from rlhf_lightning.networks import Model, load_tokenizer, max_positions, save_pretrained
from rlhf_lightning.networks.sharding import shard
from rlhf_lightning.types import Record, SFTBatch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class LanguageModule(LightningModule):
    """A LightningModule around one trained Hugging Face network."""

    tokenizer: "PreTrainedTokenizerBase | None"

    def __init__(self, model: Model, tokenizer: "PreTrainedTokenizerBase | None") -> None:
        """Take the folder's tokenizer unless one is given; a bare network may get it from the DataModule."""
        super().__init__()
        if tokenizer is None and not isinstance(model, nn.Module):
            tokenizer = load_tokenizer(model)
        self.tokenizer = tokenizer

    @property
    def network(self) -> nn.Module:
        """The Hugging Face network that is trained and exported."""
        raise TypeError(f"{type(self).__name__} does not say which network it trains")

    @property
    def max_positions(self) -> int | None:
        """The longest sequence that the network's positions allow."""
        return max_positions(self.network)

    def setup(self, stage: str) -> None:
        """Take the DataModule's tokenizer where the module has none, and let the precision plugin read our batches."""
        pass_records_by(self.trainer.precision_plugin)
        if self.tokenizer is None and self._datamodule is not None:
            self.tokenizer = self._datamodule.tokenizer

    def configure_model(self) -> None:
        """Leave each process its part of the weights where the Trainer's strategy shards them (FSDP2)."""
        self.shard(self.network)

    def shard(self, *networks: nn.Module) -> None:
        """Shard the networks over all processes under FSDP2; do nothing under other strategies."""
        if self.device_mesh is not None:
            mesh = check_mesh(self.device_mesh)
            for network in networks:
                shard(network, mesh)

    def configure_callbacks(self) -> list[Callback]:
        """Return what makes a run that goes on from a checkpoint equal to the uninterrupted one."""
        return [ExactResume()]

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the Hugging Face folder that the next stage, or `transformers` alone, can load.

        Where the weights lie in parts on several processes, all of them must call, and the first one writes.
        """
        state = gathered_state(self, self.network)
        if state is None:
            save_pretrained(self.network, self.required_tokenizer, folder)
        elif state:
            save_pretrained(self.network, self.required_tokenizer, folder, state=state)
        if state is not None:
            # Nobody reads the folder before it is there.
            distributed.barrier()

    @property
    def required_tokenizer(self) -> "PreTrainedTokenizerBase":
        """The tokenizer; raises `InputError` where neither the module nor the DataModule was given one."""
        if self.tokenizer is None:
            raise InputError(
                f"{type(self).__name__} was given a network without a tokenizer: pass tokenizer=... to it or to the "
                "DataModule"
            )
        return self.tokenizer

    def sum_over_ranks(self, x: Tensor) -> Tensor:
        """Return ``x`` added up over all processes."""
        total: Tensor = self.trainer.strategy.reduce(x.clone(), reduce_op="sum")
        return total

    def share_of_mean(self, total: Tensor, count: Tensor | int) -> Tensor:
        """Return this process's part of total / count of all processes: the average of their parts is that mean."""
        counts = self.sum_over_ranks(torch.as_tensor(count, device=total.device, dtype=total.dtype))
        return total * self.trainer.world_size / counts

    @property
    def _datamodule(self) -> Any:
        # Lightning sets the attribute when the Trainer is given a DataModule; plain loaders have none.
        return getattr(self.trainer, "datamodule", None)


def pass_records_by(plugin: Precision) -> None:
    """Keep a precision plugin from converting our batches: Lightning raises for frozen records (FSDP, bf16-true).

    Nothing is lost: tokens and masks have no precision, and the networks' own inputs are their embeddings.
    """
    convert = plugin.convert_input

    def convert_others(data: Any) -> Any:
        return data if isinstance(data, Record) else convert(data)

    plugin.convert_input = convert_others  # type: ignore[method-assign]


def predictions(network: nn.Module, batch: SFTBatch) -> tuple[Float[Tensor, "N V"], Int[Tensor, " N"]]:
    """Return the logits in at least float32 that predict the N tokens that count, and these tokens."""
    model: Any = network
    logits = model(input_ids=batch.tokens, attention_mask=batch.attention_mask.long(), use_cache=False).logits
    # The token at t is predicted by the logits at t - 1.
    predicted = batch.loss_mask[:, 1:]
    return at_least_float32(logits[:, :-1][predicted]), batch.tokens[:, 1:][predicted]


def adamw_with_schedule(
    module: LightningModule,
    *,
    learning_rate: float,
    weight_decay: float,
    schedule: Schedule,
    warmup_steps: int,
    floor: float,
) -> Any:
    """Return Lightning's dictionary of AdamW over what is trained and a schedule that moves every optimizer step."""
    trained = [p for p in module.parameters() if p.requires_grad]
    optimizer = adamw([{"params": trained}], lr=learning_rate, weight_decay=weight_decay)
    total = module.trainer.estimated_stepping_batches

    def factor(step: int) -> float:
        return learning_rate_factor(step, total, schedule=schedule, warmup_steps=warmup_steps, floor=floor)

    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": LambdaLR(optimizer, factor), "interval": "step"}}


def check_optimization(
    *, learning_rate: float, weight_decay: float, lr_schedule: str, lr_floor: float, warmup_steps: int
) -> None:
    """Raise `InputError` where a setting of optimizer or schedule is out of its range."""
    if lr_schedule not in get_args(Schedule):
        raise InputError(f"lr_schedule={lr_schedule} must be one of {', '.join(get_args(Schedule))}")
    if not 0 <= lr_floor <= 1:
        raise InputError(f"lr_floor={lr_floor} must lie in [0, 1]")
    for name, value in {"learning_rate": learning_rate, "weight_decay": weight_decay}.items():
        if not 0 <= value < math.inf:
            raise InputError(f"{name}={value} must not be negative, and finite")
    if not isinstance(warmup_steps, int) or warmup_steps < 0:
        raise InputError(f"warmup_steps={warmup_steps} must be a whole number, 0 or more")


def adamw(groups: list[dict[str, Any]], **settings: Any) -> torch.optim.AdamW:
    """Return AdamW; on a CPU in one kernel, where a loop over the weights takes several times longer."""
    # On CUDA torch chooses: Lightning cannot clip gradients that a fused step unscales (16-mixed).
    on_cpu = all(p.device.type == "cpu" for group in groups for p in group["params"])
    return torch.optim.AdamW(groups, fused=on_cpu or None, **settings)


def without_dropout_on_purpose() -> None:
    """Silence Lightning's warning about networks in evaluation mode, for the stages that mean it."""
    warnings.filterwarnings("ignore", message=".*in eval mode at the start of training.*")
