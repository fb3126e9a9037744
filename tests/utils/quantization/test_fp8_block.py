"""Blocks of e4m3 compared with a computation of one number at a time."""

import math

import pytest
import torch

from verl.utils.quantization.fp8_block import fp8_block_dequantize, fp8_block_quantize

NUMBERS = [m * 2.0**-9 if e == 0 else (8 + m) * 2.0 ** (e - 10) for e in range(16) for m in range(8)][:127]


def nearest(value):
    """Return the e4m3 number closest to a value; ties to the even code."""
    code = min(range(127), key=lambda code: (abs(NUMBERS[code] - abs(value)), code % 2))
    return math.copysign(NUMBERS[code], value)


@pytest.mark.parametrize("shape", [(5, 7), (8, 12), (9, 13), (1, 4), (4, 1)])
@pytest.mark.parametrize("block", [(4, 4), (1, 6)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_value_and_scale_equals_the_reference(shape, block, dtype):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)
    values, scales = fp8_block_quantize(x, block)
    assert (values.dtype, scales.dtype) == (torch.float8_e4m3fn, torch.float32)
    assert scales.shape == (math.ceil(shape[0] / block[0]), math.ceil(shape[1] / block[1]))
    back = fp8_block_dequantize(values, scales, torch.float32, block)
    for top in range(scales.shape[0]):
        for left in range(scales.shape[1]):
            rows = slice(top * block[0], top * block[0] + block[0])
            columns = slice(left * block[1], left * block[1] + block[1])
            scale = (x[rows, columns].float().abs().max() / 448).item()
            assert scales[top, left].item() == scale
            for got, restored, source in zip(
                values[rows, columns].flatten().tolist(),
                back[rows, columns].flatten().tolist(),
                x[rows, columns].flatten().tolist(),
                strict=True,
            ):
                expected = nearest(torch.tensor(source).div(torch.tensor(scale)).item())
                assert got == expected
                assert restored == torch.tensor(expected).mul(torch.tensor(scale)).item()


def test_block_of_zeros_stays_zero():
    values, scales = fp8_block_quantize(torch.zeros(3, 3), (2, 2))
    assert scales.eq(1).all()
    assert not values.float().any()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_inf_show_only_in_their_scale(value):
    x = torch.ones(4, 4)
    x[0, 3] = value
    _, scales = fp8_block_quantize(x, (2, 2))
    assert scales.isfinite().tolist() == [[True, False], [True, True]]


def test_other_shapes_than_matrices_are_rejected():
    with pytest.raises(ValueError, match=r"shape \(2, 2, 2\)"):
        fp8_block_quantize(torch.zeros(2, 2, 2))
