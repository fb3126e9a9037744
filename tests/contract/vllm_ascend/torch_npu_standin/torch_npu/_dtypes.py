"""Numbers that torch_npu 2.10 uses for dtypes that torch lacks, and checks of dtype arguments."""

import torch

int4 = 285
hifloat8 = 290
float8_e5m2 = 291
float8_e4m3fn = 292
float8_e8m0fnu = 293
float4_e2m1fn_x2 = 296
float4_e1m2fn_x2 = 297

_E4M3 = (torch.float8_e4m3fn, float8_e4m3fn)
_E8M0 = (torch.float8_e8m0fnu, float8_e8m0fnu)


def require_e4m3(name: str, dtype) -> None:
    """Check that a dtype is e4m3, the only one that the stand-in computes."""
    if dtype not in _E4M3:
        raise NotImplementedError(f"{name}={dtype}: the stand-in supports only float8_e4m3fn")


def require_e8m0(name: str, dtype) -> None:
    """Check that a scale dtype is E8M0: with another dtype an operator would read the bytes differently."""
    if dtype not in _E8M0:
        raise NotImplementedError(f"{name}={dtype}: the stand-in supports only scales of float8_e8m0fnu")


def is_fp4(name: str, dtype) -> bool:
    """Return whether the dtype of a weight is packed FP4; None is the dtype of its tensor."""
    if dtype not in (None, float4_e2m1fn_x2):
        raise NotImplementedError(f"{name}={dtype}: the stand-in supports only float4_e2m1fn_x2 and None")
    return dtype is not None


def reject(operator: str, **arguments) -> None:
    """Reject arguments that the stand-in does not support."""
    for name, value in arguments.items():
        if value is not None:
            raise NotImplementedError(f"{operator}: {name}={value!r} is not supported by the stand-in")
