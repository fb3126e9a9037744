"""The plugin in a process of its own, as vLLM loads it."""

import subprocess
import sys

import pytest

PROGRAM = """
import ctypes

import torch

from verl.utils.vllm.plugin import register

ARCH_PRCTL, GET_PERMITTED_FEATURES, TILES = 158, 0x1022, 1 << 18


def may_use_tiles():
    mask = ctypes.c_uint64()
    ctypes.CDLL(None).syscall(ARCH_PRCTL, GET_PERMITTED_FEATURES, ctypes.byref(mask))
    return bool(mask.value & TILES)


before = may_use_tiles()
register()
register()
print(torch.cpu._is_amx_tile_supported(), before, may_use_tiles())
"""


@pytest.mark.slow
def test_a_cpu_with_amx_may_use_it():
    """Otherwise Linux ends the engine with "illegal instruction" as soon as attention in bfloat16 starts."""
    output = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True).stdout
    supported, before, after = output.split()
    assert before == "False" and after == supported
