"""Whether sampler, scoring, updates, reference and critic read the same tokens alike."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_lightning.functional.masking import masked_sum
from rlhf_lightning.functional.rewards import value_mask
from rlhf_lightning.networks.unpadded import reading_padding
from rlhf_lightning.preflight.findings import Finding, Status
from rlhf_lightning.preflight.probe import Probe
from rlhf_lightning.rollout.experience import micro_batches, trimmed_micro_batches
from rlhf_lightning.rollout.score import response_predictions, response_values, spread
from rlhf_lightning.types import Experience, Rollout, ScoredRollout

PAD_COLUMNS = 5

SAME_CALL = {torch.float32: 1e-5, torch.float64: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
"""Largest difference in nats that rounding makes between two forwards of equal shape."""

OTHER_CALL = {torch.float32: 1e-4, torch.float64: 1e-4, torch.bfloat16: 0.25, torch.float16: 0.05}
"""The same where padding or the cache makes the shapes differ, and with them the order of the sums."""

BEYOND_ROUNDING = 10
"""So many times `OTHER_CALL` is an error; less may be a coarser arithmetic (TF32) and is a warning."""

Losses = Callable[[Experience], dict[str, Tensor]]


def precision(network: nn.Module) -> torch.dtype:
    """Return the type that a forward computes in: the weights' own, or autocast's inside of it."""
    weight = next(network.parameters())
    if torch.is_autocast_enabled(weight.device.type):
        return torch.get_autocast_dtype(weight.device.type)
    return weight.dtype


def read_logprobs(
    network: nn.Module, rollout: Rollout, *, temperature: float, micro_batch_size: int, pad_columns: int = 0
) -> Tensor:
    """Return the log-probabilities (B, R) of the responses, 0 after their ends, with pad columns on the left."""
    found = torch.zeros(rollout.response_mask.shape, dtype=_stored(network), device=rollout.tokens.device)
    for rows, tokens, mask, starts, response_mask in _padded(rollout, micro_batch_size, pad_columns):
        length = response_mask.shape[1]
        predicted = response_predictions(network, tokens, mask, starts, response_mask)
        found[rows, :length] = spread(predicted.logprobs(temperature=temperature), response_mask)
    return found


def read_values(critic: nn.Module, rollout: Rollout, *, micro_batch_size: int, pad_columns: int = 0) -> Tensor:
    """Return the values (B, R + 1) of the states before and after the response tokens, 0 after their ends."""
    sequences, longest = rollout.response_mask.shape
    found = torch.zeros(sequences, longest + 1, dtype=_stored(critic), device=rollout.tokens.device)
    for rows, tokens, mask, starts, response_mask in _padded(rollout, micro_batch_size, pad_columns):
        length = response_mask.shape[1]
        values = response_values(critic, tokens, mask, starts, length=length)
        states = value_mask(response_mask, after_end=True)
        found[rows, : length + 1] = values.masked_fill(~states, 0.0)
    return found


def check_kl(
    policy: nn.Module, reference: nn.Module, scored: ScoredRollout, *, temperature: float, micro_batch_size: int
) -> Finding:
    """Check that the KL to the reference is 0 before anything was learnt."""
    name = "KL to the reference"
    kl = float(masked_sum(scored.logprobs - scored.ref_logprobs, scored.response_mask).abs().max())
    apart = largest(scored.logprobs - scored.ref_logprobs)
    measured = f"{kl:.2g} nats in a response, {apart:.2g} at a token"
    if apart <= SAME_CALL[precision(policy)]:
        return Finding(name, "ok", measured)

    def at(network: nn.Module, temperature: float) -> Tensor:
        return read_logprobs(network, scored, temperature=temperature, micro_batch_size=micro_batch_size)

    noise = noise_of(policy, scored, micro_batch_size) or noise_of(reference, scored, micro_batch_size)
    changed = different_weights(policy, reference)
    if noise:
        return Finding(name, "error", f"{measured}; {noise}", DROPOUT_REMEDY)
    if changed:
        return Finding(
            name,
            "error",
            f"{measured}; {len(changed)} weights differ from the reference's, the first is {changed[0]}",
            "the reference must be the policy as it was given: build the module anew, or go on with ckpt_path=...",
        )
    if temperature != 1 and _alike(scored.ref_logprobs, at(reference, 1.0), policy):
        return Finding(
            name,
            "error",
            f"{measured}; the reference is read at temperature 1, the policy at {temperature}",
            "read both at module.temperature",
        )
    return Finding(
        name,
        "error",
        f"{measured}; the weights are equal",
        "the two forwards differ: look at adapters (off in the reference, on in the policy), quantisation and config",
    )


def check_first_ratio(
    policy: nn.Module, scored: ScoredRollout, losses: Losses, *, temperature: float, micro_batch_size: int
) -> Finding:
    """Check that the updates read the sampled tokens as scoring did: every ratio is 1 before the first step."""
    name = "first ratio"
    deviations = [
        largest((losses(part)["ratio"] - 1).masked_fill(~part.response_mask, 0.0))
        for part in trimmed_micro_batches(first_experience(scored), micro_batch_size=micro_batch_size)
    ]
    measured = f"at most {max(deviations):.2g} from 1"
    if max(deviations) <= SAME_CALL[precision(policy)]:
        return Finding(name, "ok", measured)
    if noise := noise_of(policy, scored, micro_batch_size):
        return Finding(name, "error", f"{measured}; {noise}", DROPOUT_REMEDY)
    if temperature != 1:
        cold = read_logprobs(policy, scored, temperature=1.0, micro_batch_size=micro_batch_size)
        one = "scoring reads" if _alike(scored.logprobs, cold, policy) else "the updates seem to read"
        return Finding(
            name,
            "error",
            f"{measured}; {one} the policy at another temperature than module.temperature={temperature}",
            "divide the logits by module.temperature in sampling, scoring and updates",
        )
    return Finding(
        name,
        "error",
        f"{measured}; the policy gives the same log-probabilities each time it is read",
        "scoring and updates read it differently: compare position ids, attention mask and the shift by one token",
    )


def check_left_padding(
    policy: nn.Module,
    critic: nn.Module | None,
    rollout: Rollout,
    *,
    temperature: float,
    micro_batch_size: int,
    max_positions: int | None,
) -> Finding:
    """Check that pad columns on the left move neither log-probabilities nor values, each network by its precision."""
    name = "left padding"
    columns = PAD_COLUMNS if max_positions is None else min(PAD_COLUMNS, max_positions - rollout.tokens.shape[1])
    if columns < 1:
        return Finding(name, "note", "not measured: the prompts leave no position for a pad column")

    def logprobs(pad_columns: int) -> Tensor:
        return read_logprobs(
            policy, rollout, temperature=temperature, micro_batch_size=micro_batch_size, pad_columns=pad_columns
        )

    with reading_padding():
        moved = {"log-probabilities": (policy, largest(logprobs(columns) - logprobs(0)))}
        if critic is not None:
            values = read_values(critic, rollout, micro_batch_size=micro_batch_size)
            padded = read_values(critic, rollout, micro_batch_size=micro_batch_size, pad_columns=columns)
            moved["values"] = critic, largest(padded - values) / max(1.0, largest(values))
    measured = f"{columns} pad columns move " + ", ".join(f"{what} by {by:.2g}" for what, (_, by) in moved.items())
    beyond = [beyond_rounding(network, by) for network, by in moved.values() if by > OTHER_CALL[precision(network)]]
    if not beyond:
        return Finding(name, "ok", measured)
    if noise := noise_of(policy, rollout, micro_batch_size):
        return Finding(name, "error", f"{measured}; {noise}", DROPOUT_REMEDY)
    return Finding(
        name,
        "error" if "error" in beyond else "warning",
        measured,
        "the network must use the attention_mask and position_ids that it is given; another "
        "network.attn_implementation (eager, sdpa) may do so",
    )


def check_decoding(
    policy: nn.Module, probe: Probe, scored: ScoredRollout, *, temperature: float, micro_batch_size: int
) -> Finding:
    """Check that decoding with the cache and one forward over the whole sequence agree on the log-probabilities."""
    name = "sampler and trainer"
    apart = largest(probe.rollout.sampler_logprobs - scored.logprobs)
    measured = f"log-probabilities of sampled tokens differ by at most {apart:.2g}"
    if apart <= OTHER_CALL[precision(policy)]:
        return Finding(name, "ok", measured)
    if noise := noise_of(policy, scored, micro_batch_size):
        return Finding(name, "error", f"{measured}; {noise}", DROPOUT_REMEDY)
    cold = read_logprobs(policy, scored, temperature=1.0, micro_batch_size=micro_batch_size)
    if temperature != 1 and _alike(scored.logprobs, cold, policy):
        return Finding(
            name,
            "error",
            f"{measured}; the sampler divides by module.temperature={temperature}, scoring does not",
            "divide the logits by module.temperature in sampling, scoring and updates",
        )
    return Finding(
        name,
        beyond_rounding(policy, apart),
        measured,
        "a step with the cache computes something else than the whole sequence: look at the network's cache, its "
        "position ids and network.attn_implementation",
    )


DROPOUT_REMEDY = "set the dropout of the network's config to 0, or put the network into evaluation mode with .eval()"


def beyond_rounding(network: nn.Module, apart: float) -> Status:
    """Return how bad a difference beyond `OTHER_CALL` is."""
    return "error" if apart > BEYOND_ROUNDING * OTHER_CALL[precision(network)] else "warning"


def noise_of(network: nn.Module, rollout: Rollout, micro_batch_size: int) -> str:
    """Return in words that the network is random, and which of its parts may be the reason; empty where it is not."""
    one, other = (read_logprobs(network, rollout, temperature=1.0, micro_batch_size=micro_batch_size) for _ in range(2))
    apart = largest(one - other)
    if apart <= SAME_CALL[precision(network)]:
        return ""
    training = [name or "the whole network" for name, part in network.named_modules() if part.training]
    where = f": {training[0]} is in training mode" if training else ""
    return f"two forwards of the same tokens differ by {apart:.2g}, as with dropout left on{where}"


def different_weights(one: nn.Module, other: nn.Module) -> list[str]:
    """Return the names of the weights that are not equal in both networks, or that only one of them has."""
    # A layer with an adapter holds the plain one as its base_layer.
    ones, others = (
        {name.replace(".base_layer.", "."): weight for name, weight in network.named_parameters()}
        for network in (one, other)
    )
    in_both = ones.keys() & others.keys()
    return [name for name in ones | others if name not in in_both or not torch.equal(ones[name], others[name])]


def first_experience(scored: ScoredRollout) -> Experience:
    """Return the rollout as the updates see it, with nothing to learn from it."""
    nothing, of_states = torch.zeros_like(scored.logprobs), torch.zeros_like(scored.values)
    return Experience(
        tokens=scored.tokens,
        attention_mask=scored.attention_mask,
        response_starts=scored.response_starts,
        response_mask=scored.response_mask,
        value_mask=value_mask(scored.response_mask, after_end=True),
        old_logprobs=scored.logprobs,
        ref_logprobs=scored.ref_logprobs,
        old_values=of_states,
        rewards=of_states,
        advantages=nothing,
        returns=of_states,
    )


def largest(x: Tensor) -> float:
    """Return the largest absolute value, infinity where one is no number."""
    return float(x.abs().nan_to_num(nan=torch.inf, posinf=torch.inf).max())


def _stored(network: nn.Module) -> torch.dtype:
    """Return the type that a network's log-probabilities and values come in."""
    return torch.promote_types(next(network.parameters()).dtype, torch.float32)


def _alike(one: Tensor, other: Tensor, network: nn.Module) -> bool:
    return largest(one - other) <= OTHER_CALL[precision(network)]


def _padded(rollout: Rollout, micro_batch_size: int, columns: int) -> Iterator[Any]:
    for part in micro_batches(rollout, micro_batch_size=micro_batch_size):
        # Any id will do: what is masked must not count.
        tokens = nn.functional.pad(part.tokens, (columns, 0), value=0)
        mask = nn.functional.pad(part.attention_mask, (columns, 0), value=False)
        yield part.rows, tokens, mask, part.response_starts + columns, part.response_mask
