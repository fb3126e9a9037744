"""What each of two tensor-parallel ranks does, in a process of its own; run by `fixtures.ranks`.

To be imported inside an environment of `build_env.py` only.
"""

from pathlib import Path

import torch
from contract.vllm_ascend.harness import build_model, engine, make_vllm_config
from contract.vllm_ascend.reference import assert_same, engine_parameters, held
from contract.vllm_ascend.updates import Updates, addresses, scheme_of, weights_of

from verl.workers.weight_sync.manifest import WeightUpdateError


def update(rank: int, ranks: int, sources: list[Path], padded: str) -> str:
    """Every update leaves the rank's own share; scales of `padded` that are left padded are refused.

    Returns:
        The refusal.
    """
    first, *others = sources
    scheme = scheme_of(first, tensor_model_parallel_size=ranks)
    config = make_vllm_config(
        first,
        scheme.description.to_json_dict(),
        load_format="dummy",
        tensor_parallel_size=ranks,
        distributed_executor_backend="mp",
    )
    with engine(config, rank, ranks):
        model = build_model(config)
        updates, before = Updates(model, config, scheme), addresses(model)
        for source in [*others, first]:
            updates.send(weights_of(source))
            assert_same(held(model), engine_parameters(weights_of(source), rank=rank, ranks=ranks))
            assert addresses(model) == before
        refusal = _refused(updates, updates.encoded(weights_of(first)), padded)
        updates.send(weights_of(others[0]))
        assert_same(held(model), engine_parameters(weights_of(others[0]), rank=rank, ranks=ranks))
    return refusal


def _refused(updates: Updates, encoded: list[tuple[str, torch.Tensor]], name: str) -> str:
    stream = [(key, torch.nn.functional.pad(tensor, (0, 2)) if key == name else tensor) for key, tensor in encoded]
    try:
        updates.stream(stream)
    except WeightUpdateError as error:
        return str(error)
    raise AssertionError(f"{name}: padded scales were loaded")
