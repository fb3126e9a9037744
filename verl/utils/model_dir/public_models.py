"""The fields of public models' config.json that checks read, so that scripts can be checked without the model."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

_KEYS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
_QWEN3 = {"model_type": "qwen3", "vocab_size": 151936, "head_dim": 128, "max_position_embeddings": 40960}
_QWEN3_MOE = _QWEN3 | {"model_type": "qwen3_moe", "num_experts": 128, "num_experts_per_tok": 8}
_QWEN2 = {"model_type": "qwen2", "vocab_size": 151936, "max_position_embeddings": 32768}
_QWEN2_LARGE = _QWEN2 | {"vocab_size": 152064}
_TIED = {"tie_word_embeddings": True}
_SIZES: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "Qwen2.5-0.5B": (_QWEN2 | _TIED, (896, 4864, 24, 14, 2)),
    "Qwen2.5-1.5B": (_QWEN2 | _TIED, (1536, 8960, 28, 12, 2)),
    "Qwen2.5-3B": (_QWEN2 | _TIED, (2048, 11008, 36, 16, 2)),
    "Qwen2.5-7B": (_QWEN2_LARGE, (3584, 18944, 28, 28, 4)),
    "Qwen2.5-14B": (_QWEN2_LARGE, (5120, 13824, 48, 40, 8)),
    "Qwen2.5-32B": (_QWEN2_LARGE, (5120, 27648, 64, 40, 8)),
    "Qwen2.5-72B": (_QWEN2_LARGE, (8192, 29568, 80, 64, 8)),
    "Qwen2.5-Math-1.5B": (_QWEN2 | _TIED | {"max_position_embeddings": 4096}, (1536, 8960, 28, 12, 2)),
    "Qwen2.5-Math-7B": (_QWEN2_LARGE | {"max_position_embeddings": 4096}, (3584, 18944, 28, 28, 4)),
    "Qwen3-0.6B": (_QWEN3 | _TIED, (1024, 3072, 28, 16, 8)),
    "Qwen3-1.7B": (_QWEN3 | _TIED, (2048, 6144, 28, 16, 8)),
    "Qwen3-4B": (_QWEN3 | _TIED, (2560, 9728, 36, 32, 8)),
    "Qwen3-8B": (_QWEN3, (4096, 12288, 36, 32, 8)),
    "Qwen3-14B": (_QWEN3, (5120, 17408, 40, 40, 8)),
    "Qwen3-32B": (_QWEN3, (5120, 25600, 64, 64, 8)),
    "Qwen3-30B-A3B": (_QWEN3_MOE | {"moe_intermediate_size": 768}, (2048, 6144, 48, 32, 4)),
    "Qwen3-235B-A22B": (_QWEN3_MOE | {"moe_intermediate_size": 1536}, (4096, 12288, 94, 64, 4)),
}
PUBLIC_MODELS = tuple(_SIZES)
# Suffixes of models that were trained further and have the shape of the model before them.
_SUFFIXES = ("-Instruct", "-Base", "-Thinking", "-2507")
# Positions of the models that differ in it from their relatives: a pattern of the whole name, and the number.
_POSITIONS = (
    (r"qwen2\.5-(1\.5|7|14|32|72)b", 131072),
    (r"qwen3-.*-base", 32768),
    (r"qwen3-.*-2507", 262144),
)


def public_config(path: str | Path) -> dict[str, Any] | None:
    """Return the config of the public model that a directory is named after; None for other names.

    Suffixes such as -Instruct only decide the number of positions.
    """
    whole = name = Path(path).name
    while name.endswith(_SUFFIXES):
        name = name.rpartition("-")[0]
    known = {public.lower(): public for public in _SIZES}
    if name.lower() not in known:
        return None
    common, sizes = _SIZES[known[name.lower()]]
    found = common | dict(zip(_KEYS, sizes, strict=True))
    for pattern, positions in _POSITIONS:
        if re.fullmatch(pattern, whole.lower()):
            found["max_position_embeddings"] = positions
    return found
