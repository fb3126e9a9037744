"""Requirements and vLLM arguments of `rollout.quantization=torchao`."""

import json

import pytest

from fixtures.torchao import torchao_directory
from verl.utils.quantization.schemes import torchao as torchao_format

UNKNOWN_TYPE = '{"_type": "Int3WeightOnlyConfig", "_version": 2, "_data": {}}'
UNKNOWN_FIELD = '{"_type": "Int8WeightOnlyConfig", "_version": 2, "_data": {"groups": 1}}'


@pytest.fixture
def torchao(monkeypatch):
    monkeypatch.syspath_prepend(torchao_directory())


def test_config_file_is_required(dense, make):
    with pytest.raises(ValueError, match=r"needs actor_rollout_ref\.rollout\.quantization_config_file"):
        make("torchao", dense).engine_overrides("cpu")


def test_torchao_must_be_installed(dense, make, monkeypatch, tmp_path):
    monkeypatch.setattr(torchao_format, "find_spec", lambda name: None)
    path = tmp_path / "torchao.json"
    path.write_text('{"_type": "Int8WeightOnlyConfig"}')
    with pytest.raises(ValueError, match="torchao is not installed"):
        make("torchao", dense, quantization_config_file=str(path)).engine_overrides("cpu")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "the file is empty; correct"),
        ("{", "damaged JSON at line 1"),
        ("[]", "expected an object; correct"),
        ('{"_type": 5}', "it has no _type; see"),
        ('{"_type": "A", "_type": "B"}', "'_type' stands twice"),
        ('{"_type": "A", "_version": "2"}', "_version='2' must be a whole number"),
        ('{"_type": "A", "_data": [1]}', r"_data=\[1\] must be an object"),
    ],
)
def test_the_file_is_checked_before_a_run_without_torchao(dense, make, tmp_path, content, words):
    path = tmp_path / "torchao.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=rf"quantization_config_file=.*torchao\.json: .*{words}"):
        make("torchao", dense, quantization_config_file=str(path)).validate("cpu", installed=False)


@pytest.mark.parametrize("content", [None, "{", "[]", "{}", UNKNOWN_TYPE, UNKNOWN_FIELD])
def test_damaged_config_file_is_rejected(dense, make, torchao, tmp_path, content):
    path = tmp_path / "torchao.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match=r"quantization_config_file=.*torchao\.json"):
        make("torchao", dense, quantization_config_file=str(path)).engine_overrides("cpu")


def test_config_file_is_passed_to_vllm(dense, make, torchao, tmp_path):
    path = tmp_path / "torchao.json"
    path.write_text(json.dumps({"_type": "Int8WeightOnlyConfig", "_version": 2, "_data": {}}))
    overrides = make("torchao", dense, quantization_config_file=str(path)).engine_overrides("cpu")
    assert overrides == {"quantization": "torchao", "hf_overrides": {"quantization_config_file": str(path)}}
