"""The wheel: it can be built from a clone, contains every file, and runs without the clone."""

import json
import os
import shutil
import site
import subprocess
import sys
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

import verl

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("verl", "hydra_plugins")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def run(*command, **options):
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, **options)
    assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Build from a copy, because a build leaves directories behind and includes those of earlier builds."""
    source, built = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("built")
    for name in PACKAGES:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    offline = ("--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check")
    run(sys.executable, "-m", "pip", "wheel", *offline, "-w", str(built), ".", cwd=source)
    (path,) = built.glob("verl-*.whl")
    return path


@pytest.fixture(scope="module")
def environment(wheel, tmp_path_factory):
    """Virtual environment with the wheel, followed on sys.path by the packages of the test environment."""
    home = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", "--without-pip", str(home))
    python = home / "bin" / "python"
    offline = ("--no-deps", "--no-index", "--disable-pip-version-check")
    run(sys.executable, "-m", "pip", "--python", str(python), "install", *offline, str(wheel))
    (packages,) = home.glob("lib/python*/site-packages")
    # As a plain directory, its .pth files are not read, so an editable verl in it is not found.
    (packages / "rest.pth").write_text("\n".join(site.getsitepackages()) + "\n")
    return home


def in_environment(environment, *command, cwd):
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
    variables["PATH"] = f"{environment / 'bin'}:{os.environ['PATH']}"
    return run(*command, cwd=cwd, env=variables)


def test_every_file_of_the_packages_is_in_the_wheel(wheel):
    present = {
        path.relative_to(ROOT).as_posix()
        for name in PACKAGES
        for path in (ROOT / name).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    with zipfile.ZipFile(wheel) as archive:
        inside = {name for name in archive.namelist() if ".dist-info/" not in name}
        info = {name.partition(".dist-info/")[2] for name in archive.namelist()}
    assert inside == present
    assert "verl/trainer/config/ppo_trainer.yaml" in inside and "verl/utils/native/mx_kernels.c" in inside
    assert "licenses/LICENSE" in info


@pytest.mark.slow
def test_the_wheel_runs_the_doctor_and_composes_a_config(environment, tmp_path):
    """Run in an empty directory: the command, metadata, C sources, YAML files and Hydra's plugin are found."""
    python = environment / "bin" / "python"
    where = in_environment(
        environment, python, "-c", "import verl; print(verl.__file__, verl.__version__)", cwd=tmp_path
    )
    assert where.startswith(str(environment)) and where.split()[1] == PROJECT["version"]
    verl_command = environment / "bin" / "verl"
    report = json.loads(in_environment(environment, verl_command, "doctor", "--json", cwd=tmp_path))
    assert report["verl"] == PROJECT["version"]
    assert report["facts"]["kernels"] is None and report["facts"]["broken"] == {}
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "run.yaml").write_text("defaults: [ppo_trainer, _self_]\ntrainer: {total_epochs: 7}\n")
    arguments = ("--config-path", "mine", "--config-name", "run", "--cfg", "job")
    composed = in_environment(environment, python, "-m", "verl.trainer.main_ppo", *arguments, cwd=tmp_path)
    assert "total_epochs: 7" in composed and "tensor_model_parallel_size" in composed


def test_the_version_comes_from_one_place():
    assert verl.__version__ == PROJECT["version"] == metadata.version("verl")
    assert PROJECT["version"] not in (ROOT / "verl" / "__init__.py").read_text()


def test_the_changelog_has_a_section_for_the_version():
    headings = [line for line in (ROOT / "CHANGELOG.md").read_text().splitlines() if line.startswith("## [")]
    assert headings[0] == "## [Unreleased]"
    assert any(line.startswith(f"## [{PROJECT['version']}]") for line in headings)
