"""The world's network: a tokenizer trained on its text, and a small Llama with random weights."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from rlhf_lightning.errors import InputError

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

PAD, END, BEGIN = SPECIAL_TOKENS = ("<|pad|>", "<|end|>", "<|begin|>")
"""Their ids are 0, 1 and 2; a text is encoded with the last one before it and nothing after it."""
POSITIONS = 256
"""Longest sequence in tokens."""
BYTES = 256
"""Tokens that stand for one byte, which make every text representable."""


def build_tokenizer(texts: Iterable[str], *, vocab_size: int = 1024) -> "PreTrainedTokenizerFast":
    """Return a byte-level BPE trained on ``texts``; it decodes every text to exactly what was encoded.

    Raises `InputError` where ``vocab_size`` does not hold the single bytes and the special tokens.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    smallest = BYTES + len(SPECIAL_TOKENS)
    if vocab_size < smallest:
        raise InputError(f"vocab_size={vocab_size} must be at least {smallest}: the bytes and the special tokens")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A",
        pair=f"{BEGIN} $A {BEGIN} $B",
        special_tokens=[(BEGIN, tokenizer.token_to_id(BEGIN))],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        bos_token=BEGIN,
        model_max_length=POSITIONS,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )


def build_network(
    tokenizer: "PreTrainedTokenizerFast", *, hidden_size: int = 128, layers: int = 4, heads: int = 4, seed: int
) -> "LlamaForCausalLM":
    """Return a small Llama with random weights that samples from its whole distribution.

    Raises `InputError` where the heads do not share the hidden size evenly.
    """
    import torch
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    if hidden_size % (2 * heads):
        raise InputError(f"hidden_size={hidden_size} must be a multiple of 2 * heads={2 * heads} (rotary positions)")
    tokens = {
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=3 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=POSITIONS,
        tie_word_embeddings=True,
        # The usual 0.02 is for networks a hundred times wider: here layers would add next to nothing for long.
        initializer_range=0.6 * hidden_size**-0.5,
        **tokens,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = LlamaForCausalLM(config)
    network.generation_config = GenerationConfig(do_sample=True, top_k=0, **tokens)
    return network
