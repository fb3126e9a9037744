"""Tests that need an Ascend 950: its kernels compute the same as the references of all other tests.

    python -m pytest -m npu tests/npu tests/utils/quantization      # on a machine with torch_npu and vllm-ascend

On other machines each test is skipped with the reason. docs/ascend.md lists them.
"""

import importlib.util
import os
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from fixtures.engine import Engine, log_probs_of, weights_of
from fixtures.fake_quant import fake_quantized, mxfp4_round_trip, mxfp8_round_trip
from fixtures.tiny import write_tiny_model
from verl.config import RolloutConfig
from verl.utils.quantization.ascend_releases import check_vllm_ascend
from verl.utils.quantization.mxfp4 import mxfp4_quantize
from verl.utils.quantization.mxfp8 import npu_mxfp8_quantize
from verl.utils.vllm.npu_settings import npu_environment
from verl.workers.rollout.quantization import get_scheme

pytestmark = [
    pytest.mark.npu,
    pytest.mark.skipif(
        importlib.util.find_spec("torch_npu") is None,
        reason="needs an Ascend 950 with torch_npu and vllm-ascend; torch_npu is not installed",
    ),
]

ROLLOUT = RolloutConfig(quantization="ascend", tensor_model_parallel_size=1, dtype="bfloat16")
MXFP4 = replace(ROLLOUT, quantization_scheme="W4A8_MXFP")
E8M0 = 293  # torch_npu.float8_e8m0fnu


def moved(tensor):
    """Move a tensor to the NPU; it stays on the CPU with the stand-in for torch_npu, which runs some of these tests."""
    import torch_npu

    return tensor if torch_npu.__version__.endswith("+standin") else tensor.to("npu")


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def paired(scales):
    """Reshape scales [.., G] to the layout of an operator, [.., ceil(G / 2), 2]."""
    return torch.nn.functional.pad(scales, (0, scales.shape[-1] % 2)).unflatten(-1, (-1, 2))


def test_machine_is_an_ascend_950_with_a_matching_vllm_ascend():
    assert torch.npu.get_soc_version() == 260
    check_vllm_ascend()


@pytest.mark.parametrize("k", [4096, 96, 80])
def test_quantized_product_equals_the_reference(k):
    """`npu_quant_matmul` with weights in the kernel layout of the hooks, odd and partial groups included."""
    import torch_npu

    x, weight = randn(33, k), randn(64, k, seed=1)
    values, scales = npu_mxfp8_quantize(moved(weight))
    rows, row_scales = torch_npu.npu_dynamic_mx_quant(moved(x), dst_type=torch.float8_e4m3fn)
    output = torch_npu.npu_quant_matmul(
        rows,
        values.transpose(0, 1).contiguous(),
        paired(scales).transpose(0, 1).contiguous(),
        scale_dtype=E8M0,
        pertoken_scale=row_scales,
        pertoken_scale_dtype=E8M0,
        bias=None,
        output_dtype=torch.bfloat16,
        group_sizes=[1, 1, 32],
    )
    expected = mxfp8_round_trip(x).double() @ mxfp8_round_trip(weight).double().T
    error = (output.cpu().double() - expected).abs().max() / expected.abs().max()
    assert error < 2**-8  # rounding of the output


def test_product_with_fp4_weights_after_a_copy_in_nz_equals_the_reference():
    """An update of MXFP4 weights casts them to NZ format, and copies them into the memory of the first ones."""
    import torch_npu

    def kernel_layout(weight):
        packed, scales = (moved(part) for part in mxfp4_quantize(weight))
        options = {"customize_dtype": torch.float8_e4m3fn, "input_dtype": torch_npu.float4_e2m1fn_x2}
        return torch_npu.npu_format_cast(packed, 29, **options).transpose(0, 1), paired(scales).transpose(0, 1), packed

    x, weight = randn(33, 256), randn(64, 256, seed=2)
    kernel, _, _ = kernel_layout(randn(64, 256, seed=1))
    made, scales, packed = kernel_layout(weight)
    address, number = kernel.data_ptr(), torch_npu.get_npu_format(kernel)
    kernel.transpose(0, 1).copy_(made.transpose(0, 1))
    assert (kernel.data_ptr(), torch_npu.get_npu_format(kernel)) == (address, number)
    assert torch.equal(torch_npu.npu_format_cast(kernel.transpose(0, 1), 2).cpu(), packed.cpu())
    rows, row_scales = torch_npu.npu_dynamic_mx_quant(moved(x), dst_type=torch.float8_e4m3fn)
    output = torch_npu.npu_quant_matmul(
        rows,
        kernel,
        scales,
        scale_dtype=E8M0,
        pertoken_scale=row_scales,
        pertoken_scale_dtype=E8M0,
        bias=None,
        output_dtype=torch.bfloat16,
        x2_dtype=torch_npu.float4_e2m1fn_x2,
        group_sizes=[0, 0, 32],
    )
    expected = mxfp8_round_trip(x).double() @ mxfp4_round_trip(weight).double().T
    error = (output.cpu().double() - expected).abs().max() / expected.abs().max()
    assert error < 2**-8  # rounding of the output


def test_block_below_the_smallest_scale_becomes_zero():
    """The only difference of `mxfp8_quantize` from the operator's published source: magnitudes below 2^-118."""
    x = torch.full((1, 32), 2.0**-124).bfloat16()
    values, scales = npu_mxfp8_quantize(moved(x))
    assert int(scales[0, 0]) == 0
    assert not values.cpu().view(torch.uint8).any()


def test_trainer_sends_the_same_bytes_from_npu_and_cpu(tmp_path):
    check_sent_bytes(write_tiny_model(tmp_path, kind="qwen3_moe", dtype="bfloat16", hidden_size=96), ROLLOUT)


def check_sent_bytes(model, rollout):
    weights = weights_of(model)
    here = dict(get_scheme(rollout, str(model)).encode(weights.items()))
    there = dict(get_scheme(rollout, str(model)).encode((name, moved(tensor)) for name, tensor in weights.items()))
    assert here.keys() == there.keys()
    for name, tensor in here.items():
        assert torch.equal(there[name].cpu().view(torch.uint8), tensor.contiguous().view(torch.uint8)), name


def test_trainer_sends_the_same_mxfp4_bytes_from_npu_and_cpu(tmp_path):
    check_sent_bytes(write_tiny_model(tmp_path, kind="qwen3_moe", dtype="bfloat16", hidden_size=128), MXFP4)


@pytest.fixture
def start(monkeypatch):
    for name, value in npu_environment(os.environ).items():
        monkeypatch.setenv(name, value)
    started = []

    def start(model_dir, rollout=ROLLOUT, **over):
        scheme = get_scheme(rollout, str(model_dir))
        started.append(Engine(model_dir, rollout, dtype="bfloat16", **(scheme.format.engine_overrides("npu") | over)))
        return started[-1], scheme

    yield start
    for each in started:
        each.close()


def assert_close(engine, source, stale, round_trip=mxfp8_round_trip):
    """Check that the engine is close to the fake-quantized model.

    Rounding to bfloat16 hides a part of the effect of quantization: emulated on a CPU, the differences are 0.004 from
    the fake-quantized model, 0.007 from the unquantized and 0.17 from a stale one.
    """
    responses, log_probs = engine.sample()
    plain = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    expected, old = (fake_quantized(each, weights=lambda name: round_trip) for each in (source, stale))
    difference = (log_probs - log_probs_of(expected, responses)).abs().mean()
    assert difference < (log_probs - log_probs_of(plain, responses)).abs().mean()
    assert difference < 0.1 * (log_probs - log_probs_of(old, responses)).abs().mean()


@pytest.mark.parametrize(
    ("rollout", "round_trip"), [(ROLLOUT, mxfp8_round_trip), (MXFP4, mxfp4_round_trip)], ids=["MXFP8", "MXFP4"]
)
@pytest.mark.parametrize("enforce_eager", [True, False], ids=["eager", "graphs"])
@pytest.mark.parametrize("kind", ["qwen3", "qwen3_moe"])
def test_engine_after_four_updates_equals_the_last_checkpoint(
    tmp_path, start, kind, enforce_eager, rollout, round_trip
):
    """Captured graphs must read the new weights, so addresses must not change."""
    options = dict(kind=kind, tied=False, std=0.02, dtype="bfloat16", hidden_size=128, moe_intermediate_size=64)
    if kind == "qwen3":
        del options["moe_intermediate_size"]
    models = [write_tiny_model(tmp_path / str(seed), seed=seed, **options) for seed in range(4)]
    engine, scheme = start(models[0], rollout, enforce_eager=enforce_eager)
    addresses = engine.rpc("verl_parameter_addresses")
    for version in range(1, 5):
        source, stale = models[version % 4], models[version - 1]
        engine.update(((name, moved(t)) for name, t in scheme.encode(weights_of(source).items())), version)
        assert engine.rpc("verl_parameter_addresses") == addresses
        assert_close(engine, source, stale, round_trip)


@pytest.mark.parametrize("kind", ["qwen3", "qwen3_moe"])
def test_updates_between_sleeps(tmp_path, start, kind):
    models = [
        write_tiny_model(tmp_path / str(seed), kind=kind, seed=seed, std=0.02, dtype="bfloat16") for seed in range(3)
    ]
    engine, scheme = start(models[0], enable_sleep_mode=True)
    for version in range(1, 4):
        engine.llm.sleep(level=1)
        engine.llm.wake_up(tags=["weights"])
        source, stale = models[version % 3], models[version - 1]
        engine.update(scheme.encode(weights_of(source).items()), version)
        engine.llm.wake_up(tags=["kv_cache"])
        assert_close(engine, source, stale)
