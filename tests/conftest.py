"""What every test runs under: no network, one thread, and a tiny Hugging Face folder where one is needed."""

import os

# Before torch and transformers are imported: they read these once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["WANDB_MODE"] = "offline"
os.environ["WANDB_SILENT"] = "true"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import multiprocessing
import multiprocessing.connection
import socket
import struct
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

# The first call of a torch function takes longer than hypothesis allows; the same examples every time.
settings.register_profile("torch", deadline=None, derandomize=True, database=None)
settings.load_profile("torch")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder: a Llama of two layers with random weights, and a tokenizer of one token per byte."""
    return save_llama(tmp_path_factory.mktemp("models") / "tiny", hidden_size=16, intermediate_size=32)


@pytest.fixture(scope="session")
def flash_by_lengths() -> str:
    """The name of an attention that is told of packed sequences as FlashAttention is, and computes on any device."""
    import torch
    from torch.nn.functional import scaled_dot_product_attention
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import flash_attention_mask

    def attend(
        module: Any, query: Any, key: Any, value: Any, attention_mask: Any, scaling: float | None = None, **told: Any
    ) -> tuple[Any, None]:
        # Padding on the right, which a mask of two axes is of, is read by nothing that counts.
        assert attention_mask is None or attention_mask.dim() == 2
        ends = told.get("cu_seq_lens_q", torch.tensor([0, query.shape[2]]))
        assert len(ends) == 2 or len(query) == 1
        sizes = ends.diff().tolist()
        parts = zip(*(x.split(sizes, dim=2) for x in (query, key, value)), strict=True)
        found = [scaled_dot_product_attention(*part, is_causal=True, scale=scaling) for part in parts]
        return torch.cat(found, dim=2).transpose(1, 2), None

    AttentionInterface.register("flash_by_lengths", attend)
    AttentionMaskInterface.register("flash_by_lengths", flash_attention_mask)
    return "flash_by_lengths"


@pytest.fixture(scope="session")
def wide_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, wide enough for blocks of 64 weights, as 4 bits need, and with weights that tell tokens apart."""
    folder = tmp_path_factory.mktemp("models") / "wide"
    return save_llama(folder, hidden_size=64, intermediate_size=128, initializer_range=0.1)


def save_llama(folder: Path, **settings: Any) -> Path:
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<eos>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=256,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
        **settings,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>").save_pretrained(folder)
    return folder


@pytest.fixture
def processes(tmp_path: Path) -> Callable[..., list[Any]]:
    """``processes(count, work)`` returns what ``work(rank)`` returns in each of the processes, as torchrun starts them.

    A process that fails, or does not end, fails the test.
    """

    def run(count: int, work: Callable[[int], Any], *, patience: float = 120.0) -> list[Any]:
        import torch

        folder, port = Path(tempfile.mkdtemp(dir=tmp_path)), free_port()
        fork = multiprocessing.get_context("fork")
        started = [fork.Process(target=enter, args=(rank, count, port, work, folder)) for rank in range(count)]
        for process in started:
            process.start()
        ends = time.monotonic() + patience
        while time.monotonic() < ends and any(p.exitcode is None for p in started):
            if any(p.exitcode for p in started):
                break
            multiprocessing.connection.wait([p.sentinel for p in started if p.exitcode is None], timeout=1.0)
        codes = [process.exitcode for process in started]
        for process in started:
            process.kill()
            process.join()
        assert codes == [0] * count, "\n".join(file.read_text() for file in sorted(folder.glob("*.txt")))
        return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(count)]

    return run


def enter(rank: int, count: int, port: int, work: Callable[[int], Any], folder: Path) -> None:
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "GROUP_RANK": 0}
    names |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "tests"}
    os.environ.update({name: str(value) for name, value in names.items()})
    try:
        import torch

        torch.save(work(rank), folder / f"{rank}.pt")
    except BaseException:
        (folder / f"{rank}.txt").write_text(f"process {rank}\n{traceback.format_exc()}")
        raise


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@pytest.fixture
def port() -> int:
    """A port of this machine that nobody listens on."""
    return free_port()


@pytest.fixture
def without_tensorboard(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let Lightning find neither of the packages that write TensorBoard's files."""
    for name in ("_TENSORBOARD_AVAILABLE", "_TENSORBOARDX_AVAILABLE"):
        monkeypatch.setattr(f"lightning.fabric.loggers.tensorboard.{name}", False)


@pytest.fixture(scope="session")
def wandb_records() -> Callable[[Path], list[Any]]:
    """A function that returns the records of a finished offline run of Weights & Biases from the run's folder."""

    def read(run_folder: Path) -> list[Any]:
        import wandb
        from wandb.proto import wandb_internal_pb2

        # finish() may return before its service has written the file; the end of the service is the end of the writing.
        wandb.teardown()
        (file,) = run_folder.glob("*.wandb")
        return [wandb_internal_pb2.Record.FromString(entry) for entry in log_entries(file.read_bytes())]

    return read


def log_entries(data: bytes) -> Iterator[bytes]:
    """Yield the entries of a log in LevelDB's format: blocks of 32 KiB; checksum, length and kind before each part."""
    block, header, whole, last = 32768, 7, 1, 4
    position, entry = 7, b""  # behind W&B's own header of the file
    while position < len(data):
        if block - position % block < header:
            position += block - position % block
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        position += header + length
        entry += data[position - length : position]
        if kind in (whole, last):
            yield entry
            entry = b""
