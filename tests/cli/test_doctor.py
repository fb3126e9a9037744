import dataclasses
import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import packaging
import pytest

from verl.cli import doctor
from verl.cli.doctor_checks import Finding
from verl.cli.doctor_facts import Facts

ROOT = Path(__file__).resolve().parents[2]
SECRETS = {
    "HF_TOKEN": "hf_QmFzZTY0",
    "WANDB_API_KEY": "0123456789abcdef",
    "OTHER_API_KEY": "0123456789abcdef-and-more",
    "VLLM_API_KEY": "sk-vllm-1",
    "AWS_SECRET_ACCESS_KEY": 'with"quote\\and backslash',
    "MY_PASSWORD": "correct horse",
    "RAY_AUTH_TOKEN": "ray-token-9",
    "HTTPS_PROXY": "http://someone:letmein@proxy:8080",
    "DATABASE": "postgres://someone:letmein@host/db",
}
LEAKS = [value for value in SECRETS.values() if "letmein" not in value] + ["letmein", "-and-more"]


def some_facts(**changes) -> Facts:
    values = {
        "python": "3.11.7",
        "requires_python": ">=3.11,<3.13",
        "system": "Linux 6.1 x86_64",
        "requirements": ("numpy",),
        "packages": {"numpy": "2.3.5"},
        "broken": {},
        "vllm_platform": "cpu",
        "device": "cpu",
        "accelerators": {"cuda": 0, "npu": 0},
        "unusable": {},
        "cores": 2,
        "cpu_flags": ("avx2",),
        "dtype": "float32 (auto)",
        "kernels": None,
        "cxx": "/usr/bin/g++",
        "cann": None,
        "driver": None,
        "memory_bytes": 2**34,
        "shm_bytes": 2**33,
        "shm_size_bytes": 2**34,
        "temp_bytes": 2**35,
        "temp_share": 0.5,
        "open_files": (1024, -1),
        "ray_cluster": None,
        "ray_answers": None,
        "environment": {},
    }
    return Facts(**(values | changes))


@pytest.mark.parametrize("render", [doctor.as_text, doctor.as_json])
def test_no_secret_is_shown(render):
    text = " and ".join(SECRETS.values())
    facts = some_facts(
        environment={**SECRETS, "VLLM_PLUGINS": "verl", "PATH": "/opt/mine", "HOME": "/home/someone"},
        broken={"torch": f"no module in /home/someone/lib, {text}"},
        ray_cluster="ray://someone:letmein@10.0.0.1:6379",
    )
    shown = render(facts, [Finding("error", "packages", text)])
    for secret in [*LEAKS, *(json.dumps(leak)[1:-1] for leak in LEAKS)]:
        assert secret not in shown
    assert "/home/someone" not in shown
    assert "VLLM_PLUGINS" in shown and "HF_TOKEN" in shown and "/opt/mine" not in shown
    assert "***" in shown


def test_only_known_variables_are_shown_with_their_value():
    environment = {"VLLM_ASCEND_ENABLE_NZ": "1", "HCCL_NEW": "x", "HF_TOKEN": "y", "EDITOR": "vi"}
    assert doctor.shown_environment(environment) == {
        "HCCL_NEW": "(set)",
        "HF_TOKEN": "(set)",
        "VLLM_ASCEND_ENABLE_NZ": "1",
    }


def test_text_shows_findings_twice_and_their_number():
    """Findings are shown at the top and in the block for a bug report."""
    found = [Finding("error", "packages", "a: b; do c"), Finding("warning", "machine", "d: e; do f")]
    text = doctor.as_text(some_facts(), found)
    assert "1 error, 1 warning" in text.splitlines()[0]
    assert text.count("do c") == text.count("do f") == 2
    block = text.partition("```text\n")[2]
    assert block.endswith("\n```") and "numpy 2.3.5" in block and "starts a new cluster" in block
    assert "8.0 GiB free of 16.0 GiB" in block and "2 cores, avx2" in block
    assert "no problems found" in doctor.as_text(some_facts(), [])


def test_json_contains_every_fact():
    facts = some_facts(environment={"VLLM_PLUGINS": "verl"})
    whole = json.loads(doctor.as_json(facts, [Finding("error", "ray", "x")]))
    assert whole["findings"] == [{"level": "error", "topic": "ray", "text": "x"}]
    assert whole["facts"] == json.loads(json.dumps(dataclasses.asdict(facts)))


def run_doctor(code_path: str, *, flags=(), **environment):
    code = (
        "import argparse, sys; from verl.cli import doctor; p = argparse.ArgumentParser(); doctor.add_arguments(p); "
        "sys.exit(doctor.run(p.parse_args(sys.argv[1:])))"
    )
    return subprocess.run(
        [sys.executable, *flags, "-c", code, "--json"],
        env={**os.environ, "PYTHONPATH": code_path, **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def write_metadata(directory: Path) -> None:
    """Write the metadata of an installed verl, from pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needs = [*project["dependencies"]]
    needs += [
        f'{each}; extra == "{extra}"' for extra, some in project["optional-dependencies"].items() for each in some
    ]
    lines = ["Metadata-Version: 2.1", "Name: verl", f"Version: {project['version']}"]
    lines += [f"Requires-Python: {project['requires-python']}", *(f"Requires-Dist: {each}" for each in needs)]
    (directory / "verl-0.dist-info").mkdir()
    (directory / "verl-0.dist-info" / "METADATA").write_text("\n".join(lines) + "\n")


def test_missing_packages_are_findings(tmp_path):
    """In an interpreter with only verl and packaging, every missing package is a finding with a command."""
    write_metadata(tmp_path)
    (tmp_path / "packaging").symlink_to(Path(packaging.__file__).parent)
    done = run_doctor(os.pathsep.join([str(ROOT), str(tmp_path)]), flags=["-S"])
    assert done.returncode == 1, done.stderr
    assert done.stderr == ""
    texts = [finding["text"] for finding in json.loads(done.stdout)["findings"] if finding["level"] == "error"]
    for needed in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["cpu"]:
        assert f"{needed.partition('=')[0]} is not installed; run pip install '{needed}'" in texts
    assert len(texts) > 10


def test_missing_packaging_is_an_error(tmp_path):
    write_metadata(tmp_path)
    done = run_doctor(os.pathsep.join([str(ROOT), str(tmp_path)]), flags=["-S"])
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "verl doctor: the package packaging is not installed; run `pip install packaging`\n"


@pytest.mark.slow
def test_doctor_on_this_machine_reports_broken_packages(tmp_path):
    """Two packages are broken; one of them ends its process."""
    (tmp_path / "ray.py").write_text("raise ImportError('libray.so: cannot open')")
    (tmp_path / "transformers.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGILL)")
    done = run_doctor(os.pathsep.join([str(tmp_path), str(ROOT)]), **SECRETS)
    assert done.returncode == 1
    assert not [secret for secret in LEAKS if secret in done.stdout + done.stderr]
    whole = json.loads(done.stdout)
    assert whole["facts"]["broken"]["ray"] == "ImportError: libray.so: cannot open"
    assert whole["facts"]["broken"]["transformers"] == "ends the process (SIGILL)"
    assert "torch" not in whole["facts"]["broken"]
    texts = [finding["text"] for finding in whole["findings"]]
    assert any("ray" in text and "cannot be imported: ImportError: libray.so" in text for text in texts)
