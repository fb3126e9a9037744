"""The choice of the compute dtype."""

import pytest

from verl.utils.dtypes import choose_dtype

AVX2 = "processor\t: 0\nmodel name\t: X\nflags\t\t: fpu avx2 fma\n\nprocessor\t: 1\nflags\t\t: fpu avx512_bf16\n"
AVX512 = "flags\t\t: fpu avx2 avx512f avx512_bf16\n"
AMX = "flags: fpu amx_bf16 amx_tile\n"


@pytest.mark.parametrize(
    ("device", "requested", "cpuinfo", "name", "why"),
    [
        ("cpu", "auto", AVX2, "float32", "neither avx512_bf16 nor amx_bf16"),
        ("cpu", "auto", AVX512, "bfloat16", "has avx512_bf16"),
        ("cpu", "auto", AMX, "bfloat16", "has amx_bf16"),
        ("cpu", "auto", "", "float32", "neither"),
        ("cuda", "auto", AVX2, "bfloat16", "cuda"),
        ("npu", "auto", AVX2, "bfloat16", "npu"),
        ("cpu", "bf16", AVX2, "bfloat16", "as configured"),
        ("cuda", "fp32", AVX512, "float32", "as configured"),
        ("cuda", "float32", AVX512, "float32", "as configured"),
    ],
)
def test_choice_of_dtype_has_a_reason(device, requested, cpuinfo, name, why):
    choice = choose_dtype(device, requested, cpuinfo=cpuinfo)
    assert choice.name == name and why in choice.why


def test_an_unsupported_dtype_is_an_error():
    with pytest.raises(ValueError, match="float16"):
        choose_dtype("cpu", "float16")
