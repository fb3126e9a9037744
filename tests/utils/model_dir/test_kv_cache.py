from pathlib import Path

import pytest

from verl.utils.model_dir.kv_cache import cpu_kv_cache_bytes, kv_bytes_per_token
from verl.utils.model_dir.model_files import ModelFiles

CONFIG = {"num_hidden_layers": 3, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 16}


def model(**changes):
    return ModelFiles(Path("model"), CONFIG, CONFIG | changes, None, None, None)


@pytest.mark.parametrize(("tensor_parallel", "heads"), [(1, 4), (2, 2), (4, 1), (8, 1)])
def test_kv_bytes_per_token_on_one_device(tensor_parallel, heads):
    assert kv_bytes_per_token(model(), 2, tensor_parallel) == 2 * 3 * heads * 16 * 2


def test_cpu_kv_cache_bytes_is_bounded_below_and_above():
    token = 2 * 3 * 4 * 16 * 4
    # 1000 requests of 129 tokens take 2 blocks of 128 tokens each; one more block is always there
    assert cpu_kv_cache_bytes(model(), 4, 129, 1000) == 2001 * 128 * token
    assert cpu_kv_cache_bytes(model(), 4, 1, 1) == 64 * 2**20
    assert cpu_kv_cache_bytes(model(), 4, 10**6, 10**6) == 4 * 2**30
    assert cpu_kv_cache_bytes(ModelFiles(Path("model"), {}, {}, None, None, None), 4, 129, 1000) == 64 * 2**20
