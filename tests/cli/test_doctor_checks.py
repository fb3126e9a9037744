import re
import sys
from pathlib import Path

import pytest
from cli.test_doctor import some_facts
from contract.vllm_ascend.build_env import RELEASES

from verl.cli.doctor_checks import findings
from verl.cli.doctor_releases import STACKS, stack_of

ROOT = Path(__file__).resolve().parents[2]
NPU = {
    "device": "npu",
    "vllm_platform": "npu",
    "accelerators": {"cuda": 0, "npu": 8},
    "requirements": ("torch", "torch-npu", "vllm", "vllm-ascend>=0.18", "transformers<5.20,>=5.16.1"),
    "packages": {
        "torch": "2.10.0+cpu",
        "torch-npu": "2.10.0.post4",
        "vllm": "0.23.0+empty",
        "vllm-ascend": "0.23.0",
        "transformers": "5.19.0",
    },
    "cann": "9.1.0",
}


def levels_and_texts(facts):
    return [(finding.level, finding.text) for finding in findings(facts)]


def the_only(facts):
    found = levels_and_texts(facts)
    assert len(found) == 1, found
    return found[0]


@pytest.fixture
def built_for(tmp_path, monkeypatch):
    """Return a function that installs a vllm-ascend that was built for a device type."""

    def install(version="0.23.0", device_type="A5"):
        package = tmp_path / "vllm_ascend"
        package.mkdir()
        (package / "__init__.py").write_text("")
        (package / "_build_info.py").write_text(f"__device_type__ = {device_type!r}\n")
        info = tmp_path / f"vllm_ascend-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm-ascend\nVersion: {version}\n")
        monkeypatch.syspath_prepend(tmp_path)
        for name in ("vllm_ascend", "vllm_ascend._build_info"):
            monkeypatch.setitem(sys.modules, name, None)
            monkeypatch.delitem(sys.modules, name)

    return install


def test_a_valid_machine_has_no_findings(built_for):
    built_for()
    assert findings(some_facts()) == []
    assert findings(some_facts(**NPU)) == []
    assert findings(some_facts(requirements=("numpy>=2",), packages={"numpy": "2.4.0rc1"})) == []


@pytest.mark.parametrize(
    ("changes", "level", "text"),
    [
        ({"python": "3.10.4"}, "error", r"Python 3\.10\.4: verl needs >=3\.11,<3\.13"),
        ({"system": "Darwin 24 arm64"}, "error", "verl needs Linux"),
        ({"packages": {"numpy": None}}, "error", "numpy is not installed; run pip install 'numpy'"),
        (
            {"requirements": ("transformers<5.20,>=5.16.1",), "packages": {"transformers": "4.57.6"}},
            "error",
            r"transformers 4\.57\.6: verl needs <5\.20,>=5\.16\.1; run pip install 'transformers<5\.20,>=5\.16\.1'",
        ),
        ({"broken": {"numpy": "ImportError: x"}}, "error", r"numpy 2\.3\.5 cannot be imported: ImportError: x"),
        ({"vllm_platform": "cuda"}, "error", "vLLM detects cuda, but verl detects cpu.*trainer.device"),
        ({"vllm_platform": ""}, "error", "vLLM detects no known device"),
        (
            {"accelerators": {"cuda": 2, "npu": 0}, "unusable": {"cuda": "a build for the CPU"}},
            "warning",
            r"2 cuda device\(s\) cannot be used: a build for the CPU",
        ),
        (
            {"environment": {"VLLM_PLUGINS": "ascend"}},
            "error",
            "VLLM_PLUGINS=ascend: .* not load the plugin verl; unset it, or",
        ),
        ({"shm_bytes": 64 * 2**20}, "warning", "/dev/shm has 64.0 MiB free.*--shm-size"),
        ({"open_files": (1024, 4096)}, "warning", "limit of open files is 4096.*ulimit -Hn"),
        ({"kernels": "no gcc; install gcc"}, "warning", "no gcc; install gcc"),
        ({"cxx": None}, "warning", r"no C\+\+ compiler.*install g\+\+"),
        (
            {"ray_cluster": "10.0.0.1:6379", "ray_answers": False},
            "warning",
            r"Ray cluster at 10\.0\.0\.1:6379, which is not reachable: unset RAY_ADDRESS",
        ),
        ({"temp_share": 0.97}, "warning", "97% full.*RAY_TMPDIR"),
    ],
)
def test_one_problem(changes, level, text):
    found = the_only(some_facts(**changes))
    assert found[0] == level
    assert re.search(text, found[1]), found[1]


@pytest.mark.parametrize(
    ("changes", "level", "text"),
    [
        ({"environment": {"VLLM_ASCEND_ENABLE_NZ": "1"}}, "error", "set VLLM_ASCEND_ENABLE_NZ=0"),
        (
            {"environment": {"PYTORCH_NPU_ALLOC_CONF": "expandable_segments:True"}},
            "error",
            "PYTORCH_NPU_ALLOC_CONF=expandable_segments:True.*remove it",
        ),
        ({"environment": {"VLLM_PLUGINS": "verl"}}, "error", "VLLM_PLUGINS=verl: .* load the plugin ascend"),
        (
            {"packages": {**NPU["packages"], "torch-npu": None}},
            "error",
            r"torch-npu is not installed; run pip install 'torch-npu==2\.10\.0\.post4'",
        ),
        ({"cann": None}, "error", r"CANN toolkit was not found.*set_env\.sh"),
        ({"cann": "9.0.0"}, "warning", r"CANN 9\.0\.0: vllm-ascend 0\.23\.0 needs 9\.1\.0"),
        (
            {"packages": {**NPU["packages"], "vllm": "0.26.0"}},
            "error",
            r"vllm 0\.26\.0: .* pip install 'vllm==0\.23\.0'",
        ),
        (
            {"packages": {**NPU["packages"], "torch-npu": "2.9.0"}},
            "warning",
            r"torch-npu 2\.9\.0: .*needs ==2\.10\.0\.post4; run pip install",
        ),
    ],
)
def test_one_problem_on_an_npu(built_for, changes, level, text):
    built_for()
    found = the_only(some_facts(**{**NPU, **changes}))
    assert found[0] == level
    assert re.search(text, found[1]), found[1]


def test_variables_of_an_npu_are_ignored_on_other_devices():
    environment = {"VLLM_ASCEND_ENABLE_NZ": "1", "PYTORCH_NPU_ALLOC_CONF": "expandable_segments:True"}
    assert findings(some_facts(environment=environment)) == []


def test_a_vllm_ascend_for_another_processor_is_an_error(built_for):
    built_for(device_type="A2")
    assert "built for device type A2, MXFP8 needs an Ascend 950" in the_only(some_facts(**NPU))[1]


def test_a_missing_vllm_ascend_on_an_npu_is_an_error():
    found = the_only(some_facts(**{**NPU, "packages": {**NPU["packages"], "vllm-ascend": None}}))
    assert "vllm-ascend is not installed; install 0.18.0 or newer, built with SOC_VERSION=ascend950" in found[1]


def test_an_untested_release_is_a_warning(built_for):
    built_for("0.30.0")
    packages = {**NPU["packages"], "vllm-ascend": "0.30.0"}
    level, text = the_only(some_facts(**{**NPU, "packages": packages}))
    assert level == "warning"
    assert "0.18.0, 0.23.0, 0.26.0rc1" in text and "Versioning Policy" in text


def test_a_release_that_needs_older_transformers_is_an_error(built_for):
    built_for("0.18.0")
    packages = {
        **NPU["packages"],
        "vllm-ascend": "0.18.0",
        "vllm": "0.18.0",
        "torch": "2.9.0",
        "torch-npu": "2.9.0.post2",
    }
    facts = some_facts(**{**NPU, "packages": packages, "cann": "8.5.1"})
    assert "verl a newer one; install vllm-ascend 0.23.0, 0.26.0rc1" in the_only(facts)[1]


def test_errors_are_before_warnings():
    found = levels_and_texts(some_facts(shm_bytes=1, cxx=None, python="3.10.0"))
    assert [level for level, _ in found] == ["error", "warning", "warning"]


def test_the_table_of_releases_equals_the_tested_and_documented_ones():
    assert {stack.vllm_ascend: stack.vllm for stack in STACKS} == {
        release.version: f"=={release.vllm}" for release in RELEASES.values()
    }
    documented = (ROOT / "docs/ascend.md").read_text()
    for stack in STACKS:
        npu, cann = stack.torch_npu.removeprefix("==").removesuffix(".*"), " or ".join(stack.cann)
        assert f"| {stack.vllm_ascend} | {stack.vllm.removeprefix('==')} | {npu} | {cann} |" in documented
    assert stack_of("0.1") is None
