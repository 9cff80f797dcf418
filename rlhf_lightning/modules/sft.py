"""Fine-tuning on demonstrations, and pre-training on raw text: next-token prediction."""

from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy
from torchmetrics.text import Perplexity

from rlhf_lightning.errors import InputError, check_number
from rlhf_lightning.functional.schedules import Schedule
from rlhf_lightning.modules.hardware import SupervisedOptimizerName
from rlhf_lightning.modules.language import (
    LanguageModule,
    check_optimization,
    idle_settings,
    optimizer_with_schedule,
    sft_predictions,
)
from rlhf_lightning.networks import Model, load_policy, stop_token_ids
from rlhf_lightning.networks.flops import Flops, Reading, flops_of
from rlhf_lightning.networks.packing import check_moved, largest_move, pack, pack_for, shortest_two
from rlhf_lightning.networks.unpadded import reading_padding
from rlhf_lightning.preflight.findings import untouched
from rlhf_lightning.types import SFTBatch, Work

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class SFTModule(LanguageModule):
    """Trains a language model by next-token cross-entropy on the tokens that count (Ouyang et al. 2022, sec. 3.5).

    Which tokens count is the DataModule's matter: those of the response with its end token, or all of a raw text. The
    loss is their mean over all processes.
    """

    stage = "sft"
    reads = SFTBatch
    update_is_made_from = SFTBatch

    def __init__(
        self,
        model: Model,
        *,
        tokenizer: "PreTrainedTokenizerBase | None" = None,
        learning_rate: float = 1e-5,
        weight_decay: float = 0.0,
        lr_schedule: Schedule = "cosine",
        lr_floor: float = 0.0,
        warmup_steps: int = 0,
        warmup_from: float = 0.0,
        optimizer: SupervisedOptimizerName = "adamw",
        dropout: float | None = None,
        packing: bool = False,
        max_bad_updates: int = 3,
    ) -> None:
        """Load the language model; ``dropout`` replaces that of all of its dropout layers.

        With ``packing`` training reads the sequences of a batch in rows with no padding between them, each from its own
        position 0: the same loss. Whether the network keeps them apart is looked at on the first batch.
        Raises `InputError` where ``model`` is no language model or has no such layers, and, before anything is loaded,
        for a setting out of its range.
        """
        check_optimization(
            learning_rate=learning_rate,
            weight_decay=weight_decay,
            lr_schedule=lr_schedule,
            lr_floor=lr_floor,
            warmup_steps=warmup_steps,
            warmup_from=warmup_from,
            optimizer=optimizer,
        )
        if dropout is not None:
            check_number("dropout", dropout)
        if dropout is not None and not 0 <= dropout < 1:
            raise InputError(f"dropout={dropout} must lie in [0, 1), or be None for the network's own")
        super().__init__(model, tokenizer, max_bad_updates=max_bad_updates)
        self.without_effect = idle_settings(locals(), SFTModule)
        # from_pretrained returns a network in evaluation mode, which Lightning keeps: its dropout would stay off.
        self.policy = load_policy(model).train()
        if dropout is not None:
            set_dropout(self.policy, dropout)
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.lr_schedule = lr_schedule
        self.lr_floor = lr_floor
        self.warmup_steps = warmup_steps
        self.warmup_from = warmup_from
        self.optimizer = optimizer
        self.packing = packing
        self._packing_is_checked = False
        self.val_loss = MeanMetric()
        self.val_perplexity = Perplexity()
        self.val_token_accuracy = MulticlassAccuracy(self.policy.config.get_text_config().vocab_size, average="micro")

    @property
    def network(self) -> nn.Module:
        """The language model."""
        network: nn.Module = self.policy
        return network

    @property
    def stop_token_ids(self) -> list[int]:
        """The ids that end a response."""
        return stop_token_ids(self.policy, self.required_tokenizer)

    def forward(self, batch: SFTBatch) -> tuple[Tensor, Tensor]:
        """Return the logits (N, V) in float32 that predict the N tokens that count, and these tokens (N,)."""
        predicted = sft_predictions(self.policy, batch)
        return predicted.logits(), predicted.tokens

    def training_step(self, batch: SFTBatch, batch_idx: int) -> Tensor:
        """Return the loss in nats per token, weighted so that the processes' average is the mean over all tokens."""
        with self.updating():
            if self.packing and not self._packing_is_checked:
                self._check_packing(batch)
            total = self.differentiated(batch)
        loss = self.share_of_mean(total, int(batch.loss_mask[:, 1:].sum()))
        self.log("sft/loss", loss, prog_bar=True, sync_dist=True, batch_size=len(batch))
        return loss

    def differentiated(self, batch: SFTBatch) -> Tensor:
        """Return the sum of the losses of all tokens that count: what the gradient is found of, but for a factor."""
        packed = pack_for(self.policy, batch.tokens, batch.attention_mask) if self.packing else None
        return -sft_predictions(self.policy, batch, packed).total_logprob()

    def _check_packing(self, batch: SFTBatch) -> None:
        """Raise `InputError` where the second of two sequences is read otherwise if the first stands before it."""
        pair = batch.rows(shortest_two(batch.attention_mask))
        second = pair.attention_mask.clone()
        second[0], second[:, 0] = False, False
        if not second.any():
            return
        self._packing_is_checked = True
        pair = replace(pair, loss_mask=second)
        packed = pack(pair.tokens, pair.attention_mask, in_one_row=True)
        with untouched(self.policy.modules(), self.device):
            self.policy.eval()
            # Without padding they would be read one behind the other this time, too.
            with reading_padding():
                alone = sft_predictions(self.policy, pair, None).logprobs()
            together = sft_predictions(self.policy, pair, packed).logprobs()
            largest = largest_move(self.policy)
        check_moved("packing", "log-probabilities", (together - alone).abs().mean(), largest, self.policy)

    @cached_property
    def flops(self) -> Flops | None:
        """The sizes that operations follow from; None where they do not."""
        return flops_of(self.policy)

    def work(self, batch: SFTBatch) -> Work:
        """Return how many tokens were read and trained on, and the operations that this takes."""
        read = Reading.of(batch.attention_mask, batch.loss_mask)
        return Work(read.tokens, None if self.flops is None else self.flops.training(read))

    def validation_step(self, batch: SFTBatch, batch_idx: int) -> None:
        """Measure loss, perplexity and token accuracy over the tokens that count."""
        logits, targets = self(batch)
        self.val_loss.update(cross_entropy(logits, targets, reduction="none"))
        self.val_perplexity.update(logits.unsqueeze(0), targets.unsqueeze(0))
        self.val_token_accuracy.update(logits, targets)
        metrics: Any = {
            "sft/val_loss": self.val_loss,
            "sft/val_perplexity": self.val_perplexity,
            "sft/val_token_accuracy": self.val_token_accuracy,
        }
        self.log_dict(metrics, on_epoch=True, prog_bar=True, batch_size=len(batch))

    def configure_optimizers(self) -> Any:
        """Return the optimizer with the schedule."""
        return optimizer_with_schedule(
            self,
            optimizer=self.optimizer,
            learning_rate=self.learning_rate,
            weight_decay=self.weight_decay,
            schedule=self.lr_schedule,
            warmup_steps=self.warmup_steps,
            warmup_from=self.warmup_from,
            floor=self.lr_floor,
        )


def set_dropout(network: nn.Module, probability: float) -> None:
    """Set the probability of every dropout layer; raises `InputError` where the network has none."""
    # That of an adapter is network.lora.dropout.
    named = network.named_modules()
    layers = [layer for name, layer in named if isinstance(layer, nn.Dropout) and ".lora_dropout" not in name]
    if not layers:
        raise InputError(
            f"dropout={probability}: {type(network).__name__} has no dropout layers; leave dropout at None (null)"
        )
    for layer in layers:
        layer.p = probability
