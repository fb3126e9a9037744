"""Encoding for `rollout.quantization=ascend`."""

import pytest
import torch

from fixtures.fake_quant import mxfp4_round_trip, mxfp8_round_trip
from fixtures.scheme_models import Q_PROJ
from verl.utils.quantization.encode_report import errors_by_depth, merged_errors, worst_error
from verl.utils.quantization.mxfp4 import mxfp4_dequantize
from verl.utils.quantization.mxfp8 import mxfp8_dequantize
from verl.workers.weight_sync.manifest import WeightUpdateError


def test_encoding_equals_an_independent_quantizer(dense, scheme, weights_of):
    weights = weights_of(dense)
    sent = dict(scheme("ascend", dense).encode(weights.items()))
    projections = {name for name in weights if name.endswith("_proj.weight")}
    assert set(sent) == set(weights) | {f"{name}_scale" for name in projections}
    for name, weight in weights.items():
        if name not in projections:
            assert torch.equal(sent[name], weight)
            continue
        values, scales = sent[name], sent[f"{name}_scale"]
        assert (values.dtype, scales.dtype) == (torch.float8_e4m3fn, torch.uint8)
        assert scales.shape == (weight.shape[0], -(-weight.shape[1] // 32))
        assert torch.equal(mxfp8_dequantize(values, scales), mxfp8_round_trip(weight))


def relative_error(weight):
    exact, rounded = weight.double(), mxfp8_round_trip(weight).double()
    return float((rounded - exact).norm() / exact.norm())


@pytest.mark.parametrize("pieces", [1, 3])
def test_report_names_the_weight_with_the_largest_error(dense, scheme, weights_of, pieces):
    """It agrees with an independent quantizer, for rows encoded together and by several ranks."""
    weights = weights_of(dense)
    # The relative error of e4m3 is largest just above a power of two.
    victim = "model.layers.1.mlp.up_proj.weight"
    weights[victim] = torch.full_like(weights[victim], 1.0625 * 2**-4)
    ranks = [scheme("ascend", dense) for _ in range(pieces)]
    for name, weight in weights.items():
        if not ranks[0].encodes_rows(name):
            continue
        for rank, rows in zip(ranks, weight.chunk(pieces), strict=True):
            rank.encode_weight(name, rows)
    reports = [rank.pop_report().to_message() for rank in ranks]
    error, name = worst_error(merged_errors(reports))
    assert name == max((n for n in weights if n in reports[0]["errors"]), key=lambda n: relative_error(weights[n]))
    assert error == pytest.approx(relative_error(weights[name]), rel=1e-6)
    assert all(report["seconds"] > 0 for report in reports)
    assert worst_error(merged_errors(rank.pop_report().to_message() for rank in ranks)) is None, "reports are removed"
    by_depth = errors_by_depth(merged_errors(reports))
    assert by_depth["mlp.up_proj"][1] == float(f"{error:.3g}") and len(by_depth["mlp.up_proj"]) == 2
    other = relative_error(weights["model.layers.0.self_attn.q_proj.weight"])
    assert by_depth["self_attn.q_proj"][0] == pytest.approx(other, rel=5e-3)


def test_encoding_streams(dense, scheme, weights_of):
    """One tensor in, its pair out: the model is never in memory twice."""
    drawn = []

    def stream():
        for name, tensor in weights_of(dense).items():
            drawn.append(name)
            yield name, tensor

    for name, _ in scheme("ascend", dense).encode(stream()):
        assert name.removesuffix("_scale") == drawn[-1]


def test_each_expert_is_encoded(experts, scheme, weights_of):
    sent = dict(scheme("ascend", experts).encode(weights_of(experts).items()))
    assert sent["model.layers.1.mlp.experts.3.down_proj.weight"].dtype == torch.float8_e4m3fn
    assert sent["model.layers.1.mlp.experts.3.down_proj.weight_scale"].shape == (64, 2)
    assert sent["model.layers.1.mlp.gate.weight"].dtype == torch.float32


def test_mxfp4_encoding_equals_an_independent_quantizer(wide, scheme, weights_of):
    weights = weights_of(wide)
    chosen = scheme("ascend", wide, quantization_scheme="W4A8_MXFP")
    sent = dict(chosen.encode(weights.items()))
    projections = {name for name in weights if name.endswith("_proj.weight")}
    assert set(sent) == set(weights) | {f"{name}_scale" for name in projections}
    for name in projections:
        values, scales, (n, k) = sent[name], sent[f"{name}_scale"], weights[name].shape
        assert (values.dtype, tuple(values.shape)) == (torch.uint8, (n, k // 2))
        assert (scales.dtype, tuple(scales.shape)) == (torch.uint8, (n, k // 32))
        assert torch.equal(mxfp4_dequantize(values, scales), mxfp4_round_trip(weights[name]))
        rows = chosen.encode_weight(name, weights[name][16:48])
        assert chosen.encodes_rows(name) and torch.equal(rows[""], values[16:48])
        assert torch.equal(rows["_scale"], scales[16:48])
    again = dict(chosen.encode(sent.items()))
    assert all(again[name] is tensor for name, tensor in sent.items()), "encoded tensors pass through"
    report = chosen.pop_report().to_message()["errors"]
    for name in projections:
        exact, rounded = weights[name].double(), mxfp4_round_trip(weights[name]).double()
        assert report[name][0] == pytest.approx(float((rounded[16:48] - exact[16:48]).square().sum()))


def test_requantizing_mxfp4_returns_the_changed_indices(wide, scheme, weights_of):
    chosen = scheme("ascend", wide, quantization_scheme="W4A8_MXFP")
    name, weight = next((n, w) for n, w in weights_of(wide).items() if n.endswith("up_proj.weight"))
    kept = {key: part.clone() for key, part in chosen.encode_weight(name, weight).items()}
    before = {key: part.clone() for key, part in kept.items()}
    moved = weight + 0.002 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    indices = chosen.diff_and_update_(name, moved, kept)
    now = chosen.encode_weight(name, moved)
    for key, part in now.items():
        assert torch.equal(kept[key], part)
        assert torch.equal(indices[key], (before[key] != part).flatten().nonzero().squeeze(-1))
    assert 0 < len(indices[""]) < weight.numel() // 2


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_mxfp4_weights_that_are_not_finite_are_rejected(wide, scheme, weights_of, value):
    weights = weights_of(wide)
    weights[Q_PROJ][1, 2] = value
    with pytest.raises(WeightUpdateError, match=f"{Q_PROJ}.*NaN or Inf"):
        list(scheme("ascend", wide, quantization_scheme="W4A8_MXFP").encode(weights.items()))
