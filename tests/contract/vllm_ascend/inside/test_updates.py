"""Updates through verl's encoding and hooks into models that vLLM and the release built, loaded and processed."""

import json

import numpy as np
import pytest
import torch
from contract.vllm_ascend.harness import build_model, engine
from contract.vllm_ascend.reference import assert_same, engine_parameters, parameters_of
from contract.vllm_ascend.updates import (
    Updates,
    addresses,
    assert_every_delta_lands,
    assert_every_update_lands,
    checkpoints,
    config_of,
    scheme_of,
    weights_of,
)

from verl.workers.weight_sync.manifest import WeightUpdateError


@pytest.mark.feature("updates")
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("kind", ["qwen3", "qwen3_moe", "llama"])
def test_every_update_writes_the_expected_bytes_at_the_same_addresses(tmp_path, kind, tied):
    assert_every_update_lands(checkpoints(tmp_path, kind, tied=tied))


@pytest.mark.feature("deltas")
@pytest.mark.parametrize("kind", ["qwen3", "qwen3_moe"])
def test_delta_leaves_the_bytes_of_a_full_update(tmp_path, kind):
    (source,) = checkpoints(tmp_path, kind, 1, tied=kind == "qwen3")
    assert_every_delta_lands(source)


@pytest.mark.feature("left_out")
def test_ignored_layers_are_updated_unquantized(tmp_path):
    """This includes unquantized experts, which the release keeps transposed."""
    first, *others = checkpoints(tmp_path, "qwen3_moe", 3)
    ignore = tmp_path / "ignore.json"
    ignore.write_text(json.dumps({"ignore": [r"re:.*\.layers\.0\.mlp\.experts\..*", r"re:.*\.layers\.1\..*o_proj"]}))
    scheme = scheme_of(first, quantization_config_file=str(ignore))
    config = config_of(first, quantization_config_file=str(ignore))
    with engine(config):
        model = build_model(config)
        updates, before = Updates(model, config, scheme), addresses(model)
        for source in [*others, first, others[0]]:
            updates.send(weights_of(source))
            expected = engine_parameters(weights_of(source), left_out=("layers.0.mlp.experts", "layers.1.self_attn.o_"))
            for name in ("w13_weight", "w2_weight"):
                key = f"model.layers.0.mlp.experts.{name}"
                expected[key] = np.swapaxes(expected[key], 1, 2)
            assert_same(parameters_of(model), expected)
            assert addresses(model) == before


def damaged(encoded, name, change):
    """Return the stream with one tensor replaced by `change(tensor)`, or removed if that is None."""
    changed = [(key, change(tensor) if key == name else tensor) for key, tensor in encoded]
    return [(key, tensor) for key, tensor in changed if tensor is not None]


O_PROJ, DOWN = "model.layers.1.self_attn.o_proj.weight", "model.layers.0.mlp.down_proj.weight"
Q_PROJ, NORM = "model.layers.0.self_attn.q_proj.weight", "model.norm.weight"
EXPERT = "model.layers.1.mlp.experts.2.up_proj.weight"


def padded_to_pairs(scales):
    """Pad scales to an even number of groups, as npu_dynamic_mx_quant returns them."""
    return torch.nn.functional.pad(scales, (0, 2 - scales.shape[-1] % 2))


FAULTS = {
    "padded scales of a row-parallel layer": (
        "qwen3",
        f"{O_PROJ}_scale",
        padded_to_pairs,
        rf"{O_PROJ}_scale.*not padded",
    ),
    "padded scales of a column-parallel layer": (
        "qwen3",
        f"{Q_PROJ}_scale",
        padded_to_pairs,
        rf"{Q_PROJ}_scale.*not padded",
    ),
    "padded scales of an expert": ("qwen3_moe", f"{EXPERT}_scale", padded_to_pairs, rf"{EXPERT}_scale.*not padded"),
    "no scales": ("qwen3", f"{DOWN}_scale", lambda _: None, rf"{DOWN}.*scales.*did not arrive"),
    "an unquantized weight": ("qwen3", O_PROJ, lambda w: w.to(torch.bfloat16), rf"{O_PROJ}.*bfloat16"),
    "a truncated weight": ("qwen3", DOWN, lambda w: w[:-1], DOWN),
    "a missing norm": ("qwen3", NORM, lambda _: None, NORM),
}


@pytest.mark.feature("refused")
@pytest.mark.parametrize("kind", ["qwen3", "qwen3_moe"])
def test_faults_are_rejected_by_name_and_a_full_update_recovers(tmp_path, kind):
    first, second = checkpoints(tmp_path, kind, 2)
    config = config_of(first)
    weights = weights_of(second)
    with engine(config):
        model = build_model(config)
        updates, before = Updates(model, config, scheme_of(first)), addresses(model)
        for fault_kind, name, change, message in FAULTS.values():
            if fault_kind == kind:
                # Sender and receiver get the same tensors, so only the checks of the scheme and the loaders can fail.
                with pytest.raises((WeightUpdateError, ValueError), match=message):
                    updates.stream(damaged(updates.encoded(weights), name, change))
        for left_out in {O_PROJ, DOWN, EXPERT} & weights.keys():
            rest = {name: tensor for name, tensor in weights.items() if name != left_out}
            layer = left_out.split(".")[2]
            with pytest.raises(WeightUpdateError, match=rf"not written, the first is 'model\.layers\.{layer}\."):
                updates.send(rest)
        updates.send(weights)
        assert_same(parameters_of(model), engine_parameters(weights))
        assert addresses(model) == before
