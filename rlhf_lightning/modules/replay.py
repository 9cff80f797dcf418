"""One update again from the file that a skipped one left behind, with an eye on where it stops being finite."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from rlhf_lightning.errors import InputError
from rlhf_lightning.functional.dtensors import is_finite
from rlhf_lightning.modules.batch_file import read_records
from rlhf_lightning.types import Record

if TYPE_CHECKING:
    from rlhf_lightning.modules.language import LanguageModule

SHOWN = 3
"""How many names of a long list are said."""


@dataclass
class Seen:
    """Where the first numbers appeared that are not finite."""

    output: str | None = None
    """The part of the network whose output was the first."""
    gradient: str | None = None
    """The weight whose gradient was the first; gradients are found from the last layer to the first."""


def replay(module: "LanguageModule", path: str | Path) -> list[str]:
    """Repeat the update without its step, with the weights that the module has; return what is to be said of it.

    The module must belong to a Trainer whose training has started. Raises `InputError` where the file is another one,
    or of another stage.
    """
    records, notes = read_records(Path(path))
    if not records or not isinstance(records[0], module.update_is_made_from):
        found = [type(record).__name__ for record in records]
        raise InputError(
            f"replay={path} holds {found}, and {type(module).__name__} is updated from "
            f"{module.update_is_made_from.__name__}: use the command of the run that wrote it"
        )
    lines = [f"{path}: update {notes['update']}, which was skipped because {notes['what']}"]
    lines += [f"not finite in the batch: {_some(names)}" for names in [not_finite_fields(records)] if names]
    weights = [name for name, p in module.named_parameters() if not is_finite(p)]
    lines += [f"not finite among the weights: {_some(weights)}"] if weights else []
    plugin = module.trainer.precision_plugin
    if isinstance(plugin, MixedPrecision):
        # The gradient itself, not what the loss scale makes of it.
        plugin.scaler = None
    with watching(module) as seen, plugin.train_step_context():
        module.repeat_update([record.to(module.device) for record in records])
    losses, module.bad_updates.losses = module.bad_updates.losses, []
    lines.append(f"loss: {', '.join(f'{float(loss):.6g}' for loss in losses)}")
    if seen.output is not None:
        lines.append(f"first output that is not finite: {seen.output}")
    gradients = [name for name, p in module.named_parameters() if p.grad is not None and not is_finite(p.grad)]
    if gradients:
        lines.append(f"gradients that are not finite: {_some(gradients)}; the first on the way back: {seen.gradient}")
    if not gradients and all(is_finite(loss) for loss in losses):
        lines.append("loss and gradient are finite with these weights; ckpt_path=last takes those of the run")
    return lines


@contextmanager
def watching(module: nn.Module) -> Iterator[Seen]:
    """Note in the block which part's output and which weight's gradient is the first that is not finite."""
    seen = Seen()
    hooks: list[Any] = []
    for name, part in module.named_modules():
        if name:
            hooks.append(part.register_forward_hook(partial(_look_at_output, seen, name)))
    for name, weight in module.named_parameters():
        if weight.requires_grad:
            hooks.append(weight.register_post_accumulate_grad_hook(partial(_look_at_gradient, seen, name)))
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _look_at_output(seen: Seen, name: str, part: nn.Module, inputs: Any, output: Any) -> None:
    if seen.output is None and not all(is_finite(x) for x in tree_leaves(output) if isinstance(x, Tensor)):
        seen.output = f"{name} ({type(part).__name__})"


def _look_at_gradient(seen: Seen, name: str, weight: Tensor) -> None:
    if seen.gradient is None and weight.grad is not None and not is_finite(weight.grad):
        seen.gradient = name


def not_finite_fields(records: list[Record]) -> list[str]:
    """Return the fields of the records that hold a number that is not finite."""
    return [
        f"{type(record).__name__}.{field.name}"
        for record in records
        for field in fields(record)
        if not is_finite(getattr(record, field.name))
    ]


def _some(names: list[str]) -> str:
    more = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {more} more" if more > 0 else "")
