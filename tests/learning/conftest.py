"""A language model so small that all of its responses can be listed, and its training."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning import Callback, Trainer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from rlhf_lightning.data import PPODataModule
from rlhf_lightning.modules import PPOModule

PAD, END = 0, 1
PROMPTS = ["a", "bca"]
"""Of different length: one of them is padded."""


@dataclass
class LastTokens:
    """What a `Table` keeps between two tokens, as the cache of a transformer."""

    tokens: Tensor

    def batch_select_indices(self, rows: Tensor) -> None:
        self.tokens = self.tokens[rows]


class Table(nn.Module):
    """The body: a row of its own for each context of four tokens, where a token that the mask leaves out is none."""

    window = 4

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.none = vocabulary
        self.rows = nn.Embedding((vocabulary + 1) ** self.window, vocabulary)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, past_key_values: LastTokens | None = None, **_: Any
    ) -> SimpleNamespace:
        tokens = input_ids.masked_fill(attention_mask[:, -input_ids.shape[1] :] == 0, self.none)
        start = tokens.new_full((len(tokens), self.window - 1), self.none)
        tokens = torch.cat([start if past_key_values is None else past_key_values.tokens, tokens], dim=1)
        places = (self.none + 1) ** torch.arange(self.window)
        hidden = self.rows((tokens.unfold(1, self.window, 1) * places).sum(dim=-1))
        return SimpleNamespace(last_hidden_state=hidden, past_key_values=LastTokens(tokens[:, 1 - self.window :]))


class TableLanguageModel(nn.Module):
    """What the package needs of a causal language model; the rows of the table are the logits.

    It learns in a hundred rollouts what a transformer takes thousands for: no two contexts share a weight.
    """

    dtype = torch.float32
    device = torch.device("cpu")

    def __init__(self, vocabulary: int, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.base_model = Table(vocabulary)
        sizes = {"hidden_size": vocabulary, "vocab_size": vocabulary, "max_position_embeddings": 64}
        text_config = SimpleNamespace(**sizes, attribute_map={})
        self.config = SimpleNamespace(get_text_config=lambda: text_config)
        self.generation_config = SimpleNamespace(eos_token_id=END)

    def forward(self, logits_to_keep: int = 0, **inputs: Any) -> SimpleNamespace:
        output = self.base_model(**inputs)
        logits = output.last_hidden_state[:, -logits_to_keep:]
        return SimpleNamespace(logits=logits, past_key_values=output.past_key_values)


class Quiet(PPOModule):
    """Keeps what it logs itself: Lightning's log takes longer than all the rest of a rollout as small as these."""

    def log(self, name: str, value: Tensor, **_: Any) -> None:  # type: ignore[override]
        self.logged.setdefault(name, []).append(float(value))


class Enumerable:
    """A policy, two prompts, and all responses to them that it can sample."""

    def __init__(self, folder: Path, *, letters: str, max_new_tokens: int, seed: int) -> None:
        tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(["<pad>", "<end>", *letters])}, merges=[]))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        self.tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>")
        self.vocabulary = 2 + len(letters)
        self.max_new_tokens = max_new_tokens
        self.folder = folder
        self.seed = seed
        self.policy = TableLanguageModel(self.vocabulary, seed)
        # The padding token can be sampled as any other: it counts by its place, and no text shows it.
        self.responses = self.all_responses([])
        self.ended = torch.tensor([END in response for response in self.responses])
        self.texts = [str(self.tokenizer.decode([i for i in r if i > END])) for r in self.responses]

    def all_responses(self, start: list[int]) -> list[list[int]]:
        if END in start or len(start) == self.max_new_tokens:
            return [start]
        return [response for token in range(self.vocabulary) for response in self.all_responses([*start, token])]

    @torch.no_grad()
    def logprobs(self) -> Tensor:
        """(2, N) log-probabilities of all N responses to both prompts, token by token and without padding."""
        return torch.stack([self._logprobs(self.tokenizer(prompt).input_ids) for prompt in PROMPTS])

    def _logprobs(self, prompt: list[int]) -> Tensor:
        found = torch.zeros(len(self.responses)).double()
        for length in range(1, self.max_new_tokens + 1):
            rows = [i for i, response in enumerate(self.responses) if len(response) == length]
            tokens = torch.tensor([prompt + self.responses[i] for i in rows])
            logits = self.policy(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits
            predicted = logits[:, -length - 1 : -1].double().log_softmax(-1)
            found[rows] = predicted.gather(2, tokens[:, -length:].unsqueeze(2)).squeeze(2).sum(dim=1)
        return found

    def scores(self, reward: Callable[[str, str], float]) -> Tensor:
        """(2, N) what a reward says of all responses to both prompts."""
        return torch.tensor([[reward(prompt, text) for text in self.texts] for prompt in PROMPTS]).double()

    def fit(
        self,
        reward: Callable[[str, str], float],
        *,
        prompts: int,
        rollouts: int,
        callbacks: Any = None,
        **settings: Any,
    ) -> dict[str, list[float]]:
        """Train the policy by `PPOModule` on rollouts of so many prompts, one half each; return what it logged."""
        module = Quiet(
            self.policy,
            reward=lambda prompts, responses: [reward(*pair) for pair in zip(prompts, responses, strict=True)],
            tokenizer=self.tokenizer,
            max_new_tokens=self.max_new_tokens,
            seed=self.seed,
            micro_batch_size=4096,
            max_grad_norm=math.inf,
            value_clip_range=math.inf,
            **settings,
        )
        module.logged = {}
        rows = [{"prompt": prompt} for prompt in PROMPTS] * (prompts // 2)
        data = PPODataModule(rows, val_fraction=0.0, batch_size=prompts, tokenizer=self.tokenizer)
        trainer = Trainer(
            accelerator="cpu",
            devices=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            num_sanity_val_steps=0,
            max_epochs=rollouts,
            default_root_dir=self.folder,
            callbacks=callbacks or [],
        )
        trainer.fit(module, data)
        return dict(module.logged)


class AfterEachRollout(Callback):
    """Calls a function after every rollout's updates."""

    def __init__(self, function: Callable[[], None]) -> None:
        self.function = function

    def on_train_batch_end(self, *_: Any) -> None:
        self.function()


@pytest.fixture
def enumerable(tmp_path: Path) -> Callable[..., Enumerable]:
    """``enumerable(letters="abc", max_new_tokens=2, seed=0)``."""
    return lambda **settings: Enumerable(tmp_path, **settings)


@pytest.fixture
def after_each_rollout() -> Callable[[Callable[[], None]], Callback]:
    """A callback that calls a function after every rollout's updates."""
    return AfterEachRollout
