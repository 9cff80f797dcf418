"""What a reward says of a fine-tuned policy's own responses while it trains, to keep the best of its checkpoints."""

from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy

from rlhf_lightning.data import PPODataModule, SFTDataModule
from rlhf_lightning.data.formats import Exchange, demonstration
from rlhf_lightning.data.reading import Row
from rlhf_lightning.errors import InputError
from rlhf_lightning.evaluation.policies import answer
from rlhf_lightning.modules import SFTModule
from rlhf_lightning.networks.sharding import gathered
from rlhf_lightning.rollout.reward import Reward, RewardSetting, load_reward
from rlhf_lightning.types import PromptBatch


class ValidationReward(Callback):
    """Logs ``sft/val_reward``, the mean reward of what the policy samples to the first validation prompts.

    For ``ModelCheckpoint(monitor="sft/val_reward", mode="max")``: the loss of fine-tuning rises again long before the
    responses stop getting better, so Ouyang et al. (2022, sec. 3.5) choose by the reward model. Prompts and noise are
    the same in each validation, and training does not change by it. Modules of other stages are left alone.
    """

    def __init__(
        self,
        reward: RewardSetting,
        *,
        max_new_tokens: int = 64,
        num_prompts: int = 64,
        batch_size: int = 32,
        temperature: float = 1.0,
        seed: int = 0,
    ) -> None:
        """Take the reward, as `load_reward` does; raises `InputError` where a number is below 1."""
        numbers = {"max_new_tokens": max_new_tokens, "num_prompts": num_prompts, "batch_size": batch_size}
        for name, number in numbers.items():
            if number < 1:
                raise InputError(f"{name}={number} must be at least 1")
        self.reward = reward
        self.max_new_tokens = max_new_tokens
        self.num_prompts = num_prompts
        self.batch_size = batch_size
        self.temperature = temperature
        self.seed = seed
        self._loaded: Reward | None = None
        self._prompts: list[PromptBatch] = []

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Load the reward and read the prompts, before the first training step where Lightning checks its sanity.

        Raises `InputError` under a strategy that gathers weights in the Trainer's own steps alone.
        """
        if isinstance(trainer.strategy, FSDPStrategy | DeepSpeedStrategy):
            raise InputError(
                f"ValidationReward samples outside of the Trainer's steps, which {type(trainer.strategy).__name__} "
                "cannot; use trainer=fsdp2 or trainer=ddp"
            )
        if self._loaded is None and isinstance(pl_module, SFTModule):
            self._prompts = self._read_prompts(trainer, pl_module)
            self._loaded = load_reward(self.reward, pl_module.required_tokenizer).to(pl_module.device)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Sample, score and log the mean over all processes."""
        if trainer.sanity_checking or not isinstance(pl_module, SFTModule):
            return
        # Processes may have different numbers of batches.
        with gathered(pl_module.policy):
            scores = answer(
                pl_module.policy,
                pl_module.required_tokenizer,
                self._prompts,
                max_new_tokens=self.max_new_tokens,
                temperature=self.temperature,
                seed=self.seed,
                reward=self._loaded,
            ).scores
        assert scores is not None
        found = torch.tensor([sum(scores), float(len(scores))], device=pl_module.device)
        total, count = pl_module.sum_over_ranks(found)
        pl_module.log("sft/val_reward", total / count, prog_bar=True, sync_dist=True)

    def _read_prompts(self, trainer: Trainer, module: SFTModule) -> list[PromptBatch]:
        """Return this process's share of the first ``num_prompts`` validation prompts."""
        # Lightning sets the attribute when the Trainer is given a DataModule; plain loaders have none.
        data: Any = getattr(trainer, "datamodule", None)
        if not isinstance(data, SFTDataModule):
            raise InputError("ValidationReward takes its prompts from the validation rows of an SFTDataModule")
        rows = [_question(row) for row in data.val_rows[: self.num_prompts]]
        share = rows[trainer.global_rank :: trainer.world_size]
        if not share:
            return []
        positions = module.max_positions
        prompts = PPODataModule(
            share,
            val_path=share,
            batch_size=self.batch_size,
            tokenizer=module.required_tokenizer,
            prompt_template=data.prompt_template,
            max_prompt_length=None if positions is None else positions - self.max_new_tokens,
        )
        prompts.setup("validate")
        return list(prompts.val_dataloader())


def _question(row: Row) -> dict[str, Any]:
    """Return the row with its prompt, a conversation's being all but its last turn."""
    example = demonstration(row)
    if not isinstance(example, Exchange):
        raise InputError(f"{row.origin}: ValidationReward needs a prompt to respond to; the row is a text")
    return {**row.fields, "prompt": example.prompt}
