"""Parameters of the CPU emulation of MXFP8 and MXFP4, for comparison with the releases.

    .venv/bin/python tests/contract/vllm_ascend/emulation.py OUTPUT.json   # in the main environment

The weights are the same in every environment: they depend on the names and shapes of a tiny checkpoint and on a seed.
"""

import hashlib
import json
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from contract.vllm_ascend.reference import parameters_of

from fixtures.tiny import write_tiny_model

UPDATES = 3
CASES: dict[str, dict[str, Any]] = {
    "dense": {"kind": "qwen3"},
    "dense, untied, grouped": {"kind": "llama", "tied": False, "num_attention_heads": 8, "num_key_value_heads": 2},
    "experts": {"kind": "qwen3_moe", "moe_intermediate_size": 128},
    "odd groups": {"kind": "qwen3", "hidden_size": 96, "intermediate_size": 160},
    "partial groups": {"kind": "qwen3", "hidden_size": 80, "intermediate_size": 4304},
    "dense in MXFP4": {"kind": "qwen3"},
    "experts in MXFP4": {"kind": "qwen3_moe", "moe_intermediate_size": 128},
}


def rollout_keys(case: str) -> dict[str, str]:
    """Return the keys of the section `rollout` that a case needs."""
    return {"quantization_scheme": "W4A8_MXFP"} if "MXFP4" in case else {}


def checkpoint(directory: Path, case: str) -> Path:
    """Write a checkpoint with the shapes of a case. Its values differ between releases of transformers."""
    return write_tiny_model(directory, dtype="bfloat16", **CASES[case])


def numbered_weights(weights: Mapping[str, torch.Tensor], seed: int) -> dict[str, torch.Tensor]:
    """Return values that depend only on names, shapes and the seed; their magnitude differs by row."""
    made = {}
    for number, name in enumerate(sorted(weights)):
        generator = torch.Generator().manual_seed(1000 * seed + number)
        rows = torch.exp2(torch.randint(-9, 3, (weights[name].shape[0],), generator=generator).float())
        values = torch.randn(weights[name].shape, generator=generator)
        made[name] = (values * rows.view(-1, *[1] * (values.ndim - 1))).bfloat16()
    return made


def digests(model: torch.nn.Module) -> dict[str, list]:
    """Return the shape and the SHA-256 of each quantized parameter in the kernel layout."""
    return {
        name: [list(value.shape), hashlib.sha256(value.tobytes()).hexdigest()]
        for name, value in parameters_of(model).items()
        if value.dtype == np.uint8
    }


def _emulated(case: str, directory: Path) -> list[dict[str, list]]:
    from fixtures.engine import Engine, weights_of
    from verl.config import RolloutConfig
    from verl.utils.vllm import plugin
    from verl.workers.rollout.quantization import get_scheme

    plugin.register()
    source = checkpoint(directory, case)
    rollout = RolloutConfig(quantization="ascend", tensor_model_parallel_size=1, **rollout_keys(case))
    scheme = get_scheme(rollout, str(source))
    engine = Engine(source, rollout, **scheme.format.engine_overrides("cpu"))
    result = []
    for seed in range(UPDATES):
        engine.update(scheme.encode(numbered_weights(weights_of(source), seed).items()), seed + 1)
        result.append(digests(engine.model))
    engine.close()
    return result


def main(output: str) -> None:
    """Write {case: [{parameter: [shape, digest]} after each update]}."""
    with tempfile.TemporaryDirectory() as directory:
        emulated = {case: _emulated(case, Path(directory) / str(i)) for i, case in enumerate(CASES)}
    Path(output).write_text(json.dumps(emulated))


if __name__ == "__main__":
    main(sys.argv[1])
