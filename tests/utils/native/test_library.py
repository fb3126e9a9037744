"""Building and loading the C kernels: cached, safe with several processes at once, and optional for the result."""

import hashlib
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from verl.utils.native import library as native
from verl.utils.quantization import mxfp8

# Prints a digest of the results of a fresh process, and whether it loaded the kernels.
PROGRAM = """
import hashlib, torch
from verl.utils.native import library as native
from verl.utils.quantization import mxfp8
generator = torch.Generator().manual_seed(0)
x = torch.randn(40, 300, generator=generator) * torch.exp(torch.randn(40, 300, generator=generator) * 6)
x[0, 0], x[1, 1], x[2] = float("nan"), float("inf"), 0.0
digest = hashlib.sha256()
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    for scale_alg in (0, 1):
        values, scales = mxfp8.mxfp8_quantize(x.to(dtype), scale_alg=scale_alg)
        back = mxfp8.mxfp8_dequantize(values, scales).nan_to_num(7.0)
        for part in (values.view(torch.uint8), scales, back.view(torch.uint8)):
            digest.update(part.numpy().tobytes())
print(digest.hexdigest(), native.kernels() is not None)
"""


def start(environment: dict[str, str], program: str = PROGRAM) -> subprocess.Popen:
    full = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", program], env=full, **pipes)


def finish(process: subprocess.Popen) -> tuple[str, bool, str]:
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    digest, compiled = out.split()
    return digest, compiled == "True", err


@pytest.mark.slow
def test_without_a_compiler_the_bits_are_equal_and_one_warning_is_logged(tmp_path):
    """Torch operators replace the kernels if the path has no compiler."""
    reference = start({"XDG_CACHE_HOME": str(tmp_path / "with")})
    without = start({"XDG_CACHE_HOME": str(tmp_path / "without"), "PATH": str(tmp_path), "CC": ""})
    digest, compiled, err = finish(reference)
    assert compiled and "MXFP8" not in err
    other, compiled, err = finish(without)
    assert not compiled and other == digest
    assert "no gcc, cc or clang" in err and err.count("MXFP8") == 1


@pytest.mark.slow
def test_several_processes_can_build_at_once(tmp_path):
    """No process loads a partial library; one library and no partial file remain."""
    program = "from verl.utils.native import library as native; print('loaded', native.kernels() is not None)"
    processes = [start({"XDG_CACHE_HOME": str(tmp_path)}, program) for _ in range(4)]
    assert {finish(process)[:2] for process in processes} == {("loaded", True)}
    left = list((tmp_path / "verl").iterdir())
    assert len(left) == 1 and left[0].name.startswith("mx-")


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "verl"


@pytest.mark.slow
def test_library_is_built_once_per_processor(cache, monkeypatch):
    compiler = native._find_compiler()
    first = native._build(compiler)
    built = first.stat().st_mtime_ns
    assert native._build(compiler) == first and first.stat().st_mtime_ns == built
    monkeypatch.setattr(native, "_processor", lambda: "another")
    assert native._build(compiler) != first
    assert len(list(cache.iterdir())) == 2


def test_cc_may_contain_options(monkeypatch):
    monkeypatch.setenv("CC", "gcc -fno-lto")
    assert native._find_compiler()[1:] == ["-fno-lto"]


def test_directory_that_others_can_write_is_not_used(cache):
    """Loading a library runs its code, so the directory must belong to this user alone."""
    cache.mkdir(mode=0o777)
    cache.chmod(0o777)
    directory = native._cache_directory()
    assert directory != cache and directory.stat().st_mode & 0o777 == 0o700


def test_build_works_without_a_usable_home_directory(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert native._build(native._find_compiler()).exists()


def test_compiler_without_openmp_builds_single_threaded_kernels(cache, tmp_path):
    compiler = tmp_path / "no-openmp"
    real = native._find_compiler()[0]
    compiler.write_text(f'#!/bin/sh\ncase "$*" in *fopenmp*) echo no openmp >&2; exit 1;; esac\nexec {real} "$@"\n')
    compiler.chmod(0o755)
    assert native._build([str(compiler)]).exists()


def test_number_of_threads_does_not_change_the_bits():
    x = torch.randn(300, 4304, generator=torch.Generator().manual_seed(1)).bfloat16()
    before, seen = torch.get_num_threads(), set()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            values, scales = mxfp8.mxfp8_quantize(x)
            error = mxfp8.quantization_error(x, values, scales)
            content = values.view(torch.uint8).numpy().tobytes() + scales.numpy().tobytes()
            seen.add((hashlib.sha256(content).hexdigest(), error))
    finally:
        torch.set_num_threads(before)
    assert len(seen) == 1


def test_flush_to_zero_does_not_change_the_bits():
    """A process that flushes subnormals (torch.set_flush_denormal) quantizes tiny blocks like any other process."""
    tiny = torch.randn(8, 64, generator=torch.Generator().manual_seed(2)) * 2.0**-126
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush subnormals")
    try:
        flushed = mxfp8.mxfp8_quantize(tiny)
    finally:
        torch.set_flush_denormal(False)
    expected = mxfp8.mxfp8_quantize(tiny)
    assert torch.equal(flushed[0].view(torch.uint8), expected[0].view(torch.uint8))
    assert torch.equal(flushed[1], expected[1]) and expected[0].float().abs().max() > 0


@pytest.mark.parametrize(
    ("compiler", "words"), [("/nonexistent", "CC=/nonexistent is not a program"), ("failing", "cannot compile today")]
)
def test_failing_compiler_is_named_in_one_warning(compiler, words, cache, tmp_path, monkeypatch, caplog):
    failing = tmp_path / "failing"
    failing.write_text("#!/bin/sh\necho 'cannot compile today' >&2\nexit 1\n")
    failing.chmod(0o755)
    monkeypatch.setenv("CC", str(failing) if compiler == "failing" else compiler)
    native.kernels.cache_clear()
    try:
        with caplog.at_level(logging.WARNING):
            assert native.kernels() is None and native.kernels() is None
        messages = [record.getMessage() for record in caplog.records if "MXFP8" in record.message]
        assert len(messages) == 1 and words in messages[0]
        values, _ = mxfp8.mxfp8_quantize(torch.ones(1, 32))
        assert (values.float() == 256).all()
    finally:
        native.kernels.cache_clear()
