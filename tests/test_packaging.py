"""The wheel: builds from what a clone holds, has every file in it, and runs where nothing of the clone is in reach."""

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
    """Built from a copy: a build leaves directories behind, and takes up those that an earlier one left."""
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
    """A virtual environment with the wheel, and behind it the packages of the one that runs the tests."""
    home = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", "--without-pip", str(home))
    python = home / "bin" / "python"
    offline = ("--no-deps", "--no-index", "--disable-pip-version-check")
    run(sys.executable, "-m", "pip", "--python", str(python), "install", *offline, str(wheel))
    (packages,) = home.glob("lib/python*/site-packages")
    # Added as a plain directory: its own .pth files, an editable verl's among them, are not read.
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


def test_the_wheel_runs_the_doctor_and_composes_a_config(environment, tmp_path):
    """From a directory of its own: the command, the metadata, the C sources, the YAML files and Hydra's plugin."""
    python = environment / "bin" / "python"
    where = in_environment(
        environment, python, "-c", "import verl; print(verl.__file__, verl.__version__)", cwd=tmp_path
    )
    assert where.startswith(str(environment)) and where.split()[1] == PROJECT["version"]
    verl_command = environment / "bin" / "verl"
    whole = json.loads(in_environment(environment, verl_command, "doctor", "--json", cwd=tmp_path))
    assert whole["verl"] == PROJECT["version"]
    assert whole["facts"]["kernels"] is None and whole["facts"]["broken"] == {}
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "run.yaml").write_text("defaults: [ppo_trainer, _self_]\ntrainer: {total_epochs: 7}\n")
    arguments = ("--config-path", "mine", "--config-name", "run", "--cfg", "job")
    composed = in_environment(environment, python, "-m", "verl.trainer.main_ppo", *arguments, cwd=tmp_path)
    assert "total_epochs: 7" in composed and "tensor_model_parallel_size" in composed


def test_the_version_comes_from_one_place():
    assert verl.__version__ == PROJECT["version"] == metadata.version("verl")
    assert PROJECT["version"] not in (ROOT / "verl" / "__init__.py").read_text()


def test_the_changelog_knows_the_version():
    headings = [line for line in (ROOT / "CHANGELOG.md").read_text().splitlines() if line.startswith("## [")]
    assert headings[0] == "## [Unreleased]"
    assert any(line.startswith(f"## [{PROJECT['version']}]") for line in headings)
