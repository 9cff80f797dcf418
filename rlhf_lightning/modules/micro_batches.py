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
    device, prompt, new = run.device, batch.prompt_tokens.shape[1], run.max_new_tokens
    trained = {"policy": run.policy} | ({} if run.critic is None else {"critic": run.critic})
    moments = sum(role.optimizer for role in roles_memory(trained, device, optimizer=run.optimizer).values())

    def needed(size: int) -> int | None:
        run.micro_batch_size = size
        sequences = len(batch) * run.samples_per_prompt
        return ppo_memory(run, device, sequences=sequences, prompt_length=prompt).needed

    def trial(size: int) -> None:
        experience = blank_experience(device, rows=size, length=prompt + new, new=new)
        # The second has the gradients of the first beside it, as all but the first of a step.
        times = 2 if size < run.minibatch_size else 1

        def work() -> None:
            for _ in range(times):
                forward_and_backward(run.passes, experience)

        with run.trainer.precision_plugin.train_step_context():
            with_room_for(moments, trained.values(), work, device)

    size = largest_by_estimate(needed, most=run.minibatch_size, free=free_bytes(device))
    # The smallest on any process.
    size = -largest_on_any_process(-size, device)
    return largest_by_trial(trial, most=size, device=device)
