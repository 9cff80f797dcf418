"""`rlhf preflight`: what is wrong with a run, known in seconds, and what its numbers mean."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from math import ceil
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig
from rich.markup import escape

from rlhf_lightning.cli.build import build
from rlhf_lightning.cli.checks import check, plain
from rlhf_lightning.cli.console import quieten_libraries
from rlhf_lightning.cli.rehearsal import bare_trainer
from rlhf_lightning.cli.train import ROOT_KEYS as ROOT_KEYS_OF_TRAIN
from rlhf_lightning.errors import InputError

if TYPE_CHECKING:
    from lightning import Trainer

    from rlhf_lightning.data import Row
    from rlhf_lightning.data.datamodule import TextDataModule
    from rlhf_lightning.preflight import Finding
    from rlhf_lightning.preflight.sizes import Size
    from rlhf_lightning.types import Message

ROOT_KEYS = ROOT_KEYS_OF_TRAIN
FIRST_ROWS = 64
COLOURS = {"ok": "green", "note": "cyan", "warning": "yellow", "error": "red"}


def run(config: DictConfig) -> None:
    """Print a line for each check and a table of sizes; raises `InputError` where one of them is an error."""
    settings = plain(config)
    check(settings, known=ROOT_KEYS)

    from lightning import seed_everything

    from rlhf_lightning.preflight import of_status

    quieten_libraries()
    seed_everything(settings["seed"], workers=True, verbose=False)
    plan = bare_trainer("trainer", settings["trainer"])
    one_process = {**settings["trainer"], "strategy": "auto", "devices": 1}
    module = build("module", settings["module"])
    data = build("data", settings["data"])
    findings, sizes = look(plan, bare_trainer("trainer", one_process), module, data)
    say(findings, sizes)
    errors = of_status(findings, "error")
    if errors:
        raise InputError(f"preflight found {len(errors)} error(s): {', '.join(finding.name for finding in errors)}")


def look(
    plan: "Trainer", here: "Trainer", module: Any, data: "TextDataModule[Any]"
) -> "tuple[list[Finding], list[Size]]":
    """Return the findings of a run and its sizes; what would stop the run is a finding, too.

    ``plan`` is the Trainer of the run, which may have several processes; ``here`` is one of a single process.
    """
    from rlhf_lightning.preflight import Finding

    findings: list[Finding] = []

    def tried(name: str, part: Callable[[], Any]) -> None:
        try:
            part()
        except InputError as error:
            findings.append(Finding(name, "error", str(error)))

    module.trainer = plan
    tried("trainer", module.configure_callbacks)
    connect(here, module, data)
    try:
        data.setup("fit")
    except InputError as error:
        findings.extend(faults_of_rows(data, error))
    else:
        findings.append(lengths_of(data))
    sizes: list[Size] = []
    if data.train_items:
        module.check_batch(data.collate(data.pad_token_id)(data.train_items[:1]))
        tried("micro_batch_size", lambda: settle_micro_batch(here, module, data))
        finding, sizes = sizes_of(plan, module, data)
        findings.append(finding)
        tried("networks", lambda: findings.extend(look_at_rows(here, module, data)))
    return findings, sizes


def connect(trainer: "Trainer", module: Any, data: "TextDataModule[Any]") -> None:
    """Let module, data and Trainer know each other, as `Trainer.fit` does, without starting processes."""
    trainer.strategy.connect(module)
    module.trainer = trainer
    data.trainer = trainer
    module.setup("fit")
    trainer.precision_plugin.convert_module(module)


def faults_of_rows(data: "TextDataModule[Any]", error: InputError) -> "list[Finding]":
    """Return why the rows cannot be used: what a check finds, since it knows the remedy, else the error itself."""
    from rlhf_lightning.preflight import Finding, of_status
    from rlhf_lightning.preflight.text import check_chat_template, check_pad_token

    findings: list[Finding] = []
    if data.tokenizer is not None:
        findings.append(check_pad_token(data.tokenizer, found_by_id=False))
        findings.append(check_chat_template(data.tokenizer, conversation_of(data.train_rows)))
    if data.train_rows and not of_status(findings, "error"):
        # Where a row cannot be tokenised, the error has said it.
        with suppress(InputError):
            findings.append(lengths_of(data))
    return of_status(findings, "error") or [Finding("rows", "error", str(error))]


def lengths_of(data: "TextDataModule[Any]") -> "Finding":
    """Return whether the rows are short enough; those that were dropped are tokenised again."""
    from rlhf_lightning.preflight.text import check_length

    limit, items = data.limit(), data.train_items
    if len(items) < len(data.train_rows):
        encoder = encoder_of(data)
        items = [item for row in data.train_rows for item in data.items(row, encoder, limit)]
    room, reason = (None, "") if limit is None else (limit.tokens, limit.reason)
    return check_length([len(item) for item in items], room=room, reason=reason)


def sizes_of(plan: "Trainer", module: Any, data: "TextDataModule[Any]") -> "tuple[Finding, list[Size]]":
    """Return whether the batch sizes fit together, and what they mean."""
    from rlhf_lightning.data import PPODataModule
    from rlhf_lightning.preflight.sizes import check_ppo_sizes, check_supervised_sizes, planned_steps, supervised_table
    from rlhf_lightning.preflight.stages import ppo_sizes

    processes = plan.num_devices * plan.num_nodes
    rows = len(data.train_items) // processes
    batches = rows // data.batch_size if data.drop_incomplete_batch else ceil(rows / data.batch_size)
    steps = planned_steps(
        batches=batches,
        batches_a_step=plan.accumulate_grad_batches,
        max_epochs=plan.max_epochs,
        max_steps=plan.max_steps,
        limit=plan.limit_train_batches,
    )
    if isinstance(data, PPODataModule):
        sizes = ppo_sizes(module, data.batch_size, rollouts=steps, processes=processes)
        return check_ppo_sizes(sizes), sizes.table()
    table = supervised_table(
        rows=len(data.train_items),
        batch_size=data.batch_size,
        accumulate=plan.accumulate_grad_batches,
        steps=steps,
        processes=processes,
    )
    return check_supervised_sizes(table), table


def look_at_rows(here: "Trainer", module: Any, data: "TextDataModule[Any]") -> "list[Finding]":
    """Return what the stage's checks find on a batch of short and long rows, on the device of the run."""
    from rlhf_lightning.preflight import check_ppo, check_reward, check_sft
    from rlhf_lightning.preflight.stages import check_ppo_memory, check_supervised_memory
    from rlhf_lightning.types import ComparisonBatch, PromptBatch, SFTBatch

    device = here.strategy.root_device
    collate = data.collate(data.pad_token_id)
    batch = collate(short_and_long(data.train_items, data.batch_size)).to(device)
    memory = check_ppo_memory(module, batch) if isinstance(batch, PromptBatch) else None
    memory = memory or check_supervised_memory(module, batch)
    if memory.status == "error" and device.type != "cpu":
        return [memory]
    module.to(device)
    with here.precision_plugin.train_step_context():
        if isinstance(batch, PromptBatch):
            return check_ppo(module, batch)
        conversation = conversation_of(data.train_rows)
        if isinstance(batch, ComparisonBatch):
            return check_reward(module, batch, conversation)
        assert isinstance(batch, SFTBatch)
        return check_sft(module, batch, collate(ends_of(data)).to(device), conversation)


def settle_micro_batch(here: "Trainer", module: Any, data: "TextDataModule[Any]") -> None:
    """Let PPO with micro_batch_size=auto use what it would by the estimate; a run also tries it."""
    from rlhf_lightning.data import PPODataModule

    if isinstance(data, PPODataModule) and module.finds_micro_batch_size:
        batch = data.collate(data.pad_token_id)(short_and_long(data.train_items, data.batch_size))
        with here.precision_plugin.train_step_context():
            module.estimate_micro_batch_size(batch.to(here.strategy.root_device))


def short_and_long(items: Sequence[Any], number: int) -> list[Any]:
    """Return at most ``number`` items from the shortest to the longest, both among them."""
    by_length = sorted(items, key=len, reverse=True)
    count = min(number, len(items))
    places = [i * (len(items) - 1) // max(1, count - 1) for i in range(count)]
    return [by_length[place] for place in reversed(places)]


def ends_of(data: "TextDataModule[Any]") -> list[Any]:
    """Return the last item of each of the first rows: a text may be cut into several, of which that one ends it."""
    encoder, limit = encoder_of(data), data.limit()
    return [data.items(row, encoder, limit)[-1] for row in data.train_rows[:FIRST_ROWS]]


def encoder_of(data: "TextDataModule[Any]") -> Any:
    """Return the encoder that the data were tokenised with."""
    from rlhf_lightning.data.tokenizing import Encoder

    assert data.tokenizer is not None
    return Encoder(data.tokenizer, prompt_template=data.prompt_template)


def conversation_of(rows: "Sequence[Row]") -> "Sequence[Message] | None":
    """Return what is asked in the first row that is a conversation."""
    for row in rows:
        for name in ("prompt", "messages"):
            if name in row.fields and isinstance(turns := row.fields[name], list | tuple):
                return turns if name == "prompt" else turns[:-1]
    return None


def say(findings: "Sequence[Finding]", sizes: "Sequence[Size]") -> None:
    """Print both tables."""
    from rich.console import Console
    from rich.table import Table

    from rlhf_lightning.preflight.sizes import number

    console = Console()
    table = Table("check", "", "what was measured", "what to change", title="preflight")
    for finding in findings:
        colour = COLOURS[finding.status]
        table.add_row(
            escape(finding.name),
            f"[{colour}]{finding.status}[/{colour}]",
            escape(finding.measured),
            escape(finding.remedy),
        )
    console.print(table)
    if sizes:
        table = Table("", "number", "comes from", title="sizes of one process, unless it says otherwise")
        for size in sizes:
            table.add_row(size.name, number(size.number), size.origin)
        console.print(table)
