"""Size of the KV cache of a model, from its config.json."""

from __future__ import annotations

from verl.utils.byte_size import GIB, MIB
from verl.utils.model_dir.model_files import ModelFiles

# vLLM's block size on a CPU, in tokens.
_CPU_BLOCK_TOKENS = 128
_MIN_CPU_CACHE, _MAX_CPU_CACHE = 64 * MIB, 4 * GIB


def kv_bytes_per_token(model: ModelFiles, itemsize: int, tensor_parallel: int = 1) -> int:
    """Return the bytes of the keys and values of one token on one device, over all layers.

    With fewer key-value heads than devices, each device holds a copy of one head.

    Args:
        itemsize: bytes of one element of the cache.
        tensor_parallel: devices that share the heads.
    """
    heads = max(1, (model.kv_heads or 1) // tensor_parallel)
    return 2 * (model.layers or 0) * heads * (model.head_dim or 0) * itemsize


def cpu_kv_cache_bytes(model: ModelFiles, itemsize: int, tokens_per_request: int, max_requests: int) -> int:
    """Return the size of the KV cache that a replica reserves on a CPU: at least 64 MiB, at most 4 GiB.

    Between these bounds, `max_requests` requests of `tokens_per_request` tokens fit.
    """
    if not (model.layers and model.kv_heads and model.head_dim):
        return _MIN_CPU_CACHE
    blocks = -(-tokens_per_request // _CPU_BLOCK_TOKENS) * max_requests + 1
    wanted = blocks * _CPU_BLOCK_TOKENS * kv_bytes_per_token(model, itemsize)
    return min(max(wanted, _MIN_CPU_CACHE), _MAX_CPU_CACHE)
