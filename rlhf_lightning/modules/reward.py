"""The reward model: from comparisons to one score per response."""

import logging
from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torchmetrics import MeanMetric
from torchmetrics.classification import BinaryCalibrationError

from rlhf_lightning.errors import InputError, check_choice, check_not_negative, check_seed
from rlhf_lightning.functional.head_logprobs import head_logprobs
from rlhf_lightning.functional.losses import k_wise_loss, pairwise_logistic_loss, ranked_pairs, ranking_loss
from rlhf_lightning.functional.masking import last_index
from rlhf_lightning.functional.schedules import Schedule
from rlhf_lightning.modules.hardware import SupervisedOptimizerName
from rlhf_lightning.modules.language import (
    LanguageModule,
    check_optimization,
    idle_settings,
    optimizer_with_schedule,
    without_dropout_on_purpose,
)
from rlhf_lightning.modules.sharding import callable_outside_of_steps, shards_weights, writable
from rlhf_lightning.networks import Model, load_reward_model
from rlhf_lightning.networks.by_sequence import attends_by_sequence
from rlhf_lightning.networks.flops import Flops, Reading, flops_of
from rlhf_lightning.networks.packing import (
    Packed,
    check_moved,
    largest_move,
    last_hidden_state,
    pack,
    pack_for,
    shortest_two,
    takes_lengths,
)
from rlhf_lightning.networks.scalar_head import HeadInit, HiddenMoments, scalar_head, shift_scores
from rlhf_lightning.networks.scores import scores_and_states, sequence_scores
from rlhf_lightning.networks.shared_prompts import share_prompts
from rlhf_lightning.networks.unpadded import reading_padding
from rlhf_lightning.types import ComparisonBatch, Work

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

BATCHES_AT_ONCE = 8
"""Of how many batches the best responses are read at once, the same number on all processes: small batches are slow."""

RankingLoss = Literal["pairwise", "k_wise"]
"""Whether a ranking counts as its pairs, or as a whole; of two responses it is the same."""


class RewardModule(LanguageModule):
    """Trains a sequence classifier with one label by the pairwise logistic loss (Ouyang et al. 2022, eq. 1).

    With ``margin_coef`` it is -log sigmoid(r_c - r_r - margin_coef * margin) (Touvron et al. 2023, Llama 2, eq. 2).
    Ties are no pairs, and each response is read once, however many pairs it is in. After training the scores are
    shifted so that the best responses of the training data average 0 (Stiennon et al. 2020, sec. 3.4), and the shift is
    part of the weights.
    """

    stage = "reward"
    reads = ComparisonBatch
    update_is_made_from = ComparisonBatch

    def __init__(
        self,
        model: Model,
        *,
        tokenizer: "PreTrainedTokenizerBase | None" = None,
        head_init: HeadInit = "unit",
        learning_rate: float = 1e-5,
        weight_decay: float = 0.0,
        lr_schedule: Schedule = "cosine",
        lr_floor: float = 0.0,
        warmup_steps: int = 0,
        warmup_from: float = 0.0,
        optimizer: SupervisedOptimizerName = "adamw",
        shift_scores: bool = True,
        ranking_loss: RankingLoss = "pairwise",
        margin_coef: float = 0.0,
        lm_coef: float = 0.0,
        share_prompts: bool = False,
        packing: bool = False,
        max_bad_updates: int = 3,
        seed: int = 0,
    ) -> None:
        """Load the network; a language model gets a new scalar head, drawn with ``seed`` as `init_scalar_head` says.

        With ``ranking_loss`` "k_wise" the loss is that of whole rankings (`functional.losses.k_wise_loss`).
        With ``lm_coef`` the loss has that many times the next-token loss of the best responses beside it, which keeps
        what the network knew as a language model (Yang et al. 2024, SFT regularization): its output embeddings
        must be its input embeddings.
        With ``share_prompts`` training reads a prompt once for all of its responses, which stand behind it in one row
        without padding: the same scores in less time where responses are many and of different lengths. The network
        must be a decoder with a scalar head on its last state whose attention takes a mask of its own; that is looked
        at on the first batch.
        With ``packing`` training reads all sequences of a batch in rows with no padding between them, or with
        ``share_prompts`` all prompts with their responses.
        Raises `InputError` for a setting out of its range before anything is loaded, and where the network cannot do
        what a setting asks for.
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
        check_seed("seed", seed)
        check_choice("head_init", head_init, get_args(HeadInit))
        check_choice("ranking_loss", ranking_loss, get_args(RankingLoss))
        for name, value in {"lm_coef": lm_coef, "margin_coef": margin_coef}.items():
            check_not_negative(name, value)
        super().__init__(model, tokenizer, max_bad_updates=max_bad_updates)
        self.without_effect = idle_settings(locals(), RewardModule)
        # Without dropout: the scores that are compared belong to one function (Huang et al. 2024).
        generator = torch.Generator().manual_seed(seed)
        self.reward_model = load_reward_model(model, generator=generator, head_init=head_init).eval()
        without_dropout_on_purpose()
        if lm_coef and not self.reward_model.config.get_text_config().tie_word_embeddings:
            raise InputError(
                f"lm_coef={lm_coef} needs a network whose output embeddings are its input embeddings "
                f"(tie_word_embeddings); {type(self.reward_model).__name__} has no others to predict tokens with"
            )
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.lr_schedule = lr_schedule
        self.lr_floor = lr_floor
        self.warmup_steps = warmup_steps
        self.warmup_from = warmup_from
        self.optimizer = optimizer
        self.shift_scores = shift_scores
        self.ranking_loss = ranking_loss
        self.margin_coef = margin_coef
        self.lm_coef = lm_coef
        self.share_prompts = share_prompts
        self.packing = packing
        self._rows_are_checked = False
        if share_prompts and takes_lengths(self.reward_model):
            raise InputError(
                "share_prompts=True needs attention that takes a mask of its own, which FlashAttention does not; set "
                "packing=True in its place, or network.attn_implementation=sdpa"
            )
        self.val_loss = MeanMetric()
        self.val_accuracy = MeanMetric()
        self.val_margin = MeanMetric()
        self.val_calibration_error = BinaryCalibrationError(n_bins=20)

    @property
    def network(self) -> nn.Module:
        """The classifier."""
        network: nn.Module = self.reward_model
        return network

    def setup(self, stage: str) -> None:
        """Tell the network which token is padding: it scores the last one that is not.

        Raises `InputError` where a setting needs whole weights, and the strategy shards them.
        """
        super().setup(stage)
        for name in ("lm_coef", "share_prompts", "packing"):
            value = getattr(self, name)
            if value and shards_weights(self.trainer.strategy):
                raise InputError(
                    f"{name}={value} reads parts of the network outside of its forward, where sharded weights are not "
                    f"whole ({type(self.trainer.strategy).__name__}); use trainer=ddp, or leave {name} out"
                )
        self.reward_model.config.get_text_config().pad_token_id = self.required_tokenizer.pad_token_id

    def forward(self, tokens: Int[Tensor, "B T"], attention_mask: Bool[Tensor, "B T"]) -> Float[Tensor, " B"]:
        """Return the score at the last real token of sequences padded on the right, in float32."""
        return sequence_scores(self.reward_model, tokens, attention_mask, use_cache=False)

    def training_step(self, batch: ComparisonBatch, batch_idx: int) -> Tensor:
        """Return the mean over prompts of the mean loss over a prompt's pairs, and the next-token loss where asked.

        Weighted so that the processes' average is the mean over all prompts, as of all other means here.
        """
        with self.updating():
            scores, best_logprobs = self._read(batch, self._packed(batch))
        # A margin is a difference of ratings, as that of a pair is one of scores: it can be taken off one by one.
        of_rankings = k_wise_loss if self.ranking_loss == "k_wise" else ranking_loss
        loss = of_rankings(scores - self.margin_coef * batch.ratings, batch.prompt_index, batch.ranks)
        winners, losers = ranked_pairs(batch.prompt_index, batch.ranks)
        compared = len(batch.prompt_index[winners].unique())
        loss = self.share_of_mean(loss * compared, compared)
        accuracy = self.share_of_mean(wins(scores[winners] - scores[losers]).sum(), len(winners))
        metrics = {"reward/loss": loss, "reward/accuracy": accuracy}
        if self.lm_coef:
            metrics["reward/lm_loss"] = self.share_of_mean(-best_logprobs.sum(), len(best_logprobs))
            loss = loss + self.lm_coef * metrics["reward/lm_loss"]
        self.log_dict(metrics, prog_bar=True, sync_dist=True, batch_size=_prompts(batch))
        return loss

    def differentiated(self, batch: ComparisonBatch) -> Tensor:
        """Return the sum of all that the loss is made of, whose backward holds as much as that of the loss."""
        scores, best_logprobs = self._read(batch, self._packed(batch))
        return scores.sum() + best_logprobs.sum()

    @cached_property
    def flops(self) -> Flops | None:
        """The sizes that operations follow from; with ``lm_coef`` the embeddings are an output layer, too."""
        found = flops_of(self.reward_model)
        if found is None or not self.lm_coef:
            return found
        embeddings: Any = self.reward_model.get_input_embeddings()
        weight = embeddings.weight
        return replace(found, head=weight.numel(), trained_head=weight.numel() if weight.requires_grad else 0)

    def work(self, batch: ComparisonBatch) -> Work:
        """Return how many tokens were read and trained on, prompts with each of their responses, and the operations."""
        predicted = self._predicting(batch)
        read = Reading.of(batch.attention_mask, predicted, ends_are_read=True)
        return Work(read.tokens, None if self.flops is None else self.flops.training(read))

    def on_train_batch_start(self, batch: ComparisonBatch, batch_idx: int) -> None:
        """Look once whether reading several sequences in one row changes scores."""
        super().on_train_batch_start(batch, batch_idx)
        if (self.share_prompts or self.packing) and not self._rows_are_checked:
            self._check_rows(batch)
            self._rows_are_checked = True

    def _packed(self, batch: ComparisonBatch) -> Packed | None:
        """Return the rows that a batch is read in, None where they are its own."""
        if self.share_prompts:
            rows = (batch.tokens, batch.attention_mask, batch.prompt_index)
            return share_prompts(*rows, packing=self.packing, in_one_row=attends_by_sequence(self.reward_model))
        return pack_for(self.reward_model, batch.tokens, batch.attention_mask) if self.packing else None

    def _read(self, batch: ComparisonBatch, packed: Packed | None) -> tuple[Float[Tensor, " B"], Float[Tensor, " N"]]:
        """Return the score of each row, and of the best rows the log-probability of each response token, if needed."""
        if packed is None:
            return self._read_alone(batch)
        last = last_index(batch.attention_mask).unsqueeze(1)
        read = self._predicting(batch).scatter(1, last, True)
        states = last_hidden_state(self.reward_model.base_model, packed, read=read)
        ends = states[packed.rows, packed.columns.gather(1, last)].squeeze(1)
        found = scalar_head(self.reward_model)(ends).squeeze(-1).float()
        if not self.lm_coef:
            return found, found.new_empty(0)
        best = batch.ranks == 0
        return found, self._best_logprobs(states[packed.rows[best], packed.columns[best]], batch)

    def _predicting(self, batch: ComparisonBatch) -> Bool[Tensor, "B T"]:
        """Return which states predict a token of the next-token loss."""
        read = torch.zeros_like(batch.attention_mask)
        if self.lm_coef:
            read[:, :-1] = batch.response_mask[:, 1:] & (batch.ranks == 0).unsqueeze(1)
        return read

    def _read_alone(self, batch: ComparisonBatch) -> tuple[Float[Tensor, " B"], Float[Tensor, " N"]]:
        if not self.lm_coef:
            found = sequence_scores(self.reward_model, batch.tokens, batch.attention_mask, use_cache=False)
            return found, found.new_empty(0)
        read = self._predicting(batch)
        found, states = scores_and_states(self.reward_model, batch.tokens, batch.attention_mask, read=read)
        return found, self._best_logprobs(states[batch.ranks == 0], batch)

    @torch.no_grad()
    def _check_rows(self, batch: ComparisonBatch) -> None:
        if self.share_prompts:
            setting, packed = "share_prompts", self._packed(batch)
        else:
            batch = batch.rows(shortest_two(batch.attention_mask))
            setting, packed = "packing", pack(batch.tokens, batch.attention_mask, in_one_row=True)
        with self.trainer.precision_plugin.forward_context(), reading_padding():
            apart = (self._read(batch, packed)[0] - self(batch.tokens, batch.attention_mask)).abs().max()
            largest = largest_move(self.reward_model)
        check_moved(setting, "scores", apart, largest, self.reward_model)

    def _best_logprobs(self, hidden: Float[Tensor, "N T H"], batch: ComparisonBatch) -> Float[Tensor, " L"]:
        """Return the log-probabilities of all response tokens of the best rows, whose states ``hidden`` holds."""
        best = batch.ranks == 0
        # The token at t is predicted from the state at t - 1.
        predicted = batch.response_mask[best, 1:]
        embeddings: Any = self.reward_model.get_input_embeddings()
        return head_logprobs(hidden[:, :-1][predicted], embeddings.weight, None, batch.tokens[best, 1:][predicted])

    def validation_step(self, batch: ComparisonBatch, batch_idx: int) -> None:
        """Measure loss, accuracy (ties count half), mean margin and calibration error over all pairs."""
        scores = self(batch.tokens, batch.attention_mask)
        winners, losers = ranked_pairs(batch.prompt_index, batch.ranks)
        margins = scores[winners] - scores[losers]
        self.val_loss.update(pairwise_logistic_loss(scores[winners], scores[losers]))
        self.val_accuracy.update(wins(margins))
        self.val_margin.update(margins)
        # Each pair also the other way around: then 20 bins from 0 to 1 say what 10 from 1/2 on do, and ties count half.
        both_ways, right = torch.cat([margins, -margins]), torch.ones_like(margins, dtype=torch.long)
        self.val_calibration_error.update(both_ways.sigmoid(), torch.cat([right, 1 - right]))
        metrics: Any = {
            "reward/val_loss": self.val_loss,
            "reward/val_accuracy": self.val_accuracy,
            "reward/val_margin": self.val_margin,
            "reward/val_calibration_error": self.val_calibration_error,
        }
        self.log_dict(metrics, on_epoch=True, prog_bar=True, batch_size=len(margins))

    def on_train_end(self) -> None:
        """Shift the scores so that the best responses of the training data average 0."""
        if self.shift_scores:
            self._center_on_chosen()

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

    @torch.no_grad()
    def _center_on_chosen(self) -> None:
        head = scalar_head(self.reward_model)
        chosen = HiddenMoments(head.in_features, self.device)
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for tokens, attention_mask in self._best_of_training_data():
            hidden, scores = self._last_hidden(tokens, attention_mask)
            chosen.update(hidden)
            total += scores.double().sum()
        chosen.sum_up(self.sum_over_ranks)
        shift = -float(self.sum_over_ranks(total) / chosen.count)
        with writable(self, head):
            spread = shift_scores(head, shift, mean=chosen.mean, covariance=chosen.covariance)
        log.info("scores shifted by %.3f (standard deviation of the change over the best %.3f)", shift, spread)

    def _best_of_training_data(self) -> Iterator[tuple[Int[Tensor, "N T"], Bool[Tensor, "N T"]]]:
        """Yield the best responses of several batches at a time, padded on the right, and where they are real."""
        batches: Iterator[ComparisonBatch] = iter(cast("Any", self.trainer.train_dataloader))
        while together := list(islice(batches, BATCHES_AT_ONCE)):
            rows = [
                tokens[real].to(self.device)
                for batch in together
                for tokens, real, rank in zip(batch.tokens, batch.attention_mask, batch.ranks, strict=True)
                if rank == 0
            ]
            padding = cast("int", self.required_tokenizer.pad_token_id)
            real = [torch.ones_like(row, dtype=torch.bool) for row in rows]
            yield pad_sequence(rows, batch_first=True, padding_value=padding), pad_sequence(real, batch_first=True)

    def _last_hidden(
        self, tokens: Int[Tensor, "B T"], attention_mask: Bool[Tensor, "B T"]
    ) -> tuple[Float[Tensor, "B H"], Float[Tensor, " B"]]:
        """Return what the scalar head reads of each sequence, and its score."""
        seen: list[Tensor] = []
        hook = scalar_head(self.reward_model).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        scores = callable_outside_of_steps(self)(tokens, attention_mask)
        hook.remove()
        # The first call may have been a look at the network (`plain_scalar_head`).
        hidden = seen[-1]
        if hidden.dim() == 3:
            hidden = hidden[torch.arange(len(hidden)), last_index(attention_mask)]
        return hidden, scores


def wins(margins: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
    """Return 1 where the chosen response scores higher, 1/2 for a tie, else 0."""
    return (margins > 0).float() + 0.5 * (margins == 0).float()


def _prompts(batch: ComparisonBatch) -> int:
    return int(batch.prompt_index.max()) + 1
