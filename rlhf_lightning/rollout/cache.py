"""Room in a policy's cache for the tokens to come."""

from typing import Any, cast

from torch import Tensor
from torch.nn.functional import pad
from transformers.cache_utils import Cache, DynamicLayer


class RoomyLayer(DynamicLayer):
    """A layer of the cache with room for a known number of tokens: a step writes its own states and copies no others.

    A `DynamicLayer` joins old and new states to a new tensor in every step, which for small networks takes as long as
    the attention itself.
    """

    def __init__(self, layer: DynamicLayer, room: int) -> None:
        """Take over what the layer holds, ``keys`` and ``values`` (B, heads, T, size), with ``room`` tokens more."""
        super().__init__()
        self.dtype, self.device, self.is_initialized = layer.dtype, layer.device, True
        keys, values = cast(Tensor, layer.keys), cast(Tensor, layer.values)
        self._hold(pad(keys, (0, 0, 0, room)), pad(values, (0, 0, 0, room)), layer.get_seq_length())

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write the new states behind the others and return all of them."""
        start = self.get_seq_length()
        end = start + key_states.shape[-2]
        self._all_keys[..., start:end, :] = key_states
        self._all_values[..., start:end, :] = value_states
        self._hold(self._all_keys, self._all_values, end)
        return self._all_keys[..., :end, :], self._all_values[..., :end, :]

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows at ``indices``."""
        self._hold(self._all_keys[indices], self._all_values[indices], self.get_seq_length())

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values, room included."""
        return self._all_keys.nbytes + self._all_values.nbytes

    def fill(self, length: int) -> None:
        """Count so many tokens as written, whatever there is in their place."""
        self._hold(self._all_keys, self._all_values, length)

    def _hold(self, keys: Tensor, values: Tensor, length: int) -> None:
        self._all_keys, self._all_values = keys, values
        self.keys, self.values = keys[..., :length, :], values[..., :length, :]


def make_room(cache: Any, room: int) -> None:
    """Give every plain layer of a cache room for so many tokens; layers and caches of another kind stay as they are."""
    if isinstance(cache, Cache):
        cache.layers = [RoomyLayer(layer, room) if type(layer) is DynamicLayer else layer for layer in cache.layers]
