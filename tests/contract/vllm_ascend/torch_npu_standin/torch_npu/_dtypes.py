"""Numbers by which torch_npu 2.10 names dtypes that torch lacks, and how an operator reads a dtype argument."""

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
    """Only MXFP8 with e4m3 values is computed here."""
    if dtype not in _E4M3:
        raise NotImplementedError(f"{name}={dtype}: the stand-in computes float8_e4m3fn only")


def require_e8m0(name: str, dtype) -> None:
    """Scales of MXFP8 are E8M0, and an operator that is not told so reads the bytes as something else."""
    if dtype not in _E8M0:
        raise NotImplementedError(f"{name}={dtype}: the stand-in reads scales as float8_e8m0fnu only")


def refuse(operator: str, **arguments) -> None:
    """Refuse arguments that the stand-in gives no meaning to."""
    for name, value in arguments.items():
        if value is not None:
            raise NotImplementedError(f"{operator}: {name}={value!r} has no meaning in the stand-in")
