import pytest

from verl.utils.device_peaks import bf16_peak, device_model


@pytest.mark.parametrize(
    ("model", "teraflops"),
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA H200 NVL", 835),
        ("NVIDIA H200 MIG 1g.18gb", None),
        ("NVIDIA H20", 148),
        ("Ascend950DT_95A1", 432),
        ("Ascend910B3", None),
        ("", None),
    ],
)
def test_peaks_belong_to_whole_names(model, teraflops):
    assert bf16_peak(model) == (None if teraflops is None else teraflops * 10**12)


def test_a_cpu_has_no_name():
    assert device_model("cpu") == ""
