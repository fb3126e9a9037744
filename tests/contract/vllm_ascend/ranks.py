"""The code of each of two tensor-parallel ranks, which are processes started by `fixtures.ranks`.

Import it only in an environment of `build_env.py`.
"""

from pathlib import Path

import torch
from contract.vllm_ascend.harness import build_model, engine, make_vllm_config
from contract.vllm_ascend.reference import assert_same, engine_parameters, parameters_of
from contract.vllm_ascend.updates import Updates, addresses, scheme_of, weights_of

from verl.workers.weight_sync.manifest import WeightUpdateError


def update(rank: int, ranks: int, sources: list[Path], padded: str) -> str:
    """Check that every update leaves this rank's share, and that padded scales of `padded` are rejected.

    Returns:
        The error message for the padded scales.
    """
    first, *others = sources
    scheme = scheme_of(first, tensor_model_parallel_size=ranks)
    config = make_vllm_config(
        first,
        scheme.format.description.to_json_dict(),
        load_format="dummy",
        tensor_parallel_size=ranks,
        distributed_executor_backend="mp",
    )
    with engine(config, rank, ranks):
        model = build_model(config)
        updates, before = Updates(model, config, scheme), addresses(model)
        for source in [*others, first]:
            updates.send(weights_of(source))
            assert_same(parameters_of(model), engine_parameters(weights_of(source), rank=rank, ranks=ranks))
            assert addresses(model) == before
        message = _rejection(updates, updates.encoded(weights_of(first)), padded)
        updates.send(weights_of(others[0]))
        assert_same(parameters_of(model), engine_parameters(weights_of(others[0]), rank=rank, ranks=ranks))
    return message


def _rejection(updates: Updates, encoded: list[tuple[str, torch.Tensor]], name: str) -> str:
    stream = [(key, torch.nn.functional.pad(tensor, (0, 2)) if key == name else tensor) for key, tensor in encoded]
    try:
        updates.stream(stream)
    except WeightUpdateError as error:
        return str(error)
    raise AssertionError(f"{name}: padded scales were loaded")
