import pytest

from verl.preflight.target import Hardware


def test_unknown_hardware_is_an_error():
    with pytest.raises(ValueError, match="use one of cpu, cuda:a100"):
        Hardware("npu:910c")
