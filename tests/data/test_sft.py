import json
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

from rlhf_lightning.data import SFTDataModule
from rlhf_lightning.errors import InputError
from rlhf_lightning.types import SFTBatch

EOS = 2


def whole(data: SFTDataModule) -> SFTBatch:
    data.setup("fit")
    data.batch_size = len(data.train_items)
    return next(iter(data.train_dataloader()))


def learnt(batch: SFTBatch, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    return [tokenizer.decode(row[mask]) for row, mask in zip(batch.tokens, batch.loss_mask, strict=True)]


def test_the_response_and_its_end_token_are_learnt(tokenizer: PreTrainedTokenizerBase) -> None:
    rows = [{"prompt": "Count.", "response": "1 2 3"}, {"prompt": "Say hello.", "response": "Hello"}]
    batch = whole(SFTDataModule(rows, tokenizer=tokenizer, val_fraction=0))
    assert sorted(learnt(batch, tokenizer)) == ["1 2 3<eos>", "Hello<eos>"]


def test_rows_of_different_shapes_may_stand_in_one_file(chat_tokenizer: PreTrainedTokenizerBase) -> None:
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    rows = [{"prompt": "Count.", "response": "1"}, {"messages": messages}, {"text": "abc"}]
    batch = whole(SFTDataModule(rows, tokenizer=chat_tokenizer, val_fraction=0))
    assert sorted(learnt(batch, chat_tokenizer)) == ["1<eos>", "abc<eos>", "yo<eos>"]


def test_a_tokenizer_that_pads_with_the_end_token_still_learns_the_end(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.pad_token = tokenizer.eos_token
    rows = [{"prompt": "Count.", "response": "1 2 3"}, {"prompt": "a", "response": "b"}]
    batch = whole(SFTDataModule(rows, tokenizer=tokenizer, val_fraction=0))
    assert sorted(learnt(batch, tokenizer)) == ["1 2 3<eos>", "b<eos>"]
    lasts = batch.attention_mask.sum(dim=1) - 1
    assert batch.tokens[range(2), lasts].tolist() == [EOS, EOS]
    assert batch.loss_mask[range(2), lasts].all()


def test_the_prompt_template_surrounds_the_prompt_and_is_not_learnt(tokenizer: PreTrainedTokenizerBase) -> None:
    rows = [{"prompt": "Count.", "response": "1"}]
    batch = whole(SFTDataModule(rows, tokenizer=tokenizer, prompt_template="Q: {prompt} A: "))
    assert tokenizer.decode(batch.tokens[0]) == "<bos>Q: Count. A: 1<eos>"
    assert learnt(batch, tokenizer) == ["1<eos>"]


def test_a_long_text_is_cut_into_blocks_and_no_token_is_lost(tokenizer: PreTrainedTokenizerBase) -> None:
    text = "".join(chr(ord("a") + i % 26) for i in range(100))
    data = SFTDataModule([{"text": text}], tokenizer=tokenizer, max_length=16)
    data.setup("fit")
    assert max(map(len, data.train_items)) == 16
    assert "".join(tokenizer.decode(item.tokens[1:]) for item in data.train_items) == text + "<eos>"


def test_grouping_by_length_saves_padding(tokenizer: PreTrainedTokenizerBase) -> None:
    rows = [{"text": "a" * (1 + 7 * i % 50)} for i in range(100)]

    def padding(group_by_length: bool) -> int:
        data = SFTDataModule(rows, tokenizer=tokenizer, group_by_length=group_by_length)
        data.setup("fit")
        return sum(int((~batch.attention_mask).sum()) for batch in data.train_dataloader())

    assert padding(True) < padding(False) / 2


def test_natural_instructions_are_read_in_their_own_schema(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    task = {
        "Definition": "Double the number.",
        "Positive Examples": [{"input": "1", "output": "2"}],
        "Instances": [{"input": "4", "output": ["8", "eight"]}],
    }
    for split in ("train", "test"):
        (tmp_path / f"{split}.json").write_text(json.dumps(task))
    data = SFTDataModule(tmp_path, format="natural_instructions", val_split="test", examples=1, tokenizer=tokenizer)
    batch = whole(data)
    assert learnt(batch, tokenizer) == ["8<eos>"]
    assert "Input: 1\nOutput: 2" in tokenizer.decode(batch.tokens[0])
    assert data.val_rows[0].fields["references"] == ["8", "eight"]


def test_natural_instructions_in_memory_are_an_error(tokenizer: PreTrainedTokenizerBase) -> None:
    data = SFTDataModule([{"text": "a"}], format="natural_instructions", tokenizer=tokenizer)
    with pytest.raises(InputError, match=r"data\.path must be a file or a folder"):
        data.setup("fit")


def test_real_instructions_fit_the_model_that_is_to_learn_them(
    stories_tokenizer: PreTrainedTokenizerBase, real_data: Path
) -> None:
    data = SFTDataModule(real_data / "instructions" / "short", tokenizer=stories_tokenizer, split="sft", max_length=512)
    data.setup("fit")
    assert len(data.train_items) + len(data.val_items) == 1100
    for item in data.train_items:
        assert (item.tokens[-1], item.tokens[0]) == (stories_tokenizer.eos_token_id, stories_tokenizer.bos_token_id)
