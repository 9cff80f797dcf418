"""The entry of `rlhf`: finds the verb, lets Hydra compose its config, and turns errors into messages and exit codes.

Nothing slow is imported here: `rlhf --help` answers before Hydra is loaded, `rlhf train --help` before torch is.
"""

import os
import sys
from collections.abc import Sequence
from difflib import get_close_matches

VERBS = {
    "pipeline": "all stages in a row: pre-training, fine-tuning, reward model, PPO, evaluation, report",
    "preflight": "look at a run before it is paid for: networks, tokenizer, rows, reward, memory, batch sizes",
    "train": "one stage: module=sft, module=reward or module=ppo",
    "evaluate": "compare policies on held-out prompts, or a reward model on comparisons",
    "generate": "sample responses of a policy",
}

USAGE = """\
usage: rlhf VERB [flags] [key=value ...]

verbs
{verbs}

examples
  rlhf pipeline
  rlhf train module=sft network.pretrained=gpt2 'network.pad_token="<|pad|>"' data.path=demonstrations.jsonl
  rlhf preflight module=ppo network.pretrained=out/sft module.reward=out/reward data.path=prompts.jsonl
  rlhf train module=ppo network.pretrained=out/sft module.reward=out/reward data.path=prompts.jsonl
  rlhf train -m module.beta=0.02,0.05,0.1 module=ppo ...     a sweep
  rlhf evaluate policies.sft=out/sft policies.ppo=out/ppo reward=out/reward data.path=heldout.jsonl
  rlhf generate network.pretrained=out/ppo prompt="Name a colour."

`rlhf VERB --help` shows every setting of a verb, `rlhf VERB --cfg job` the config that a command line composes.
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the verb that the command line names; exits with 2 for what the user can mend, with 130 after Ctrl-C."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage(), end="")
        return
    verb, *rest = arguments
    if verb not in VERBS:
        sys.exit(_refused(f"{verb!r} is not a verb of `rlhf`{_did_you_mean(verb)}\n\n{usage()}"))
    # What lies where the user stands can be named in a config: module.reward._target_=my_rewards.politeness
    sys.path.insert(0, os.getcwd())  # noqa: PTH109

    try:
        from rlhf_lightning.cli.application import run_verb
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(run_verb(verb, rest))


def usage() -> str:
    """Return the text of `rlhf --help`."""
    return USAGE.format(verbs="\n".join(f"  {verb:<10} {does}" for verb, does in VERBS.items()))


def _did_you_mean(verb: str) -> str:
    nearest = get_close_matches(verb, VERBS, n=1)
    return f"; did you mean {nearest[0]!r}?" if nearest else ""


def _refused(message: str) -> int:
    print(message, file=sys.stderr, end="")
    return 2


if __name__ == "__main__":
    main()
