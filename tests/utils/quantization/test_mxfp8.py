"""MXFP8 compared bit for bit with two independent oracles, on every path: C kernels, torch operators, torch.compile."""

import math
import struct

import gfloat
import gfloat.formats
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fixtures.mx_oracle import E4M3, assert_bits, oracle, specials
from verl.utils.native import library as native
from verl.utils.quantization import mxfp8

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
HALVES = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}


@pytest.fixture(params=["kernels", "torch"])
def path(request, monkeypatch):
    """Run a test with the C kernels and with torch operators."""
    _use(request.param, monkeypatch)
    return request.param


def _use(name, monkeypatch):
    if name == "torch":
        monkeypatch.setattr(mxfp8, "_native_library", lambda device: None)
    else:
        assert native.kernels() is not None, "no C compiler on this machine: the kernels cannot be tested"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("scale_alg", [0, 1])
@pytest.mark.parametrize("dtype", DTYPES)
def test_edge_cases_equal_the_oracle(path, dtype, scale_alg, device):
    edges = specials(dtype)
    generator = torch.Generator().manual_seed(3)
    rows = []
    for magnitude in (1.0, 2.0**-9, 2.0**-14, 2.0**-118, 2.0**-126, 2.0**-133, 2.0**100):
        for start in range(0, len(edges), 8):
            row = torch.randn(32, generator=generator, dtype=torch.float64) * 2.0 ** torch.randint(
                -20, 5, (32,), generator=generator
            )
            row[:8] = torch.tensor((edges * 2)[start : start + 8])
            rows.append(row * magnitude)
    x = torch.stack(rows).to(dtype)
    x[~x.isfinite()] = 0.0
    x[0, :] = 0.0
    x[1, :] = -0.0
    assert_bits(x.to(device), scale_alg)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale_alg", [0, 1])
def test_every_16_bit_number_in_every_kind_of_block(dtype, scale_alg, monkeypatch):
    """All 65536 numbers, next to larger ones of every kind: both paths agree, and a sample agrees with the oracle."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    blocks = [every.reshape(-1, 32)]
    for top in (1.0, 1.75, 1.9921875, 3e-5, 2.0**-120, 2.0**-126, 448.0):
        below = every[every.abs() <= top]
        below = below[: len(below) // 31 * 31].reshape(-1, 31)
        blocks.append(torch.cat([torch.full((len(below), 1), top, dtype=dtype), below], 1))
    x = torch.cat(blocks)
    _use("kernels", monkeypatch)
    values, scales = mxfp8.mxfp8_quantize(x, scale_alg=scale_alg)
    _use("torch", monkeypatch)
    values_torch, scales_torch = mxfp8.mxfp8_quantize(x, scale_alg=scale_alg)
    assert torch.equal(values.view(torch.uint8), values_torch.view(torch.uint8)) and torch.equal(scales, scales_torch)
    sample = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[:2000]
    codes, expected = oracle(x[sample], scale_alg)
    assert torch.equal(values.view(torch.uint8)[sample], codes) and torch.equal(scales[sample], expected)


@st.composite
def tensors(draw) -> torch.Tensor:
    dtype = draw(st.sampled_from(DTYPES))
    shape = [*draw(st.lists(st.integers(0, 3), max_size=2)), draw(st.sampled_from([0, 1, 5, 31, 32, 33, 64, 80, 96]))]
    width = 32 if dtype == torch.float32 else 16
    seed, finite = draw(st.integers(0, 2**32)), draw(st.booleans())
    bits = torch.randint(0, 2**width, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.int64)
    x = torch.where(bits >= 2 ** (width - 1), bits - 2**width, bits).to(HALVES[dtype]).view(dtype)
    if finite:
        x[~x.isfinite()] = draw(st.sampled_from([0.0, 1.0, -448.0]))
    if draw(st.booleans()):
        # One order of magnitude, so that most elements do not vanish next to the largest.
        around = draw(st.integers(-126, 126) if dtype != torch.float16 else st.integers(-24, 15))
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64)
        x = (noise * 2.0**around).to(dtype)
    for position in draw(st.lists(st.integers(0, max(x.numel() - 1, 0)), max_size=4)):
        if x.numel():
            x.view(-1)[position] = draw(st.sampled_from([0.0, -0.0, math.nan, math.inf, -math.inf, *specials(dtype)]))
    return x


@settings(max_examples=120, deadline=None, derandomize=True)
@given(x=tensors(), scale_alg=st.sampled_from([0, 1]), by_torch=st.booleans())
def test_random_tensors_equal_the_oracle(x, scale_alg, by_torch):
    with pytest.MonkeyPatch.context() as patch:
        _use("torch" if by_torch else "kernels", patch)
        assert_bits(x, scale_alg)


@pytest.mark.parametrize("dtype", DTYPES)
def test_results_equal_gfloat(path, dtype):
    """Compare with a second oracle, the block encoder of the gfloat package (OCP MX, scale by amax)."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(12, 32, generator=generator) * 2.0 ** torch.randint(-12, 12, (12, 1), generator=generator)
    x = (x * 2.0 ** torch.randint(-14, 1, (12, 32), generator=generator)).to(dtype)
    x[0] = 0.0
    values, scales = mxfp8.mxfp8_quantize(x)
    info = gfloat.formats.format_info_ocp_e4m3
    block_info = gfloat.BlockFormatInfo("mxfp8_e4m3", info, 32, gfloat.formats.format_info_ocp_e8m0)
    for row, codes, scale in zip(x.double().numpy(), values.view(torch.uint8), scales, strict=True):
        factor = gfloat.compute_scale_amax(info.emax, row)
        encoded = list(gfloat.encode_block(block_info, factor, row / factor))
        assert encoded == [int(scale), *codes.tolist()]
        decoded = mxfp8.mxfp8_dequantize(codes[None].view(torch.float8_e4m3fn), scale[None])[0].double().numpy()
        np.testing.assert_array_equal(np.fromiter(gfloat.decode_block(block_info, encoded), float), decoded)


def test_rounded_up_scale_equals_the_float32_formula():
    """cuBLAS and the NPU multiply amax by float32(1/448) and round the exponent up, which gives the same bytes."""
    inverse = np.float32(1) / np.float32(448)
    assert inverse.view(np.uint32) == 0x3B124925  # the constant in Ascend's kernel
    for exponent in (8, 9, 10, 126, 127, 254):
        amax = (np.uint32(exponent << 23) + np.arange(2**23, dtype=np.uint32)).view(np.float32)
        product = (amax * inverse).view(np.uint32)
        field, mantissa = product >> 23, product & 0x7FFFFF
        up = np.where(field == 0, mantissa > 0x400000, mantissa > 0)
        ours = np.maximum(((amax.view(np.uint32) + np.uint32(mxfp8._ROUND_UP_CARRY)) >> 23).astype(np.int32) - 8, 0)
        # If amax / 448 is subnormal, rounding the product can hide a last bit.
        assert np.count_nonzero(field + up != ours) <= (1 if exponent <= 9 else 0)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "shape", [(0,), (4, 0), (0, 64), (2, 0, 33), (1,), (31,), (33,), (3, 5, 80), (70, 4304), (2, 2080)]
)
@pytest.mark.parametrize("scale_alg", [0, 1])
def test_both_paths_agree_on_any_shape(shape, scale_alg, device, monkeypatch):
    generator = torch.Generator().manual_seed(1)
    for dtype in DTYPES:
        x = torch.randn(shape, generator=generator).mul(3).to(dtype).to(device)
        by_path = []
        for name in ("kernels", "torch"):
            _use(name, monkeypatch)
            values, scales = mxfp8.mxfp8_quantize(x, scale_alg=scale_alg)
            assert values.shape == x.shape and values.dtype == torch.float8_e4m3fn and values.is_contiguous()
            assert scales.shape == (*shape[:-1], -(-shape[-1] // 32)) and scales.dtype == torch.uint8
            back = [mxfp8.mxfp8_dequantize(values, scales, to).float() for to in DTYPES]
            by_path.append([values.view(torch.uint8), scales, *back])
            monkeypatch.undo()
        for one, other in zip(*by_path, strict=True):
            assert torch.equal(one, other)


def test_strided_inputs_equal_contiguous_ones(path):
    base = torch.randn(64, 200, generator=torch.Generator().manual_seed(2)).bfloat16()
    for x in (
        base.t(),
        base[:, 7:150],
        base[::2, ::3],
        base[5],
        base[:, 3],
        base[None, :, 8:136].expand(2, -1, -1),
        base[:1],
    ):
        for got, expected in zip(mxfp8.mxfp8_quantize(x), mxfp8.mxfp8_quantize(x.clone().contiguous()), strict=True):
            assert torch.equal(got.view(torch.uint8), expected.view(torch.uint8))
    assert not mxfp8.mxfp8_quantize(base.requires_grad_())[0].requires_grad


def test_other_block_sizes_equal_the_oracle(monkeypatch):
    x = torch.randn(3, 70, generator=torch.Generator().manual_seed(4))
    for block in (1, 16, 64, 128):
        values, scales = mxfp8.mxfp8_quantize(x, block_size=block)
        codes, expected = oracle(x, block=block)
        assert torch.equal(values.view(torch.uint8), codes) and torch.equal(scales, expected)
        wide = scales.double().repeat_interleave(block, -1)[:, :70]
        exact = values.double() * 2.0 ** (wide - 127)
        assert torch.equal(mxfp8.mxfp8_dequantize(values, scales, block_size=block).double(), exact)


def test_out_is_written_in_place(path):
    x = torch.randn(5, 80, generator=torch.Generator().manual_seed(6))
    expected = mxfp8.mxfp8_quantize(x)
    out = torch.empty(5, 80, dtype=torch.float8_e4m3fn), torch.full((5, 3), 77, dtype=torch.uint8)
    result = mxfp8.mxfp8_quantize(x, out=out)
    assert result[0] is out[0] and result[1] is out[1]
    assert torch.equal(out[0].view(torch.uint8), expected[0].view(torch.uint8)) and torch.equal(out[1], expected[1])
    for dtype in DTYPES:
        target = torch.full((5, 80), 9.0, dtype=dtype)
        assert mxfp8.mxfp8_dequantize(*expected, dtype, out=target) is target
        assert torch.equal(target, mxfp8.mxfp8_dequantize(*expected, dtype))


def test_no_byte_is_written_outside_the_outputs(path):
    """Guard bytes around the outputs survive for any tail: in a bucket the neighbors are other tensors."""
    for k in (1, 31, 33, 63, 2049, 4095):
        x = torch.randn(3, k, generator=torch.Generator().manual_seed(k)).bfloat16()
        groups = -(-k // 32)
        arena = torch.full((8 + 3 * k + 8 + 3 * groups + 8,), 0xAB, dtype=torch.uint8)
        values = arena[8 : 8 + 3 * k].view(torch.float8_e4m3fn).view(3, k)
        scales = arena[16 + 3 * k : 16 + 3 * k + 3 * groups].view(3, groups)
        mxfp8.mxfp8_quantize(x, out=(values, scales))
        guards = torch.cat([arena[:8], arena[8 + 3 * k : 16 + 3 * k], arena[-8:]])
        assert (guards == 0xAB).all()


@pytest.mark.parametrize("device", DEVICES)
def test_dequantizing_every_code_with_every_scale(path, device):
    codes = torch.arange(256, dtype=torch.uint8).repeat(256, 1)
    scales = torch.arange(256, dtype=torch.uint8)[:, None].expand(256, 8).contiguous()
    values = codes.view(torch.float8_e4m3fn)
    magnitudes = [*E4M3, math.nan]
    table = torch.tensor([*magnitudes, *(-v for v in magnitudes)], dtype=torch.float64)
    powers = torch.tensor([*(2.0 ** (b - 127) for b in range(255)), math.nan], dtype=torch.float64)
    exact = powers[:, None] * table[None, :]
    for dtype in DTYPES:
        got = mxfp8.mxfp8_dequantize(values.to(device), scales.to(device), dtype).cpu()
        expected = exact.float().to(dtype)  # exact in float32 except for overflow, then rounded once
        assert torch.equal(got.isnan(), expected.isnan())
        assert torch.equal(got.nan_to_num(7), expected.nan_to_num(7))
        assert torch.equal(torch.signbit(got[~got.isnan()]), torch.signbit(expected[~expected.isnan()]))
    as_e8m0 = mxfp8.mxfp8_dequantize(values, scales.view(torch.float8_e8m0fnu))
    assert torch.equal(as_e8m0.nan_to_num(7), mxfp8.mxfp8_dequantize(values, scales).nan_to_num(7))


def test_nan_and_inf_affect_only_their_block(path):
    for dtype in DTYPES:
        for bad in (math.nan, -math.nan, math.inf, -math.inf, struct.unpack("<f", b"\x01\x00\x80\xff")[0]):
            x = torch.ones(2, 72, dtype=dtype)
            x[0, 40], x[1, 71] = bad, bad
            values, scales = mxfp8.mxfp8_quantize(x)
            assert scales.tolist() == [[119, 255, 119], [119, 119, 255]]
            assert (values.view(torch.uint8)[0, 32:64] == 0x7F).all() and (
                values.view(torch.uint8)[1, 64:] == 0x7F
            ).all()
            nan = mxfp8.mxfp8_dequantize(values, scales).isnan()
            assert nan.sum() == 40 and nan[0, 32:64].all() and nan[1, 64:].all()


@pytest.mark.parametrize("scale_alg", [0, 1])
def test_compiled_and_eager_bits_agree_with_one_compilation(scale_alg):
    """The fused path of a GPU, here with Inductor's C++: one compilation is enough for every layer shape of a dtype."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    quantize = torch.compile(mxfp8._quantize_blocks, dynamic=True)
    dequantize = torch.compile(mxfp8._dequantize_blocks, dynamic=True)
    carry = mxfp8._ROUND_UP_CARRY if scale_alg else 0
    generator = torch.Generator().manual_seed(8)
    for rows in (2, 7, 64, 1000, 4096):
        bits = torch.randint(-(2**31), 2**31, (rows, 32), generator=generator, dtype=torch.int64).to(torch.int32)
        x = bits.view(torch.float32)
        x[: rows // 2].mul_(0).add_(torch.randn(rows // 2, 32, generator=generator))
        x[0, :8] = torch.tensor([0.0, -0.0, 1e-45, -1e-45, 1e-39, 448.0, 464.0, 2.0**-10])
        codes, scales = quantize(x, carry)
        codes_eager, scales_eager = mxfp8._quantize_blocks(x, carry)
        assert torch.equal(codes, codes_eager) and torch.equal(scales, scales_eager)
        back, back_eager = dequantize(codes, scales[:, None]), mxfp8._dequantize_blocks(codes, scales[:, None])
        assert torch.equal(back.nan_to_num(7), back_eager.nan_to_num(7))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


def test_functions_can_be_traced_into_a_compiled_model():
    def fake_quantized(x):
        return mxfp8.mxfp8_dequantize(*mxfp8.mxfp8_quantize(x))

    x = torch.randn(4, 80, generator=torch.Generator().manual_seed(9))
    assert torch.equal(torch.compile(fake_quantized, fullgraph=True)(x), fake_quantized(x))


def test_trim_scales_removes_the_padding_to_pairs():
    for k, groups in ((32, 1), (64, 2), (80, 3), (96, 3), (4304, 135)):
        scales = torch.randint(0, 255, (3, groups), dtype=torch.uint8, generator=torch.Generator().manual_seed(k))
        padded = torch.nn.functional.pad(scales, (0, groups % 2)).reshape(3, -1, 2)
        trimmed = mxfp8.trim_scales(padded, k)
        assert torch.equal(trimmed, scales) and trimmed.is_contiguous()
        assert torch.equal(mxfp8.trim_scales(padded.view(torch.float8_e8m0fnu), k), scales)
    with pytest.raises(ValueError, match=r"\(3, 3\).*\[\.\.\., 2, 2\].*80 values"):
        mxfp8.trim_scales(torch.zeros(3, 3, dtype=torch.uint8), 80)
    with pytest.raises(ValueError, match=r"\(3, 2, 2\)"):
        mxfp8.trim_scales(torch.zeros(3, 2, 2, dtype=torch.uint8), 32)
    with pytest.raises(TypeError, match="float32"):
        mxfp8.trim_scales(torch.zeros(3, 2, 2), 96)


class Operator:
    """Replaces torch_npu.npu_dynamic_mx_quant: the numerics of this module in its layout, with FP4 as the default."""

    def __init__(self, values_dtype=torch.float8_e4m3fn):
        self.calls, self.values_dtype = [], values_dtype

    def __call__(self, x, *, axis=-1, round_mode="rint", dst_type=296, block_size=32, scale_alg=0, dst_type_max=0.0):
        self.calls.append(dst_type)
        values, scales = mxfp8.mxfp8_quantize(x, block_size=block_size, scale_alg=scale_alg)
        padded = torch.nn.functional.pad(scales, (0, scales.shape[-1] % 2), value=99)
        return values.view(self.values_dtype), padded.unflatten(-1, (-1, 2)).view(torch.float8_e8m0fnu)


def test_npu_operator_receives_the_dtype_and_is_trimmed():
    x = torch.randn(4, 96, generator=torch.Generator().manual_seed(10)).bfloat16()
    for values_dtype in (torch.float8_e4m3fn, torch.uint8):
        operator = Operator(values_dtype)
        for scale_alg in (0, 1):
            values, scales = mxfp8.npu_mxfp8_quantize(x, scale_alg=scale_alg, operator=operator)
            expected = mxfp8.mxfp8_quantize(x, scale_alg=scale_alg)
            assert torch.equal(values.view(torch.uint8), expected[0].view(torch.uint8)) and torch.equal(
                scales, expected[1]
            )
        assert operator.calls == [torch.float8_e4m3fn] * 2
    with pytest.raises(ValueError, match=r"returned torch.float8_e5m2.*\(4, 96\)"):
        mxfp8.npu_mxfp8_quantize(x, operator=Operator(torch.float8_e5m2))


@pytest.mark.npu
def test_npu_operator_gives_the_same_bits():
    """Only for blocks whose scale byte is above 0: the operator writes zeros in the others."""
    pytest.importorskip("torch_npu", reason="needs an Ascend 950 and torch_npu")
    generator = torch.Generator().manual_seed(11)
    for scale_alg in (0, 1):
        for shape in ((64, 4096), (3, 96), (5, 80)):
            for dtype in (torch.bfloat16, torch.float16):
                x = torch.randn(shape, generator=generator).to(dtype)
                values, scales = mxfp8.npu_mxfp8_quantize(x.to("npu"), scale_alg=scale_alg)
                expected = mxfp8.mxfp8_quantize(x, scale_alg=scale_alg)
                assert torch.equal(values.cpu().view(torch.uint8), expected[0].view(torch.uint8))
                assert torch.equal(scales.cpu(), expected[1])


def test_missing_torch_npu_is_named():
    pytest.importorskip("torch")
    try:
        import torch_npu  # noqa: F401
    except ImportError:
        with pytest.raises(RuntimeError, match="torch_npu"):
            mxfp8.npu_mxfp8_quantize(torch.ones(2, 64))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale_alg", [0, 1])
def test_quantization_error_equals_float64(path, dtype, scale_alg):
    generator = torch.Generator().manual_seed(12)
    for shape in ((33,), (7, 80), (9, 4304)):
        x = (torch.randn(shape, generator=generator) * 2.0 ** torch.randint(-6, 6, shape, generator=generator)).to(
            dtype
        )
        values, scales = mxfp8.mxfp8_quantize(x, scale_alg=scale_alg)
        exact, error2, norm2, worst = x.double().reshape(-1, shape[-1]), 0.0, 0.0, 0.0
        rounded = mxfp8.mxfp8_dequantize(values, scales).double().reshape(-1, shape[-1])
        for row, back in zip(exact, rounded, strict=True):
            for i in range(0, shape[-1], 32):
                source, difference = row[i : i + 32], (back - row)[i : i + 32]
                error2, norm2 = error2 + float(difference @ difference), norm2 + float(source @ source)
                worst = max(worst, float(difference.abs().max() / source.abs().max()))
        error = mxfp8.quantization_error(x, values, scales)
        assert error.relative == pytest.approx(math.sqrt(error2 / norm2), rel=1e-6)
        assert error.worst_block == pytest.approx(worst, rel=1e-6)
        assert error.worst_block <= (0.125, 0.0625)[scale_alg]
        assert mxfp8.squared_error(x, values, scales).tolist() == pytest.approx([error2, norm2], rel=1e-6)


def test_quantization_error_of_zeros_extremes_and_nan(path):
    zero = torch.zeros(2, 64)
    assert mxfp8.quantization_error(zero, *mxfp8.mxfp8_quantize(zero)) == (0.0, 0.0)
    assert mxfp8.quantization_error(zero[:, :0], *mxfp8.mxfp8_quantize(zero[:, :0])) == (0.0, 0.0)
    for factor in (2.0**-100, 2.0**100):  # their squares are outside float32
        x = torch.full((2, 64), 1.1) * factor
        assert mxfp8.quantization_error(x, *mxfp8.mxfp8_quantize(x)).relative == pytest.approx(0.025 / 1.1, rel=1e-5)
    largest = torch.full((1, 32), 254, dtype=torch.uint8)[:, :1]  # 2^127, whose reciprocal is subnormal
    huge = torch.full((1, 32), 2.0**120)
    assert mxfp8.quantization_error(huge, (huge * 2.0**-127).to(torch.float8_e4m3fn), largest) == (0.0, 0.0)
    # The bytes of another tensor: the error is the difference of the values.
    x = torch.ones(1, 32)
    values, scales = mxfp8.mxfp8_quantize(-x)
    assert mxfp8.quantization_error(x, values, scales) == (2.0, 2.0)
    x[0, 3] = math.nan
    assert all(math.isnan(v) for v in mxfp8.quantization_error(x, *mxfp8.mxfp8_quantize(x)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(32,), (40, 64), (3, 80), (5, 4304), (2, 3, 2048 + 33), (0, 64)])
def test_encoding_equals_rounding_quantizing_and_measuring(path, shape, dtype):
    generator = torch.Generator().manual_seed(13)
    x = torch.randn(shape, generator=generator) * 2.0 ** torch.randint(-30, 30, shape, generator=generator)
    values, scales, error = mxfp8.mxfp8_encode(x, dtype)
    rounded = x.to(dtype)
    expected_values, expected_scales = mxfp8.mxfp8_quantize(rounded)
    assert values.shape == expected_values.shape and scales.shape == expected_scales.shape
    assert torch.equal(values.view(torch.uint8), expected_values.view(torch.uint8))
    assert torch.equal(scales, expected_scales)
    exact = mxfp8.squared_error(rounded, expected_values, expected_scales)
    assert torch.allclose(error, exact, rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(32,), (40, 64), (3, 80), (5, 4304), (2, 3, 2048 + 33), (33, 2048), (0, 64)])
def test_requantizing_equals_encoding_and_returns_the_changed_indices(path, shape, dtype):
    generator = torch.Generator().manual_seed(14)
    before = torch.randn(shape, generator=generator) * 2.0 ** torch.randint(-30, 30, shape, generator=generator)
    moved = torch.rand(shape, generator=generator) < 0.05
    now = torch.where(moved, before * torch.randn(shape, generator=generator), before)
    values, scales, _ = mxfp8.mxfp8_encode(before, dtype)
    old = values.view(torch.uint8).clone(), scales.clone()
    new_values, new_scales, new_error = mxfp8.mxfp8_encode(now, dtype)
    value_indices, scale_indices, error = mxfp8.mxfp8_requantize(now, dtype, values, scales)
    assert torch.equal(values.view(torch.uint8), new_values.view(torch.uint8)) and torch.equal(scales, new_scales)
    pairs = (value_indices, old[0], values.view(torch.uint8)), (scale_indices, old[1], scales)
    for indices, earlier, later in pairs:
        assert torch.equal(indices, (earlier != later).flatten().nonzero().squeeze(-1))
    assert torch.equal(error, new_error)
    assert not values.numel() or 0 < len(value_indices) < values.numel() or values.numel() == 32


@pytest.mark.parametrize("threads", [1, 2, 3, 100])
def test_number_of_threads_does_not_change_requantized_indices(threads):
    generator = torch.Generator().manual_seed(15)
    before = torch.randn(70, 4304, generator=generator)
    now = before + 1e-3 * torch.randn(70, 4304, generator=generator)
    values, scales, _ = mxfp8.mxfp8_encode(before, torch.bfloat16)
    old, new = values.view(torch.uint8).clone(), mxfp8.mxfp8_encode(now, torch.bfloat16)[0].view(torch.uint8)
    many = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        indices = mxfp8.mxfp8_requantize(now, torch.bfloat16, values, scales)[0]
    finally:
        torch.set_num_threads(many)
    assert torch.equal(indices, (old != new).flatten().nonzero().squeeze(-1))
    assert torch.equal(values.view(torch.uint8), new)


def test_requantizing_rejects_tensors_of_another_weight():
    values, scales, _ = mxfp8.mxfp8_encode(torch.zeros(4, 64), torch.bfloat16)
    with pytest.raises(ValueError, match=r"values is .*contiguous"):
        mxfp8.mxfp8_requantize(torch.zeros(4, 32), torch.bfloat16, values, scales)
    with pytest.raises(ValueError, match="scales has shape"):
        mxfp8.mxfp8_requantize(torch.zeros(4, 64), torch.bfloat16, values, scales[:, :1])
    with pytest.raises(ValueError, match="contiguous"):
        mxfp8.mxfp8_requantize(
            torch.zeros(64, 4).t(), torch.bfloat16, *(part.t().contiguous().t() for part in (values, scales))
        )


def test_encoding_rounds_to_even_and_keeps_nan_and_inf(path):
    bits = [0x3F808000, 0x3F818000, 0x3F808001, 0x7F7FFFFF, 0xFF7FFFFF, 0x00000001, 0x80008000, 0x007FFFFF]
    special = [0x7F800000, 0xFF800000, 0x7F800001, 0xFFFFFFFF, 0x7FC00000]
    for last in [None, *special]:
        raw = torch.tensor((bits + ([last] if last else []) + [0] * 32)[:32], dtype=torch.int64)
        x = raw.to(torch.int32).view(torch.float32)[None]
        values, scales, error = mxfp8.mxfp8_encode(x, torch.bfloat16)
        expected = mxfp8.mxfp8_quantize(x.bfloat16())
        assert torch.equal(values.view(torch.uint8), expected[0].view(torch.uint8))
        assert torch.equal(scales, expected[1])
        assert bool(error.isfinite().all()) == (int(scales) != 255)


def test_squared_errors_add_up_over_parts_of_very_different_magnitudes(path):
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(6, 96, generator=generator) * 2.0 ** torch.tensor([-120, -60, 0, 20, 60, 62.0])[:, None]
    whole = mxfp8.squared_error(x, *mxfp8.mxfp8_quantize(x))
    parts = [mxfp8.squared_error(row, *mxfp8.mxfp8_quantize(row)) for row in x]
    assert torch.allclose(sum(parts), whole, rtol=1e-6, atol=0)
    exact = x.double()
    error = mxfp8.mxfp8_dequantize(*mxfp8.mxfp8_quantize(x)).double() - exact
    for row, part in enumerate(parts):
        expected = [float(error[row] @ error[row]), float(exact[row] @ exact[row])]
        assert part.tolist() == pytest.approx(expected, rel=1e-6)
    huge, largest = torch.full((1, 32), 2.0**120), torch.full((1, 1), 254, dtype=torch.uint8)
    assert mxfp8.squared_error(huge, (huge * 2.0**-127).to(torch.float8_e4m3fn), largest)[0] == 0
    assert mxfp8.squared_error(x[:, :0], *mxfp8.mxfp8_quantize(x[:, :0])).tolist() == [0, 0]
    ones = torch.ones(1, 64)
    values, scales = mxfp8.mxfp8_quantize(ones)
    scales[0, 1] = 255
    assert math.isnan(mxfp8.squared_error(ones, values, scales)[0])
    ones[0, 40] = math.inf
    assert math.isnan(mxfp8.squared_error(ones, *mxfp8.mxfp8_quantize(ones))[0])


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: mxfp8.mxfp8_quantize(torch.ones(2, 32, dtype=torch.float64)), TypeError, r"float64.*\(2, 32\)"),
        (lambda: mxfp8.mxfp8_quantize(torch.ones(2, 32, dtype=torch.int8)), TypeError, r"int8.*\(2, 32\)"),
        (lambda: mxfp8.mxfp8_quantize([1.0]), TypeError, "list"),
        (lambda: mxfp8.mxfp8_quantize(torch.tensor(1.0)), ValueError, r"\(\).*float32"),
        (lambda: mxfp8.mxfp8_quantize(torch.ones(32), block_size=0), ValueError, "block_size=0"),
        (lambda: mxfp8.mxfp8_quantize(torch.ones(32), scale_alg=2), ValueError, "scale_alg=2"),
        (lambda: mxfp8.npu_mxfp8_quantize(torch.ones(32), scale_alg=2), ValueError, "scale_alg=2"),
        (lambda: mxfp8.npu_mxfp8_quantize(torch.ones(32).long()), TypeError, "int64"),
        (
            lambda: mxfp8.mxfp8_quantize(
                torch.ones(2, 64), out=(torch.ones(2, 64).to(torch.float8_e4m3fn), torch.ones(2, 1, dtype=torch.uint8))
            ),
            ValueError,
            r"out scales.*\(2, 1\).*\(2, 2\)",
        ),
        (
            lambda: mxfp8.mxfp8_quantize(
                torch.ones(2, 64), out=(torch.ones(2, 64), torch.ones(2, 2, dtype=torch.uint8))
            ),
            ValueError,
            "out values.*float32",
        ),
        (
            lambda: mxfp8.mxfp8_dequantize(torch.ones(32), torch.ones(1, dtype=torch.uint8)),
            TypeError,
            r"float32.*\(32,\)",
        ),
        (lambda: mxfp8.mxfp8_dequantize(F8, torch.ones(2, 1)), TypeError, "float32"),
        (
            lambda: mxfp8.mxfp8_dequantize(F8, torch.ones(2, 4, dtype=torch.uint8)),
            ValueError,
            r"\(2, 4\).*\(2, 3\).*\(2, 80\)",
        ),
        (lambda: mxfp8.mxfp8_dequantize(F8, torch.ones(2, 3, dtype=torch.uint8), torch.float64), TypeError, "float64"),
        (lambda: mxfp8.mxfp8_dequantize(F8, F8, block_size=0), ValueError, "block_size=0"),
        (
            lambda: mxfp8.mxfp8_dequantize(F8, torch.ones(2, 3, dtype=torch.uint8), out=torch.ones(2, 96)[:, :80]),
            ValueError,
            r"out is .*strides \(96, 1\)",
        ),
        (
            lambda: mxfp8.quantization_error(torch.ones(2, 64), F8, torch.ones(2, 3, dtype=torch.uint8)),
            ValueError,
            r"\(2, 64\).*\(2, 80\)",
        ),
    ],
)
def test_errors_name_shape_and_dtype(call, error, words):
    with pytest.raises(error, match=words):
        call()


F8 = torch.ones(2, 80).to(torch.float8_e4m3fn)
