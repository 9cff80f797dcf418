"""`micro_batch_size=auto` of PPO: the largest micro-batch that fits."""

from typing import TYPE_CHECKING

from rlhf_lightning.networks.sharding import largest_on_any_process
from rlhf_lightning.preflight.fitting import largest_by_estimate, largest_by_trial, with_room_for
from rlhf_lightning.preflight.memory import free_bytes
from rlhf_lightning.preflight.phases import blank_experience, forward_and_backward, ppo_memory, roles_memory
from rlhf_lightning.types import PromptBatch

if TYPE_CHECKING:
    from rlhf_lightning.modules.ppo import PPOModule


def largest_micro_batch(run: "PPOModule", batch: PromptBatch) -> int:
    """Return the largest of the minibatch's halvings with which an update fits on every process.

    The estimate says where to begin; a forward and backward of the longest rows, with nothing to learn, says whether
    it is right. It changes nothing but the run's ``micro_batch_size``.
    """
    device, length = run.device, batch.prompt_tokens.shape[1] + run.max_new_tokens
    trained = {"policy": run.policy} | ({} if run.critic is None else {"critic": run.critic})
    moments = sum(role.optimizer for role in roles_memory(trained, device, optimizer=run.optimizer).values())

    def trial(size: int) -> None:
        experience = blank_experience(device, rows=size, length=length, new=run.max_new_tokens)
        # The second has the gradients of the first beside it, as all but the first of a step.
        times = 2 if size < run.minibatch_size else 1

        def work() -> None:
            for _ in range(times):
                forward_and_backward(run.passes, experience)

        with run.trainer.precision_plugin.train_step_context():
            with_room_for(moments, trained.values(), work, device)

    # The smallest on any process.
    size = -largest_on_any_process(-estimated_micro_batch(run, batch), device)
    return largest_by_trial(trial, most=size, device=device)


def estimated_micro_batch(run: "PPOModule", batch: PromptBatch) -> int:
    """Return the largest of the minibatch's halvings that fits on the batch's device by the estimate."""
    device = batch.prompt_tokens.device

    def needed(size: int) -> int | None:
        run.micro_batch_size = size
        sequences = len(batch) * run.samples_per_prompt
        return ppo_memory(run, device, sequences=sequences, prompt_length=batch.prompt_tokens.shape[1]).needed

    return largest_by_estimate(needed, most=run.minibatch_size, free=free_bytes(device))
