"""The code of each of two tensor-parallel ranks, which are processes started by `fixtures.ranks`.

Import it only in an environment of `build_env.py`.
"""

from importlib import import_module
from pathlib import Path

import torch
import torch.distributed as dist
from contract.vllm_ascend.forward import complete_experts
from contract.vllm_ascend.harness import build_model, engine, make_vllm_config
from contract.vllm_ascend.reference import assert_same, engine_parameters, parameters_of
from contract.vllm_ascend.updates import Updates, addresses, scheme_of, weights_of
from vllm.config import VllmConfig

from verl.utils.quantization_scheme import QuantizationScheme
from verl.utils.vllm.vllm_fp8_utils import mxfp8_layers
from verl.workers.rollout.quantization.mxfp8_self_test import run_self_test
from verl.workers.weight_sync.manifest import WeightUpdateError


def update(rank: int, ranks: int, sources: list[Path], padded: str, quantization_scheme: str | None = None) -> str:
    """Check that every update leaves this rank's share, and that padded scales of `padded` are rejected.

    Returns:
        The error message for the padded scales.
    """
    first, *others = sources
    scheme = scheme_of(first, tensor_model_parallel_size=ranks, quantization_scheme=quantization_scheme)

    def expected(source: Path) -> dict:
        fp4 = quantization_scheme == "W4A8_MXFP"
        return engine_parameters(weights_of(source), rank=rank, ranks=ranks, fp4=lambda name: fp4)

    config = _config(first, scheme, ranks)
    with engine(config, rank, ranks):
        model = build_model(config)
        updates, before = Updates(model, config, scheme), addresses(model)
        for source in [*others, first]:
            updates.send(weights_of(source))
            assert_same(parameters_of(model), expected(source))
            assert addresses(model) == before
        message = _rejection(updates, updates.encoded(weights_of(first)), padded)
        updates.send(weights_of(others[0]))
        assert_same(parameters_of(model), expected(others[0]))
    return message


def transfer(rank: int, ranks: int, sources: list[Path]) -> None:
    """Check that every update by the release's weight transfer leaves this rank's share; only HCCL is left out."""
    backend = import_module("vllm_ascend.distributed.weight_transfer.hccl_engine").HCCLWeightTransferEngine
    first, *others = sources
    scheme = scheme_of(first, tensor_model_parallel_size=ranks)
    config = _config(first, scheme, ranks)
    with engine(config, rank, ranks):
        model = build_model(config)
        target, before = backend(None, config, torch.device("cpu"), model), addresses(model)
        for source in [*others, first]:
            target.start_weight_update()
            for pair in scheme.encode(weights_of(source).items()):
                model.load_weights([pair])
            target.finish_weight_update()
            assert_same(parameters_of(model), engine_parameters(weights_of(source), rank=rank, ranks=ranks))
            assert addresses(model) == before


def self_test(rank: int, ranks: int, source: Path, paddings: list[tuple[int, int]]) -> None:
    """Run the self-test on one rank after the other, while the others wait for their turn.

    Args:
        paddings: by rank, the zeros before and after the inputs of `down_proj`.
    """
    scheme = scheme_of(source, tensor_model_parallel_size=ranks)
    config = _config(source, scheme, ranks)
    with engine(config, rank, ranks):
        model = build_model(config)
        complete_experts(model)
        before, values = addresses(model), parameters_of(model)
        found = {vars(layer).get("mxfp8_tp_padding", (0, 0)) for layer in mxfp8_layers(model).values()}
        assert paddings[rank] in found
        failure = None
        for turn in range(ranks):
            if turn == rank:
                try:
                    run_self_test(model, config, "this release")
                except RuntimeError as error:  # the other ranks wait for this one
                    failure = error
            dist.barrier()
        if failure is not None:
            raise failure
        assert addresses(model) == before
        assert_same(parameters_of(model), values)


def _config(source: Path, scheme: QuantizationScheme, ranks: int) -> VllmConfig:
    return make_vllm_config(
        source,
        scheme.format.description.to_json_dict(),
        load_format="dummy",
        tensor_parallel_size=ranks,
        distributed_executor_backend="mp",
    )


def _rejection(updates: Updates, encoded: list[tuple[str, torch.Tensor]], name: str) -> str:
    stream = [(key, torch.nn.functional.pad(tensor, (0, 2)) if key == name else tensor) for key, tensor in encoded]
    try:
        updates.stream(stream)
    except WeightUpdateError as error:
        return str(error)
    raise AssertionError(f"{name}: padded scales were loaded")
