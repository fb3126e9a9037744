"""MXFP4 compared bit for bit with gfloat, an independent library, and with the documented order of packed values."""

import math

import gfloat
import gfloat.formats
import numpy as np
import pytest
import torch

from verl.utils.quantization import mxfp4
from verl.utils.quantization.formats import MXFP4_ERROR

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
E2M1 = gfloat.formats.format_info_ocp_e2m1
BLOCK = gfloat.BlockFormatInfo("mxfp4_e2m1", E2M1, 32, gfloat.formats.format_info_ocp_e8m0)


def by_gfloat(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return codes [.., K] and scale bytes [.., ceil(K / 32)]; a zero block has byte 0, bytes are clamped to 0..254."""
    k = x.shape[-1]
    codes, scales = [], []
    for row in x.double().reshape(-1, k).numpy():
        for start in range(0, k, 32):
            block = row[start : start + 32]
            factor = gfloat.compute_scale_amax(E2M1.emax, block) if block.any() else 0.0
            factor = max(factor, 2.0**-127)
            scales.append(round(math.log2(factor)) + 127)
            rounded = [gfloat.round_float(E2M1, v / factor, gfloat.RoundMode.TiesToEven, sat=True) for v in block]
            codes += [gfloat.encode_float(E2M1, v) for v in rounded]
    shape = (*x.shape[:-1], -(-k // 32))
    return torch.tensor(codes).reshape(x.shape), torch.tensor(scales).reshape(shape)


def unpacked(packed: torch.Tensor) -> torch.Tensor:
    """Return the codes [.., K] of packed bytes: the low four bits are the first of two values."""
    codes = torch.zeros(*packed.shape[:-1], 2 * packed.shape[-1], dtype=torch.int64)
    codes[..., 0::2], codes[..., 1::2] = packed.long() % 16, packed.long() // 16
    return codes


def assert_bits(x: torch.Tensor, device: str = "cpu") -> None:
    packed, scales = mxfp4.mxfp4_quantize(x.to(device))
    codes, expected = by_gfloat(x)
    assert torch.equal(scales.cpu().long(), expected)
    assert torch.equal(unpacked(packed.cpu()), codes)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_ties_saturation_zeros_and_subnormals_equal_gfloat(dtype, device):
    """Each number stands next to amax 4, so the scale is 1; then the same block at the ends of the range."""
    eps = torch.finfo(dtype).eps
    edges = [0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0, 2.5, 3.0, 3.5, 4.0, 5.0, 6.0, 7.0, 7.5]
    edges += [v * (1 + step) for v in edges for step in (eps, -eps)]
    edges = [sign * v for v in edges for sign in (1.0, -1.0)]
    edges += [0.0] * (-len(edges) % 31)
    block = torch.cat([torch.full((len(edges) // 31, 1), 4.0), torch.tensor(edges).view(-1, 31)], 1).double()
    scaled = [block * 2.0**shift for shift in (0, -5, 10, -120, -126, -131, -140, 120)]
    x = torch.cat([*scaled, torch.zeros(1, 32), -torch.zeros(1, 32)]).to(dtype)
    x[~x.isfinite()] = 0.0
    assert_bits(x, device)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_16_bit_number_in_a_block_equals_gfloat(dtype):
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    every = every[every.isfinite()]
    blocks = [every[: len(every) // 32 * 32].view(-1, 32)]
    below = every[every.abs() <= 1.75]
    below = below[: len(below) // 31 * 31].view(-1, 31)
    blocks.append(torch.cat([torch.full((len(below), 1), 1.75, dtype=dtype), below], 1))
    x = torch.cat(blocks)
    sample = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[:1000]
    assert_bits(x[sample])


@pytest.mark.parametrize("shape", [(32,), (6, 64), (3, 80), (2, 3, 46), (1, 2), (0, 64), (4, 0)])
def test_random_tensors_of_any_shape_equal_gfloat(shape):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(shape, generator=generator) * 2.0 ** torch.randint(-30, 30, shape, generator=generator)
    packed, scales = mxfp4.mxfp4_quantize(x)
    assert (packed.dtype, packed.shape) == (torch.uint8, (*shape[:-1], shape[-1] // 2)) and packed.is_contiguous()
    assert (scales.dtype, scales.shape) == (torch.uint8, (*shape[:-1], -(-shape[-1] // 32)))
    if x.numel():
        assert_bits(x)
        assert_bits(x.double().mul(3).bfloat16())


def test_pieces_of_a_large_tensor_equal_its_rows(monkeypatch):
    x = torch.randn(50, 96, generator=torch.Generator().manual_seed(2))
    whole = [*mxfp4.mxfp4_quantize(x), mxfp4.mxfp4_squared_error(x, *mxfp4.mxfp4_quantize(x))]
    monkeypatch.setattr(mxfp4, "EAGER_PIECE", 7 * 32)
    pieces = [*mxfp4.mxfp4_quantize(x), mxfp4.mxfp4_squared_error(x, *mxfp4.mxfp4_quantize(x))]
    assert torch.equal(whole[0], pieces[0]) and torch.equal(whole[1], pieces[1])
    assert torch.allclose(whole[2], pieces[2], rtol=1e-12)
    assert torch.equal(mxfp4.mxfp4_dequantize(*pieces[:2]), mxfp4.mxfp4_dequantize(*whole[:2]))


def test_strided_inputs_equal_contiguous_ones():
    base = torch.randn(64, 200, generator=torch.Generator().manual_seed(3)).bfloat16()
    for x in (base.t(), base[:, 7:151], base[::2, ::4], base[5], base[None, :, 8:136].expand(2, -1, -1)):
        for got, expected in zip(mxfp4.mxfp4_quantize(x), mxfp4.mxfp4_quantize(x.clone().contiguous()), strict=True):
            assert torch.equal(got, expected)
    assert not mxfp4.mxfp4_quantize(base.requires_grad_())[0].requires_grad


@pytest.mark.parametrize("device", DEVICES)
def test_dequantizing_every_byte_with_every_scale_equals_gfloat(device):
    packed = torch.arange(256, dtype=torch.uint8).repeat(256, 1)
    scales = torch.arange(256, dtype=torch.uint8)[:, None].expand(256, 16).contiguous()
    table = torch.tensor([gfloat.decode_float(E2M1, code).fval for code in range(16)], dtype=torch.float64)
    powers = torch.tensor([gfloat.decode_float(BLOCK.stype, b).fval for b in range(256)], dtype=torch.float64)
    exact = powers[:, None] * table[unpacked(packed)]
    for dtype in DTYPES:
        got = mxfp4.mxfp4_dequantize(packed.to(device), scales.to(device), dtype).cpu()
        expected = exact.float().to(dtype)  # exact in float32 except for overflow, then rounded once
        assert torch.equal(got.isnan(), expected.isnan()) and int(got.isnan().sum()) == 512
        assert torch.equal(got.nan_to_num(7), expected.nan_to_num(7))
        assert torch.equal(torch.signbit(got[~got.isnan()]), torch.signbit(expected[~expected.isnan()]))
        out = torch.empty_like(got)
        assert mxfp4.mxfp4_dequantize(packed, scales, dtype, out=out) is out
        assert torch.equal(out.nan_to_num(7), got.nan_to_num(7))


def test_order_of_packed_values():
    """1.0 is code 2, -6.0 is code 15: the first value is in the low bits, as in torch.float4_e2m1fn_x2."""
    packed, _ = mxfp4.mxfp4_quantize(torch.tensor([[1.0, -6.0, 0.0, 4.0]]))
    assert packed.tolist() == [[0xF2, 0x60]]


@pytest.mark.parametrize("bad", [math.nan, -math.nan, math.inf, -math.inf])
def test_nan_and_inf_affect_only_their_block(bad):
    for dtype in DTYPES:
        x = torch.ones(2, 72, dtype=dtype)
        x[0, 40], x[1, 71] = bad, bad
        packed, scales = mxfp4.mxfp4_quantize(x)
        assert scales.tolist() == [[125, 255, 125], [125, 125, 255]]
        nan = mxfp4.mxfp4_dequantize(packed, scales).isnan()
        assert nan.sum() == 40 and nan[0, 32:64].all() and nan[1, 64:].all()
        assert mxfp4.mxfp4_squared_error(x, packed, scales).isnan()[0]


@pytest.mark.parametrize("dtype", DTYPES)
def test_encoding_equals_rounding_quantizing_and_measuring(dtype):
    x = torch.randn(7, 80, generator=torch.Generator().manual_seed(4))
    packed, scales, error = mxfp4.mxfp4_encode(x, dtype)
    rounded = x.to(dtype)
    codes, expected_scales = by_gfloat(rounded)
    assert torch.equal(unpacked(packed), codes) and torch.equal(scales.long(), expected_scales)
    table = np.array([gfloat.decode_float(E2M1, code).fval for code in range(16)])
    factors = np.repeat(2.0 ** (expected_scales.numpy() - 127.0), 32, axis=-1)[:, :80]
    difference = table[codes.numpy()] * factors - rounded.double().numpy()
    assert error.tolist() == pytest.approx([float((difference**2).sum()), float((rounded.double() ** 2).sum())])
    assert 0.05 < math.sqrt(error[0] / error[1]) < 0.2


def test_documented_error_is_that_of_normal_values():
    x = torch.randn(500, 1024, generator=torch.Generator().manual_seed(8))
    error, norm = mxfp4.mxfp4_encode(x, torch.float32)[2].tolist()
    assert math.sqrt(error / norm) == pytest.approx(MXFP4_ERROR, rel=0.02)


def test_compiled_and_eager_bits_agree():
    """The fused path of a GPU, here with Inductor's C++."""
    torch._dynamo.reset()
    quantize = torch.compile(mxfp4._quantize_blocks, dynamic=True)
    dequantize = torch.compile(mxfp4._dequantize_blocks, dynamic=True)
    generator = torch.Generator().manual_seed(5)
    for rows in (2, 64, 1000):
        bits = torch.randint(-(2**31), 2**31, (rows, 32), generator=generator, dtype=torch.int64).to(torch.int32)
        x = bits.view(torch.float32)
        x[: rows // 2].mul_(0).add_(torch.randn(rows // 2, 32, generator=generator))
        x[0, :8] = torch.tensor([0.0, -0.0, 1e-45, -1e-45, 1e-39, 0.25, 0.75, 7.0])
        packed, scales = quantize(x)
        packed_eager, scales_eager = mxfp4._quantize_blocks(x)
        assert torch.equal(packed, packed_eager) and torch.equal(scales, scales_eager)
        (back,), (back_eager,) = (
            function(packed, scales[:, None]) for function in (dequantize, mxfp4._dequantize_blocks)
        )
        assert torch.equal(back.nan_to_num(7), back_eager.nan_to_num(7))


class Operator:
    """Replaces torch_npu.npu_dynamic_mx_quant: the numerics of this module in its layout, with FP4 as the default."""

    def __init__(self, short=0):
        self.calls, self.short = [], short

    def __call__(self, x, *, axis=-1, round_mode="rint", dst_type=296, block_size=32, scale_alg=0, dst_type_max=0.0):
        self.calls.append((round_mode, dst_type, scale_alg))
        packed, scales = mxfp4.mxfp4_quantize(x)
        padded = torch.nn.functional.pad(scales, (0, scales.shape[-1] % 2), value=99)
        return packed[..., self.short :], padded.unflatten(-1, (-1, 2)).view(torch.float8_e8m0fnu)


def test_npu_operator_is_called_for_fp4_and_trimmed():
    x = torch.randn(4, 96, generator=torch.Generator().manual_seed(6)).bfloat16()
    operator = Operator()
    packed, scales = mxfp4.npu_mxfp4_quantize(x, operator=operator)
    expected = mxfp4.mxfp4_quantize(x)
    assert torch.equal(packed, expected[0]) and torch.equal(scales, expected[1])
    assert operator.calls == [("rint", 296, 0)]
    with pytest.raises(ValueError, match=r"returned torch.uint8 of shape \(4, 47\).*expected \(4, 48\) bytes"):
        mxfp4.npu_mxfp4_quantize(x, operator=Operator(short=1))


@pytest.mark.npu
def test_npu_operator_gives_the_same_bits():
    """Only for blocks whose scale byte is above 0: the operator writes zeros in the others."""
    pytest.importorskip("torch_npu", reason="needs an Ascend 950 and torch_npu")
    generator = torch.Generator().manual_seed(7)
    for shape in ((64, 4096), (3, 96), (5, 80)):
        x = torch.randn(shape, generator=generator).bfloat16()
        packed, scales = mxfp4.npu_mxfp4_quantize(x.to("npu"))
        expected = mxfp4.mxfp4_quantize(x)
        assert torch.equal(packed.cpu(), expected[0]) and torch.equal(scales.cpu(), expected[1])


PACKED, SCALES = torch.zeros(2, 40, dtype=torch.uint8), torch.zeros(2, 3, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: mxfp4.mxfp4_quantize(torch.ones(2, 33)), ValueError, r"\(2, 33\): the last dimension must be even"),
        (lambda: mxfp4.mxfp4_quantize(torch.ones(2, 32, dtype=torch.float64)), TypeError, r"float64.*\(2, 32\)"),
        (lambda: mxfp4.mxfp4_quantize(torch.tensor(1.0)), ValueError, r"shape \(\)"),
        (lambda: mxfp4.mxfp4_encode([1.0], torch.bfloat16), TypeError, "list"),
        (lambda: mxfp4.mxfp4_dequantize(PACKED.float(), SCALES), TypeError, r"float32.*expected uint8"),
        (lambda: mxfp4.mxfp4_dequantize(PACKED, SCALES[:, :2]), ValueError, r"\(2, 2\), expected \(2, 3\)"),
        (lambda: mxfp4.mxfp4_dequantize(PACKED, SCALES.float()), TypeError, "scales has dtype torch.float32"),
        (lambda: mxfp4.mxfp4_dequantize(PACKED, SCALES, torch.float64), TypeError, "float64"),
        (
            lambda: mxfp4.mxfp4_dequantize(PACKED, SCALES, out=torch.ones(2, 40)),
            ValueError,
            r"out is .*\(2, 40\).*\(2, 80\)",
        ),
        (lambda: mxfp4.mxfp4_squared_error(torch.ones(2, 64), PACKED, SCALES), ValueError, r"\(2, 64\).*\(2, 40\)"),
    ],
)
def test_errors_name_shape_and_dtype(call, error, words):
    with pytest.raises(error, match=words):
        call()
