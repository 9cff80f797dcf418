"""Where training ends: p*(y|x) in proportion to p_FT(y|x) exp(R(x, y) / beta), the best that there is.

With Z the sum of these over all y, the objective J(p) is beta log Z - beta KL(p || p*): only p* reaches beta log Z.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*have no `val_dataloader`.*"),
]

MISSING_EOS_PENALTY = 0.5
ESTIMATORS: dict[str, dict[str, Any]] = {
    "gae": {"advantage": "gae", "ppo_epochs": 1, "prompts": 384},
    "rloo": {"advantage": "rloo", "ppo_epochs": 1, "prompts": 96, "samples_per_prompt": 4},
    "reinforce": {"advantage": "reinforce", "ppo_epochs": 1, "prompts": 384},
    # Adam's first step moves a logit by the learning rate, as far as the clip range: the three after it are clipped.
    "gae, clipped": {"advantage": "gae", "ppo_epochs": 2, "minibatch_size": 192, "prompts": 384},
    # Without the unit of whitened advantages, in which a penalty of the loss would have another price.
    "loss_k1": {"advantage": "reinforce", "kl_penalty": "loss_k1", "ppo_epochs": 1, "prompts": 384},
}
WORLDS = [(0.3, 0), (0.3, 1), (0.5, 2), (1.0, 3)]
"""beta and seed."""
RUNS = [
    *((estimator, *world) for estimator in ("gae", "rloo", "reinforce") for world in WORLDS),
    *((estimator, *world) for estimator in ("gae, clipped", "loss_k1") for world in (WORLDS[0], WORLDS[-1])),
]


def kl(p: Tensor, q: Tensor) -> Tensor:
    """(2,) KL(p || q) of log-probabilities (2, N)."""
    return (p.exp() * (p - q)).sum(dim=1)


def random_reward(seed: int) -> Callable[[str, str], float]:
    """A number between 0 and 2 for each prompt and response, drawn when it is first asked for."""
    generator = torch.Generator().manual_seed(seed)
    drawn: dict[tuple[str, str], float] = {}

    def reward(prompt: str, response: str) -> float:
        if (prompt, response) not in drawn:
            drawn[prompt, response] = 2 * torch.rand((), generator=generator).item()
        return drawn[prompt, response]

    return reward


@pytest.mark.parametrize(("estimator", "beta", "seed"), RUNS)
def test_the_policy_becomes_the_best_one(
    estimator: str, beta: float, seed: int, enumerable: Callable[..., Any]
) -> None:
    space, reward = enumerable(letters="abc", max_new_tokens=2, seed=seed), random_reward(seed)
    before = space.logprobs()
    rewards = space.scores(reward) - MISSING_EOS_PENALTY * ~space.ended
    best = before + rewards / beta
    log_z = best.logsumexp(dim=1)
    best = best - log_z.unsqueeze(1)
    settings = {"minibatch_size": 384, "learning_rate": 0.2, "critic_learning_rate": 0.2, **ESTIMATORS[estimator]}
    logged = space.fit(
        reward,
        beta=beta,
        missing_eos="subtract",
        missing_eos_penalty=MISSING_EOS_PENALTY,
        rollouts=100,
        **settings,
    )
    after = space.logprobs()
    objective = (after.exp() * rewards).sum(dim=1) - beta * kl(after, before)
    clipped = logged["ppo/clip_fraction"]
    assert (sum(clipped) / len(clipped) > 0.01) == (estimator == "gae, clipped")
    assert kl(before, best).min() > 0.1
    assert kl(after, best).max() < 0.01
    assert (objective / (beta * log_z)).tolist() == pytest.approx([1.0, 1.0], abs=0.01)
