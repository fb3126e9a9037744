"""Builds this directory's C files with the C compiler, once per machine, and loads them; warns if it cannot.

One `gcc` call takes about half a second. Its result is kept in the user's cache directory under a name derived from the
source, the compiler and the processor, so later processes only load it, and machines that share a home directory do not
load each other's.
"""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

logger = logging.getLogger(__name__)

_SOURCES = [Path(__file__).with_name(name) for name in ("mx_kernels.c", "tensor_diff.c")]
_HEADERS = [Path(__file__).with_name("kernels.h")]
# No fast-math: the kernels rely on IEEE rounding. Without -fno-trapping-math gcc does not vectorize selects between two
# floats.
_FLAGS = ["-x", "c", "-std=c11", "-O3", "-march=native", "-ffp-contract=off", "-fno-trapping-math", "-fno-math-errno"]
_FLAGS += ["-shared", "-fPIC"]

_POINTER, _LONG, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
_QUANTIZE = [_POINTER, _LONG, _POINTER, _POINTER, _LONG, _LONG, _INT, _INT]
_DEQUANTIZE = [_POINTER, _POINTER, _POINTER, _LONG, _LONG, _INT]
_ERROR = [_POINTER, _LONG, _POINTER, _POINTER, _POINTER, _LONG, _LONG, _INT]
_DIFF = [_POINTER, _POINTER, _LONG, _POINTER, _INT]
_ENCODE = [_POINTER, _LONG, _POINTER, _POINTER, _POINTER, _LONG, _LONG, _INT, _INT]
_ENCODE_DIFF = [*_ENCODE, _POINTER, _POINTER, _POINTER]
_SIGNATURES = {
    "mx_encode_f32_bf16": _ENCODE,
    "mx_encode_diff_f32_bf16": _ENCODE_DIFF,
    **{f"mx_quantize_{kind}": _QUANTIZE for kind in ("f32", "bf16", "f16")},
    **{f"mx_dequantize_{kind}": _DEQUANTIZE for kind in ("f32", "bf16")},
    **{f"diff_and_update_{kind}": _DIFF for kind in (8, 16, 32, 64, "f32_bf16")},
    **{f"mx_{what}_{kind}": _ERROR for what in ("error", "squares") for kind in ("f32", "bf16", "f16")},
}


@functools.cache
def kernels() -> ctypes.CDLL | None:
    """Return the compiled kernels, built at the first call on a machine; None, with one warning, if that fails.

    The compiler is `$CC` if that is set, else the first of gcc, cc and clang on the path.
    """
    try:
        library = ctypes.CDLL(str(_build(_find_compiler())))
    except (_NoCompiler, OSError, subprocess.SubprocessError) as error:
        detail = getattr(error, "stderr", None) or error
        logger.warning(
            "MXFP8: the compiled CPU kernels are not available (%s); torch operators give the same bits, but are "
            "many times slower. Install gcc, or set CC to a C compiler.",
            str(detail).strip(),
        )
        return None
    for name, argument_types in _SIGNATURES.items():
        function = getattr(library, name)
        function.argtypes, function.restype = argument_types, None if argument_types is not _DIFF else _LONG
    return library


class _NoCompiler(Exception):
    """No C compiler was found."""


def _find_compiler() -> list[str]:
    chosen = shlex.split(os.environ.get("CC", ""))
    for command in [chosen] if chosen else [["gcc"], ["cc"], ["clang"]]:
        if path := shutil.which(command[0]):
            return [path, *command[1:]]
    raise _NoCompiler(f"CC={chosen[0]} is not a program" if chosen else "no gcc, cc or clang on the path")


def _build(compiler: list[str]) -> Path:
    """Return the shared library for this source, compiler and processor; compile it if it is not in the cache."""
    version = subprocess.run([*compiler, "--version"], capture_output=True, text=True, check=True, timeout=60).stdout
    texts = [source.read_text() for source in (*_SOURCES, *_HEADERS)]
    identity = "\n".join([*texts, *compiler, *_FLAGS, version, _processor()])
    library = _cache_directory() / f"mx-{hashlib.sha256(identity.encode()).hexdigest()[:24]}.so"
    if library.exists():
        return library
    handle, partial = tempfile.mkstemp(dir=library.parent, prefix="building-", suffix=".so")
    os.close(handle)
    try:
        command = [*compiler, *_FLAGS, *map(str, _SOURCES), "-o", partial]
        try:
            _run([*command, "-fopenmp"])
        except subprocess.CalledProcessError:
            # clang without its OpenMP runtime: one thread is still far faster than torch operators.
            _run(command)
        # Several processes may build at once: each writes its own file, and the last complete one stays.
        os.replace(partial, library)
    finally:
        Path(partial).unlink(missing_ok=True)
    return library


def _run(command: list[str]) -> None:
    subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)


def _processor() -> str:
    """Return all that `-march=native` depends on: architecture, model and feature lines of the first processor."""
    wanted = ("model name", "flags", "Features", "CPU implementer", "CPU part", "CPU variant")
    try:
        first = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    except OSError:
        return platform.platform() + platform.processor()
    return platform.machine() + "\n".join(line for line in first.splitlines() if line.startswith(wanted))


def _cache_directory() -> Path:
    """Return a directory that only this user can write; a temporary one if the cache directory is not safe."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    directory = Path(base) / "verl"
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError:
        return _temporary_directory()
    mine = directory.stat().st_uid == os.getuid() and not directory.stat().st_mode & 0o022
    return directory if mine and os.access(directory, os.W_OK) else _temporary_directory()


@functools.cache
def _temporary_directory() -> Path:
    return Path(tempfile.mkdtemp(prefix="verl-mx-"))
