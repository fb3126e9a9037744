"""Peak BF16 FLOP/s of devices, dense, by the name that the device's driver reports."""

from __future__ import annotations

import importlib
import re

# NVIDIA: data sheets of the products, "BFLOAT16 Tensor Core" without sparsity. Ascend 950: docs/performance.md. Other
# devices have no peak: their variants differ, or their names are not known (Ascend 910B and 910C).
_TERA = 10**12
_BF16_PEAKS = {
    r"NVIDIA A[18]00-(SXM4|PCIE)-[48]0GB|NVIDIA A[18]00 80GB PCIe": 312 * _TERA,
    r"NVIDIA H100 80GB HBM3|NVIDIA H[12]00|NVIDIA H800": 989 * _TERA,
    r"NVIDIA H100 PCIe": 756 * _TERA,
    r"NVIDIA H100 NVL|NVIDIA H200 NVL": 835 * _TERA,
    r"NVIDIA H20": 148 * _TERA,
    r"NVIDIA B200": 2250 * _TERA,
    r"NVIDIA L40S": 362 * _TERA,
    r"NVIDIA L40": 181 * _TERA,
    r"NVIDIA L20": 119 * _TERA,
    r"Ascend950(DT|PR)\w*": 432 * _TERA,
}


def device_model(device: str) -> str:
    """Return the name of this process's device, as its driver reports it; empty on a CPU.

    Args:
        device: `cpu`, `cuda` or `npu`.
    """
    if device == "cpu":
        return ""
    torch = importlib.import_module("torch")
    if device == "npu":
        importlib.import_module("torch_npu")  # adds torch.npu
    return str(getattr(torch, device).get_device_name())


def bf16_peak(model: str) -> int | None:
    """Return the peak of a device in FLOP/s for products of BF16 matrices; None for an unknown device and for a CPU.

    Args:
        model: name of the device, whole: a part of a device (MIG) has another peak and another name.
    """
    return next((peak for pattern, peak in _BF16_PEAKS.items() if re.fullmatch(pattern, model)), None)
