"""The settings that an engine on an NPU needs."""

import subprocess
import sys

import pytest

from verl.utils.vllm.npu_settings import (
    check_npu_settings,
    npu_additional_config,
    npu_environment,
    npu_setting_problems,
)


def test_settings_need_no_torch_and_no_vllm():
    code = "import sys; import verl.utils.vllm.npu_settings; print({'torch', 'vllm', 'ray'} & sys.modules.keys())"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


def test_all_problems_of_an_environment_are_reported():
    environment = {"VLLM_ASCEND_ENABLE_NZ": "1", "PYTORCH_NPU_ALLOC_CONF": "expandable_segments:True"}
    assert [text.partition("=")[0] for text in npu_setting_problems(environment, sleep_mode=True)] == [*environment]
    assert npu_setting_problems(npu_environment({}), sleep_mode=True) == []


@pytest.mark.parametrize("value", ["1", "2", None])
def test_nz_must_be_off(value):
    environment = {} if value is None else {"VLLM_ASCEND_ENABLE_NZ": value}
    with pytest.raises(ValueError, match="set VLLM_ASCEND_ENABLE_NZ=0"):
        check_npu_settings(environment, sleep_mode=False)


@pytest.mark.parametrize("value", ["expandable_segments:True", "page_size:1g, expandable_segments:true"])
def test_expandable_segments_and_sleep_exclude_each_other(value):
    environment = {"VLLM_ASCEND_ENABLE_NZ": "0", "PYTORCH_NPU_ALLOC_CONF": value}
    with pytest.raises(ValueError, match=r"PYTORCH_NPU_ALLOC_CONF=.*expandable_segments.*free_cache_engine"):
        check_npu_settings(environment, sleep_mode=True)
    check_npu_settings(environment, sleep_mode=False)
    check_npu_settings(environment | {"PYTORCH_NPU_ALLOC_CONF": "page_size:1g"}, sleep_mode=True)


def test_nz_must_also_be_off_in_the_engine_arguments():
    def check(config):
        check_npu_settings({"VLLM_ASCEND_ENABLE_NZ": "0"}, sleep_mode=True, engine_kwargs=config)

    for fits in (None, {}, {"additional_config": None}, {"additional_config": {"weight_nz_mode": 0, "x": 1}}):
        check(fits)
    with pytest.raises(ValueError, match=r"additional_config\.weight_nz_mode=2: .*use 0"):
        check({"additional_config": {"weight_nz_mode": 2}})


def test_npu_environment_of_a_replica():
    ports = {"HCCL_HOST_SOCKET_PORT_RANGE": "auto", "HCCL_NPU_SOCKET_PORT_RANGE": "auto"}
    assert npu_environment({}) == {"VLLM_ASCEND_ENABLE_NZ": "0", **ports}
    own = {"VLLM_ASCEND_ENABLE_NZ": "1", **dict.fromkeys(ports, "61000-61050")}
    assert npu_environment(own) == own
    assert npu_environment({"VLLM_ASCEND_TASK_QUEUE_ENABLE": "2"})["TASK_QUEUE_ENABLE"] == "2"


@pytest.mark.parametrize("release", ["0.18.0", "0.23.0", "0.26.0rc1", "0.27.1rc1", "0.28.0rc1", "0.30.0rc2", "0.31.0"])
def test_nz_is_off_by_the_switch_that_the_release_reads(release):
    newer = release not in ("0.18.0",)
    assert npu_additional_config(release) == ({"weight_nz_mode": 0} if newer else {})
    by_variable = release in ("0.18.0", "0.23.0", "0.26.0rc1")
    assert ("VLLM_ASCEND_ENABLE_NZ" in npu_environment({}, release)) == by_variable
    # A variable that the release does not read is no problem.
    problems = npu_setting_problems({"VLLM_ASCEND_ENABLE_NZ": "1"}, sleep_mode=True, release=release)
    assert bool(problems) == by_variable


def test_keys_of_the_user_are_kept():
    given = {"enable_cpu_binding": False, "rl_config": {"enable_batch_invariant": True}}
    assert npu_additional_config("0.30.0rc2", given) == {**given, "weight_nz_mode": 0}
    latent = npu_additional_config("0.30.0rc2", given, latent_attention=True)
    assert latent["rl_config"] == {"enable_batch_invariant": True, "enabled": True}
    assert given["rl_config"] == {"enable_batch_invariant": True}


def test_only_latent_attention_from_0_28_on_needs_the_rl_config():
    for release in ("0.18.0", "0.23.0", "0.26.0rc1", "0.27.1rc1"):
        assert "rl_config" not in npu_additional_config(release, latent_attention=True)
    assert npu_additional_config("0.28.0rc1", latent_attention=True)["rl_config"] == {"enabled": True}
    assert "rl_config" not in npu_additional_config("0.28.0rc1")
    with pytest.raises(ValueError, match=r"rl_config\.enabled=False: vllm-ascend 0\.30\.0rc2 .*use True"):
        npu_additional_config("0.30.0rc2", {"rl_config": {"enabled": False}}, latent_attention=True)


@pytest.mark.parametrize("value", [1, 2, True])
def test_fused_experts_are_refused_by_name(value):
    config = {"additional_config": {"enable_fused_mc2": value}}
    with pytest.raises(ValueError, match=rf"additional_config\.enable_fused_mc2={value}: .*use 0, or remove the key"):
        check_npu_settings({}, sleep_mode=True, engine_kwargs=config, release="0.30.0rc2")
    config["additional_config"]["enable_fused_mc2"] = 0
    check_npu_settings({}, sleep_mode=True, engine_kwargs=config, release="0.30.0rc2")
    variables = {"VLLM_ASCEND_ENABLE_NZ": "0", "VLLM_ASCEND_ENABLE_FUSED_MC2": str(int(value))}
    with pytest.raises(ValueError, match=r"VLLM_ASCEND_ENABLE_FUSED_MC2=\d: .*unset it"):
        check_npu_settings(variables, sleep_mode=True, release="0.26.0rc1")
