"""Whether what was set does anything."""

from collections.abc import Sequence

from rlhf_lightning.preflight.findings import Finding


def check_effect(without_effect: Sequence[str]) -> Finding:
    """Say which settings were changed for nothing; each of them says itself what it would count with."""
    name = "settings without effect"
    if not without_effect:
        return Finding(name, "ok", "none")
    remedy = "leave them at their defaults, or set what they count with"
    return Finding(name, "warning", "; ".join(without_effect), remedy)
