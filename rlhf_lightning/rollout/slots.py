"""Responses that are sampled at once, each in a slot: their cache and tokens.

`transformers` lets a cache and a way to attend be put in from outside; both are here, made for one new token a row.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer

from rlhf_lightning.errors import InputError
from rlhf_lightning.functional.precision import at_least_float32
from rlhf_lightning.networks.attending import attending
from rlhf_lightning.rollout.draw import draw

ONE_TOKEN = "one_token"
"""The name of `attend_from_one_token` in `transformers`."""

_kernel: Callable[[Tensor, Tensor, Tensor, Tensor, float], Tensor] | None = None


def use_kernel() -> None:
    """Let `attend_from_one_token` take the kernel of `one_token_kernel` on CUDA; Triton must be at hand."""
    # Not where it attends: compiled code would be cut in two there.
    global _kernel
    from rlhf_lightning.rollout.one_token_kernel import attend

    _kernel = attend


class Places:
    """Where the new states of a step go: ``positions`` (N,) of the first N slots, and how far each of them can look."""

    def __init__(self, positions: Tensor, in_use: int, span: int) -> None:
        """Take the positions of all slots, of which the first ``in_use`` are read, none at or behind ``span``."""
        self.positions = positions[:in_use]
        self.span = span

    def mask(self, dtype: torch.dtype) -> Tensor:
        """Return what is added to a slot's attention, (N, 1, 1, span): 0 up to its own position, -inf behind."""
        columns = torch.arange(self.span, device=self.positions.device)
        behind = columns > self.positions.unsqueeze(1)
        return torch.zeros_like(behind, dtype=dtype).masked_fill(behind, -torch.inf)[:, None, None]


class SlotLayer(CacheLayerMixin):
    """A layer of the cache, (slots, heads, capacity, size); the states of a response begin at 0, without padding."""

    is_compileable = True

    def __init__(self, like: DynamicLayer, *, slots: int, capacity: int) -> None:
        """Make room in the type and on the device of a layer that has been filled."""
        super().__init__()  # type: ignore[no-untyped-call]
        keys, values = cast(Tensor, like.keys), cast(Tensor, like.values)
        kind = kept_in(keys)
        self.all_keys = keys.new_zeros(slots, keys.shape[1], capacity, keys.shape[3], dtype=kind)
        self.all_values = values.new_zeros(slots, values.shape[1], capacity, values.shape[3], dtype=kind)
        self.is_initialized = True
        self.places = Places(torch.zeros(slots, dtype=torch.long, device=keys.device), slots, capacity)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write the states of one new token a slot; return those of all tokens that can be seen."""
        positions, span = self.places.positions, self.places.span
        slots = torch.arange(len(positions), device=positions.device).unsqueeze(1)
        heads = torch.arange(key_states.shape[1], device=positions.device)
        at = (slots, heads, positions.unsqueeze(1))
        self.all_keys.index_put_(at, key_states.squeeze(2).to(self.all_keys))
        self.all_values.index_put_(at, value_states.squeeze(2).to(self.all_values))
        return self.all_keys[: len(positions), :, :span], self.all_values[: len(positions), :, :span]

    def fill(self, slots: Tensor, layer: DynamicLayer, rows: Tensor, columns: Tensor) -> None:
        """Take over prompts: slot ``slots[i]`` gets row ``rows[i]``, in the order of its ``columns`` (rows, P)."""
        for all_states, states in ((self.all_keys, layer.keys), (self.all_values, layer.values)):
            states = cast(Tensor, states)
            order = columns[:, None, :, None].expand(-1, states.shape[1], -1, states.shape[3])
            all_states[slots, :, : columns.shape[1]] = states.gather(2, order)[rows].to(all_states)

    def move(self, kept: Tensor) -> None:
        """Bring the slots ``kept`` (N,) to the front, in their order."""
        for all_states in (self.all_keys, self.all_values):
            all_states[: len(kept)] = all_states[kept]

    def resize(self, slots: int, capacity: int) -> None:
        """Leave the first slots, and give each of them room for so many tokens."""
        more = (0, 0, 0, capacity - self.get_max_length())
        self.all_keys = nn.functional.pad(self.all_keys[:slots], more)
        self.all_values = nn.functional.pad(self.all_values[:slots], more)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Do nothing: there is room from the start."""

    def get_seq_length(self) -> int:
        """Return how many tokens any slot may have before this one: each has a length of its own."""
        return self.places.span - 1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return how many columns a mask has, and where it starts."""
        return self.places.span, 0

    def get_max_length(self) -> int:
        """Return the capacity."""
        return int(self.all_keys.shape[2])


def kept_in(states: Tensor) -> torch.dtype:
    """Return the type in which attention reads states: their own, or under autocast that of its arithmetic."""
    kind = states.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else states.dtype


def suits_kernel(query: Tensor, value: Tensor, mask: Tensor) -> bool:
    """Return whether values are of the keys' size, the mask is one for all heads, and no number has 64 bits."""
    is_for_all = mask.shape[1] == 1 and mask.is_floating_point()
    return is_for_all and value.shape[3] == query.shape[3] and query.dtype != torch.float64


def attend_from_one_token(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend from one token a row, (N, heads, 1, size); query heads that share a key head are rows of one product.

    In `transformers`' own way keys and values would be copied for each query head, the most of what a step moves.
    """
    if softcap is not None:
        raise InputError(
            f"sampler=builtin does not know the softcap={softcap} of this network; use sampler=transformers"
        )
    rows, heads, _, size = query.shape
    scaling = size**-0.5 if scaling is None else scaling
    # Not where there are no numbers: the memory of a run is estimated on such tensors.
    can_run = query.is_cuda and type(query) is Tensor
    if can_run and _kernel is not None and attention_mask is not None and suits_kernel(query, value, attention_mask):
        return _kernel(query.to(key), key, value, attention_mask, scaling).unsqueeze(1), None
    packed = query.reshape(rows, key.shape[1], heads // key.shape[1], size).to(key)
    if query.device.type == "cpu":
        # Its fused kernel takes up to twice as long for one token.
        scores = packed * scaling @ key.transpose(2, 3)
        scores = scores if attention_mask is None else scores.add_(attention_mask)
        attended = torch.softmax(scores, dim=-1, dtype=at_least_float32(scores[:0]).dtype).to(value) @ value
    else:
        attended = scaled_dot_product_attention(packed, key, value, attn_mask=attention_mask, scale=scaling)
    return attended.reshape(rows, 1, heads, value.shape[3]), None


AttentionInterface.register(ONE_TOKEN, attend_from_one_token)


class SlotCache(Cache):
    """All layers, and each of them as a cache of its own."""

    def __init__(self, layers: list[SlotLayer]) -> None:
        """Take the layers."""
        super().__init__(layers=[*layers])
        self.alone = [Cache(layers=[layer]) for layer in layers]


class Slots:
    """What is sampled at once: for each slot its cache, its newest token, its noise, and what was drawn so far.

    All tensors stay where they are until `resize` makes new ones, and a step waits for nothing, so that it can be
    recorded. Of each tensor the first slots are in use.
    """

    def __init__(
        self,
        like: Any,
        *,
        count: int,
        capacity: int,
        longest: int,
        temperature: float,
        stop_tokens: Tensor,
        room: int | None = None,
    ) -> None:
        """Make room for responses of ``longest`` tokens, and caches like one that has been filled.

        A slot takes up to ``capacity`` tokens; with ``room`` it has room for so many at first.
        """
        device = stop_tokens.device
        self.temperature, self.stop_tokens, self.longest, self.capacity = temperature, stop_tokens, longest, capacity
        self.layers = [SlotLayer(layer, slots=count, capacity=room or capacity) for layer in like.layers]
        self.cache = SlotCache(self.layers)
        self.tokens = torch.zeros(count, dtype=torch.long, device=device)
        self.positions, self.drawn = torch.zeros_like(self.tokens), torch.zeros_like(self.tokens)
        self.running = torch.zeros_like(self.tokens, dtype=torch.bool)
        self.uniform = torch.zeros(count, longest, 2, dtype=torch.float64, device=device)
        self.response = torch.zeros(count, longest, dtype=torch.long, device=device)
        kind = torch.promote_types(self.layers[0].all_keys.dtype, torch.float32)
        self.logprobs = torch.zeros(count, longest, dtype=kind, device=device)
        self.finite = torch.ones((), dtype=torch.bool, device=device)

    @property
    def room(self) -> int:
        """Tokens that each slot has room for now."""
        return self.layers[0].get_max_length()

    @property
    def cache_bytes(self) -> int:
        """Bytes of all keys and values."""
        return sum(layer.all_keys.nbytes + layer.all_values.nbytes for layer in self.layers)

    @property
    def bytes(self) -> int:
        """Bytes of all tensors."""
        tensors = (x for x in vars(self).values() if isinstance(x, Tensor))
        return self.cache_bytes + sum(x.nbytes for x in tensors)

    def fit(
        self, like: Any, *, count: int, capacity: int, longest: int, temperature: float, stop_tokens: Tensor
    ) -> bool:
        """Return whether a rollout of this kind has room in these slots."""
        shapes = [(ours.all_keys.dtype, ours.all_keys.shape[1], ours.all_keys.shape[3]) for ours in self.layers] == [
            (kept_in(layer.keys), layer.keys.shape[1], layer.keys.shape[3]) for layer in like.layers
        ]
        return (
            shapes
            and count == len(self.tokens)
            and capacity <= self.capacity
            and longest == self.longest
            and temperature == self.temperature
            and torch.equal(stop_tokens, self.stop_tokens)
        )

    def resize(self, in_use: int, room: int) -> None:
        """Leave the first ``in_use`` slots, with room for so many tokens."""
        for layer in self.layers:
            layer.resize(in_use, room)

    def clear(self) -> None:
        """Leave nothing running."""
        self.running.fill_(False)
        self.finite.fill_(True)

    def let_in(
        self,
        slots: Tensor,
        logits: Tensor,
        cache: Any,
        which: Tensor,
        order: Tensor,
        lengths: Tensor,
        uniform: Tensor,
    ) -> None:
        """Take over prompts that have been read, and draw the first token of each response.

        Prompt ``which[i]`` of the cache goes to slot ``slots[i]``; ``order`` (prompts, P) has its real columns first,
        ``lengths[i]`` of them; ``uniform`` is its noise (N, tokens, 2), ``logits`` (N, V) are those behind it.
        """
        if order.shape[1] > self.room:
            self.resize(len(self.tokens), order.shape[1])
        for ours, theirs in zip(self.layers, cache.layers, strict=True):
            ours.fill(slots, theirs, which, order)
        self.positions[slots] = lengths - 1
        self.drawn[slots] = 0
        self.running[slots] = True
        self.uniform[slots] = uniform
        self._take(slots, logits)

    def step(self, policy: nn.Module, in_use: int, span: int) -> None:
        """Draw one more token in each running slot; none of them stands at or behind ``span``."""
        network: Any = policy
        places = Places(self.positions, in_use, span)
        for layer in self.layers:
            layer.places = places
        with attending(policy, ONE_TOKEN):
            output = network(
                input_ids=self.tokens[:in_use].unsqueeze(1),
                attention_mask=places.mask(self.layers[0].all_keys.dtype),
                position_ids=self.positions[:in_use].unsqueeze(1),
                past_key_values=self.cache,
                use_cache=True,
                logits_to_keep=1,
            )
        self._take(torch.arange(in_use, device=self.tokens.device), output.logits[:, -1])

    def _take(self, slots: Tensor, logits: Tensor) -> None:
        """Draw a token from each slot's logits; where the slot is running it is the newest of the response."""
        drawn, running = self.drawn[slots], self.running[slots]
        at = drawn.clamp(max=self.longest - 1)
        tokens, logprobs, finite = draw(logits, self.uniform[slots, at], temperature=self.temperature)
        self.finite &= finite | ~running.any()
        self.response[slots, at] = torch.where(running, tokens, self.response[slots, at])
        self.logprobs[slots, at] = torch.where(running, logprobs.to(self.logprobs), self.logprobs[slots, at])
        self.tokens[slots] = torch.where(running, tokens, self.tokens[slots])
        self.positions[slots] += running.long()
        self.drawn[slots] = drawn + running.long()
        ended = (tokens.unsqueeze(1) == self.stop_tokens).any(dim=1)
        self.running[slots] = running & ~ended & (drawn + 1 < self.longest)

    def move(self, kept: Tensor) -> None:
        """Bring the slots ``kept`` (N,) to the front, in their order."""
        for layer in self.layers:
            layer.move(kept)
        of_slots = (self.tokens, self.positions, self.drawn, self.running, self.uniform, self.response, self.logprobs)
        for tensor in of_slots:
            tensor[: len(kept)] = tensor[kept]
