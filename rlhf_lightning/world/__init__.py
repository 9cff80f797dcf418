"""The embedded world: a tiny textual universe, drawn from a seed, in which the whole pipeline runs on two CPU cores."""

from rlhf_lightning.world.corpus import Flaws, demonstrations, prompts, raw_text
from rlhf_lightning.world.instructions import Instruction, all_instructions, parse, split
from rlhf_lightning.world.judge import Judge, Verdict, ceiling, label, rank, temperature_for_agreement
from rlhf_lightning.world.network import build_network, build_tokenizer
from rlhf_lightning.world.story import World
from rlhf_lightning.world.topics import TOPICS, Topic

__all__ = [
    "TOPICS",
    "Flaws",
    "Instruction",
    "Judge",
    "Topic",
    "Verdict",
    "World",
    "all_instructions",
    "build_network",
    "build_tokenizer",
    "ceiling",
    "demonstrations",
    "label",
    "parse",
    "prompts",
    "rank",
    "raw_text",
    "split",
    "temperature_for_agreement",
]
