"""Against a proxy the true reward rises first and then falls (Gao et al. 2022): the proxy is gold plus a fixed error.

What a proxy likes best must owe that to an error: the errors of the best of n have heavy tails, those of training a
blind spot.
"""

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf_lightning.evaluation.best_of_n import best_of_n_kl

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*have no `val_dataloader`.*"),
]


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def kl(p: Tensor, q: Tensor) -> Tensor:
    return torch.special.xlogy(p, p / q).sum(dim=-1).clamp(min=0.0)  # rounding may leave it below 0


# The best of n, exactly ---------------------------------------------------

# Of a large n the best is always the same response; a hundred prompts make its gold reward no chance.
ROWS, RESPONSES = 100, 2_000


def best_of_n_policies(reference: Tensor, proxy: Tensor) -> list[Tensor]:
    """The best of n by the proxy, whose values all differ: F(<= proxy)^n - F(< proxy)^n, n from 1 to 2^20."""
    order = proxy.argsort(dim=1)
    start = torch.zeros(len(reference), 1).double()
    through = torch.cat([start, reference.gather(1, order).cumsum(dim=1)], dim=1)
    back = order.argsort(dim=1)
    return [(through ** (2**power)).diff(dim=1).gather(1, back) for power in range(21)]


def means(family: list[Tensor], of: Tensor) -> Tensor:
    """The mean over prompts of what each policy is worth."""
    return torch.stack([(policy * of).sum(dim=1).mean() for policy in family])


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_along_the_best_of_n_the_gold_reward_rises_and_falls_with_the_distance_and_the_proxy_never_falls(
    seed: int,
) -> None:
    scores, gold, errors = random(seed, 3, ROWS, RESPONSES)
    reference, proxy = scores.softmax(-1), gold + 0.3 * errors**3
    policies = best_of_n_policies(reference, proxy)
    distances = torch.stack([kl(policy, reference).mean() for policy in policies]).sqrt()
    golds = means(policies, gold)
    assert (distances.diff() > -1e-6).all()
    assert (means(policies, proxy).diff() > -1e-6).all()
    peak = int(golds.argmax())
    gained, lost = golds[peak] - golds[0], golds[peak] - golds[-1]
    # In standard deviations of the gold reward.
    assert gained > 0.5
    assert lost > gained / 2
    assert 0 < distances[peak] < distances[-1]


def test_along_the_best_of_n_for_the_gold_reward_itself_it_never_falls() -> None:
    scores, gold = random(0, 2, ROWS, RESPONSES)
    golds = means(best_of_n_policies(scores.softmax(-1), gold), gold)
    assert (golds.diff() > -1e-6).all()
    assert golds[-1] > golds[0] + 1


def test_the_best_of_n_is_as_far_away_as_the_formula_says_while_n_is_small_to_the_number_of_responses() -> None:
    scores, proxy = random(0, 2, 1, 100_000)
    for power, policy in enumerate(best_of_n_policies(scores.softmax(-1), proxy)):
        found, bound = float(kl(policy, scores.softmax(-1))), best_of_n_kl(2**power)
        assert found <= bound + 1e-9
        if 2**power <= 64:
            assert found == pytest.approx(bound, abs=1e-3)


# Training --------------------------------------------------------------------

LETTERS = "abcdef"
PROMPTS = ["a", "bca"]


def rewards(seed: int, error: float) -> tuple[Callable[[str, str], float], Callable[[str, str], float]]:
    """Gold and proxy: the gold reward adds up its letters' worth, from -1 for an a to 1 for an f.

    The proxy errs by noise everywhere, and has a blind spot for each prompt: 33 times the noise too much for one
    response of two letters. Which one is chance, among those that are no better than the average.
    """
    generator = torch.Generator().manual_seed(seed)
    errors: dict[tuple[str, str], float] = {}

    def gold(prompt: str, response: str) -> float:
        return sum(LETTERS.index(letter) / 2.5 - 1 for letter in response)

    poor = [pair for pair in map("".join, product(LETTERS, repeat=2)) if gold("", pair) <= 0]
    blind_spots = {prompt: poor[int(torch.randint(len(poor), (), generator=generator))] for prompt in PROMPTS}

    def proxy(prompt: str, response: str) -> float:
        key = prompt, response
        if key not in errors:
            noise = torch.randn((), generator=generator).item()
            errors[key] = noise + 100 / 3 * (response == blind_spots[prompt])
        return gold(prompt, response) + error * errors[key]

    return gold, proxy


@pytest.fixture
def trained_path(
    enumerable: Callable[..., Any], after_each_rollout: Callable[..., Any]
) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """Train against a proxy without a KL penalty; return distance, gold and proxy after each rollout, all exact."""

    def run(*, seed: int, error: float) -> tuple[Tensor, Tensor, Tensor]:
        space = enumerable(letters=LETTERS, max_new_tokens=2, seed=seed)
        gold, proxy = rewards(seed, error)
        golds, proxies, before = space.scores(gold), space.scores(proxy), space.logprobs().exp()
        path: list[Tensor] = []

        def look() -> None:
            policy = space.logprobs().exp()
            distance = kl(policy, before).mean().sqrt()
            path.append(torch.stack([distance, *((policy * of).sum(dim=1).mean() for of in (golds, proxies))]))

        look()
        space.fit(
            proxy,
            beta=0.0,
            missing_eos="subtract",
            missing_eos_penalty=0.0,
            prompts=512,
            minibatch_size=512,
            ppo_epochs=1,
            learning_rate=0.05,
            critic_learning_rate=0.05,
            lr_schedule="constant",
            rollouts=100,
            callbacks=[after_each_rollout(look)],
        )
        distances, gold_path, proxy_path = torch.stack(path).T
        return distances, gold_path, proxy_path

    return run


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_training_against_a_proxy_raises_the_gold_reward_and_then_loses_it(
    trained_path: Callable[..., tuple[Tensor, Tensor, Tensor]], seed: int
) -> None:
    distances, golds, proxies = trained_path(seed=seed, error=0.3)
    peak = int(golds.argmax())
    gained, lost = golds[peak] - golds[0], golds[peak] - golds[-1]
    assert gained > 0.1
    assert lost > gained / 2
    assert distances[0] < distances[peak] < distances[-1]
    assert proxies[0] < proxies[peak] < proxies[-1]


def test_training_against_the_gold_reward_itself_loses_none_of_it(
    trained_path: Callable[..., tuple[Tensor, Tensor, Tensor]],
) -> None:
    _, golds, _ = trained_path(seed=0, error=0.0)
    assert golds.max() - golds[-1] < 0.01
    assert golds[-1] > golds[0] + 1
