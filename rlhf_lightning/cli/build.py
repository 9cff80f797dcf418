"""From checked settings to objects."""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import instantiate

from rlhf_lightning.cli.checks import Config, is_reward_function, target_nodes
from rlhf_lightning.errors import InputError

INSTEAD = {
    "AMP with fp16 is not supported on CPU": "precision=16-mixed needs a GPU; on a CPU use bf16-mixed or 32-true",
    "Bitsandbytes is only supported on CUDA": "BitsandbytesPrecision needs a GPU; network.quantization does not",
    "No supported gpu backend found": "torch sees no GPU (accelerator=gpu); on a CPU use trainer=cpu or ddp_cpu",
    "Neither `tensorboard` nor": "TensorBoardLogger needs the extra: pip install rlhf-lightning[tensorboard]",
}
"""What to take instead of what Lightning warns of, going on with something else, or refuses without saying."""


def build(path: str, node: Config, **arguments: Any) -> Any:
    """Return the object that the node at ``path`` of the config describes.

    A reward that names a plain function becomes that function with its other settings bound. Raises `InputError` where
    a constructor refuses its settings.
    """
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    for place, part in target_nodes(node, path):
        if is_reward_function(place, part):
            part["_partial_"] = True
    for text in INSTEAD:
        # For good: `catch_warnings` would forget what a constructor silences for the training behind it.
        warnings.filterwarnings("error", message=f".*{text}")
    try:
        return instantiate(node, _convert_="all", **arguments)
    except InstantiationException as error:
        for text, instead in INSTEAD.items():
            if text in str(error.__cause__):
                raise InputError(f"{path}: {instead}") from error
        if isinstance(error.__cause__, ValueError | MisconfigurationException | ModuleNotFoundError):
            raise InputError(f"{path}: {error.__cause__}") from error
        raise


@contextmanager
def trainers_refusals() -> Iterator[None]:
    """Raise `InputError` where the Trainer finds in the block that its settings do not go with the data."""
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    try:
        yield
    except (MisconfigurationException, ValueError) as error:
        # What it looks at before it starts has no kind of its own.
        if isinstance(error, MisconfigurationException) or "`val_check_interval`" in str(error):
            raise InputError(f"trainer: {str(error).strip()}") from error
        raise


def build_all(path: str, nodes: Config | None) -> dict[str, Any]:
    """Return the objects of a node of named nodes, those that are null left out; one node alone counts as named ''."""
    if nodes is None:
        return {}
    named: Mapping[str, Config | None] = {"": nodes} if "_target_" in nodes else nodes
    return {name: build(f"{path}.{name}".rstrip("."), node) for name, node in named.items() if node is not None}
