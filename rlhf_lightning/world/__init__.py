"""The embedded world: data for every stage, drawn from a seed, and a judge that knows the truth."""

from rlhf_lightning.world.instructions import Instruction, all_instructions, parse, split
from rlhf_lightning.world.judge import Judge, Verdict
from rlhf_lightning.world.topics import TOPICS, Topic

__all__ = ["TOPICS", "Instruction", "Judge", "Topic", "Verdict", "all_instructions", "parse", "split"]
