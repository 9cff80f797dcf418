"""What the batch sizes mean: how many sequences, steps and rollouts a run has, in one vocabulary."""

import math
from dataclasses import dataclass

from rlhf_lightning.preflight.findings import Finding


@dataclass(frozen=True)
class Size:
    """One number of a run, and what it comes from."""

    name: str
    number: float
    origin: str


@dataclass(frozen=True)
class PPOSizes:
    """The settings that say how large a rollout and its updates are; sizes are those of one process."""

    prompts: int
    samples_per_prompt: int
    minibatch_size: int
    micro_batch_size: int
    ppo_epochs: int
    rollouts: float
    """In the whole run; infinite where nothing ends it."""
    processes: int = 1
    micro_batch_tokens: int | None = None

    @property
    def sequences(self) -> int:
        """Sequences of a rollout."""
        return self.prompts * self.samples_per_prompt

    @property
    def minibatches(self) -> int:
        """Minibatches of one pass over a rollout."""
        return self.sequences // self.minibatch_size

    @property
    def steps(self) -> int:
        """Optimizer steps of a rollout."""
        return self.ppo_epochs * self.minibatches

    def table(self) -> list[Size]:
        """Return every number with its origin."""
        micro_batches = math.ceil(self.minibatch_size / self.micro_batch_size)
        budget = self.micro_batch_tokens
        more = "" if budget is None else f"; more where module.micro_batch_tokens={budget} are fewer sequences"
        return [
            Size("prompts of a rollout", self.prompts, "data.batch_size"),
            Size("samples per prompt", self.samples_per_prompt, "module.samples_per_prompt"),
            Size("sequences of a rollout", self.sequences, "prompts x samples per prompt"),
            Size("processes", self.processes, "trainer.devices x trainer.num_nodes"),
            Size("sequences of a rollout, all processes", self.sequences * self.processes, "sequences x processes"),
            Size("minibatches of a pass", self.minibatches, f"sequences / module.minibatch_size={self.minibatch_size}"),
            Size(
                "micro-batches of a minibatch",
                micro_batches,
                f"minibatch_size / module.micro_batch_size={self.micro_batch_size}, rounded up{more}",
            ),
            Size(
                "optimizer steps of a rollout", self.steps, f"minibatches x module.ppo_epochs={self.ppo_epochs} passes"
            ),
            Size("rollouts", self.rollouts, "trainer.max_steps, or trainer.max_epochs x rows / data.batch_size"),
            Size(
                "optimizer steps in total: the learning rate's schedule",
                self.rollouts * self.steps,
                "rollouts x optimizer steps of a rollout",
            ),
        ]


def check_ppo_sizes(sizes: PPOSizes) -> Finding:
    """Check that a rollout can be cut into minibatches."""
    name = "batch sizes"
    if sizes.sequences % sizes.minibatch_size:
        return Finding(
            name,
            "error",
            f"a rollout of {sizes.sequences} sequences cannot be cut into minibatches of {sizes.minibatch_size}",
            "module.minibatch_size must divide data.batch_size x samples per prompt",
        )
    measured = (
        f"{sizes.sequences} sequences a rollout, {sizes.minibatches} minibatch(es) x {sizes.ppo_epochs} passes = "
        f"{sizes.steps} optimizer steps; {number(sizes.rollouts)} rollouts, "
        f"{number(sizes.rollouts * sizes.steps)} optimizer steps in total"
    )
    if sizes.rollouts < 1:
        return Finding(name, "error", measured, "there are fewer rows than data.batch_size: lower it, or add rows")
    if sizes.minibatch_size % sizes.micro_batch_size and sizes.minibatch_size > sizes.micro_batch_size:
        return Finding(
            name,
            "note",
            f"{measured}; the last micro-batch of each minibatch has "
            f"{sizes.minibatch_size % sizes.micro_batch_size} of {sizes.micro_batch_size} sequences",
            "nothing has to change: a micro_batch_size that divides minibatch_size takes fewer forwards",
        )
    return Finding(name, "ok", measured)


def supervised_table(*, rows: int, batch_size: int, accumulate: int, steps: float, processes: int) -> list[Size]:
    """Return the numbers of a run of fine-tuning or of a reward model."""
    return [
        Size("rows", rows, "data.path, without validation and dropped rows"),
        Size("rows of a batch", batch_size, "data.batch_size"),
        Size("processes", processes, "trainer.devices x trainer.num_nodes"),
        Size("batches of an optimizer step", accumulate, "trainer.accumulate_grad_batches"),
        Size("rows of an optimizer step", batch_size * accumulate * processes, "their product"),
        Size(
            "optimizer steps in total: the learning rate's schedule",
            steps,
            "trainer.max_steps, or trainer.max_epochs x rows / rows of an optimizer step",
        ),
    ]


def check_supervised_sizes(table: list[Size]) -> Finding:
    """Check that there is at least one optimizer step."""
    name = "batch sizes"
    numbers = {size.name: size.number for size in table}
    steps = numbers["optimizer steps in total: the learning rate's schedule"]
    measured = f"{number(numbers['rows of an optimizer step'])} rows a step, {number(steps)} optimizer steps in total"
    if steps < 1:
        return Finding(name, "error", measured, "add rows, or set trainer.max_epochs or trainer.max_steps")
    return Finding(name, "ok", measured)


def planned_steps(
    *, batches: float, batches_a_step: int, max_epochs: int | None, max_steps: int, limit: float | int | None
) -> float:
    """Return how many steps a Trainer makes of so many batches an epoch; ``limit`` is its limit_train_batches."""
    if isinstance(limit, int):
        batches = min(batches, limit)
    elif limit is not None:
        batches = math.floor(batches * limit)
    epochs = math.inf if max_epochs in (None, -1) else float(max_epochs or 0)
    steps = math.ceil(batches / batches_a_step) * epochs if batches else 0
    return steps if max_steps == -1 else min(steps, max_steps)


def number(x: float) -> str:
    """Return a count in words."""
    return "endless" if math.isinf(x) else f"{x:,.0f}"
