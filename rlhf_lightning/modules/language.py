"""What the three stages share: a Hugging Face network with its tokenizer, and the way to write it back."""

import logging
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, get_args

import torch
from lightning import LightningModule
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, distributed, nn
from torch.nn.utils import get_total_norm
from torch.optim.lr_scheduler import LambdaLR
from torchmetrics import Metric

from rlhf_lightning.callbacks import ExactResume
from rlhf_lightning.errors import InputError, NotResumable, check_choice, check_not_negative, check_number
from rlhf_lightning.functional.dtensors import whole
from rlhf_lightning.functional.muon import by_kind
from rlhf_lightning.functional.schedules import Schedule, learning_rate_factor
from rlhf_lightning.modules import replay
from rlhf_lightning.modules.finite import BadUpdates
from rlhf_lightning.modules.hardware import OptimizerName, SupervisedOptimizerName, check_hardware, has_same_state
from rlhf_lightning.modules.muon import MuonWithAdamW
from rlhf_lightning.modules.sharding import check_mesh, gathered_state
from rlhf_lightning.networks import (
    Model,
    NetworkConfig,
    check_export,
    has_adapter,
    load_tokenizer,
    max_positions,
    save_pretrained,
)
from rlhf_lightning.networks.embeddings import embeddings_and_heads
from rlhf_lightning.networks.packing import Packed, reading
from rlhf_lightning.networks.predictions import Predictions, predictions
from rlhf_lightning.networks.sharding import shard
from rlhf_lightning.preflight import check_rounding, of_status
from rlhf_lightning.preflight.effect import check_effect
from rlhf_lightning.preflight.out_of_memory import naming_phase
from rlhf_lightning.preflight.phases import supervised_memory
from rlhf_lightning.rollout.reward import same_tokenizer
from rlhf_lightning.types import Export, Record, SFTBatch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

DATA_MODULES = {"sft": "SFTDataModule", "reward": "RewardDataModule", "ppo": "PPODataModule"}
"""Which of the DataModules makes what a stage reads."""


class LanguageModule(LightningModule):
    """A LightningModule around one trained Hugging Face network."""

    tokenizer: "PreTrainedTokenizerBase | None"

    learning_rate: float

    optimizer: SupervisedOptimizerName

    without_effect: list[str]
    """What was set for nothing, since other settings turn it off."""

    shares_backbone = False
    """Whether several networks hold the same weights."""

    never_changed: ClassVar[tuple[str, ...]] = ()
    """Beginnings of the names of networks that training never changes: they come from their folders."""

    stage: ClassVar[str]
    """What its metrics and files begin with."""

    reads: ClassVar[type[Record]]
    """The record that its data are batches of."""

    update_is_made_from: ClassVar[type[Record]]
    """The record that an update is made from, and that one that is not finite is kept as."""

    phases: ClassVar[tuple[str, ...]] = ()
    """What the Trainer's profiler is told that a training step consists of."""

    def __init__(self, model: Model, tokenizer: "PreTrainedTokenizerBase | None", *, max_bad_updates: int) -> None:
        """Take the folder's tokenizer unless one is given; a bare network may get it from the DataModule."""
        super().__init__()
        self.bad_updates = BadUpdates(max_bad_updates)
        if isinstance(tokenizer, str | Path):
            raise InputError(
                f"tokenizer={tokenizer!r} must be a tokenizer and not its name: load_tokenizer({str(tokenizer)!r})"
            )
        if isinstance(model, NetworkConfig) and model.quantization != "none" and model.lora is None:
            raise InputError(
                f"network.quantization={model.quantization} needs network.lora (network=lora): quantised weights "
                "cannot be trained, an adapter beside them can"
            )
        if tokenizer is None and not isinstance(model, nn.Module):
            tokenizer = load_tokenizer(model)
        self.tokenizer = tokenizer
        # What is frozen is not in a checkpoint; `load_state_dict` checks all other keys itself.
        self.strict_loading = False

    @property
    def network(self) -> nn.Module:
        """The Hugging Face network that is trained and exported."""
        raise TypeError(f"{type(self).__name__} does not say which network it trains")

    @property
    def max_positions(self) -> int | None:
        """The longest sequence that the network's positions allow."""
        return max_positions(self.network)

    def configure_callbacks(self) -> list[Callback]:
        """Refuse what the device or strategy cannot do (no hook runs earlier), and make resumed runs exact."""
        check_hardware(self.trainer, self)
        return [ExactResume()]

    def setup(self, stage: str) -> None:
        """Take the DataModule's tokenizer where the module has none, and let the precision plugin read our batches."""
        pass_records_by(self.trainer.precision_plugin)
        # Lightning sets the attribute when the Trainer is given a DataModule; plain loaders have none.
        data = getattr(self.trainer, "datamodule", None)
        if self.tokenizer is None:
            self.tokenizer = _tokenizer_of(data)
        self.check_tokenizer(data)

    def configure_model(self) -> None:
        """Leave each process its part of the weights where the Trainer's strategy shards them (FSDP2)."""
        self.shard(self.network)

    def shard(self, *networks: nn.Module) -> None:
        """Shard the networks over all processes under FSDP2; do nothing under other strategies."""
        if self.device_mesh is not None:
            mesh = check_mesh(self.device_mesh)
            for network in networks:
                shard(network, mesh)

    def on_train_start(self) -> None:
        """Warn of weights too coarse for the steps and of idle settings; PPO's preflight says it with all else."""
        findings = [check_rounding({self.network: self.learning_rate}), check_effect(self.without_effect)]
        if self.automatic_optimization and self.trainer.is_global_zero:
            for finding in of_status(findings, "warning"):
                log.warning("%s", finding)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Look at the batch, and note it for the next update, which may be made from several."""
        self.check_batch(batch)
        self.bad_updates.records.append(batch)

    def on_before_backward(self, loss: Tensor) -> None:
        """Note the loss for the next update."""
        self.bad_updates.losses.append(loss.detach())

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Make the step do nothing where a loss or the gradient, which was unscaled, is not finite on any process."""
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norms = [whole(get_total_norm(gradients))]
        self.bad_updates.judge(self, optimizer, norms, update=self.trainer.global_step)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Take a step, which under automatic optimisation contains forward and backward of its last batch."""
        with self.updating():
            super().optimizer_step(*args, **kwargs)

    @property
    def accumulates(self) -> bool:
        """Whether the Trainer, if there is one, makes an optimizer step of several batches."""
        return self._trainer is not None and self._trainer.accumulate_grad_batches > 1

    def updating(self) -> AbstractContextManager[None]:
        """Return the block of an update from the newest batch, which says so if it runs out of memory."""
        run: Any = self
        return naming_phase(
            "updating",
            lambda: supervised_memory(run, run.bad_updates.records[-1]),
            helps="a smaller data.batch_size with a larger trainer.accumulate_grad_batches",
        )

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Find the gradient; of the batches of an accumulated step that is not within the step."""
        with self.updating() if self.automatic_optimization else nullcontext():
            super().backward(loss, *args, **kwargs)

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        """Move the schedule on, except after an update that was skipped."""
        if not self.bad_updates.last_was_skipped:
            super().lr_scheduler_step(scheduler, metric)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add of which stage it is, by which optimizer, and how many updates were skipped."""
        checkpoint["stage"] = self.stage
        checkpoint["optimizer"] = self.optimizer
        checkpoint["bad_updates"] = self.bad_updates.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on from what `on_save_checkpoint` added.

        Raises `NotResumable` where it is of another stage, of another version, or to train on, of another optimizer.
        """
        if "stage" not in checkpoint or checkpoint["stage"] != self.stage:
            found = f"of stage {checkpoint['stage']}" if "stage" in checkpoint else "not of this version of the package"
            raise NotResumable(
                f"ckpt_path: the checkpoint is {found}, and {type(self).__name__} goes on from one of stage "
                f"{self.stage} only; to start from what another run trained, pass its exported folder as "
                "network.pretrained, and ckpt_path=null"
            )
        trains = self._trainer is not None and self._trainer.state.fn == TrainerFn.FITTING
        wrote = checkpoint.get("optimizer", self.optimizer)
        if trains and not has_same_state(wrote, self.optimizer):
            raise NotResumable(
                f"ckpt_path: the checkpoint was written with optimizer={wrote}, from whose state {self.optimizer} "
                f"cannot go on; pass module.optimizer={wrote}, in Python optimizer={wrote!r}"
            )
        self.bad_updates.load_state_dict(checkpoint["bad_updates"])

    def replay(self, file: str | Path) -> list[str]:
        """Repeat an update from the file that it left behind when it was skipped; return what is not finite, by lines.

        Nothing is changed but gradients. The Trainer must have started to train. Raises `InputError` where the file is
        not one of this stage.
        """
        return replay.replay(self, file)

    def repeat_update(self, records: list[Any]) -> None:
        """Find loss and gradient of an update that is made from these records; the losses are in ``bad_updates``."""
        for record in records:
            loss = self.training_step(record, 0)
            assert isinstance(loss, Tensor)
            self.on_before_backward(loss)
            loss.backward()

    def save_pretrained(self, folder: str | Path, *, export: Export = "merged") -> None:
        """Write the folder that the next stage can load: whole for `transformers` alone, or the adapter for `peft`.

        Where the weights lie in parts on several processes, all of them must call, and the first one writes.
        """
        state = gathered_state(self, self.network)
        if state is None:
            save_pretrained(self.network, self.required_tokenizer, folder, export=export)
        elif state:
            save_pretrained(self.network, self.required_tokenizer, folder, export=export, state=state)
        if state is not None:
            # Nobody reads the folder before it is there.
            distributed.barrier()

    def on_validation_start(self) -> None:
        """Keep metrics in float32, which bf16-true turns into bfloat16 with the weights."""
        for part in self.modules():
            if isinstance(part, Metric):
                part.set_dtype(torch.float32)

    def check_export(self, export: Export) -> None:
        """Raise `InputError` where the network cannot be exported like that."""
        check_export(self.network, export)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Return what training changes: frozen networks and the weights below adapters come from their folders."""
        state: dict[str, Any] = super().state_dict(*args, **kwargs)
        return {name: state[name] for name in self.changed_by_training(state)}

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """Load what `state_dict` returned; raises `NotResumable` where a weight is missing, unknown or misshapen."""
        try:
            keys = super().load_state_dict(state_dict, strict=False, assign=assign)
        except RuntimeError as error:
            raise self._does_not_fit(str(error).splitlines()[1].strip()) from error
        missing = self.changed_by_training(keys.missing_keys)
        if missing or keys.unexpected_keys:
            raise self._does_not_fit(f"missing {_first(missing)}, unexpected {_first(keys.unexpected_keys)}")
        return keys

    def _does_not_fit(self, reason: str) -> NotResumable:
        return NotResumable(
            f"ckpt_path: the checkpoint does not fit {type(self).__name__}: {reason}; pass the settings of the run "
            "that wrote it (network, network.lora, module)"
        )

    def changed_by_training(self, names: Iterable[str]) -> list[str]:
        """Return those of the state's names that training changes: of a network with an adapter that, and its head."""
        changed = [name for name in names if not name.startswith(self.never_changed)]
        if not has_adapter(self.network):
            return changed
        heads = [path for path, m in self.named_modules() if isinstance(m, nn.Linear) and m.out_features == 1]
        ends = tuple(f"{path}.{name}" for path in heads for name in ("weight", "bias"))
        return [name for name in changed if ".lora_" in name or name.endswith(ends)]

    def check_tokenizer(self, data: object) -> None:
        """Raise `InputError` where the ids of a DataModule mean something else to the network, or its padding does."""
        own, other = self.tokenizer, _tokenizer_of(data)
        if own is None or other is None:
            return
        if not same_tokenizer(own, other) or own.pad_token_id != other.pad_token_id:
            ours, theirs = (f"{len(t)} tokens, pad {t.pad_token!r}, end {t.eos_token!r}" for t in (own, other))
            raise InputError(
                f"the tokenizer of {type(data).__name__} ({theirs}) is not that of {type(self).__name__} ({ours}): the "
                "network would read other tokens than were written; leave the DataModule's tokenizer=... out: it then "
                "takes the module's"
            )

    def check_batch(self, batch: object) -> None:
        """Raise `InputError` where a batch is not of the kind that the stage reads."""
        if not isinstance(batch, self.reads):
            raise InputError(
                f"{type(self).__name__} reads batches of the type {self.reads.__name__}, as {self.stage} data are "
                f"(data={self.stage}, in Python {DATA_MODULES[self.stage]}); the data given make {type(batch).__name__}"
            )

    def on_validation_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Look at the batch before anything reads it."""
        self.check_batch(batch)

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


def _tokenizer_of(data: object) -> "PreTrainedTokenizerBase | None":
    # Not every DataModule has one.
    return getattr(data, "tokenizer", None)


def _first(names: list[str]) -> str:
    more = len(names) - 3
    return f"{names[:3]}" + (f" and {more} more" if more > 0 else "")


def pass_records_by(plugin: Precision) -> None:
    """Keep a precision plugin from converting our batches: Lightning raises for frozen records (FSDP, bf16-true).

    Nothing is lost: tokens and masks have no precision, and the networks' own inputs are their embeddings.
    """
    convert = plugin.convert_input

    def convert_others(data: Any) -> Any:
        return data if isinstance(data, Record) else convert(data)

    plugin.convert_input = convert_others  # type: ignore[method-assign]


def sft_predictions(network: nn.Module, batch: SFTBatch, packed: Packed | None = None) -> Predictions:
    """Return what predicts the tokens that count, read in the rows of ``packed`` where they are given."""
    if packed is None:
        return predictions(network, batch.tokens, batch.attention_mask, batch.loss_mask)
    with reading(network, packed) as told:
        return predictions(network, packed.tokens, counted=packed.arranged(batch.loss_mask), **told)


def optimizer_with_schedule(
    module: LightningModule,
    *,
    optimizer: SupervisedOptimizerName,
    learning_rate: float,
    weight_decay: float,
    schedule: Schedule,
    warmup_steps: int,
    warmup_from: float,
    floor: float,
) -> Any:
    """Return Lightning's dictionary of the optimizer of what is trained and a schedule that moves every step of it."""
    weights, special = trained_weights(module), embeddings_and_heads(module)
    settings = {"lr": learning_rate, "weight_decay": weight_decay}
    if optimizer == "muon":
        matrices, others = by_kind(weights, special)
        adam = adamw([{"params": others}], optimizer="adamw", in_32_bits=[], **settings)
        made: torch.optim.Optimizer = MuonWithAdamW(matrices, adam, **settings)
    else:
        made = adamw([{"params": weights}], optimizer=optimizer, in_32_bits=special, **settings)
    total = module.trainer.estimated_stepping_batches

    def factor(step: int) -> float:
        return learning_rate_factor(
            step, total, schedule=schedule, warmup_steps=warmup_steps, warmup_from=warmup_from, floor=floor
        )

    return {"optimizer": made, "lr_scheduler": {"scheduler": LambdaLR(made, factor), "interval": "step"}}


def check_optimization(
    *,
    learning_rate: float,
    weight_decay: float,
    lr_schedule: str,
    lr_floor: float,
    warmup_steps: int,
    warmup_from: float,
    optimizer: str,
) -> None:
    """Raise `InputError` where a setting of optimizer or schedule is out of its range."""
    check_choice("lr_schedule", lr_schedule, get_args(Schedule))
    check_choice("optimizer", optimizer, get_args(SupervisedOptimizerName))
    check_number("lr_floor", lr_floor)
    if not 0 <= lr_floor <= 1:
        raise InputError(f"lr_floor={lr_floor} must lie in [0, 1]")
    for name, value in {"learning_rate": learning_rate, "weight_decay": weight_decay}.items():
        check_not_negative(name, value)
    if isinstance(warmup_steps, bool) or not isinstance(warmup_steps, int) or warmup_steps < 0:
        raise InputError(f"warmup_steps={warmup_steps} must be a whole number, 0 or more")
    check_number("warmup_from", warmup_from)
    if not 0 <= warmup_from < 1:
        raise InputError(f"warmup_from={warmup_from} must lie in [0, 1)")


def idle_settings(
    settings: Mapping[str, Any], constructor: Callable[..., Any], **counts_with: tuple[str, bool]
) -> list[str]:
    """Return what is not as the constructor has it, and for nothing, since other settings turn it off.

    ``counts_with`` says of a setting what it counts with, and whether that is so; of the schedule's it is known.
    """
    defaults = signature(constructor).parameters
    counts_with |= {
        "lr_floor": ("lr_schedule=linear or cosine", settings["lr_schedule"] != "constant"),
        "warmup_from": ("warmup_steps above 0", settings["warmup_steps"] > 0),
    }
    return [
        f"{name}={settings[name]} counts only with {what}"
        for name, (what, counts) in counts_with.items()
        if not counts and settings[name] != defaults[name].default
    ]


def adamw(
    groups: list[dict[str, Any]], *, optimizer: OptimizerName, in_32_bits: list[nn.Parameter], **settings: Any
) -> torch.optim.Optimizer:
    """Return AdamW; with 8 bits the moments of the weights ``in_32_bits`` stay so.

    The 32-bit one works in one kernel, where a loop over the weights takes several times longer.
    """
    if optimizer != "adamw":
        from rlhf_lightning.modules.eight_bit import AdamW8bit

        return AdamW8bit(groups, in_32_bits, is_paged=optimizer == "paged_adamw_8bit", **settings)
    is_known = all(p.device.type in ("cpu", "cuda") for group in groups for p in group["params"])
    adam = torch.optim.AdamW(groups, fused=is_known or None, **settings)
    # Gradients of 16-mixed are unscaled before the step: Lightning cannot clip those that the step unscales, and does
    # not clip in bf16-mixed, either, where the optimizer says that it could.
    adam._step_supports_amp_scaling = False
    return adam


def trained_weights(module: nn.Module) -> list[nn.Parameter]:
    """Return the weights that are trained, each once."""
    return [weight for weight in module.parameters() if weight.requires_grad]


def without_dropout_on_purpose() -> None:
    """Silence Lightning's warning about networks in evaluation mode, for the stages that mean it."""
    warnings.filterwarnings("ignore", message=".*in eval mode at the start of training.*")
