"""Calibration prompts: the package's texts, the user's files, and files that cannot be used."""

import pytest

from fixtures.data_files import WRITERS, ids_of, parquet, row
from fixtures.tiny import write_char_tokenizer
from verl.precision.calibration import SHIPPED, data_prompts, shipped_prompts
from verl.utils.tokenizer import hf_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return hf_tokenizer(write_char_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def test_texts_of_the_package(tokenizer):
    texts = SHIPPED.read_text(encoding="utf-8").strip().split("\n\n")
    assert len(texts) > 10 and all(len(text) > 60 for text in texts)
    prompts = shipped_prompts(tokenizer, 600)
    assert sum(map(len, prompts)) == 600 and max(map(len, prompts)) <= 256
    assert prompts[0] == tokenizer(texts[0])["input_ids"][:256]


@pytest.mark.parametrize("name", WRITERS)
def test_prompts_of_data_files(tokenizer, tmp_path, name):
    file = WRITERS[name](tmp_path / name, [row("cat", 0), row("horse", 1), row("dog", 2)])
    assert data_prompts([str(file)], tokenizer, 100, "prompt") == [ids_of(text) for text in ("cat", "horse", "dog")]
    assert data_prompts([str(file)], tokenizer, 7, "prompt") == [ids_of("cat"), ids_of("horse")[:2]]


def test_long_prompts_are_cut(tokenizer, tmp_path):
    file = parquet(tmp_path / "data.parquet", [row("ab" * 300), row("cat")])
    first, second = data_prompts([str(file)], tokenizer, 1000, "prompt")
    assert first == ids_of("ab" * 300)[:256] and second == ids_of("cat")


def test_file_without_rows_is_rejected(tokenizer, tmp_path):
    file = tmp_path / "data.jsonl"
    file.write_text("")
    with pytest.raises(ValueError, match=r"data\.jsonl is empty"):
        data_prompts([str(file)], tokenizer, 100, "prompt")


def test_missing_column_is_rejected(tokenizer, tmp_path):
    file = parquet(tmp_path / "data.parquet", [row("cat")])
    with pytest.raises(ValueError, match=r"has no column 'question'.*data\.prompt_key"):
        data_prompts([str(file)], tokenizer, 100, "question")


def test_damaged_file_is_rejected(tokenizer, tmp_path):
    file = parquet(tmp_path / "data.parquet", [row("cat")])
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(ValueError, match="is not a complete Parquet file"):
        data_prompts([str(file)], tokenizer, 100, "prompt")
