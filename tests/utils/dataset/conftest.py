"""A tokenizer for the tests of this folder."""

import pytest

from fixtures.tiny import write_char_tokenizer
from verl.utils.tokenizer import hf_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return hf_tokenizer(write_char_tokenizer(tmp_path_factory.mktemp("tokenizer")))
