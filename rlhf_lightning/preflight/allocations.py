"""What a piece of work allocates, found by doing it on tensors that have shapes and no numbers.

The work is the run's own, on its own networks: what autograd saves, which kernels attention takes, and how logits are
cut into chunks is so as it is there, for any architecture. Only weights have no numbers, and what is computed from
them; token ids and masks are real, so that what is decided by them is decided as in the run.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rlhf_lightning.networks.quantizing import is_quantized_layer

INDEXING = (
    torch.ops.aten.index.Tensor,
    torch.ops.aten.index_put.default,
    torch.ops.aten.index_put_.default,
    torch.ops.aten._index_put_impl_.default,
)


@dataclass(frozen=True)
class PhaseMemory:
    """Bytes that a phase holds at its peak beside weights, gradients and optimizer."""

    activations: int = 0
    logits: int = 0
    """What has an entry for each token of the vocabulary: logits, their softmax, their gradient."""
    cache: int = 0
    """Keys and values of the tokens that were read."""
    kept: int = 0
    """What sampling keeps on a GPU for the next rollout: cache, and weights as it reads them."""
    libraries: int = 0
    """What cuBLAS works in."""

    @property
    def total(self) -> int:
        """All of it."""
        return self.activations + self.logits + self.cache + self.kept + self.libraries


class Allocations(TorchDispatchMode):
    """Counts the bytes of the tensors that are made in its block and still there, and the largest count so far.

    What a kernel takes and gives back within one call is not seen.
    """

    def __init__(self, known: Iterable[Tensor] = (), *, vocabulary: int | None = None) -> None:
        """Take tensors that do not count, and the size of the vocabulary, by which logits are known."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.now_logits = 0
        self.peak = PhaseMemory()
        self._vocabulary = vocabulary
        self._storages: dict[int, Any] = {}
        for tensor in known:
            self._note(tensor, counts=False)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operation and count what it made."""
        if func in INDEXING:
            args = (args[0], _integers(args[1]), *args[2:])
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor):
                self._note(value)
        return result

    def _note(self, tensor: Tensor, *, counts: bool = True) -> None:
        storage = tensor.untyped_storage()
        key = id(storage)
        if key in self._storages:
            return
        size = storage.nbytes() if counts else 0
        of_logits = size if self._is_of_logits(tensor) else 0

        def forget(_: Any) -> None:
            del self._storages[key]
            self.now -= size
            self.now_logits -= of_logits

        self._storages[key] = ref(storage, forget)
        self.now += size
        self.now_logits += of_logits
        if self.now > self.peak.total:
            self.peak = PhaseMemory(self.now - self.now_logits, self.now_logits)

    def _is_of_logits(self, tensor: Tensor) -> bool:
        return tensor.ndim > 1 and tensor.shape[-1] == self._vocabulary and tensor.is_floating_point()


@contextmanager
def weights_without_numbers(modules: Iterable[nn.Module], device: torch.device) -> Iterator[list[Tensor]]:
    """Put tensors without numbers in the place of weights and buffers for a block, as if they were on ``device``.

    Yields them. What is computed from them has no numbers either; what several modules hold is held by them still.
    Quantised weights stay, which carry their scales with them.
    """
    # Autograd counts the devices at its first backward. The mode pretends that there is one: autograd would start a
    # thread for it, after which no forked process can train.
    with torch.inference_mode(False), torch.enable_grad():
        torch.ones((), requires_grad=True).backward()
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    stand_ins: dict[int, Tensor] = {}
    places: list[tuple[Any, str, Tensor]] = []
    for module in modules:
        for held in () if is_quantized_layer(module) else (module._parameters, module._buffers):
            places += [(held, name, x) for name, x in held.items() if x is not None and not isinstance(x, FakeTensor)]
    for held, name, tensor in places:
        if id(tensor) not in stand_ins:
            stand_ins[id(tensor)] = _stand_in(tensor, mode, device)
        held[name] = stand_ins[id(tensor)]
    try:
        yield list(stand_ins.values())
    finally:
        for held, name, tensor in places:
            held[name] = tensor


def allocated(
    work: Callable[[], None],
    modules: Iterable[nn.Module],
    device: torch.device,
    *,
    vocabulary: int | None = None,
    gradients: bool = False,
) -> PhaseMemory:
    """Return what ``work`` with these modules holds at its peak beside their weights and gradients.

    With ``gradients`` every trained weight has one from the beginning, as from the work before. Raises `RuntimeError`
    where the work cannot be done without numbers.
    """
    parts = [part for module in modules for part in module.modules()]
    with weights_without_numbers(parts, device) as weights:
        trained = [weight for weight in weights if weight.requires_grad]
        with torch.enable_grad(), Allocations(weights, vocabulary=vocabulary) as counted:
            for weight in trained:
                weight.grad = torch.empty_like(weight) if gradients else None
            work()
        grown = sum(weight.grad.nbytes for weight in trained if weight.grad is not None)
    # Gradients count elsewhere: less is left for the work where the peak is while they are not there yet.
    return PhaseMemory(max(0, counted.peak.activations - grown), counted.peak.logits)


def _stand_in(tensor: Tensor, mode: FakeTensorMode, device: torch.device) -> Tensor:
    with mode:
        empty = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
    return nn.Parameter(empty, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty


def _integers(indices: Iterable[Tensor | None]) -> list[Tensor | None]:
    """Return indices in which masks are lists of the places where they are true, whose number is known."""
    found: list[Tensor | None] = []
    for index in indices:
        if index is not None and index.dtype == torch.bool and not isinstance(index, FakeTensor):
            found += index.nonzero(as_tuple=True)
        else:
            found.append(index)
    return found
