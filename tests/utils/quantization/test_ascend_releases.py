"""The installed vllm-ascend, and layers that a release cannot hold. tests/contract shows the releases' own failures."""

import sys
import types
from dataclasses import replace

import pytest

from fixtures.tiny import write_tiny_model
from verl.utils.quantization import ascend_releases
from verl.utils.quantization.ascend_description import build_description
from verl.utils.quantization.ascend_releases import (
    check_vllm_ascend,
    untested_release,
    validate_mxfp4,
    validate_paired_groups,
)


@pytest.fixture(scope="module")
def layers(tmp_path_factory):
    def of(kind, tp_size=1, ignore=(), **sizes):
        directory = write_tiny_model(tmp_path_factory.mktemp("model"), kind=kind, **sizes)
        return build_description(directory, tp_size=tp_size, ignore=ignore).layers

    return of


@pytest.mark.parametrize("release", ["0.18.0", "0.18.1rc1", "0.23.0", "0.26.0rc1", "0.30.0"])
def test_even_numbers_of_groups_fit_every_release(layers, release):
    """Does not raise."""
    validate_paired_groups(layers("qwen3_moe"), 1, release)
    validate_paired_groups(layers("qwen3"), 1, release)


@pytest.mark.parametrize(("size", "fits"), [(96, False), (80, False), (192, True)])
def test_odd_numbers_of_groups_are_rejected_on_0_18(layers, size, fits):
    found = layers("qwen3", hidden_size=size)
    validate_paired_groups(found, 1, "0.23.0")
    if fits:
        validate_paired_groups(found, 1, "0.18.0")
        return
    message = rf"layers\.0\.\S+ \[\d+, {size}\] has {size} inputs .*0\.18\.0 takes multiples of 64 only: use .*0\.23\.0"
    with pytest.raises(ValueError, match=message):
        validate_paired_groups(found, 1, "0.18.0")


def test_groups_are_counted_per_rank(layers):
    found = layers("qwen3", tp_size=2, intermediate_size=192)
    validate_paired_groups(found, 1, "0.18.0")
    with pytest.raises(
        ValueError, match=r"down_proj \[64, 192\] has 96 inputs on a rank \(tensor_model_parallel_size=2"
    ):
        validate_paired_groups(found, 2, "0.18.0")


@pytest.mark.parametrize("release", ["0.18.0", "0.23.0", "0.26.0rc1", "0.26.0", "0.27.1", "0.28.0rc1", "0.30.0"])
@pytest.mark.parametrize("sizes", [{"moe_intermediate_size": 96}, {"moe_intermediate_size": 80}])
def test_odd_numbers_of_groups_in_experts_are_rejected_on_known_releases(layers, release, sizes):
    found = layers("qwen3_moe", **sizes)
    with pytest.raises(
        ValueError, match=r"experts\.0\.down_proj .* takes multiples of 64 in experts only: leave it out"
    ):
        validate_paired_groups(found, 1, release)
    validate_paired_groups(layers("qwen3_moe", ignore=[r"re:.*\.experts\..*"], **sizes), 1, release)
    validate_paired_groups(found, 1, "0.31.0")  # unknown: its own load would raise


def test_whole_experts_are_counted_whole(layers):
    """128 inputs of an expert: 64 on each of two ranks, 32 on each of four; 64 outputs: 8 on each of eight."""
    found = layers("qwen3_moe", tp_size=4, moe_intermediate_size=128)
    with pytest.raises(ValueError, match=r"down_proj .*32 inputs on a rank.*use \S+expert_parallel_size=4, or leave"):
        validate_paired_groups(found, 4, "0.26.0")
    validate_paired_groups(found, 4, "0.26.0", expert_parallel=True)
    found = [replace(layer, scheme="W4A8_MXFP") for layer in layers("qwen3_moe") if layer.experts and layer.quantized]
    with pytest.raises(ValueError, match=r"gate_proj .* has 8 outputs on a rank"):
        validate_mxfp4(found, 8, "0.30.0")
    validate_mxfp4(found, 8, "0.30.0", expert_parallel=True)


def installed(monkeypatch, version, device_type="A5"):
    monkeypatch.setattr(ascend_releases.metadata, "version", lambda name: version)
    monkeypatch.setitem(sys.modules, "vllm_ascend", types.SimpleNamespace(__path__=[]))
    monkeypatch.setitem(sys.modules, "vllm_ascend._build_info", types.SimpleNamespace(__device_type__=device_type))


def test_missing_vllm_ascend_is_rejected():
    with pytest.raises(ValueError, match=r"vllm-ascend is not installed; install 0\.18\.0"):
        check_vllm_ascend()


def test_old_vllm_ascend_is_rejected(monkeypatch):
    installed(monkeypatch, "0.17.0rc1")
    with pytest.raises(ValueError, match=r"vllm-ascend 0\.17\.0rc1 is too old"):
        check_vllm_ascend()


@pytest.mark.parametrize("device_type", ["A2", "AscendDeviceType.A3"])
def test_vllm_ascend_for_another_processor_is_rejected(monkeypatch, device_type):
    installed(monkeypatch, "0.23.0", device_type)
    with pytest.raises(ValueError, match=f"device type {device_type}, MXFP8 needs an Ascend 950"):
        check_vllm_ascend()


@pytest.mark.parametrize("version", ["0.18.0", "0.26.0rc1", "0.30.0rc2"])
def test_supported_vllm_ascend_returns_its_version(monkeypatch, version):
    installed(monkeypatch, version)
    assert check_vllm_ascend() == version


def test_release_newer_than_the_tested_ones_has_a_warning():
    for known in ("0.18.0", "0.28.0rc1", "0.30.0rc1", "0.30.0"):
        assert untested_release(known) is None
    for newer in ("0.30.1rc1", "0.31.0"):
        text = untested_release(newer)
        assert text is not None
        assert f"vllm-ascend {newer} is newer than the newest release tested with verl, 0.30.0rc2" in text
        assert "only after a self-test" in text


def mxfp4_layers(layers, kind, tp_size=1, **sizes):
    return [replace(layer, scheme="W4A8_MXFP") for layer in layers(kind, tp_size, **sizes)]


@pytest.mark.parametrize("release", ["0.18.0", "0.23.0", "0.26.0rc1", "0.27.1"])
@pytest.mark.parametrize("kind", ["qwen3", "qwen3_moe"])
def test_mxfp4_weights_are_rejected_before_0_28(layers, release, kind):
    found = mxfp4_layers(layers, kind)
    message = rf"\S+_proj is W4A8_MXFP, and vllm-ascend {release} cannot replace such weights: use .* 0\.28\.0"
    with pytest.raises(ValueError, match=message):
        validate_mxfp4(found, 1, release)
    for newer in ("0.28.0rc1", "0.28.0", "0.30.0rc2"):
        validate_mxfp4(found, 1, newer)
    validate_mxfp4(layers(kind), 1, release)  # MXFP8


def test_mxfp4_weights_need_full_blocks_of_rows_on_each_rank(layers):
    """64 outputs of gate_proj: 16 on each of four ranks, 8 on each of eight."""
    found = [layer for layer in mxfp4_layers(layers, "qwen3", intermediate_size=64) if "gate_proj" in layer.name]
    validate_mxfp4(found, 4, "0.30.0")
    with pytest.raises(
        ValueError, match=r"gate_proj \[64, 64\] is W4A8_MXFP and has 8 outputs .*size=8\), must be a multiple of 16"
    ):
        validate_mxfp4(found, 8, "0.30.0")
