"""One process with the whole batch, and several with a part of it each, whose weights may be sharded."""

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy, Strategy
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.nn.functional import pad
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM
from transformers.modeling_layers import GradientCheckpointingLayer

from rlhf_lightning.callbacks import HuggingFaceExport
from rlhf_lightning.errors import InputError
from rlhf_lightning.modules import PPOModule, RewardModule, SFTModule
from rlhf_lightning.modules.language import LanguageModule
from rlhf_lightning.modules.sharding import FSDP2Strategy, gathered_state
from rlhf_lightning.networks import LoRA, NetworkConfig
from rlhf_lightning.networks.sharding import shard, waits_for_others
from rlhf_lightning.types import ComparisonBatch, Experience, PromptBatch, Rollout, SFTBatch

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*have no `val_dataloader`.*"),
]

# torch's counter of communication hangs hooks on every module, and takes linear layers to pieces.
COUNTING = ("ignore:For backward hooks to be called", "ignore:FSDP2-wrapped module .* returned a view")

UPDATES = 20
STOPS = list(range(1, 258, 5))
ROWS = 8


class FSDPOnCPU(FSDPStrategy):
    """FSDP on a CPU: Lightning refuses its own class there, and no subclass; torch wants to be told the device."""

    def _setup_model(self, model: Any) -> Any:
        return FullyShardedDataParallel(model, device_id=torch.device("cpu"), **self.kwargs)


STRATEGIES: dict[str, Callable[[], Strategy]] = {
    "ddp": lambda: DDPStrategy(timeout=timedelta(seconds=60)),
    "fsdp2": FSDP2Strategy,
    "fsdp": lambda: FSDPOnCPU(
        timeout=timedelta(seconds=60), auto_wrap_policy=ModuleWrapPolicy([GradientCheckpointingLayer])
    ),
}


def rows_of(rank: int, count: int) -> slice:
    each = ROWS // count
    return slice(rank * each, (rank + 1) * each)


def sequences(seed: int) -> list[list[int]]:
    """Token rows of uneven length; those of the first processes are longer."""
    generator = torch.Generator().manual_seed(seed)
    lengths = [4 + 2 * (ROWS - i) + int(torch.randint(3, (1,), generator=generator)) for i in range(ROWS)]
    return [torch.randint(2, 258, (length,), generator=generator).tolist() for length in lengths]


def padded(rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    width = max(map(len, rows))
    tokens = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    return tokens, torch.arange(width) < torch.tensor([len(row) for row in rows]).unsqueeze(1)


def sft_batch(seed: int, rank: int, count: int) -> SFTBatch:
    tokens, mask = padded(sequences(seed)[rows_of(rank, count)])
    return SFTBatch(tokens=tokens, attention_mask=mask, loss_mask=mask & (torch.arange(mask.shape[1]) > 1))


def comparison_batch(seed: int, rank: int, count: int) -> ComparisonBatch:
    """Prompts with two responses, those of the last process with three, and one whose responses tie."""
    numbers = range(ROWS)[rows_of(rank, count)]
    responses = [3 if number >= ROWS // 2 else 2 for number in numbers]
    rows = [row for n, k in zip(numbers, responses, strict=True) for row in sequences(1000 * seed + n)[:k]]
    tokens, mask = padded(rows)
    places = [0 if number == 1 else place for number, k in zip(numbers, responses, strict=True) for place in range(k)]
    return ComparisonBatch(
        tokens=tokens,
        attention_mask=mask,
        response_mask=mask & (torch.arange(mask.shape[1]) > 1),
        prompt_index=torch.tensor([i for i, k in enumerate(responses) for _ in range(k)]),
        ranks=torch.tensor(places),
        ratings=torch.zeros(len(rows)),
    )


class Kept(LanguageModule):
    """Keeps the weights as they are at the end, whole on the first process."""

    def on_fit_end(self) -> None:
        state = gathered_state(self, self.network)
        self.final = {n: w.clone() for n, w in (self.network.state_dict() if state is None else state).items()}


class KeptSFT(Kept, SFTModule):
    def train_dataloader(self) -> Any:
        return self.loader([sft_batch(seed, self.global_rank, self.trainer.world_size) for seed in range(UPDATES)])


class KeptReward(Kept, RewardModule):
    def train_dataloader(self) -> Any:
        size = self.trainer.world_size
        return self.loader([comparison_batch(seed, self.global_rank, size) for seed in range(UPDATES)])


class KeptPPO(Kept, PPOModule):
    """Samples as ``copies`` processes do, each on its part of the batch."""

    copies = 1
    copy = 0
    rollouts = 4

    @property
    def global_rank(self) -> int:
        return self.copy if self.copies > 1 else super().global_rank

    def train_dataloader(self) -> Any:
        return self.loader([self.part] * self.rollouts)

    def generate(self, batch: PromptBatch, draw: int) -> Rollout:
        if self.copies == 1:
            return super().generate(batch, draw)
        found = []
        for copy in range(self.copies):
            self.copy = copy
            found.append(super().generate(batch.rows(torch.arange(ROWS)[rows_of(copy, self.copies)]), draw))
        return joined(found)

    def _accumulate_gradients(self, minibatch: Experience) -> dict[str, Tensor]:
        found = super()._accumulate_gradients(minibatch)
        self.losses_of_updates.append({name: float(x) for name, x in found.items()})
        return found


def joined(rollouts: list[Rollout]) -> Rollout:
    width = max(rollout.response_mask.shape[1] for rollout in rollouts)
    tensors = {name: [] for name, x in vars(rollouts[0]).items() if isinstance(x, Tensor)}
    for rollout in rollouts:
        more = width - rollout.response_mask.shape[1]
        for name, found in tensors.items():
            x = getattr(rollout, name)
            found.append(pad(x, (0, more)) if name not in ("prompt_tokens", "prompt_mask", "ended") else x)
    texts = {name: [x for r in rollouts for x in getattr(r, name)] for name in ("prompts", "texts", "responses")}
    return type(rollouts[0])(columns={}, **texts, **{name: torch.cat(found) for name, found in tensors.items()})


@pytest.fixture
def make(
    policy: Callable[..., Any],
    classifier: Callable[..., Any],
    tokenizer: Any,
    prompts: PromptBatch,
    make_loader: Callable[..., Any],
) -> Callable[..., Any]:
    """``make(stage, count)``: its module on ``count`` processes; ``copies`` of PPO sample in one process.

    ``adapted`` is what is trained in place of a whole policy or classifier.
    """

    def build(
        stage: str,
        count: int = 1,
        rank: int = 0,
        *,
        copies: int = 1,
        adapted: NetworkConfig | None = None,
        **settings: Any,
    ) -> Any:
        common = {"tokenizer": tokenizer, "learning_rate": 1e-3, **settings}
        if stage == "sft":
            module: Any = KeptSFT(adapted or policy(), **common)
        elif stage == "reward":
            module = KeptReward(adapted or classifier(), **common)
        else:
            network = adapted or policy()
            if not adapted:
                network.generation_config.eos_token_id = STOPS
            defaults = {
                "reward": classifier(seed=3),
                "critic_learning_rate": 1e-3,
                "ppo_epochs": 5,
                "minibatch_size": ROWS // count,
                "micro_batch_size": 2,
                "max_new_tokens": 8,
                "adaptive_kl_target": 0.1,
                "adaptive_kl_horizon": 100.0,
                "normalize_scores": "shift_and_scale",
                "ema_decay": 0.9,
            }
            module = KeptPPO(network, **{**defaults, **common})
            module.copies = copies
            module.losses_of_updates = []
            whole_batch = prompts.rows(torch.arange(ROWS) % 6)
            module.part = whole_batch.rows(torch.arange(ROWS)[rows_of(rank, count)])
        module.loader = make_loader
        return module

    return build


@pytest.fixture
def train(make: Callable[..., Any], trainer: Callable[..., Any], recorder: Callable[[], Any]) -> Callable[..., Any]:
    """``train(stage, count, rank, strategy)``, one process of ``count``: what was logged, and the weights."""

    def run(stage: str, count: int = 1, rank: int = 0, strategy: str = "", **settings: Any) -> dict[str, Any]:
        logged, module = recorder(), make(stage, count, rank, **settings)
        how = {"strategy": STRATEGIES[strategy](), "devices": count} if strategy else {}
        trainer(max_epochs=1, callbacks=[logged], **how).fit(module)
        updates = module.losses_of_updates if stage == "ppo" else []
        return {"steps": logged.steps, "updates": updates, "weights": module.final}

    return run


def assert_equal_runs(found: dict[str, Any], one: dict[str, Any]) -> None:
    for name in ("steps", "updates"):
        for step, expected in zip(found[name], one[name], strict=True):
            assert step == pytest.approx(expected, rel=1e-5, abs=1e-5)
    assert found["weights"].keys() == one["weights"].keys()
    for name, expected in one["weights"].items():
        torch.testing.assert_close(found["weights"][name], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("stage", "strategy"),
    [
        ("sft", "ddp"),
        ("reward", "ddp"),
        ("sft", "fsdp2"),
        ("reward", "fsdp2"),
        pytest.param("sft", "fsdp", marks=pytest.mark.proof),
        ("reward", "fsdp"),
    ],
)
def test_two_processes_train_as_one_with_both_parts_of_the_batch(
    stage: str, strategy: str, train: Callable[..., Any], processes: Callable[..., list[Any]]
) -> None:
    one = train(stage)
    found = processes(2, lambda rank: train(stage, 2, rank, strategy))
    assert len(one["steps"]) == UPDATES
    assert_equal_runs(found[0], one)


@pytest.mark.parametrize(
    ("stage", "strategy"),
    [
        ("sft", "ddp"),
        ("reward", "ddp"),
        ("sft", "fsdp2"),
        pytest.param("sft", "fsdp", marks=pytest.mark.proof),
    ],
)
def test_two_processes_that_pack_train_as_one_that_pads(
    stage: str, strategy: str, train: Callable[..., Any], processes: Callable[..., list[Any]]
) -> None:
    one = train(stage)
    found = processes(2, lambda rank: train(stage, 2, rank, strategy, packing=True))
    assert_equal_runs(found[0], one)


@pytest.mark.parametrize(
    ("strategy", "gather"),
    [("ddp", "auto"), pytest.param("fsdp2", "always", marks=pytest.mark.proof), ("fsdp2", "never")],
)
def test_ppo_on_two_processes_trains_as_one_with_both_rollouts(
    strategy: str, gather: str, train: Callable[..., Any], processes: Callable[..., list[Any]]
) -> None:
    one = train("ppo", copies=2)
    found = processes(2, lambda rank: train("ppo", 2, rank, strategy, gather_weights=gather))
    assert len(one["updates"]) == UPDATES
    assert_equal_runs(found[0], one)


@pytest.mark.parametrize(
    ("stage", "strategy"),
    [
        *((stage, "fsdp2") for stage in ("sft", "reward", "ppo")),
        *(pytest.param(stage, "ddp", marks=pytest.mark.proof) for stage in ("sft", "reward", "ppo")),
    ],
)
def test_adapters_train_on_two_processes_as_on_one(
    stage: str,
    strategy: str,
    wide_model: Path,
    tmp_path: Path,
    tokenizer: Any,
    train: Callable[..., Any],
    processes: Callable[..., list[Any]],
) -> None:
    base = AutoModelForCausalLM.from_pretrained(wide_model)
    base.generation_config.eos_token_id = STOPS
    base.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    settings = {"adapted": NetworkConfig(str(tmp_path), lora=LoRA(r=4))}
    one = train(stage, copies=2, **settings)
    found = processes(2, lambda rank: train(stage, 2, rank, strategy, **settings))
    assert_equal_runs(found[0], one)
    weights = {name.replace(".base_layer", ""): weight for name, weight in found[0]["weights"].items()}
    start = base.model.state_dict(prefix="model.")
    assert all(torch.equal(weights[name], weight) for name, weight in start.items())
    assert all(weight.any() for name, weight in weights.items() if "lora_B" in name)
    assert sum("lora_B" in name for name in weights) == 14


@pytest.mark.proof
@pytest.mark.parametrize(("stage", "strategy"), [(s, k) for k in ("ddp", "fsdp2") for s in ("sft", "reward", "ppo")])
def test_four_processes_train_as_one_with_all_parts_of_the_batch(
    stage: str, strategy: str, train: Callable[..., Any], processes: Callable[..., list[Any]]
) -> None:
    one = train(stage, copies=4)
    found = processes(4, lambda rank: train(stage, 4, rank, strategy), patience=300.0)
    assert_equal_runs(found[3], found[0] | {"weights": found[3]["weights"]})
    assert_equal_runs(found[0], one)


@pytest.mark.proof
def test_sharded_processes_end_the_updates_of_a_rollout_together(
    train: Callable[..., Any], processes: Callable[..., list[Any]]
) -> None:
    settings = {"target_kl": 3e-4, "learning_rate": 3e-3}
    one = train("ppo", copies=2, **settings)
    found = processes(2, lambda rank: train("ppo", 2, rank, "fsdp2", **settings))
    assert 4 < len(one["updates"]) < UPDATES
    assert_equal_runs(found[0], one)


@pytest.mark.parametrize(
    ("strategy", "rescore", "gather_weights"),
    [("fsdp2", True, "never"), ("fsdp2", False, "always"), ("fsdp2", False, "never"), ("ddp", False, "auto")],
)
def test_two_processes_train_a_critic_on_the_policys_trunk_as_one_does(
    strategy: str,
    rescore: bool,
    gather_weights: str,
    train: Callable[..., Any],
    processes: Callable[..., list[Any]],
) -> None:
    settings = {"critic": "shared_trunk", "rescore": rescore, "gather_weights": gather_weights, "ppo_epochs": 1}
    one = train("ppo", copies=2, **settings)
    found = processes(2, lambda rank: train("ppo", 2, rank, strategy, **settings))
    assert_equal_runs(found[0], one)


# What is sharded, and when it is whole ---------------------------------------


@pytest.mark.filterwarnings(*COUNTING)
def test_all_networks_of_ppo_are_sharded_and_gradients_travel_once_an_update(
    make: Callable[..., Any], trainer: Callable[..., Any], processes: Callable[..., list[Any]]
) -> None:
    def work(rank: int) -> Any:
        module = make("ppo", 2, rank, micro_batch_size=1, ppo_epochs=1)
        sent: list[int] = []

        class Counting(KeptPPO):
            def _accumulate_gradients(self, minibatch: Experience) -> dict[str, Tensor]:
                with CommDebugMode() as communication:
                    found = super()._accumulate_gradients(minibatch)
                counts = communication.get_comm_counts()
                sent.append(sum(count for kind, count in counts.items() if "reduce_scatter" in str(kind)))
                return found

        module.__class__ = Counting
        trainer(max_steps=1, strategy=FSDP2Strategy(), devices=2).fit(module)
        held = [
            sum(p.to_local().numel() for p in network.parameters()) / sum(p.numel() for p in network.parameters())
            for network in module.roles
        ]
        return len(module.roles), all(isinstance(p, DTensor) for p in module.parameters()), held, sent

    for networks, parts, held, sent in processes(2, work):
        assert (networks, parts) == (5, True)
        assert held == pytest.approx([0.5] * 5, abs=0.05)
        # Two layers and what is outside of them, of policy and critic, whatever the number of micro-batches.
        assert sent == [6]


@pytest.mark.parametrize(
    ("gather_weights", "free", "gathers"),
    [
        ("auto", [10**9, 10**9], True),
        ("auto", [10**9, 10**3], False),
        ("auto", [None, None], True),
        ("always", [10**3, 10**3], True),
        ("never", [10**9, 10**9], False),
    ],
)
def test_weights_are_gathered_for_a_rollout_where_they_fit_on_every_process(
    gather_weights: str,
    free: list[int | None],
    gathers: bool,
    make: Callable[..., Any],
    processes: Callable[..., list[Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def work(rank: int) -> bool:
        torch.distributed.init_process_group("gloo")
        monkeypatch.setattr("rlhf_lightning.modules.sharding.free_bytes", lambda device: free[rank])
        module = make("ppo", 2, rank, gather_weights=gather_weights)
        shard(module.policy, init_device_mesh("cpu", (2,)))
        with module._weights_for_sampling(module.part):
            return not waits_for_others(module.policy)

    assert processes(2, work) == [gathers, gathers]


def test_preflight_of_sharded_networks_finds_nothing_wrong_and_what_is_wrong(
    make: Callable[..., Any], trainer: Callable[..., Any], processes: Callable[..., list[Any]]
) -> None:
    def work(rank: int) -> str:
        module = make("ppo", 2, rank)
        if rank == 0:
            module.reference.model.norm.weight.data += 1.0
        with pytest.raises(InputError, match="KL to the reference") as error:
            trainer(max_steps=1, strategy=FSDP2Strategy(), devices=2).fit(module)
        return str(error.value)

    for found in processes(2, work):
        assert "model.norm.weight" in found


# What is written -------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["fsdp2", "fsdp"])
@pytest.mark.parametrize("tied", [True, False])
def test_the_export_of_sharded_weights_is_loaded_by_transformers_alone(
    strategy: str,
    tied: bool,
    tmp_path: Path,
    policy: Callable[..., Any],
    tokenizer: Any,
    trainer: Callable[..., Any],
    make_loader: Callable[..., Any],
    processes: Callable[..., list[Any]],
) -> None:
    def work(rank: int) -> dict[str, Tensor]:
        module = KeptSFT(policy(tie_word_embeddings=tied), tokenizer=tokenizer, learning_rate=1e-2)
        module.loader = make_loader
        how = {"strategy": STRATEGIES[strategy](), "devices": 2}
        trainer(max_steps=2, callbacks=[HuggingFaceExport(tmp_path / "out")], **how).fit(module)
        return module.final

    first, second = processes(2, work)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert second == {}
    assert type(loaded) is LlamaForCausalLM
    assert loaded.config.architectures == ["LlamaForCausalLM"]
    assert loaded.config.tie_word_embeddings is tied
    assert AutoTokenizer.from_pretrained(tmp_path / "out").eos_token_id == 1
    found = loaded.state_dict()
    for name, weight in first.items():
        assert torch.equal(found[name], weight)
    assert not torch.equal(found["lm_head.weight"], policy(tie_word_embeddings=tied).state_dict()["lm_head.weight"])
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith("out")) == ["out"]


@pytest.mark.parametrize("parts", [True, pytest.param(False, marks=pytest.mark.proof)])
def test_a_checkpoint_of_two_processes_goes_on_on_two_and_on_one(
    parts: bool,
    tmp_path: Path,
    make: Callable[..., Any],
    trainer: Callable[..., Any],
    processes: Callable[..., list[Any]],
) -> None:
    file = tmp_path / "half.ckpt"

    def short(count: int, rank: int, copies: int) -> KeptPPO:
        module: KeptPPO = make("ppo", count, rank, copies=copies, ppo_epochs=1, lr_schedule="constant")
        module.rollouts = 2
        return module

    def save(rank: int) -> dict[str, Any]:
        module = short(2, rank, 1)
        run = trainer(max_epochs=1, strategy=FSDP2Strategy(save_distributed_checkpoint=parts), devices=2)
        run.fit(module)
        run.save_checkpoint(file)
        return module.final

    def go_on(rank: int, count: int, strategy: Any) -> dict[str, Any]:
        module = short(count, rank, 3 - count)
        trainer(max_epochs=2, strategy=strategy, devices=count).fit(module, ckpt_path=file, weights_only=True)
        counters = {"beta": module.beta, "made": module.updates, "seen": vars(module.seen_scores)}
        return {"steps": [counters["seen"]], "updates": module.losses_of_updates, "weights": module.final} | counters

    ended = processes(2, save)[0]
    assert file.is_dir() is parts
    two = processes(2, lambda rank: go_on(rank, 2, FSDP2Strategy()))[0]
    (one,) = processes(1, lambda rank: go_on(rank, 1, FSDP2Strategy()))
    assert len(one["updates"]) == 2
    assert one["made"] == two["made"] == 4
    assert_equal_runs(one, two)
    assert one["beta"] == pytest.approx(two["beta"])
    assert any(not torch.equal(weight, one["weights"][name]) for name, weight in ended.items())
    if not parts:
        assert_equal_runs(go_on(0, 1, "auto"), two)


# What is refused -------------------------------------------------------------


def test_ppo_refuses_fsdp_before_anything_else(make: Callable[..., Any], trainer: Callable[..., Any]) -> None:
    with pytest.raises(InputError, match=r"strategy=FSDPOnCPU cannot run PPO: FSDP wraps .* Use trainer=fsdp2"):
        trainer(max_steps=1, strategy=FSDPOnCPU(), devices=1).fit(make("ppo"))


@pytest.mark.parametrize("strategy", ["fsdp2", "fsdp"])
@pytest.mark.parametrize("setting", [{"lm_coef": 0.1}, {"share_prompts": True}, {"packing": True}])
def test_what_reads_parts_of_a_reward_model_is_refused_where_weights_are_sharded(
    setting: dict[str, Any],
    strategy: str,
    classifier: Callable[..., Any],
    tokenizer: Any,
    trainer: Callable[..., Any],
    processes: Callable[..., list[Any]],
) -> None:
    def work(rank: int) -> str:
        module = RewardModule(classifier(tie_word_embeddings=True), tokenizer=tokenizer, **setting)
        with pytest.raises(InputError) as error:
            trainer(max_steps=1, strategy=STRATEGIES[strategy](), devices=1).fit(module, [])
        return str(error.value)

    (found,) = processes(1, work)
    ((name, value),) = setting.items()
    assert found.startswith(f"{name}={value} reads parts of the network outside of its forward")
    assert "trainer=ddp" in found


def test_tensor_parallelism_is_refused(make: Callable[..., Any], trainer: Callable[..., Any], processes: Any) -> None:
    def work(rank: int) -> str:
        with pytest.raises(InputError) as error:
            trainer(max_steps=1, strategy=ModelParallelStrategy(), devices=2).fit(make("sft", 2, rank))
        return str(error.value)

    for found in processes(2, work):
        assert "ModelParallelStrategy(tensor_parallel_size=2)" in found
        assert "data_parallel_size=2" in found
